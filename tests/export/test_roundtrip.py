"""Every method file and several model families: exported here, loaded in a fresh process, equal logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from transformers import AutoTokenizer

from talklora_pl.export import export_adapter
from tests.export import models

CASES = models.cases()
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Largest differences of logits by case and way of loading."""
    root = tmp_path_factory.mktemp("exported")
    expected = {"ids": models.IDS, "mask": models.MASK}
    for family in models.FAMILIES:
        models.save_base(root / f"base-{family}", family)
    for name, (family, config) in CASES.items():
        base = root / f"base-{family}"
        model = models.load(base, family)
        models.train(model, config)
        expected[name] = models.logits(model)
        export_adapter(model, root / name, tokenizer=AutoTokenizer.from_pretrained(base))
    save_file(expected, root / "expected.safetensors")
    command = [sys.executable, "-m", "tests.export.fresh", str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_equal_logits_in_a_fresh_process(case: str, differences: dict[str, dict[str, float]]) -> None:
    got = differences[case]
    assert got["auto"] <= 1e-5 and got["load_adapter"] <= 1e-5
    assert got["off"] > 1e-3  # so the adapter did something
