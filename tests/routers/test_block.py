"""One decision per block: shared by its Linears, made from the block's own input, also when it is computed twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, OPTConfig

from talklora_pl import UserError
from talklora_pl.adapter import AdapterConfig, RoutingCollector, inject, remove_adapter
from talklora_pl.routers.softmax import Softmax
from tests.conftest import tiny_llama
from tests.methods.matrix import adapted, config_of
from tests.methods.test_matrix import IDS, MASK, run


def test_linears_share_one_recorded_decision_and_order_does_not_matter() -> None:
    """The toy attention calls v, k, q in this order; the decision is the one that q's experts lead to."""
    model, adapter = adapted(config_of("lora", "talking", "top_k", "block", targets=["q_proj", "v_proj", "o_proj"]))
    seen: dict[str, torch.Tensor] = {}
    for name in ("q_proj", "v_proj", "o_proj"):
        experts = adapter.layers.get_submodule(f"layers.0.attn.{name}").experts
        mix = experts.mix
        experts.mix = lambda h, w, n=name, f=mix: seen.update({n: w}) or f(h, w)
    _, records = run(model)
    assert [r.layer for r in records] == ["layers.0.attn", "layers.1.attn"]
    assert adapter.routed_layers() == {"layers.0.attn": 4, "layers.1.attn": 4}
    assert seen["q_proj"] is seen["v_proj"] is seen["o_proj"] is records[0].routing.weights_TE
    q = adapter.layers.layers.get_submodule("0.attn.q_proj").experts
    block = adapter.layers.layers.get_submodule("0.attn")
    x_TD = model.embed(IDS).flatten(0, 1)
    want = block.router(x_TD, block.communication(q.split(x_TD @ q.down().t()), x_TD))
    torch.testing.assert_close(records[0].routing.weights_TE, want.weights_TE)


def test_first_linear_alone_routes_as_it_would_by_itself() -> None:
    """With q as only target, block and linear routing are the same function; both start from the same values."""
    ys = []
    for per in ("linear", "block"):
        model, adapter = adapted(config_of("shared_b", "talking", "softmax", per, targets=["q_proj"]), values=None)
        torch.nn.init.normal_(
            next(p for n, p in adapter.named_parameters() if n.startswith("bank")),
            generator=torch.Generator().manual_seed(0),
        )
        ys.append(model(IDS, MASK))
    torch.testing.assert_close(ys[0], ys[1])


def test_all_tensors_are_registered_once() -> None:
    linear = adapted(config_of("lora", "talking", "softmax", "linear", targets=["q_proj", "k_proj", "o_proj"]))[1]
    block = adapted(config_of("lora", "talking", "softmax", "block", targets=["q_proj", "k_proj", "o_proj"]))[1]
    assert sum(".experts." in n for n, _ in block.named_parameters()) == 2 * 3 * 2
    decisions = [sum(p.numel() for n, p in a.named_parameters() if ".experts." not in n) for a in (linear, block)]
    assert decisions[0] == 3 * decisions[1]


@pytest.mark.parametrize(
    "communication, router", [("none", "softmax"), ("talking", "top_k"), ("mlp_mixer", "loss_free")]
)
def test_checkpointing_gives_the_same_gradients(communication: str, router: str) -> None:
    grads = []
    for again in (False, True):
        model, adapter = adapted(
            config_of("shared_b", communication, router, "block", targets=["q_proj", "v_proj", "up_proj", "down_proj"])
        )
        model.train()
        x = model.embed(IDS).detach().requires_grad_()
        with RoutingCollector(model) as collector:
            for layer in model.layers:
                x = checkpoint(layer, x, MASK, use_reentrant=False) if again else layer(x, MASK)
        assert len(collector.records) == 4
        (x.square().sum() + sum(r.routing.probs_TE.square().sum() for r in collector.records)).backward()
        grads.append({n: p.grad for n, p in adapter.named_parameters()})
    for name, g in grads[0].items():
        torch.testing.assert_close(grads[1][name], g)


def test_hugging_face_blocks() -> None:
    """Llama passes hidden states by keyword; OPT's feed-forward Linears lie directly in the decoder layer."""
    ids = torch.arange(12).reshape(2, 6)
    llama = tiny_llama()
    options: dict[str, Any] = {"num_experts": 4, "expert_rank": 2, "router": Softmax(per="block")}
    inject(llama, AdapterConfig(targets="all-linear", **options))
    with RoutingCollector(llama) as collector:
        llama(ids).logits.sum().backward()
    assert [r.layer.rsplit(".", 1)[-1] for r in collector.records] == ["self_attn", "mlp"] * 2
    opt = AutoModelForCausalLM.from_config(
        OPTConfig(
            vocab_size=64,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    )
    names = list(opt.state_dict())
    adapter = inject(opt, AdapterConfig(targets="all-linear", **options))
    with RoutingCollector(opt) as collector:
        opt(ids).logits.sum().backward()
    assert {r.layer for r in collector.records} == set(adapter.routed_layers())
    assert [n for n, p in adapter.named_parameters() if p.grad is None] == []
    remove_adapter(opt)
    assert list(opt.state_dict()) == names


def test_mistakes() -> None:
    with pytest.raises(UserError, match="takes the block's own input"):
        inject(
            tiny_llama(),
            AdapterConfig(
                targets=["down_proj"],
                rank=8,
                router=Softmax("x", per="block"),
                experts_see_talk=False,
                communication=config_of("lora", "none", "softmax").communication,
            ),
        )
    with pytest.raises(UserError, match="experts_see_talk needs"):
        AdapterConfig(rank=8, experts_see_talk=True, router=Softmax(per="block")).validate()
    counts = {
        "layers.0.attn.q_proj": 2,
        "layers.0.attn.k_proj": 3,
        "layers.1.attn.q_proj": 2,
        "layers.1.attn.k_proj": 2,
    }
    from tests.methods.matrix import tiny

    with pytest.raises(UserError, match="unequal numbers"):
        inject(tiny(), config_of("lora", "none", "softmax", "block", targets=["q_proj", "k_proj"]), allocation=counts)
