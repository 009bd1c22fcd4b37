"""Adapters that were trained alone become the experts of a mixture: at its start it is their mean.

E experts, R rank, D input width, O output width.

The router begins with 1/E for every expert and token, and an adapter's own scale and share are in its B: expert i is
(A_i, E share_i scale_i B_i). A smaller rank is filled up by rows of A as a new adapter has them and rows of zeros in B,
which change nothing and can learn. Of a single adapter every expert gets a copy whose A is moved by noise that sums to
zero over the experts, so that their mean is the adapter and yet no two are equal.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from talklora_pl.adapter.files import short
from talklora_pl.adapter.hub import local_folder
from talklora_pl.adapter.peft_folder import PeftLoRA, is_peft, read_lora
from talklora_pl.allocation.rules import UniformAllocation
from talklora_pl.base import portable
from talklora_pl.errors import UserError
from talklora_pl.experts.lora import PrivateExperts

if TYPE_CHECKING:
    from talklora_pl.adapter.config import AdapterConfig

KINDS = ("lora", "split_lora")
"""Experts with an A and a B of their own in every layer."""
NOISE = 0.1
"""Of the copies of a single adapter, relative to the size of its A, where nobody says."""


@dataclass(frozen=True)
class Upcycled:
    """Adapters that were read.

    Attributes:
        folders: as the user named them.
        adapters: one for each.
    """

    folders: list[str]
    adapters: list[PeftLoRA]

    @classmethod
    def read(cls, config: AdapterConfig) -> Upcycled:
        """The adapters of ``config.init_from``.

        Raises:
            UserError: lists what is wrong with every folder, and which options do not go with them.
        """
        problems, found = _problems(config), []
        for folder in config.init_from:
            try:
                found.append(_read(folder))
            except UserError as e:
                problems.append(str(e))
        if problems:
            raise UserError("model.adapter.init_from: " + "\n  ".join(problems))
        return cls(config.init_from, found)

    def config(self, config: AdapterConfig) -> AdapterConfig:
        """``config`` with the modules, the experts and their rank that follow from the adapters."""
        ranks = [len(A_RD) for lora in self.adapters for A_RD, _ in lora.pairs.values()]
        modules = sorted({name for lora in self.adapters for name in lora.pairs})
        several = len(self.adapters) > 1
        return replace(
            config,
            targets=modules,
            exclude=[],
            layers=None,
            num_experts=len(self.adapters) if several else config.num_experts,
            expert_rank=max(ranks),
            rank=None,
            alpha=None,
        )

    def describe(self, config: AdapterConfig) -> str:
        """What follows from the adapters, for the user."""
        each = ", ".join(f"{folder} (rank {_ranks(lora)})" for folder, lora in zip(self.folders, self.adapters))
        return (
            f"The experts begin as {each}: {config.num_experts} experts of rank {config.expert_rank} on "
            f"{len(config.targets)} modules, scale 1; targets, ranks and alpha of model.adapter do not count."
        )

    @torch.no_grad()
    def load(self, model: nn.Module, adapter: Any, config: AdapterConfig) -> None:
        """Put the adapters into an adapter (of ``inject``, which stands above this) that was built by :meth:`config`.

        Raises:
            UserError: a tensor does not fit its module, or a router has no even start.
        """
        lines = []
        for folder, lora in zip(self.folders, self.adapters):
            for name, (A_RD, B_RO) in lora.pairs.items():
                experts: Any = adapter.layers.get_submodule(name).experts
                if not isinstance(experts, PrivateExperts):
                    lines.append(f"{short(name)} holds experts of the base's own mixture, which take no such adapter")
                elif (A_RD.shape[1], B_RO.shape[1]) != (experts.A.shape[2], experts.B.shape[2]):
                    lines.append(
                        f"{folder}: {short(name)} is for {A_RD.shape[1]} inputs and {B_RO.shape[1]} outputs, the base "
                        f"has {experts.A.shape[2]} and {experts.B.shape[2]}"
                    )
        for module in adapter.layers.modules():
            router: Any = getattr(module, "router", None)
            if router is not None and (reason := router.start_even()) is not None:
                lines.append(f"router {config.router.name!r} {reason}")
        if lines := list(dict.fromkeys(lines)):
            more = f"\n  and {len(lines) - 8} more" if len(lines) > 8 else ""
            raise UserError("model.adapter.init_from: " + "\n  ".join(lines[:8]) + more)
        for name in adapter.experts_per_layer:
            if name not in adapter.plain_layers:
                self._fill(name, adapter.layers.get_submodule(name).experts, config)

    def _fill(self, name: str, experts: Any, config: AdapterConfig) -> None:
        E = config.num_experts
        sources = list(zip(self.adapters, config.init_weights or [1 / len(self.adapters)] * len(self.adapters)))
        if len(sources) == 1:
            sources = sources * E
            shares = [sources[0][1] / E] * E
        else:
            shares = [share for _, share in sources]
        noise_ERD = self._noise(name, experts.A, config) if len(self.adapters) == 1 and E > 1 else None
        for i, ((lora, _), share) in enumerate(zip(sources, shares)):
            if name not in lora.pairs:
                continue  # B is zero
            A_RD, B_RO = (t.to(experts.A.device) for t in lora.pairs[name])
            R = len(A_RD)
            experts.A[i, :R].copy_(A_RD)
            if noise_ERD is not None:
                size = A_RD.square().mean().sqrt()
                experts.A[i, :R].add_(size * noise_ERD[i, :R])
            experts.B[i, :R].copy_(E * share * lora.scales[name] * B_RO)

    @staticmethod
    def _noise(name: str, like_ERD: Tensor, config: AdapterConfig) -> Tensor:
        """Normal numbers whose sum over the experts is zero; they depend on the seed and the layer's name alone."""
        if like_ERD.is_meta:
            return torch.zeros_like(like_ERD)
        generator = torch.Generator().manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
        drawn_ERD = torch.randn(like_ERD.shape, generator=generator, device="cpu").to(like_ERD)
        return (NOISE if config.init_noise is None else config.init_noise) * (drawn_ERD - drawn_ERD.mean(0))


