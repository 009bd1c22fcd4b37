"""Whole-FFN experts against a naive float64 reference: every expert a full feed-forward block of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, LlamaConfig, MixtralConfig, Phi3Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from talklora_pl import UserError
from talklora_pl.adapter import AdapterConfig, RoutingCollector, inject
from talklora_pl.communication.gnn import GNN
from talklora_pl.communication.identity import NoCommunication
from talklora_pl.communication.talking import Talking
from talklora_pl.experts.ffn_lora import FFNLoRA
from talklora_pl.memory.checkpointing import CAN_SELECT, selective_contexts
from talklora_pl.routers.softmax import Softmax
from talklora_pl.routers.top_k import TopK

D, H, E, R = 12, 20, 5, 3

METHODS: dict[str, dict[str, Any]] = {
    "graphlora": {
        "communication": GNN(nodes="embeddings", graph="similarity", density=0.3, residual=False, width=6),
        "router": TopK("per_expert", init="glorot"),
    },
    "mixlora": {"communication": NoCommunication(), "router": TopK("x", init="normal")},
    "dense": {"communication": NoCommunication(), "router": Softmax("x")},
    "talking": {"communication": Talking(), "router": TopK("features")},
    "sees_talk": {"communication": Talking(), "router": TopK("features"), "experts_see_talk": True},
}


class W1W3W2(nn.Module):
    """The same block under Mixtral's old names."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.w2, self.act_fn = nn.Linear(H, D, bias=False), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


def block(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=H, num_attention_heads=2, mlp_bias=True)).double()
    if kind == "phi3":
        return Phi3MLP(Phi3Config(hidden_size=D, intermediate_size=H, pad_token_id=0)).double()
    return W1W3W2().double()


def adapted(kind: str, method: str) -> tuple[nn.Module, Any]:
    model = nn.Module()
    model.mlp = block(kind)
    config = AdapterConfig(
        targets=["mlp"],
        num_experts=E,
        expert_rank=R,
        alpha=1.7 * R,
        dropout_input=0.0,
        dtype="float64",
        experts=FFNLoRA(),
        **METHODS[method],
    )
    adapter = inject(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.5)
    return model, adapter


def naive(mlp: Any, layer: Any, x_TD: Tensor, see_talk: bool, scale: float) -> Tensor:
    """sum_i w_i FFN_i(x), each FFN_i with merged weights of its own, for every token by itself."""
    if hasattr(mlp, "gate_up_proj"):
        W1, W3 = mlp.gate_up_proj.weight.chunk(2)
        b1 = b3 = b2 = None
        W2, act = mlp.down_proj.weight, mlp.activation_fn
    elif hasattr(mlp, "w1"):
        W1, W3, W2, act = mlp.w1.weight, mlp.w3.weight, mlp.w2.weight, mlp.act_fn
        b1 = b3 = b2 = None
    else:
        W1, W3, W2, act = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, mlp.act_fn
        b1, b3, b2 = mlp.gate_proj.bias, mlp.up_proj.bias, mlp.down_proj.bias
    e = layer.experts
    said = torch.stack(
        [torch.cat([x_TD @ e.gate.A[i].t(), x_TD @ e.up.A[i].t()], -1) for i in range(e.gate.A.shape[0])], 1
    )
    heard = layer.communication(said, x_TD)
    w_TE = layer.router(x_TD, heard).weights_TE
    rows = []
    for t, x in enumerate(x_TD):
        y = torch.zeros(W2.shape[0], dtype=x.dtype)
        for i in range(w_TE.shape[1]):
            if see_talk:
                h1, h3 = heard[t, i].chunk(2)
                g = nn.functional.linear(x, W1, b1) + scale * (h1 @ e.gate.B[i])
                u = nn.functional.linear(x, W3, b3) + scale * (h3 @ e.up.B[i])
            else:
                g = nn.functional.linear(x, W1 + scale * (e.gate.A[i].t() @ e.gate.B[i]).t(), b1)
                u = nn.functional.linear(x, W3 + scale * (e.up.A[i].t() @ e.up.B[i]).t(), b3)
            y = y + w_TE[t, i] * nn.functional.linear(act(g) * u, W2 + scale * (e.down.A[i].t() @ e.down.B[i]).t(), b2)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["llama", "phi3", "w1w3w2"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_naive_experts_forward_and_all_gradients(kind: str, method: str) -> None:
    model, adapter = adapted(kind, method)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 7, D, generator=generator, dtype=torch.float64).requires_grad_()
    cot = torch.randn(2, 7, D, generator=generator, dtype=torch.float64)
    with RoutingCollector(model) as collector:
        y = model.mlp(x)
    (y * cot).sum().backward()
    got = {n: p.grad.clone() for n, p in adapter.named_parameters()} | {"x": x.grad.clone()}

    x2 = x.detach().clone().requires_grad_()
    adapter.zero_grad(set_to_none=True)
    want_y = naive(model.mlp, adapter.layers.mlp, x2.flatten(0, 1), adapter.config.experts_see_talk, 1.7).view_as(x2)
    (want_y * cot).sum().backward()
    torch.testing.assert_close(y, want_y, rtol=1e-10, atol=1e-10)
    want = {n: p.grad for n, p in adapter.named_parameters()} | {"x": x2.grad}
    for name, value in got.items():
        torch.testing.assert_close(
            value, torch.zeros_like(value) if want[name] is None else want[name], rtol=1e-9, atol=1e-9
        )
    assert [r.layer for r in collector.records] == ["mlp"]


