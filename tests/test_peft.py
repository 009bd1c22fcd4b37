"""Adapters of this package in PEFT's words: what PEFT promises of its own types holds of them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from talklora_pl import load_adapter, save_adapter
from talklora_pl.errors import UserError
from tests.conftest import tiny_llama
from tests.data.tiny import save_model

peft = pytest.importorskip("peft")
bridge = pytest.importorskip("talklora_pl.peft")

IDS = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(0))
OPTIONS = {"expert_rank": 2}


def fresh(method: str = "talklora", **options: Any) -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_llama(), bridge.TalkLoraConfig(method=method, options=OPTIONS | options))
    return model.eval()


def randomise(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".talklora." in name and tensor.is_floating_point():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


@pytest.mark.parametrize("method", ["talklora", "mixlora", "graphlora", "lossfree", "alphalora"])
def test_saved_and_loaded_is_the_same(method: str, tmp_path: Path) -> None:
    """Also where experts are allocated, where blocks decide, and where a router has buffers."""
    model = randomise(fresh(method, **({} if method != "alphalora" else {"num_experts": 3})))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)  # sums may be in another order
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    trainable = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    names = [n for n, p in trainable.named_parameters() if p.requires_grad]
    assert names and all(".talklora.default." in n for n in names)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {k.removeprefix("base_model.model.talklora.") for k in saved} == set(model.talklora["default"].state_dict())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "TALKLORA" and config["method"] == method and config["options"]["targets"]


def test_a_fresh_adapter_is_the_base_and_off_is_the_base() -> None:
    base = logits(tiny_llama())
    model = fresh()
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-6)
    randomise(model)
    assert (logits(model) - base).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model), base) and model.get_model_status().enabled is False
        with model.disable_adapter():
            pass
        assert torch.equal(logits(model), base)
    assert (logits(model) - base).abs().max() > 0.01
    assert torch.equal(logits(model.unload()), base)


def test_only_the_adapter_learns() -> None:
    model = fresh()
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    ours = {n for n in before if ".talklora.default." in n}
    assert changed <= ours and len(changed) > len(ours) / 2 and all(before[n].requires_grad for n in ours)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.talklora.parameters()) < total


def test_several_adapters(tmp_path: Path) -> None:
    model = randomise(fresh(), 1)
    first = logits(model)
    model.add_adapter("other", bridge.TalkLoraConfig(method="mixlora", options=OPTIONS))
    assert torch.equal(logits(model), first) and model.active_adapter == "default"
    assert not any(p.requires_grad for p in model.talklora["other"].parameters())
    randomise(model, 2)
    one = logits(model)
    model.set_adapter("other")
    two = logits(model)
    status = model.get_model_status()
    assert status.active_adapters == ["other"] and status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": False, "other": True}
    mixed = logits(model, adapter_names=["default", "other", "__base__"])
    base = logits(tiny_llama())
    torch.testing.assert_close(mixed, torch.stack([one[0], two[1], base[2]]), rtol=0, atol=1e-5)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    both = model.generate(input_ids=IDS, adapter_names=["default", "other", "__base__"], **options)
    model.set_adapter("default")
    assert torch.equal(model.generate(input_ids=IDS[:1], **options)[0], both[0][: 6 + 3])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "other/adapter_config.json").is_file()
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    assert torch.equal(logits(again), one)
    again.set_adapter("other")
    assert torch.equal(logits(again), two)
    again.delete_adapter("other")
    again.set_adapter("default")
    assert torch.equal(logits(again), one) and list(again.peft_config) == ["default"]


def test_the_same_adapter_as_a_folder_of_ours(tmp_path: Path) -> None:
    model = randomise(fresh())
    save_adapter(model.get_base_model(), tmp_path, name_or_path="")
    plain = tiny_llama()
    load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain.eval()), logits(model))


def test_what_merges(tmp_path: Path) -> None:
    lora = randomise(fresh("lora"))
    wanted = logits(lora)
    torch.testing.assert_close(logits(lora.merge_and_unload()), wanted, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="router"):
        fresh().merge_and_unload()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """PEFT itself would skip a tensor that is missing or has another name."""
    with pytest.raises(UserError, match="no method 'talk'"):
        fresh("talk")
    with pytest.raises(UserError, match="modules_to_save"):
        peft.get_peft_model(tiny_llama(), bridge.TalkLoraConfig(modules_to_save=["lm_head"]))
    model = fresh()
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    for change, said in (({name: None}, "lacks tensor"), ({"base_model.model.talklora.x": torch.ones(1)}, "foreign")):
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, file, {"format": "pt"})
        with pytest.raises(UserError, match=said):
            peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.slow
def test_in_a_fresh_process(tmp_path: Path) -> None:
    save_model(tmp_path / "base", initializer_range=0.2)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = randomise(peft.get_peft_model(base, bridge.TalkLoraConfig(options=OPTIONS))).eval()
    model.save_pretrained(tmp_path / "adapter")
    code = (
        "import sys, torch, talklora_pl.peft\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(model(torch.tensor([[3, 4, 5]])).logits.double().sum().item())"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "adapter")]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    with torch.no_grad():
        wanted = model(torch.tensor([[3, 4, 5]])).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(wanted, rel=1e-6)


def test_without_peft_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['peft'] = None; import talklora_pl.peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: talklora_pl.peft needs the package peft: pip install 'talklora-pl[peft]'." in done.stderr


def test_whoever_turns_off_dropout_modules_turns_off_ours() -> None:
    """TRL's DPOTrainer does so, that policy and reference differ by what was learned alone."""
    model = randomise(fresh(dropout_input=0.5, dropout_routing=0.5, dropout_output=0.5))
    wanted = logits(model)
    model.train()
    assert not torch.allclose(logits(model), wanted)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    torch.testing.assert_close(logits(model), wanted)
    copied = copy.deepcopy(fresh(dropout_input=0.5)).get_base_model().talklora["default"]
    copied.dropouts.p = 0.25
    assert {m.dropout_input for m in copied.layers.modules() if hasattr(m, "dropout_input")} == {0.25}
