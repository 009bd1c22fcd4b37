"""The inspect command on a tiny adapter: numbers, terminal, page; and the page in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from talklora_pl.adapter import AdapterConfig, inject
from talklora_pl.adapter.io import save_adapter
from talklora_pl.base import BaseModel, load_base
from talklora_pl.cli import main
from talklora_pl.monitoring.page import palette
from talklora_pl.routing import RoutingCollector
from tests.browser import browse, needs_browser

QUESTIONS = [
    {"question": "</script><b>bold</b>", "choices": ["yes", "no"], "label": 0},
    {"question": "a longer question, with more of it", "choices": ["yes", "no"], "label": 1},
]


def make_adapter(base: BaseModel, folder: Path, **options: Any) -> Path:
    model = load_base(base)
    torch.manual_seed(1)
    adapter = inject(model, AdapterConfig.from_dict({"rank": 8, "dropout_input": 0.0, **options}))
    for name, p in adapter.named_parameters():
        if "router" in name:
            p.data.mul_(8)
    return save_adapter(model, folder)


@pytest.fixture
def case(base: BaseModel, tmp_path: Path) -> tuple[str, str, str]:
    """Adapter folder, base folder, data."""
    files = []
    for task in ("one", "two"):
        file = tmp_path / f"{task}.jsonl"
        file.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
        files.append(str(file))
    return str(make_adapter(base, tmp_path / "adapter")), base.path, ",".join(files)


def run(case: tuple[str, str, str], page: Path, *more: str) -> str:
    adapter, base, data = case
    arguments = ["--data", data, "--rows", "choice", "--output", str(page)]
    assert main(["inspect", adapter, "--base", base, *arguments, *more]) == 0
    return page.read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r"<script type='application/json' id=data>(.*?)</script>", page, re.S)
    assert found is not None
    return json.loads(found[1])


def test_page_and_terminal(case: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = run(case, tmp_path / "page.html")
    out = capsys.readouterr().out
    assert "self_attn.q_proj" in out and "Tasks" in out and "8 texts" in out
    assert page.count("data:image/png;base64,") == 4  # load, tasks, communication, allocation
    assert not re.search(r"(src|href)=[\"']?(https?:|//)", page)
    data = data_of(page)
    assert [t["task"] for t in data["texts"]] == ["one", "two", "one", "two"]
    assert "</script><b>" in "".join(data["texts"][0]["tokens"] + data["texts"][2]["tokens"])


def test_weights_on_the_page_are_the_models(case: tuple[str, str, str], tmp_path: Path, base: BaseModel) -> None:
    from talklora_pl import load_adapter
    from talklora_pl.base import load_tokenizer

    page = tmp_path / "page.html"
    adapter, path, _ = case
    assert main(["inspect", adapter, "--base", path, "--text", "hello you", "--output", str(page)]) == 0
    model = load_base(base)
    load_adapter(model, adapter)
    ids = torch.tensor([load_tokenizer(base)("hello you")["input_ids"]])
    with RoutingCollector(model) as collector, torch.no_grad():
        model(input_ids=ids)
    data = data_of(page.read_text())
    for r, weights in zip(collector.records, data["texts"][0]["weights"], strict=True):
        torch.testing.assert_close(torch.tensor(weights) / 1000, r.routing.weights_TE, atol=6e-3, rtol=0)


@pytest.mark.parametrize("which", [0, 4, 9])
def test_page_opens_on_the_layer_whose_load_is_least_even(base: BaseModel, tmp_path: Path, which: int) -> None:
    model = load_base(base)
    adapter = inject(model, AdapterConfig(rank=8))
    layers = list(adapter.routed_layers())
    for name, p in adapter.named_parameters():
        if "router" in name:  # even everywhere, but in one layer sharper than the initialisation makes it
            p.data.mul_(8 if f".{layers[which]}.router" in name else 0)
    saved, page = save_adapter(model, tmp_path / "adapter"), tmp_path / "page.html"
    assert main(["inspect", str(saved), "--base", base.path, "--text", "hello", "--output", str(page)]) == 0
    (opened,) = re.findall(r"<option value=(\d+) selected", page.read_text())
    assert int(opened) == which


def test_loads_counted_by_hand_as_the_docs_do(
    base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from talklora_pl.monitoring.metrics import RoutingLoad

    docs = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", docs, re.S)
    model = load_base(base)
    adapter = inject(model, AdapterConfig(rank=8, dropout_input=0.0))
    batch = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[1] * 6, [0] * 3 + [1] * 3])}
    names = {"model": model, "batch": batch}
    exec(code, names)
    metric = RoutingLoad(adapter.routed_layers())
    metric.update(names["collector"].records)  # type: ignore[attr-defined]
    load = metric.summary()
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == load.layers and len(lines) == 10
    for name, row_E in zip(load.layers, load.relative_LE, strict=True):
        torch.testing.assert_close(torch.tensor(json.loads(lines[name])), row_E.float())


def test_one_expert(base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(base, tmp_path / "lora", num_experts=1, communication="none", router="uniform")
    page = tmp_path / "page.html"
    assert main(["inspect", str(adapter), "--base", base.path, "--text", "hello", "--output", str(page)]) == 0
    assert "no routing to look at" in page.read_text() and "no routing to look at" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --data FILE or --text TEXT"),
        (["--text", "a", "--output", "page.txt"], "should be an .html file"),
        (["--text", "a", "--limit", "0"], "--limit: must be at least 1"),
        (["--data", "nowhere.jsonl"], "there is no such file"),
        (["--text", "a", "--colour", "red"], "--colour"),
        (["--text", "a", "--device", "zzz"], "--device: 'zzz' cannot be used here"),
    ],
)
def test_mistakes(
    case: tuple[str, str, str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base, _ = case
    assert main(["inspect", adapter, "--base", base, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_colours_differ() -> None:
    for n in (2, 8, 9, 64):
        assert len(set(palette(n))) == n


@pytest.mark.slow
@needs_browser
def test_page_in_a_browser(case: tuple[str, str, str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    data = data_of(run(case, page))
    document = browse(tmp_path, page.as_uri(), "--dump-dom")
    spans = re.findall(r'<ruby class="token"[^>]*style="background: ?(?:rgba|color|rgb)\(', document)
    assert len(spans) == sum(len(t["tokens"]) for t in data["texts"])
    assert "<b>bold</b>" not in document.split('id="texts"')[1].split("<script")[0]  # text stays text
    assert document.count('class="key"') == 4
    picture = tmp_path / "page.png"
    browse(tmp_path, page.as_uri(), f"--screenshot={picture}", "--window-size=1200,2000")
    from PIL import Image

    colours = Image.open(picture).convert("RGB").getcolors(2**24)
    assert colours is not None and len(colours) > 100
