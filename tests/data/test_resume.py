"""A run that continues from any of its checkpoints sees exactly the batches that the uninterrupted run saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from talklora_pl.base import BaseModel
from talklora_pl.data import Source, TextData


class Recorder(L.LightningModule):
    """Remembers which rows it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[str], int]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.trainer.current_epoch, batch["id"], batch["step_tokens"]))
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(L.Callback):
    """A checkpoint wherever ModelCheckpoint may write one: after an update, a validation, an epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: L.Trainer, when: str) -> None:
        trainer.save_checkpoint(self.folder / when / f"{trainer.fit_loop.total_batch_idx:02}.ckpt")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.save(trainer, "step")

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.save(trainer, "epoch")

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, "val")


def run(train: Any, base: BaseModel, folder: Path, resume: Path | None = None, **options: Any) -> Recorder:
    more = {"num_workers": options.pop("workers", 0), "max_tokens": options.pop("max_tokens", None)}
    module = Recorder()
    data = TextData(train, base=base, batch_size=3, max_length=40, val_size=2, **more)
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=3,
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SaveEverywhere(folder)] if resume is None else None,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return module


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 4, "accumulate_grad_batches": 3},
        {"val_check_interval": 3},
        {"workers": 1},
    ],
    ids=["plain", "accumulated", "cut short", "validated often", "worker"],
)
def test_every_checkpoint_continues_exactly(
    base: BaseModel, jsonl: Callable[..., str], tmp_path: Path, options: dict[str, Any]
) -> None:
    path = jsonl([{"prompt": "p" * (i % 5 + 1), "completion": str(i)} for i in range(21)])
    whole = run(path, base, tmp_path / "whole", **options).seen
    per_epoch = len(whole) // 3
    assert per_epoch == options.get("limit_train_batches", 7)
    orders = [[ids for _, ids, _ in whole[i : i + per_epoch]] for i in range(0, len(whole), per_epoch)]
    assert orders[0] != orders[1] != orders[2]
    checkpoints = sorted((tmp_path / "whole").rglob("*.ckpt"))
    assert {file.parent.name for file in checkpoints} == {"step", "epoch", "val"}
    for file in checkpoints[:: 2 if "workers" not in options else 7]:
        done = torch.load(file)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        rest = run(path, base, tmp_path / "rest", file, **options).seen
        assert rest == whole[done:], file


def test_packs_of_a_mixture_continue_exactly(base: BaseModel, jsonl: Callable[..., str], tmp_path: Path) -> None:
    rows = [{"prompt": "p" * (i % 9 + 1), "completion": str(i)} for i in range(24)]
    paths = [jsonl(rows[:6], "few.jsonl"), jsonl(rows[6:], "many.jsonl")]
    train = [Source(path, weight=weight) for path, weight in zip(paths, (2, 1))]
    whole = run(train, base, tmp_path / "whole", max_tokens=40, accumulate_grad_batches=2).seen
    per_epoch = len(whole) // 3
    epochs = [
        Counter(name for _, ids, _ in whole[i : i + per_epoch] for name in ids) for i in range(0, len(whole), per_epoch)
    ]
    assert epochs[0] != epochs[1] and len({sum(epoch.values()) for epoch in epochs}) == 1
    for file in sorted((tmp_path / "whole").rglob("*.ckpt"))[::3]:
        done = torch.load(file)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        assert run(train, base, tmp_path / "rest", file, max_tokens=40, accumulate_grad_batches=2).seen == whole[done:]


def test_tokens_of_a_step_are_those_of_its_micro_batches(
    base: BaseModel, jsonl: Callable[..., str], tmp_path: Path
) -> None:
    path = jsonl([{"prompt": "p", "completion": "c" * (i % 7 + 1)} for i in range(21)])
    seen = run(path, base, tmp_path, accumulate_grad_batches=2, limit_train_batches=5).seen
    tokens = {f"rows-{i}": i % 7 + 2 for i in range(21)}  # and the end
    for epoch in range(3):
        batches = [(ids, step) for e, ids, step in seen if e == epoch]
        for i in (0, 2, 4):
            group = batches[i : i + 2]
            assert {step for _, step in group} == {sum(tokens[name] for ids, _ in group for name in ids)}
