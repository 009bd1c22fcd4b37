"""What a resumed run needs, beyond Lightning's own state, to end as if it had never been interrupted."""

from __future__ import annotations

import hashlib
import math
import os
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from talklora_pl.adapter.fingerprint import agree
from talklora_pl.adapter.metadata import AdapterMetadata
from talklora_pl.adapter_module import AdapterModule
from talklora_pl.callbacks.others import FINDERS
from talklora_pl.data.sampler import accumulation
from talklora_pl.distributed.checkpoint import KEY as METADATA
from talklora_pl.distributed.checkpoint import refuse_differences
from talklora_pl.distributed.seeding import seed_step
from talklora_pl.errors import UserError
from talklora_pl.internals.lightning import (
    back_to_the_last_step,
    first_validation_batch_started,
    logged_step,
    step_ends,
    training_batches,
    validation_follows,
)

if TYPE_CHECKING:
    import datasets


KEY = "talklora_resume"


class ExactResume(L.Callback):
    """Makes "interrupted and resumed" equal "uninterrupted", and lets what the user typed win.

    1. Random numbers are reseeded before every micro-batch from (seed, micro-batch, rank), so dropout resumes exactly.
    2. A checkpoint that is written while a validation is due or running says so; Lightning would leave it out. One
       that is written amid an optimiser step goes on from the end of the step before, whose weights it holds.
    3. Optimiser and scheduler options that differ from those of the interrupted run win over the checkpoint's.
    4. Another adapter, base, allocation, optimiser or schedule than that of the interrupted run is refused by name.
    5. Logged values keep their steps; Lightning's own count is off by one after some resumes.
    6. The position within an epoch is converted if the same optimiser step is now made of other micro-batches (two
       processes, or one that accumulates twice); a step of another size mid-epoch is refused.
    7. Other training rows (by what the model sees of them) are refused at any position.
    8. Another seed is said.
    9. A resumed fit that is over already says so, and writes nothing.
    """

    def __init__(self) -> None:
        self._now: dict[str, Any] = {}  # options of optimisers and schedulers as this run made them
        self._parts: dict[str, Any] = {}  # which optimisers and schedulers, of how many tensors
        self._rows: dict[str, Any] = {}  # that are trained on
        self._saved: dict[str, Any] | None = None
        self._trained = False

    # ------------------------------------------------------------------ 7, 9

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        table = getattr(getattr(trainer, "datamodule", None), "tables", {}).get("train")
        self._rows = {} if table is None or stage != "fit" else _content(table)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path and not self._trained:
            limits = {name: getattr(trainer, name) for name in ("max_steps", "max_epochs")}
            said = ", ".join(f"trainer.{name} {limit}" for name, limit in limits.items() if limit not in (None, -1))
            rank_zero_info(
                f"Nothing is left to do: {trainer.ckpt_path} is already at step {trainer.global_step}, with {said}. "
                "Nothing was written. Raise the limit to go on, or begin a new run from this adapter with "
                "--model.adapter_path."
            )

    # ------------------------------------------------------------------ 1, 5

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed_step(_seed(), trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank)
        logged_step(trainer, trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # Lightning counts a step after the validation that follows it
            logged_step(trainer, trainer.global_step - 1)
            # and would take the batch in which this validation was once interrupted for a new interruption
            count: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
            count.ready = count.started = count.processed

    # ------------------------------------------------------------------ 2

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = {
            "options": self._now,
            "parts": self._parts,
            "data": _data(trainer, trainer.accumulate_grad_batches),
            "rows": self._rows,
            "accumulate": trainer.accumulate_grad_batches,
            "seed": _seed(),
        }
        loops = checkpoint.get("loops", {}).get("fit_loop")
        if loops is None or trainer.sanity_checking:
            return
        if not step_ends(trainer):
            back_to_the_last_step(loops, trainer.accumulate_grad_batches)
        elif validation_due(trainer):
            first_validation_batch_started(loops)

    # ------------------------------------------------------------------ 3

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._now = {
            "optimizers": [[_options(g) for g in o.param_groups] for o in trainer.optimizers],
            "schedulers": [_options(c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs],
        }
        self._parts = {
            "optimizer": [type(o).__name__ for o in trainer.optimizers],
            "tensors of each parameter group": [[len(g["params"]) for g in o.param_groups] for o in trainer.optimizers],
            "lr_scheduler": [type(c.scheduler).__name__ for c in trainer.lr_scheduler_configs],
        }
        self._refuse_other_parts(trainer)

    def _refuse_other_parts(self, trainer: L.Trainer) -> None:
        """Once both are known; which is first depends on the strategy, the states are always restored later."""
        if self._saved is not None and self._parts:
            refuse_differences(self._saved["parts"], self._parts, trainer.ckpt_path or "")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trained = True
        # a GradientAccumulationScheduler sets it at the start of an epoch, which a run that is resumed amid one is past
        trainer.accumulate_grad_batches = accumulation(trainer, trainer.current_epoch)
        loop: Any = trainer.fit_loop
        epoch = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epoch.started == epoch.processed:
            # The checkpoint was written after an epoch's last batch. Lightning has counted that epoch as done, and
            # would not count the next one as started: a checkpoint of that one could not be resumed.
            loop.reset_restart_stage()
        if self._saved is None:
            return
        before = self._saved["options"]
        for optimizer, now, then in zip(trainer.optimizers, self._now["optimizers"], before["optimizers"]):
            for group, options, old in zip(optimizer.param_groups, now, then):
                group.update({k: v for k, v in options.items() if old.get(k) != v})
        for config, options, old in zip(trainer.lr_scheduler_configs, self._now["schedulers"], before["schedulers"]):
            changed = {k: v for k, v in options.items() if old.get(k) != v}
            config.scheduler.load_state_dict({**config.scheduler.state_dict(), **changed})
        self._saved = None

    # ------------------------------------------------------------------ 4, 6, 8

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: AdapterModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        if "optimizer_states" not in checkpoint:
            raise UserError(
                f"{trainer.ckpt_path} holds weights only, without the optimiser's state: it can be tested and exported "
                "but a fit cannot go on from it."
            )
        saved = checkpoint.get(KEY)
        # without parts: written before the fit began, by one of Lightning's finders, which goes back to it
        if saved is None or not saved["parts"]:
            return
        path = trainer.ckpt_path or ""
        if found := [type(c).__name__ for c in trainer.callbacks if type(c) in FINDERS]:  # type: ignore[attr-defined]
            raise UserError(
                f"trainer.callbacks: {found[0]} looks for its value at the beginning of a run, and {path} is amid one. "
                "Leave it out, and give the value that it found."
            )
        self._saved = saved
        accumulate = accumulation(trainer, checkpoint["epoch"])
        written = AdapterMetadata.from_dict(checkpoint[METADATA], path)
        then, now = _methods(written, pl_module.adapter_metadata(like=written.base.fingerprint))
        refuse_differences(then, now, path)
        self._refuse_other_parts(trainer)
        if saved.get("rows") and self._rows:  # absent in version 0.1
            refuse_differences(saved["rows"], self._rows, path, other_data=True)
        if (seed := saved.get("seed", _seed())) != _seed():  # absent in version 0.1
            rank_zero_warn(
                f"The interrupted run had seed {seed}, this one has {_seed()}: dropout draws other numbers from here "
                f"on. --seed_everything {seed} goes on as it would have."
            )
        total, current, is_last = training_batches(checkpoint["loops"]["fit_loop"])
        done = current["processed"]
        if done == 0 or is_last:
            return  # between two epochs everything may change
        if done % saved["accumulate"]:
            raise UserError(
                "The checkpoint was written in the middle of an optimiser step, whose gradients it does not hold. Use "
                "last.ckpt, or the callbacks Checkpoint and Preemption, which save between steps."
            )
        refuse_differences({"data": saved["data"]}, {"data": _data(trainer, accumulate)}, path, other_data=True)
        ratio = accumulate / saved["accumulate"]
        if ratio != 1:
            for count in (current, total):
                done, running = math.ceil(count["processed"] * ratio), count["processed"] - count["completed"]
                count.update(ready=done, started=done, processed=done, completed=done - running)


def _seed() -> int:
    """Of the run; 0 where nobody set one."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def _methods(*metadata: AdapterMetadata) -> list[dict[str, Any]]:
    """What may not differ: the adapter, the experts per layer, and the base, by its weights rather than its place."""
    bases = [m.base.to_dict() for m in metadata]
    marks = [base.pop("fingerprint") for base in bases]
    if all(marks):
        same = agree(*marks)
        for base, mark in zip(bases, marks):
            del base["name_or_path"], base["revision"]
            base["weights"] = "the same" if same else hashlib.sha256(mark.encode()).hexdigest()[:12]
    return [{"base": base, **m.method()} for base, m in zip(bases, metadata)]


def _data(trainer: L.Trainer, accumulate: int) -> dict[str, Any]:
    """What the order of the rows within an epoch depends on."""
    data: Any = getattr(trainer, "datamodule", None)
    if not hasattr(data, "batch_size"):
        return {}
    batches = trainer.world_size * accumulate
    size = {"rows of an optimiser step (batch_size x processes x accumulate_grad_batches)": data.batch_size * batches}
    if (budget := getattr(data, "max_tokens", None)) is not None:
        size = {"batches of an optimiser step (processes x accumulate_grad_batches)": batches, "max_tokens": budget}
    return {
        **size,
        **{name: getattr(data, name) for name in ("seed", "length_grouped") if hasattr(data, name)},
        "rows": {name: len(table) for name, table in getattr(data, "tables", {}).items() if name == "train"},
    }


def _content(table: datasets.Dataset) -> dict[str, Any]:
    """The rows of a table as the model sees them: how many rows and tokens, and a digest of the tokens and labels."""
    digest, tokens = hashlib.blake2b(digest_size=8), 0
    for part in table.select_columns(["input_ids", "labels", "label"]).with_format("arrow").iter(batch_size=4096):
        for column in part.columns:
            for values in column.chunks:
                while hasattr(values, "value_lengths"):
                    digest.update(values.value_lengths().to_numpy(zero_copy_only=False))
                    values = values.flatten()
                digest.update(values.to_numpy(zero_copy_only=False))
        tokens += len(part["input_ids"].combine_chunks().flatten().flatten())
    return {
        "training rows": len(table),
        "tokens of training rows": tokens,
        "digest of training rows": digest.hexdigest(),
    }


def _options(state: dict[str, Any]) -> dict[str, Any]:
    """The plain entries of an optimiser's group or a scheduler's state."""
    plain = (bool, int, float, str, type(None))

    def is_plain(value: Any) -> bool:
        return isinstance(value, plain) or (isinstance(value, list | tuple) and all(map(is_plain, value)))

    return {k: v for k, v in state.items() if k != "params" and is_plain(v)}


def validation_due(trainer: L.Trainer) -> bool:
    """Whether the newest training batch is to be followed by a validation that has not ended yet."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.validating:
        progress = loop.val_loop.batch_progress
        return not (progress.is_last_batch and progress.current.completed == progress.current.ready)
    batches: Any = loop.batch_progress.total
    in_batch_end = batches.processed == batches.completed + 1
    return bool(in_batch_end) and trainer.enable_validation and validation_follows(trainer)
