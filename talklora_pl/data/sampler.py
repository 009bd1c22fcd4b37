"""Which rows make a batch: a pure function of seed, epoch, position, rank and world size.

The unit is the *optimiser step*: all rows that all ranks see in all micro-batches between two updates. An epoch's steps
depend on (seed, epoch, rows of a step) alone. So one process with batch 8, two with batch 4, and one with batch 4
accumulated twice all make the same steps; and a run resumes from counters that every checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import Sampler

CHUNK = 50  # length-grouped: so many steps are sorted by length together


@dataclass(frozen=True)
class Batch:
    """What a sampler yields: one micro-batch of one rank.

    Attributes:
        rows: indices of the data set.
        step_tokens: labels with loss in the whole optimiser step, over all ranks and micro-batches (classification:
            rows).
        micro_steps: micro-batches of that step.
        filler: the rows are there only so that every rank has a batch; they must not count.
    """

    rows: list[int]
    step_tokens: int = 0
    micro_steps: int = 1
    filler: bool = False


@dataclass(frozen=True)
class Position:
    """Where training is: epoch, micro-batch in it, micro-batches per step, micro-batches until it is cut short."""

    epoch: int = 0
    batch: int = 0
    accumulate: int = 1
    limit: float = float("inf")


def accumulation(trainer: Any, epoch: int) -> int:
    """Micro-batches of an optimiser step in an epoch.

    A GradientAccumulationScheduler sets it at the start of the epoch, for which the batches are made before.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def epoch_steps(lengths: np.ndarray, size: int, seed: int, epoch: int, grouped: bool) -> list[np.ndarray]:
    """The row indices of every optimiser step of an epoch, each step's longest rows first.

    Args:
        lengths: tokens of each row.
        size: rows of a step.
        seed, epoch: decide the order.
        grouped: steps of similar lengths, which wastes less on padding; their order stays random.

    Returns:
        Steps of `size` rows; the last one has what is left over.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    if grouped:
        span = size * CHUNK
        chunks = [order[i : i + span] for i in range(0, len(order), span)]
        order = np.concatenate([_longest_first(chunk, lengths) for chunk in chunks])
    full = len(order) // size * size
    steps = list(order[:full].reshape(-1, size))
    if grouped:
        steps = [steps[i] for i in random.permutation(len(steps))]
    return [_longest_first(step, lengths) for step in (*steps, order[full:]) if len(step)]


def _longest_first(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-lengths[rows], kind="stable")]


class TrainBatches(Sampler[Batch]):
    """The training batches of one rank, from wherever training is.

    No row is left out or seen twice in an epoch. Where the last rows of an epoch do not suffice for every rank, a rank
    without one gets a *filler*: some row without loss, cut to one token.

    Args:
        lengths: tokens of each row.
        loss_tokens: labels of each row that carry loss.
        batch_size: rows of a micro-batch of one rank.
        seed: of the order.
        grouped: see :func:`epoch_steps`.
        rank, world: which process this is, of how many.
        position: asked at every start of an epoch.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        loss_tokens: np.ndarray,
        batch_size: int,
        seed: int,
        grouped: bool = True,
        rank: int = 0,
        world: int = 1,
        position: Callable[[], Position] = Position,
    ) -> None:
        self.lengths, self.loss_tokens = np.asarray(lengths), np.asarray(loss_tokens)
        self.batch_size, self.seed, self.grouped = batch_size, seed, grouped
        self.rank, self.world, self.position = rank, world, position

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[Batch]:
        at = self.position()
        return islice(self.epoch(at), at.batch, None)

    def epoch(self, at: Position) -> Iterator[Batch]:
        """All batches of the epoch of a position."""
        micro = self.batch_size * self.world
        done = 0
        for step in epoch_steps(self.lengths, micro * at.accumulate, self.seed, at.epoch, self.grouped):
            parts = [step[i : i + micro] for i in range(0, len(step), micro)]
            parts = parts[: int(min(len(parts), at.limit - done))]  # Lightning updates after the last batch of an epoch
            done += len(parts)
            tokens = sum(int(self.loss_tokens[part].sum()) for part in parts)
            for part in parts:
                rows = part[self.rank :: self.world].tolist()
                yield Batch(rows or [int(part[0])], tokens, len(parts), filler=not rows)


class EvalBatches(Sampler[Batch]):
    """Evaluation batches of one rank: every question once over all ranks, all choices of a question in one batch.

    All ranks get the same number of batches (sharded models compute together): some may get a filler at the end.

    Args:
        lengths: tokens of each question's longest row.
        rows: rows (choices) of each question.
        batch_size: most rows of a batch (one question may have more).
        rank, world: which process this is, of how many.
    """

    def __init__(self, lengths: np.ndarray, rows: np.ndarray, batch_size: int, rank: int = 0, world: int = 1) -> None:
        batches: list[list[int]] = []
        room = 0
        for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
            if rows[i] > room or not batches:
                batches.append([])
                room = batch_size
            batches[-1].append(i)
            room -= int(rows[i])
        fillers = -len(batches) % world
        every = [Batch(batch) for batch in batches] + [Batch(batches[-1][:1], filler=True)] * fillers
        self.batches = every[rank::world]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)
