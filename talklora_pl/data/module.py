"""``TextData``: the data sets of a run, from files to batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from talklora_pl.base import BaseModel, load_config, load_tokenizer
from talklora_pl.base.description import describe
from talklora_pl.data import checks, report
from talklora_pl.data.assemble import Assembled, assemble, held_out
from talklora_pl.data.batches import Batches
from talklora_pl.data.classes import decide, listed
from talklora_pl.data.mixture import Mixture, shares_of
from talklora_pl.data.prepare import Prepared, prepare, scored, stream_work
from talklora_pl.data.rows import listing
from talklora_pl.data.sampler import EvalBatches, Packs, Position, TrainBatches, accumulation
from talklora_pl.data.source import Source, Sources
from talklora_pl.data.stream import Recipe, Stream, StreamLoader, places_of
from talklora_pl.data.table import column, numbers, tasks
from talklora_pl.data.tokens import Tokenize
from talklora_pl.data.work import Work
from talklora_pl.errors import UserError
from talklora_pl.objectives import Objective, choose
from talklora_pl.paths import expand
from talklora_pl.ranks import over_ranks
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
        self._source_of = np.empty(0, int)  # of the training rows
        self._scored_later = np.empty(0, np.int64)  # digests of the rows to test on
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
        report.say_rows(done)
        if done.get("train") and not done.get("val"):
            rows = sum(len(part.table) for part in done["train"])
            if count := held_out(rows, self.val_size):
                report.say_split(rows, count)
        if self.class_names and not self.labels:
            report.say_classes(self.class_names)
        report.say_bad_rows(done, self.bad_row_report)
        made = self._assemble(done)
        report.say_leaks(made.leaks, self.on_leak == "drop")
        sizes = np.bincount(made.source_of, minlength=len(self.sources["train"])).tolist()
        if "train" in done and (share := shares_of(self.sources["train"], sizes, self.temperature)) is not None:
            report.say_shares(done["train"], sizes, share)

    def check(self, stage: str) -> None:
        """Read everything that a stage needs.

        Raises:
            UserError: all problems of all files in one message.
        """
        self._assemble(self.prepared(stage))

    def setup(self, stage: str) -> None:
        """Open what :meth:`prepare_data` has left in the cache.

        Args:
            stage: fit, validate, test or predict.
        """
        made = self._assemble(self.prepared(stage))
        self.tables |= made.tables
        if "train" in made.tables:
            self._source_of = made.source_of

    def _assemble(self, done: dict[str, list[Prepared]]) -> Assembled:
        return assemble(done, self.val_size, self.seed, self.on_leak, self._scored_later)

    def prepared(self, stage: str) -> dict[str, list[Prepared]]:
        base, self._chosen = self._base_and_objective()
        small = checks.wrong_numbers({name: getattr(self, name) for name in checks.LEAST})
        config, tokenizer = load_config(base), load_tokenizer(base)
        facts = describe(config, tokenizer)
        max_length = facts.default_length if self.max_length is None or "max_length" in small else self.max_length
        problems = [
            *small.values(),
            *checks.wrong_lengths(max_length, facts.context_length, self.max_tokens, self._chosen),
        ]
        max_length = min(max_length, facts.context_length or max_length)
        classes, trained = listed(self.labels), False
        if base.head.classifies:
            try:
                kept = self._kept if stage != "fit" else {}
                read = [] if self.streaming else self.sources["train"]
                decided = decide(classes, base.num_labels, config, kept, read, self._chosen)
                self.num_classes, self.class_names, trained = decided
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
            problems += checks.wrong_in_a_stream(
                given["train"],
                base,
                splits=bool(self.val_size and not given["val"]),
                documents=self.documents,
                on_leak=self.on_leak,
                labels=self.labels,
                temperature=self.temperature,
            )
            if self.trainer is not None:
                problems += checks.wrong_trainer_of_a_stream(self.trainer, bool(given["val"]))
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
        problems += checks.wrong_shares(given, self.temperature)
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

    def _base_and_objective(self) -> tuple[BaseModel, Objective]:
        trained = getattr(self.trainer, "lightning_module", None)
        base = self.base or getattr(trained, "base", None)
        if base is None:
            raise UserError(
                "data.base: which model's tokenizer? Without a Trainer, give TextData(base=BaseModel(...))."
            )
        return choose(base, self.objective or getattr(trained, "objective", None))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint tells later stages of the classes, and where in a stream the run is."""
        state = {} if self.num_classes is None else {"num_classes": self.num_classes, "class_names": self.class_names}
        if self._stream is None:
            return state
        return state | {"stream": self._stream.state(self._batches_done() // self._stream.accumulate)}

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
        sources = self.sources["train"]
        sizes = np.bincount(self._source_of, minlength=len(sources)).tolist()
        share = shares_of(sources, sizes, self.temperature)
        mixture = None if share is None else Mixture(self._source_of, share)
        self._packs, pack = None, False
        if self.max_tokens is not None:
            pack = self._may_pack(self.max_tokens)
            self._packs = Packs(lengths, self.max_tokens, not pack, mixture)
        batches = TrainBatches(
            lengths,
            loss_tokens,
            self.batch_size,
            self.seed,
            self.length_grouped,
            *self._rank(),
            self._position,
            self._packs,
            mixture,
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
        batches = self._batches_done()
        if batches and not self._going_on:
            raise UserError("data.streaming: the checkpoint does not say where in a stream it is.")
        layout = {
            "processes": world,
            "data.num_workers": self.num_workers,
            "data.shuffle_buffer": self.shuffle_buffer,
            "data.batch_size": self.batch_size,
            "data.max_tokens": self.max_tokens,
            "data.seed": self.seed,
        }
        places = places_of(self._going_on, layout, rank) if self._going_on else {}
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        stream = Stream(self.streams, recipe, rank, world, places, batches % max(1, self.num_workers))
        self._stream = StreamLoader(stream, self.num_workers, accumulate, layout, batches // accumulate)
        rank_zero_info(
            f"data.train: streamed from {', '.join(str(work.source.path) for work in self.streams)}, each process its "
            f"part of the rows, shuffled within {self.shuffle_buffer} rows; they are not compared with other data "
            "(data.on_leak)"
        )
        return self._stream

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Of a stream no process knows how many tokens the others learn in a step: they tell each other. What goes to
        a GPU goes out of pinned memory."""
        if self._stream is not None and self.trainer is not None and self.trainer.training and self._rank()[1] > 1:
            (batch["step_tokens"],) = over_ranks([batch["step_tokens"]], "sum")
        if self.trainer is not None and self.trainer.strategy.root_device.type == "cuda":
            # out of other memory a larger tensor travels only when the GPU has done what it was given before
            batch = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}
        return batch

    def _batches_done(self) -> int:
        if self.trainer is None:
            return 0
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return int(batches.processed)

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
