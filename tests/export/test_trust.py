"""What a folder cannot do, and what is said when it is not what it should be."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from talklora_pl import AdapterConfig, UserError, export_adapter, load_adapter, save_adapter
from talklora_pl.adapter.metadata import read_metadata
from tests.export import models
from tests.export.models import unsigned

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return models.save_base(tmp_path / "base", "llama")


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """An exported TalkLoRA."""
    model = models.load(base)
    models.train(model, AdapterConfig(rank=8))
    return unsigned(export_adapter(model, tmp_path / "adapter", tokenizer=AutoTokenizer.from_pretrained(base)))


def change(file: Path, **values: Any) -> None:
    """Set entries of a JSON file; dots go into nested ones."""
    data = json.loads(file.read_text())
    for path, value in values.items():
        *way, last = path.split("__")
        place = data
        for key in way:
            place = place[key]
        place[last] = value
    file.write_text(json.dumps(data))


def change_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    """Replace tensors, with a right digest."""
    file = folder / "adapter.safetensors"
    save_file(load_file(file) | tensors, file)
    change(folder / "talklora.json", tensors_sha256=sha256(file.read_bytes()).hexdigest())


def grow(folder: Path, numbers: int) -> None:
    """One more tensor of so many float32 numbers, as a hole in the file: it takes no room on the disk."""
    file = folder / "adapter.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, end = json.loads(data[8 : 8 + length]), len(data) - 8 - length
    header["x"] = {"dtype": "F32", "shape": [numbers], "data_offsets": [end, end + 4 * numbers]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    os.truncate(file, 8 + len(text) + end + 4 * numbers)


def test_no_pattern_of_a_file_is_run(base: Path, folder: Path) -> None:
    want = models.logits(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))
    change(folder / "talklora.json", adapter__targets="(.*.*.*.*.*.*.*)*x", adapter__exclude="((a*)*)*b")
    model = models.load(base)
    load_adapter(model, folder)
    assert torch.equal(models.logits(model), want)
    assert model.talklora["default"].config.targets == "(.*.*.*.*.*.*.*)*x"  # remembered, for saving again


MISTAKES: dict[str, tuple[Any, str]] = {
    "newer format": (
        lambda f: change(f / "talklora.json", format_version=2),
        "format version 2.*reads version 1.*newer",
    ),
    "no version": (lambda f: change(f / "talklora.json", format_version=None), "format version None"),
    "missing JSON": (lambda f: (f / "talklora.json").unlink(), "no adapter folder: there is no talklora.json"),
    "missing tensors": (lambda f: (f / "adapter.safetensors").unlink(), "there is no adapter.safetensors"),
    "truncated": (lambda f: os.truncate(f / "adapter.safetensors", 3000), "damaged or not a safetensors file"),
    "cut JSON": (lambda f: os.truncate(f / "talklora.json", 300), "talklora.json is not readable as JSON"),
    "unknown part": (
        lambda f: change(f / "talklora.json", adapter__communication={"name": "talkin"}),
        "Unknown communication 'talkin'.* Did you mean 'talking'.*plugins",
    ),
    "an importable path": (
        lambda f: change(f / "talklora.json", adapter__router={"name": "os.system"}),
        "Unknown router 'os.system'",
    ),
    "wrong type": (lambda f: change(f / "talklora.json", adapter__rank="8"), "rank must be int .* got '8'"),
    "too many experts": (
        lambda f: change(f / "talklora.json", **{"experts_per_layer__model.layers.0.mlp.up_proj": 10**9}),
        "not a number of experts",
    ),
    "no number": (
        lambda f: (f / "talklora.json").write_text(
            (f / "talklora.json").read_text().replace('"alpha": ', '"alpha": 1e999, "was": ')
        ),
        "1e999 is too large for a number",
    ),
    "a tensor larger than any memory": (lambda f: grow(f, 2**40), "damaged or not a safetensors file"),
    "a huge rank": (
        lambda f: change(f / "talklora.json", adapter__rank=4 * 10**9),
        "more than the tensors in the file",
    ),
    "another rank": (
        lambda f: change(f / "talklora.json", adapter__rank=12),
        r"shape \[.*\] in the file, but the model",
    ),
    "another module": (
        lambda f: change(f / "talklora.json", **{"experts_per_layer__model.layers.9.mlp.up_proj": 4}),
        "no module 'model.layers.9.mlp.up_proj'",
    ),
    "a further tensor": (lambda f: change_tensors(f, x=torch.zeros(2)), "'x' that the model has no place for"),
    "a tensor of the base": (
        lambda f: change_tensors(f, **{"base.model.norm.weight": torch.zeros(9)}),
        r"'base.model.norm.weight' has shape \[9\]",
    ),
    "a FIFO": (
        lambda f: ((f / "talklora.json").unlink(), os.mkfifo(f / "talklora.json")),
        "no adapter folder: there is no talklora.json",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_clear_error_and_an_untouched_model(mistake: str, base: Path, folder: Path) -> None:
    spoil, message = MISTAKES[mistake]
    model = models.load(base)
    want = models.logits(model)
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load_adapter(model, folder)
    assert not hasattr(model, "talklora") and torch.equal(models.logits(model), want)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("../base", "neither a hub name nor a full path"),
        ("/tmp/../etc", "neither a hub name nor a full path"),
        ("package:../../etc/x", "neither a hub name nor a full path"),
        ("/nowhere/base", "is not on this machine; pass base="),
        (None, "does not say what the base is; pass base="),
        (["a"], "does not say what the base is"),
        ("nobody/nothing", "The adapter's base 'nobody/nothing' cannot be loaded.*base="),
    ],
)
def test_where_the_base_is(named: Any, message: str, folder: Path, base: Path) -> None:
    change(folder / "config.json", base_model_name_or_path=named)
    with pytest.raises(UserError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    want = models.logits(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, base=str(base)))
    loaded = models.load(base)
    got = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, base=loaded)
    assert got is loaded and torch.equal(models.logits(got), want)


def test_another_base_is_refused_by_from_pretrained(folder: Path, tmp_path: Path) -> None:
    other = models.save_base(tmp_path / "other", "llama", seed=1)
    with pytest.raises(UserError, match="trained on other weights"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, base=str(other))


def test_classes_that_the_head_does_not_have_take_no_memory(tmp_path: Path) -> None:
    base = models.save_base(tmp_path / "base", "bert")
    model = models.load(base, "bert")
    models.train(model, AdapterConfig(targets="all-linear", rank=8, modules_to_save=["classifier"]))
    folder = unsigned(export_adapter(model, tmp_path / "adapter"))
    change(folder / "config.json", id2label={i: f"L{i}" for i in range(100_000)})
    with pytest.raises(UserError, match="no trained head in the folder has 100000 classes"):
        AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)


def test_options_of_from_pretrained_reach_the_base(folder: Path) -> None:
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager", "output_attentions": True}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    assert model(models.IDS).attentions is not None
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and hasattr(model, "talklora")


def test_pipeline(folder: Path) -> None:
    write = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    got = write("a b c", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    model, ids = write.model, write.tokenizer("a b c", return_tensors="pt").input_ids
    want = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert hasattr(model, "talklora") and got == write.tokenizer.decode(want, skip_special_tokens=True)


def test_without_the_package_it_says_what_to_install(folder: Path, tmp_path: Path) -> None:
    program = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "talklora_pl":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name="talklora_pl")

sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    assert "not installed here: pip install talklora-pl" in done.stderr


def test_no_file_in_the_folder_is_for_peft(folder: Path) -> None:
    """transformers would take adapter_config.json for PEFT's and fail."""
    assert not (folder / "adapter_config.json").exists() and not (folder / "peft").exists()


