"""Training rows that are read while they are trained on, because they are more than the disk holds.

A *reader* is one worker of one rank. It reads its share of every source, block by block: some rows of the sources,
drawn by their weights, are tokenised, shuffled and made into batches. What a block holds depends on the seed, its
number and the places in the sources at its beginning; so these places and a count of batches are all that a checkpoint
has to keep for a run to continue exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from talklora_pl.data.batches import Batches
from talklora_pl.data.sampler import Batch, Packs, epoch_steps
from talklora_pl.data.source import BadRow, Reader
from talklora_pl.data.work import Report, Work
from talklora_pl.errors import UserError
from talklora_pl.ranks import every_rank

Place = dict[str, Any]
"""Of a reader: `block`, its number; `sources`, for each the `turn` (how often it was read to its end) and what was read
of it since; `batch`, how many batches of the block are done."""

DRAWN = 10_000  # rows of several sources that are drawn at a time
KEPT = 8  # newest optimiser steps whose places are known: Lightning fetches a batch ahead


class Cursor:
    """Every n-th row of a source, over and over.

    Args:
        rows: of the source.
        reader, readers: which share.
        state: where to go on.
    """

    def __init__(self, rows: Reader, reader: int, readers: int, state: dict[str, Any] | None) -> None:
        self.rows, self.reader, self.readers = rows, reader, readers
        self.turn, self.done, self._at = 0, 0, None
        if state is not None:
            self.turn, self.done, self._at = state["turn"], state["done"], state["at"]
        self._open()

    def _open(self) -> None:
        from datasets import IterableDataset
        from datasets.distributed import split_dataset_by_node

        self._split: Any = None
        if isinstance(self.rows.dataset, IterableDataset):  # which finds its place without reading what is before it
            self._split = split_dataset_by_node(self.rows.dataset, self.reader, self.readers)
            if self._at is not None:
                self._split.load_state_dict(self._at)
            self._iter = self.rows.of_dataset(self._split, self.done)
        else:
            raw = islice(self.rows.raw(), self.rows.source.limit)
            self._iter = islice(raw, self.reader + self.done * self.readers, None, self.readers)

    def state(self) -> dict[str, Any]:
        at = None if self._split is None else self._split.state_dict()
        return {"turn": self.turn, "done": self.done, "at": at}

    def take(self) -> tuple[int, tuple[str, Any]]:
        """The next row, with its number. Raises UserError: there is none for this reader."""
        for _ in range(2):
            if (row := next(self._iter, None)) is not None:
                self.done += 1
                return self.reader + (self.done - 1) * self.readers, row
            if not self.done:
                break
            self.turn, self.done, self._at = self.turn + 1, 0, None
            self._open()
        raise UserError(
            f"data.streaming: {self.rows.source.path} has too few rows for {self.readers} readers "
            "(processes x data.num_workers)."
        )

    def take_of_one_turn(self, count: int) -> Iterator[tuple[int, tuple[str, Any]]]:
        """Up to `count` rows, at least one, and none of the turn after."""
        yield self.take()
        for row in islice(self._iter, count - 1):
            self.done += 1
            yield self.reader + (self.done - 1) * self.readers, row


class Table:
    """Rows in memory, asked as a ``datasets.Dataset`` is."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __getitem__(self, indices: list[int]) -> dict[str, list[Any]]:
        return {name: [self.rows[i][name] for i in indices] for name in self.rows[indices[0]]}


@dataclass
class Recipe:
    """How batches are made of rows. For the fields see :class:`~talklora_pl.data.module.TextData` and
    :class:`~talklora_pl.data.batches.Batches`."""

    objective: Any
    pad_id: int
    classes: list[str]
    seed: int
    batch_size: int
    grouped: bool
    buffer: int
    max_tokens: int | None
    pack: bool
    skip_bad: bool


