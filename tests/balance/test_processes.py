"""Balance losses and loss-free balancing in two real processes equal one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from talklora_pl.adapter import Adapter, RoutingCollector
from tests.distributed.runs import SERVER, free_port
from tests.methods.matrix import adapted, config_of

LOSSES: list[dict[str, Any]] = [
    {"name": "switch", "scope": "model", "count": "per_choice"},
    {"name": "poisson"},
    {"name": "normal", "scope": "router", "memory": "ema", "decay": 0.5},
    {"name": "importance_cv"},
    {"name": "localised", "delta": 0.2},
    {"name": "z_loss"},
]
IDS = torch.tensor([[1, 5, 2, 9, 7], [3, 3, 8, 0, 6], [4, 10, 2, 2, 1], [8, 7, 6, 5, 0]])
# unequal numbers of real tokens per process
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]])
TASKS = torch.tensor([1, 0, 0, 1])


class Step(torch.nn.Module):
    """What DDP wraps: one micro-step that returns the balance losses."""

    def __init__(self) -> None:
        super().__init__()
        config = config_of("lora", "talking", "loss_free", balance=LOSSES, dtype="float64")
        self.model, self.adapter = adapted(config, values=None)
        self.model.double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.adapter.layers.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        self.model.train()

    def forward(self, rows: slice) -> Tensor:
        with RoutingCollector(self.adapter, MASK[rows], TASKS[rows]) as collector:
            self.model(IDS[rows], MASK[rows])
        self.adapter.count_loads(collector.records)
        return torch.stack([self.adapter.balance[b["name"]](collector.records) for b in LOSSES])


def train(step: Any, adapter: Adapter, micro_steps: list[slice]) -> dict[str, Tensor]:
    """Two optimiser steps of several micro-steps each; everything that results."""
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    out = {}
    for s in range(2):
        optimizer.zero_grad()
        for m, rows in enumerate(micro_steps):
            losses = step(rows)
            (losses.sum() / len(micro_steps)).backward()
            out[f"losses.{s}.{m}"] = losses.detach()
        out |= {f"grad.{s}.{n}": p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
        optimizer.step()
        adapter.after_optimizer_step()
    return out | adapter.state_dict()


def worker(rank: int, port: int, queue: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    step = Step()
    # B gets no gradient from losses on the routing of the last layer's Linear
    ddp = DistributedDataParallel(step, find_unused_parameters=True)
    half = [slice(0, 1), slice(2, 3)] if rank == 0 else [slice(1, 2), slice(3, 4)]
    out = train(ddp, step.adapter, half)
    queue.put((rank, {k: v.detach().numpy() for k, v in out.items()}))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes() -> dict[int, dict[str, Tensor]]:
    port, queue = free_port(), SERVER.Queue()
    processes = [SERVER.Process(target=worker, args=(rank, port, queue)) for rank in range(2)]
    for p in processes:
        p.start()
    try:
        got = dict(queue.get(timeout=300) for _ in processes)
    finally:
        for p in processes:
            p.join(timeout=30)
            p.kill()
    return {rank: {k: torch.from_numpy(v) for k, v in out.items()} for rank, out in got.items()}


@pytest.mark.slow
def test_two_processes_with_accumulation_equal_one(two_processes: dict[int, dict[str, Tensor]]) -> None:
    """Values, gradients, trained loss parameters, counts and routing biases; the micro-steps have the same rows."""
    step = Step()
    want = train(step, step.adapter, [slice(0, 2), slice(2, 4)])
    assert sum(k.startswith("grad.1.balance") for k in want) == 2
    assert any(k.endswith("router.bias") and v.abs().sum() > 0 for k, v in want.items())
    for rank in range(2):
        for key, value in want.items():
            got = two_processes[rank][key]
            torch.testing.assert_close(got.to(value), value, rtol=1e-6, atol=1e-9, msg=f"rank {rank}: {key}")
