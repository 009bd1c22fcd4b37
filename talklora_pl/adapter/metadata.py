"""What an adapter's files and a checkpoint hold beside tensors: which base, which options, how many experts where."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

import talklora_pl
from talklora_pl import aliases
from talklora_pl.adapter.config import AdapterConfig
from talklora_pl.adapter.files import (
    CONFIG,
    FILE_DIGESTS,
    FORMAT_VERSION,
    OWN_DIGEST,
    TENSORS,
    check_digests_beside,
    digest_of,
    digests_beside,
    read_json,
    short,
    write_json,
)
from talklora_pl.cache import sha256
from talklora_pl.durable import write_whole
from talklora_pl.errors import UserError

MAX_EXPERTS = 4096


@dataclass(frozen=True)
class BaseInfo:
    """The base model that an adapter belongs to.

    Attributes:
        name_or_path: hub name or folder, empty if unknown.
        revision: branch, tag or commit on the hub.
        model_type: as in the base's ``config.json``.
        class_name: of the model (``class`` in files, which Python does not allow here).
        task: a name of ``model.base.task``; None if the adapter was not trained by a run.
        num_labels: number of classes of a classifier, where the run chose one.
        quantization: how the frozen weights were stored in training, see :mod:`~talklora_pl.base.quantization`.
        fingerprint: of the frozen weights, see :mod:`~talklora_pl.adapter.fingerprint`.
    """

    name_or_path: str = ""
    revision: str | None = None
    model_type: str | None = None
    class_name: str = ""
    task: str | None = None
    num_labels: int | None = None
    quantization: str | None = None
    fingerprint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"class" if key == "class_name" else key: value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str | os.PathLike[str]) -> BaseInfo:
        """Inverse of :meth:`to_dict`. Entries of other versions are ignored, absent ones unknown.

        Raises:
            UserError: an entry of the wrong type; names it and ``where`` it is.
        """
        values: dict[str, Any] = {}
        for f in fields(cls):
            key = "class" if f.name == "class_name" else f.name
            value = data.get(key)
            if key == "num_labels":
                if value is not None and type(value) is not int:
                    raise UserError(f"{where}: base.{key} must be a whole number.")
            elif not isinstance(value, str | None):
                raise UserError(f"{where}: base.{key} must be text.")
            if value is not None:
                values[f.name] = value
        return cls(**values)


@dataclass(frozen=True)
class AdapterMetadata:
    """``talklora.json``, and the entry ``talklora`` of a checkpoint.

    Attributes:
        base: the base it belongs to.
        adapter: options as :meth:`AdapterConfig.to_dict` gives them: plain data, since the components that it names
            may not be registered where only the metadata are read.
        experts_per_layer: number of experts of every module with a mixture, by full name.
        plain_layers: modules with plain LoRA, by full name.
        version: of talklora_pl, which wrote it.
        tensors_sha256: digest of the file with the tensors; None in a checkpoint.
    """

    base: BaseInfo
    adapter: dict[str, Any]
    experts_per_layer: dict[str, int]
    plain_layers: list[str]
    version: str = talklora_pl.__version__
    tensors_sha256: str | None = None

    def method(self) -> dict[str, Any]:
        """How the base is adapted, as plain data to compare: tensors fit where these are equal.

        Raises:
            UserError: as :meth:`config`.
        """
        adapter = dict(self.adapter)
        if isinstance(router := adapter.get("router"), dict) and router.get("scores") == "auto":
            config: Any = self.config()
            adapter["router"] = router | {"scores": config.router.source(not config.communication.identity)}
        return {"adapter": adapter} | {key: getattr(self, key) for key in ("experts_per_layer", "plain_layers")}

    def config(self) -> AdapterConfig:
        """The options.

        Raises:
            UserError: an unknown component or option.
        """
        return AdapterConfig.from_dict(self.adapter)

    def exact_config(self, config: AdapterConfig) -> AdapterConfig:
        """``config`` with the adapted modules by their full names, as listed here, in place of patterns."""
        plain = None if config.plain is None else replace(config.plain, targets=self.plain_layers)
        return replace(config, targets=list(self.experts_per_layer), exclude=[], layers=None, plain=plain)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and for checkpoints."""
        out = {
            "format_version": FORMAT_VERSION,
            "talklora_pl": self.version,
            "base": self.base.to_dict(),
            **{key: getattr(self, key) for key in ("adapter", "experts_per_layer", "plain_layers")},
        }
        return out if self.tensors_sha256 is None else out | {"tensors_sha256": self.tensors_sha256}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str | os.PathLike[str]) -> AdapterMetadata:
        """Inverse of :meth:`to_dict`, for data of strangers; options get today's names.

        Args:
            where: the file, for messages.

        Raises:
            UserError: another format version, or entries that are missing or of the wrong type.
        """
        version = data.get("format_version")
        if version != FORMAT_VERSION or type(version) is not int:
            raise UserError(
                f"{where} has format version {short(version)}; this talklora_pl reads version {FORMAT_VERSION}. "
                "A newer talklora_pl may read it."
            )
        forms = {"adapter": dict, "experts_per_layer": dict, "base": dict, "plain_layers": list}
        for key, form in forms.items():
            if not isinstance(data.get(key), form):
                raise UserError(f"{where}: {key!r} is missing or of the wrong type.")
        for layer, count in data["experts_per_layer"].items():
            if type(count) is not int or not 1 <= count <= MAX_EXPERTS:
                raise UserError(
                    f"{where}: experts_per_layer[{short(layer)}] is {short(count)}, not a number of experts."
                )
        for layer in data["plain_layers"]:
            if not isinstance(layer, str) or layer in data["experts_per_layer"]:
                raise UserError(f"{where}: plain_layers: {short(layer)} is no further module name.")
        digest = data.get("tensors_sha256")
        if not isinstance(digest, str | None):
            raise UserError(f"{where}: 'tensors_sha256' is missing or of the wrong type.")
        return cls(
            base=BaseInfo.from_dict(data["base"], where),
            adapter=aliases.renamed(data["adapter"]),
            experts_per_layer=data["experts_per_layer"],
            plain_layers=data["plain_layers"],
            version=str(data.get("talklora_pl", "")),
            tensors_sha256=digest,
        )


