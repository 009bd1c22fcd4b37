"""Reading a sharded base from its safetensors files: every process reads only its own rows.

A process never holds more of the base than its share and one tensor's slice.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from talklora_pl.base.loading import grown, head_parameters, say_growth, vocabulary
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
    files = _files(model, revision)
    of_tokens = vocabulary(model)
    content: dict[int, Any] = {}  # by identity of the meta tensor, so that tied parameters stay one
    for name, tensor in meta.items():
        key = _stored_name(model, name, files)
        if key is not None and id(tensor) not in content:
            stored = files.tensor(key)
            if tensor.requires_grad and id(tensor) in of_tokens and len(stored) < len(tensor):
                if tensor is model.get_input_embeddings().weight:
                    say_growth(len(stored), len(tensor))
                stored = grown(stored, len(tensor))
            if tensor.requires_grad and stored.shape != tensor.shape:
                continue  # a new head in the place of another
            content[id(tensor)] = _local_content(tensor, stored, name, shard_device, device)
    read = {name: content[id(t)] for name, t in meta.items() if id(t) in content}
    model.load_state_dict(read, strict=False, assign=True)
    mark_initialised(model)
    _initialise_rest(model, device)


def compare_with_files(model: Any, revision: str | None = None) -> dict[str, list[Any]]:
    """What the weight files hold of a head and of what is directly before it, reported as ``from_pretrained`` does.

    Raises:
        UserError: there are no such files.
    """
    files, parameters = _files(model, revision), dict(model.named_parameters(remove_duplicate=False))
    stored = {n: _stored_name(model, n, files) for n in head_parameters(model)}
    shapes = {n: (files.shape(key), tuple(parameters[n].shape)) for n, key in stored.items() if key is not None}
    return {
        "missing_keys": [n for n, key in stored.items() if key is None],
        "mismatched_keys": [(n, had, need) for n, (had, need) in shapes.items() if had != need],
        "unexpected_keys": [],
    }


def _files(model: Any, revision: str | None) -> SafetensorsWeights:
    try:
        return SafetensorsWeights.of(model.config.name_or_path, revision)
    except UserError as e:
        raise UserError(
            f"strategy fsdp reads the base slice by slice: {e} Or pass --trainer.strategy.meta_init false, if every "
            "process can hold the whole base."
        ) from e


def _stored_name(model: Any, name: str, files: SafetensorsWeights) -> str | None:
    """A checkpoint may name a tensor as the model without its head does, or as one with another head."""
    names, prefix = files.names(), f"{getattr(model, 'base_model_prefix', '')}."
    return next((key for key in (name, name.removeprefix(prefix), prefix + name) if key in names), None)


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
        # not from_local: it moves a part that shall stay in main memory to the device of the mesh
        full: torch.Tensor = torch.empty_like(like, device=shard_device, requires_grad=False)
        assert isinstance(full, DTensor)
        full.to_local().copy_(stored[own_part(like)])
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
