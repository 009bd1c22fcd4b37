"""The benchmarks run: a row at the smallest size, the table in a document, the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import training
from benchmarks.__main__ import BEGIN, END, main
from benchmarks.models import Base, adapted, peft_lora
from talklora_pl import captured
from talklora_pl.inputs import labelled
from tests import tape


def test_one_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{BEGIN}\nof before\n{END}\nafter\n")
    options = ["--size", "tiny", "--device", "cpu", "--only", "packing", "evaluation", "--out", str(tmp_path)]
    assert main([*options, "--table", str(document)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    padded, packed, evaluation = rows
    assert padded["ratio"] == [1, 1, 1] and packed["ratio"][1] > 0
    assert packed["launches"] > 100 and packed["peak"] > 0 and packed["tokens_per_s"] > 0
    assert "not run" in evaluation["note"]
    text = document.read_text()
    assert "of before" not in text and "| packed |" in text and text.startswith("before\n") and text.endswith("after\n")
    assert (tmp_path / "results.png").stat().st_size > 1000
    assert main(["--from", str(tmp_path / "results.json")]) == 0
    assert "| packed |" in capsys.readouterr().out


def test_a_variant_that_fails_has_its_reason_for_a_row() -> None:
    from benchmarks.measure import alternate

    def broken() -> None:
        raise ValueError("no such thing")

    floor, bad = alternate("s", "t", {"floor": lambda: sum(range(1000)), "bad": broken}, 1, "cpu", 2)
    assert floor.ratio == [1, 1, 1] and bad.note == "failed: ValueError: no such thing" and not bad.ratio


@pytest.mark.parametrize("ours", [True, False])
def test_a_recorded_step_trains_as_another(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(captured, "cuda_graphs", lambda: tape.record)
    base, trained = Base("tiny", "cpu"), []
    batch = labelled([list(range(5, 20)), list(range(3, 14))], [list(range(5, 20)), list(range(3, 14))], 0)
    for graph in (False, True):
        torch.manual_seed(0)
        model = adapted(base.copy(), "talklora") if ours else peft_lora(base.copy())
        run = training.step(model, batch, ours, autocast=not ours, graph=graph)
        for _ in range(3):
            run()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=1e-6)
