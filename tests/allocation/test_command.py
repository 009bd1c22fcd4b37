"""``python -m talklora_pl allocate``: table, YAML, chart, and one clear line for every mistake."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from talklora_pl import cli
from talklora_pl.adapter.allocation import layer_targets
from talklora_pl.allocation import cache
from talklora_pl.allocation.alpha import Alpha
from talklora_pl.allocation.rules import File
from talklora_pl.base import BaseModel, load_base
from talklora_pl.base.weights import ModuleWeights
from tests.data.tiny import save_model


@pytest.fixture
def base(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(cache, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return save_model(tmp_path / "model", num_hidden_layers=4).path


def allocate(*argv: str) -> int:
    return cli.main(["allocate", *argv])


def test_table_yaml_and_chart(base, capsys):
    rules = "alpha:estimator=median,uniform,mola-1234"
    assert allocate("--base", base, "--budget", "16", "--beta", "8", "--rules", rules) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", *["alpha", "(median)", "min-max", "alpha", "(peak)"], *rules.split(",")]
    model = load_base(BaseModel(base))
    layers = layer_targets(model, "all-linear")
    rule, weights = Alpha(budget=16, beta=8, estimator="median"), ModuleWeights(model)
    counts = rule.allocate(layers, 4, weights)
    for i, layer in enumerate(layers):
        index, alpha, _, _, *columns = lines[i + 1].split()
        assert int(index) == i
        assert float(alpha) == pytest.approx(rule.layer_alphas(layers, weights)[i], abs=1e-3)
        n = counts[layer.modules[0]]
        assert columns == [str(n), "█" * n, "4", "████", str(i + 1), "█" * (i + 1)]
    assert lines[5].split() == ["sum", "16", "16", "10"]

    text = Path("allocation.yaml").read_text()
    assert yaml.safe_load(text)["model"]["adapter"]["allocation"]["class_path"] == "list"
    assert File("allocation.yaml").allocate(layers, 9) == counts
    assert Path("allocation.png").read_bytes().startswith(b"\x89PNG")


def test_by_module_is_a_table_of_names(base, capsys):
    options = ("--granularity", "module", "--estimator", "median", "--targets", "[q_proj,up_proj]", "--beta", "9")
    assert allocate("--base", base, *options, "--output", "mine.yaml") == 0
    found = yaml.safe_load(Path("mine.yaml").read_text())["model"]["adapter"]["allocation"]["init_args"]["experts"]
    assert len(found) == 8 and sum(found.values()) == 5 * 8 and len(set(found.values())) > 2
    assert layer_targets(load_base(BaseModel(base)), ["q_proj", "up_proj"])[0].modules[0] in found


def test_second_run_computes_nothing(base, monkeypatch, capsys):
    assert allocate("--base", base) == 0
    first = capsys.readouterr().out

    def never(*args):
        raise AssertionError("computed again")

    monkeypatch.setattr(cache, "exponents_of", never)
    assert allocate("--base", base) == 0
    assert capsys.readouterr().out == first
    with pytest.raises(AssertionError, match="computed again"):
        allocate("--base", base, "--no-cache")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--budget", "3"], "a budget of 3 experts is too small for 4 layers"),
        (["--rules", "alhpa"], "Unknown allocation rule 'alhpa'. Did you mean 'alpha'?"),
        (["--rules", "alpha:estimater=hill"], "has no option 'estimater'. Did you mean 'estimator'?"),
        (["--rules", "alpha:estimator=peek"], "got 'peek'"),
        (["--rules", "alpha:beta"], "should read option=value"),
        (["--rules", "mola-24x8"], "should read like mola-2468"),
        (["--rules", "mola-24681"], "5 groups for 4 layers"),
        (["--rules", "alphalora-mistral-7b"], "32 entries, but 4 decoder layers"),
        (["--rules", "absent.yaml"], "there is no file 'absent.yaml'"),
        (["--targets", "[qproj]"], "No layer of this LlamaForCausalLM is called 'qproj'. Did you mean 'q_proj'"),
        (["--targets", ".*layers.[01].*q_proj"], "match nothing in 2 decoder layers, the first is 'model.layers.2'"),
        (["--targets", "[lm_head]"], "lie outside of the numbered layers"),
        (["--output", "absent/a.yaml"], "there is no folder 'absent'"),
        (["--output", "a.json"], "should be a .yaml file"),
        (["--estimator", "peek"], "peek"),
        (["--budgte", "3"], "budgte"),
    ],
)
def test_mistakes(base, capsys, argv, message):
    assert allocate("--base", base, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1 and message in error


def test_bad_checkpoints(base, capsys):
    file = Path(base) / "model.safetensors"
    tensors = load_file(file)
    bad = "model.layers.2.mlp.up_proj.weight"

    def error() -> str:
        assert allocate("--base", base, "--no-cache") == 2
        return capsys.readouterr().err

    save_file(tensors | {bad: tensors[bad].index_fill(0, torch.tensor([1]), float("nan"))}, file)
    assert "model.layers.2.mlp.up_proj: the weight contains NaN" in error()
    save_file(tensors | {bad: tensors[bad][:, :4].contiguous()}, file)
    assert "model.layers.2.mlp.up_proj: shape [24, 4] is too small for a tail" in error()
    save_file({k: v for k, v in tensors.items() if k != bad}, file)
    assert f"{bad!r} is not in the checkpoint" in error()
    file.write_bytes(file.read_bytes()[:-64])
    assert "cut short" in error()
    file.unlink()
    assert "there are no .safetensors weights" in error()
    assert allocate("--base", "nowhere/to/be/found") == 2
