"""Message passing among experts, on a graph of experts.

T tokens, D input width, E experts, N nodes (E, or E + 1 with the token's), F features of an expert, G graph width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from talklora_pl.communication import Communication, CommunicationModule, graphs
from talklora_pl.communication.arithmetic import ACTIVATIONS, Activation
from talklora_pl.kept import Kept
from talklora_pl.registry import register
from talklora_pl.spec import LayerSpec


def propagation(a_NN: Tensor) -> Tensor:
    """S = D^-1/2 (A + I) D^-1/2, with D the row sums of A + I (Kipf and Welling, arXiv 1609.02907)."""
    a_NN = a_NN + torch.eye(a_NN.shape[-1], device=a_NN.device, dtype=a_NN.dtype)
    d_N = a_NN.sum(-1).rsqrt()
    return d_N.unsqueeze(-1) * a_NN * d_N.unsqueeze(-2)


class GraphModule(CommunicationModule):
    """Z <- [Z +] φ(S Z W_kᵀ), k = 1..rounds, on fixed, learned or similarity edges among the experts.

    Children choose the edges (:meth:`set_graph`) once they have drawn what these may depend on.
    """

    edges: Tensor

    def __init__(self, layer: LayerSpec, width: int, options: GNN) -> None:
        super().__init__(width)
        self.options = options
        self.activation = ACTIVATIONS[options.activation]
        self._fixed: Kept[Tensor] = Kept()
        self.rounds = nn.ParameterList([layer.glorot(width, width) for _ in range(options.rounds)])

    def set_graph(self, layer: LayerSpec, nodes_EF: Tensor | None) -> None:
        """Choose the edges. ``nodes_EF``: features of the experts, where they are known before any token."""
        o, E = self.options, layer.num_experts
        if o.graph == "learned":
            self.theta = layer.zeros(E, E)
            return
        if o.graph == "similarity" and nodes_EF is None:
            return  # every token has its own
        if o.graph == "similarity":
            assert nodes_EF is not None
            make = graphs.similar_published if o.compat == "published" else graphs.similar
            # without values (meta device) there are no similarities, only shapes
            a_EE = torch.zeros(E, E) if nodes_EF.is_meta else make(nodes_EF, o.density)
        elif o.graph == "random":
            a_EE = graphs.random(E, o.density)
        else:
            a_EE = graphs.ring(E) if o.graph == "ring" else graphs.complete(E)
        self.register_buffer("edges", a_EE.to(torch.uint8).to(layer.device))

    def adjacency(self, m_TEF: Tensor) -> Tensor:
        """A_EE, or A_TEE where every token has its own; zero diagonal. In the dtype of ``m_TEF``."""
        if self.options.graph == "learned":
            weight_EE = ((self.theta + self.theta.t()) / 2).sigmoid()
            return weight_EE * (1 - torch.eye(len(weight_EE), device=weight_EE.device, dtype=weight_EE.dtype))
        if hasattr(self, "edges"):
            return self.edges.to(m_TEF.dtype)
        return graphs.strongest(graphs.cosines(m_TEF), self.options.density)

    def graph(self, m_TEF: Tensor) -> Tensor:
        """A_NN of all nodes, or A_TNN."""
        return self.adjacency(m_TEF)

    def propagation(self, m_TEF: Tensor) -> Tensor:
        """S_NN or S_TNN; of fixed edges it is computed once."""
        if not hasattr(self, "edges") or torch.compiler.is_compiling():
            return propagation(self.graph(m_TEF))
        return self._fixed.get([self.edges], lambda: propagation(self.graph(m_TEF)), m_TEF.dtype)

    def pass_messages(self, z_TNG: Tensor, s_NN: Tensor) -> Tensor:
        """The rounds, for S of the graph, one or one per token."""
        s_TNN = s_NN.expand(len(z_TNG), -1, -1)  # as a batch: a matrix would be multiplied with a transposed copy of z
        for W_GG in self.rounds:
            update_TNG = self.activation(linear(torch.bmm(s_TNN, z_TNG), W_GG))
            z_TNG = z_TNG + update_TNG if self.options.residual else update_TNG
        return z_TNG

    def matrix(self, m_TEF: Tensor | None = None) -> Tensor | None:
        if self.options.graph == "similarity" and not hasattr(self, "edges"):
            return None if m_TEF is None else propagation(self.adjacency(m_TEF)).mean(0)
        return propagation(self.adjacency(self.rounds[0])).detach()


class ExpertGraphModule(GraphModule):
    """Nodes are the features of the experts of a token."""

    def __init__(self, layer: LayerSpec, features: int, options: GNN) -> None:
        super().__init__(layer, features, options)
        self.set_graph(layer, None)

    def forward(self, m_TEF: Tensor, x_TD: Tensor) -> Tensor:
        return self.pass_messages(m_TEF, self.propagation(m_TEF))


class EmbeddedGraphModule(GraphModule):
    """GraphLoRA's graph: expert nodes φ(W_s X_i) with fixed X (E,D), and a token node φ(W_x x) joined to all."""

    X: Tensor

    def __init__(self, layer: LayerSpec, width: int, options: GNN) -> None:
        super().__init__(layer, width, options)
        D = layer.in_features
        self.register_buffer("X", layer.glorot(layer.num_experts, D).detach())
        self.W_s = layer.glorot(width, D)
        self.W_x = layer.glorot(width, D, gain=100.0 if options.compat == "published" else options.token_gain)
        self.set_graph(layer, self.activation(linear(self.X, self.W_s.detach())))

    def forward(self, m_TEF: Tensor, x_TD: Tensor) -> Tensor:
        z_EG = self.activation(linear(self.X.to(self.W_s.dtype), self.W_s))
        z_TG = self.activation(linear(x_TD.to(self.W_x.dtype), self.W_x))
        T, E = z_TG.shape[0], z_EG.shape[0]
        z_TNG = torch.cat([z_EG.expand(T, -1, -1), z_TG.unsqueeze(1)], dim=1)
        return self.pass_messages(z_TNG, self.propagation(z_TNG[:, :E]))[:, :E]

    def graph(self, m_TEF: Tensor) -> Tensor:
        # the token's node is the last one, joined to every expert
        a_NN = nn.functional.pad(self.adjacency(m_TEF), (0, 1, 0, 1), value=1.0)
        return a_NN * (1 - torch.eye(a_NN.shape[-1], device=a_NN.device, dtype=a_NN.dtype))


