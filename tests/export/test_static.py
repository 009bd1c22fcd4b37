"""A routed adapter as one LoRA: the change is that of the mean weights, and the report says how far it is."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from talklora_pl.adapter import disable_adapter, set_adapter
from talklora_pl.cli import main
from talklora_pl.errors import UserError
from talklora_pl.export.fidelity import kl_from
from talklora_pl.export.merge import low_rank
from talklora_pl.export.run_static import REPORT
from talklora_pl.export.static import add_static, mean_routing, padded, truncated, vllm_rank
from talklora_pl.routers.softmax import Softmax
from talklora_pl.routing import Routing, RoutingCollector
from talklora_pl.sites import LowRank
from tests.export import models
from tests.export.test_run import fit
from tests.methods.test_configs import config_of

ROUTED = ["talklora", "hydralora", "lossfree", "moelora", "teamlora", "block", "mola"]


class Constant(nn.Module):
    """A router that gives every token the same weights."""

    wants_loads = False
    share = None

    def __init__(self, w_E: Tensor) -> None:
        super().__init__()
        self.w_E = w_E

    def forward(self, x_TD: Tensor, m_TEF: Tensor) -> Routing:
        w_TE = self.w_E.to(m_TEF.dtype).expand(len(x_TD), -1)
        return Routing(w_TE, w_TE, w_TE)


@pytest.mark.parametrize("method", ROUTED)
def test_the_change_is_the_adapter_with_its_mean_weights_for_every_token(tmp_path: Path, method: str) -> None:
    model = models.load(models.save_base(tmp_path, "llama"))
    shared = replace(config_of("hydralora"), router=Softmax(per="block"))
    adapter = models.train(model, shared if method == "block" else config_of(method))
    model.eval()
    batch = {"input_ids": models.IDS, "attention_mask": models.MASK}
    routing = mean_routing(model, adapter, [batch, batch])
    with RoutingCollector(adapter, models.MASK) as collector:
        exact = models.logits(model)
    for r in collector.records:
        want_E = r.routing.weights_TE[models.MASK.reshape(-1).bool()].mean(0)
        assert torch.allclose(routing[r.layer].w_E, want_E, atol=1e-6)
        assert (routing[r.layer].deviation > 1e-3) == (len(want_E) > 1)
    add_static(model, low_rank(adapter, dict(adapter.layers.named_modules()), {n: r.w_E for n, r in routing.items()}))
    static = models.logits(model)
    set_adapter(model, "default")
    assert torch.equal(models.logits(model), exact) and (static - exact).abs().max() > 1e-4
    for layer in adapter.layers.modules():
        if hasattr(layer, "router"):
            layer.router = Constant(routing[layer.name].w_E)
    assert torch.allclose(models.logits(model), static, atol=2e-5)


def test_truncation_is_the_best_of_its_rank_and_tells_the_energy() -> None:
    torch.manual_seed(0)
    change = LowRank(torch.randn(6, 9), torch.randn(6, 5))
    whole = change.B_PO.mT.double() @ change.A_PD.double()
    U, s, Vh = torch.linalg.svd(whole, full_matrices=False)
    for rank in (1, 3, 5):
        less, kept, energy = truncated(change, rank)
        got = less.B_PO.mT.double() @ less.A_PD.double()
        assert len(less.A_PD) == rank
        assert torch.allclose(got, (U[:, :rank] * s[:rank]) @ Vh[:rank], atol=1e-5)
        assert kept == pytest.approx(float(s[:rank].square().sum()), rel=1e-9)
        assert energy == pytest.approx(float(whole.square().sum()), rel=1e-9)
    more = padded(change, 8)
    assert len(more.A_PD) == 8 and torch.allclose(more.B_PO.mT @ more.A_PD, whole.float(), atol=1e-5)


def test_kl_is_that_of_torch() -> None:
    torch.manual_seed(0)
    exact, other = torch.randn(2, 7, 11)
    p, log_q = exact.softmax(-1), other.log_softmax(-1)
    want = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)
    assert torch.allclose(kl_from(exact, other), want, atol=1e-6)
    assert kl_from(exact, exact).abs().max() == 0


def test_ranks_of_vllm() -> None:
    assert [vllm_rank(r) for r in (1, 2, 32, 257)] == [1, 8, 32, 320]
    with pytest.raises(UserError, match=r"merged rank is 513, .* at most 512"):
        vllm_rank(513)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a base, rows and a short run of TalkLoRA with unequal numbers of experts."""
    root = tmp_path_factory.mktemp("static")
    fit(root, {"allocation": {"class_path": "list", "init_args": {"experts": [3, 1]}}, "num_experts": 2, "rank": 4})
    return root


