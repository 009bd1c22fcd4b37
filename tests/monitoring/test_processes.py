"""Two processes log what one process logs; TensorBoard shows it in a browser."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from talklora_pl.base import BaseModel
from talklora_pl.callbacks import LoadBalance
from tests.distributed.runs import Run
from tests.monitoring.test_inspect import browse, needs_browser
from tests.monitoring.test_load_balance import scalars


def launch(
    base: BaseModel, rows: list[dict[str, str]], root: Path, processes: int, accumulate: int
) -> dict[str, dict[int, float]]:
    """What `fit` logs, with the same global batch whatever the number of processes."""
    config: dict[str, Any] = {
        "model": {"base": {"path": base.path, "dtype": "float64"}},
        "data": {"train": rows, "rows": "choice", "val_size": 8, "max_length": 128},
        "trainer": {
            "accelerator": "cpu",
            "devices": processes,
            "strategy": "ddp" if processes > 1 else "auto",
            "max_steps": 4,
            "log_every_n_steps": 1,
            "val_check_interval": 2 * accumulate,
            "accumulate_grad_batches": accumulate,
            "default_root_dir": str(root),
            "enable_progress_bar": False,
        },
        "load_balance": {"figures": False, "mode": "detailed"},
    }
    config["data"]["batch_size"] = 8 // processes // accumulate
    config["model"]["adapter"] = {"rank": 8, "dropout_input": 0.0, "dtype": "float64"}
    root.mkdir()
    file = root / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    run = Run.start(root, ["fit", "--config", str(file)], processes)
    assert run.wait() == [0] * processes, run.log()
    return {k: v for k, v in scalars(root / "version_0").items() if "load" in k}


@pytest.mark.slow
def test_two_processes_log_the_load_of_the_global_batch(
    base: BaseModel, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    one, two = (launch(base, rows, tmp_path / str(n), processes=n, accumulate=n) for n in (1, 2))
    # which tokens the main process sees for churn depends on the number of processes
    one.pop("val_load/churn", None), two.pop("val_load/churn", None)
    assert one.keys() == two.keys() and len(one) > 100
    for tag, values in one.items():
        assert values.keys() == two[tag].keys()
        assert values == pytest.approx(two[tag], rel=1e-4, abs=1e-5), tag


@pytest.mark.slow
@needs_browser
def test_tensorboard_in_a_browser(fit: Callable[..., L.Trainer], tmp_path: Path) -> None:
    fit(LoadBalance(), val_check_interval=2)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--host", "127.0.0.1"]
    server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"

        def ask(path: str) -> Any:
            for _ in range(120):
                try:
                    return json.load(urllib.request.urlopen(address + path, timeout=10))
                except OSError:
                    time.sleep(1)
            raise AssertionError(f"TensorBoard does not answer {path}")

        deadline = time.time() + 120
        while not (images := ask("/data/plugin/images/tags")) and time.time() < deadline:
            time.sleep(1)
        assert "experts/load" in images["run"]
        layout = ask("/data/plugin/custom_scalars/layout")
        titles = [c["title"] for c in layout["category"]]
        assert titles == ["Loss", "Scores", "Training", "Load", "Decisions", "Alerts"]  # what matters first
        document = browse(tmp_path, f"{address}/#images", "--dump-dom")
        assert "tb-app" in document or "tb-webapp" in document
        picture = tmp_path / "images.png"
        browse(tmp_path, f"{address}/#images", f"--screenshot={picture}", "--window-size=1400,1400")
        from PIL import Image

        colours = Image.open(picture).convert("RGB").getcolors(2**24)
        assert colours is not None and len(colours) > 200  # a picture, not an empty page
    finally:
        server.terminate()
        server.wait(30)
