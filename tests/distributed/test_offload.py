"""Shards in main memory under a mesh of GPUs: what a machine without one can check of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from talklora_pl.adapter.fingerprint import fingerprint
from talklora_pl.distributed.fsdp import move_unsharded
from talklora_pl.distributed.shards import _local_content
from tests.distributed.runs import distance, fit, free_port

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One GPU that is not there."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        yield DeviceMesh("cuda", [0], _init_backend=False)
    finally:
        dist.destroy_process_group()


def test_a_shard_stays_in_main_memory(mesh: DeviceMesh) -> None:
    like = nn.Parameter(DTensor.from_local(torch.empty(4, 2, device=META), mesh, [Shard(0)]), requires_grad=False)
    stored = torch.arange(8.0).view(4, 2)
    got = _local_content(like, stored, "weight", CPU, META)
    assert isinstance(got, nn.Parameter) and isinstance(got.data, DTensor)
    assert got.device == got.to_local().device == CPU  # FSDP2 asks the one and copies the other
    assert (got.shape, got.dtype, got.placements) == (like.shape, like.dtype, like.placements)
    torch.testing.assert_close(got.to_local(), stored)


def test_only_what_is_not_sharded_is_moved(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    like = DTensor.from_local(torch.empty(4, 2, device=META), mesh, [Shard(0)])
    shard = _local_content(nn.Parameter(like, requires_grad=False), torch.ones(4, 2), "weight", CPU, META)
    model[0].weight = shard
    move_unsharded(model, META)
    assert model[0].weight is shard
    assert shard.to_local().device == CPU
    assert {p.device for p in (*model[1].parameters(), *model[2].parameters(), *model[2].buffers())} == {META}


def test_what_is_compared_of_shards_travels_by_the_mesh(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL takes nothing from main memory, where the shards are."""
    model = nn.Sequential(nn.Linear(2, 4, bias=False))
    like = DTensor.from_local(torch.empty(4, 2, device=META), mesh, [Shard(0)])
    model[0].weight = _local_content(nn.Parameter(like, requires_grad=False), torch.ones(4, 2), "0.weight", CPU, META)
    shard: Any = model[0].weight
    monkeypatch.setattr(shard.device_mesh, "_device_type", "meta")  # for one that this machine has not
    sent: list[torch.Tensor] = []

    def all_reduce(values: torch.Tensor, op: object) -> None:
        sent.append(values)
        raise InterruptedError

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with pytest.raises(InterruptedError):
        fingerprint(model)
    assert sent[0].is_meta


@pytest.mark.gpu
@pytest.mark.slow
def test_a_fit_with_shards_in_main_memory(config: Path, tmp_path: Path) -> None:
    name = "talklora_pl.distributed.fsdp.AdapterFSDP2Strategy"
    options = ("--trainer.accelerator", "gpu", "--trainer.strategy.class_path", name)
    one = fit(config, tmp_path / "kept", *options)
    assert distance(fit(config, tmp_path / "offloaded", *options, "--trainer.strategy.cpu_offload=true"), one) < 1e-9