def rows_of(path: Path, count: int = 30, start: int = 100) -> str:
    rows = [
        {"question": f"{i} and one?", "choices": [str(i + 1), str(i + 3)], "label": 0}
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def static(run: Path, out: Path, *more: str) -> int:
    return main(["export", str(run / "runs/version_0"), "--merge", "static", "--out", str(out), *more])


def test_a_lora_folder_with_what_it_costs(run: Path, tmp_path: Path) -> None:
    data, other = rows_of(tmp_path / "rows.jsonl"), rows_of(tmp_path / "other.jsonl", 7, 300)
    assert static(run, tmp_path / "lora", "--data", data, "--eval-data", other, "--license", "mit") == 0
    report = json.loads((tmp_path / "lora" / REPORT).read_text())
    options = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert len(report["lora"]["linears_by_rank"]) == 2 and len(options["rank_pattern"]) == 5  # 3 experts and 1
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "license: mit" in card and "not used for the merge" in card and "KL from exact" in card

    # the numbers, anew: one row after another, by PEFT's own arithmetic
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lora")
    exact = AutoModelForCausalLM.from_pretrained(run / "runs/version_0/adapters/best", trust_remote_code=True)
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run / "base"), str(tmp_path / "lora")).eval()
    kl, same, nll, count = 0.0, 0, [0.0, 0.0, 0.0], 0
    right = {"static": 0, "exact": 0}
    for line in (tmp_path / "other.jsonl").read_text().splitlines():
        row = json.loads(line)
        scores: dict[str, list[float]] = {"static": [], "exact": []}
        for i, choice in enumerate(row["choices"]):
            prompt, answer = f"Question: {row['question']}\nAnswer:", f" {choice}"
            first = len(tokenizer(prompt).input_ids)
            ids = torch.tensor([[*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id]])
            targets = ids[0, first:]
            with torch.no_grad():
                p, q = (m(ids).logits[0, first - 1 : -1].log_softmax(-1) for m in (exact, lora))
                with disable_adapter(exact):
                    b = exact(ids).logits[0, first - 1 : -1].log_softmax(-1)
            for name, logs in (("exact", p), ("static", q)):
                scores[name].append(float(logs.gather(1, targets[:, None]).mean()))
            if i == row["label"]:
                kl += float((p.exp() * (p - q)).sum())
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
                nll = [n - float(m.gather(1, targets[:, None]).sum()) for n, m in zip(nll, (b, q, p))]
                count += len(targets)
        for name, values in scores.items():
            right[name] += values.index(max(values)) == row["label"]
    got = report["fidelity"]
    assert (got["rows"], got["positions"]) == (7, count)
    assert got["kl"]["static"] == pytest.approx(kl / count, rel=1e-3, abs=1e-7) and got["kl"]["exact"] == 0
    assert got["agreement"]["static"] == pytest.approx(same / count)
    for name, value in zip(("base", "static", "exact"), nll):
        assert got["perplexity"][name] == pytest.approx(float(torch.tensor(value / count).exp()), rel=1e-4)
    for name, value in right.items():
        assert got["scores"][name]["other"]["accuracy"] == pytest.approx(value / 7)
    assert got["kl"]["static"] > 0


def test_for_vllm_and_truncated_and_as_weights(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows_of(tmp_path / "rows.jsonl")
    assert static(run, tmp_path / "vllm", "--data", data, "--for", "vllm") == 0
    assert "--max-lora-rank 8" in capsys.readouterr().out
    options = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert options["rank_pattern"] == {} and options["modules_to_save"] is None
    assert static(run, tmp_path / "small", "--data", data, "--rank", "1") == 0
    report = json.loads((tmp_path / "small" / REPORT).read_text())
    assert 0 < report["lora"]["discarded_energy"]["all"] <= report["lora"]["discarded_energy"]["worst"] < 1
    assert report["lora"]["linears_by_rank"] == {"1": 10} and report["data"]["held_back"]
    assert report["data"]["measured_on"]["rows"] + report["data"]["judged_on"]["rows"] == 30
    assert static(run, tmp_path / "whole", "--data", data, "--form", "weights") == 0
    ids = torch.arange(12).reshape(2, 6)
    base = AutoModelForCausalLM.from_pretrained(run / "base")
    by_peft = PeftModel.from_pretrained(base, str(tmp_path / "vllm"))(ids).logits
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(ids).logits, by_peft, atol=1e-5)
    first, second = (json.loads((tmp_path / n / REPORT).read_text())["fidelity"] for n in ("vllm", "whole"))
    assert first["kl"]["static"] == pytest.approx(second["kl"]["static"], rel=1e-3)


