"""Compiled layers give the same numbers, in one graph a kind of layer, whatever the lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from talklora_pl import fit
from talklora_pl.adapter import AdapterConfig, RoutingCollector, inject
from talklora_pl.balance import balance_losses
from talklora_pl.compiled import CompiledLayers
from talklora_pl.distributed.fsdp import shard_frozen
from talklora_pl.errors import UserError
from talklora_pl.inputs import labelled, packed, packed_rows
from talklora_pl.objectives.sft import SFT
from talklora_pl.sites.dropped import plain_drop
from talklora_pl.sites.ffn import AdaptedFFN
from tests.conftest import tiny_llama
from tests.data.tiny import save_model
from tests.distributed.runs import free_port
from tests.methods.matrix import adapted, config_of, randomise
from tests.methods.test_configs import METHODS
from tests.methods.test_configs import config_of as method
from tests.methods.test_matrix import IDS, MASK

FFN = {"graphlora", "mixlora"}


@pytest.fixture(autouse=True)
def counters() -> Iterator[Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def rows(seed: int, *lengths: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(2, 60, (n,), generator=draw).tolist() for n in lengths]
    return labelled(ids, ids, pad_id=0)


BATCHES = [rows(0, 7, 4), rows(1, 5, 9, 3), rows(2, 12, 2), rows(3, 6, 6, 2, 8)]


def model_with(config: AdapterConfig, layers: int = 2, double: bool = True) -> tuple[Any, Any]:
    model = tiny_llama(num_hidden_layers=layers)
    model = model.double() if double else model
    adapter = inject(model, config)
    if double:
        adapter.double()
    randomise(adapter, 1)
    # as behind other layers that are trained: a first layer, whose input needs no gradient, has a graph of its own
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model.train(), adapter


def gradients(model: Any, adapter: Any, batch: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    with RoutingCollector(model, batch["attention_mask"], packed=packed_rows(batch)) as collector:
        task, count = SFT().loss(model, batch)
    adapter.zero_grad(set_to_none=True)
    (task / count + balance_losses(adapter, collector.records)[0]).backward()
    found = {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
    return found | {"loss": task.detach()}, [r.layer for r in collector.records]


def same(got: dict[str, Tensor], want: dict[str, Tensor], bound: float = 1e-10) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def balanced(**options: Any) -> AdapterConfig:
    parts = {"balance": [{"name": "switch"}], "dtype": "float64", **options}
    return config_of("shared_b", "talking", "top_k", **parts)


def one_graph(backend: str, counters: Any, config: AdapterConfig, layers: int) -> None:
    want = [gradients(*model_with(config, layers), b) for b in BATCHES]
    model, adapter = model_with(config, layers)
    model.activation_checkpointing_enable()
    compiled = CompiledLayers(model, backend)
    for batch, (wanted, recorded) in zip(BATCHES, want, strict=True):
        got, now = gradients(model, adapter, batch)
        same(got, wanted)
        assert sorted(now) == sorted(recorded)
        assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    model.eval()
    with torch.no_grad():  # as it is
        model.generate(IDS[:1], max_new_tokens=2, do_sample=False)
    assert counters["stats"]["unique_graphs"] == 1
    # a single row is another case to torch, be it packed or not
    for batch in (packed(BATCHES[1]), packed(BATCHES[3]), rows(2, 12)):
        model.train()
        compiled.on = True
        got, _ = gradients(model, adapter, batch)
        compiled.on = False
        same(got, gradients(model, adapter, batch)[0])
        assert counters["stats"]["unique_graphs"] == 2


def test_one_graph_for_all_layers_and_lengths(counters: Any) -> None:
    """Equal gradients and records, with more layers than torch compiles anew before it gives up, and checkpointing."""
    one_graph("eager", counters, balanced(targets=["q_proj"]), 10)


@pytest.mark.slow
@pytest.mark.parametrize("per", [pytest.param("linear", marks=pytest.mark.nightly), "block"])
def test_one_graph_of_the_compiler(per: str, counters: Any) -> None:
    one_graph("aot_eager", counters, balanced(per=per), 3)


def test_wrong_gradients_and_code_that_cannot_be_compiled_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = model_with(balanced(), 1)
    trained = list(adapter.parameters())
    before = [p.detach().clone() for p in trained]
    calls: list[int] = []

    def loss() -> Tensor:
        task, count = SFT().loss(model, BATCHES[0])
        calls.append(1)
        return task / count * (0.5 if wrong and len(calls) == 3 else 1)

    for wrong in (False, True):
        calls.clear()
        monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
        assert ("away" in (said := CompiledLayers(model).why_not_trusted(trained, loss))) == wrong, said
        assert len(calls) == 3
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", lambda forward, **options: lambda *args, **kwargs: 1 / 0)
    said = CompiledLayers(model).why_not_trusted(trained, lambda: SFT().loss(model, BATCHES[0])[0])
    assert said == "they cannot be compiled (ZeroDivisionError: division by zero)"
    for p, value in zip(trained, before, strict=True):
        assert torch.equal(p, value)


def test_a_model_that_does_not_name_its_layers() -> None:
    with pytest.raises(UserError, match="does not name its layers"):
        CompiledLayers(nn.Linear(1, 1))


DIFFERENT = {"alphalora", "hydralora", "lossfree", "talklora", "teamlora"}
"""Methods that have no layer in common; the others are nightly."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(m, marks=() if m in DIFFERENT else pytest.mark.nightly) for m in sorted(set(METHODS) - FFN)],
)
def test_every_method_file(name: str, counters: Any) -> None:
    config = method(name).to_dict()
    config |= {"targets": ["up_proj"], "dtype": "float64", "dropout_input": 0.0, "balance": []}
    config["allocation"] = "uniform"
    model, adapter = model_with(AdapterConfig.from_dict(config))
    want = [gradients(model, adapter, b) for b in BATCHES[:2]]
    CompiledLayers(model, backend="aot_eager")
    for batch, (wanted, _) in zip(BATCHES, want):
        same(gradients(model, adapter, batch)[0], wanted)
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["graphlora", pytest.param("mixlora", marks=pytest.mark.nightly)])
def test_whole_blocks_as_experts(name: str, counters: Any) -> None:
    """In bfloat16 sorted and grouped, as uncompiled; in float32 one expert after the other."""
    config = method(name).to_dict() | {"dropout_input": 0.0, "balance": [], "allocation": "uniform"}
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        torch._dynamo.reset()
        model, adapter = model_with(AdapterConfig.from_dict(config), layers=1, double=False)
        model.to(dtype)
        blocks = [m for m in adapter.modules() if isinstance(m, AdaptedFFN)]
        for block in blocks:
            block.grouped = dtype == torch.bfloat16
        want = [gradients(model, adapter, b)[0] for b in BATCHES[:2]]
        for block in blocks:
            block.grouped = True
        CompiledLayers(model, backend="aot_eager")
        for batch, wanted in zip(BATCHES, want):
            got = gradients(model, adapter, batch)[0]
            for tensor, value in wanted.items():
                assert (got[tensor] - value).norm() <= bound * value.norm() + 1e-6, tensor
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.nightly
def test_inductor_with_dropout(counters: Any) -> None:
    model, adapter = model_with(balanced(dropout_input=0.1))
    layers = CompiledLayers(model)
    trained = [p for p in adapter.parameters() if p.requires_grad]
    assert layers.why_not_trusted(trained, lambda: SFT().loss(model, BATCHES[0])[0]) == ""
    for module in model.modules():
        if hasattr(module, "dropout_input"):
            module.dropout_input = 0.0
    want = gradients(model, adapter, BATCHES[1])[0]
    layers.on = False
    # Llama's norms compute in float32, where inductor rounds at other places
    same(gradients(model, adapter, BATCHES[1])[0], want, bound=1e-7)


