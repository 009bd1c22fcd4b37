"""Packed rows: how they are dealt out, and that a model computes with them what it computes with each alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from talklora_pl import UserError, varlen
from talklora_pl.adapter import AdapterConfig, RoutingCollector, inject
from talklora_pl.balance import balance_losses
from talklora_pl.base import BaseModel
from talklora_pl.compiled import CompiledLayers
from talklora_pl.data import TextData
from talklora_pl.data.sampler import Packs, Position, TrainBatches
from talklora_pl.inputs import (
    NO_LOSS,
    causal_inputs,
    labelled,
    packed,
    packed_rows,
    summed_cross_entropy,
    to_device,
    token_logits,
)
from talklora_pl.memory.checkpointing import CAN_SELECT, checkpoint_layers
from talklora_pl.monitoring.metrics import RoutingLoad
from talklora_pl.pieces import summed_nll
from talklora_pl.trials import reads_back_only, rows_not_kept_apart
from tests.data import varlen_on_cpu
from tests.data.tiny import SIZES
from tests.methods.matrix import randomise

# --- dealing out


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=120),
    budget=st.integers(50, 130),
    padded=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_packs_hold_every_row_once_within_the_budget(lengths: list[int], budget: int, padded: bool, epoch: int) -> None:
    lengths = np.array(lengths)
    packs = Packs(lengths, budget, padded)
    rows = packs.rows(3, epoch)
    assert sorted(np.concatenate(rows)) == list(range(len(lengths)))
    used = [len(p) * lengths[p].max() if padded else lengths[p].sum() for p in rows]
    assert max(used) <= budget
    assert len(rows) == len(packs)
    again = Packs(lengths, budget, padded).rows(3, epoch)
    assert [p.tolist() for p in again] == [p.tolist() for p in rows]


def test_packs_are_nearly_full_and_differ_between_epochs() -> None:
    lengths = np.random.default_rng(0).integers(20, 300, 3000)
    packs = Packs(lengths, 1024)
    assert len(packs) <= 1.03 * lengths.sum() / 1024
    first, second = packs.rows(0, 0), packs.rows(0, 1)
    assert sum(np.array_equal(a, b) for a, b in zip(first, second)) < 0.05 * len(packs)


def batches(lengths: np.ndarray, rank: int = 0, world: int = 1, padded: bool = False, **at: int) -> list:
    packs = Packs(lengths, 60, padded)
    return list(TrainBatches(lengths, lengths - 2, 1, 7, True, rank, world, lambda: Position(**at), packs))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 70), world=st.integers(1, 3), accumulate=st.integers(1, 3), padded=st.booleans())
def test_a_step_is_the_same_for_every_layout(n: int, world: int, accumulate: int, padded: bool) -> None:
    lengths = np.random.default_rng(1).integers(3, 30, n)
    ranks = [batches(lengths, r, world, padded, accumulate=accumulate) for r in range(world)]
    (one,) = [batches(lengths, padded=padded, accumulate=accumulate * world)]
    assert len({len(rank) for rank in ranks}) == 1
    got, want = [], []
    for i in range(0, len(ranks[0]), accumulate):
        group = [b for rank in ranks for b in rank[i : i + accumulate]]
        assert {(b.step_tokens, b.micro_steps) for b in group} == {(group[0].step_tokens, len(group) // world)}
        got.append((sorted(r for b in group if not b.filler for r in b.rows), group[0].step_tokens))
    for i in range(0, len(one), accumulate * world):
        group = one[i : i + accumulate * world]
        want.append((sorted(r for b in group for r in b.rows), group[0].step_tokens))
    assert got == want
    assert sorted(row for rows, _ in got for row in rows) == list(range(n))
    for stop in range(len(ranks[0])):
        assert batches(lengths, 0, world, padded, accumulate=accumulate, batch=stop) == ranks[0][stop:]


# --- computing

LENGTHS = (7, 1, 12, 4, 9)
GATED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24},
    "qwen2": {**SIZES, "num_key_value_heads": 1},
    "qwen3": GATED,
    "mistral": {**GATED, "sliding_window": 4},
    "gemma2": {**GATED, "sliding_window": 4, "final_logit_softcapping": 1.0},
    "gemma3_text": {**GATED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": SIZES,
    "opt": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "phi": SIZES,
    "granite": {**GATED, "logits_scaling": 3.0},
    "cohere": {**GATED, "logit_scale": 0.3},
    "mixtral": {**GATED, "num_local_experts": 3},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
    "lfm2": {**GATED, "layer_types": ["conv", "full_attention"]},
}
PADDED_ONLY = {"opt", "bloom", "mamba", "lfm2"}


def build(kind: str, attention: str | None = "sdpa") -> PreTrainedModel:
    sizes = FAMILIES[kind]
    config = AutoConfig.for_model(
        kind, vocab_size=40, max_position_embeddings=32, pad_token_id=1, bos_token_id=0, eos_token_id=0, **sizes
    )
    torch.manual_seed(0)
    if kind in ("bloom", "mamba", "gemma2"):
        attention = "eager"
    config._experts_implementation = "eager"  # the grouped product knows no float64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=attention)
    model.config.use_cache = False
    with torch.no_grad():
        for p in model.parameters():  # an untrained model hears next to nothing
            p.add_(torch.randn_like(p) * 0.2)
    return model.requires_grad_(False)


def rows() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(2, 40, (n,), generator=draw).tolist() for n in LENGTHS]
    labels = [row if i % 2 else [NO_LOSS] * (len(row) // 2) + row[len(row) // 2 :] for i, row in enumerate(ids)]
    return labelled(ids, labels, pad_id=1)


def trained(kind: str, router: Any = None) -> tuple[Any, Any]:
    model = build(kind)
    config = AdapterConfig.from_dict(
        {
            "targets": "all-linear",
            "num_experts": 3,
            "expert_rank": 2,
            "dtype": "float64",
            "dropout_input": 0.0,
            "router": router or {"name": "top_k", "k": 2},
            "balance": [{"name": "switch"}, {"name": "localised", "delta": 0.3}],
        }
    )
    adapter = inject(model, config)
    randomise(adapter, 2)
    model.train()
    for module in model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model, adapter


def loss(model: Any, adapter: Any, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
    """Loss and all gradients of a batch, with its balance losses, and what was collected."""
    types = torch.tensor([0, 1, 1, 0, 1], device=batch["labels"].device)
    with RoutingCollector(model, batch["attention_mask"], types, packed_rows(batch)) as collector:
        logits_NV, targets_N, row_N = token_logits(model, batch)
    task = summed_cross_entropy(logits_NV, targets_N)
    total = task + balance_losses(adapter, collector.records)[0]
    adapter.zero_grad(set_to_none=True)
    total.backward()
    out = {n: p.grad for n, p in adapter.named_parameters()}
    return out | {"loss": total.detach(), "rows": torch.bincount(row_N)}, collector.records


@pytest.mark.parametrize("kind", [k for k in FAMILIES if k not in PADDED_ONLY])
def test_packed_rows_are_what_each_is_alone(kind: str) -> None:
    """Loss, balance losses with types of rows, gradients and loads by task; also with sliding windows and experts."""
    model, adapter = trained(kind)
    batch = rows()
    assert rows_not_kept_apart(model) == ""
    want, records = loss(model, adapter, batch)
    got, packed_records = loss(model, adapter, packed(batch))
    bound = 1e-6 if kind == "gemma2" else 1e-10  # eager attention takes its softmax in float32
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
    tasks = [f"t{i % 2}" for i in range(len(LENGTHS))]
    loads = []
    for each in (records, packed_records):
        load = RoutingLoad(adapter.routed_layers())
        load.update(each, tasks)
        loads.append(load)
    assert loads[0].tokens.sum() == len(adapter.routed_layers()) * sum(LENGTHS)
    for state in ("tokens", "weights", "choices", "entropy"):
        torch.testing.assert_close(getattr(loads[1], state), getattr(loads[0], state), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(PADDED_ONLY))
def test_models_whose_rows_would_hear_each_other_are_found_out(kind: str) -> None:
    assert rows_not_kept_apart(build(kind)) == "a row hears the one before it"


@pytest.mark.parametrize("kind", [k for k in FAMILIES if k != "gemma2"])  # NaN at pads with the mask, in float64
def test_right_padded_rows_need_no_mask(kind: str) -> None:
    """Without a mask, real tokens get the logits and gradients that they have with it."""
    model, adapter = trained(kind)
    batch = rows()
    assert reads_back_only(model)
    assert "attention_mask" not in causal_inputs(model, batch)
    got, _ = loss(model, adapter, batch)
    own_origin = {k: v for k, v in batch.items() if k not in ("loss_index", "loss_target", "loss_row")}
    assert "attention_mask" in causal_inputs(model, own_origin)
    want, _ = loss(model, adapter, own_origin)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_a_model_that_reads_both_ways_keeps_its_mask() -> None:
    model = build("llama")
    model.config.is_causal = False
    model.model.config.is_causal = False
    assert not reads_back_only(model)
    assert "attention_mask" in causal_inputs(model, rows())


def test_a_trial_leaves_no_trace() -> None:
    model, _ = trained("llama")
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    with RoutingCollector(model) as collector:
        assert reads_back_only(model)
        assert not rows_not_kept_apart(model)
    assert collector.records == []
    assert [m.training for m in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_attention_by_borders_of_rows(kind: str) -> None:
    """Through PyTorch's operator for them, gradients too."""
    model, adapter = trained(kind)
    batch = rows()
    want, _ = loss(model, adapter, batch)
    model.set_attn_implementation(varlen.NAME)
    assert rows_not_kept_apart(model) == ""
    calls = varlen_on_cpu.longest
    calls.clear()
    got, _ = loss(model, adapter, packed(batch))
    assert calls == [max(LENGTHS)] * 2  # once a layer
    plain, _ = loss(model, adapter, batch)
    assert len(calls) == 2
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(plain[name], value, rtol=1e-10, atol=1e-10)


