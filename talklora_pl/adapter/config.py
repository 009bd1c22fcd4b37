"""Options of an adapter: five parts by name, the layers they go to, and their size."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from talklora_pl import aliases, registry, typed
from talklora_pl.allocation import Allocation
from talklora_pl.allocation.rules import UniformAllocation
from talklora_pl.balance import Balance
from talklora_pl.communication import Communication
from talklora_pl.communication.identity import NoCommunication
from talklora_pl.communication.talking import Talking
from talklora_pl.errors import UserError
from talklora_pl.experts import Experts
from talklora_pl.experts.lora import LoRA
from talklora_pl.experts.shared_b import SharedB
from talklora_pl.routers import Router
from talklora_pl.routers.softmax import Softmax, Uniform

DEFAULT_RANK = 32
"""TalkLoRA's total rank; not the default of the option, which has to give way to expert_rank."""


@dataclass
class PlainLoRA:
    """Ordinary LoRA on further layers, beside the mixture (GraphLoRA and MixLoRA have it on the attention).

    Attributes:
        targets: as in :class:`AdapterConfig`.
        rank: r.
        alpha: scale is alpha / r.
    """

    targets: list[str] | str
    rank: int = 8
    alpha: float = 16.0


@dataclass
class AdapterConfig:
    """A mixture of low-rank experts on some layers of a frozen model. The defaults are TalkLoRA's.

    Attributes:
        targets: leaf names (``[q_proj, up_proj]``), a regular expression over whole module names, or ``all-linear``.
        exclude: leaf names or a regular expression of modules to leave alone.
        layers: decoder layers to adapt: ``0-15``, ``4-``, ``0,2,5-7`` or a list of numbers; all by default.
        num_experts: experts per layer, before allocation.
        expert_rank: R, rank of one expert.
        rank: total rank of a layer, instead of expert_rank: R = rank / num_experts. Without either it is 32.
        alpha: the experts' output is scaled by alpha / reference rank; the reference is the total rank for experts that
            split it and the expert's rank for others. By default equal to the reference (scale 1).
        dropout_input, dropout_routing, dropout_output: on the experts' input, the routing weights, the output.
        compat: ``published`` sets TalkLoRA's published dropouts, 0.05 in all three places.
        experts_see_talk: experts use the features after communication instead of their own.
        experts, communication, router, balance: the parts, by registry name.
        allocation: the rule by which layers get their number of experts; by default num_experts each.
        plain: ordinary LoRA on further layers.
        modules_to_save: modules of the base that are trained and saved along, by leaf or full name (a new head).
        dtype: of the trained tensors.
        init_from: LoRA folders of PEFT, on this base, that the experts begin as: one for each expert, or one for all.
            Modules, ranks and scale follow from them, and the mixture begins as their mean. It is not kept with the
            adapter.
        init_weights: of the folders in that mean; None: equal.
        init_noise: of the copies of a single folder, relative to the size of its A; None: 0.1.
    """

    targets: list[str] | str = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"])
    exclude: list[str] | str = field(default_factory=list)
    layers: list[int] | str | None = None
    num_experts: int = 4
    expert_rank: int | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout_input: float = 0.05
    dropout_routing: float = 0.0
    dropout_output: float = 0.0
    compat: Literal["none", "published"] = "none"
    experts_see_talk: bool = False
    experts: Experts = field(default_factory=SharedB)
    communication: Communication = field(default_factory=Talking)
    router: Router = field(default_factory=Softmax)
    balance: list[Balance] = field(default_factory=list)
    allocation: Allocation = field(default_factory=UniformAllocation)
    plain: PlainLoRA | None = None
    modules_to_save: list[str] = field(default_factory=list)
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    init_from: list[str] = field(default_factory=list)
    init_weights: list[float] | None = None
    init_noise: float | None = None

    def __post_init__(self) -> None:
        """Raises: UserError for an option of another type, a part that is no component among them."""
        if wrong := typed.problems(AdapterConfig, {f.name: getattr(self, f.name) for f in fields(AdapterConfig)}):
            named = any(isinstance(getattr(self, key), str) for key in FAMILIES)
            by_name = " Parts by name: talklora_pl.method, for instance." if named else ""
            raise UserError(f"adapter: {'; '.join(wrong)}.{by_name}")
        if self.compat == "published":
            self.dropout_input = self.dropout_routing = self.dropout_output = 0.05

    def problems(self) -> list[str]:
        """What is wrong with the options, one sentence each; empty if nothing."""
        out = []
        if self.num_experts < 1:
            out.append(f"num_experts must be at least 1, got {self.num_experts}")
        if self.rank is not None and self.expert_rank is not None:
            out.append(
                f"rank {self.rank} (of all experts together) and expert_rank {self.expert_rank} (of one) exclude each "
                "other: set one to null (of method files use a single one, they do not add up)"
            )
        elif self.expert_rank is None and self.num_experts >= 1 and (self.total < 1 or self.total % self.num_experts):
            out.append(
                f"rank {self.total} is not divisible by num_experts {self.num_experts}; use a multiple, or expert_rank"
            )
        elif self.expert_rank is not None and self.expert_rank < 1:
            out.append(f"expert_rank must be at least 1, got {self.expert_rank}")
        if self.alpha is not None and self.alpha <= 0:
            out.append(f"alpha must be above 0, got {self.alpha}")
        for key in ("dropout_input", "dropout_routing", "dropout_output"):
            if not 0 <= getattr(self, key) < 1:
                out.append(f"{key} must be in [0, 1), got {getattr(self, key)}")
        if not self.communication.identity and not (self.router.uses_features(True) or self.experts_see_talk):
            out.append(
                f"communication {self.communication.name!r} has no effect: router {self.router.name!r} reads only the "
                "layer input; set its scores to features or auto, or experts_see_talk to true, or communication to none"
            )
        if self.experts_see_talk and not self.communication.uses_features():
            out.append(
                f"experts_see_talk: this {self.communication.name!r} does not depend on the features of the "
                "experts, so they cannot use it; choose another communication, or set experts_see_talk to false"
            )
        if self.experts_see_talk and self.router.per == "block" and self.experts.site.in_blocks:
            out.append(
                "experts_see_talk needs router.per: linear; experts of one Linear cannot use the features of another's"
            )
        if self.init_weights is not None and len(self.init_weights) != len(self.init_from):
            out.append(
                f"init_weights has {len(self.init_weights)} numbers for {len(self.init_from)} folders of init_from"
            )
        if self.init_weights is not None and not all(map(math.isfinite, self.init_weights)):
            out.append(f"init_weights must be numbers, got {self.init_weights}")
        if self.init_noise is not None and len(self.init_from) != 1:
            out.append("init_noise is for the copies of a single folder of init_from; several are told apart already")
        if self.init_noise is not None and self.init_noise <= 0:
            out.append(f"init_noise must be above 0, got {self.init_noise}: equal experts would stay equal")
        if self.plain is not None and self.plain.rank < 1:
            out.append(f"plain.rank must be at least 1, got {self.plain.rank}")
        return out

    def validate(self) -> None:
        """Raises: UserError that lists every problem of the options."""
        if problems := self.problems():
            raise UserError("adapter: " + "; ".join(problems) + ".")

    def before_allocation(self) -> AdapterConfig:
        """The same with ``num_experts`` in every layer, to find mistakes before a rule reads weights."""
        if isinstance(self.allocation, UniformAllocation):
            return self
        router = self.router
        if isinstance(table := getattr(router, "k", None), dict):  # of the numbers of experts that the rule will give
            router = replace(router, k=min(table.values()))  # type: ignore[call-arg]
        return replace(self, allocation=UniformAllocation(), router=router)

    @property
    def total(self) -> int:
        """The rank of all experts together, where expert_rank does not say that of one."""
        return DEFAULT_RANK if self.rank is None else self.rank

    def rank_per_expert(self) -> int:
        """R."""
        return self.expert_rank if self.expert_rank is not None else self.total // self.num_experts

    def scale(self) -> float:
        """s = alpha / reference rank. Does not depend on the allocated number of experts."""
        reference = self.rank_per_expert() * (self.num_experts if self.experts.splits_rank else 1)
        return 1.0 if self.alpha is None else self.alpha / reference

    def uses_features(self) -> bool:
        """Whether anyone uses the features of the experts."""
        communicates = not self.communication.identity
        return self.communication.uses_features() and (self.router.uses_features(communicates) or self.experts_see_talk)

    def plain_config(self) -> AdapterConfig | None:
        """The plain LoRA beside the mixture as a configuration of its own: one expert, nothing to decide."""
        if self.plain is None:
            return None
        return AdapterConfig(
            targets=self.plain.targets,
            layers=self.layers,
            num_experts=1,
            expert_rank=self.plain.rank,
            alpha=self.plain.alpha,
            dropout_input=self.dropout_input,
            experts=LoRA(),
            communication=NoCommunication(),
            router=Uniform(),
            dtype=self.dtype,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: registry names and options only."""
        out: dict[str, Any] = {}
        for f in fields(self):
            if f.name in START:
                continue
            value = getattr(self, f.name)
            if isinstance(value, registry.Component):
                value = registry.to_dict(value)
            elif isinstance(value, PlainLoRA):
                value = asdict(value)
            elif f.name == "balance":
                value = [registry.to_dict(b) for b in value]
            out[f.name] = value
        if self.expert_rank is None:
            out["rank"] = self.total
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AdapterConfig:
        """Inverse of :meth:`to_dict`; imports nothing.

        Raises:
            UserError: an unknown key, component or option.
        """
        data = aliases.renamed(data)
        known = {f.name for f in fields(cls)} - START
        for key in data:
            if key not in known:
                raise UserError(f"adapter has no option {key!r}.{registry.did_you_mean(key, known)}")
        for key, family in FAMILIES.items():
            if key in data:
                data[key] = registry.from_dict(family, data[key])
        if isinstance(data.get("balance"), list):
            data["balance"] = [registry.from_dict(Balance, b) for b in data["balance"]]
        if isinstance(data.get("plain"), dict):
            if wrong := typed.problems(PlainLoRA, data["plain"]):
                raise UserError(f"adapter.plain: {'; '.join(wrong)}.")
            try:
                data["plain"] = PlainLoRA(**data["plain"])
            except TypeError as e:
                raise UserError(f"adapter.plain: {e}") from None
        if wrong := typed.problems(cls, data):
            raise UserError(f"adapter: {'; '.join(wrong)}.")
        config = cls(**data)
        config.validate()
        return config


START = {"init_from", "init_weights", "init_noise"}
"""Options of where an adapter begins, which say nothing of what it is: no file has them."""

FAMILIES: dict[str, type[registry.Component]] = {
    "experts": Experts,
    "communication": Communication,
    "router": Router,
    "allocation": Allocation,
}
