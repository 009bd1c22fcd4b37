"""Which rows make a batch: a pure function of seed, epoch, position, rank and world size.

The unit is the *optimiser step*: all rows that all ranks see in all micro-batches between two updates. An epoch's steps
depend on (seed, epoch, rows of a step) alone. So one process with batch 8, two with batch 4, and one with batch 4
accumulated twice all make the same steps; and a run resumes from counters that every checkpoint holds. With a budget of
tokens the same holds of *packs*, the rows of one micro-batch of one rank, see :class:`Packs`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import Sampler

from talklora_pl.data.mixture import Mixture

CHUNK = 50  # length-grouped: so many steps are sorted by length together
GRAIN = 8  # packs: lengths are told apart in steps of so many tokens


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


class Packs:
    """The rows of a data set in packs of at most ``budget`` tokens: other rows in every epoch, always as many packs.

    The lengths are packed once, rounded up to :data:`GRAIN` tokens; every epoch deals the rows out anew among the
    places of their rounded length. So an epoch has the same number of batches as any other, which Lightning counts on,
    and a resumed one needs no more than seed and epoch. Of a mixture, places are packed that fit what any epoch draws.

    Args:
        lengths: tokens of each row, none above ``budget``.
        budget: most tokens of a pack.
        padded: the rows of a pack are padded to its longest, and the pads count.
        mixture: draws the rows of an epoch; None: each once.

    Attributes:
        slots: of each pack, indices of ``cost``.
        cost: rounded length of every place, longest first.
    """

    def __init__(self, lengths: np.ndarray, budget: int, padded: bool = False, mixture: Mixture | None = None) -> None:
        self._rounded, self._mixture = np.minimum(-(-np.asarray(lengths) // GRAIN) * GRAIN, budget), mixture
        places = self._rounded if mixture is None else mixture.places(self._rounded)
        self._longest_first = np.argsort(-places, kind="stable")
        self.cost = places[self._longest_first]
        self.slots = _padded(self.cost, budget) if padded else _best_fit_decreasing(self.cost, budget)
        self._classes = [0, *(np.flatnonzero(np.diff(self.cost)) + 1).tolist(), len(self.cost)]

    def __len__(self) -> int:
        return len(self.slots)

    def rows(self, seed: int, epoch: int) -> list[np.ndarray]:
        """Row indices of every pack in an epoch."""
        random = np.random.default_rng((seed, epoch, 1))
        dealt = self._longest_first.copy()
        if self._mixture is not None:
            dealt = self._mixture.rows_for_places(self._rounded, seed, epoch)[dealt]
        for start, end in pairwise(self._classes):
            random.shuffle(dealt[start:end])
        return [dealt[slots] for slots in self.slots]


def _best_fit_decreasing(cost: np.ndarray, budget: int) -> list[list[int]]:
    """Every place, longest first, goes to the fullest pack that has room for it."""
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # packs by what they have room for
    rooms: list[int] = []  # the keys, sorted
    for slot, tokens in enumerate(cost.tolist()):
        at = bisect_left(rooms, tokens)
        if at == len(rooms):
            room, pack = budget, len(packs)
            packs.append([])
        else:
            room = rooms[at]
            pack = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        packs[pack].append(slot)
        if left := room - tokens:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(pack)
    return packs


def _padded(cost: np.ndarray, budget: int) -> list[list[int]]:
    """Places of similar lengths together, as many as the first and longest leaves room for."""
    packs: list[list[int]] = []
    for slot in range(len(cost)):
        if not packs or (len(packs[-1]) + 1) * cost[packs[-1][0]] > budget:
            packs.append([])
        packs[-1].append(slot)
    return packs


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
        packs: the rows of a micro-batch by a budget of tokens; ``batch_size`` and ``grouped`` then count for nothing.
        mixture: draws the rows of an epoch; None: each once. (Packs draw by themselves.)
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
        packs: Packs | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        self.mixture = mixture
        self.lengths, self.loss_tokens = np.asarray(lengths), np.asarray(loss_tokens)
        self.batch_size, self.seed, self.grouped = batch_size, seed, grouped
        self.rank, self.world, self.position, self.packs = rank, world, position, packs

    def __len__(self) -> int:
        if self.packs is not None:
            return -(-len(self.packs) // self.world)
        return -(-len(self.lengths) // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[Batch]:
        at = self.position()
        return islice(self.epoch(at), at.batch, None)

    def epoch(self, at: Position) -> Iterator[Batch]:
        """All batches of the epoch of a position."""
        # what a step is made of: rows, or packs of them
        lengths, loss_tokens, size, grouped = self.lengths, self.loss_tokens, self.batch_size, self.grouped
        packs = None
        if self.packs is None:
            drawn = np.arange(len(lengths)) if self.mixture is None else self.mixture.rows(self.seed, at.epoch)
        else:
            packs = self.packs.rows(self.seed, at.epoch)
            lengths, loss_tokens = (np.array([of[rows].sum() for rows in packs]) for of in (lengths, loss_tokens))
            size, grouped, drawn = 1, False, np.arange(len(packs))
        micro = size * self.world
        done = 0
        for places in epoch_steps(lengths[drawn], micro * at.accumulate, self.seed, at.epoch, grouped):
            step = drawn[places]
            parts = [step[i : i + micro] for i in range(0, len(step), micro)]
            parts = parts[: int(min(len(parts), at.limit - done))]  # Lightning updates after the last batch of an epoch
            done += len(parts)
            tokens = sum(int(loss_tokens[part].sum()) for part in parts)
            for part in parts:
                mine = part[self.rank :: self.world]
                first = part[0] if packs is None else packs[part[0]][0]
                if packs is not None and len(mine):
                    mine = packs[mine[0]]
                yield Batch(mine.tolist() or [int(first)], tokens, len(parts), filler=not len(mine))


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
