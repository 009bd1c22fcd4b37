"""From a list of dicts to an adapter, in Python: the options, defaults and checks of the command line."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from talklora_pl.adapter import AdapterConfig
from talklora_pl.adapter.io import adapter_tensors
from talklora_pl.base import BaseModel
from talklora_pl.cli import lightning as command_line
from talklora_pl.cli.options import Option, adapter_options
from talklora_pl.cli.values import undotted
from talklora_pl.data import TextData
from talklora_pl.data.objects import RowsInPython
from talklora_pl.data.prepare import resolve_source
from talklora_pl.data.source import Source
from talklora_pl.durable import failed_write, in_short
from talklora_pl.errors import UserError
from talklora_pl.evaluation import predictions
from talklora_pl.export.run import export_tensors, facts_of
from talklora_pl.inputs import to_device
from talklora_pl.module import FineTuner
from talklora_pl.registry import Component, did_you_mean, to_dict
from talklora_pl.shipped import methods

ROWS = ("train", "val", "test", "predict")
"""Options of the data that take rows."""


def fit(
    base: str | os.PathLike[str] | BaseModel,
    train: Any,
    method: str | AdapterConfig | None = "talklora",
    config: str | Sequence[str] = (),
    **options: Any,
) -> Trained:
    """Train an adapter. What the command line would take, refuse and default to holds here too.

    Args:
        base: which model: what ``model.base.path`` takes, or all its options.
        train: rows or where they are, as :class:`~talklora_pl.data.TextData` takes them: a list of dicts, a
            ``datasets.Dataset``, a file, a hub name, a ``Source``, or a list of sources.
        method: one of :func:`~talklora_pl.shipped.methods`, or options of an adapter; None: those in `config`.
        config: files, or names of shipped configs, as after ``--config``.
        options: by section, ``trainer={"max_steps": 100}``, or with dots, ``**{"trainer.max_steps": 100}``. A value is
            what a config holds, or an object: a component, a dataclass of options, a class in place of its path, and
            for the trainer callbacks, loggers and the like.

    Returns:
        the trained model and its run, whose folder holds what a run of the command line leaves.

    Raises:
        UserError: all that is wrong, before anything is loaded; or the disk is full.
        KeyboardInterrupt: after an interrupt, once the state is saved.
    """
    if isinstance(base, nn.Module):
        name = getattr(getattr(base, "config", None), "name_or_path", "") or "its name or folder"
        raise UserError(
            f"fit: base is a {type(base).__name__} that is loaded already. Give {name!r}: a run writes down where its "
            "base is, and reads it anew. A loaded model is trained by inject and a loop of yours, see docs/python.md."
        )
    if not isinstance(base, str | os.PathLike | BaseModel | Mapping):
        raise UserError(f"fit: base is a {type(base).__name__}. Give a hub name, a folder or a BaseModel.")
    argv = [f"--config={name}" for name in ([config] if isinstance(config, str) else config)]
    first: dict[str, Any] = {}
    if isinstance(method, str):
        if method not in methods():
            raise UserError(f"fit: there is no method {method!r}.{did_you_mean(method, methods())}")
        argv = [f"--config=method/{method}", *argv]
    elif method is not None:
        first["model.adapter"] = method
    first["model.base"] = base if isinstance(base, BaseModel | Mapping) else {"path": os.fspath(base)}
    first["data.train"] = train
    objects: dict[str, Any] = {}
    more = [*_one_device(), *_options(first | options, objects)]
    if objects:
        rank_zero_info(f"Python objects, which the run's config.yaml only names: {', '.join(objects)}.")
    with _quietly(), in_short():
        try:
            return Trained(command_line.run("fit", argv, partial(command_line.CLI, more=more, objects=objects)))
        except SystemExit as stop:
            if stop.code == 130:  # of a command line that was interrupted
                raise KeyboardInterrupt from None
            raise
        except Exception as e:
            if said := failed_write(e):
                raise UserError(said) from e
            raise


@contextmanager
def _quietly() -> Iterator[None]:
    """Warnings as on the command line, and afterwards as before."""
    said = warnings.formatwarning
    try:
        with warnings.catch_warnings():
            command_line.quiet()
            yield
    finally:
        warnings.formatwarning = said


def _one_device() -> list[Option]:
    """A notebook trains on one GPU: the others would need processes that run the notebook, too."""
    count = torch.cuda.device_count()
    if not hasattr(sys, "ps1") or count < 2:
        return []
    rank_zero_info(f"An interactive session trains on one of its {count} GPUs; a script or the command line on all.")
    return [Option(config={"trainer": {"devices": 1}})]


def _options(given: Mapping[str, Any], objects: dict[str, Any]) -> Iterator[Option]:
    """Options one by one, in their order; what no config can hold goes into `objects`."""
    for section, inner in map(undotted, given.items()):
        if not isinstance(inner, Mapping):
            yield Option(config={section: _plain(inner, section)})
            continue
        for name, value in map(undotted, inner.items()):
            key = f"{section}.{name}"
            if section == "data" and name in ROWS:
                value = _rows(value, key, objects)
            elif section == "trainer":
                value = _of_trainer(value, key, objects)
                if key in objects and not value:
                    continue
            yield Option(config={section: {name: _plain(value, key)}})


def _rows(value: Any, key: str, objects: dict[str, Any]) -> Any:
    """Sources as a config has them, with the words for rows in the place of rows."""
    if isinstance(value, Mapping) and value and all(map(_is_source, value.values())):  # by name
        return {name: _rows(entry, f"{key}.{name}", objects) for name, entry in value.items()}
    if _is_source(value) and isinstance(value, Mapping):
        value = Source(**value)
    if isinstance(value, list | tuple) and all(_is_source(e) or not isinstance(e, Mapping) for e in value):
        return [_rows(entry, f"{key}.{i}", objects) for i, entry in enumerate(value)]
    if isinstance(value, Source):
        if isinstance(value.path, RowsInPython):
            objects[f"{key}.path"] = value.path
    elif value is not None and not isinstance(value, str | os.PathLike | RowsInPython):
        value = RowsInPython(value)
    if isinstance(value, RowsInPython):
        objects[key] = value
    return value


def _is_source(value: Any) -> bool:
    """Whether it is a source, or its options as a config has them: no row has these fields and no others."""
    options = {field.name for field in fields(Source)}
    return isinstance(value, Source) or (isinstance(value, Mapping) and "path" in value and value.keys() <= options)


def _of_trainer(value: Any, key: str, objects: dict[str, Any]) -> Any:
    """What of an argument of the Trainer a config can hold."""
    if key.removesuffix("+") == "trainer.callbacks":
        several = value if isinstance(value, list | tuple) else [value]
        if made := [callback for callback in several if not _is_plain(callback)]:
            objects["trainer.callbacks"] = made
        return [callback for callback in several if _is_plain(callback)]
    if _is_plain(value):
        return value
    objects[key] = value
    return None


def _is_plain(value: Any) -> bool:
    try:
        _plain(value, "")
    except UserError:
        return False
    return True


def _plain(value: Any, key: str) -> Any:
    """A value as a config holds it."""
    if isinstance(value, str):
        return str(value)  # RowsInPython
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, AdapterConfig):
        return adapter_options(value)
    if isinstance(value, Component):
        return {"class_path": value.name, "init_args": {k: v for k, v in to_dict(value).items() if k != "name"}}
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), key) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner, key) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:  # a number of NumPy or PyTorch
        return value.item()
    raise UserError(
        f"fit: {key}: a {type(value).__name__} cannot be written into a config. Give the class and its options: "
        "{'class_path': ..., 'init_args': {...}}."
    )


ASKED = {"completion": "prompt", "text": "prompt", "instruction": "instruction", "chat": "messages"}
"""Kinds of rows that a text alone can be, and the field it is."""


@dataclass
class Trained:
    """A finished fit.

    Attributes:
        run: its ``trainer``, ``model`` (the :class:`FineTuner`) and ``datamodule``.
        folder: of the run: config, logs, checkpoints, adapters.
        scores: the newest value of ``train_loss`` and of every ``val_*``, after :meth:`test` also of ``test_*``.
    """

    run: command_line.CLI

    def __post_init__(self) -> None:
        trainer = self.run.trainer
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)
        self.scores = self._scores()
        self._ready()

    def _ready(self) -> None:
        """Lightning leaves the model in main memory, in training mode."""
        if self.tuner.device_mesh is None:  # else its ranks share it
            self.tuner.to(self.run.trainer.strategy.root_device)
        self.model.eval()

    @property
    def tuner(self) -> FineTuner:
        """The LightningModule."""
        return self.run.model

    @property
    def model(self) -> Any:
        """The base of Hugging Face with the trained adapter turned on."""
        return self.tuner.model

    @property
    def tokenizer(self) -> Any:
        """The base's."""
        return self.tuner.tokenizer

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in self.scores.items())
        return f"Trained({str(self.folder)!r}: {scores})"

    def _scores(self) -> dict[str, float]:
        found = self.run.trainer.callback_metrics
        names = [name for name in found if "/" not in name and name.startswith(("train_loss", "val_", "test_"))]
        return {name: float(found[name]) for name in names}

    def test(self) -> dict[str, float]:
        """Score the rows of ``data.test``; a table beside the base's scores is printed and kept in the run's folder.

        Raises:
            UserError: there are none.
        """
        with _quietly():
            self.run.trainer.test(self.tuner, datamodule=self.run.datamodule, verbose=False)
        self._ready()
        self.scores |= self._scores()
        return {name: value for name, value in self.scores.items() if name.startswith("test_")}

    def predict(self, rows: Any, max_new_tokens: int | None = None) -> list[dict[str, Any]]:
        """Answer rows like those that were trained on; they need no answers of their own.

        Args:
            rows: as for :func:`fit`.
            max_new_tokens: of a generated answer; None: ``model.evaluation.max_new_tokens``.

        Returns:
            for each row what ``predict`` of the command line writes: ``text`` where the answer is generated, ``choice``
            and ``answer`` where there are choices or classes.
        """
        like = self._source()
        if not isinstance(rows, Source):
            rows = Source(rows, rows=like.rows, format=like.format, columns=like.columns)
        data = copy.copy(self.run.datamodule)
        data.trainer, data.tables, data.sources = None, {}, {name: [] for name in ROWS} | {"predict": [rows]}
        data.load_state_dict(data.state_dict() or {"class_names": []})
        data.setup("predict")
        tuner, evaluation = self.tuner, self.tuner.evaluation
        if max_new_tokens is not None:
            tuner.evaluation = replace(evaluation, max_new_tokens=max_new_tokens)
        records: list[dict[str, Any]] = []
        try:
            for batch in data.predict_dataloader():
                batch = to_device(batch, tuner.device)
                records += predictions(tuner.score(batch, generate=True), batch)
        finally:
            tuner.evaluation = evaluation
        records.sort(key=lambda record: record.pop("index"))
        return records

    def generate(self, texts: str | Sequence[str], max_new_tokens: int | None = None) -> Any:
        """Answer texts, each written as the rows of the training were: a prompt, an instruction, or what a user says.

        Args:
            texts: one, or several.
            max_new_tokens: as for :meth:`predict`.

        Returns:
            the answer of one text, or a list.

        Raises:
            UserError: the training's rows are no texts with answers.
        """
        like = self._source()
        if like.rows not in ASKED:
            raise UserError(f"generate: a text alone is no row of kind {like.rows!r}; give rows to predict.")
        several = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else [texts]
        if not all(isinstance(text, str) for text in several):
            raise UserError(f"generate: give a text or a list of texts, not {texts!r:.60}.")
        field = ASKED[like.rows]
        rows = [{field: [{"role": "user", "content": t}] if field == "messages" else t} for t in several]
        kind = "completion" if like.rows == "text" else like.rows
        source = Source(rows, rows=kind, format=like.format)
        answers = [record.get("text", "") for record in self.predict(source, max_new_tokens)]
        return answers[0] if isinstance(texts, str) else answers

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the adapter as a folder that ``transformers`` and :func:`talklora_pl.load_adapter` load."""
        tuner = self.tuner
        facts = facts_of(self.run.trainer)
        return export_tensors(folder, adapter_tensors(self.model), tuner.adapter_metadata(), tuner.base, facts)

    def _source(self) -> Source:
        """The first source of the training, with its kind of rows and format."""
        data: TextData = self.run.datamodule
        return resolve_source(data.sources["train"][0], self.tuner.objective, bool(self.tokenizer.chat_template))
