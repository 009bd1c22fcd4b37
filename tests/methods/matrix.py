"""All parts by name, and a model small enough to try every combination."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from talklora_pl.adapter import Adapter, AdapterConfig, inject

EXPERTS = ["lora", "split_lora", "shared_b", "shared_a", "ffn_lora"]
COMMUNICATIONS: dict[str, dict[str, Any]] = {
    "none": {"name": "none"},
    "talking": {"name": "talking"},
    "attention": {"name": "attention", "heads": 2},
    "gnn": {"name": "gnn"},
    "gnn_ring": {"name": "gnn", "graph": "ring"},
    "gnn_random": {"name": "gnn", "graph": "random", "density": 0.5},
    "gnn_similarity": {"name": "gnn", "graph": "similarity"},
    "gnn_learned": {"name": "gnn", "graph": "learned"},
    "gnn_embeddings": {"name": "gnn", "nodes": "embeddings", "graph": "ring", "residual": False, "width": 6},
    "mlp_mixer": {"name": "mlp_mixer"},
}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"name": "softmax"},
    "softmax_hot": {"name": "softmax", "temperature": 2.0},
    "top_k": {"name": "top_k", "k": 2},
    "noisy_top_k": {"name": "noisy_top_k", "k": 2},
    "loss_free": {"name": "loss_free", "k": 2},
    "per_expert": {"name": "top_k", "k": 3, "scores": "per_expert"},
    "team": {"name": "team"},
}
# every expert, communication and router by name, and the further options with one kind of experts
MATRIX = [
    *itertools.product(
        EXPERTS,
        ["none", "talking", "attention", "gnn", "gnn_embeddings", "mlp_mixer"],
        ["softmax", "top_k", "noisy_top_k", "loss_free", "team"],
    ),
    *itertools.product(["lora"], COMMUNICATIONS, ["per_expert", "softmax_hot"]),
]
VOCABULARY, WIDTH, HIDDEN = 11, 8, 12


class Attention(nn.Module):
    """One head, causal; masked keys are not heard."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        # not in the order of definition, and the value first
        v, k, q = self.v_proj(hidden_states), self.k_proj(hidden_states), self.q_proj(hidden_states)
        S = q.shape[1]
        allowed = torch.ones(S, S, dtype=torch.bool).tril() & mask.bool().unsqueeze(1)
        allowed = allowed | torch.eye(S, dtype=torch.bool)
        return self.o_proj((q @ k.transpose(1, 2)).masked_fill(~allowed, -1e4).softmax(-1) @ v)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj, self.act_fn = nn.Linear(HIDDEN, WIDTH, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), FeedForward()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(hidden_states=x, mask=mask)
        return x + self.mlp(x)


class Tiny(nn.Module):
    """Two layers of attention and a gated feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().eval()


def config_of(
    experts: str, communication: str, router: str, per: str = "linear", E: int = 4, R: int = 2, **options: Any
) -> AdapterConfig:
    """These parts; whole-FFN experts on the blocks, others on a Linear of the attention and one of the block."""
    ffn = experts == "ffn_lora"
    return AdapterConfig.from_dict(
        {
            "targets": ["mlp"] if ffn else ["q_proj", "up_proj"],
            "num_experts": E,
            "expert_rank": R,
            "dropout_input": 0.0,
            "experts": experts,
            "communication": COMMUNICATIONS[communication],
            "router": {**ROUTERS[router], "per": per},
            **options,
        }
    )


def adapted(config: AdapterConfig, values: int | None = 1) -> tuple[Tiny, Adapter]:
    """The tiny model with an adapter whose tensors have random values (None: as initialised)."""
    model = tiny()
    adapter = inject(model, config)
    if values is not None:
        randomise(adapter, values)
    return model, adapter


def randomise(adapter: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
        for name, team in adapter.named_parameters():
            if name.endswith(".team"):  # M v must not come near 0
                team.copy_(torch.eye(len(team)) + 0.1 * team.abs())
        for name, b in adapter.named_buffers():
            if name.endswith(".bias"):
                b.copy_(torch.randn(b.shape, generator=generator) * 0.2)


def permute_experts(adapter: Adapter, order: Tensor) -> None:
    """Permute every expert-indexed tensor of an adapter."""
    E = len(order)
    both = {"C", "edges", "theta", "team"}
    first = {"A", "B", "core", "embedding", "X", "bias", "experts_out"}
    tensors = dict(adapter.named_parameters()) | dict(adapter.named_buffers())
    with torch.no_grad():
        for name, t in tensors.items():
            leaf = name.rsplit(".", 1)[-1]
            if leaf in both:
                t.copy_(t[order][:, order])
            elif leaf == "experts_in":
                t.copy_(t[:, order])
            elif leaf in ("weight", "noise"):
                if t.shape[0] == E:  # not the one row that all experts share
                    rows = t[order]
                    features = t.shape[1] % E == 0 and adapter.config.router.uses_features(True) and ".router." in name
                    communicates = not adapter.config.communication.identity
                    if features and adapter.config.router.uses_features(communicates):
                        rows = rows.view(E, E, -1)[:, order].flatten(1)
                    t.copy_(rows)
            elif leaf in first and not (leaf == "A" and t.dim() == 2):
                t.copy_(t[order])
