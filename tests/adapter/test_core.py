"""Properties of the adapter core: what must hold for any method, on TalkLoRA and its two controls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from talklora_pl import UserError
from talklora_pl.adapter import AdapterConfig, RoutingCollector, disable_adapter, inject, remove_adapter
from talklora_pl.adapter.host import Adapted
from talklora_pl.communication.identity import NoCommunication
from talklora_pl.communication.talking import Talking
from talklora_pl.experts.lora import LoRA, SplitLoRA
from talklora_pl.routers.softmax import Softmax, Uniform
from talklora_pl.sites.targets import find_targets
from tests.conftest import LLAMA3_8B, tiny_llama

METHODS: dict[str, dict[str, Any]] = {
    "talklora": {},
    "moelora": {"experts": SplitLoRA(), "communication": NoCommunication(), "router": Softmax("x")},
    "lora": {"num_experts": 1, "experts": LoRA(), "communication": NoCommunication(), "router": Uniform()},
}
IDS = torch.arange(2 * 6).reshape(2, 6) * 5 % 64


def randomise(adapter: torch.nn.Module) -> None:
    """Give every tensor a value, so that every term contributes (B starts at zero)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("method", METHODS)
def test_fresh_adapter_is_the_base(method: str) -> None:
    model = tiny_llama()
    base = model(IDS).logits
    inject(model, AdapterConfig(rank=8, **METHODS[method]))
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("method", METHODS)
def test_disable_and_remove_restore_the_base(method: str) -> None:
    model = tiny_llama()
    names, base = list(model.state_dict()), model(IDS).logits
    adapter = inject(model, AdapterConfig(rank=8, **METHODS[method]))
    randomise(adapter)
    changed = model(IDS).logits
    assert (changed - base).abs().max() > 1e-3
    with disable_adapter(model):
        assert torch.equal(model(IDS).logits, base)
    assert torch.equal(model(IDS).logits, changed)
    remove_adapter(model)
    assert list(model.state_dict()) == names
    assert not any(isinstance(m, Adapted) for m in model.modules())
    assert torch.equal(model(IDS).logits, base)


def test_one_expert_is_lora_with_the_core_folded_in() -> None:
    """y = W x + s B (C A) x for n = 1, whatever the router."""
    model = tiny_llama()
    adapter = inject(model, AdapterConfig(num_experts=1, rank=4, alpha=8.0))
    randomise(adapter)
    linear = model.model.layers[1].mlp.up_proj
    layer = adapter.layers.get_submodule("model.layers.1.mlp.up_proj")
    x = torch.randn(2, 3, 32)
    delta = 2.0 * layer.experts.up().t() @ layer.experts.core[0] @ layer.experts.A[0]
    torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, linear.weight + delta))


def test_talking_with_identity_equals_none() -> None:
    outs = []
    for communication in (Talking(init="identity"), NoCommunication()):
        model = tiny_llama()
        config = AdapterConfig(rank=8, communication=communication, router=Softmax(scores="features"))
        adapter = inject(model, config)
        with torch.no_grad():
            for b in adapter.bank.parameters():
                b.copy_(torch.sin(torch.arange(b.numel(), dtype=b.dtype)).view_as(b))
        outs.append(model(IDS).logits)
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("method", ["talklora", "moelora"])
def test_weights_sum_to_one_and_records_name_their_layer(method: str) -> None:
    model = tiny_llama()
    adapter = inject(model, AdapterConfig(rank=8, **METHODS[method]))
    randomise(adapter)
    with RoutingCollector(model) as collector:
        model(IDS)
    assert [r.layer for r in collector.records] == [n for n in adapter.experts_per_layer]
    for r in collector.records:
        torch.testing.assert_close(r.routing.weights_TE.sum(-1), torch.ones(12))
    model(IDS)
    assert len(collector.records) == 10


@pytest.mark.parametrize("method", METHODS)
def test_pads_and_batch_order_change_nothing(method: str) -> None:
    model = tiny_llama()
    randomise(inject(model, AdapterConfig(rank=8, **METHODS[method])))
    alone = model(IDS).logits
    padded = torch.cat([IDS, torch.full((2, 3), 7)], 1)
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 3)], 1).long()
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, :6], alone)
    torch.testing.assert_close(model(IDS.flip(0)).logits.flip(0), alone)
    torch.testing.assert_close(model(IDS[:1]).logits, alone[:1])


