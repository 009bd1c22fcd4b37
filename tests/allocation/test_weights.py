"""Reading checkpoints: sharded, damaged, incomplete; the cache; and the memory it takes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from talklora_pl.allocation import cache
from talklora_pl.allocation.cache import cache_file, exponents
from talklora_pl.base.weights import ModuleWeights, SafetensorsWeights
from talklora_pl.errors import UserError

Q1 = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def folder(llama, tmp_path, monkeypatch) -> Path:
    """A checkpoint in several shards, with a cache of its own."""
    monkeypatch.setattr(cache, "cache_root", lambda: tmp_path / "cache")
    llama.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


def linears(model: torch.nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name]


def test_files_equal_the_live_model(llama, folder):
    files, live = SafetensorsWeights(folder), ModuleWeights(llama)
    for name in linears(llama):
        assert torch.equal(files.matrix(name), live.matrix(name))
    assert exponents(files, linears(llama)) == exponents(live, linears(llama))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_and_odd_offsets(tmp_path, dtype):
    weight = torch.randn(37, 53).to(dtype)
    save_file({"a.x.weight": torch.zeros(3, dtype=torch.uint8), "b.y.weight": weight}, tmp_path / "w.safetensors")
    assert torch.equal(SafetensorsWeights(tmp_path / "w.safetensors").matrix("b.y"), weight)


def test_names_with_another_prefix(folder):
    weights = SafetensorsWeights(folder)
    for name in ("layers.1.self_attn.q_proj", "language_model." + Q1):
        assert torch.equal(weights.matrix(name), weights.matrix(Q1))
    with pytest.raises(UserError, match="matches several"):
        weights.matrix("q_proj")
    with pytest.raises(
        UserError, match=r"not in the checkpoint. Did you mean 'model.layers.1.self_attn.q_proj.weight'"
    ):
        weights.matrix("model.layers.1.self_attn.q_porj")


def test_transposed_conv1d(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=16))
    model.save_pretrained(tmp_path)
    name = "transformer.h.0.mlp.c_fc"
    assert exponents(SafetensorsWeights(tmp_path), [name])[name] == exponents(ModuleWeights(model), [name])[name]


def test_missing_shard(folder):
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"1 of .* shards are missing: model-00002"):
        SafetensorsWeights(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"shards are there, and no model.safetensors.index.json"):
        SafetensorsWeights(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-100]), "cut short"),
        (lambda f: f.write_bytes(b"\xff" * 100), "not a safetensors file"),
        (lambda f: f.write_bytes(b""), "not a safetensors file"),
        (lambda f: f.write_bytes((9).to_bytes(8, "little") + b'{"a": [}]' + bytes(8)), "not a safetensors file"),
    ],
)
def test_damaged_shard(folder, damage, message):
    damage(next(folder.glob("model-00001*")))
    with pytest.raises(UserError, match=message):
        SafetensorsWeights(folder)


def test_other_bad_sources(llama, folder, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        SafetensorsWeights(tmp_path / "nothing")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/pytorch_model.bin").touch()
    with pytest.raises(UserError, match="Pickled"):
        SafetensorsWeights(tmp_path / "old")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="not a valid index"):
        SafetensorsWeights(folder)
    save_file(
        {"q.weight": torch.zeros(8, 8, dtype=torch.uint8), "n.weight": torch.zeros(8)}, tmp_path / "q.safetensors"
    )
    with pytest.raises(UserError, match="stored as U8"):
        SafetensorsWeights(tmp_path / "q.safetensors").matrix("q")
    with pytest.raises(UserError, match="a matrix is needed"):
        SafetensorsWeights(tmp_path / "q.safetensors").check(["n"])
    with pytest.raises(UserError, match="meta"):
        ModuleWeights(llama.to("meta")).check([Q1])


def test_a_bad_matrix_is_named(llama, folder):
    llama.get_submodule(Q1).weight.data[3, 4] = float("nan")
    with pytest.raises(UserError, match=f"{Q1}: the weight contains NaN"):
        exponents(ModuleWeights(llama), linears(llama))


def test_cache(llama, folder, monkeypatch):
    names = linears(llama)
    first = exponents(SafetensorsWeights(folder), names)
    computed = []
    monkeypatch.setattr(cache, "exponents_of", lambda *a: computed.append(a) or first[names[0]])
    again = SafetensorsWeights(folder)
    assert exponents(again, names) == first and not computed

    cache_file(again).write_text("{ torn")  # damaged: computed again
    exponents(SafetensorsWeights(folder), names[:2])
    assert len(computed) == 2

    computed.clear()
    off = SafetensorsWeights(folder)
    off.fingerprint = None  # --no-cache
    exponents(off, names[:3])
    assert len(computed) == 3

    computed.clear()
    with torch.no_grad():  # same names and sizes, other numbers
        llama.get_submodule(Q1).weight.mul_(2)
    llama.save_pretrained(folder, max_shard_size="20KB")
    exponents(SafetensorsWeights(folder), names)
    assert len(computed) == len(names)


def test_cache_that_cannot_be_written(llama, folder, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache, "cache_root", lambda: tmp_path / "file")
    assert len(exponents(SafetensorsWeights(folder), linears(llama))) == 14


def test_memory_of_one_matrix(tmp_path):
    """Exponents of a 128 MB checkpoint in two shards, under a limit of 32 MB more data than the process has anyway."""
    weight, index = torch.randn(16384, 256).bfloat16(), {}
    for shard in ("a.safetensors", "b.safetensors"):
        tensors = {f"layers.{len(index) + j}.weight": weight * (j + 1) for j in range(8)}
        save_file(tensors, tmp_path / shard)
        index |= dict.fromkeys(tensors, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    script = """
        import re, resource, sys, torch
        from talklora_pl.allocation import cache, spectra
        from talklora_pl.base import weights

        def status(key):
            return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

        torch.set_num_threads(1)
        spectra.exponents_of(torch.randn(64, 64))  # what the libraries allocate once
        limit = status("VmData") + 32 * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        anonymous, top = status("RssAnon"), 0

        def measured(weight, device=None, compute=cache.exponents_of):
            global top
            found = compute(weight, device)
            top = max(top, status("RssAnon") - anonymous)
            return found

        cache.exponents_of = measured
        source = weights.SafetensorsWeights(sys.argv[1])
        source.fingerprint = None
        assert len(cache.exponents(source, [f"layers.{j}" for j in range(16)])) == 16
        try:
            torch.ones(48 * 2**20, dtype=torch.uint8)
        except RuntimeError:
            print(top)
        else:
            raise SystemExit("the limit does not hold, the test shows nothing")
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 16 * 2**20
