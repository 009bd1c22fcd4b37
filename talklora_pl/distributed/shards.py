"""Reading a sharded base from its safetensors files: every process reads only its own rows.

A process never holds more of the base than its share and one tensor's slice.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from talklora_pl.base.weights import SafetensorsWeights
from talklora_pl.errors import UserError
from talklora_pl.internals.torch import own_part
from talklora_pl.internals.transformers import initialise, mark_initialised


def fill_from_files(model: Any, shard_device: torch.device, device: torch.device, revision: str | None = None) -> None:
    """Replace every tensor of `model` that is on the meta device by its content.

    Frozen parameters (DTensors after ``fully_shard``) are read from the files that ``model.config`` was read from;
    what the files lack (a fresh classification head) and buffers that are in no file (rotary frequencies) are
    initialised as Hugging Face does it.

    Args:
        model: a Hugging Face model, partly on the meta device.
        shard_device: where this rank's part of the sharded parameters goes.
        device: where everything else goes.
        revision: of the base on the hub, as it was asked for; transformers does not keep it.

    Raises:
        UserError: the files do not hold the model's parameters under the names the model gives them.
    """
    meta = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}
    meta |= {name: b for name, b in model.named_buffers(remove_duplicate=False) if b.is_meta}
    if not meta:
        return
    try:
        files = SafetensorsWeights.of(model.config.name_or_path, revision)
    except UserError as e:
        raise UserError(
            f"strategy fsdp reads the base slice by slice: {e} Or pass --trainer.strategy.meta_init false, if every "
            "process can hold the whole base."
        ) from e
    names = files.names()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    content: dict[int, Any] = {}  # by identity of the meta tensor, so that tied parameters stay one
    for name, tensor in meta.items():
        key = next((key for key in (name, name.removeprefix(prefix), prefix + name) if key in names), None)
        if key is not None and id(tensor) not in content:
            content[id(tensor)] = _local_content(tensor, files.tensor(key), name, shard_device, device)
    read = {name: content[id(t)] for name, t in meta.items() if id(t) in content}
    model.load_state_dict(read, strict=False, assign=True)
    mark_initialised(model)
    _initialise_rest(model, device)


def _local_content(
    like: torch.Tensor, stored: torch.Tensor, name: str, shard_device: torch.device, device: torch.device
) -> Any:
    """A copy of this rank's part of a stored tensor, shaped and typed as the meta tensor `like`."""
    if stored.shape != like.shape:
        raise UserError(
            f"The weight files hold {name} with shape {list(stored.shape)}, the model needs {list(like.shape)}. "
            "Pass --trainer.strategy.meta_init false, so that Hugging Face converts the weights."
        )
    if isinstance(like, DTensor):
        local = stored[own_part(like)].to(shard_device, like.dtype, copy=True)
        full: torch.Tensor = DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    else:
        full = stored.to(device, like.dtype, copy=True)
    return nn.Parameter(full, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else full


def _initialise_rest(model: Any, device: torch.device) -> None:
    """Initialise, module by module, what no file holds: trained parameters and buffers."""
    for module_name, module in model.named_modules():
        parameters = {name: p for name, p in module._parameters.items() if p is not None and p.is_meta}
        buffers = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        for name, p in parameters.items():
            if not p.requires_grad:
                raise UserError(
                    f"The weight files of the base lack {module_name}.{name}, or hold it under another name. Pass "
                    "--trainer.strategy.meta_init false, so that Hugging Face converts the weights."
                )
            module._parameters[name] = nn.Parameter(torch.empty_like(p, device=device))
        for name, b in buffers.items():
            module._buffers[name] = torch.empty_like(b, device=device)
        if parameters or buffers:
            initialise(model, module)
