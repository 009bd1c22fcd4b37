"""The two files of an adapter, read with suspicion.

Nothing they name is imported, run or opened, and no memory is taken before names, types and shapes are known to fit.

=======================  ==========================================================================
``adapter.safetensors``  tensors of the adapter (``layers.*``, ``bank.*``, ``balance.*``) and, as
                         ``base.<name>``, tensors of the base that were trained along (a new head)
``talklora.json``        format version, what base it belongs to, adapter options, experts of every
                         adapted module; digests of the tensors, of the files beside it (tokenizer, ...)
                         and of what it says itself
=======================  ==========================================================================
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from talklora_pl import strict
from talklora_pl.cache import sha256
from talklora_pl.durable import write_whole
from talklora_pl.errors import UserError
from talklora_pl.internals.torch import TorchDispatchMode

FORMAT_VERSION = 1
TENSORS = "adapter.safetensors"
CONFIG = "talklora.json"
CARD = "README.md"
OWN_DIGEST, FILE_DIGESTS = "sha256", "files_sha256"
"""Entries of talklora.json, which those of version 0.1 do not have."""
MAX_JSON = 1 << 24


def write_json(path: Path, data: Any) -> None:
    """Plain data as an indented JSON file, whole or not at all."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with a mapping.

    Raises:
        UserError: there is none, it is too large or too deep, or no JSON mapping.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} is no adapter folder: there is no {path.name} in it.")
    if path.stat().st_size > MAX_JSON:
        raise UserError(f"{path} is larger than {MAX_JSON >> 20} MiB; no adapter needs that.")
    try:
        text = path.read_text(encoding="utf-8")
        data = strict.read_json(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not readable as JSON: {short(e)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not a mapping.")
    return data


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is too large for a number")
    return number


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


@contextmanager
def open_tensors(folder: Path, name: str = TENSORS) -> Iterator[Any]:
    """The opened safetensors file, after its header was checked; its tensors are read after :func:`check_digest`.

    Raises:
        UserError: there is none, or it is damaged; also for what goes wrong while it is read.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} is no adapter folder: there is no {name} in it.")
    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError, RuntimeError, MemoryError) as e:  # it may say that it is larger than the memory
        raise UserError(f"{path} is damaged or not a safetensors file: {short(e)}") from None
    try:
        with file as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or not a safetensors file: {short(e)}") from None


def check_digest(folder: Path, digest: str | None) -> None:
    """Reads the whole file, so shapes come first.

    Raises:
        UserError: the tensors are not those that ``talklora.json`` was written with.
    """
    if sha256(folder / TENSORS) != digest:
        raise UserError(f"{folder / TENSORS} is damaged, or not the file that {CONFIG} belongs to: the digests differ.")


def digest_of(data: Mapping[str, Any]) -> str:
    """Digest of what a JSON file says, however it is indented; of all entries but :data:`OWN_DIGEST`."""
    said = {key: value for key, value in data.items() if key != OWN_DIGEST}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def digests_beside(folder: Path) -> dict[str, str]:
    """Digests of the files in a folder, without the two of the adapter and what is there to be edited: its card."""
    files = (p for p in sorted(folder.iterdir()) if p.is_file() and p.name not in (TENSORS, CONFIG, CARD))
    return {p.name: sha256(p) for p in files}


def check_digests_beside(folder: Path, digests: Mapping[str, Any]) -> None:
    """Compare files with their digests, those that are there.

    Raises:
        UserError: one is not the file that the adapter was exported with.
    """
    for name, digest in digests.items():
        if re.fullmatch(r"\w[\w.-]*", name) and (folder / name).is_file() and sha256(folder / name) != digest:
            raise UserError(
                f"{folder / name} is damaged, or not the file that the adapter was exported with: the digests differ. "
                f"If the change is yours, delete the entries {FILE_DIGESTS!r} and {OWN_DIGEST!r} of {CONFIG}."
            )


def shapes_of(f: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype (``F32``) of every tensor in an opened file; reads the header only."""
    slices = {k: f.get_slice(k) for k in f.keys()}  # noqa: SIM118
    return {k: (tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}


class BuildLimits(TorchDispatchMode):
    """Refuses to build tensors that a file cannot fill, before their memory is taken.

    Args:
        tensors: number of tensors in the file.
        elements: numbers in all of them.
    """

    def __init__(self, tensors: int, elements: int) -> None:
        super().__init__()
        self.steps = 10_000 + 2_000 * tensors
        self.elements = max(elements, 1 << 22)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.steps -= 1
        sizes = [a for a in args if isinstance(a, (list, tuple)) and all(type(i) is int for i in a)]
        counts = [math.prod(s) for s in sizes] + [a for a in args if type(a) is int]
        if self.steps < 0 or any(c > self.elements for c in counts):
            raise UserError("its options ask for more than the tensors in the file")
        return func(*args, **(kwargs or {}))


def short(value: Any) -> str:
    """The beginning of something out of a file, or of an error about it, for messages."""
    text, most = (" ".join(str(value).split()), 800) if isinstance(value, BaseException) else (repr(value), 120)
    return text if len(text) <= most else f"{text[:most]}..."
