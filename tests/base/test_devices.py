"""What a run on a GPU finds to be otherwise, as far as a machine without one can show it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import talklora_pl
from talklora_pl import FineTuner
from talklora_pl.adapter import AdapterConfig, inject
from talklora_pl.communication import attention
from talklora_pl.communication.attention import Attention
from talklora_pl.communication.gnn import GNN
from talklora_pl.data import TextData
from talklora_pl.routers.team import Team
from talklora_pl.sites import reached
from talklora_pl.spec import LayerSpec
from tests.data.tiny import llama, save_model

METHODS = {
    "talklora": AdapterConfig(rank=8),
    "gnn": AdapterConfig(rank=8, communication=GNN(graph="random")),
    "team": AdapterConfig(rank=8, router=Team()),
    "graphlora": talklora_pl.method("graphlora"),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_default_device_has_no_say(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning builds the model with the GPU as the default device; here with one that computes nothing."""
    monkeypatch.setattr(reached, "_known", {})
    base = save_model(tmp_path)
    built = []
    for device in ("cpu", "meta"):
        torch.manual_seed(1)
        tuner = FineTuner(base, METHODS[method])
        with torch.device(device):
            tuner.configure_model()
        built.append(tuner.model.state_dict() | dict(tuner.model.named_buffers()))
    torch.testing.assert_close(built[1], built[0], rtol=0, atol=0)


def test_random_numbers_of_a_gpu_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    inject(llama(), METHODS["talklora"])
    assert seeds == [0]  # that of the model


def test_more_tokens_than_a_kernel_takes_attend_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LayerSpec("q", "q", 0, 8, 8, num_experts=3, kind_experts=3, rank=4, dtype=torch.float64)
    module = Attention(heads=2).build(layer, 4)
    m_TEF = torch.randn(7, 3, 4, dtype=torch.float64, requires_grad=True)
    found = []
    for most in (7, 3):
        monkeypatch.setattr(attention, "MOST", most)
        out = module(m_TEF, m_TEF)
        found.append([out, *torch.autograd.grad(out.square().sum(), [m_TEF, *module.parameters()])])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_batches_travel_to_a_gpu_out_of_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t + 1)
    batch = {"input_ids": torch.zeros(2), "id": ["a"], "tokens": 3}
    for device, value in (("cpu", 0), ("cuda", 1)):
        data = TextData("rows.jsonl")
        data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
        got = data.on_before_batch_transfer(batch, 0)
        assert got["input_ids"].tolist() == [value, value] and (got["id"], got["tokens"]) == (["a"], 3)


@pytest.mark.gpu
def test_tokens_without_end_attend_on_a_gpu() -> None:
    layer = LayerSpec("q", "q", 0, 8, 8, num_experts=8, kind_experts=8, rank=4, device=torch.device("cuda"))
    m_TEF = torch.randn(attention.MOST + 10, 8, 4, device="cuda", requires_grad=True)
    Attention().build(layer, 4)(m_TEF, m_TEF).sum().backward()
    assert m_TEF.grad is not None and m_TEF.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_training_starts_equally_on_a_gpu(method: str) -> None:
    here, there = llama(), llama().to("cuda")
    for model in (here, there):
        torch.manual_seed(1)
        inject(model, METHODS[method])
    for name, tensor in here.state_dict().items():
        assert there.state_dict()[name].is_cuda
        torch.testing.assert_close(there.state_dict()[name].cpu(), tensor, rtol=0, atol=0)
