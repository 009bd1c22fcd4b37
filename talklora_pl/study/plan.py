"""A study's YAML, and the runs it asks for. Free of torch."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from talklora_pl.cli.options import find_config, read_yaml
from talklora_pl.errors import UserError
from talklora_pl.registry import did_you_mean

KEYS = ("config", "set", "methods", "data", "seeds", "search", "select", "baseline", "match", "margin")
OURS = ("seed_everything", "run_name", "trainer.default_root_dir", "trainer.devices", "trainer.num_nodes", "ckpt_path")
"""Options of a run that a study gives."""


@dataclass(frozen=True)
class Part:
    """A method or a data set: configs and options on top of the study's own.

    Attributes:
        name: of the study's choice.
        configs: files or shipped ones.
        options: by dotted key.
    """

    name: str
    configs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSpec:
    """One run of a study.

    Attributes:
        data, method, seed: what it is.
        argv: of its `fit`, without where it is kept.
        choice: the options of the search that it tries.
    """

    data: str
    method: str
    seed: int
    argv: tuple[str, ...]
    choice: Mapping[str, Any] = field(compare=False)

    @property
    def name(self) -> str:
        """Of its folder: data, method, choice and seed."""
        short = [f"{key.rpartition('.')[2]}={value}" for key, value in self.choice.items()]
        return ".".join([self.data, self.method, *(s.replace("/", "-") for s in short), f"seed{self.seed}"])

    @property
    def digest(self) -> str:
        """Of all that its numbers depend on, as far as the study says it: what is in a config, not where it lies."""
        words = [
            _content(Path(word).read_bytes()) if before == "--config" else word
            for before, word in zip(("", *self.argv), self.argv)
        ]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        methods, data: at least one each.
        seeds: of every method, the same ones; they decide the order of the data, too.
        configs, options: of all runs.
        search: options by dotted key, each with the values to try: all combinations, with the first seed.
        select: the validation score by which the best is chosen.
        baseline: the method that the others are compared with.
        match: ``parameters``: other methods get the rank whose number of trained parameters comes nearest.
        margin: a difference smaller than this is of no interest; for the verdict "the same".
    """

    methods: tuple[Part, ...]
    data: tuple[Part, ...]
    seeds: tuple[int, ...]
    configs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, list[Any]] = field(default_factory=dict)
    select: str = "val_loss"
    baseline: str = ""
    match: str | None = None
    margin: float = 0.0

    @property
    def choices(self) -> list[dict[str, Any]]:
        """All combinations of the search; a single empty one without a search."""
        return [dict(zip(self.search, values)) for values in itertools.product(*self.search.values())]

    def run(self, data: Part, method: Part, seed: int, choice: Mapping[str, Any]) -> RunSpec:
        """The run of that name."""
        configs = [*self.configs, *data.configs, *method.configs]
        options = {**self.options, **data.options, **method.options, **choice}
        argv = [word for config in configs for word in ("--config", find_config(config))]
        argv += [f"--checkpoint.monitor={self.select}", f"--checkpoint.mode={'min' if self.small else 'max'}"]
        argv += [
            "--trainer.devices=1",
            "--trainer.num_nodes=1",
        ]  # further processes of a run would start the study anew
        argv += [f"--data.seed={seed}"]  # the order of the rows, and the split; an option of the study's may fix it
        argv += [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]
        return RunSpec(data.name, method.name, seed, (*argv, f"--seed_everything={seed}"), choice)

    def cells(self) -> Iterator[tuple[Part, Part]]:
        """Data sets x methods."""
        yield from itertools.product(self.data, self.methods)

    @property
    def small(self) -> bool:
        """Whether the selected score is to be small, as a loss is; everything else is to be large."""
        return "loss" in self.select


def read_study(file: str) -> Study:
    """A study from YAML.

    Raises:
        UserError: every entry that cannot be used, in one message.
    """
    path = Path(find_config(file))
    raw = read_yaml(path.read_bytes(), str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a study is a mapping with methods, seeds and more; see docs/compare.md.")
    problems = [f"unknown entry {key!r}.{did_you_mean(str(key), KEYS)}" for key in raw if key not in KEYS]

    def parts(key: str) -> tuple[Part, ...]:
        entries = raw.get(key, {})
        if isinstance(entries, list):
            entries = {Path(str(entry)).stem: entry for entry in entries}
        if not isinstance(entries, dict):
            problems.append(f"{key}: names with configs, not {entries!r}.")
            return ()
        out = []
        for name, entry in entries.items():
            entry = entry if isinstance(entry, dict) else {"config": entry}
            if wrong := [k for k in entry if k not in ("config", "set")]:
                problems.append(f"{key}.{name}: unknown entry {wrong[0]!r}; there are config and set.")
            if "/" in str(name) or str(name).startswith("."):
                problems.append(f"{key}: {name!r} is not the name of a folder.")
            out.append(Part(str(name), _configs(entry.get("config"), problems), _options(entry.get("set"), problems)))
        return tuple(out)

    methods, data = parts("methods"), parts("data") or (Part("data"),)
    if not methods:
        problems.append("methods: none is given, such as {talklora: method/talklora, lora: method/lora}.")
    names = [method.name for method in methods]
    baseline = str(raw.get("baseline", names[0] if names else ""))
    if names and baseline not in names:
        problems.append(f"baseline: {baseline!r} is not one of the methods.{did_you_mean(baseline, names)}")
    search = _options(raw.get("search"), problems)
    if wrong := [key for key, values in search.items() if not isinstance(values, list) or not values]:
        problems.append(f"search.{wrong[0]}: a list of values to try.")
    select = str(raw.get("select", "val_loss"))
    if not select.startswith("val_"):
        problems.append(f"select: {select!r} is not a score of the validation data, such as val_accuracy.")
    if raw.get("match") not in (None, "parameters"):
        problems.append(f"match: {raw['match']!r} is not known; there is parameters.")
    seeds = raw.get("seeds", 3)
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        seeds = list(range(1, seeds + 1))
    if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) for s in seeds):
        problems.append(f"seeds: how many, or a list of whole numbers; not {raw.get('seeds')!r}.")
    margin = raw.get("margin", 0.0)
    if not isinstance(margin, int | float) or margin < 0:
        problems.append(f"margin: a difference of scores, not {margin!r}.")
    configs, options = _configs(raw.get("config"), problems), _options(raw.get("set"), problems)
    given = [*options, *search, *(key for part in (*methods, *data) for key in part.options)]
    if reserved := [key for key in given if key in OURS]:
        problems.append(f"set: {reserved[0]}: the study sets it itself.")
    if problems:
        raise UserError("\n  ".join([f"{path}: the study cannot be used:", *problems]))
    return Study(
        methods,
        data,
        tuple(dict.fromkeys(seeds)),
        configs,
        options,
        search,
        select,
        baseline,
        raw.get("match"),
        float(margin),
    )


@functools.cache
def _content(text: bytes) -> str:
    """Of a YAML; neither comments nor the order of keys count."""
    return json.dumps(read_yaml(text, "config"), sort_keys=True, default=str)


def _configs(value: Any, problems: list[str]) -> tuple[str, ...]:
    configs = [] if value is None else value if isinstance(value, list) else [value]
    for config in configs:
        try:
            find_config(str(config))
        except UserError as e:
            problems.append(str(e))
    return tuple(map(str, configs))


def _options(value: Any, problems: list[str]) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        problems.append(f"set and search: options by dotted key, not {value!r}.")
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else {}
