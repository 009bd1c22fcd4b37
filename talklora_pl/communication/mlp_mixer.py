"""MLP-Mixer among the experts of a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from talklora_pl.communication import Communication, CommunicationModule
from talklora_pl.communication.arithmetic import ACTIVATIONS, Activation, Norm, normalise
from talklora_pl.internals.torch import across
from talklora_pl.registry import register
from talklora_pl.spec import LayerSpec


class _Mixed(torch.autograd.Function):
    """The mixer with RMS norms, GELU and residual as one node: sums are made in products, and no copy is turned over.

    norm(m) = sqrt(F) m / q with q = sqrt(|m|² + F eps). The rows m / q are written with the experts last, where both
    products over experts and their gradients are plain matrix products; sqrt(F) is a factor of these.

    H and G: hidden widths of the networks over experts and over features.
    """

    @staticmethod
    def forward(ctx: Any, m_TEF: Tensor, W1_HE: Tensor, W2_EH: Tensor, V1_GF: Tensor, V2_FG: Tensor) -> Tensor:
        T, E, width = m_TEF.shape
        root = width**0.5
        q_TE1 = _lengths(m_TEF)
        n_TFE = torch.div(m_TEF.mT, q_TE1.mT, out=m_TEF.new_empty(T, width, E))
        a_tH = _product(n_TFE.view(-1, E), W1_HE.t(), root)
        a_act_tH = F.gelu(a_tH)
        u_TEF = torch.baddbmm(m_TEF, W2_EH.expand(T, -1, -1), a_act_tH.view(T, width, -1).mT)
        p_TE1 = _lengths(u_TEF)
        n_tF = (u_TEF / p_TE1).view(-1, width)
        b_tG = _product(n_tF, V1_GF.t(), root)
        b_act_tG = F.gelu(b_tG)
        ctx.save_for_backward(
            *(m_TEF, q_TE1, n_TFE, a_tH, a_act_tH, u_TEF, p_TE1, n_tF, b_tG, b_act_tG), *(W1_HE, W2_EH, V1_GF, V2_FG)
        )
        return torch.addmm(u_TEF.view(-1, width), b_act_tG, V2_FG.t()).view_as(m_TEF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TEF: Tensor) -> tuple[Tensor, ...]:
        m_TEF, q_TE1, n_TFE, a_tH, a_act_tH, u_TEF, p_TE1, n_tF, b_tG, b_act_tG, *weights = ctx.saved_tensors
        W1_HE, W2_EH, V1_GF, V2_FG = weights
        T, E, width = m_TEF.shape
        root, gelu_backward = width**0.5, torch.ops.aten.gelu_backward
        dout_tF = dout_TEF.reshape(-1, width)

        dV2_FG = dout_tF.t() @ b_act_tG
        db_tG = gelu_backward(dout_tF @ V2_FG, b_tG)
        dV1_GF = _product(db_tG.t(), n_tF, root)
        dn_TEF = across(db_tG @ V1_GF, u_TEF.view(-1, width), p_TE1.view(-1, 1)).view_as(m_TEF)
        du_TFE = torch.addcdiv(
            dout_tF.view_as(m_TEF).mT, dn_TEF.mT, p_TE1.mT, value=root, out=m_TEF.new_empty(T, width, E)
        )

        du_tE = du_TFE.view(-1, E)
        dW2_EH = du_tE.t() @ a_act_tH
        da_tH = gelu_backward(du_tE @ W2_EH, a_tH)
        dW1_HE = _product(da_tH.t(), n_TFE.view(-1, E), root)
        dn_TEF = torch.bmm(W1_HE.t().expand(T, -1, -1), da_tH.view(T, width, -1).mT)
        dn_tF = across(dn_TEF.view(-1, width), m_TEF.view(-1, width), q_TE1.view(-1, 1))
        dm_TEF = torch.addcdiv(du_TFE.mT, dn_tF.view_as(m_TEF), q_TE1, value=root, out=m_TEF.new_empty(m_TEF.shape))
        return dm_TEF, dW1_HE, dW2_EH, dV1_GF, dV2_FG


def _lengths(v_TEF: Tensor) -> Tensor:
    """sqrt(|v|² + F eps), (T,E,1)."""
    eps = torch.tensor((v_TEF.shape[-1] * torch.finfo(v_TEF.dtype).eps) ** 0.5, dtype=v_TEF.dtype)
    lengths_TE1: Tensor = torch.linalg.vector_norm(v_TEF, dim=-1, keepdim=True).hypot(eps)
    return lengths_TE1


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)


class MLPMixerModule(CommunicationModule):
    """u = m + (W2 φ(W1 norm(m)ᵀ))ᵀ over experts, then m' = u + V2 φ(V1 norm(u)) over features.

    W1 (H,E), W2 (E,H) with H = expansion E; V1 (G,F), V2 (F,G) with G = expansion F; no biases.

    Attributes:
        as_one: on a CPU the usual options are computed as one node; off, one operation after the other.
    """

    as_one = True

    def __init__(self, layer: LayerSpec, features: int, options: MLPMixer) -> None:
        super().__init__(features)
        self.options = options
        self.activation = ACTIVATIONS[options.activation]
        E, F = layer.num_experts, features
        H, G = (max(1, round(options.expansion * width)) for width in (E, F))
        self.experts_in, self.experts_out = layer.uniform(H, E, fan_in=E), layer.uniform(E, H, fan_in=H)
        self.features_in, self.features_out = layer.uniform(G, F, fan_in=F), layer.uniform(F, G, fan_in=G)

    def forward(self, m_TEF: Tensor, x_TD: Tensor) -> Tensor:
        o = self.options
        # on a GPU the norm is one kernel already, and the compiler fuses by itself
        apart = m_TEF.device.type != "cpu" or torch.compiler.is_compiling()
        if self.as_one and not apart and (o.norm, o.activation, o.residual) == ("rms", "gelu", True):
            weights = self.experts_in, self.experts_out, self.features_in, self.features_out
            mixed_TEF: Tensor = _Mixed.apply(m_TEF.contiguous(), *weights)
            return mixed_TEF
        n_TFE = normalise(m_TEF, self.options.norm).transpose(1, 2)
        u_TEF = linear(self.activation(linear(n_TFE, self.experts_in)), self.experts_out).transpose(1, 2)
        if self.options.residual:
            u_TEF = m_TEF + u_TEF
        n_TEF = normalise(u_TEF, self.options.norm)
        v_TEF = linear(self.activation(linear(n_TEF, self.features_in)), self.features_out)
        return u_TEF + v_TEF if self.options.residual else v_TEF


@register("mlp_mixer")
@dataclass
class MLPMixer(Communication):
    """Mixing over the experts of a token, then over features (Tolstikhin et al., arXiv 2105.01601, equation 1).

    m_TEF -> m_TEF: u = m + (W2 φ(W1 norm(m)ᵀ))ᵀ, m' = u + V2 φ(V1 norm(u)).

    Attributes:
        expansion: hidden width of both networks over their input width.
        activation: φ.
        residual: add the result to the features; else replace them.
        norm: before each network, over features, without trained scale: ``none``, ``layer`` or ``rms``.
    """

    expansion: float = 2.0
    activation: Activation = "gelu"
    residual: bool = True
    norm: Norm = "rms"

    def __post_init__(self) -> None:
        if not self.expansion > 0:
            raise ValueError(f"expansion must be > 0, got {self.expansion}")

    def build(self, layer: LayerSpec, features: int) -> CommunicationModule:
        return MLPMixerModule(layer, features, self)
