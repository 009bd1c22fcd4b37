"""Variants of one computation measured in turn, so that a busy machine slows all of them alike.

Time on a GPU is that of the clock, on a CPU that of the processor (one thread): other programs are not in it. Ratios
are those of one round, to the variant that is called the floor.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from talklora_pl.errors import in_a_line
from talklora_pl.memory.live import LiveBytes

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "is_nonzero", "equal"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


@dataclass
class Row:
    """One line of the table.

    Attributes:
        section, setting, name: what was measured.
        ms: median time.
        ratio: to the floor: lower quartile, median, upper quartile.
        tokens_per_s: tokens of the computation, pads left out.
        busy: share of the time in which the GPU computes.
        launches: kernels on a GPU, operators (without views and allocations) on a CPU.
        waits: how often the host waits for a result.
        peak: bytes that were alive at most, above what there was before.
        note: what is to be said of it; alone: why it was not run.
    """

    section: str
    setting: str
    name: str
    ms: float | None = None
    ratio: list[float] = field(default_factory=list)
    tokens_per_s: float | None = None
    busy: float | None = None
    launches: int | None = None
    waits: int | None = None
    peak: int | None = None
    note: str = ""

    def record(self) -> dict[str, Any]:
        return asdict(self)


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operators += not func.is_view and name not in ALLOCATIONS
        by_mask = name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple))
        by_mask = by_mask and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.waits += name in WAITS or name.startswith("_unique") or by_mask
        return func(*args, **(kwargs or {}))


def alternate(
    section: str,
    setting: str,
    variants: dict[str, Callable[[], Any]],
    tokens: int,
    device: str,
    rounds: int,
    count: bool = True,
    until: float = math.inf,
) -> list[Row]:
    """A row per variant; the first is the floor. A variant that fails has the reason for a row.

    Args:
        until: no round is begun after this moment of ``time.monotonic``, once there are two.
    """
    rows = {name: Row(section, setting, name) for name in variants}
    times: dict[str, list[float]] = {name: [] for name in variants}
    first: dict[str, float] = {}
    for round_ in range(rounds + 2):
        if round_ >= 4 and time.monotonic() > until:
            break
        for name, run in variants.items():
            if not rows[name].note:
                try:
                    spent = _seconds(run, device)
                except Exception as e:  # a peer's, or no memory: the others go on
                    rows[name].note = f"failed: {in_a_line(e)[:120]}"
                    _forget(device)
                    continue
                if round_ == 0:
                    first[name] = spent
                if round_ >= 2:
                    times[name].append(spent)
    floor = torch.tensor(next(iter(times.values())))
    for name, spent in times.items():
        row = rows[name]
        if row.note:
            continue
        t = torch.tensor(spent)
        row.ms = float(t.median()) * 1e3
        row.tokens_per_s = tokens / float(t.median())
        if len(t) == len(floor):
            row.ratio = (t / floor).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        # what counts operators on a CPU sees none of compiled code, which then runs as it was written
        if count and not (device == "cpu" and "compile" in name):
            try:
                _count(row, variants[name], device)
            except Exception as e:  # the profiler's, say: the times are there
                row.note = f"not counted: {in_a_line(e)[:120]}"
        if "compile" in name or "graph" in name:
            row.note = f"first: {first[name]:.1f} s. {row.note}".strip()
    return list(rows.values())


def _seconds(run: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _count(row: Row, run: Callable[[], Any], device: str) -> None:
    _forget(device)
    if device == "cpu":
        with _Counted() as counted:
            run()
        row.launches, row.waits = counted.operators, counted.waits
        with LiveBytes() as live:
            run()
        row.peak = live.peak
        return
    from torch.profiler import ProfilerActivity, profile

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    row.peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    row.waits = sum("synchroniz" in str(w.message) for w in said)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    # also what the profiler projects onto the GPU is an event there, but no kernel
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in events if not e.is_user_annotation]
    row.launches = len(kernels)
    if row.ms:
        row.busy = min(1.0, sum(e.time_range.elapsed_us() for e in kernels) / 1e3 / row.ms)


def _forget(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
