"""Shares of several sources in an epoch, and rows that are learned and scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talklora_pl.base import BaseModel
from talklora_pl.data import Source, TextData
from talklora_pl.data.mixture import Mixture, counts, shares
from talklora_pl.data.sampler import Batch, Packs, Position, TrainBatches
from talklora_pl.errors import UserError

Jsonl = Callable[..., str]


def rows(name: str, n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i} ", "completion": "yes", "id": f"{name}{i}"} for i in range(n)]


def module(base: BaseModel, **options: Any) -> TextData:
    data = TextData(base=base, **{"val_size": 0, "batch_size": 2, **options})
    data.prepare_data()
    data.setup("fit")
    return data


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(6, 500))
def test_counts_add_up_and_are_less_than_one_off(weights: list[float], total: int) -> None:
    share = shares([1] * len(weights), weights, None)
    made = counts(total, share)
    assert made.sum() == total
    assert (abs(made - share * total) < 1).all()


def test_temperature_evens_out() -> None:
    assert shares([900, 100], None, 1).tolist() == [0.9, 0.1]
    assert shares([900, 100], None, 2).tolist() == [0.75, 0.25]
    assert abs(shares([900, 100], None, 1e9) - 0.5).max() < 1e-6
    assert np.isfinite(shares([10**12, 1], None, 0.1)).all()


def test_an_epoch_has_the_shares_and_no_row_more_than_once_oftener_than_another() -> None:
    source_of = np.repeat([0, 1], [10, 30])
    mixture = Mixture(source_of, np.array([0.8, 0.2]))
    first, second = (mixture.rows(0, epoch) for epoch in (0, 1))
    assert (mixture.rows(0, 0) == first).all() and sorted(first) != sorted(second)
    for drawn in (first, second):
        times = Counter(drawn.tolist())
        assert sum(times[i] for i in range(10)) == 32 and len(drawn) == 40
        assert {times[i] for i in range(10)} == {3, 4}
        assert {times[i] for i in range(10, 40)} == {0, 1}


def test_batches_of_a_mixture_are_one_order_for_all_ranks_and_positions() -> None:
    lengths = np.arange(40) % 7 + 1
    mixture = Mixture(np.repeat([0, 1], [10, 30]), np.array([0.5, 0.5]))

    def batches(rank: int, world: int, size: int, start: int = 0) -> list[list[int]]:
        at = lambda: Position(1, start)  # noqa: E731
        return [b.rows for b in TrainBatches(lengths, lengths, size, 3, True, rank, world, at, None, mixture)]

    whole = batches(0, 1, 4)
    assert sorted(chain.from_iterable(whole)) == sorted(mixture.rows(3, 1).tolist())
    assert [sorted(a + b) for a, b in zip(batches(0, 2, 2), batches(1, 2, 2))] == [sorted(batch) for batch in whole]
    assert batches(0, 1, 4, start=3) == whole[3:]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    padded=st.booleans(),
    accumulate=st.integers(1, 2),
)
def test_packs_of_a_mixture(sizes: list[int], weights: list[int], padded: bool, accumulate: int) -> None:
    source_of = np.repeat(np.arange(len(sizes)), sizes)
    lengths = np.random.default_rng(0).integers(3, 50, len(source_of))
    share = shares(sizes, weights[: len(sizes)], None)
    mixture = Mixture(source_of, share)
    packs = Packs(lengths, 60, padded, mixture)

    def batches(epoch: int, rank: int, start: int = 0) -> list[Batch]:
        at = Position(epoch, start, accumulate)
        return list(TrainBatches(lengths, lengths - 2, 1, 5, True, rank, 2, lambda: at, packs, mixture))

    for epoch in range(3):
        first, second = batches(epoch, 0), batches(epoch, 1)
        assert len(first) == len(second) == -(-len(packs) // 2)
        assert batches(epoch, 0, start=1) == first[1:]
        real = [batch.rows for batch in (*first, *second) if not batch.filler]
        assert max(len(r) * lengths[r].max() if padded else lengths[r].sum() for r in real) <= 60
        times = Counter(chain.from_iterable(real))
        for source, count in enumerate(counts(len(source_of), share)):
            of = [times[i] for i in np.flatnonzero(source_of == source)]
            assert sum(of) == count and max(of) - min(of) <= 1  # the ranks have together what is drawn, once


def test_packs_of_a_mixture_draw_all_rows_alike_and_waste_little() -> None:
    lengths = np.random.default_rng(1).integers(20, 300, 1200)
    mixture = Mixture(np.repeat([0, 1], [300, 900]), np.array([0.7, 0.3]))
    packs = Packs(lengths, 1024, mixture=mixture)
    drawn = [np.concatenate(packs.rows(0, epoch)) for epoch in range(200)]
    assert all(len(packs) <= 1.03 * lengths[rows].sum() / 1024 + 1 for rows in drawn)
    times = np.bincount(np.concatenate(drawn), minlength=1200) / 200
    for part, expected in ((slice(0, 300), 2.8), (slice(300, 1200), 0.4)):
        assert abs(times[part].mean() - expected) < 1e-9
        assert abs(times[part] - expected).max() < 5 * 0.5 / 200**0.5  # five standard deviations, at most
    again = [set(a[a >= 300]) & set(b[b >= 300]) for a, b in pairwise(drawn)]
    assert max(map(len, again)) < 200  # of 360: each epoch draws anew


def test_weights_of_sources(base: BaseModel, jsonl: Jsonl, caplog: pytest.LogCaptureFixture) -> None:
    a, b = jsonl(rows("a", 6), "a.jsonl"), jsonl(rows("b", 24), "b.jsonl")
    with caplog.at_level("INFO"):
        data = module(base, train={"one": Source(a, weight=4), "two": Source(b, weight=1)})
    assert data.tasks == ["one", "two"]
    assert "one: 80.0% of an epoch: 24 rows of the 6 that it has" in caplog.text
    tasks = Counter(task for batch in data.train_dataloader() for task in batch["task"])
    assert tasks == {"one": 24, "two": 6}
    tasks = Counter(t for batch in module(base, train=[a, b], temperature=2).train_dataloader() for t in batch["task"])
    assert tasks == {"a": 10, "b": 20}
    packed = module(base, train=[a, b], temperature=2, max_tokens=60, max_length=30)
    assert Counter(task for batch in packed.train_dataloader() for task in batch["task"]) == {"a": 10, "b": 20}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1, None]}, "all sources a weight, or none"),
        ({"weights": [1, 0]}, "a weight is a number of more than 0"),
        ({"weights": [1, float("nan")]}, "a weight is a number of more than 0"),
        ({"weights": [1, float("inf")]}, "a weight is a number of more than 0"),
        ({"weights": [1, 1], "temperature": 2}, "have weights already"),
        ({"temperature": 0}, "0 is less than 0.1"),
        ({"temperature": 1e-4}, "0.0001 is less than 0.1"),
    ],
)
def test_wrong_shares(base: BaseModel, jsonl: Jsonl, options: dict[str, Any], said: str) -> None:
    path = jsonl(rows("a", 4))
    weights = options.pop("weights", [None])
    with pytest.raises(UserError, match=said):
        module(base, train=[Source(path, weight=weight) for weight in weights], **options)


def test_rows_in_training_and_scored_data(
    base: BaseModel, jsonl: Jsonl, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    train = jsonl(rows("a", 8), "train.jsonl")
    val = jsonl([{"prompt": "A  3\n", "completion": " Yes"}, *rows("b", 2)], "val.jsonl")
    test = jsonl([*rows("a", 2), *rows("c", 2), {"prompt": "broken"}], "test.jsonl")
    with caplog.at_level("INFO"):
        data = module(base, train=train, val=val, test=test)
    assert "1 of 8 training rows stand in data.val too, such as 'a3'; scores on them say little" in caplog.text
    assert "2 of 8 training rows stand in data.test too, such as 'a0'" in caplog.text
    assert len(data.tables["train"]) == 8
    data = module(base, train=train, val=val, test=test, on_leak="drop")
    assert set(data.tables["train"]["id"]) == {f"a{i}" for i in (2, 4, 5, 6, 7)}
    with pytest.raises(UserError, match=r"data.on_leak: 1 of 8 training rows stand in data.val too"):
        TextData(train, val=val, base=base, on_leak="error").check("fit")
    module(base, train=train, val=jsonl(rows("z", 2), "other.jsonl"), on_leak="error")


def test_a_text_packed_behind_another_is_found(base: BaseModel, jsonl: Jsonl) -> None:
    train = jsonl([{"text": text} for text in "abcd"], "train.jsonl")
    val = jsonl([{"text": "c"}], "val.jsonl")
    with pytest.raises(UserError, match="1 of 1 training rows"):
        module(base, train=train, val=val, rows="text", documents="packed", max_length=40, on_leak="error")
