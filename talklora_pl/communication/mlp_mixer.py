"""MLP-Mixer among the experts of a token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from talklora_pl.communication import Communication, CommunicationModule
from talklora_pl.communication.arithmetic import ACTIVATIONS, Activation, Norm, normalise
from talklora_pl.registry import register
from talklora_pl.spec import LayerSpec


class MLPMixerModule(CommunicationModule):
    """u = m + (W2 φ(W1 norm(m)ᵀ))ᵀ over experts, then m' = u + V2 φ(V1 norm(u)) over features.

    W1 (H,E), W2 (E,H) with H = expansion E; V1 (G,F), V2 (F,G) with G = expansion F; no biases.
    """

    def __init__(self, layer: LayerSpec, features: int, options: MLPMixer) -> None:
        super().__init__(features)
        self.options = options
        self.activation = ACTIVATIONS[options.activation]
        E, F = layer.num_experts, features
        H, G = (max(1, round(options.expansion * width)) for width in (E, F))
        self.experts_in, self.experts_out = layer.uniform(H, E, fan_in=E), layer.uniform(E, H, fan_in=H)
        self.features_in, self.features_out = layer.uniform(G, F, fan_in=F), layer.uniform(F, G, fan_in=G)

    def forward(self, m_TEF: Tensor, x_TD: Tensor) -> Tensor:
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
