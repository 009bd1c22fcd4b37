"""The script of docs/distributed.md under a real Slurm: out of time again and again, and the end is the same."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed import slurm
from tests.distributed.runs import ENVIRONMENT, ROOT, TIMEOUT, fit, load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.skipif(slurm.lacks() is not None, reason=str(slurm.lacks())),
]


@pytest.fixture
def cluster() -> Iterator[tuple[Path, dict[str, str]]]:
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, slurm.cluster(Path(folder, "s")) as environment:
        yield Path(folder), environment | ENVIRONMENT


def documented(*changes: tuple[str, str]) -> str:
    """The script of the docs, as far as one machine without GPUs has to change it."""
    text = (ROOT / "docs/distributed.md").read_text()
    script = re.search(r"    #!/bin/bash\n(    .*\n)+", text)
    assert script is not None
    out = re.sub("^    ", "", script[0], flags=re.MULTILINE)
    for before, after in changes:
        assert before in out, before
        out = out.replace(before, after)
    return out


def test_out_of_time_again_and_again(cluster: tuple[Path, dict[str, str]], config: Path, tmp_path: Path) -> None:
    """Once while it imports, when nothing is saved, and three times while it trains."""
    folder, environment = cluster
    slow = f"--trainer.callbacks+=tests.distributed.faults.Progress --trainer.callbacks.folder {folder} "
    slow += "--trainer.callbacks.sleep 0.2 --data.batch_size 2 --model.adapter.rank null"
    script = documented(
        ("#SBATCH --nodes=2\n", ""),
        ("--ntasks-per-node=8", "--ntasks-per-node=2"),
        ("#SBATCH --gpus-per-node=8\n", ""),
        ("python -m", f"{sys.executable} -m"),
        ("--config my.yaml", f"--config {config} {slow}"),
        ("--trainer.devices 8 --trainer.num_nodes 2", "--trainer.devices 2 --trainer.max_steps 20"),
    )
    (folder / "job").write_text(script)
    submit = ["sbatch", "--parsable", "--job-name=mine", f"--output={folder}/log", "job"]
    job = subprocess.run(submit, env=environment, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
    log, end = folder / "log", time.monotonic() + 3 * TIMEOUT

    def going_on() -> str:
        state = slurm.of_job(environment, job, "JobState")
        assert time.monotonic() < end, (state, log.read_text()[-3000:])
        time.sleep(0.1)
        return state if state in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED") else ""

    def announce() -> None:
        """The end of the time limit, as Slurm does by ``--signal=USR1@120``."""
        slurm.ask(environment, "scancel", "--signal=USR1", job)

    while not slurm.ask(environment, "squeue", "--noheader", "--steps", "--format=%i", f"--jobs={job}"):
        assert going_on()
    time.sleep(0.5)
    announce()
    for wanted in (2, 7, 12):
        while not (step := folder / "step.0").exists() or int(step.read_text().split()[0]) < wanted:
            assert going_on(), log.read_text()[-3000:]
        announce()
    while going_on():
        pass
    said = log.read_text()
    assert slurm.of_job(environment, job, "JobState") == "COMPLETED", said[-3000:]
    assert slurm.of_job(environment, job, "Restarts") == "4", said[-3000:]
    assert said.count("SIGUSR1: saved") == 3 and "SIGUSR1 before the first step" in said and "Traceback" not in said
    assert [p.name for p in (folder / "runs").iterdir()] == ["mine"]
    options = ["--config", "method/talklora", "--trainer.strategy", "fsdp", "--data.batch_size", "2"]
    options += ["--model.adapter.rank", "null", "--trainer.max_steps", "20"]
    whole = load(fit(config, tmp_path, *options, ranks=2))
    cut = load(folder / "runs/mine/checkpoints/last.ckpt")
    assert cut["global_step"] == whole["global_step"] == 20
    assert all(torch.equal(cut["state_dict"][name], tensor) for name, tensor in whole["state_dict"].items())
