"""Lightning says a wrong option by an error that it raises itself."""

from __future__ import annotations

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from talklora_pl.internals.lightning import raised_by_lightning


def test_who_raised(tmp_path) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(default_root_dir=tmp_path, max_steps=1, val_check_interval=1000, **quiet)
    with pytest.raises(ValueError, match="val_check_interval") as refused:
        trainer.fit(BoringModel())
    assert raised_by_lightning(refused.value)

    class Broken(BoringModel):
        def training_step(self, batch, batch_idx):
            return int("broken")

    with pytest.raises(ValueError, match="broken") as own:
        L.Trainer(default_root_dir=tmp_path, max_steps=1, **quiet).fit(Broken())
    assert not raised_by_lightning(own.value)