def say_what_is_taken(upcycled: Upcycled, config: AdapterConfig, base: str) -> None:
    """Once, at the start of a run."""
    rank_zero_info(upcycled.describe(config))
    for folder, lora in zip(upcycled.folders, upcycled.adapters):
        named = lora.options.get("base_model_name_or_path")
        if isinstance(named, str) and named and base and portable(named) != portable(base):
            rank_zero_warn(
                f"model.adapter.init_from: {folder} says that its base is {short(named)}, and this run's is {base}. "
                "If these are not the same weights, the adapter does not belong here."
            )


def _problems(config: AdapterConfig) -> list[str]:
    """Options that do not go with adapters to begin from."""
    out = []
    if twice := [name for name, n in Counter(config.init_from).items() if n > 1]:
        out.append(f"{twice[0]} is named twice: equal experts would stay equal.")
    if config.experts.name not in KINDS:
        out.append(
            f"experts {config.experts.name!r} share tensors or adapt whole blocks, and the adapters that are read have "
            "an A and a B of their own in every layer: set experts to lora."
        )
    if not isinstance(config.allocation, UniformAllocation):
        out.append(f"allocation {config.allocation.name!r}: every layer has all of the adapters; leave it out.")
    if config.experts_see_talk:
        out.append("experts_see_talk: the experts would not use their own features, so not be these adapters.")
    return out


def _read(folder: str) -> PeftLoRA:
    """A folder of PEFT, or the ``peft`` folder in an exported one."""
    here = local_folder(folder)
    place = next((p for p in (here, here / "peft") if is_peft(p)), None)
    if place is None:
        raise UserError(f"{folder} holds no LoRA of PEFT (no adapter_config.json).")
    lora = read_lora(place)
    if lora.saved:
        raise UserError(
            f"{folder} also has trained tensors of the base ({short(next(iter(lora.saved)))}), which cannot be mixed."
        )
    return lora


def _ranks(lora: PeftLoRA) -> str:
    found = sorted({len(A_RD) for A_RD, _ in lora.pairs.values()})
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
