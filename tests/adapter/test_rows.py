"""Rows of one batch with adapters of their own, and threads that share a model."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from talklora_pl import AdapterConfig, RoutingCollector, adapter_rows, disable_adapter, remove_adapter, set_adapter
from talklora_pl.errors import UserError
from tests.conftest import tiny_llama
from tests.export.models import train
from tests.methods.test_configs import config_of

IDS = torch.randint(3, 60, (5, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < torch.tensor([[7], [5], [7], [3], [6]])).long()
NAMES = ["one", "two", "__base__", "one", "three"]
METHODS = ["talklora", "mixlora", "graphlora", "lossfree"]


def model_with(methods: list[str], model: PreTrainedModel | None = None, **changes: Any) -> PreTrainedModel:
    model = tiny_llama() if model is None else model
    for seed, (name, method) in enumerate(zip(("one", "two", "three"), methods)):
        train(model, replace(config_of(method), **changes), seed, name)
    return model.eval()


def one_by_one(model: PreTrainedModel, names: list[str]) -> torch.Tensor:
    """Each row's logits where there are tokens."""
    out = []
    for i, name in enumerate(names):
        call = {"input_ids": IDS[i : i + 1], "attention_mask": MASK[i : i + 1]}
        if name == "__base__":
            with disable_adapter(model):
                out.append(model(**call).logits[0][MASK[i].bool()])
        else:
            set_adapter(model, name)
            out.append(model(**call).logits[0][MASK[i].bool()])
    return torch.cat(out)


def check(model: PreTrainedModel, names: list[str] = NAMES) -> None:
    with torch.no_grad():
        wanted = one_by_one(model, names)
        set_adapter(model, "two")
        got = model(input_ids=IDS, attention_mask=MASK, adapter_names=names).logits[MASK.bool()]
        after = model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    assert (wanted - after).abs().max() > 0.01  # the adapters differ, and the one that was on is on again


@pytest.mark.parametrize(
    "methods", [["talklora"] * 3, ["talklora", "mixlora", "lossfree"], ["graphlora", "lora", "mola"]]
)
def test_equal_to_one_by_one(methods: list[str]) -> None:
    """Linears and whole feed-forward blocks, in one batch."""
    check(model_with(methods))


def test_a_decision_for_a_whole_block() -> None:
    talklora = config_of("talklora")
    model = model_with(["talklora", "mola"], targets="all-linear")
    train(model, replace(talklora, targets="all-linear", router=replace(talklora.router, per="block")), 5, "three")
    check(model.eval())


def test_a_model_that_flattens_its_tokens() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16)).eval()
    check(model_with(["talklora", "lora", "mola"], model, targets="all-linear"))


def test_generation_also_with_beams() -> None:
    model, names = model_with(["talklora"] * 3), ["one", "two", "__base__", "one", "three"]
    ids = IDS[:, :4]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 63}
    for beams in (1, 3):
        with adapter_rows(model, names):
            got = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=beams, **options)
        for i, name in enumerate(names):
            with adapter_rows(model, [name]):
                alone = model.generate(ids[i : i + 1], attention_mask=torch.ones(1, 4), num_beams=beams, **options)
            assert got[i, : alone.shape[1]].tolist() == alone[0].tolist()


def test_what_cannot_be_of_some_rows_is_refused() -> None:
    model = model_with(["talklora"] * 2)
    with pytest.raises(UserError, match="no adapter 'four'"):
        model(IDS, adapter_names=["four"] * 5)
    for names in ([], ["one"]):
        with pytest.raises(UserError, match=f"{len(names)} names do not fit a batch with 5 rows"):
            model(IDS, adapter_names=names)
    with pytest.raises(UserError, match="3 names do not fit a batch with 5 rows"):
        model(IDS, adapter_names=["one", "two", "one"])
    with pytest.raises(UserError, match="eval mode"):
        model.train()(IDS, adapter_names=["one"] * 5)
    with RoutingCollector(model.eval()), pytest.raises(UserError, match="cannot be collected"):
        model(IDS, adapter_names=["one"] * 5)
    train(model, AdapterConfig(rank=8, modules_to_save=["lm_head"]), name="head")
    with pytest.raises(UserError, match="head or tokens of its own"):
        model.eval()(IDS, adapter_names=["head"] * 5)
    assert not model.talklora.switch.running and not model.talklora.switch.calls  # nothing is left of the refusals


def test_a_copy_and_a_model_without_adapters_are_whole() -> None:
    model = model_with(["talklora"] * 3)
    check(copy.deepcopy(model))
    for name in ("one", "two", "three"):
        remove_adapter(model, name)
    assert not model._forward_pre_hooks and not model._forward_hooks


class Meeting:
    """A forward pass that waits inside for another thread."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.hook = model.lm_head.register_forward_hook(self.wait)
        self.thread = threading.Thread(target=lambda: model(IDS))

    def wait(self, *_: Any) -> None:
        if threading.current_thread() is self.thread:
            self.inside.set()
            assert self.go_on.wait(60)

    def __enter__(self) -> None:
        self.thread.start()
        assert self.inside.wait(60)

    def __exit__(self, *_: Any) -> None:
        self.go_on.set()
        self.thread.join()
        self.hook.remove()


def test_no_switch_while_another_thread_runs(tmp_path: Path) -> None:
    model = model_with(["talklora"] * 2)
    set_adapter(model, "one")
    with Meeting(model):
        model(IDS)  # two at once are no problem
        for switch in (lambda: set_adapter(model, "two"), lambda: model(IDS, adapter_names=["one"] * 5)):
            with pytest.raises(UserError, match="Another thread is running this model"):
                switch()
        with pytest.raises(UserError, match="Another thread"), disable_adapter(model):
            pass
        set_adapter(model, "one")  # no switch
    set_adapter(model, "two")
    with adapter_rows(model, ["one"] * 5):
        errors: list[BaseException] = []

        def run() -> None:
            try:
                model(IDS)
            except UserError as e:
                errors.append(e)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert "rows of several adapters" in str(errors[0])
    assert not model.talklora.switch.running
