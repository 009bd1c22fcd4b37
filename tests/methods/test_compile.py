"""torch.compile gives the same numbers."""

from __future__ import annotations

import pytest
import torch

from tests.methods.matrix import adapted, config_of
from tests.methods.test_matrix import IDS, MASK


@pytest.mark.slow
@pytest.mark.parametrize(
    "experts, communication, router, per",
    [("shared_b", "talking", "softmax", "linear"), ("ffn_lora", "gnn_embeddings", "top_k", "linear")],
)
def test_compiled_equals_eager(experts: str, communication: str, router: str, per: str) -> None:
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