def test_pads_are_not_in_the_load() -> None:
    model = tiny_llama()
    randomise(inject(model, AdapterConfig(rank=8)))
    shares = []
    for ids, mask in (
        (IDS, torch.ones(2, 6)),
        (torch.cat([IDS, torch.full((2, 3), 7)], 1), torch.cat([torch.ones(2, 6), torch.zeros(2, 3)], 1)),
    ):
        with RoutingCollector(model, mask) as collector:
            model(ids, attention_mask=mask.long())
        shares.append(torch.stack([r.weight_share() for r in collector.records]))
    torch.testing.assert_close(*shares)
    torch.testing.assert_close(shares[0].sum(-1), torch.ones(10))


@pytest.mark.parametrize("method", METHODS)
def test_fp32_adapters_on_a_bf16_base(method: str) -> None:
    """Every adapted layer agrees with fp32 to 2e-2 relative; trained tensors and their gradients stay fp32."""
    outs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama().to(torch.bfloat16).to(dtype)
        adapter = inject(model, AdapterConfig(rank=8, dropout_input=0.0, **METHODS[method]))
        randomise(adapter)
        model(IDS, labels=IDS).loss.backward()
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())
        x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
        layers = model.model.layers
        outs.append([layers[0].self_attn.q_proj(x[..., :32].to(dtype)), layers[1].mlp.down_proj(x.to(dtype))])
    for exact, rounded in zip(*outs, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (rounded.float() - exact).abs().max() / exact.abs().max() < 2e-2


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str) -> None:
    model = tiny_llama()
    adapter = inject(model, AdapterConfig(rank=8, dropout_input=0.0, **METHODS[method]))
    randomise(adapter)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IDS, labels=IDS)
    out.loss.backward()
    want = model(IDS).logits
    assert (out.logits.float() - want).abs().max() / want.abs().max() < 3e-2
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(method: str, dropout: float) -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny_llama().double().train()
        adapter = inject(model, AdapterConfig(rank=8, dtype="float64", dropout_input=dropout, **METHODS[method]))
        randomise(adapter)
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(3)
        with RoutingCollector(model) as collector:
            loss = model(IDS, labels=IDS).loss
        # an auxiliary loss on what the collector saw must reach the routers through the recomputation
        loss = loss + sum((r.routing.probs_TE**2).sum() for r in collector.records)
        loss.backward()
        assert len(collector.records) == 10
        grads.append([p.grad for p in adapter.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("compat", ["none", "published"])
def test_dropout_acts_in_training_only(compat: str) -> None:
    model = tiny_llama()
    config = AdapterConfig(rank=8, compat=compat)
    assert (config.dropout_input, config.dropout_routing, config.dropout_output) == (
        (0.05, 0.05, 0.05) if compat == "published" else (0.05, 0.0, 0.0)
    )
    randomise(inject(model, config))
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_output_dropout_path_equals_the_in_place_path() -> None:
    """With a dropout so rare that it never strikes here, the two last products agree in value and gradients."""
    results = []
    for dropout in (0.0, 1e-12):
        model = tiny_llama().train()
        adapter = inject(model, AdapterConfig(rank=8, dropout_input=dropout, dropout_output=dropout))
        randomise(adapter)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in adapter.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_shared_b_is_there_once() -> None:
    model = tiny_llama()
    adapter = inject(model, AdapterConfig(rank=8))
    trainable = [n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    assert len(trainable) == len(set(trainable)) == 5 + 2 * 5 * 4
    assert sum(n.endswith(".B") for n in adapter.state_dict()) == 5
    one, two = (adapter.layers.get_submodule(f"model.layers.{i}.self_attn.q_proj").experts for i in (0, 1))
    assert one.up().data_ptr() == two.up().data_ptr()
    assert one.A.data_ptr() != two.A.data_ptr()


def test_layers_of_one_leaf_name_but_other_shape_do_not_share() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=32))
    adapter = inject(model, AdapterConfig(targets=["c_attn", "c_proj"], rank=8))
    assert sorted(n for n, _ in adapter.bank.named_parameters()) == [
        "c_attn-32x96.B",
        "c_proj-128x32.B",
        "c_proj-32x32.B",
    ]


def test_unequal_counts_share_the_first_experts() -> None:
    model = tiny_llama()
    names = find_targets(model, ["q_proj"])
    adapter = inject(
        model,
        AdapterConfig(targets=["q_proj"], expert_rank=2, alpha=8.0),
        allocation=dict(zip(names, [3, 5], strict=True)),
    )
    assert adapter.bank.get_parameter("q_proj-32x32.B").shape == (5, 2, 32)
    layers = [adapter.layers.get_submodule(n) for n in names]
    assert [la.experts.up().shape for la in layers] == [(6, 32), (10, 32)]
    # the scale refers to the configured number of experts: alpha / (4 * 2)
    assert [la.scale for la in layers] == [1.0, 1.0]


LLAMA2_7B = dict(LLAMA3_8B, intermediate_size=11008, num_key_value_heads=32, vocab_size=32000)
QWEN25_7B = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
)


