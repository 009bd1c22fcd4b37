"""Whole fits, evaluation and decoding on the pretended GPU, see the package for what that can show."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.test_configs import METHODS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LOGGED = [["to the host", "talklora_pl/monitoring/host.py"]]
"""What a step that logs waits for: once."""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler, own = shutil.which("g++"), Path(torch.__file__).parent
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which need not be pretended")
    out = tmp_path_factory.mktemp("device") / "libdevice.so"
    where = [f"-I{own / 'include'}", f"-L{own / 'lib'}", f"-Wl,-rpath,{own / 'lib'}"]
    command = [
        compiler,
        "-std=c++20",
        "-w",
        "-shared",
        "-fPIC",
        str(HERE / "device.cpp"),
        *where,
        "-lc10",
        "-ltorch_cpu",
    ]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this PyTorch asks other things of a device: {done.stderr.strip().splitlines()[0]}")
    return out


def run(library: Path, folder: Path, *names: str) -> dict[str, Any]:
    """What became of the runs of these names; without names of all."""
    options = {"PRETENDED_GPU": str(library), "XDG_CACHE_HOME": str(folder), "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    command = [sys.executable, "-m", "tests.pretended_gpu.runs", *names]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **options, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("RUN ")]
    for each in found:
        assert each["error"] is None, f"{each['name']}: {each['error']}\n{done.stderr[-6000:]}"
    return {each["name"]: each for each in found}


def places(waits: list[list[str]]) -> list[list[str]]:
    return [[name, where.partition(":")[0]] for name, where in waits]


def check_fit(found: dict[str, Any]) -> None:
    *steps, logging = found["waits"]
    assert len(steps) >= 1 and not any(steps), found
    assert places(logging) == LOGGED, found


def check_captured(found: dict[str, Any]) -> None:
    """From the third step on it is a replay: nothing in it waits, or was a transfer while it was recorded."""
    first, second, recording, *replays, logging = found["waits"]
    assert recording and not any([first, second, *replays]), found
    assert found["replays"] == len(replays) + 2 and places(logging) == LOGGED, found


def test_a_fit_of_packed_rows_and_decoding(library: Path, tmp_path: Path) -> None:
    found = run(library, tmp_path, "rows", "talklora packed", "talklora captured")
    check_captured(found["talklora captured"])
    check_fit(found["talklora packed"])
    # where the rows of each of two adapters are; nothing for a token without them
    assert places(found["rows"]["waits"][0]) == [["to the GPU", "talklora_pl/adapter/active.py"]] * 2


@pytest.mark.slow
def test_all_methods_objectives_and_balance_losses(library: Path, tmp_path: Path) -> None:
    found = run(library, tmp_path)
    methods = [method for method in METHODS if "alphalora" not in method]
    assert {f"{method} {how}" for method in methods for how in ("packed", "captured")} <= set(found)
    # PyTorch has one kernel for grouped products in bfloat16 alone, and reads the sizes of the groups back for others
    waits = found.pop("float32")["waits"]
    assert {name for step in waits for name, _ in step} == {"_grouped_mm one after the other", "to the host"}
    for name in set(found) - {"rows"}:
        (check_captured if name.endswith("captured") else check_fit)(found[name])
