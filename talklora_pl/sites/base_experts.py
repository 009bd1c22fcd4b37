"""Plain LoRA on the experts of the base's own mixture, whose weights are fused into three-dimensional tensors.

T tokens, S (token, expert) pairs, t those of one expert, D input and output width, H hidden width, G = 2H of gate and
up (H where there is no gate), E experts of the base, K chosen per token, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talklora_pl.errors import UserError
from talklora_pl.internals.transformers import gate
from talklora_pl.names import in_base
from talklora_pl.sites import LowRank
from talklora_pl.sites.dropped import plain_drop
from talklora_pl.sites.grouped import Pairs, can_group
from talklora_pl.sites.mixture import Mixture
from talklora_pl.spec import Bank, LayerOptions, LayerSpec


def is_mixture(module: nn.Module) -> bool:
    """Whether the module itself holds the weights of several experts of the base."""
    stacked = any(p.dim() >= 2 for p in module.parameters(recurse=False))
    return stacked and "Expert" in type(module).__name__ and not isinstance(module, nn.Linear)


def base_mixtures(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` for which :func:`is_mixture` holds, by name."""
    return {n: m for n, m in model.named_modules() if in_base(n) and is_mixture(m)}


def why_not(module: Any) -> str | None:
    """Why :class:`AdaptedExperts` cannot adapt a module for which :func:`is_mixture` holds; None if it can."""
    if not all(hasattr(module, flag) for flag in ("has_gate", "is_transposed", "has_bias", "num_experts")):
        return f"a {type(module).__name__} is not written for transformers' common interface of experts"
    for name in parts(module):
        weight = getattr(module, name, None)
        if type(weight) is not nn.Parameter or weight.dim() != 3 or not weight.is_floating_point():
            return f"its {name} is no plain floating-point tensor (quantised?)"
        if weight.element_size() < 2:
            return f"its {name} is stored in 8 bits"
    return None


def parts(module: Any) -> tuple[str, str]:
    """Names of the parameters of the first and of the second projection."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def part_widths(module: Any, part: str) -> tuple[int, int]:
    """(in, out) of one expert's projection."""
    rows, columns = getattr(module, part).shape[1:]
    return (rows, columns) if module.is_transposed else (columns, rows)