def test_attention_that_is_dropped_in_training_keeps_its_mask() -> None:
    model = build("gpt2").train()  # with 0.1
    assert rows_not_kept_apart(model) == ""
    model.set_attn_implementation(varlen.NAME)
    state = torch.get_rng_state()
    assert "no variable-length kernel for dropout" in rows_not_kept_apart(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not CAN_SELECT, reason="this torch cannot select")
@pytest.mark.parametrize(("mode", "times"), [("off", 1), ("selective", 1), ("full", 2)])
def test_selective_checkpointing_keeps_the_attention_of_packed_rows(mode: Any, times: int) -> None:
    model, adapter = trained("llama")
    want, _ = loss(model, adapter, packed(rows()))
    model.set_attn_implementation(varlen.NAME)
    checkpoint_layers(model, mode)
    varlen_on_cpu.longest.clear()
    got, _ = loss(model, adapter, packed(rows()))
    assert len(varlen_on_cpu.longest) == 2 * times
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_lengths_of_rows_compile_nothing_anew() -> None:
    model, _ = trained("llama")
    model.set_attn_implementation(varlen.NAME)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    CompiledLayers(model, "eager")
    graphs = []
    for lengths in ([5, 9, 7], [6, 3], [20], [4, 4, 4, 11]):
        ids = [list(range(2, 2 + n)) for n in lengths]
        summed_nll(model, packed(labelled(ids, ids, pad_id=1)))[0].backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_kernel_of_torch_on_a_gpu(kind: str) -> None:
    """Gradients are as near to those in float64 as those of padded rows by ``sdpa``."""
    model, adapter = trained(kind, {"name": "softmax"})  # no choice of experts that rounding decides
    want, _ = loss(model, adapter, rows())
    gradients = want.keys() - {"loss", "rows"}
    size = torch.cat([want[n].flatten() for n in gradients]).norm()
    model.to("cuda", torch.bfloat16)
    adapter.float()
    away = []
    for implementation, batch in (("sdpa", rows()), (varlen.NAME, packed(rows()))):
        model.set_attn_implementation(implementation)
        got, _ = loss(model, adapter, to_device(batch, "cuda"))
        away.append(float(torch.cat([(got[n].cpu() - want[n]).flatten() for n in gradients]).norm() / size))
    assert rows_not_kept_apart(model) == ""
    assert away[1] <= 1.5 * away[0] + 5e-3, away


