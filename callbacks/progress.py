"""Lightning's progress bar where the number of epochs is open."""

from lightning.pytorch.callbacks import RichProgressBar


class EpochProgress(RichProgressBar):
    """Without the number of the last epoch in a run that only steps or time limit; Lightning shows it as -2."""

    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch).replace("/-2", "")
