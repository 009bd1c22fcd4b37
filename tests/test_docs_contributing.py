"""CONTRIBUTING.md, followed to the letter: a new component in ten minutes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("talklora_pl", "callbacks", "configs", "tests", "pyproject.toml")


@pytest.mark.slow
def test_a_component_from_the_page_alone(tmp_path: Path) -> None:
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    ((name, code),) = re.findall(r"^```python (\S+)\n(.*?)^```", page, re.M | re.S)
    (tmp_path / name).write_text(code, "utf-8")
    ((changed, diff),) = re.findall(r"^```diff (\S+)\n(.*?)^```", page, re.M | re.S)
    text = (tmp_path / changed).read_text("utf-8")
    for before, after in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.M):
        before, after = (re.sub(r"^.", "", lines, flags=re.M) for lines in (before, after))
        assert text.count(before) == 1
        text = text.replace(before, after)
    (tmp_path / changed).write_text(text, "utf-8")

    def run(*argv: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", *argv]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        return done.stdout

    (row,) = [r for r in json.loads(run("talklora_pl", "components", "--json")) if r["name"] == "mean"]
    assert row["family"] == "communication" and [o["name"] for o in row["options"]] == ["gain"]
    passed = run("pytest", "tests/methods/test_matrix.py", "-k", "mean or every_part", "-p", "no:cacheprovider")
    assert int(re.findall(r"(\d+) passed", passed)[0]) > 30
    run("ruff", "check", name)