class Stream(IterableDataset[Any]):
    """Gives ``(batch, reader, place after it)`` without end; in place of a batch an error that ends the run.

    Args:
        works: what prepares the rows of each source.
        recipe: how batches are made.
        rank, world: which process this is, of how many.
        places: of the readers of this rank, to go on from.
        shift: which of its readers is the next.
    """

    def __init__(
        self, works: list[Work], recipe: Recipe, rank: int, world: int, places: dict[int, Place], shift: int = 0
    ) -> None:
        self.works, self.recipe, self.rank, self.world = works, recipe, rank, world
        self.places, self.shift, self._told = places, shift, False

    def __iter__(self) -> Iterator[tuple[Any, int, Place]]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        reader = ((info.id if info else 0) + self.shift) % workers
        try:
            yield from self._read(reader, self.rank * workers + reader, self.world * workers)
        except UserError as e:
            yield e, reader, {}

    def _read(self, own: int, reader: int, readers: int) -> Iterator[tuple[Any, int, Place]]:
        recipe, weights = self.recipe, [work.source.weight or 1.0 for work in self.works]
        place = self.places.get(own) or {"block": 0, "sources": [None] * len(self.works), "batch": 0}
        cursors = [Cursor(w.rows, reader, readers, at) for w, at in zip(self.works, place["sources"])]
        for block in range(place["block"], 1 << 62):
            here = {"block": block, "sources": [cursor.state() for cursor in cursors]}
            random = np.random.default_rng((recipe.seed, block, reader, 3))
            rows: list[dict[str, Any]] = []
            if len(cursors) == 1:  # without shares to keep, no row comes again before all others
                rows += self._prepared(self.works[0], list(cursors[0].take_of_one_turn(recipe.buffer)))
            left, turns = recipe.buffer if len(cursors) > 1 else 0, [cursor.turn for cursor in cursors]
            # a buffer may be larger than the sources: where all of them have come to their ends, it is enough
            while left and any(cursor.turn == turn for cursor, turn in zip(cursors, turns)):
                size = min(left, DRAWN)
                of = random.choice(len(weights), size=size, p=np.array(weights) / sum(weights))
                for work, cursor, count in zip(self.works, cursors, np.bincount(of, minlength=len(weights)).tolist()):
                    rows += self._prepared(work, [cursor.take() for _ in range(count)])
                left -= size
            if not rows:
                continue
            table: Any = Table(rows)
            batches = Batches(table, recipe.objective, recipe.pad_id, True, recipe.classes, recipe.pack)
            lengths = np.array([row["length"] for row in rows])
            if recipe.max_tokens is not None:
                parts = Packs(lengths, recipe.max_tokens, not recipe.pack).rows(recipe.seed, block)
                parts = [parts[i] for i in random.permutation(len(parts))]
            else:
                parts = epoch_steps(lengths, recipe.batch_size, recipe.seed, block * readers + reader, recipe.grouped)
            for done, part in enumerate(parts):
                if block == place["block"] and done < place["batch"]:
                    continue
                tokens = sum(rows[i]["loss_tokens"] for i in part)
                yield batches[Batch(part.tolist(), tokens)], own, {**here, "batch": done + 1}

    def _prepared(self, work: Work, rows: list[tuple[int, tuple[str, Any]]]) -> Iterator[dict[str, Any]]:
        report = Report(absent={})
        yield from work.table(rows, report)
        if report.bad and not self.recipe.skip_bad:
            raise UserError(f"The data cannot be used:\n  {BadRow(**report.bad[0])}")
        if report.bad and not self._told:
            self._told = True
            rank_zero_warn(f"A bad row is left out, as all others will be: {BadRow(**report.bad[0])}")


class StreamLoader:
    """The batches of one rank, with how many tokens carry loss in each of its optimiser steps.

    Args:
        stream: gives them.
        workers: processes that make them.
        accumulate: micro-batches of a step.
        layout: options that a run which goes on must have in common with this one.
        step: the first.
    """

    def __init__(self, stream: Stream, workers: int, accumulate: int, layout: dict[str, Any], step: int = 0) -> None:
        self.stream, self.workers, self.accumulate, self.layout, self.step = stream, workers, accumulate, layout, step
        self.places = {step: dict(stream.places)}

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps after a step, the same on every rank; see :func:`places_of`."""
        return {**self.layout, "places": every_rank(self.places.get(step))}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        step, places = self.step, dict(self.stream.places)
        keep: Callable[[Any], Any] = _as_it_is
        source = iter(DataLoader(self.stream, batch_size=None, num_workers=self.workers, collate_fn=keep))
        while True:
            group = []
            for batch, reader, place in islice(source, self.accumulate):
                if isinstance(batch, UserError):
                    raise batch
                places[reader] = place
                group.append(batch)
            step += 1
            self.places[step] = dict(places)
            self.places.pop(step - KEPT, None)
            tokens = sum(batch["step_tokens"] for batch in group)
            for batch in group:
                yield batch | {"step_tokens": tokens, "micro_steps": self.accumulate}


def places_of(state: dict[str, Any], layout: dict[str, Any], rank: int) -> dict[int, Place]:
    """Where the readers of a rank go on.

    Args:
        state: :meth:`StreamLoader.state` of the run that stopped.
        layout: of the one that goes on.
        rank: whose readers.

    Raises:
        UserError: the layouts are not the same.
    """
    if wrong := [f"{name} {state[name]} (now {value})" for name, value in layout.items() if state[name] != value]:
        raise UserError(f"data.streaming: the run can only go on as it was begun: with {', '.join(wrong)}.")
    places: dict[int, Place] = state["places"][rank]
    return places


def _as_it_is(item: Any) -> Any:
    return item
