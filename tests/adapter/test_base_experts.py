"""LoRA on the fused experts of a base against the same experts with merged weights, in float64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from talklora_pl.adapter.config import AdapterConfig
from talklora_pl.communication.identity import NoCommunication
from talklora_pl.experts.lora import LoRA
from talklora_pl.routers.softmax import Uniform
from talklora_pl.sites.base_experts import AdaptedExperts, is_mixture, parts, why_not
from talklora_pl.spec import Bank, LayerSpec
from tests.operators import Waits

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 12,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 5,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
FAMILIES = ("Mixtral", "Qwen3Moe", "GptOss", "Qwen2Moe", "Olmoe")


def experts_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**TINY)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    (experts,) = [m for m in model.modules() if is_mixture(m)]
    experts.config._experts_implementation = "eager"
    for p in experts.parameters():
        p.data.normal_(std=0.5)
    return experts.requires_grad_(False)


def adapted(frozen: nn.Module, **options: float) -> AdaptedExperts:
    config = AdapterConfig(
        expert_rank=3, num_experts=1, alpha=6.0, experts=LoRA(), communication=NoCommunication(), router=Uniform(),
        **{"dropout_input": 0.0, **options},
    )  # fmt: skip
    spec = LayerSpec("mlp.experts", "experts", 0, 16, 16, 1, 1, 3, dtype=torch.float64)
    layer = AdaptedExperts(spec, config, Bank(), frozen)
    for name, p in layer.named_parameters():
        if name.endswith(".B"):
            p.data.normal_(std=0.5)
    return layer


def inputs(tokens: int = 7) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x_TD = torch.randn(tokens, 16, dtype=torch.float64, requires_grad=True)
    # expert 3 gets nothing
    index_TK = torch.stack([torch.tensor([0, 1, 2, 4])[torch.randperm(4)[:2]] for _ in range(tokens)])
    weights_TK = torch.rand(tokens, 2, dtype=torch.float64, requires_grad=True)
    return x_TD, index_TK, weights_TK


@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_gradients_are_those_of_merged_experts(family: str) -> None:
    frozen = experts_of(family)
    assert why_not(frozen) is None
    layer, (x_TD, index_TK, weights_TK) = adapted(frozen), inputs()
    seed_TD = torch.randn_like(x_TD)
    got_TD = layer(frozen, x_TD, index_TK, weights_TK)
    named = dict(layer.named_parameters())
    wrt = [x_TD, weights_TK, *named.values()]
    got = torch.autograd.grad((got_TD * seed_TD).sum(), wrt)

    merged = deepcopy(frozen)
    for part in parts(frozen):
        A_ERD, B_ERO = named[f"{part}.A"], named[f"{part}.B"]
        delta_EOD = 2.0 * torch.einsum("ero,erd->eod", B_ERO, A_ERD)
        weight = getattr(frozen, part) + (delta_EOD.transpose(1, 2) if frozen.is_transposed else delta_EOD)
        delattr(merged, part)
        setattr(merged, part, weight)  # a plain tensor with a graph, so that its gradient reaches A and B
    want_TD = merged(x_TD, index_TK, weights_TK)
    want = torch.autograd.grad((want_TD * seed_TD).sum(), wrt)

    torch.testing.assert_close(got_TD, want_TD, rtol=1e-12, atol=1e-12)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)
    for part in parts(frozen):  # an expert without a token: zero, not missing
        index = list(named).index(f"{part}.B") + 2
        assert not got[index][3].any()
        assert got[index][0].any()


@pytest.mark.parametrize("family", ("Mixtral", "GptOss"))
def test_the_change_of_the_weights_is_what_the_forward_adds(family: str) -> None:
    frozen = experts_of(family)
    layer, (x_TD, index_TK, weights_TK) = adapted(frozen), inputs()
    want_TD = layer(frozen, x_TD, index_TK, weights_TK)
    for path, change in layer.low_rank("mlp.experts").items():
        delta_EOD = change.B_PO.mT @ change.A_PD
        getattr(frozen, path.rpartition(".")[2]).data += delta_EOD.mT if frozen.is_transposed else delta_EOD
    torch.testing.assert_close(frozen(x_TD, index_TK, weights_TK), want_TD, rtol=1e-12, atol=1e-12)


def test_gradient_checkpointing_and_dropout() -> None:
    frozen = experts_of("Qwen3Moe")
    layer, given = adapted(frozen, dropout_input=0.3, dropout_output=0.2), inputs()
    out = []
    for run in (lambda *a: layer(frozen, *a), lambda *a: checkpoint(layer, frozen, *a, use_reentrant=False)):
        torch.manual_seed(5)
        layer.zero_grad()
        run(*given).square().sum().backward()
        out.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*out, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    layer.eval()
    torch.testing.assert_close(layer(frozen, *given), layer(frozen, *given), rtol=0, atol=0)


def test_pairs_of_another_process_are_left_out() -> None:
    frozen = experts_of("Mixtral")
    layer, (x_TD, index_TK, weights_TK) = adapted(frozen), inputs()
    weights_TK = weights_TK.detach().clone()
    weights_TK[:, 1] = 0
    want_TD = layer(frozen, x_TD, index_TK, weights_TK)
    index_TK[:, 1] = frozen.num_experts
    torch.testing.assert_close(layer(frozen, x_TD, index_TK, weights_TK), want_TD)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_experts_at_once_are_one_after_the_other(family: str, dtype: torch.dtype) -> None:
    """Also where an expert has no token, and where some pairs are those of another process."""
    frozen = experts_of(family).to(dtype)
    layer = adapted(frozen).float()
    x_TD, index_TK, weights_TK = inputs()
    index_TK[2, 1] = index_TK[5, 0] = frozen.num_experts
    results = []
    for layer.grouped in (True, False):
        layer.zero_grad(set_to_none=True)
        x, w = (v.detach().to(dtype).requires_grad_() for v in (x_TD, weights_TK))
        y = layer(frozen, x, index_TK, w)
        y.float().square().sum().backward()
        results.append({"y": y, "x": x.grad, "w": w.grad} | {n: p.grad for n, p in layer.named_parameters()})
    for name, want in results[1].items():
        tolerance = (1e-5 if dtype == torch.float32 else 3e-2) * want.detach().abs().max().item()
        torch.testing.assert_close(results[0][name], want, rtol=0, atol=tolerance, msg=name)


def test_all_experts_at_once_ask_nothing_of_the_device() -> None:
    frozen = experts_of("Mixtral").float()
    layer, (x_TD, index_TK, weights_TK) = adapted(frozen).float(), inputs()
    with Waits() as waits:
        layer(frozen, x_TD.float(), index_TK, weights_TK.float()).sum().backward()
    assert waits.names == []


def test_what_cannot_be_adapted_says_why() -> None:
    frozen = experts_of("Mixtral")
    frozen.gate_up_proj.data = frozen.gate_up_proj.data.to(torch.float8_e4m3fn)
    assert "8 bits" in why_not(frozen)

    class OldExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(3, 4, 4))

    assert is_mixture(OldExperts())
    assert "OldExperts" in why_not(OldExperts())
    assert not is_mixture(nn.Conv1d(4, 4, 2, groups=4))
