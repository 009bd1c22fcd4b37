"""With the cache, token for token what full forwards give; a token's routing depends on nothing else in its batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from talklora_pl.adapter import RoutingCollector
from tests.export import models
from tests.methods.test_configs import METHODS, config_of


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(models.FAMILIES["llama"]).double().eval()
    # a model of random weights of the usual size would say the same token for ever
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(15)
    models.train(model, config_of(request.param))
    return model


@torch.no_grad()
def greedy_without_cache(model: Any, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """What generation means: one full forward for every token."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(steps):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        ids = torch.cat([ids, out.logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    return ids


@torch.no_grad()
def beams_without_cache(model: Any, ids: Tensor, steps: int, beams: int) -> Tensor:
    """Beam search over one prompt by full forwards, no end of sequence."""
    found = [(0.0, ids)]
    for _ in range(steps):
        grown = []
        for score, row in found:
            logp = model(input_ids=row, use_cache=False).logits[0, -1].log_softmax(-1)
            best = logp.topk(beams)
            grown += [(score + v.item(), torch.cat([row, i.view(1, 1)], 1)) for v, i in zip(best.values, best.indices)]
        found = sorted(grown, key=lambda g: -g[0])[:beams]
    return found[0][1]


def test_cached_generation_equals_full_forwards(model: Any) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "use_cache": True}
    got = model.generate(models.IDS, attention_mask=models.MASK, **options)
    assert torch.equal(got, greedy_without_cache(model, models.IDS, models.MASK, 6))
    assert len(set(got[:, -6:].flatten().tolist())) > 3
    # left-padded in a batch, and alone
    alone = model.generate(models.IDS[:1, 2:], attention_mask=models.MASK[:1, 2:], **options)
    assert torch.equal(alone[0, -6:], got[0, -6:])
    prompt = models.IDS[1:]
    got = model.generate(prompt, attention_mask=torch.ones_like(prompt), num_beams=3, **options)
    assert torch.equal(got, beams_without_cache(model, prompt, 6, 3))


def test_routing_of_a_token_does_not_depend_on_its_batch(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (5, 7), generator=generator)
    with torch.no_grad(), RoutingCollector(model) as together:
        model(ids)
    with torch.no_grad(), RoutingCollector(model) as alone:
        model(ids[3:4])
    assert len(together.records) == len(alone.records) > 0
    for a, b in zip(together.records, alone.records):
        assert torch.allclose(a.routing.weights_TE.view(5, 7, -1)[3], b.routing.weights_TE, atol=1e-10)
        if b.routing.selected_TK is not None:
            assert torch.equal(a.routing.selected_TK.view(5, 7, -1)[3], b.routing.selected_TK)