@pytest.mark.slow
def test_dropout_of_compiled_layers_is_the_same_in_both_passes_of_a_checkpoint() -> None:
    model, adapter = model_with(balanced(dropout_input=0.1, dropout_output=0.1))
    CompiledLayers(model, backend="aot_eager_decomp_partition")
    found = []
    for seed, checkpointing in ((0, False), (0, True), (1, True)):
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(seed)
        found.append(gradients(model, adapter, BATCHES[0])[0])
    same(found[1], found[0])
    assert not torch.equal(found[2]["loss"], found[1]["loss"])


@pytest.mark.slow
def test_sharded(counters: Any) -> None:
    want = [gradients(*model_with(balanced()), b)[0] for b in BATCHES]
    model, adapter = model_with(balanced())
    CompiledLayers(model, backend="aot_eager")
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        shard_frozen(model, init_device_mesh("cpu", (1,)), False, torch.device("cpu"))
        for batch, wanted in zip(BATCHES, want, strict=True):
            same(gradients(model, adapter, batch)[0], wanted)
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] <= 2
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    "experts, communication, router, per",
    [("shared_b", "talking", "softmax", "linear"), ("ffn_lora", "gnn_embeddings", "top_k", "linear")],
)
def test_a_model_compiled_as_a_whole_equals_eager(experts: str, communication: str, router: str, per: str) -> None:
    """Forward and all gradients; whole-FFN experts break the graph where tokens are gathered."""
    model, adapter = adapted(config_of(experts, communication, router, per))
    model.train()
    y = model(IDS, MASK)
    y.square().sum().backward()
    want = {n: p.grad for n, p in adapter.named_parameters()}
    adapter.zero_grad(set_to_none=True)
    z = torch.compile(model, backend="aot_eager")(IDS, MASK)
    z.square().sum().backward()
    torch.testing.assert_close(z, y)
    for name, p in adapter.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-4, atol=1e-5)


