"""A task: an entry of a YAML file, and the questions that it makes of the rows of a data set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from talklora_pl import strict
from talklora_pl.data.formats import NAMES
from talklora_pl.data.source import ROW_TYPES, Reader, Source, file_type
from talklora_pl.errors import UserError
from talklora_pl.paths import expand
from talklora_pl.registry import did_you_mean
from talklora_pl.shipped import shipped_configs

PLAIN = {"commonsense", "glue"}
"""Files of ``configs/tasks`` whose tasks go by their bare names."""
METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")
OF_CLASSES, OF_NUMBERS = ("f1", "matthews"), ("pearson", "spearman")
WRONG = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What an expression can end with."""
_jinja = SandboxedEnvironment(undefined=StrictUndefined)  # a file of tasks may be a stranger's


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Expressions and templates are Jinja's, over the columns of a row. Templates also have `question` and `choices`, and
    `words` where these are made already; a template of one choice has `choice`, its `number` from 1 and its `letter`.

    Attributes:
        name: of the task.
        path: of the data set on the hub.
        question: expression: the bare question, without the choices.
        choices: expression: the list of the choices' texts.
        prompt: template: how the question is asked together with its choices.
        words: template of one choice: what stands for it in an answer.
        pattern: regular expression; the first match in a generated answer is what it answers.
        label: expression: the number of the right choice, from 0.
        value: expression, in the place of a label: the right number, where answers are numbers.
        output: template with the `word` of a choice: the answer as it is learned and ranked.
        format: how prompt and answer are written, as ``data.format``.
        config, revision: of the data set.
        split, train: what is scored, what is trained on.
        where: expression: whether a row counts.
        text, pair: expressions: what a classifier reads.
        metrics: of :data:`METRICS`; the first is the one whose mean over tasks is reported.
    """

    name: str
    path: str
    question: str
    choices: str
    prompt: str
    words: str
    pattern: str
    label: str | None = None
    value: str | None = None
    output: str = "the correct answer is {{ word }}"
    format: str = "alpaca"
    config: str | None = None
    revision: str | None = None
    split: str = "test"
    train: str = "train"
    where: str | None = None
    text: str | None = None
    pair: str | None = None
    metrics: list[str] = field(default_factory=lambda: ["accuracy"])

    def __post_init__(self) -> None:
        """Raises: UserError for an entry that no row could be read with."""
        for name in ("question", "choices", "label", "value", "where", "text", "pair"):
            if (expression := getattr(self, name)) is not None:
                self._try(name, lambda e=expression: _jinja.compile_expression(e))  # type: ignore[misc]
        for name in ("prompt", "words", "output"):
            self._try(name, lambda name=name: _jinja.from_string(getattr(self, name)))  # type: ignore[misc]
        try:
            re.compile(self.pattern)
        except re.error as e:
            raise UserError(f"task {self.name}: pattern: {self.pattern!r} is no regular expression: {e}.") from None
        if (self.label is None) == (self.value is None):
            raise UserError(f"task {self.name}: it needs a label or a value, and not both.")
        if wrong := [name for name in self.metrics if name not in METRICS]:
            raise UserError(f"task {self.name}: metrics: there is no {wrong[0]!r}.{did_you_mean(wrong[0], METRICS)}")
        if not self.metrics:
            raise UserError(f"task {self.name}: metrics: name at least one of {', '.join(METRICS)}.")
        other = OF_CLASSES if self.value is not None else OF_NUMBERS
        if wrong := [name for name in self.metrics if name in other]:
            needed = "a label" if self.value is not None else "a value"
            raise UserError(f"task {self.name}: metrics: {wrong[0]} is for answers with {needed}.")

    def _try(self, entry: str, make: Any, where: str = "") -> Any:
        """What Jinja makes. Raises UserError."""
        try:
            return make()
        except WRONG as e:
            place = f"{where}: " if where else ""
            raise UserError(f"{place}task {self.name}: {entry}: {e or type(e).__name__}.") from None

    def questions(self, split: str, data: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """The questions of a split, in its order: `id`, `task`, `question`, `choices`, `label` or `value`, `words`,
        `outputs` (both one per choice), `instruction`, `output` and `answer` (the right one, as it is learned, and its
        word), and `text` and `text_pair` where a classifier can read it.

        Args:
            split: of the data set.
            data: folder that holds the data set under its name on the hub; None: the hub.
            limit: the first so many.

        Raises:
            UserError: the data set cannot be had, or a row is not what the entries say.
        """
        sources = [Source(self.path, name=self.config, split=split, revision=self.revision)]
        if data is not None:
            sources = [Source(str(file)) for file in self._files(split, Path(expand(data)) / self.path)]
        rows = ((f"{source.path}, {where}", row) for source in sources for where, row in Reader(source))
        found = list(islice(self._questions(rows, split), limit))
        if not found:
            raise UserError(f"{sources[0].path}: the split {split!r} holds no question of the task {self.name}.")
        return found

    def _files(self, split: str, folder: Path) -> list[Path]:
        """The files of a split in a copy of the data set, read as they are: `datasets` would take what it has cached of
        any other folder of that name."""
        place = folder / (self.config or "")
        if not place.is_dir():
            raise UserError(
                f"--data: there is no folder {place}. Have the data set there as it is on the hub: hf download "
                f"{self.path} --repo-type dataset --local-dir {folder}"
            )
        there = sorted(file for file in place.rglob("*") if file_type(file)[0] in ROW_TYPES)
        files = [file for file in there if re.match(rf"{re.escape(split)}[-.]", file.name)]
        if not files:
            names = ", ".join(str(file.relative_to(place)) for file in there[:10]) or "no data file"
            raise UserError(
                f"--data: no file in {place} is of the split {split!r}: {split}.jsonl, {split}-00000-of-00001.parquet. "
                f"It has {names}."
            )
        return files

    def _questions(self, rows: Iterator[tuple[str, Any]], split: str) -> Iterator[dict[str, Any]]:
        for number, (at, row) in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError(str(row))
            if self.where is None or self._value("where", row, at):
                yield {"id": f"{self.name}-{split}-{number}", "task": self.name} | self._question(row, at)

    def _value(self, entry: str, row: Mapping[str, Any], at: str) -> Any:
        def evaluate() -> Any:
            value = _jinja.compile_expression(getattr(self, entry), undefined_to_none=False)(**row)
            if isinstance(value, StrictUndefined):
                str(value)  # raises
            return value

        return self._try(entry, evaluate, f"{at} (columns {', '.join(row)})")

    def _text(self, entry: str, values: Mapping[str, Any], at: str) -> str:
        text: str = self._try(entry, lambda: _jinja.from_string(getattr(self, entry)).render(values), at)
        return text

    def _question(self, row: Mapping[str, Any], at: str) -> dict[str, Any]:
        out: dict[str, Any] = {name: self._value(name, row, at) for name in ("question", "choices")}
        if not isinstance(out["choices"], list) or not all(isinstance(choice, str) for choice in out["choices"]):
            raise UserError(f"{at}: task {self.name}: choices: {out['choices']!r} is no list of texts.")
        if len(out["choices"]) != 2 and (wrong := [name for name in self.metrics if name in OF_CLASSES]):
            raise UserError(f"{at}: task {self.name}: {wrong[0]} is for two choices, not {len(out['choices'])}.")
        one = [
            {"choice": choice, "number": i + 1, "letter": chr(ord("A") + i)} for i, choice in enumerate(out["choices"])
        ]
        out["words"] = [self._text("words", {**row, **values}, at) for values in one]
        out["outputs"] = [self._text("output", {**row, "word": word}, at) for word in out["words"]]
        out["instruction"] = self._text("prompt", {**row, **out}, at)
        out["input"] = ""
        if self.value is not None:
            value = self._value("value", row, at)
            out["value"] = self._try("value", lambda: float(value), at)
            self._try("choices", lambda: [float(choice) for choice in out["choices"]], at)
            out["answer"] = f"{out['value']:.1f}"
            out["output"] = self._text("output", {**row, "word": out["answer"]}, at)
        else:
            label = self._value("label", row, at)
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(one):
                raise UserError(f"{at}: task {self.name}: label: {label!r} is none of {len(one)} choices from 0.")
            out |= {"label": label, "answer": out["words"][label], "output": out["outputs"][label]}
        for name, entry in (("text", "text"), ("text_pair", "pair")):
            if getattr(self, entry) is not None:
                out[name] = self._value(entry, row, at)
        return out

    def word(self, text: str) -> str | None:
        """What a generated text answers, by the pattern."""
        found = re.search(self.pattern, text)
        return found[0] if found else None


def read_tasks(given: str) -> list[Task]:
    """Tasks by their names.

    Args:
        given: with commas between: names of tasks (``rte``, ``graphlora/boolq``), of files of ``configs/tasks`` for all
            of theirs (``commonsense``: its eight, without CommonsenseQA), or paths of further such files.

    Raises:
        UserError: there is none of that name, or a file is wrong.
    """
    suites = {file.stem: read_file(file) for file in (shipped_configs() / "tasks").glob("*.yaml")}
    for suite in suites.keys() - PLAIN:  # they ask the same data in other ways
        suites[suite] = {f"{suite}/{name}": replace(t, name=f"{suite}/{name}") for name, t in suites[suite].items()}
    known = {name: task for tasks in suites.values() for name, task in tasks.items()}
    found: list[Task] = []
    for name in (part.strip() for part in given.split(",")):
        if name in suites:
            found += [task for task in suites[name].values() if name != "commonsense" or task.name != "csqa"]
        elif name in known:
            found.append(known[name])
        elif Path(expand(name)).suffix in (".yaml", ".yml"):
            found += read_file(Path(expand(name))).values()
        else:
            raise UserError(f"--tasks: there is no task {name!r}.{did_you_mean(name, [*known, *suites])}")
    names = [task.name for task in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--tasks: two tasks are called {twice[0]!r}.")
    return found


def read_file(file: Path) -> dict[str, Task]:
    """The tasks of a file, by name. Raises UserError."""
    try:
        content = strict.read_yaml(file.read_bytes())
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"{file} is not readable as YAML: {' '.join(str(e).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise UserError(f"{file}: tasks are a mapping of names to entries.")
    return {str(name): _task(str(name), entry, file) for name, entry in content.items()}


def _task(name: str, entry: dict[str, Any], file: Path) -> Task:
    known = {f.name: f for f in fields(Task) if f.name != "name"}
    if wrong := [key for key in entry if key not in known]:
        raise UserError(f"{file}: task {name}: there is no entry {wrong[0]!r}.{did_you_mean(str(wrong[0]), known)}")
    needed = [key for key, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if lacking := [key for key in needed if key not in entry]:
        raise UserError(f"{file}: task {name}: {lacking[0]} is missing.")
    for key, value in entry.items():
        if not (_strings(value) if key == "metrics" else isinstance(value, str)):
            raise UserError(
                f"{file}: task {name}: {key}: {value!r} must be {'a list' if key == 'metrics' else 'text'}."
            )
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{file}: task {name!r}: its rows get a folder of that name: letters, digits, dots, dashes.")
    task = Task(name, **entry)
    if task.format not in NAMES and "{prompt}" not in task.format:
        raise UserError(f"{file}: task {name}: format: {task.format!r} is no format.{did_you_mean(task.format, NAMES)}")
    return task


def _strings(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
