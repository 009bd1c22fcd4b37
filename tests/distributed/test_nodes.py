"""Two nodes that are network namespaces with addresses of their own, started by torchrun."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.runs import TIMEOUT, distance, finish, fit, newest, spawn

LOST = 10  # seconds that a collective waits for a lost peer
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
pytestmark = pytest.mark.slow


@dataclass
class Node:
    namespace: str
    device: str
    address: str


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    tag = f"tl{os.getpid()}"
    found = [Node(f"{tag}{x}", f"{tag}{x}0", f"10.77.0.{i}") for i, x in enumerate("ab", 1)]
    try:
        for node in found:
            subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True)
            try:
                ip(f"netns add {node.namespace}")
            except subprocess.CalledProcessError as e:
                pytest.skip(f"network namespaces cannot be made here: {e.stderr.decode().strip()}")
        a, b = found
        ip(f"link add {a.device} netns {a.namespace} type veth peer name {b.device} netns {b.namespace}")
        for node in found:
            ip(f"-n {node.namespace} addr add {node.address}/24 dev {node.device}")
            ip(f"-n {node.namespace} link set lo up")
            ip(f"-n {node.namespace} link set {node.device} up")
            # torchrun's c10d agent waits for the store on the lost node as long as the kernel does: see the docs
            retries = ["ip", "netns", "exec", node.namespace, "tee", "/proc/sys/net/ipv4/tcp_retries2"]
            subprocess.run(retries, input=b"5", check=True, capture_output=True)
        yield found
    finally:
        for node in found:
            subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True)


def strategy(name: str) -> list[str]:
    """What a YAML file says: the strategy with a short timeout."""
    path = {
        "ddp": "lightning.pytorch.strategies.DDPStrategy",
        "fsdp": "talklora_pl.distributed.fsdp.AdapterFSDP2Strategy",
    }[name]
    return ["--trainer.strategy", json.dumps({"class_path": path, "init_args": {"timeout": f"0:00:{LOST}"}})]


def start(nodes: list[Node], how: str, folder: Path, argv: list[str], each: int = 1) -> list[subprocess.Popen[bytes]]:
    """torchrun on both nodes."""
    started = []
    for i, node in enumerate(nodes):
        meet = {
            "static": [f"--node-rank={i}", f"--master-addr={nodes[0].address}", "--master-port=29400"],
            # in a namespace nobody recognises itself as the host: say who it is
            "c10d": [
                *("--rdzv-backend=c10d", f"--rdzv-endpoint={nodes[0].address}:29400", "--rdzv-id=job"),
                *(f"--rdzv-conf=is_host={int(i == 0)},read_timeout={LOST}", f"--local-addr={node.address}"),
            ],
        }[how]
        command = ["ip", "netns", "exec", node.namespace, TORCHRUN, "--nnodes=2", f"--nproc-per-node={each}", *meet]
        command += ["-m", "talklora_pl", *argv]
        started.append(spawn(command, folder, f"log{i}", GLOO_SOCKET_IFNAME=node.device))
    return started


def logs(folder: Path) -> str:
    return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-5000:]}" for f in sorted(folder.glob("log*")))


@pytest.mark.parametrize(
    "name, how",
    [
        ("ddp", "c10d"),
        ("fsdp", "static"),
        pytest.param("ddp", "static", marks=pytest.mark.nightly),
        pytest.param("fsdp", "c10d", marks=pytest.mark.nightly),
    ],
)
def test_link_cut_then_resumed_on_one_node(
    config: Path, tmp_path: Path, nodes: list[Node], name: str, how: str, reference: Path
) -> None:
    """Both sides end within the timeout and say that a peer is gone; one node then finishes the run."""
    argv = ["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path), *strategy(name)]
    slow = ["--trainer.callbacks+=tests.distributed.faults.Progress", "--trainer.callbacks.folder", str(tmp_path)]
    slow += ["--trainer.callbacks.sleep", "0.4", "--checkpoint.every_n_train_steps", "1"]
    running = start(nodes, how, tmp_path, [*argv, *slow, "--data.batch_size", "2"])
    try:
        end = time.monotonic() + TIMEOUT
        step = tmp_path / "step.0"
        while not step.exists() or int(step.read_text().split()[0]) < 3:
            assert time.monotonic() < end and all(p.poll() is None for p in running), logs(tmp_path)
            time.sleep(0.05)
        ip(f"-n {nodes[1].namespace} link set {nodes[1].device} down")
        cut = time.monotonic()
        # the worker ends by the timeout; torchrun then needs its own time to notice and to give up its peer
        worker = int(step.read_text().split()[1])
        while Path(f"/proc/{worker}").exists() and time.monotonic() < cut + 60:
            time.sleep(0.1)
        assert time.monotonic() - cut < 2 * LOST + 5, logs(tmp_path)
        codes = [finish(p, 90) for p in running]
        assert all(isinstance(c, int) and c != 0 for c in codes), (codes, logs(tmp_path))
        for i in (0, 1):
            assert "Lost contact with" in (tmp_path / f"log{i}").read_text(), logs(tmp_path)
    finally:
        for p in running:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
    fit(config, tmp_path, "--ckpt_path", "last")
    assert distance(newest(tmp_path), reference) < 1e-11


def test_two_nodes_with_two_processes_each(config: Path, tmp_path: Path, nodes: list[Node], reference: Path) -> None:
    argv = ["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path), *strategy("fsdp")]
    running = start(nodes, "static", tmp_path, [*argv, "--data.batch_size", "1"], each=2)
    for p in running:
        assert finish(p) == 0, logs(tmp_path)
    assert distance(newest(tmp_path), reference) < 1e-11
