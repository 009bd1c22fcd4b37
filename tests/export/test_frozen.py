"""Format version 1 is frozen: tensor names, shapes and types of every method, and an old folder that keeps loading.

A method file that is new has no frozen names yet: ``python -m tests.export.test_frozen`` writes those of new ones. It
never changes a file that is there: where a name has to change, the format version has to, too, and the old one has to
be read.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from talklora_pl import AdapterConfig, load_adapter
from talklora_pl.adapter.files import FORMAT_VERSION
from talklora_pl.adapter.inject import inject
from talklora_pl.adapter.io import adapter_tensors
from tests.export import models
from tests.methods.test_configs import METHODS, config_of

FOLDER = Path(__file__).parent / "frozen"
OLD = FOLDER / "v1"
FURTHER = {"head": AdapterConfig(rank=8, modules_to_save=["lm_head"])}


def tensors(method: str) -> dict[str, str]:
    """Type and shape of every tensor in a method's file, by name."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(models.FAMILIES["llama"])
    inject(model, FURTHER[method] if method in FURTHER else config_of(method))
    return {k: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for k, t in adapter_tensors(model).items()}


def one_layer(found: dict[str, str]) -> dict[str, str]:
    """Those of the first decoder layer and of no layer: the others have the same names."""
    return {k: v for k, v in found.items() if ".layers." not in k or ".layers.0." in k}


@pytest.mark.parametrize("method", [*METHODS, *FURTHER])
def test_names_are_frozen(method: str) -> None:
    assert FORMAT_VERSION == 1
    file = FOLDER / f"{method}.json"
    assert file.exists(), "a new method; freeze its names with: python -m tests.export.test_frozen"
    found = tensors(method)
    assert one_layer(found) == json.loads(file.read_text())
    assert {k.replace(".layers.1.", ".layers.0.") for k in found} == set(one_layer(found))


@pytest.mark.parametrize("method", ["talklora", "graphlora", "lossfree"])
def test_an_old_adapter_keeps_loading(method: str) -> None:
    """Written when format version 1 was new, with its base."""
    model = models.load(OLD / "base")
    load_adapter(model, OLD / method)
    want: Tensor = load_file(OLD / "expected.safetensors")[method]
    assert torch.allclose(models.logits(model), want, atol=1e-5)


def freeze() -> None:
    """Write what is not there yet."""
    from safetensors.torch import save_file

    from talklora_pl import save_adapter

    for method in [*METHODS, *FURTHER]:
        file = FOLDER / f"{method}.json"
        if not file.exists():
            file.write_text(json.dumps(one_layer(tensors(method)), indent=1) + "\n")
            print(file.name)
    if not OLD.exists():
        models.save_base(OLD / "base", "llama")
        for file in (OLD / "base").iterdir():
            if file.name not in ("config.json", "model.safetensors"):
                file.unlink()
        expected = {}
        for method in ("talklora", "graphlora", "lossfree"):
            model = models.load(OLD / "base")
            models.train(model, config_of(method))
            save_adapter(model, OLD / method, name_or_path="")
            expected[method] = models.logits(model)
        save_file(expected, OLD / "expected.safetensors")


if __name__ == "__main__":
    freeze()
