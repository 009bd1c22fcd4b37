"""Real runs of the command line in processes of their own, forked from a server that has imported everything once."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.distributed.preload"])
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
TIMEOUT = 300  # a busy machine is no failure


def make_project(folder: Path) -> Path:
    """A tiny float64 model, ragged data and a config; returns the config."""
    from tests.data.tiny import save_model

    torch.manual_seed(0)
    save_model(folder / "model")
    draw = random.Random(0)
    rows = [
        {
            "id": f"r{i}",
            "question": "".join(draw.choices("abcdef ", k=draw.randint(2, 20))),
            "choices": ["".join(draw.choices("abc", k=draw.randint(1, 9))) for _ in range(2)],
            "label": 0,
        }
        for i in range(30)
    ]
    for name, part in (("train", rows), ("val", rows[:7])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = {
        "seed_everything": 7,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 8,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
        },
        "model": {
            # sdpa: eager attention takes its softmax in float32, which padding to another width changes by 1e-8
            "base": {"path": str(folder / "model"), "dtype": "float64", "attn_implementation": "sdpa"},
            "adapter": {"expert_rank": 2, "dtype": "float64", "dropout_input": 0.0},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {
            "train": str(folder / "train.jsonl"),
            "val": str(folder / "val.jsonl"),
            "rows": "choice",
            "batch_size": 4,
            "eval_batch_size": 4,
            "max_length": 64,
            "cache_dir": str(folder / "cache"),
        },
        "load_balance": {"figures": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _child(argv: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(ENVIRONMENT | environment)
    multiprocessing.set_start_method("fork", force=True)  # a real command's; not the server's
    from talklora_pl.cli import main

    code = 1
    try:
        code = main(argv)
    except SystemExit as e:
        code = int(e.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # what pytest's server registered for its own exit is not ours


@dataclass
class Run:
    """Some ranks of one training, started as torchrun would start them."""

    folder: Path
    processes: list[Any] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, folder: Path, argv: list[str], ranks: int = 1, **environment: str) -> Run:
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder)
        shared = environment | ({"TORCHELASTIC_RUN_ID": "test", **_rendezvous(ranks)} if ranks > 1 else {})
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            p = SERVER.Process(target=_child, args=(argv, shared | own, str(folder / f"log{rank}")))
            p.start()
            run.processes.append(p)
        return run

    def wait(self, timeout: float = TIMEOUT) -> list[int | str]:
        """Exit codes; a process that does not end is killed and counts as ``hang``."""
        end = time.monotonic() + timeout
        codes: list[int | str] = []
        for p in self.processes:
            p.join(max(0.0, end - time.monotonic()))
            codes.append("hang" if p.exitcode is None else p.exitcode)
        self.kill()
        return codes

    def kill(self) -> None:
        for p in self.processes:
            if p.exitcode is None:
                os.kill(p.pid, signal.SIGKILL)
                p.join()

    def log(self) -> str:
        return "\n".join(
            f"--- {f.name}\n{f.read_text(errors='replace')[-4000:]}"
            for f in sorted(self.folder.glob("log*"))
            if f.is_file()
        )


def _rendezvous(ranks: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "ROLE_RANK": "0",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }


def fit(config: Path, folder: Path, *options: str, ranks: int = 1, **environment: str) -> Path:
    """Train to the end; returns the last checkpoint."""
    run = Run.start(
        folder,
        ["fit", "--config", str(config), "--trainer.default_root_dir", str(folder), *options],
        ranks,
        **environment,
    )
    codes = run.wait()
    assert codes == [0] * ranks, (codes, run.log())
    return newest(folder)


def newest(folder: Path) -> Path:
    files = list(folder.glob("**/last.ckpt"))
    assert files, list(folder.glob("**/*"))
    return max(files, key=lambda p: p.stat().st_mtime)


def spawn(command: list[str], folder: Path, log: str = "log", **environment: str) -> subprocess.Popen[bytes]:
    """A command in a session of its own, with the repository on its path."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / log, "ab") as stream:
        return subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            env={**os.environ, **ENVIRONMENT, **environment},
            cwd=folder,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], timeout: float = TIMEOUT) -> int | str:
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "hang"


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def distance(one: Path, other: Path) -> float:
    """Largest difference of trained tensors, buffers and optimiser states of two checkpoints."""
    a, b = load(one), load(other)
    assert a["global_step"] == b["global_step"], (a["global_step"], b["global_step"])
    assert a["state_dict"].keys() == b["state_dict"].keys()
    pairs = [(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"]]
    for x, y in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
        assert x["state"].keys() == y["state"].keys()
        pairs += [(x["state"][i][k], y["state"][i][k]) for i in x["state"] for k in x["state"][i]]
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs if x.numel())


def curves(folder: Path, costs: bool = False) -> dict[str, list[tuple[int, float]]]:
    """Every metric's logged values, (step, value), over all event files of a folder in the order of steps.

    Args:
        costs: also what depends on the machine and on how steps are cut into batches.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("**/events.out.tfevents.*"), key=lambda p: p.stat().st_mtime):
        events = EventAccumulator(str(file))
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({e.step: e.value for e in events.Scalars(name)})
    return {name: sorted(values.items()) for name, values in found.items() if costs or not name.startswith("cost/")}