@pytest.mark.parametrize(
    ("config", "rank", "method", "count"),
    [
        (LlamaConfig(**LLAMA3_8B), 16, "talklora", 16_144_896),
        (LlamaConfig(**LLAMA3_8B), 32, "talklora", 32_307_712),
        (LlamaConfig(**LLAMA2_7B), 16, "talklora", 14_486_016),
        (LlamaConfig(**LLAMA2_7B), 32, "talklora", 28_989_952),
        (Qwen2Config(**QWEN25_7B), 16, "talklora", 15_363_776),
        (Qwen2Config(**QWEN25_7B), 32, "talklora", 30_743_232),
        (LlamaConfig(**LLAMA3_8B), 32, "lora", 56_623_104),
        (LlamaConfig(**LLAMA3_8B), 32, "moelora", 60_555_264),
    ],
)
def test_trainable_parameters_of_the_papers_models(config: AutoConfig, rank: int, method: str, count: int) -> None:
    """P = L sum_t (r d_t + n^2 + n r + r^2/n) + sum_t r o_t for TalkLoRA; built on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapter = inject(model, AdapterConfig(rank=rank, **METHODS[method]))
    assert sum(p.numel() for p in adapter.parameters()) == count
    assert all(p.is_meta for p in adapter.parameters())


def test_initial_values_depend_on_seed_and_name_only() -> None:
    def first_a(targets: list[str], seed: int, **parts: Any) -> torch.Tensor:
        model = tiny_llama()
        torch.manual_seed(seed)
        adapter = inject(model, AdapterConfig(targets=targets, rank=8, **parts))
        return adapter.layers.get_submodule("model.layers.1.self_attn.v_proj").experts.A

    a = first_a(["v_proj"], 1)
    assert torch.equal(a, first_a(["q_proj", "v_proj", "up_proj"], 1, **METHODS["moelora"]))
    assert not torch.equal(a, first_a(["v_proj"], 2))
    assert a.abs().max() <= 32**-0.5 < 1.1 * a.abs().max()


def test_targets_by_name_regex_all_linear_exclude_and_layers() -> None:
    model = tiny_llama()
    assert len(find_targets(model, ["q_proj", "down_proj"])) == 4
    assert list(find_targets(model, r".*\.1\.mlp\.(up|gate)_proj")) == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert len(find_targets(model, "all-linear")) == 14
    assert len(find_targets(model, "all-linear", exclude=["q_proj"], layers="1-")) == 6
    assert len(find_targets(model, "all-linear", exclude=r".*mlp.*", layers=[0])) == 4
    assert next(iter(find_targets(model, ["self_attn.k_proj"], layers="0,1"))) == "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["qproj"]}, ["'qproj'", "Did you mean 'q_proj'", "down_proj (2)"]),
        ({"targets": ["mlp"]}, ["LlamaMLP", "only Linear"]),
        ({"targets": "nothing.*"}, ["match nothing", "q_proj (2)"]),
        ({"targets": "("}, ["not a regular expression"]),
        ({"layers": "5-"}, ["match nothing", "'5-'"]),
        ({"layers": "a-b"}, ["cannot read", "0-15"]),
        ({"rank": 6}, ["rank 6 is not divisible by num_experts 4"]),
        ({"num_experts": 0}, ["num_experts must be at least 1"]),
        ({"dropout_input": 1.5}, ["dropout_input must be in [0, 1)"]),
        ({"modules_to_save": ["score"]}, ["no module 'score'", "lm_head"]),
        ({"rank": 7, "dropout_output": -1}, ["rank 7", "dropout_output"]),
    ],
)
def test_mistakes_get_one_message_and_leave_the_model_alone(options: dict[str, Any], words: list[str]) -> None:
    model = tiny_llama()
    with pytest.raises(UserError) as e:
        inject(model, AdapterConfig(**({"rank": 8} | options)))
    assert all(w in str(e.value) for w in words), str(e.value)
    assert not hasattr(model, "talklora")
    assert not any(isinstance(m, Adapted) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