def test_a_fit_compares_once_and_does_without_layers_that_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[Tensor] = []

    def differ(layers: CompiledLayers, trained: list[nn.Parameter], loss: Callable[[], Tensor]) -> str:
        assert layers.on and trained
        layers.on = False  # nothing is compiled here
        losses.append(loss())
        return "they differ"

    monkeypatch.setattr(CompiledLayers, "why_not_trusted", differ)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} is", "completion": " a number"} for i in range(8)]
    trainer = {"max_steps": 3, "accelerator": "cpu", "devices": 1}
    with pytest.warns(UserWarning, match="the layers are not compiled: they differ"):
        run = fit(
            save_model(tmp_path / "model").path,
            rows,
            model={"compile": "layers"},
            data={"batch_size": 2, "max_length": 64},
            trainer=trainer,
        )
    assert len(losses) == 1 and losses[0].isfinite()
    assert run.tuner._compiled is not None and not run.tuner._compiled.on


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dropout_of_compiled_code_draws_each_mask_once(backend: str, counters: Any) -> None:
    """One mask for forward and backward, another for each Linear that the same input goes into; whatever the length."""

    def twice(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return plain_drop(x_TD, 0.25), plain_drop(x_TD, 0.25)

    torch.manual_seed(0)
    compiled = torch.compile(twice, backend=backend, fullgraph=True, dynamic=True)
    for rows_ in (40, 300, 301):
        x_TD = torch.rand(rows_, 66, dtype=torch.bfloat16).add_(1).requires_grad_()
        first, second = compiled(x_TD)
        kept = [y != 0 for y in (first, second)]
        for y, k in zip((first, second), kept):
            torch.testing.assert_close(y, torch.where(k, x_TD / 0.75, 0), rtol=1e-2, atol=0)
        both = [float(k.float().mean()) for k in (*kept, kept[0] & kept[1])]
        assert both == pytest.approx([0.75, 0.75, 0.5625], abs=0.04)
        (first.sum() + 2 * second.sum()).backward()
        torch.testing.assert_close(x_TD.grad, ((kept[0] + 2.0 * kept[1]) / 0.75).bfloat16(), rtol=1e-2, atol=0)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dropout_of_compiled_code_keeps_no_mask(backend: str) -> None:
    """For the backward pass of three Linears with the same input: the input, their weights, seeds, rows and columns."""

    def thrice(x_TD: Tensor, A_DP: Tensor) -> Tensor:
        return torch.cat([plain_drop(x_TD, 0.25) @ A_DP for _ in range(3)], -1)

    kept: list[Tensor] = []
    x_TD, A_DP = torch.rand(40, 66, requires_grad=True), torch.rand(66, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        torch.compile(thrice, backend=backend, fullgraph=True, dynamic=True)(x_TD, A_DP).sum().backward()
    assert sorted(t.numel() for t in kept if t.numel() > 66) == [66 * 8, 40 * 66]


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dropout_inside_a_compiled_checkpoint_draws_the_same_twice(backend: str) -> None:
    x_TD, A_DP = torch.rand(30, 66, dtype=torch.float64), torch.rand(66, 8, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(
        lambda x_TD: checkpoint(lambda x_TD: plain_drop(x_TD, 0.25) @ A_DP, x_TD, use_reentrant=False),
        backend=backend,
        fullgraph=True,
    )
    y_TP = compiled(x_TD)
    (dA_DP,) = torch.autograd.grad(y_TP.sum(), A_DP)
    torch.testing.assert_close((dA_DP * A_DP).sum(), y_TP.sum())  # y is linear in A


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5])
def test_masks_of_compiled_code_drop_each_number_by_itself(p: float) -> None:
    """As many as they should on the whole, in every row and column, beside each other and from mask to mask."""
    compiled = torch.compile(plain_drop, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    dropped_TD, other_TD, next_TD = ((compiled(torch.ones(2048, 384), p) == 0).double() - p for _ in range(3))
    variance, n = p * (1 - p), dropped_TD.numel()
    for pairs in (dropped_TD, dropped_TD[1:] * dropped_TD[:-1], dropped_TD[:, 1:] * dropped_TD[:, :-1]):
        deviation = (variance if pairs is dropped_TD else variance**2) ** 0.5
        assert abs(float(pairs.mean())) < 4.5 * deviation / n**0.5
    for other in (other_TD, next_TD):
        assert abs(float((dropped_TD * other).mean())) < 4.5 * variance / n**0.5
    for dim in (0, 1):
        spread = dropped_TD.mean(dim).std() * (dropped_TD.shape[dim] / variance) ** 0.5
        assert 0.85 < float(spread) < 1.15
    torch.manual_seed(0)
    assert torch.equal((compiled(torch.ones(2048, 384), p) == 0).double() - p, dropped_TD)