@register("gnn")
@dataclass
class GNN(Communication):
    """Graph convolution among experts: Z <- Z + φ(S Z W_kᵀ), S = D^-1/2 (A + I) D^-1/2.

    m_TEF -> m_TEG. Rounds as in Kipf and Welling, arXiv 1609.02907; with ``nodes: embeddings``, ``residual: false`` and
    a ``per_expert`` router it is GraphLoRA's graph router (GMoE, arXiv 2412.16216, equations 3 and 4).

    Attributes:
        nodes: ``experts``: Z starts as the experts' features for this token, G = F; ``embeddings``: as φ(W_s X_i) with
            fixed random X, plus a node φ(W_x x) for the token, joined to every expert; G = width.
        graph: edges among experts: ``complete``; ``ring``; ``random``, a share ``density`` of the pairs;
            ``similarity``, that share of pairs with the largest |cos|, of the embeddings once and for all, or of the
            experts' features for each token (then |cos| is the edge's weight); ``learned``, every pair with a trained
            weight sigmoid((θ_ij + θ_ji) / 2). Edges that are fixed are saved with the adapter.
        density: edges over pairs of experts, in [0, 1].
        rounds: number of W_k.
        residual: keep what a node had; without it a complete graph makes all experts alike.
        activation: φ.
        width: G with embeddings, 128 by default; must stay unset with ``nodes: experts``.
        token_gain: of W_x's Glorot initialisation; the published 100 drowns the experts' nodes in the token's.
        compat: ``published``: gain 100, and ``density`` of a similarity graph counts the diagonal, as the released code
            does.
    """

    nodes: Literal["experts", "embeddings"] = "experts"
    graph: Literal["complete", "ring", "random", "similarity", "learned"] = "complete"
    density: float = 0.5
    rounds: int = 2
    residual: bool = True
    activation: Activation = "silu"
    width: int | None = None
    token_gain: float = 1.0
    compat: Literal["none", "published"] = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise ValueError(f"density must be in [0, 1], got {self.density}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.width is not None and (self.width < 1 or self.nodes == "experts"):
            raise ValueError(f"width {self.width} needs nodes: embeddings, and must be at least 1")

    def uses_features(self) -> bool:
        return self.nodes == "experts"

    def build(self, layer: LayerSpec, features: int) -> CommunicationModule:
        if self.nodes == "embeddings":
            return EmbeddedGraphModule(layer, self.width or 128, self)
        return ExpertGraphModule(layer, features, self)