def test_what_cannot_be_merged_is_refused_with_its_reason(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows_of(tmp_path / "rows.jsonl")
    for more, words in (
        ([], "--merge static needs --data"),
        (["--data", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--data", data, "--rank", "0"], "--rank must be at least 1"),
        (["--data", data, "--form", "weights", "--for", "vllm"], "plain weights have no rank"),
    ):
        assert static(run, tmp_path / "out", *more) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said, said
    assert main(["export", str(run / "runs/version_0"), "--out", str(tmp_path / "out"), "--rank", "4"]) == 2
    assert "--rank are for --merge static" in capsys.readouterr().err
    for change, words in (
        ({"experts_see_talk": True}, "not linear in the input"),
        ({"experts": {"name": "ffn_lora"}}, "whole feed-forward blocks"),
    ):
        saved = torch.load(run / "runs/version_0/checkpoints/last.ckpt", weights_only=True)
        saved["talklora"]["adapter"] |= change
        torch.save(saved, tmp_path / "changed.ckpt")
        command = ["export", str(tmp_path / "changed.ckpt"), "--out", str(tmp_path / "out"), "--merge", "static"]
        assert main([*command, "--data", data]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


ALONE = """
import sys
sys.modules["talklora_pl"] = None  # importing it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, folder, whole = sys.argv[1:]
ids = torch.arange(12).reshape(2, 6)
by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)(ids).logits
by_transformers = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
merged = AutoModelForCausalLM.from_pretrained(whole)(ids).logits
print(max((x - by_peft).abs().max().item() for x in (by_transformers, merged)), by_peft.abs().sum().item())
"""


@pytest.mark.slow
def test_programs_without_the_package_load_it(run: Path, tmp_path: Path) -> None:
    data = rows_of(tmp_path / "rows.jsonl")
    assert static(run, tmp_path / "lora", "--data", data) == 0
    assert static(run, tmp_path / "whole", "--data", data, "--form", "weights") == 0
    command = [sys.executable, "-c", ALONE, str(run / "base"), str(tmp_path / "lora"), str(tmp_path / "whole")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) < 1e-5


DEPLOY = Path(__file__).parents[2] / "docs" / "deploy.md"
COMMANDS = re.findall(
    r"`python -m talklora_pl (export runs/version_0 --merge static [^`]+)`", DEPLOY.read_text("utf-8")
)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_lines_of_the_table_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    (tmp_path / "runs").symlink_to(run / "runs")
    rows_of(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0
    made = tmp_path / command.rpartition(" ")[2]
    assert (made / REPORT).is_file() and any(made.glob("*.safetensors"))


@pytest.mark.slow
def test_constant_routing_is_exact_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, {"experts": "lora", "communication": "none", "router": "uniform", "num_experts": 2, "rank": 4})
    data = rows_of(tmp_path / "more.jsonl")
    assert static(tmp_path, tmp_path / "lora", "--data", data, "--max-new-tokens", "0") == 0
    assert "the merge is exact up to rounding" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "lora" / REPORT).read_text())
    assert report["routing_is_constant"] and abs(report["fidelity"]["kl"]["static"]) < 1e-6
    assert report["fidelity"]["agreement"]["static"] == 1


@pytest.mark.slow
def test_a_classifier_keeps_its_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"{i} is {'even' if i % 2 == 0 else 'odd'}", "label": i % 2} for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"train": str(tmp_path / "texts.jsonl"), "rows": "classification", "labels": ["even", "odd"]}
    fit(tmp_path, {}, {"task": "sequence_classification", "num_labels": 2}, data)
    assert static(tmp_path, tmp_path / "lora", "--data", data["train"]) == 0
    assert static(tmp_path, tmp_path / "whole", "--data", data["train"], "--form", "weights") == 0
    reports = [json.loads((tmp_path / n / REPORT).read_text())["fidelity"] for n in ("lora", "whole")]
    assert list(reports[0]["kl"]) == ["static", "exact"] and "accuracy" in reports[0]["scores"]["static"]["texts"]
    assert reports[0]["kl"]["static"] == pytest.approx(reports[1]["kl"]["static"], rel=1e-3, abs=1e-7)
    ids = torch.arange(12).reshape(2, 6)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    base.config.pad_token_id = 0
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    by_peft = PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    whole.config.pad_token_id = 0
    assert torch.allclose(whole(ids).logits, by_peft(ids).logits, atol=1e-5)
    capsys.readouterr()
    assert static(tmp_path, tmp_path / "vllm", "--data", data["train"], "--for", "vllm") == 2
    assert "no modules_to_save" in capsys.readouterr().err