# --- the data module


def test_batches_of_the_data_module(base: BaseModel, jsonl: Callable[..., str]) -> None:
    path = jsonl([{"prompt": "p" * (i % 7 + 1), "completion": "c" * (i % 4 + 1)} for i in range(30)])
    data = TextData(path, base=base, max_tokens=40, max_length=30, val_size=0)
    data.prepare_data()
    data.setup("fit")
    seen: list[str] = []
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape == batch["position_ids"].shape == (1, batch["tokens"])
        assert batch["tokens"] <= 40
        assert (batch["position_ids"] == 0).sum() == len(batch["id"]) == len(batch["row_borders"]) - 1
        seen += batch["id"]
    assert len(seen) == len(set(seen)) == 30


def test_what_cannot_be_packed_is_refused(base: BaseModel, jsonl: Callable[..., str]) -> None:
    path = jsonl([{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    classes = BaseModel(base.path, task="sequence_classification")
    with pytest.raises(UserError, match="objective classification cannot be packed") as refused:
        TextData(path, base=classes, max_tokens=600, val_size=0).check("fit")
    assert str(refused.value).count("\n") == 0
    path = jsonl([{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match=r"data\.max_tokens: 30 is less than data\.max_length, 31"):
        TextData(path, base=base, max_tokens=30, max_length=31, val_size=0).check("fit")
