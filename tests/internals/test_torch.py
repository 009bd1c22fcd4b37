"""What PyTorch does beside its documented interface."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from talklora_pl.internals import torch as internals


@pytest.fixture
def one_process(tmp_path: os.PathLike[str]) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_own_part_is_what_this_rank_has(one_process: None) -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)])
    assert torch.equal(whole[internals.own_part(sharded)], sharded.to_local())


@pytest.mark.parametrize(("rank", "rows"), [(0, (0, 2)), (1, (2, 4)), (2, (4, 5))])
def test_own_part_of_several(rank: int, rows: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows on three ranks, as FSDP2 spreads them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
    try:
        from torch.distributed.tensor import DTensor

        mesh = init_device_mesh("cpu", (3,))
        local = torch.zeros(rows[1] - rows[0], 3, device="meta")
        sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size((5, 3)), stride=(3, 1))
        assert internals.own_part(sharded) == (slice(*rows), slice(0, 3))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("optimizer", [*internals.FUSED, torch.optim.NAdam])
def test_a_fused_optimiser_leaves_out_a_step_on_the_device(optimizer: type[torch.optim.Optimizer]) -> None:
    """Its weights, moments and count of steps stay as they are, and go on as if there had been no such step."""
    able = optimizer in internals.FUSED

    def train(*gradients: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        p = torch.nn.Parameter(torch.ones(3))
        made = optimizer([p], lr=0.1, **({"fused": True} if able else {}))  # type: ignore[call-arg]
        for g in gradients:
            p.grad = torch.full((3,), g)
            assert internals.step_unless(made, (~p.grad.isfinite().all()).float()) is able
            made.step()
        return p.detach(), {k: v for k, v in made.state[p].items() if isinstance(v, torch.Tensor)}

    (p, state), (want, kept) = train(1.0, float("nan"), 2.0), train(1.0, 2.0)
    assert torch.equal(p, want) is able and not torch.equal(p, torch.ones(3))
    assert not able or all(torch.equal(v, kept[k]) for k, v in state.items())
    assert not internals.step_unless(optimizer([torch.nn.Parameter(torch.ones(3))]), torch.zeros(()))


def test_what_the_cpu_can_is_asked_under_names_that_exist() -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        assert isinstance(getattr(torch.cpu, name)(), bool)
    assert isinstance(internals.cpu_has_bf16(), bool)


def test_a_dispatch_mode_sees_every_call() -> None:
    seen = []

    class Watch(internals.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.empty(3)
    assert seen == [torch.ops.aten.empty.memory_format]


def test_a_stamp_counts_writes_through_any_tensor_of_the_memory() -> None:
    one = torch.nn.Parameter(torch.zeros(3))
    other = torch.nn.Parameter(one.detach())
    stamps = [internals.stamp(one)]
    assert internals.is_as_stamped([one], stamps) and not internals.is_as_stamped([other], stamps)
    assert not internals.is_as_stamped([one, other], stamps)
    other.grad = torch.ones(3)
    torch.optim.AdamW([other]).step()
    assert not internals.is_as_stamped([one], stamps)
    stamps, held = [internals.stamp(one)], one.detach()
    one.data = one.data.clone()
    assert not internals.is_as_stamped([one], stamps) and held.equal(one)


def test_products_are_operators() -> None:
    import torch.nn.attention.varlen  # which registers one of them

    for name in internals.PRODUCTS:
        library, _, operator = name.partition("::")
        assert hasattr(getattr(torch.ops, library), operator), name


def test_shapes_without_values() -> None:
    with internals.ShapesOnly() as shapes:
        p = shapes.of(torch.nn.Parameter(torch.empty(3, 2, device="meta")))
        out = p @ shapes.of(torch.empty(2, 1 << 40, device="meta"))
        assert (out.shape, out.device.type, out.requires_grad) == ((3, 1 << 40), "cpu", True)


def test_leaves() -> None:
    assert internals.tree_leaves(([1, (2,)], {"a": 3})) == [1, 2, 3]


def test_across_is_the_gradient_of_the_direction() -> None:
    d_TF = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    v_TF, l_T1 = torch.randn(5, 3, dtype=torch.float64), torch.linalg.vector_norm(d_TF, dim=-1, keepdim=True)
    (want_TF,) = torch.autograd.grad(d_TF / l_T1, d_TF, v_TF)
    d_TF, l_T1 = d_TF.detach(), l_T1.detach()
    torch.testing.assert_close(internals.across(v_TF, d_TF, l_T1) / l_T1, want_TF)
    # also where l is something else
    v_d_T1 = (v_TF * d_TF).sum(-1, keepdim=True)
    torch.testing.assert_close(internals.across(v_TF, d_TF, 2 * l_T1), v_TF - d_TF * v_d_T1 / (2 * l_T1) ** 2)
