"""Frozen weights, one matrix at a time, so that a model larger than memory can be looked at.

safetensors' own reader maps whole shards privately and writable, which counts as data of the process: a 5 GB shard then
needs a 5 GB memory limit. Here only the pages of one matrix are mapped, read-only, and only while it is in use.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from talklora_pl.base import resolve
from talklora_pl.errors import UserError
from talklora_pl.paths import expand
from talklora_pl.registry import did_you_mean

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class WeightSource(ABC):
    """Gives the weight of a module by its full name."""

    fingerprint: str | None = None
    """Changes whenever the weights may have; None where that cannot be known (nothing is cached then)."""

    @cached_property
    def exponents(self) -> dict[str, Any]:
        """What this process has computed of them, by module (see :mod:`~talklora_pl.allocation.cache`)."""
        return {}

    @abstractmethod
    def matrix(self, module: str) -> Tensor:
        """Weight [rows, columns] in its stored dtype. Read it only, and drop it before asking for the next."""

    @abstractmethod
    def check(self, modules: Iterable[str]) -> None:
        """Raise what :meth:`matrix` would raise for any of these, before long work starts."""


class ModuleWeights(WeightSource):
    """Weights of a live model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def matrix(self, module: str) -> Tensor:
        try:
            weight = self.model.get_submodule(module).weight
        except AttributeError:
            raise UserError(f"The model has no module {module!r} with a weight.") from None
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            raise UserError(f"{module}: the weight is not a plain floating-point matrix (quantised?).")
        if weight.is_meta:
            raise UserError(f"{module}: the model was built without weights (meta device); read them from their files.")
        return weight.detach()

    def check(self, modules: Iterable[str]) -> None:
        for module in modules:
            self.matrix(module)


class _Place(NamedTuple):
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte offset in the file
    size: int  # bytes


class SafetensorsWeights(WeightSource):
    """Weights of a checkpoint: a ``.safetensors`` file or a Hugging Face folder, sharded or not.

    Raises:
        UserError: there is no such checkpoint, a shard is missing, cut short or not a safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(expand(path))
        self._places: dict[str, _Place] = {}
        digest = hashlib.sha256()
        for file in _shards(self.path):
            header, data_start, stat = _read_header(file)
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns} ".encode() + header)
            for name, info in json.loads(header).items():
                if name != "__metadata__":
                    self._places[name] = _place(file, name, info, data_start, stat.st_size)
        self.fingerprint = digest.hexdigest()

    @classmethod
    def of(cls, base: str, revision: str | None = None) -> SafetensorsWeights:
        """Weights of a base model by hub name, folder, ``.gguf`` file or ``package:NAME/FILE``.

        Raises:
            UserError: as above, or a hub model that is neither in the local cache nor reachable.
        """
        path = resolve(base)
        if not Path(path).exists():
            from huggingface_hub import snapshot_download

            wanted = ["*.safetensors", "*.safetensors.index.json", "config.json"]
            try:
                path = snapshot_download(path, revision=revision, allow_patterns=wanted)
            except Exception as e:  # no network, no such name, no access: all of them are the user's to mend
                raise UserError(f"{base!r}: the weights cannot be had from the hub: {str(e).splitlines()[0]}") from e
        return cls(path)

    def _find(self, module: str) -> _Place:
        """A file may know a module by a longer or shorter name than the model (``model.layers.0`` and ``layers.0``)."""
        key = module + ".weight"
        if key not in self._places:
            longer = [name for name in self._places if name.endswith("." + key)]
            shorter = [key[i + 1 :] for i, c in enumerate(key) if c == "." and key[i + 1 :] in self._places]
            # a bare 'proj.weight' would match by its last word alone
            close = longer or [name for name in shorter if name.count(".") > 1]
            # of text and images: language_model.model.layers in the file is model.language_model.layers in the model
            close = close or self._without_wrappers.get(_without_wrappers(key), [])
            if len(close) != 1:
                which = "matches several tensors" if close else "is not in the checkpoint"
                raise UserError(f"{self.path}: {key!r} {which}.{did_you_mean(key, sorted(self._places)[:2000])[:600]}")
            key = close[0]
        place = self._places[key]
        if len(place.shape) != 2:
            raise UserError(f"{self.path}: {key!r} has shape {list(place.shape)}, a matrix is needed.")
        if place.dtype not in _DTYPES:
            raise UserError(
                f"{self.path}: {key!r} is stored as {place.dtype}. Spectra need the original floating-point weights, "
                "not a quantised copy of them."
            )
        return place

    @cached_property
    def _without_wrappers(self) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {}
        for name in self._places:
            out.setdefault(_without_wrappers(name), []).append(name)
        return out

    def check(self, modules: Iterable[str]) -> None:
        for module in modules:
            self._find(module)

    def matrix(self, module: str) -> Tensor:
        return self._mapped(self._find(module))

    def names(self) -> set[str]:
        """All stored tensors, by the names that the files give them."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a stored tensor, by the name that the files give it."""
        return self._places[name].shape

    def tensor(self, name: str) -> Tensor:
        """A stored tensor by the name that the files give it. Read it only, and drop it before asking for the next.

        Raises:
            UserError: it is stored in a type that is no plain floating-point number.
        """
        place = self._places[name]
        if place.dtype not in _DTYPES:
            raise UserError(f"{self.path}: {name!r} is stored as {place.dtype}, a floating-point type is needed.")
        return self._mapped(place)

    def _mapped(self, place: _Place) -> Tensor:
        page = place.start - place.start % mmap.ALLOCATIONGRANULARITY
        with open(place.file, "rb") as file:
            pages = mmap.mmap(file.fileno(), place.start - page + place.size, access=mmap.ACCESS_READ, offset=page)
        with warnings.catch_warnings():  # "the given buffer is not writable": that is what we want
            warnings.simplefilter("ignore", UserWarning)
            raw = torch.frombuffer(pages, dtype=torch.uint8, count=place.size, offset=place.start - page)
        return raw.view(_DTYPES[place.dtype]).view(place.shape)  # keeps the mapping alive, and unmaps when it dies


