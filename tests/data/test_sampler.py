"""The sampler is a pure function, and the rows of a step do not depend on how the step is divided."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from talklora_pl.data.sampler import EvalBatches, Position, TrainBatches, epoch_steps


def batches(n: int = 37, size: int = 4, rank: int = 0, world: int = 1, grouped: bool = True, **at: int) -> list:
    lengths = np.random.default_rng(0).integers(3, 40, n)
    sampler = TrainBatches(lengths, lengths - 2, size, 7, grouped, rank, world, lambda: Position(**at))
    return list(sampler)


def steps(accumulate: int = 1, **kwargs: int) -> list[tuple[list[int], int]]:
    """The rows and tokens of every optimiser step, over all ranks."""
    world = kwargs.get("world", 1)
    ranks = [batches(rank=r, accumulate=accumulate, **kwargs) for r in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    out = []
    for i in range(0, len(ranks[0]), accumulate):
        group = [b for rank in ranks for b in rank[i : i + accumulate]]
        assert len({(b.step_tokens, b.micro_steps) for b in group}) == 1
        assert group[0].micro_steps * world == len(group)
        out.append((sorted(row for b in group if not b.filler for row in b.rows), group[0].step_tokens))
    return out


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60), grouped=st.booleans(), epoch=st.integers(0, 3))
def test_the_layout_does_not_change_the_steps(n: int, grouped: bool, epoch: int) -> None:
    common = {"n": n, "grouped": grouped, "epoch": epoch}
    one = steps(size=8, **common)
    assert steps(size=4, world=2, **common) == one
    assert steps(size=2, world=4, **common) == one
    assert steps(size=4, accumulate=2, **common) == one
    assert steps(size=2, world=2, accumulate=2, **common) == one
    assert sorted(row for rows, _ in one for row in rows) == list(range(n))
    lengths = np.random.default_rng(0).integers(3, 40, n)
    assert [tokens for _, tokens in one] == [int((lengths[rows] - 2).sum()) for rows, _ in one]


def test_micro_batches_of_two_ranks_are_those_of_one() -> None:
    one = batches(size=8)
    two = zip(batches(size=4, world=2, rank=0), batches(size=4, world=2, rank=1))
    assert [sorted(b.rows) for b in one] == [sorted(a.rows + b.rows) for a, b in two]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_position_continues_where_it_stopped(accumulate: int) -> None:
    every = batches(epoch=2, accumulate=accumulate)
    for stop in range(len(every)):
        assert batches(epoch=2, batch=stop, accumulate=accumulate) == every[stop:]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    lengths = np.arange(50)
    orders = [
        np.concatenate(epoch_steps(lengths, 4, seed, epoch, True)).tolist() for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert np.concatenate(epoch_steps(lengths, 4, 1, 1, True)).tolist() == orders[3]


def test_grouping_puts_similar_lengths_together() -> None:
    lengths = np.random.default_rng(1).integers(1, 200, 400)

    def waste(grouped: bool) -> float:
        return sum(len(s) * lengths[s].max() - lengths[s].sum() for s in epoch_steps(lengths, 8, 0, 0, grouped))

    assert waste(True) < 0.2 * waste(False)


def test_an_epoch_cut_short_counts_only_what_runs() -> None:
    got = batches(n=40, size=4, accumulate=2, limit=5)
    assert len(got) == 5
    assert [b.micro_steps for b in got] == [2, 2, 2, 2, 1]
    lengths = np.random.default_rng(0).integers(3, 40, 40)
    assert got[4].step_tokens == (lengths[got[4].rows] - 2).sum()


def test_a_rank_without_a_row_gets_a_filler() -> None:
    last = [batches(n=9, size=4, world=2, rank=rank)[-1] for rank in range(2)]
    assert [b.filler for b in last] == [False, True]
    assert last[0].step_tokens == last[1].step_tokens > 0


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(1, 6), min_size=1, max_size=30), world=st.integers(1, 4), size=st.integers(1, 10))
def test_evaluation_sees_every_question_once(rows: list[int], world: int, size: int) -> None:
    ranks = [EvalBatches(np.array(rows), np.array(rows), size, rank, world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    every = [batch for rank in ranks for batch in rank]
    assert sorted(q for batch in every if not batch.filler for q in batch.rows) == list(range(len(rows)))
    assert all(len(b.rows) == 1 or sum(rows[q] for q in b.rows) <= size for b in every)
    assert sum(batch.filler for batch in every) < world