def test_export_replaces_adapters_only_and_whole(folder: Path, base: Path, tmp_path: Path) -> None:
    model = models.load(base)
    models.train(model, AdapterConfig(rank=8), seed=5)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(UserError, match="adapter could not be written: disk full"):
        export_adapter(model, folder, tokenizer=Broken())  # type: ignore[arg-type]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    (folder / "old").write_text("")
    export_adapter(model, folder)
    assert not (folder / "old").exists() and not list(tmp_path.glob(".adapter*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="exists and is no adapter folder"):
        export_adapter(model, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


def test_replacing_a_folder(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder goes only when the new one is in its place; nothing is left beside it."""
    model = models.load(base)
    models.train(model, AdapterConfig(rank=8), seed=5)
    before = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    rename = Path.rename

    def no_new_one(self: Path, place: Path) -> Path:
        if place == folder and (self / "adapter.safetensors").read_bytes() != before["adapter.safetensors"]:
            raise OSError("no permission")
        return rename(self, place)

    with monkeypatch.context() as m:
        m.setattr(Path, "rename", no_new_one)
        with pytest.raises(UserError, match=r"no permission\. What was there before is untouched"):
            export_adapter(model, folder)
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    export_adapter(model, folder)
    again = models.load(base)
    load_adapter(again, folder)
    assert torch.equal(models.logits(again), models.logits(model))
    assert not list(folder.parent.glob(".adapter*"))


def test_save_and_load_again_keeps_everything(base: Path, folder: Path, tmp_path: Path) -> None:
    model = models.load(base)
    load_adapter(model, folder)
    save_adapter(model, tmp_path / "again")
    one, two = (json.loads((unsigned(f) / "talklora.json").read_text()) for f in (folder, tmp_path / "again"))
    assert one == two


def test_a_flipped_bit_is_found(base: Path, tmp_path: Path) -> None:
    """In what is beside the tensors too, unless it changes nothing that is said."""
    model = models.load(base)
    models.train(model, AdapterConfig(rank=8))
    folder = export_adapter(model, tmp_path / "adapter", tokenizer=AutoTokenizer.from_pretrained(base))
    want, rng, same = read_metadata(folder), random.Random(0), 0
    for file in sorted(folder.iterdir()):
        if file.is_dir() or file.name in ("adapter.safetensors", "README.md"):
            continue
        whole = file.read_bytes()
        for _ in range(40):
            at, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
            file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            try:
                assert read_metadata(folder) == want, (file.name, at)
                same += file.name == "talklora.json"  # a blank between two entries, the name of a digest
                assert file.name == "talklora.json", (file.name, at)
            except UserError:
                pass
        file.write_bytes(whole)
    assert same < 30 and read_metadata(folder) == want
    (folder / "README.md").write_text("mine")  # a card is there to be edited
    (folder / "tokenizer.json").unlink()  # and not everybody needs a tokenizer
    load_adapter(models.load(base), folder)
