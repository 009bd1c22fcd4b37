"""Exponents of many matrices with a progress bar, remembered on disk: eigenvalues of a 7B model take an hour on a CPU.

One JSON file per checkpoint, named by the digest of the headers, sizes and modification times of its weight files. It
holds all three estimators, so that the options of a rule need no key of their own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from talklora_pl.allocation.spectra import Exponents, exponents_of
from talklora_pl.base.weights import WeightSource
from talklora_pl.cache import cache_root
from talklora_pl.durable import write_whole
from talklora_pl.errors import UserError

FORMAT = 1  # raise it when an estimator changes its numbers


def cache_file(weights: WeightSource) -> Path | None:
    """Where the exponents of these weights are kept; None: nowhere."""
    if weights.fingerprint is None:
        return None
    return cache_root() / "spectra" / f"{weights.fingerprint[:40]}.v{FORMAT}.json"


def exponents(weights: WeightSource, modules: Iterable[str]) -> dict[str, Exponents]:
    """Exponents of every module, from the cache where they are known.

    Memory: two float64 Gram matrices of the smaller side of one weight at a time.

    Raises:
        UserError: a weight is missing, quantised, not finite or has no tail; the message names the module.
    """
    modules = list(dict.fromkeys(modules))
    weights.check(modules)
    file = cache_file(weights)
    known = weights.exponents
    if not known:
        known.update(_load(file))
    todo = [module for module in modules if module not in known]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(stderr=True)
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    saved = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not (todo and console.is_terminal)) as progress:
        for module in progress.track(todo, description="spectra"):
            try:
                known[module] = exponents_of(weights.matrix(module), device)
            except UserError as e:
                raise UserError(f"{module}: {e}") from None
            if time.monotonic() - saved > 30:  # an interrupted run keeps what it has
                _save(file, known)
                saved = time.monotonic()
    if todo:
        _save(file, known)
    return {module: known[module] for module in modules}


def _load(file: Path | None) -> dict[str, Exponents]:
    if file is None:
        return {}
    try:
        return {module: Exponents(**values) for module, values in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # absent or damaged: compute again
        return {}


def _save(file: Path | None, known: dict[str, Exponents]) -> None:
    if file is None:
        return
    text = json.dumps({module: asdict(values) for module, values in known.items()}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda part: part.write_text(text))
    except OSError:  # a cache that cannot be written (read-only home) is no reason to fail
        pass