def _without_wrappers(name: str) -> str:
    """A tensor's name without the modules that only wrap the language model, whose order differs between formats."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model", "text_model"))


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: weights are read from .safetensors files and folders of them.")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file or folder.")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(f"{index}: not a valid index of shards ({type(e).__name__}: {e}).") from None
        if missing := [name for name in names if not (path / name).is_file()]:
            raise UserError(
                f"{path}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:5])}"
                f"{' ...' if len(missing) > 5 else ''}. Download the checkpoint again."
            )
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    single = path / "model.safetensors"
    if single in files:
        return [single]
    if not files:
        old = sorted(path.glob("pytorch_model*.bin"))
        hint = " Pickled .bin weights are not read; save the model again with save_pretrained." if old else ""
        raise UserError(f"{path}: there are no .safetensors weights in this folder.{hint}")
    for file in files:  # shards without their index: the numbering says how many there should be
        last = file.stem.rpartition("-of-")[2]
        if last != file.stem and last.isdigit() and int(last) != len(files):
            raise UserError(
                f"{path}: {len(files)} of {int(last)} shards are there, and no model.safetensors.index.json."
            )
    return files


def _read_header(file: Path) -> tuple[bytes, int, Any]:
    with open(file, "rb") as f:
        stat = file.stat()
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= min(stat.st_size - 8, 1 << 30):
            raise UserError(f"{file}: not a safetensors file, or cut short.")
        header = f.read(length)
    try:
        if not isinstance(json.loads(header), dict):
            raise ValueError("the header is not a table")
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not a safetensors file ({e}).") from None
    return header, 8 + length, stat


def _place(file: Path, name: str, info: dict[str, Any], data_start: int, file_size: int) -> _Place:
    try:
        start, end = (int(x) for x in info["data_offsets"])
        dtype, shape = str(info["dtype"]), tuple(int(x) for x in info["shape"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: the header entry of {name!r} is malformed.") from None
    if data_start + end > file_size:
        raise UserError(f"{file}: cut short, {name!r} lies beyond its end. Download the file again.")
    numbers = 1
    for side in shape:
        numbers *= side
    if start < 0 or (dtype in _BYTES and end - start != numbers * _BYTES[dtype]):
        raise UserError(f"{file}: the header entry of {name!r} contradicts itself.")
    return _Place(file, dtype, shape, data_start + start, end - start)
