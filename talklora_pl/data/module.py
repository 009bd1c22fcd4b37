"""``TextData``: the data sets of a run, from files to batches."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from talklora_pl.base import BaseModel, load_config, load_tokenizer
from talklora_pl.base.description import describe
from talklora_pl.data.batches import Batches
from talklora_pl.data.classes import collect
from talklora_pl.data.leaks import digests, leaked
from talklora_pl.data.mixture import Mixture, counts, shares
from talklora_pl.data.prepare import Prepared, Work, prepare, scored, stream_work
from talklora_pl.data.rows import listing
from talklora_pl.data.sampler import EvalBatches, Packs, Position, TrainBatches, accumulation
from talklora_pl.data.source import BadRow, Source, Sources
from talklora_pl.data.stream import Recipe, Stream, StreamLoader, every_rank
from talklora_pl.data.table import column, numbers, tasks
from talklora_pl.data.tokens import Tokenize
from talklora_pl.errors import UserError
from talklora_pl.objectives import Objective, choose
from talklora_pl.paths import expand
from talklora_pl.strict import read_json
from talklora_pl.trials import prepare_for_packed_rows

if TYPE_CHECKING:
    import datasets


class TextData(L.LightningDataModule):
    """Text to fine-tune on: files or hub data sets, each a task, tokenised once and cached.

    Args:
        train: one path, a list of paths and sources, or sources by the names of their tasks; in Python also rows, see
            :class:`Source`.
        val: validation data; None: split off from `train`.
        test: data to score at the end.
        predict: data to answer (it needs no answers of its own); None: `test`.
        rows: what a row is, where a source does not say: `instruction`, `completion`, `chat`, `choice`,
            `classification`, `preference` or a kind of your own. None: by objective and format.
        format: how it is written, where a source does not say: `plain`, `cloze`, `alpaca`, `chat`, or a template with
            `{prompt}`. None: by rows.
        columns: field -> column, where a source does not say.
        labels: names of the classes, or a JSON file with a list of them; None: those of the training data.
        val_size: what is split off from `train`: a share (below 1) or a number of rows; 0: nothing.
        seed: of the split and of the order of the rows.
        batch_size: rows of a micro-batch of one process.
        max_tokens: tokens of a micro-batch of one process, in place of `batch_size`: as many rows as that has room for,
            without pads (see "Batches by tokens" in docs/data.md).
        eval_batch_size: rows (choices) of an evaluation batch of one process.
        max_length: tokens of a sequence; a longer prompt loses its first tokens (BOS and response marker stay);
            None: 512, or the model's context if that is shorter.
        length_grouped: batches of similar lengths.
        eos_token: for a tokenizer without one.
        documents: texts alone are `split` where they are longer than a sequence; `packed`: short ones of a task are
            also joined, each with its end. (Attention then crosses from one text into the next.)
        train_on: of a conversation, learn `all` answers, or the `last` alone.
        special_tokens_in_data: what is read where the data spell a special token (`</s>`): its letters as `text`, or
            the token (`control`), for data that a chat template has already been applied to.
        on_bad_row: stop at rows that are wrong, or leave them out and list them in `bad_row_report`.
        bad_row_report: JSON Lines file for them.
        temperature: of training data from several sources, whose shares of an epoch are their numbers of rows to the
            power of one over it: 1 leaves them as they are, more lets small ones have more; at least 0.1. (Or see
            `weight` of a source.)
        on_leak: what to do about training rows that stand in validation or test data too: say it, `drop` them from the
            training data, or stop.
        streaming: read the training data while they are trained on, for what is larger than the disk; see "More than
            the disk holds" in docs/data.md.
        shuffle_buffer: how many rows of a stream each reader shuffles together.
        num_workers: processes that make batches.
        num_proc: processes that tokenise the rows before the first run; None: one per core, up to 8.
        cache_dir: for the tokenised rows; None: the user's cache folder.
        base: whose tokenizer; None: that of the model that is trained.
        objective: what the batches are for; None: that of the model that is trained, or by default of the base.
    """

    def __init__(
        self,
        train: Sources = None,
        val: Sources = None,
        test: Sources = None,
        predict: Sources = None,
        rows: str | None = None,
        format: str | None = None,
        columns: dict[str, str | list[str]] | None = None,
        labels: list[str] | str | None = None,
        val_size: float = 0.05,
        seed: int = 0,
        batch_size: int = 8,
        eval_batch_size: int = 64,
        max_length: int | None = None,
        length_grouped: bool = True,
        eos_token: str | None = None,
        documents: Literal["split", "packed"] = "split",
        train_on: Literal["all", "last"] = "all",
        special_tokens_in_data: Literal["text", "control"] = "text",
        on_bad_row: Literal["error", "skip"] = "error",
        bad_row_report: str = "bad_rows.jsonl",
        temperature: float | None = None,
        on_leak: Literal["warn", "drop", "error"] = "warn",
        streaming: bool = False,
        shuffle_buffer: int = 2000,
        num_workers: int = 0,
        num_proc: int | None = None,
        cache_dir: str | None = None,
        base: BaseModel | None = None,
        objective: Objective | None = None,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        defaults = Source("", rows=rows, format=format, columns=columns or {})
        self.sources = {
            name: [_source(entry, defaults) for entry in _entries(given)]
            for name, given in {"train": train, "val": val, "test": test, "predict": predict}.items()
        }
        self.labels, self.val_size, self.seed = labels, val_size, seed
        self.batch_size, self.eval_batch_size, self.max_length = batch_size, eval_batch_size, max_length
        self.length_grouped, self.eos_token, self.on_bad_row = length_grouped, eos_token, on_bad_row
        self.bad_row_report, self.num_workers, self.cache_dir = bad_row_report, num_workers, cache_dir
        self.num_proc, self.temperature, self.on_leak = num_proc, temperature, on_leak
        self.base, self.objective, self.documents = base, objective, documents
        self.train_on, self.special_tokens_in_data, self.max_tokens = train_on, special_tokens_in_data, max_tokens
        self.tables: dict[str, datasets.Dataset] = {}
        self.num_classes: int | None = None
        self.class_names: list[str] = []
        self._kept: dict[str, Any] = {}  # of a checkpoint
        self._going_on: dict[str, Any] | None = None  # likewise
        self._packs: Packs | None = None  # of the training rows
        self.streaming, self.shuffle_buffer = streaming, shuffle_buffer
        self.streams: list[Work] = []
        self._stream: StreamLoader | None = None

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks, after :meth:`setup`."""
        streamed = [source.task_name for source in self.sources["train"]] if self.streaming else []
        return sorted({*streamed, *(task for table in self.tables.values() for task in tasks(table))})

    # -- preparation ------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Check, tokenise and cache, once per machine and before the model is loaded.

        Raises:
            UserError: all problems of all files in one message.
        """
        stage = self.trainer.state.fn if self.trainer is not None else None
        done = self.prepared(str(stage.value) if stage else "fit")
        self._report(done)
        self._assemble(done)

    def check(self, stage: str) -> None:
        """Read everything that a stage needs.

        Raises:
            UserError: all problems of all files in one message.
        """
        self._assemble(self.prepared(stage), say=False)

    def setup(self, stage: str) -> None:
        """Open what :meth:`prepare_data` has left in the cache.

        Args:
            stage: fit, validate, test or predict.
        """
        self.tables |= self._assemble(self.prepared(stage), say=False)

    def _assemble(self, done: dict[str, list[Prepared]], say: bool = True) -> dict[str, datasets.Dataset]:
        """The tables of a stage: sources joined, validation split off, leaks found.

        Raises:
            UserError: rows stand in training and other data, and that is an error.
        """
        import datasets

        tables = {
            name: datasets.concatenate_datasets([p.table for p in parts]) for name, parts in done.items() if parts
        }
        if "train" not in tables:
            return tables
        self._source_of = np.repeat(np.arange(len(done["train"])), [len(part.table) for part in done["train"]])
        if "val" not in tables:
            kept, held_out = self._split(len(tables["train"]))
            tables["val"], tables["train"] = tables["train"].select(held_out), tables["train"].select(kept)
            self._source_of = self._source_of[kept]
        others = {"data.val": digests(tables["val"])[0], "data.test": self._scored_later}
        found = {name: leaked(tables["train"], other) for name, other in others.items()}
        lines = [
            f"{len(rows)} of {len(tables['train'])} training rows stand in {name} too, such as "
            f"{tables['train'][int(rows[0])]['id']!r}"
            for name, rows in found.items()
            if len(rows)
        ]
        if lines and self.on_leak == "error":
            raise UserError("\n".join(f"data.on_leak: {line}." for line in lines))
        if lines and self.on_leak == "drop":
            kept = np.setdiff1d(np.arange(len(tables["train"])), np.concatenate([*found.values()]))
            if not len(kept):
                raise UserError("data.on_leak: drop leaves no row to train on: all of them stand in other data too.")
            tables["train"], self._source_of = tables["train"].select(kept), self._source_of[kept]
        if say:
            what = "they are dropped" if self.on_leak == "drop" else "scores on them say little (data.on_leak)"
            for line in lines:
                rank_zero_info(f"Warning: {line}; {what}")
            self._say_shares(done["train"])
        return tables

    def _shares(self, sources: list[Source], sizes: list[int]) -> np.ndarray | None:
        """Of an epoch; None: each row once."""
        weights = [source.weight for source in sources]
        if self.temperature is None and weights == [None] * len(weights):
            return None
        return shares(sizes, None if None in weights else weights, self.temperature)  # type: ignore[arg-type]

    def _say_shares(self, parts: list[Prepared]) -> None:
        sizes = np.bincount(self._source_of, minlength=len(parts)).tolist()
        share = self._shares([part.source for part in parts], sizes)
        if share is None:
            return
        for part, has, gives in zip(parts, sizes, counts(sum(sizes), share)):
            rank_zero_info(
                f"data.train: {', '.join(tasks(part.table))}: {gives / sum(sizes):.1%} of an epoch: "
                f"{gives} rows of the {has} that it has"
            )

    def prepared(self, stage: str) -> dict[str, list[Prepared]]:
        base, self._chosen = self._base_and_objective()
        least = {
            "shuffle_buffer": 1,
            "batch_size": 1,
            "eval_batch_size": 1,
            "max_length": 1,
            "num_workers": 0,
            "val_size": 0,
        }
        least |= {} if self.num_proc is None else {"num_proc": 1}
        given_numbers = {name: getattr(self, name) for name in least}
        wrong = [n for n, value in given_numbers.items() if value is not None and value < least[n]]
        problems = [f"data.{n}: {given_numbers[n]} is less than {least[n]}." for n in wrong]
        config, tokenizer = load_config(base), load_tokenizer(base)
        facts = describe(config, tokenizer)
        context = facts.context_length
        max_length = facts.default_length if self.max_length is None or "max_length" in wrong else self.max_length
        if context is not None and max_length > context:
            problems.append(f"data.max_length: {max_length} is more than the model's context of {context} tokens.")
            max_length = context
        if self.max_tokens is not None:
            if not self._chosen.packs:
                problems.append(
                    f"data.max_tokens: the rows of objective {self._chosen.name} cannot be packed; use data.batch_size."
                )
            if self.max_tokens < max_length:
                problems.append(f"data.max_tokens: {self.max_tokens} is less than data.max_length, {max_length}.")
        classes, trained = self._classes(), False
        if base.head.classifies:
            try:
                self.num_classes, self.class_names, trained = self._decide_classes(
                    stage, classes, base.num_labels, config
                )
            except UserError as e:
                problems.append(str(e))
            classes = self.class_names or classes
        self.pad_id = facts.pad_id
        tokenize = Tokenize(
            tokenizer,
            max_length,
            self.eos_token,
            ends=not base.head.classifies,
            train_on=self.train_on,
            special_tokens_in_data=self.special_tokens_in_data,
            token_types=getattr(config, "type_vocab_size", None) or 1,
        )
        given = self.sources
        wanted = {
            "fit": {"train": given["train"], "val": given["val"]},
            "validate": {"val": given["val"]} if given["val"] else {"train": given["train"]},
            "test": {"test": given["test"]},
            "predict": {"predict": given["predict"] or given["test"]},
        }[stage]
        first = next(iter(wanted))
        streamed = self.streaming and stage == "fit"
        if not wanted[first]:
            raise UserError(f"data.{first}: there is nothing to {stage}. Name at least one file or data set.")
        if streamed:
            problems += self._wrong_stream(base)
            del wanted["train"]
        entries = [(name, source) for name, sources in wanted.items() for source in sources]
        done: list[Prepared] = []
        try:
            done = prepare(
                [source for _, source in entries],
                tokenize,
                self._chosen,
                require_answers=stage != "predict",
                classes=classes,
                num_classes=self.num_classes,
                trained=trained,
                on_bad_row=self.on_bad_row,
                pack=self.documents == "packed",
                cache=Path(expand(self.cache_dir)) if self.cache_dir else None,
                num_proc=self.num_proc,
                later=[*given["test"], *given["predict"]] if stage == "fit" else (),
            )
        except UserError as e:
            problems.append(str(e))
        if done and stage == "fit" and self.documents == "packed" and not any(part.documents for part in done):
            problems.append("data.documents: packed is for texts alone (rows: text), and there are none.")
        problems += self._wrong_shares()
        if problems:
            raise UserError("\n".join(problems))
        self._scored_later = np.empty(0, np.int64)
        if stage == "fit":
            cache = Path(expand(self.cache_dir)) if self.cache_dir else None
            about = (classes, self.num_classes, trained)
            self._scored_later = scored(given["test"], tokenize, self._chosen, about, cache)
        formats = {part.source.format or "" for part in done}
        if streamed:
            about = (classes, self.num_classes, trained)
            self.streams = [
                stream_work(source, tokenize, self._chosen, about, self.on_bad_row) for source in given["train"]
            ]
            formats |= {work.source.format or "" for work in self.streams}
        self.eos_id = tokenize.end("chat" if "chat" in formats else "plain")
        return {name: [p for (n, _), p in zip(entries, done) if n == name] for name in wanted}

    def _wrong_stream(self, base: BaseModel) -> list[str]:
        """What cannot be where the training data are a stream."""
        out = []
        if self.val_size and not self.sources["val"]:
            out.append("data.val_size: nothing can be split off a stream: name data.val, or set data.val_size: 0.")
        if self.documents == "packed":
            out.append("data.documents: packed cannot join texts of a stream; data.max_tokens packs them.")
        if self.on_leak != "warn":
            out.append(f"data.on_leak: {self.on_leak} needs all training rows at once, which a stream has not.")
        if base.head.classifies and not self.labels and base.num_labels is None:
            out.append("data.labels: the classes cannot be looked for in a stream: list them, or say base.num_labels.")
        if self.temperature is not None:
            out.append("data.temperature: the rows of a stream are not counted; give each source a weight.")
        if len(self.sources["train"]) > 1 and any(source.weight is None for source in self.sources["train"]):
            out.append("data.train: each of several streams needs a weight: how many rows they have is not known.")
        trainer: Any = self.trainer
        if trainer is None:
            return out
        if trainer.max_steps is None or trainer.max_steps < 0:
            out.append("trainer.max_steps: a stream has no known end, so say after how many steps the run ends.")
        if trainer.limit_train_batches != 1.0:
            out.append("trainer.limit_train_batches: a stream has no epochs to cut short; use trainer.max_steps.")
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
            out.append("trainer.callbacks: GradientAccumulationScheduler goes by epochs, and a stream has none.")
        if self.sources["val"] and type(trainer.val_check_interval) is not int and trainer.limit_val_batches:
            out.append("trainer.val_check_interval: say a number of batches: a stream has no epochs.")
        return out

    def _wrong_shares(self) -> list[str]:
        """What is wrong with weights and temperature."""
        weights = [source.weight for source in self.sources["train"]]
        given = [weight for weight in weights if weight is not None]
        out = []
        if any(s.weight is not None for name, sources in self.sources.items() if name != "train" for s in sources):
            out.append("weight: only sources of data.train have a share of an epoch.")
        if given and len(given) < len(weights):
            out.append("data.train: give all sources a weight, or none.")
        if any(not 0 < weight < math.inf for weight in given):
            out.append("data.train: a weight is a number of more than 0.")
        if given and self.temperature is not None:
            out.append("data.temperature: the sources have weights already.")
        if self.temperature is not None and not self.temperature >= 0.1:  # below, powers of the numbers are infinite
            out.append(f"data.temperature: {self.temperature} is less than 0.1.")
        if (given or self.temperature is not None) and self.max_tokens is not None:
            out.append("data.max_tokens: batches by tokens cannot have shares of sources (weight, temperature) yet.")
        return out

    def _base_and_objective(self) -> tuple[BaseModel, Objective]:
        trained = getattr(self.trainer, "lightning_module", None)
        base = self.base or getattr(trained, "base", None)
        if base is None:
            raise UserError(
                "data.base: which model's tokenizer? Without a Trainer, give TextData(base=BaseModel(...))."
            )
        return choose(base, self.objective or getattr(trained, "objective", None))

    def _classes(self) -> list[str] | None:
        if not isinstance(self.labels, str):
            return self.labels
        try:
            names = read_json(Path(expand(self.labels)).read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(f"data.labels: {self.labels!r} is not a readable JSON file: {e}") from e
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"data.labels: {self.labels!r} must hold a list of names.")
        return names

    def _decide_classes(
        self, stage: str, listed: list[str] | None, num_labels: int | None, config: Any
    ) -> tuple[int, list[str], bool]:
        """Number and names of the classes, and whether they are those of training data."""
        if listed:
            if num_labels not in (None, len(listed)):
                raise UserError(f"data.labels: {len(listed)} classes, but model.base.num_labels is {num_labels}.")
            return len(listed), listed, False
        if stage != "fit" and self._kept:
            return self._kept["num_classes"], self._kept["class_names"], bool(self._kept["class_names"])
        own = list(config.id2label.values())
        if self.streaming:
            return num_labels or config.num_labels, [], False
        if found := collect(self.sources["train"], self._chosen, num_labels, own):
            return found.count, found.names, bool(found.names)
        return config.num_labels, [], False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint tells later stages of the classes, and where in a stream the run is."""
        state = {} if self.num_classes is None else {"num_classes": self.num_classes, "class_names": self.class_names}
        if self._stream is None:
            return state
        places = self._stream.places.get(self._batches_done() // self._stream.accumulate)
        return state | {"stream": {**self._layout(), "places": every_rank(places)}}

    def _layout(self) -> dict[str, Any]:
        """What a stream that goes on must have in common with the one that stopped."""
        return {
            "processes": self._rank()[1],
            "data.num_workers": self.num_workers,
            "data.shuffle_buffer": self.shuffle_buffer,
            "data.batch_size": self.batch_size,
            "data.max_tokens": self.max_tokens,
            "data.seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the classes of a checkpoint over.

        Raises:
            UserError: this run has others.
        """
        self._going_on = state.get("stream")
        if "class_names" not in state:
            return
        self._kept, names = state, state["class_names"]
        if self.class_names and names and not self.labels and self.class_names != names:
            raise UserError(
                f"data.labels: the checkpoint's classes are {listing(names)}; those of this run's training data are "
                f"{listing(self.class_names)}. Only a new run, without --ckpt_path, may have others."
            )
        self.class_names = self.class_names or names

    def _held_out(self, rows: int) -> int:
        """How many of the training rows are for validation."""
        count = round(self.val_size * rows) if self.val_size < 1 else int(self.val_size)
        if count >= rows:
            raise UserError(f"data.val_size: {count} rows for validation leave none of {rows} to train on.")
        return count

    def _split(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the rows to train on, and of those for validation."""
        count = self._held_out(rows)
        order = np.random.default_rng(self.seed).permutation(rows)
        return np.sort(order[count:]), np.sort(order[:count])

    def _report(self, done: dict[str, list[Prepared]]) -> None:
        for name, parts in done.items():
            for part in parts:
                cut = f", {part.cut_rows} prompts cut by {part.cut_tokens} tokens in all" if part.cut_rows else ""
                texts = f" from {part.documents} texts" if part.documents else ""
                rank_zero_info(f"data.{name}: {', '.join(tasks(part.table))}: {len(part.table)} rows{texts}{cut}")
                for notice, count in part.notices.items():
                    rank_zero_info(f"Warning: {part.source.path}: {notice} ({count} row{'s' if count > 1 else ''})")
        if done.get("train") and not done.get("val"):
            rows = sum(len(part.table) for part in done["train"])
            held_out = self._held_out(rows)
            if held_out:
                rank_zero_info(f"data.val_size: {held_out} of these {rows} rows validate, {rows - held_out} train")
        if self.class_names and not self.labels:
            rank_zero_info(f"data.labels: {len(self.class_names)} classes: {listing(self.class_names)}")
        if bad := [row for parts in done.values() for part in parts for row in part.bad]:
            self._report_bad(bad)

    def _report_bad(self, bad: list[BadRow]) -> None:
        report = Path(expand(self.bad_row_report))
        entries = [{"file": b.file, "place": b.where, "column": b.column, "problem": b.problem} for b in bad]
        try:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), "utf-8")
        except OSError as e:
            raise UserError(f"data.bad_row_report: {report} cannot be written: {e.strerror}.") from e
        what = "1 bad row was left out; it is" if len(bad) == 1 else f"{len(bad)} bad rows were left out; they are"
        # not as a Python warning: that would print a line of our source beneath it
        rank_zero_info(f"Warning: {what} listed in {report}. The first: {bad[0]}")

    # -- loaders ----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        if getattr(self.trainer, "overfit_batches", 0):
            raise UserError(
                "trainer.overfit_batches would replace the order of the batches; use a source's limit instead."
            )
        # Lightning looks for a loader with a state; ours needs none, see sampler.py
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        if self.streaming:
            return self._stream_loader()  # type: ignore[return-value]
        table = self.tables["train"]
        lengths, loss_tokens = (numbers(table, column) for column in ("length", "loss_tokens"))
        self._packs, pack = None, False
        if self.max_tokens is not None:
            pack = self._may_pack(self.max_tokens)
            self._packs = Packs(lengths, self.max_tokens, padded=not pack)
        batches = TrainBatches(
            lengths,
            loss_tokens,
            self.batch_size,
            self.seed,
            self.length_grouped,
            *self._rank(),
            self._position,
            self._packs,
            self._mixture(),
        )
        self._validate_across_epochs()
        return self._loader(table, True, batches, pack)

    def _stream_loader(self) -> StreamLoader:
        rank, world = self._rank()
        pack = self.max_tokens is not None and self._may_pack(self.max_tokens)
        recipe = Recipe(
            self._chosen,
            self.pad_id,
            self.class_names,
            self.seed,
            self.batch_size,
            self.length_grouped,
            self.shuffle_buffer,
            self.max_tokens,
            pack,
            self.on_bad_row == "skip",
        )
        places, batches = {}, self._batches_done()
        if self._going_on:
            now, then = self._layout(), self._going_on
            if wrong := [f"{name} {then[name]} (now {value})" for name, value in now.items() if then[name] != value]:
                raise UserError(f"data.streaming: the run can only go on as it was begun: with {', '.join(wrong)}.")
            places = then["places"][rank]
        elif batches:
            raise UserError("data.streaming: the checkpoint does not say where in a stream it is.")
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        stream = Stream(self.streams, recipe, rank, world, places, batches % max(1, self.num_workers))
        self._stream = StreamLoader(stream, self.num_workers, accumulate, batches // accumulate)
        rank_zero_info(
            f"data.train: streamed from {', '.join(str(work.source.path) for work in self.streams)}, each process its "
            f"part of the rows, shuffled within {self.shuffle_buffer} rows; they are not compared with other data "
            "(data.on_leak)"
        )
        return self._stream

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Of a stream no process knows how many tokens the others learn in a step: they tell each other."""
        if self._stream is not None and self.trainer is not None and self.trainer.training and self._rank()[1] > 1:
            count = torch.tensor(batch["step_tokens"], device=self.trainer.strategy.root_device)
            batch["step_tokens"] = int(self.trainer.strategy.reduce(count, reduce_op="sum"))
        return batch

    def _batches_done(self) -> int:
        if self.trainer is None:
            return 0
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(batches.processed)

    def _mixture(self) -> Mixture | None:
        sources = self.sources["train"]
        share = self._shares(sources, np.bincount(self._source_of, minlength=len(sources)).tolist())
        return None if share is None else Mixture(self._source_of, share)

    def _may_pack(self, budget: int) -> bool:
        """Ask the model that is trained, if there is one, and say what it answers."""
        model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        if model is None:
            return True
        attention, reason = prepare_for_packed_rows(model)
        if reason:
            rank_zero_warn(
                f"data.max_tokens: this {type(model).__name__} ({attention}) cannot have its rows packed: {reason}. "
                f"They are padded instead, to batches of at most {budget} tokens with their pads."
            )
        else:
            rank_zero_info(f"data.max_tokens: batches of at most {budget} tokens, packed without pads ({attention})")
        return not reason

    def _validate_across_epochs(self) -> None:
        """An interval in batches that is longer than an epoch counts over all of them; Lightning would refuse it."""
        trainer: Any = self.trainer
        interval, batches = getattr(trainer, "val_check_interval", None), self._position().limit
        if type(interval) is int and interval > batches and trainer.check_val_every_n_epoch is not None:
            trainer.check_val_every_n_epoch = None
            rank_zero_info(
                f"trainer.val_check_interval: {interval} batches are more than the {batches:g} of an epoch, so they "
                "are counted across epochs (as with trainer.check_val_every_n_epoch: null)."
            )

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        return self._eval_loader("val") if len(self.tables.get("val", ())) else []

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._eval_loader("predict")

    def _eval_loader(self, name: str) -> DataLoader[dict[str, Any]]:
        import pyarrow.compute as pc

        table = self.tables[name]
        rows = pc.list_value_length(column(table, "input_ids")).to_numpy()
        batches = EvalBatches(numbers(table, "length"), rows, self.eval_batch_size, *self._rank())
        return self._loader(table, False, batches)

    def _loader(
        self, table: datasets.Dataset, training: bool, batches: TrainBatches | EvalBatches, pack: bool = False
    ) -> DataLoader[dict[str, Any]]:
        # batch_size=None: a batch is one item; so Lightning keeps this sampler in every stage
        return DataLoader(
            Batches(table, self._chosen, self.pad_id, training, self.class_names, pack),
            batch_size=None,
            sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
        )

    def _rank(self) -> tuple[int, int]:
        strategy = getattr(self.trainer, "strategy", None)
        kwargs = getattr(strategy, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
        return kwargs["rank"], kwargs["num_replicas"]

    def _position(self) -> Position:
        """From the progress counters of the trainer, which every checkpoint holds."""
        if self.trainer is None:
            return Position()
        loop, limit = self.trainer.fit_loop, self.trainer.limit_train_batches
        epoch: Any = loop.epoch_progress.current
        batch: Any = loop.epoch_loop.batch_progress.current
        units, each = (len(self.tables["train"]), self.batch_size) if self._packs is None else (len(self._packs), 1)
        length = -(-units // (each * self._rank()[1]))
        length = min(length, limit) if isinstance(limit, int) else int(length * limit)
        # between two epochs the batch counter still holds the old epoch's
        done = batch.processed if epoch.started > epoch.processed else 0
        over = done >= length  # saved after the last batch, before the epoch was counted
        accumulate = accumulation(self.trainer, epoch.processed + over)
        return Position(epoch.processed + over, 0 if over else done, accumulate, length)


def _entries(given: Any) -> list[Any]:
    """The sources of what was given; a list with a row in it is one."""
    if isinstance(given, Mapping) and given and all(isinstance(entry, Source) for entry in given.values()):
        return [replace(source, task=source.task or name) for name, source in given.items()]
    if isinstance(given, list | tuple) and not any(isinstance(entry, Mapping) for entry in given):
        return list(given)
    return [] if given is None or (isinstance(given, str) and not given) else [given]


def _source(entry: Any, defaults: Source) -> Source:
    source = entry if isinstance(entry, Source) else Source(entry)
    return replace(
        source,
        rows=source.rows or defaults.rows,
        format=source.format or defaults.format,
        columns=source.columns or defaults.columns,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