def test_untouched_experts_get_zero_gradients() -> None:
    model, adapter = adapted("llama", "mixlora")
    x = torch.randn(1, 1, D, dtype=torch.float64)
    model.mlp(x).sum().backward()
    with RoutingCollector(model) as collector:
        model.mlp(x)
    chosen = collector.records[0].routing.selected_TK
    assert chosen is not None
    for p in adapter.layers.mlp.experts.parameters():
        rest = [i for i in range(E) if i not in chosen]
        assert p.grad is not None and torch.all(p.grad[rest] == 0) and p.grad[chosen[0]].abs().max() > 0


def test_one_expert_is_lora_on_gate_up_and_down() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, D, dtype=torch.float64)
    model = nn.Module()
    model.mlp = block("llama")
    config = AdapterConfig(
        targets=["mlp"], num_experts=1, expert_rank=R, dtype="float64", experts=FFNLoRA(), **METHODS["mixlora"]
    )
    config.dropout_input = 0.0
    adapter = inject(model, config)
    torch.nn.init.normal_(adapter.layers.mlp.experts.gate.B)
    torch.nn.init.normal_(adapter.layers.mlp.experts.up.B)
    torch.nn.init.normal_(adapter.layers.mlp.experts.down.B)
    y = model.mlp(x)
    want = block("llama")
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            side = getattr(adapter.layers.mlp.experts, name)
            want.get_submodule(f"{name}_proj").weight += (side.A[0].t() @ side.B[0]).t()
    torch.testing.assert_close(y, want(x), rtol=1e-10, atol=1e-10)


def test_frozen_projections_run_once_whatever_k() -> None:
    model, _ = adapted("llama", "mixlora")
    calls = {"gate_proj": 0, "up_proj": 0, "down_proj": 0}
    for name in calls:
        model.mlp.get_submodule(name).register_forward_hook(lambda *_, n=name: calls.update({n: calls[n] + 1}))
    model.mlp(torch.randn(2, 3, D, dtype=torch.float64))
    assert calls == {"gate_proj": 1, "up_proj": 1, "down_proj": 1}


