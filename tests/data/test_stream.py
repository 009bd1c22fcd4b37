"""Training rows that are read while they are trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import pytest
import torch

from talklora_pl.base import BaseModel
from talklora_pl.data import Source, TextData
from talklora_pl.data.stream import Stream
from talklora_pl.errors import UserError
from tests.data.test_resume import Recorder

Jsonl = Callable[..., str]


def rows(n: int, name: str = "r") -> list[dict[str, Any]]:
    return [{"prompt": "p" * (i % 5 + 1), "completion": str(i), "id": f"{name}{i}"} for i in range(n)]


def module(base: BaseModel, train: Any, **options: Any) -> TextData:
    data = TextData(
        train, base=base, **{"streaming": True, "val_size": 0, "batch_size": 2, "shuffle_buffer": 6, **options}
    )
    data.prepare_data()
    data.setup("fit")
    return data


def ids(batches: Any, n: int) -> list[list[str]]:
    return [batch["id"] for batch in islice(batches, n)]


def of_rank(data: TextData, rank: int, world: int, n: int) -> list[str]:
    stream = data._stream_loader().stream
    own = Stream(stream.works, stream.recipe, rank, world, {})
    return [name for batch, *_ in islice(own, n) for name in batch["id"]]


@pytest.mark.parametrize("buffer", [6, 16, 24, 10**9])
def test_every_row_once_in_a_pass_in_an_order_of_the_seed(base: BaseModel, jsonl: Jsonl, buffer: int) -> None:
    path = jsonl(rows(24))
    seen, again, other = (
        ids(module(base, path, seed=seed, shuffle_buffer=buffer).train_dataloader(), 24) for seed in (0, 0, 1)
    )
    assert seen == again != other
    for turn in (seen[:12], seen[12:]):
        assert Counter(chain.from_iterable(turn)) == Counter(f"r{i}" for i in range(24))
    assert seen[:12] != seen[12:]


@pytest.mark.parametrize("of_the_hub", [False, True])
def test_ranks_share_the_rows(base: BaseModel, jsonl: Jsonl, of_the_hub: bool) -> None:
    train: Any = datasets.Dataset.from_list(rows(24)).to_iterable_dataset() if of_the_hub else jsonl(rows(24))
    data = module(base, train)
    first, second = (of_rank(data, rank, 2, 6) for rank in (0, 1))
    assert not set(first) & set(second)
    assert {*first, *second} == {f"r{i}" for i in range(24)}


def test_the_same_tokens_as_when_prepared(base: BaseModel, jsonl: Jsonl) -> None:
    path = jsonl(rows(12))
    table = module(base, path, streaming=False).tables["train"]
    whole = {row["id"]: row["input_ids"][0] for row in table}
    batches = list(islice(module(base, path, batch_size=1).train_dataloader(), 12))
    assert {batch["id"][0]: batch["input_ids"][0].tolist() for batch in batches} == whole
    assert all(batch["step_tokens"] == (batch["labels"][:, 1:] >= 0).sum() for batch in batches)


def test_a_step_knows_all_its_tokens_and_a_budget_packs(base: BaseModel, jsonl: Jsonl) -> None:
    data = module(base, jsonl(rows(24)), max_tokens=40, max_length=20)
    loader = data._stream_loader()
    loader.accumulate = 2
    batches = list(islice(loader, 6))
    for pair in (batches[:2], batches[2:4], batches[4:]):
        learned = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in pair)
        assert {batch["step_tokens"] for batch in pair} == {learned}
        assert {batch["micro_steps"] for batch in pair} == {2}
    assert max(batch["input_ids"].numel() for batch in batches) <= 40
    assert max(len(batch["id"]) for batch in batches) > 2


def test_weights(base: BaseModel, jsonl: Jsonl) -> None:
    a, b = jsonl(rows(5, "a"), "a.jsonl"), jsonl(rows(50, "b"), "b.jsonl")
    train = [Source(a, weight=3), Source(b, weight=1)]
    tasks = Counter(t for batch in islice(module(base, train).train_dataloader(), 300) for t in batch["task"])
    assert abs(tasks["a"] / sum(tasks.values()) - 0.75) < 0.06


def test_a_buffer_larger_than_all_sources(base: BaseModel, jsonl: Jsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("talklora_pl.data.stream.DRAWN", 20)
    a, b = jsonl(rows(5, "a"), "a.jsonl"), jsonl(rows(30, "b"), "b.jsonl")
    data = module(base, [Source(a, weight=1), Source(b, weight=1)], shuffle_buffer=10**9)
    first = next(iter(data._stream_loader().stream))[2]
    names = Counter(of_rank(data, 0, 1, 2 * 30))
    assert first["block"] == 0 and {name for name in names if name[0] == "b"} == {f"b{i}" for i in range(30)}


def run(base: BaseModel, train: Any, folder: Path, resume: Path | None = None, **options: Any) -> Recorder:
    data = TextData(
        train, base=base, streaming=True, val_size=0, batch_size=2, shuffle_buffer=6, **options.pop("data", {})
    )
    recorder = Recorder()

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if not trainer.fit_loop._should_accumulate():
                trainer.save_checkpoint(folder / f"{trainer.global_step:02}.ckpt")

    trainer = L.Trainer(
        default_root_dir=folder,
        max_steps=10,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[] if resume else [Save()],
        **options,
    )
    trainer.fit(recorder, data, ckpt_path=resume)
    return recorder


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2}, {"data": {"num_workers": 2}}, {"of_the_hub": True}],
    ids=["plain", "accumulated", "workers", "hub"],
)
def test_a_resumed_run_sees_what_the_whole_one_saw(
    base: BaseModel, jsonl: Jsonl, tmp_path: Path, options: dict[str, Any]
) -> None:
    options = dict(options)
    train: Any = jsonl(rows(14))
    if options.pop("of_the_hub", False):
        train = datasets.Dataset.from_list(rows(14)).to_iterable_dataset(2)
    accumulate = options.get("accumulate_grad_batches", 1)
    whole = run(base, train, tmp_path, **options).seen
    assert len(whole) == 10 * accumulate
    for step in (1, 4, 7):
        rest = run(base, train, tmp_path, tmp_path / f"{step:02}.ckpt", **options).seen
        assert rest == whole[step * accumulate :]


def test_a_stream_goes_on_only_as_it_began(base: BaseModel, jsonl: Jsonl, tmp_path: Path) -> None:
    path = jsonl(rows(14))
    run(base, path, tmp_path)
    with pytest.raises(UserError, match=r"only go on as it was begun: with data.seed 0 \(now 1\)"):
        run(base, path, tmp_path, tmp_path / "04.ckpt", data={"seed": 1})
    checkpoint = torch.load(tmp_path / "04.ckpt")
    checkpoint["TextData"]["stream"]["processes"] = 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.raises(UserError, match=r"with processes 2 \(now 1\)"):
        run(base, path, tmp_path, tmp_path / "two.ckpt")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"val_size": 0.1}, "nothing can be split off"),
        ({"on_leak": "drop"}, "data.on_leak: drop needs all"),
        ({"temperature": 2}, "rows of a stream are not counted"),
        ({"documents": "packed"}, "cannot join texts"),
    ],
)
def test_what_a_stream_cannot(base: BaseModel, jsonl: Jsonl, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        module(base, jsonl(rows(4)), **options)


def test_a_stream_needs_an_end(base: BaseModel, jsonl: Jsonl, tmp_path: Path) -> None:
    data = TextData(jsonl(rows(4)), base=base, streaming=True, val_size=0)
    with pytest.raises(UserError, match=r"trainer.max_steps: a stream has no known end"):
        L.Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path).fit(Recorder(), data)


def test_bad_rows_of_a_stream(base: BaseModel, jsonl: Jsonl) -> None:
    bad = [*rows(600), {"prompt": "p", "completion": ""}]
    loader = module(base, jsonl(bad), shuffle_buffer=601).train_dataloader()
    with pytest.raises(UserError, match=r"line 601, column 'completion': is empty"):
        next(iter(loader))
    with pytest.raises(UserError, match="line 1, column 'completion'"):
        module(base, jsonl(bad[::-1], "first.jsonl"))
    with pytest.warns(UserWarning, match="A bad row is left out"):
        batch = next(iter(module(base, jsonl(bad), shuffle_buffer=601, on_bad_row="skip").train_dataloader()))
    assert len(batch["id"]) == 2
    stream = module(base, jsonl(rows(4), "few.jsonl"))._stream_loader().stream
    error, *_ = next(iter(Stream(stream.works, stream.recipe, 8, 9, {})))
    assert isinstance(error, UserError) and "too few rows for 9 readers" in str(error)
