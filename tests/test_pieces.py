"""The loss in pieces is the loss, and its logits are never there all at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from talklora_pl import pieces
from talklora_pl.distributed.fsdp import shard_frozen
from talklora_pl.inputs import packed, token_logits
from talklora_pl.internals.torch import TorchDispatchMode
from tests.data.test_packing import FAMILIES, rows, trained
from tests.distributed.runs import free_port


class Largest(TorchDispatchMode):
    """Most numbers of any tensor that an operator makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        each = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
        self.numbers = max([self.numbers, *(t.numel() for t in each)])
        return out


def loss_and_gradients(model: Any, adapter: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    total, count = pieces.summed_nll(model, batch)
    adapter.zero_grad(set_to_none=True)
    (total / count * 3).backward()
    return {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None} | {"loss": total.detach()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pieces of 5 rows; the list has what was asked of the head, piece by piece."""
    asked: list[int] = []
    own = pieces.token_nll
    monkeypatch.setattr(pieces, "MOST_ROWS", 5)
    monkeypatch.setattr(pieces, "token_nll", lambda h, t: (asked.append(len(t)), own(h, t))[1])
    return asked


# gemma2's attention and mamba's recurrence compute in float32, and make errors of that size of any change of order
@pytest.mark.parametrize("kind", [k for k in FAMILIES if k not in ("gemma2", "mamba")])
def test_equals_the_whole(kind: str, small: list[int]) -> None:
    """Also where logits are capped or scaled, or the head has a bias; packed too."""
    model, adapter = trained(kind)
    batch = rows()
    for given in (batch, packed(batch)) if kind == "gemma3_text" else (batch,):
        small.clear()
        got = loss_and_gradients(model, adapter, given)
        count = len(batch["loss_index"])
        assert small == [5] * (count // 5) + [count % 5] * (count % 5 > 0), "not in pieces"
        nll_N, row_N = pieces.label_nll(model, given)
        assert row_N.tolist() == given["loss_row"].tolist()
        torch.testing.assert_close(nll_N.detach().sum(), got["loss"], rtol=1e-12, atol=0)
        with pytest.MonkeyPatch.context() as whole:
            whole.setattr(pieces, "MOST_ROWS", 4096)
            want = loss_and_gradients(model, adapter, given)
        assert got.keys() == want.keys() and len(want) > 10
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert "forward" not in model.get_decoder().__dict__


def test_capped_logits_are_capped_in_pieces(small: list[int]) -> None:
    model, _ = trained("gemma2")
    got, _ = pieces.label_nll(model, rows())
    assert len(small) > 1
    logits_NV, targets_N, _ = token_logits(model, rows())
    assert logits_NV.abs().max() < 1.0 < logits_NV.atanh().abs().max()
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none"))


def test_the_largest_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = trained("llama")
    model.resize_token_embeddings(3000, mean_resizing=False)
    model.requires_grad_(False)
    adapter.requires_grad_(True)
    batch = rows()
    N = len(batch["loss_index"])
    for most, numbers in ((N, N * 3000), (4, 4 * 3000)):
        monkeypatch.setattr(pieces, "MOST_ROWS", most)
        with Largest() as largest:
            loss_and_gradients(model, adapter, batch)
        assert max(numbers, model.lm_head.weight.numel()) == largest.numbers
    assert model.lm_head.weight.numel() == 3000 * 16 > 4 * 3000


def test_bf16_keeps_the_precision_of_the_whole(small: list[int]) -> None:
    model, adapter = trained("llama")
    model.to(torch.bfloat16)
    adapter.float()
    got = loss_and_gradients(model, adapter, rows())
    assert got["loss"].dtype == torch.float32 and len(small) > 1
    with pytest.MonkeyPatch.context() as whole:
        whole.setattr(pieces, "MOST_ROWS", 4096)
        want = loss_and_gradients(model, adapter, rows())
    torch.testing.assert_close(got["loss"], want["loss"])
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=2e-2, atol=5e-2 * value.abs().max().item())


@pytest.mark.parametrize("what", ["head", "embedding", "adapter"])
def test_a_head_that_is_trained_gets_its_gradient(what: str, small: list[int]) -> None:
    model, adapter = trained("llama")
    if what == "embedding":  # tied
        model.lm_head.weight = model.model.embed_tokens.weight
    if what == "adapter":
        model.lm_head.__class__ = model.model.layers[0].mlp.up_proj.__class__
        model.lm_head.talklora_adapters = model.model.layers[0].self_attn.q_proj.talklora_adapters
        assert pieces._trained_outside(model, model.get_decoder())
        return
    model.lm_head.weight.requires_grad_(True)
    loss_and_gradients(model, adapter, rows())
    assert small == [] and model.lm_head.weight.grad.abs().sum() > 0


def test_evaluation_has_no_gradient_and_a_sharded_base_no_lack(small: list[int]) -> None:
    model, adapter = trained("llama")
    want = loss_and_gradients(model, adapter, rows())
    with torch.inference_mode():
        nll_N, _ = pieces.label_nll(model, rows())
    assert not nll_N.requires_grad
    torch.testing.assert_close(nll_N.sum(), want["loss"])
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        shard_frozen(model, init_device_mesh("cpu", (1,)), False, torch.device("cpu"))
        for _ in range(2):
            small.clear()
            got = loss_and_gradients(model, adapter, rows())
            assert len(small) > 1
            for name, value in want.items():
                torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12)
            with torch.no_grad():
                torch.testing.assert_close(pieces.label_nll(model, rows())[0].sum(), want["loss"])
    finally:
        torch.distributed.destroy_process_group()
