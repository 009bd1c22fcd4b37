"""Adapters of another trainer as experts: the mixture begins as their mean, and every expert can learn."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import talklora_pl
from talklora_pl import FineTuner
from talklora_pl.adapter import AdapterConfig, inject
from talklora_pl.adapter.upcycle import Upcycled, say_what_is_taken
from talklora_pl.base import BaseModel
from talklora_pl.cli import main
from talklora_pl.communication.identity import NoCommunication
from talklora_pl.communication.talking import Talking
from talklora_pl.errors import UserError
from talklora_pl.experts.lora import LoRA, SplitLoRA
from talklora_pl.experts.shared_b import SharedB
from talklora_pl.objectives.preference import Preference
from talklora_pl.routers.loss_free import LossFree
from talklora_pl.routers.softmax import Softmax, Uniform
from talklora_pl.routers.team import Team
from talklora_pl.routers.top_k import NoisyTopK, TopK
from tests.export import models

OPTIONS: dict[str, Any] = {"experts": LoRA(), "communication": Talking(), "router": Softmax(), "dropout_input": 0.0}


def peft_folder(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """A LoRA that PEFT wrote, as if trained."""
    model = get_peft_model(models.load(base), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A base, and three adapters that differ in rank, alpha and modules; the last has two ranks."""
    root = tmp_path_factory.mktemp("upcycle")
    base = models.save_base(root / "base", "llama")
    folders = [
        peft_folder(base, root / "one", 1, r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        peft_folder(base, root / "two", 2, r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"]),
        peft_folder(
            base, root / "three", 3, r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"],
            rank_pattern={"v_proj": 5}, alpha_pattern={"v_proj": 5},
        ),
    ]  # fmt: skip
    return base, [str(f) for f in folders]


@torch.no_grad()
def mixed(base: Path, folders: list[str], shares: list[float]) -> Tensor:
    """Logits of the base with the weighted sum of the adapters in its weights."""
    model = models.load(base)
    for folder, share in zip(folders, shares):
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        options = json.loads((Path(folder) / "adapter_config.json").read_text())
        for key, A in tensors.items():
            if ".lora_A." not in key:
                continue
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alpha = options["alpha_pattern"].get(name.rpartition(".")[2], options["lora_alpha"])
            delta = tensors[key.replace("lora_A", "lora_B")] @ A * (alpha / len(A))
            model.get_submodule(name).weight.add_(share * delta)
    return models.logits(model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": Softmax(scores="x"), "communication": NoCommunication()},
        {"router": Softmax(scores="per_expert")},
        {"router": Uniform(), "communication": NoCommunication()},
        {"router": Team()},
        {"router": TopK(k=3)},
        {"router": NoisyTopK(k=4)},
        {"router": LossFree(k=3)},
        {"experts": SplitLoRA()},
        {"router": Softmax(scores="x", per="block"), "communication": NoCommunication()},
        {"init_weights": [0.5, 0.2, -0.1]},
    ],
)
def test_the_mixture_begins_as_the_mean(three: tuple[Path, list[str]], options: dict[str, Any]) -> None:
    base, folders = three
    model = models.load(base)
    if getattr(options.get("router"), "per", "") == "block":  # such a block needs a module that takes its own input
        folders = [f for f in folders if not f.endswith("two")]
    adapter = inject(model, AdapterConfig(**OPTIONS | options, init_from=folders, rank=64, targets="nothing"))
    model.eval()
    assert adapter.config.expert_rank == 5 and set(adapter.experts_per_layer.values()) == {len(folders)}
    shares = options.get("init_weights") or [1 / len(folders)] * len(folders)
    want = mixed(base, folders, shares)
    assert (want - models.logits(models.load(base))).abs().max() > 0.01
    assert torch.allclose(models.logits(model), want, atol=1e-5)


def test_everything_learns_from_there(three: tuple[Path, list[str]]) -> None:
    base, folders = three
    model = models.load(base)
    adapter = inject(model, AdapterConfig(**OPTIONS, init_from=folders))
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(models.IDS, labels=models.IDS).loss.backward()
        optimizer.step()
    for name, p in adapter.named_parameters():
        assert p.grad is not None
        if name.endswith("experts.B"):  # rows that were filled up, and experts whose adapter lacks the module, too
            assert (p.grad.abs().amax(-1) > 0).all(), name
    weights = [p for n, p in adapter.named_parameters() if n.endswith("router.scores.weight")]
    assert weights and all(w.grad.abs().max() > 0 and w.abs().max() > 0 for w in weights)


def test_one_adapter_as_unequal_copies_of_itself(three: tuple[Path, list[str]]) -> None:
    base, (_, two, _) = three
    model, other = models.load(base), models.load(base)
    torch.manual_seed(1)
    adapter = inject(model, AdapterConfig(**OPTIONS, init_from=[two], num_experts=4))
    model.eval()
    assert torch.allclose(models.logits(model), mixed(base, [two], [1.0]), atol=1e-5)
    A = adapter.layers.get_submodule("model.layers.0.self_attn.q_proj").experts.A
    assert all((A[i] - A[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    torch.manual_seed(1)
    again = inject(other, AdapterConfig(**OPTIONS, init_from=[two], num_experts=4))
    assert torch.equal(again.layers.get_submodule("model.layers.0.self_attn.q_proj").experts.A, A)


def test_where_it_began_is_not_kept_with_the_adapter(three: tuple[Path, list[str]]) -> None:
    base, folders = three
    adapter = inject(models.load(base), AdapterConfig(**OPTIONS, init_from=folders))
    data = adapter.config.to_dict()
    assert not any(key.startswith("init_") for key in data) and folders[0] not in json.dumps(data)
    assert AdapterConfig.from_dict(data) == replace(adapter.config, init_from=[])
    with pytest.raises(UserError, match="has no option 'init_from'"):
        AdapterConfig.from_dict({**data, "init_from": ["/etc"]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": TopK(k=2)}, ["router 'top_k' selects 2 of 3 experts, so that no token gets the mean of all"]),
        ({"router": LossFree(k=1)}, ["router 'loss_free' selects 1 of 3"]),
        ({"experts": SharedB(), "experts_see_talk": True}, ["set experts to lora", "experts_see_talk"]),
        ({"init_from": ["nowhere", "none"], "experts": SharedB()}, ["nowhere", "none", "set experts to lora"]),
        ({"init_weights": [1.0]}, ["1 numbers for 3 folders"]),
        ({"init_weights": [1.0, math.nan, 0.0]}, ["init_weights must be numbers"]),
        ({"init_from": ["one", "two", "one"]}, ["one is named twice: equal experts would stay equal"]),
        ({"init_noise": 0.1}, ["for the copies of a single folder"]),
    ],
)
def test_what_cannot_be_its_mean_is_refused(
    three: tuple[Path, list[str]], options: dict[str, Any], words: list[str]
) -> None:
    base, folders = three
    model = models.load(base)
    with pytest.raises(UserError) as e:
        inject(model, AdapterConfig(**OPTIONS | {"init_from": folders} | options))
    assert all(word in str(e.value) for word in words), e.value
    assert not hasattr(model, "talklora")


def test_a_run_from_two_adapters(three: tuple[Path, list[str]], tmp_path: Path, capsys: Any) -> None:
    base, folders = three
    rows = [{"prompt": f"{i} and one?", "completion": str(i + 1)} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = ["fit", "--config", "method/mola", "--model.base.path", str(base), "--model.base.dtype", "float32"]
    args += ["--model.adapter.init_from", json.dumps(folders[:2]), "--data.train", str(tmp_path / "rows.jsonl")]
    args += ["--data.val_size", "2", "--data.batch_size", "2", "--data.max_length", "32", "--trainer.max_steps", "1"]
    args += ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "runs")]
    args += ["--trainer.enable_progress_bar", "false", "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr", "0"]
    assert main([*args, "--model.adapter.allocation=uniform", "--model.adapter.router.k", "1"]) == 2
    assert "selects 1 of 2 experts" in capsys.readouterr().err and not list(tmp_path.glob("runs/**/*.ckpt"))
    assert main([*args, "--model.adapter.allocation=uniform", "--model.adapter.router=softmax"]) == 0
    saved = torch.load(tmp_path / "runs/version_0/checkpoints/last.ckpt", weights_only=True)
    other = load_file(Path(folders[1]) / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    A = saved["state_dict"][f"model.talklora.default.layers.{name}.experts.A"]
    assert torch.equal(A[1], other[f"base_model.model.{name}.lora_A.weight"])
    assert saved["talklora"]["adapter"]["num_experts"] == 2 and "init_from" not in saved["talklora"]["adapter"]


def test_a_method_takes_it(three: tuple[Path, list[str]]) -> None:
    _, folders = three
    config = talklora_pl.method("loramoe", init_from=folders, init_weights=[0.5, 0.2, 0.3])
    assert (config.init_from, config.init_weights) == (folders, [0.5, 0.2, 0.3])


def test_the_base_of_the_adapters_by_another_path_is_the_same(
    three: tuple[Path, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, folders = three
    config = AdapterConfig(**OPTIONS, init_from=folders)
    upcycled = Upcycled.read(config)
    upcycled.adapters[0].options["base_model_name_or_path"] = str(base)
    monkeypatch.chdir(base.parent)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        say_what_is_taken(upcycled, upcycled.config(config), base.name)
        assert not said
        say_what_is_taken(upcycled, upcycled.config(config), "another/base")
        assert "another/base" in str(said[0].message)


def test_dpo_compares_with_the_mixture_that_it_began_from(three: tuple[Path, list[str]]) -> None:
    base, folders = three
    config = AdapterConfig(**OPTIONS, init_from=folders)
    tuner = FineTuner(BaseModel(str(base), dtype="float32"), adapter=config, objective=Preference())
    tuner.configure_model()
    rows = {"input_ids": [[[5, 6, 7, 8], [5, 6, 9]]], "labels": [[[-100, -100, 7, 8], [-100, -100, 9]]], "label": [0]}
    loss, pairs, observed = tuner.objective.loss(tuner.model, Preference().collate(rows, 0, True))
    assert (loss / pairs).item() == pytest.approx(math.log(2), abs=1e-5) and abs(observed["rewards/chosen"]) < 1e-5


def test_noise_does_not_depend_on_the_default_device(three: tuple[Path, list[str]]) -> None:
    base, folders = three
    config, drawn = AdapterConfig(**OPTIONS, init_from=folders[:1]), []
    for device in ("cpu", "meta"):
        model = models.load(base)
        with torch.device(device):
            drawn.append(inject(model, config, device=torch.device("cpu")).state_dict())
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=0)
