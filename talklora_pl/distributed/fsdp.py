"""FSDP2 for a frozen base with a small trained part.

Only frozen parameters are sharded, one group per decoder layer and one for the rest. Trained tensors stay ordinary
tensors, equal on every rank: their gradients are averaged by one all-reduce per optimiser step and dtype. So shared
parameters, experts that no token chose, the optimiser, clipping and checkpoints work as in one process, and a
checkpoint moves between one process, DDP and FSDP2 of any size.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from talklora_pl.distributed.shards import fill_from_files
from talklora_pl.errors import UserError
from talklora_pl.internals.lightning import data_parallel_over
from talklora_pl.internals.transformers import whole_classes


class AdapterFSDP2Strategy(ModelParallelStrategy):
    """``--trainer.strategy fsdp``: the frozen base sharded over all ranks, the adapters replicated.

    The LightningModule builds its Hugging Face model in ``configure_model`` as the attribute ``model``: on the meta
    device if ``strategy.loads_base`` is true; this strategy then shards it and reads the weight files slice by slice,
    so that no process ever holds the whole base.

    Args:
        timeout: how long a collective may wait for a lost peer before every process ends with an error.
        cpu_offload: keep the shards in main memory and copy each layer to the device when it is needed.
        meta_init: read the base slice by slice; if false every process first loads all of it.
        process_group_backend: ``nccl``, ``gloo``; None chooses by device.
    """

    def __init__(
        self,
        timeout: timedelta = timedelta(minutes=30),
        cpu_offload: bool = False,
        meta_init: bool = True,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.cpu_offload = cpu_offload
        self.loads_base = meta_init
        self._accumulating = False

    def setup_environment(self) -> None:
        data_parallel_over(self, self.num_nodes * self.num_processes)
        super().setup_environment()
        if self.root_device.type == "cpu":
            return_freed_memory()

    def setup(self, trainer: L.Trainer) -> None:
        """Shard the model that ``configure_model`` built, fill it, and make the trained tensors equal on all ranks."""
        assert self.lightning_module is not None
        model = self.lightning_module.model
        if not isinstance(model, nn.Module):
            raise UserError("strategy fsdp needs a LightningModule whose attribute `model` is the Hugging Face model.")
        revision = getattr(getattr(self.lightning_module, "base", None), "revision", None)
        shard_frozen(model, self.device_mesh["data_parallel"], self.cpu_offload, self.root_device, revision)
        super().setup(trainer)
        for tensor in self._replicated():
            dist.broadcast(tensor.detach(), src=0)

    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        move_unsharded(self.model, self.root_device)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning wraps the backward passes of all but the last micro-batch of a step in this."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        if not self._accumulating:
            average_gradients([p for p in self._replicated() if p.requires_grad])

    def _replicated(self) -> list[Tensor]:
        assert self.lightning_module is not None
        tensors = [*self.lightning_module.parameters(), *self.lightning_module.buffers()]
        return [t for t in tensors if not isinstance(t, DTensor)]

    # Checkpoints are those of one process: no collective while saving (peers may be dead), ordinary files, optimiser
    # states by position among the trained parameters. Lightning's own route for this strategy counts frozen ones too.

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        return {name: tensor for name, tensor in state.items() if not isinstance(tensor, DTensor)}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only=weights_only)


def shard_frozen(
    model: nn.Module, mesh: DeviceMesh, cpu_offload: bool, device: torch.device, revision: str | None = None
) -> None:
    """Shard every frozen parameter of `model` over `mesh`; read those on the meta device from the weight files.

    Raises:
        UserError: a frozen parameter that cannot be sharded (quantised), or no layers are found.
    """
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    quantised = next((name for name, p in frozen if not p.dtype.is_floating_point), None)
    if quantised is not None or getattr(model, "is_quantized", False):
        raise UserError(
            f"strategy fsdp cannot shard a quantised base ({quantised or type(model).__name__}). "
            "Use --trainer.strategy ddp, where every process holds the small quantised base, or a base in bfloat16."
        )
    # FSDP2 refuses parameters without a dimension; a single number stays on every rank
    ignored = {p for p in model.parameters() if p.requires_grad or p.dim() == 0}
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, offload_policy=policy, ignored_params=ignored)
    fully_shard(model, mesh=mesh, offload_policy=policy, ignored_params=ignored)
    fill_from_files(model, torch.device("cpu") if cpu_offload else device, device, revision)


def move_unsharded(module: nn.Module, device: torch.device) -> None:
    """Move what is not sharded. ``Module.to`` would exchange the shards, too, whose places FSDP2 remembers."""
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        module.to(device)
        return
    for p in module._parameters.values():
        if p is not None and not isinstance(p, DTensor):
            p.data = p.data.to(device)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)
    for child in module.children():
        move_unsharded(child, device)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a Hugging Face model, by its own list of classes that must stay in one piece.

    Raises:
        UserError: the model names no such class.
    """
    names = whole_classes(model)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    layers = [m for blocks in lists for m in blocks if {c.__name__ for c in type(m).__mro__} & names]
    if not layers:
        raise UserError(
            f"strategy fsdp does not know the layers of {type(model).__name__} (it has no _no_split_modules). "
            "Use --trainer.strategy ddp."
        )
    return layers


def return_freed_memory() -> None:
    """Make glibc give large freed blocks back at once, for ever.

    By itself it learns to keep blocks of the size of a gathered layer, whose holes it then does not reuse: a process
    ended up with more than the whole base.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries do not have it
    if mallopt is not None:
        m_mmap_threshold, initial_value = -3, 128 * 1024
        mallopt(m_mmap_threshold, initial_value)


def average_gradients(parameters: list[Tensor]) -> None:
    """Average the gradients of `parameters` over all ranks, one all-reduce per dtype; a missing one counts as zero."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    # by position, never by a set: every rank must issue the same collectives in the same order
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        group = [p for p in parameters if p.dtype == dtype]
        for p in group:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in group if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        torch._foreach_copy_(
            gradients, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in gradients]), gradients)]
        )
