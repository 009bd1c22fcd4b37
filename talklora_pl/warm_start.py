"""The adapter that a new run begins from: its tensors and options, but no optimiser state and no counters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from talklora_pl.adapter import AdapterConfig
from talklora_pl.adapter.files import CONFIG, TENSORS, check_digest, open_tensors, short
from talklora_pl.adapter.fingerprint import agree, fingerprint
from talklora_pl.adapter.hub import local_folder
from talklora_pl.adapter.io import adapter_tensors, base_tensors
from talklora_pl.adapter.metadata import AdapterMetadata, read_metadata
from talklora_pl.adapter.peft_folder import CONFIG as PEFT_CONFIG
from talklora_pl.adapter.peft_folder import is_peft, read_peft
from talklora_pl.base import BaseModel
from talklora_pl.distributed.checkpoint import flatten, read_checkpoint
from talklora_pl.errors import UserError
from talklora_pl.export.run import tensors_of
from talklora_pl.paths import expand

SIZES = ("num_experts", "rank", "expert_rank", "alpha")
MODULES = ("targets", "exclude", "layers")
FREE = {"dropout_input", "dropout_routing", "dropout_output", "compat", *SIZES, *MODULES}
"""Options that may differ in themselves: dropouts, and those whose outcome is compared."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter that was trained before.

    Attributes:
        path: as the user named it.
        metadata: of the run that trained it.
        tensors: by their names in an adapter file.
    """

    path: str
    metadata: AdapterMetadata
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: str) -> SavedAdapter:
        """From an adapter folder, a checkpoint, a LoRA folder of PEFT, or a repository on the hub with one of the two.

        Raises:
            UserError: it is none of them, or damaged.
        """
        local = Path(expand(path))
        try:
            if local.is_file():
                saved = read_checkpoint(local)
                return cls(path, AdapterMetadata.from_dict(saved["talklora"], local), tensors_of(saved))
            folder = local_folder(path)
            if (folder / CONFIG).is_file():
                metadata = read_metadata(folder)
                with open_tensors(folder, TENSORS) as f:
                    check_digest(folder, metadata.tensors_sha256)
                    return cls(path, metadata, {k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118
            if is_peft(folder):
                return cls(path, *read_peft(folder))
        except UserError as e:
            raise UserError(f"model.adapter_path: {e}") from None
        found = sorted(str(p.parent) for p in folder.glob(f"**/{CONFIG}"))
        hint = f" Do you mean {' or '.join(found[:3])}?" if found else ""
        raise UserError(f"model.adapter_path: {path} holds no adapter: no {CONFIG}, no {PEFT_CONFIG} of PEFT.{hint}")

    def config(self) -> AdapterConfig:
        """Its options. No regular expression out of a file is ever run: then the modules are named in full.

        Raises:
            UserError: an unknown component or option.
        """
        try:
            config = self.metadata.config()
        except UserError as e:
            raise UserError(f"model.adapter_path: {self.path}: {short(e)}") from None
        patterns = [config.targets, config.exclude, config.plain.targets if config.plain else []]
        if any(isinstance(p, str) and p != "all-linear" for p in patterns):
            return self.metadata.exact_config(config)
        return config

    def check(self, model: nn.Module, config: AdapterConfig, base: BaseModel) -> None:
        """Is it the adapter that a run has?

        Args:
            model: the base, on the meta device too.
            config: the run's options.
            base: the run's.

        Raises:
            UserError: lists all differences.
        """
        lines = [f"  {line}" for line in self._differences(model, config, base)]
        if lines:
            raise UserError(
                f"model.adapter_path: the adapter in {self.path} and this run differ:\n"
                + "\n".join(lines)
                + "\nLeave out options of model.adapter to have the adapter's own, or give the values it has."
            )

    def _differences(self, model: nn.Module, config: AdapterConfig, base: BaseModel) -> Iterator[str]:
        info, own = self.metadata.base, self.metadata.config()
        about = {"model.base.task": (info.task, base.task), "model.base.num_labels": (info.num_labels, base.num_labels)}
        about["model_type of the base"] = (info.model_type, getattr(getattr(model, "config", None), "model_type", None))
        before, now = dict(flatten(_comparable(own))), dict(flatten(_comparable(config)))
        pairs = {k: (before.get(k), now.get(k)) for k in sorted(before.keys() | now.keys())}
        for key, (old, new) in [*((k, p) for k, p in about.items() if None not in p), *pairs.items()]:
            if old != new:
                yield f"{key}: {old!r} in the adapter, {new!r} in this run"
        plain = config.plain_config()
        for what, part, names in (
            ("model.adapter.targets", config, set(self.metadata.experts_per_layer)),
            ("model.adapter.plain.targets", plain, set(self.metadata.plain_layers)),
        ):
            try:
                here = set(_found(model, part, names)) if part else set()
            except UserError as e:
                yield str(e)
                continue
            for these, where in ((names - here, "the adapter"), (here - names, "this run")):
                if these:
                    yield f"{what}: {len(these)} modules only in {where}: {', '.join(map(short, sorted(these)[:2]))}"

    def check_base(self, model: nn.Module) -> None:
        """Raises: UserError if the base has other weights than the adapter was trained on. All processes call it."""
        want = self.metadata.base.fingerprint
        got = fingerprint(model, base_tensors(model), like=want)
        if want is not None and got is not None and not agree(want, got):
            raise UserError(
                f"model.adapter_path: the adapter in {self.path} was trained on other weights than those of this base, "
                f"namely on those of {short(self.metadata.base.name_or_path)}. Name that base."
            )

    def check_tensors(self, model: nn.Module) -> None:
        """Raises: UserError if tensors are missing, left over or of another shape; also for the meta device."""
        own = adapter_tensors(model)
        lines = []
        for key in sorted(own.keys() | self.tensors.keys()):
            got, want = self.tensors.get(key), own.get(key)
            if want is None:
                lines.append(f"  {short(key)} has no place in this run")
            elif got is None:
                lines.append(f"  {key} is missing")
            elif got.shape != want.shape:
                lines.append(f"  {key} has shape {list(got.shape)}, this run needs {list(want.shape)}")
        if lines:
            more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
            text = "\n".join(lines[:8]) + more
            raise UserError(f"model.adapter_path: the tensors of the adapter in {self.path} do not fit:\n{text}")

    @torch.no_grad()
    def load(self, model: nn.Module, device: torch.device) -> None:
        """Put its tensors into the adapter that ``model`` was given, and into what of the base is trained along.

        Args:
            device: for those of the base that are still on the meta device.
        """
        for key, own in adapter_tensors(model).items():
            if not own.is_meta:
                own.copy_(self.tensors[key])
                continue
            path, _, leaf = key.removeprefix("base.").rpartition(".")
            old = model.get_submodule(path)._parameters[leaf]
            assert old is not None
            new = self.tensors[key].to(device, old.dtype)
            model.get_submodule(path)._parameters[leaf] = nn.Parameter(new, old.requires_grad)


def _found(model: nn.Module, config: AdapterConfig, keep: set[str]) -> Iterable[str]:
    return config.experts.site.find(model, config.targets, config.exclude, config.layers, keep=keep)


def _comparable(config: AdapterConfig) -> dict[str, Any]:
    """Options by their outcome, under the keys that a user knows."""
    out = {f"model.adapter.{k}": v for k, v in config.to_dict().items() if k not in FREE and k != "plain"}
    out["model.adapter.modules_to_save"] = sorted(config.modules_to_save)
    out["model.adapter.num_experts"] = config.num_experts
    out["model.adapter: rank of one expert"] = config.rank_per_expert()
    out["model.adapter: scale (alpha / rank)"] = config.scale()
    if config.plain is not None:
        out |= {"model.adapter.plain.rank": config.plain.rank, "model.adapter.plain.alpha": float(config.plain.alpha)}
    return out
