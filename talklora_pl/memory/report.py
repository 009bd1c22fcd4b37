"""What memory a fit will take: a line when it starts, a table that is asked for, and advice where it was not enough."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from talklora_pl.balance import balance_losses
from talklora_pl.base.quantization import quantization_of, stored_bytes
from talklora_pl.errors import UserError
from talklora_pl.memory.checkpointing import MODES
from talklora_pl.memory.estimate import Estimator, Need, Placement, state_ratio
from talklora_pl.routing import RoutingCollector

if TYPE_CHECKING:
    from rich.table import Table

SMALL = 2**27
"""Bytes of a base of which nobody asks whether it fits."""
ENOUGH = 2000
"""So many batches are searched for the largest."""
DEVICES = (1, 2, 4, 8)


def estimator(tuner: Any, batch: Mapping[str, Any], accumulates: bool = False) -> Estimator:
    """The estimator of a :class:`~talklora_pl.module.FineTuner`'s training step on a batch.

    Raises:
        UserError: its model cannot be built.
    """

    def loss(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        with RoutingCollector(model, batch["attention_mask"], batch.get("task_types")) as collector:
            # without values nobody can find out that a model reads back only, and needs no mask of the pads
            inputs = batch if "row_borders" in batch else {k: v for k, v in batch.items() if k != "attention_mask"}
            total = tuner.objective.loss(model, inputs)[0]
        balance, _ = balance_losses(next(iter(model.talklora.values())), collector.records)
        return total + balance

    model = tuner.meta_model()
    stored = stored_bytes(model, tuner.base.quantization or quantization_of(model.config))
    return Estimator(model, loss, batch, state_ratio(tuner.optimizer), accumulates, tuner.cuda_graph, stored)


def say(tuner: Any, data: Any, device: torch.device) -> None:
    """One line about memory before the weights of a fit are loaded; nothing of a base too small to matter."""
    if tuner.base_bytes(device) < SMALL or not hasattr(data, "tables"):
        return
    trainer, mode = tuner.trainer, tuner.gradient_checkpointing
    try:
        batch, where = largest_batch(data), placement_of(trainer)
        need = estimator(tuner, batch, trainer.accumulate_grad_batches > 1).need(mode, where)
    except Exception as e:  # a model's code may fail in any way where there are no values; the fit itself may not
        rank_zero_info(unknown(e))
        return
    free = there(device)
    rank_zero_info(line(need, batch, where, mode, free))
    if free is not None and need.total > free:
        rank_zero_warn("This may be too much. " + advice(estimator(tuner, batch), mode, where, len(batch["input_ids"])))


def note_out_of_memory(tuner: Any, data: Any, error: BaseException) -> None:
    """Add to an error of memory what took it and what would take less."""
    if not is_out_of_memory(error) or not hasattr(data, "tables"):
        return
    trainer = tuner.trainer
    try:
        batch, where = largest_batch(data), placement_of(trainer)
        made = estimator(tuner, batch, trainer.accumulate_grad_batches > 1)
        error.add_note(advice(made, tuner.gradient_checkpointing, where, len(batch["input_ids"])))
    except Exception as e:  # see above; the error itself matters more
        error.add_note(unknown(e))


def largest_batch(data: Any) -> dict[str, Any]:
    """The training batch of :class:`~talklora_pl.data.TextData` with most tokens, pads among them; after ``setup``."""
    if "train" not in data.tables:
        raise RuntimeError("rows that are read while the run goes on have no largest batch")
    loader = data.train_dataloader()
    lengths = np.array(data.tables["train"]["length"])
    batches = list(islice(iter(loader.sampler), ENOUGH))
    batch: dict[str, Any] = loader.dataset[max(batches, key=lambda b: len(b.rows) * int(lengths[b.rows].max()))]
    return batch


def placement_of(trainer: Any) -> Placement:
    """How a run is spread."""
    if trainer.world_size == 1:
        return Placement()
    sharded = getattr(trainer.strategy, "loads_base", None) is not None
    offload = bool(getattr(trainer.strategy, "cpu_offload", False))
    return Placement("fsdp" if sharded else "ddp", trainer.world_size, offload)


def there(device: torch.device) -> int | None:
    """Bytes that are free on a device; None: nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and sys.platform == "linux":
        with open("/proc/meminfo") as lines:
            found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
        return found[0] if found else None
    return None


