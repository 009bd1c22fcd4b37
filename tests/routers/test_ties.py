"""Equal experts: whom a token gets is a matter of the method, not of the last bit of a matrix product."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from talklora_pl.adapter import RoutingCollector, inject
from talklora_pl.routers.top_k import keep_best
from tests.export import models
from tests.methods.test_configs import config_of


def test_of_equals_up_to_rounding_the_first_is_selected() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(500, 4, generator=generator)[:, [0, 1, 2, 3, 1, 0]] * 10  # 4 is 1's equal, 5 is 0's
    noisy_TE = logits_TE * (1 + 1e-6 * torch.randn(logits_TE.shape, generator=generator))
    one, two = keep_best(logits_TE, 3), keep_best(noisy_TE, 3)
    assert torch.equal(one[1].sort().values, two[1].sort().values)
    torch.testing.assert_close(one[0], two[0], atol=1e-4, rtol=1e-4)
    chosen_TE = one[0] > 0
    assert not (chosen_TE[:, 4] & ~chosen_TE[:, 1]).any() and not (chosen_TE[:, 5] & ~chosen_TE[:, 0]).any()
    assert (chosen_TE[:, 0] & ~chosen_TE[:, 5]).any()  # one of two equals is enough for some


def test_experts_that_hear_only_each_other_do_not_toss_a_coin() -> None:
    """Without residual they get the same row of S, so the same logit at every token, whatever was trained."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(models.FAMILIES["llama"])
    adapter = inject(model, config_of("graphlora"))
    for module in adapter.modules():
        if hasattr(module, "edges"):
            module.edges.zero_()
            module.edges[0, 6] = module.edges[6, 0] = 1
    with RoutingCollector(model) as collector, torch.no_grad():
        model(torch.randint(0, 256, (4, 60)))
    alone = 0
    for r in [r for r in collector.records if r.routing.weights_TE.shape[1] == 8]:
        torch.testing.assert_close(r.routing.probs_TE[:, 0], r.routing.probs_TE[:, 6])
        chosen_TE = r.routing.weights_TE > 0
        assert not (chosen_TE[:, 6] & ~chosen_TE[:, 0]).any()
        alone += int((chosen_TE[:, 0] & ~chosen_TE[:, 6]).sum())
    assert alone > 50  # where rounding chose, it was often the other


def test_an_expert_that_is_ruled_out_stays_out() -> None:
    logits_TE = torch.tensor([[1.0, -torch.inf, 0.0, 2.0]])
    weights_TE, selected_TK = keep_best(logits_TE, 2)
    assert selected_TK.tolist() == [[3, 0]]
    torch.testing.assert_close(weights_TE, torch.tensor([[0.26894143, 0, 0, 0.7310586]]))
