"""Writes the adapter as a folder that other programs load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from talklora_pl.adapter.io import adapter_tensors
from talklora_pl.adapter_module import AdapterModule
from talklora_pl.export.run import export_checkpoint, export_tensors, facts_of, gather_full, store_facts


class AdapterExport(L.Callback):
    """Exports the adapter at the end of a fit to ``last``, and that of every new best checkpoint to ``best``.

    A folder appears whole or not at all, and replaces the one before. What is in it: :mod:`talklora_pl.export`.
    One process writes. Where the best is, is said when there is one for the first time.

    Args:
        dirpath: where the folders go; by default ``adapters`` in the run's log folder.
        best: also export the best checkpoint; it needs a validation.
        license: of the adapter, for the model card: an identifier of the hub such as ``apache-2.0``.
    """

    def __init__(self, dirpath: str | None = None, best: bool = True, license: str | None = None) -> None:
        self.dirpath = dirpath
        self.best = best
        self.license = license
        self._folder = Path()
        self._exported: tuple[str, float] | None = None
        self._said = False
        self._trained = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # log_dir is agreed upon by all processes, so all have to ask
        self._folder = Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "adapters")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        store_facts(checkpoint, replace(facts_of(trainer), license=self.license))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trained = True

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: AdapterModule, batch: Any, batch_idx: int) -> None:
        self._export_best(trainer, pl_module)  # Lightning saves checkpoints after all other callbacks had their turn

    def on_fit_end(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        if trainer.fast_dev_run or (trainer.ckpt_path and not self._trained):  # type: ignore[attr-defined]
            return
        self._export_best(trainer, pl_module)
        tensors, metadata = gather_full(adapter_tensors(pl_module.model)), pl_module.adapter_metadata()
        if trainer.is_global_zero:
            facts = replace(facts_of(trainer), license=self.license)
            folder = export_tensors(self._folder / "last", tensors, metadata, pl_module.base, facts)
            rank_zero_info(f"Adapter: {folder}")

    def _export_best(self, trainer: L.Trainer, pl_module: AdapterModule) -> None:
        checkpoint = trainer.checkpoint_callback
        if not (self.best and trainer.is_global_zero and isinstance(checkpoint, ModelCheckpoint)):
            return
        path, score = checkpoint.best_model_path, checkpoint.best_model_score
        if checkpoint.monitor is None or score is None or (path, float(score)) == self._exported:
            return
        self._exported = (path, float(score))
        if Path(path).is_file():
            trust = pl_module.base.trust_remote_code
            folder = export_checkpoint(path, self._folder / "best", license=self.license, trust_remote_code=trust)
            if not self._said:  # there may be a better one after every validation
                rank_zero_info(f"Adapter of the best checkpoint: {folder}")
                self._said = True
