"""A study's page in a real browser, its numbers from the predictions, and its runs in TensorBoard's HParams tab."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from talklora_pl.cli import main
from tests.browser import browse, needs_browser
from tests.study.tiny import study

pytestmark = pytest.mark.slow

METHODS, SEEDS = ("lora", "talk"), (1, 2)


@pytest.fixture(scope="module")
def made(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's folder: two methods, two seeds."""
    out = tmp_path_factory.mktemp("study")
    quick = {"model.optimizer.class_path": "torch.optim.AdamW", "model.optimizer.init_args.lr": 0.03}
    assert main(["compare", f"--config={study(project, set=quick)}", f"--out={out}"]) == 0
    return out


def rows(made: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((made / "results.json").read_text())["rows"]
    return found


WATCH = """<script>
const errors = [];
addEventListener("error", e => errors.push(e.message || e.target.tagName), true);
addEventListener("load", () => {
  const say = (id, textContent) => Object.assign(document.createElement("output"), {id, textContent});
  const add = (id, text) => document.body.append(say(id, text));
  add("errors", errors.join("; "));
  add("drawn", [...document.images].map(i => i.naturalWidth * i.naturalHeight > 10000).join(" "));
  add("wide", document.documentElement.scrollWidth <= innerWidth);
});
</script>"""
"""Says in the page what a browser makes of it: errors, pictures that were drawn, nothing that sticks out."""


@needs_browser
def test_the_page_in_a_browser(made: Path, tmp_path: Path) -> None:
    page = (made / "index.html").read_text()
    assert "<script" not in page and "http" not in page.split("<body>")[1]  # it needs nothing but itself
    watched = tmp_path / "page.html"
    watched.write_text(page.replace("<head>", f"<head>{WATCH}"))
    dom = browse(tmp_path, watched.as_uri(), "--dump-dom", "--window-size=1000,2000")
    seen = dict(re.findall(r'<output id="(\w+)">(.*?)</output>', dom))
    assert seen["errors"] == "" and seen["wide"] == "true"
    assert seen["drawn"].split() == ["true"] * 3  # differences, learning curves, the loads of talk
    cells = [re.findall(r"<td>(.*?)</td>", line) for line in re.findall(r"<tr>(.*?)</tr>", dom, re.S)]
    assert [line[:4] for line in cells if line] == [["data", m, "accuracy", "2"] for m in METHODS]
    for row, line in zip(rows(made), (line for line in cells if line), strict=True):
        assert f"{row['score']:.3f}" in line and f"{row['parameters']:,}" in line


def test_the_table_follows_from_the_predictions_alone(made: Path) -> None:
    """Recomputed another way: every question by its name, and the bootstrap draw by draw."""
    right: dict[tuple[str, int], dict[str, float]] = {}
    for method in METHODS:
        for seed in SEEDS:
            text = (made / "runs" / f"data.{method}.seed{seed}" / "test_questions.jsonl").read_text()
            right[method, seed] = {q["id"]: float(q["right"]) for q in map(json.loads, text.splitlines())}
    questions = sorted(right["lora", 1])
    lora, talk = (np.array([[right[m, s][q] for q in questions] for s in SEEDS]) for m in METHODS)
    plain, row = rows(made)
    assert (plain["score"], row["score"]) == pytest.approx((lora.mean(), talk.mean()))
    assert row["difference"] == pytest.approx(talk.mean() - lora.mean())
    d, draw, means = talk - lora, np.random.default_rng(5), []
    effect = d.mean(1, keepdims=True) - d.mean()
    d = d - effect + effect * np.sqrt(2)  # two seeds, drawn: half of their variance is missing
    for _ in range(20000):
        means.append(d[draw.integers(0, 2, 2)][:, draw.integers(0, len(questions), len(questions))].mean())
    spread = np.std(means)
    assert spread > 0
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.15 * spread)
    assert row["detectable"] == pytest.approx(2.8016 * spread, rel=0.05)


def test_the_hparams_tab_shows_every_run_with_its_method_seed_parts_and_test_score(made: Path) -> None:
    for method, shipped, router in zip(METHODS, ("lora", "talklora"), ("uniform", "softmax(scores=features)")):
        for seed in SEEDS:
            run = made / "runs" / f"data.{method}.seed{seed}"
            events = EventAccumulator(str(run))
            events.Reload()
            read = {
                key: plugin_data_pb2.HParamsPluginData.FromString(
                    events.summary_metadata[f"_hparams_/{key}"].plugin_data.content
                )
                for key in ("experiment", "session_start_info")
            }
            values = read["session_start_info"].session_start_info.hparams
            assert values["run"].string_value == run.name  # the study's own name of the method, and its data
            assert (values["method"].string_value, values["seed"].number_value) == (shipped, seed)
            assert values["router"].string_value == router
            assert "test_accuracy" in {info.name.tag for info in read["experiment"].experiment.metric_infos}
            (score,) = events.Scalars("test_accuracy")
            result = json.loads((run / "result.json").read_text())
            assert score.value == pytest.approx(result["scores"]["mean"]["accuracy"])