def read_metadata(folder: str | os.PathLike[str]) -> AdapterMetadata:
    """``talklora.json`` of a folder, checked for form.

    Raises:
        UserError: no such file, not JSON, what :meth:`AdapterMetadata.from_dict` refuses, or a digest that differs.
    """
    path = Path(folder) / CONFIG
    data = read_json(path)
    metadata = AdapterMetadata.from_dict(data, path)
    if metadata.tensors_sha256 is None:
        raise UserError(f"{path}: 'tensors_sha256' is missing or of the wrong type.")
    if data.get(OWN_DIGEST, digest := digest_of(data)) != digest:
        raise UserError(
            f"{path} is damaged, or was changed: its digest is not that of what it says. If the change is yours, "
            f"delete its entry {OWN_DIGEST!r}."
        )
    if not isinstance(beside := data.get(FILE_DIGESTS, {}), dict):
        raise UserError(f"{path}: {FILE_DIGESTS!r} is of the wrong type.")
    check_digests_beside(Path(folder), beside)
    return metadata


def write_files(folder: Path, tensors: dict[str, Tensor], metadata: AdapterMetadata, beside: bool = False) -> None:
    """Write both files; each appears whole or not at all, and the digest tells a mixture of old and new ones.

    Args:
        beside: the other files that are in the folder belong to the adapter too, and get their digests.
    """
    ready = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TENSORS, lambda p: save_file(ready, p, {"format": "pt"}))
    data = replace(metadata, tensors_sha256=sha256(folder / TENSORS)).to_dict()
    if beside:
        data[FILE_DIGESTS] = digests_beside(folder)
    write_json(folder / CONFIG, data | {OWN_DIGEST: digest_of(data)})