class AdaptedExperts(Mixture):
    """Each expert e of the base computes with W_e + s B_e A_e, in both of its projections.

    Every expert works on the tokens that the base's router sends to it, all in one grouped product where there is one;
    no matrix W_e + s B_e A_e is made. An expert that got no token has a zero gradient.

    Attributes:
        grouped: the experts work at once where the dtype allows; off, one after the other.

    Raises:
        UserError: the adapter's experts are more than plain LoRA.
    """

    grouped = True

    def __init__(self, layer: LayerSpec, config: LayerOptions, bank: Bank, frozen: Any) -> None:
        super().__init__(layer, config)
        if config.experts.name != "lora" or config.num_experts > 1 or layer.num_experts > 1:
            raise UserError(
                f"targets: {layer.name!r} holds the experts of this base's own mixture, and they take plain LoRA only: "
                f"what its router has sent to one of them is not routed again (experts {config.experts.name!r}, "
                f"num_experts {config.num_experts}, router {config.router.name!r}). Give them plain LoRA beside this "
                "method (plain: {targets: [experts], rank: 8}), or use --config method/lora."
            )
        self.scale = config.scale()
        self.dropout_input = config.dropout_input
        self.dropout_output = config.dropout_output
        for part in parts(frozen):
            D, O = part_widths(frozen, part)
            spec = replace(layer, num_experts=frozen.num_experts, in_features=D, out_features=O)
            self.add_module(part, config.experts.build(spec, bank))

    def forward(self, frozen: Any, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Output (T, D) of the base's experts for the tokens x, the chosen experts and their weights."""
        if self.grouped and can_group(x_TD.dtype):
            return self._grouped(frozen, x_TD, index_TK, weights_TK)
        return self._one_by_one(frozen, x_TD, index_TK, weights_TK)

    def _one_by_one(self, frozen: Any, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        T, K = index_TK.shape
        expert_S, order_S = index_TK.reshape(-1).sort(stable=True)
        # a number past the last expert marks a pair that another process computes; they are last
        counts_E: list[int] = torch.bincount(expert_S, minlength=frozen.num_experts)[: frozen.num_experts].tolist()
        order_S = order_S[: sum(counts_E)]
        first, second = parts(frozen)
        h_SG = self._project(frozen, first, x_TD[order_S // K], counts_E)
        y_SD = self._project(frozen, second, self._activation(frozen, h_SG), counts_E)
        y_SD = self._weighed(frozen, y_SD, weights_TK.reshape(-1)[order_S])
        pairs_SD = y_SD.new_zeros(T * K, y_SD.shape[-1]).index_copy(0, order_S, y_SD)
        return pairs_SD.view(T, K, -1).sum(1).to(x_TD.dtype)

    def _grouped(self, frozen: Any, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The same for all experts at once, without a question to the device how many tokens each has."""
        pairs, (first, second) = Pairs(index_TK, frozen.num_experts), parts(frozen)
        # zero before and after, so that neither values nor gradients of pairs that are not here count
        x_SD = torch.where(pairs.here_S1, pairs.of_tokens(x_TD), 0)
        h_SG = self._project_grouped(frozen, first, x_SD, pairs)
        z_SH = self._activation(frozen, torch.where(pairs.here_S1, h_SG, 0))
        y_SD = torch.where(pairs.here_S1, self._project_grouped(frozen, second, z_SH, pairs), 0)
        y_SD = self._weighed(frozen, y_SD, weights_TK.reshape(-1).index_select(0, pairs.order_S))
        return pairs.sum_over_experts(y_SD).to(x_TD.dtype)

    def _activation(self, frozen: Any, h_SG: Tensor) -> Tensor:
        z_SH: Tensor = gate(frozen, h_SG) if frozen.has_gate else frozen.act_fn(h_SG)
        return z_SH

    def _weighed(self, frozen: Any, y_SD: Tensor, weights_S: Tensor) -> Tensor:
        if frozen.has_post_expert_norm:
            y_SD = frozen.post_expert_norm(y_SD)
        return y_SD * weights_S.unsqueeze(-1)

    def _project(self, frozen: Any, part: str, x_SD: Tensor, counts_E: Sequence[int]) -> Tensor:
        """(W_e + s B_e A_e) x + b_e, the pairs in the order of their experts."""
        lora: Any = self.get_submodule(part)
        W_EOD, b_EO = getattr(frozen, part), getattr(frozen, f"{part}_bias") if frozen.has_bias else None
        # unbound once: an index per expert would give each a gradient of the whole stack
        A_ERD, B_ERO = lora.A.unbind(), lora.B.unbind()
        out = []
        for e, x_tD in enumerate(x_SD.split(list(counts_E))):
            if counts_E[e] == 0:
                continue
            W_OD = W_EOD[e].t() if frozen.is_transposed else W_EOD[e]
            y_tO = F.linear(x_tD, W_OD, None if b_EO is None else b_EO[e])
            r_tR = F.linear(self._drop(x_tD, self.dropout_input), A_ERD[e].to(x_tD.dtype)).to(y_tO.dtype)
            delta_tO = self._drop(r_tR @ B_ERO[e].to(y_tO.dtype), self.dropout_output)
            out.append(torch.add(y_tO, delta_tO, alpha=self.scale))
        return torch.cat(out)

    def _project_grouped(self, frozen: Any, part: str, x_SD: Tensor, pairs: Pairs) -> Tensor:
        """What :meth:`_project` computes."""
        lora: Any = self.get_submodule(part)
        W_EXX = getattr(frozen, part)
        y_SO = pairs.frozen_product(x_SD, W_EXX if frozen.is_transposed else W_EXX.mT)
        if frozen.has_bias:
            b_EO = getattr(frozen, f"{part}_bias")
            y_SO = y_SO + b_EO.index_select(0, pairs.expert_S.clamp(max=len(b_EO) - 1))
        r_SR = pairs.product(self._drop(x_SD, self.dropout_input), lora.A.to(x_SD.dtype).mT)
        delta_SO = self._drop(pairs.product(r_SR, lora.B.to(r_SR.dtype)), self.dropout_output)
        return torch.add(y_SO, delta_SO, alpha=self.scale)

    def _drop(self, v: Tensor, p: float) -> Tensor:
        return plain_drop(v, p) if self.training and p > 0 else v

    def low_rank(self, name: str) -> dict[str, LowRank]:
        """What is added to the experts' parameters, by the parameters' names."""
        loras: dict[str, Any] = dict(self.named_children())
        return {f"{name}.{part}": LowRank(lora.A, self.scale * lora.B) for part, lora in loras.items()}