def test_bf16_base_agrees() -> None:
    model, adapter = adapted("llama", "dense")
    x = torch.randn(2, 7, D, dtype=torch.float64)
    want = model.mlp(x)
    adapter.float()
    model.mlp.to(torch.bfloat16)
    got = model.mlp(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() / want.abs().max() < 2e-2


def config_for(targets: Any) -> AdapterConfig:
    return AdapterConfig(targets=targets, num_experts=2, expert_rank=2, experts=FFNLoRA(), **METHODS["mixlora"])


def test_refusals_say_why() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16))
    with pytest.raises(UserError, match=r"GPT2MLP of c_fc, c_proj.*experts: lora"):
        inject(gpt2, config_for(["mlp"]))
    with pytest.raises(UserError, match="it has none"):
        inject(gpt2, config_for(["feed_forward"]))
    sizes: dict[str, int] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    mixtral = MixtralForCausalLM(
        MixtralConfig(hidden_size=16, intermediate_size=16, vocab_size=32, num_local_experts=2, **sizes)
    )
    with pytest.raises(UserError, match=r"the base itself, whose weights are fused tensors \(experts\).*plain LoRA"):
        inject(mixtral, config_for(["mlp"]))
    with pytest.raises(UserError, match=r"own mixture are fused tensors \('model.layers.0.mlp.experts'\).*plain: "):
        inject(mixtral, AdapterConfig(targets=["gate_proj", "up_proj"], rank=4))
    llama = nn.Module()
    llama.mlp = block("llama")
    with pytest.raises(UserError, match="called: mlp"):
        inject(llama, config_for(["ffn"]))
    with pytest.raises(UserError, match="name the block around it"):
        inject(llama, config_for(["gate_proj"]))


def test_a_block_that_computes_something_else_is_refused() -> None:
    class Doubled(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Module()
    model.mlp = Doubled(LlamaConfig(hidden_size=D, intermediate_size=H, num_attention_heads=2))
    with pytest.raises(UserError, match="does not compute"):
        inject(model, config_for(["mlp"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_experts_at_once_equal_one_by_one(K: int, dtype: torch.dtype) -> None:
    """Output and all gradients; R = 3 fits no 16 bytes, and an expert that nobody chose has a zero gradient."""
    torch.manual_seed(0)
    model = nn.Module()
    model.mlp = block("llama").to(dtype)
    parts: Any = {"experts": FFNLoRA(), "router": TopK(k=K)}
    config = AdapterConfig(targets=["mlp"], num_experts=E, expert_rank=R, alpha=2.0 * R, dropout_input=0.0, **parts)
    adapter = inject(model, config)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.5)
    layer: Any = adapter.layers.mlp
    x = torch.randn(2, 9, D, dtype=dtype)
    results = []
    for layer.grouped in (True, False):
        adapter.zero_grad(set_to_none=True)
        v = x.clone().requires_grad_()
        y = model.mlp(v)
        y.float().square().sum().backward()
        results.append({"y": y, "x": v.grad} | {n: p.grad for n, p in adapter.named_parameters()})
    for name, want in results[1].items():
        size = want.detach().abs().max().item()
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(results[0][name], want, rtol=0, atol=tolerance * size, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("outer", [None, "full", "selective"])
def test_hidden_states_that_are_computed_again(outer: str | None, dtype: torch.dtype) -> None:
    """Output and gradients are those of hidden states that are kept, with dropout, and in a checkpointed layer."""
    if outer == "selective" and not CAN_SELECT:
        pytest.skip("selective checkpointing needs torch 2.13")
    torch.manual_seed(0)
    model = nn.Module()
    model.mlp = block("llama").to(dtype)
    parts: Any = {"experts": FFNLoRA(), "router": TopK(k=2), "dtype": str(dtype).removeprefix("torch.")}
    adapter = inject(model, AdapterConfig(targets=["mlp"], num_experts=E, expert_rank=R, dropout_input=0.2, **parts))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.5)
    model.train()
    x = torch.randn(2, 9, D, dtype=dtype)
    contexts = {"context_fn": selective_contexts} if outer == "selective" else {}
    results = []
    for adapter.layers.mlp.recompute in (True, False):
        adapter.zero_grad(set_to_none=True)
        v = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = checkpoint(model.mlp, v, use_reentrant=False, **contexts) if outer else model.mlp(v)
        y.square().sum().backward()
        results.append({"y": y, "x": v.grad} | {n: p.grad for n, p in adapter.named_parameters()})
    for name, want in results[1].items():
        assert torch.equal(results[0][name], want), name


def test_nobody_chose_it_at_once() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.mlp = block("llama").float()
    config = AdapterConfig(
        targets=["mlp"], num_experts=E, expert_rank=R, dropout_input=0.0, experts=FFNLoRA(), router=TopK(k=1)
    )
    adapter = inject(model, config)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.5)
    model.mlp(torch.randn(1, 1, D)).sum().backward()
    untouched = (adapter.layers.mlp.experts.gate.B.grad == 0).flatten(1).all(1)
    assert untouched.sum() == E - 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