def line(need: Need, batch: Mapping[str, Any], where: Placement, mode: str, free: int | None) -> str:
    """What is said when a fit starts."""
    rows, tokens = batch["input_ids"].shape
    parts = {"base": need.weights, "adapter, gradients and optimiser": need.adapters + need.gradients + need.optimiser}
    parts |= {"activations": need.activations, "logits and the rest": need.logits}
    text = ", ".join(f"{name} {size(n)}" for name, n in parts.items())
    more = f" of {size(free)} that are free" if free is not None else ""
    return (
        f"Memory, estimated: {size(need.total)}{more} ({text}) on {'each device: ' * (where.devices > 1)}{where}, "
        f"largest batch {rows} x {tokens} tokens, gradient_checkpointing {mode}."
    )


def knobs(made: Estimator, mode: str, where: Placement, need: Need, rows: int) -> list[tuple[int, str]]:
    """What would take less, and how much less in bytes, the most first."""
    out = []
    if made.recorded:
        out.append((made.step(mode).peak, "model.cuda_graph: false"))  # type: ignore[arg-type]
    for other in MODES:
        gain = need.total - made.need(other, where).total
        if other != mode and gain > 0:
            slower = {"full": "every layer is computed twice", "selective": "all but products is computed twice"}
            also = ", model.cuda_graph: false" if made.recorded else ""
            out.append((gain, f"model.gradient_checkpointing: {other}{also} ({slower[other]})"))
    if rows > 1:
        gain = (need.activations + need.logits) * (rows - rows // 2) // rows
        out.append((gain, f"data.batch_size: {rows // 2} with trainer.accumulate_grad_batches doubled: the same steps"))
    else:
        out.append(((need.activations + need.logits) // 2, "half of data.max_length"))
    if where.kind != "fsdp":
        gain = need.total - made.need(mode, Placement("fsdp", 2)).total  # type: ignore[arg-type]
        if gain > 0:
            out.append((gain, "trainer.strategy: fsdp over two devices (more with more of them)"))
    elif not where.offload:
        gain = need.weights - made.need(mode, where._replace(offload=True)).weights  # type: ignore[arg-type]
        out.append((gain, "trainer.strategy.cpu_offload: true (slow)"))
    return sorted(out, reverse=True)


def advice(made: Estimator, mode: str, where: Placement, rows: int) -> str:
    """What was alive when memory was out, and what to do."""
    need = made.need(mode, where)  # type: ignore[arg-type]
    parts = ", ".join(f"{name} {size(n)}" for name, n in vars(need).items())
    lines = [f"  {size(gain):>9} less: {text}" for gain, text in knobs(made, mode, where, need, rows)]
    return "\n".join([f"A step takes about {size(need.total)} on each device: {parts}.", *lines])


def table(made: Estimator) -> Table:
    """Bytes on each device by strategy and number of devices, for every way of checkpointing."""
    from rich.table import Table

    out = Table(title="Memory on each device, estimated")
    out.add_column("strategy", no_wrap=True)
    for mode in MODES:
        out.add_column(f"checkpointing\n{mode}", justify="right", no_wrap=True)
    for where in placements():
        out.add_row(str(where), *(size(made.need(mode, where).total) for mode in MODES))
    return out


def placements() -> Iterator[Placement]:
    yield Placement()
    yield Placement("ddp", 2)  # however many
    for n in DEVICES[1:]:
        yield Placement("fsdp", n)


def print_estimate(tuner: Any, data: Any, accumulates: bool) -> None:
    """What ``fit --estimate`` prints."""
    import rich

    data.setup("fit")
    if tuner.base.head.classifies and tuner.base.num_labels is None:
        tuner.base = replace(tuner.base, num_labels=data.num_classes)
    batch = largest_batch(data)
    made = estimator(tuner, batch, accumulates)
    try:
        result = table(made)
    except RuntimeError as e:
        raise UserError(unknown(e)) from None
    rows, tokens = batch["input_ids"].shape
    rich.print(result)
    steps = {mode: made.step(mode) for mode in MODES}
    print(
        f"Largest training batch: {rows} x {tokens} tokens. Of this: base {size(made.frozen)}, trained "
        f"{size(made.trained)}, optimiser {size(made.optimiser)}; forward and backward "
        + ", ".join(f"{size(step.peak)} ({mode})" for mode, step in steps.items())
        + ". A GPU's driver takes about half a GiB beside it."
    )


def unknown(error: Exception) -> str:
    """Why nothing could be estimated."""
    first = (str(error).splitlines() or [""])[0] or type(error).__name__
    return f"Memory cannot be estimated: something in the model depends on values ({first})."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)  # also of libraries that ask the driver by themselves, beside torch's allocator
    beside = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return ("DefaultCPUAllocator: " in text and "memory" in text) or any(each in text for each in beside)


def size(n: int | float) -> str:
    """Bytes for people."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
