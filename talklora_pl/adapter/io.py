"""Save an adapter to a folder, load it into a model. What lies in the folder: :mod:`talklora_pl.adapter.files`."""

from __future__ import annotations

import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from talklora_pl.adapter.adapters import adapter_set, base_alone, get_adapter
from talklora_pl.adapter.config import AdapterConfig
from talklora_pl.adapter.files import (
    CONFIG,
    BuildLimits,
    check_digest,
    open_tensors,
    shapes_of,
    short,
)
from talklora_pl.adapter.fingerprint import agree, fingerprint
from talklora_pl.adapter.host import check_no_peft
from talklora_pl.adapter.hub import local_folder
from talklora_pl.adapter.inject import Adapter, Layers, build, check_name, install, let_train, selected_parameters
from talklora_pl.adapter.metadata import AdapterMetadata, BaseInfo, read_metadata, write_files
from talklora_pl.base import portable
from talklora_pl.base.loading import vocabulary
from talklora_pl.base.quantization import quantization_of
from talklora_pl.errors import UserError
from talklora_pl.names import ADAPTERS, base_parameters, in_base
from talklora_pl.registry import import_plugins

Shapes = dict[str, tuple[tuple[int, ...], str]]
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def base_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Tensors of the base itself that are trained and saved with an adapter, by name."""
    adapters = adapter_set(model)

    def selected(adapter: str) -> set[str]:
        return selected_parameters(get_adapter(model, adapter).config.modules_to_save, model)

    wanted, others = selected(name), {n for a in adapters if a != name for n in selected(a)}
    return {
        n: p.detach() for n, p in base_parameters(model).items() if n in wanted or (p.requires_grad and n not in others)
    } | adapters.switch.values_of(name)


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes: tensors of adapters (``talklora.*``) and of the base, by name."""
    adapters = adapter_set(model)
    tensors = {f"{ADAPTERS}.{k}": v for k, v in adapters.state_dict().items()}
    return tensors | {n: p for a in adapters for n, p in base_tensors(model, a).items()}


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The tensors of an adapter file, by their names in it."""
    saved = {f"base.{n}": p for n, p in base_tensors(model, name).items()}
    return {**get_adapter(model, name).state_dict(), **saved}


def adapter_metadata(model: nn.Module, name: str = "default", **base: Any) -> AdapterMetadata:
    """What an adapter file holds beside its tensors.

    Args:
        base: fields of :class:`~talklora_pl.adapter.metadata.BaseInfo` in place of what the model knows of itself, such
            as ``name_or_path`` and ``revision``. A local folder is stored by its full path.

    Raises:
        UserError: the model has no such adapter, it also has one of PEFT, or there is no such field.
    """
    adapter = get_adapter(model, name)
    check_no_peft(model)
    if unknown := base.keys() - {f.name for f in fields(BaseInfo)}:
        raise UserError(f"The metadata of a base have no entry {sorted(unknown)[0]!r}.")
    config = getattr(model, "config", None)
    known = {
        "name_or_path": adapter_set(model).base_path,
        "revision": None,  # transformers does not say which it loaded; who asked for one passes it
        "model_type": getattr(config, "model_type", None),
        # FSDP2 puts a class of its own, FSDPxyz, in front of the model's
        "class_name": type(model).__name__.removeprefix("FSDP"),
        "quantization": quantization_of(config),
        **base,
    }
    if "name_or_path" in base:
        known["name_or_path"] = portable(os.fspath(base["name_or_path"]))
    if "fingerprint" not in known:
        known["fingerprint"] = base_fingerprint(model, name)
    return AdapterMetadata(
        base=BaseInfo(**known),
        adapter=adapter.config.to_dict(),
        experts_per_layer={n: e for n, e in adapter.experts_per_layer.items() if n not in adapter.plain_layers},
        plain_layers=list(adapter.plain_layers),
    )


def base_fingerprint(model: nn.Module, name: str = "default", like: str | None = None) -> str | None:
    """:func:`~talklora_pl.adapter.fingerprint.fingerprint` of what an adapter does not train."""
    with base_alone(model):
        return fingerprint(model, base_tensors(model, name), like)


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default", **base: Any) -> Path:
    """Write an adapter of ``model`` to ``folder``.

    Args:
        base: as in :func:`adapter_metadata`.

    Raises:
        UserError: the model has no such adapter.
    """
    write_files(Path(folder), adapter_tensors(model, name), adapter_metadata(model, name, **base))
    return Path(folder)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    trainable: bool = False,
    plugins: list[str] | None = None,
    revision: str | None = None,
    check_base: bool = True,
) -> Adapter:
    """Give ``model`` the adapter of a folder and turn it on. On any error the model is left as it was.

    Args:
        model: the base, as it was when the adapter was trained, in any floating-point dtype.
        folder: a folder, or the name of a repository on the hub.
        trainable: leave what was trained trainable.
        plugins: modules of your own to import first, if the adapter uses components that they register.
        revision: branch, tag or commit on the hub.
        check_base: refuse a base with other weights than the adapter was trained on.

    Raises:
        UserError: damaged or foreign files, unknown components, or an adapter for another model.
    """
    import_plugins(plugins or [])
    check_name(model, name)
    folder = local_folder(folder, revision)
    metadata = read_metadata(folder)
    misfit = f"The adapter in {folder} does not fit this {type(model).__name__}"
    try:
        config = metadata.config()
    except UserError as e:
        raise UserError(f"{folder / CONFIG}: {short(e)}") from None
    _check_kind(model, metadata, misfit)
    if trainable:
        let_train(model)
    # the base is looked at as it is without the heads and new tokens of other adapters
    with base_alone(model), open_tensors(folder) as f:
        shapes = shapes_of(f)
        adapter, built = _build(model, config, metadata, shapes, misfit)
        own = adapter.state_dict()
        base_keys = _check_shapes(model, own, shapes, misfit)
        if check_base:
            _check_base(model, metadata, base_keys, misfit)
        check_digest(folder, metadata.tensors_sha256)
        tensors = {k: f.get_tensor(k) for k in shapes}
    adapter.load_state_dict({k: tensors[k].to(v.device) for k, v in own.items()}, assign=True)
    if any(t.is_meta for t in adapter.state_dict().values()):
        raise UserError(f"{misfit}: some of its layers have no weights in memory (meta device, offloading).")
    adapter.requires_grad_(trainable)
    install(model, adapter, built, name)
    switch = adapter_set(model).switch
    for parameter, key in base_keys.items():
        switch.add_value(model, parameter, name, tensors[key])
    for parameter, p in base_parameters(model).items():  # modules_to_save may name what the file has nothing of
        p.requires_grad_(trainable and parameter in base_keys)
    return adapter


def _check_kind(model: nn.Module, metadata: AdapterMetadata, misfit: str) -> None:
    want, got = metadata.base.model_type, getattr(getattr(model, "config", None), "model_type", None)
    if want and got and want != got:
        raise UserError(f"{misfit}: it belongs to a {short(want)} model ({short(metadata.base.name_or_path)}).")
    modules = {n for n, _ in model.named_modules()}
    for layer in [*metadata.experts_per_layer, *metadata.plain_layers]:
        if layer not in modules or not in_base(layer):
            raise UserError(f"{misfit}: the model has no module {short(layer)}.")


def _build(
    model: nn.Module, config: AdapterConfig, metadata: AdapterMetadata, shapes: Shapes, misfit: str
) -> tuple[Adapter, Layers]:
    """The adapter without its tensors' values. Modules are taken by name: no pattern out of a file is ever run."""
    if bool(metadata.plain_layers) != (config.plain is not None):
        raise UserError(f"{misfit}: its options and its list of plain_layers contradict each other.")
    limits = BuildLimits(len(shapes), sum(math.prod(s) for s, _ in shapes.values()))
    try:
        with limits:
            adapter, built = build(model, metadata.exact_config(config), metadata.experts_per_layer)
    except UserError as e:
        raise UserError(f"{misfit}: {short(e)}") from None
    except Exception as e:  # options out of a file can be wrong in ways that no component foresees
        raise UserError(f"{misfit}: its options cannot be built: {type(e).__name__}: {short(e)}") from None
    adapter.config = config
    return adapter, built


def _check_shapes(model: nn.Module, own: dict[str, Tensor], got: Shapes, misfit: str) -> dict[str, str]:
    """Compares the file's tensors with what the model needs; returns the base's parameters in it with their keys."""
    parameters = base_parameters(model)
    base_keys = {n: f"base.{n}" for n in parameters if f"base.{n}" in got}
    want: dict[str, Tensor] = own | {k: parameters[n] for n, k in base_keys.items()}
    for key in sorted(want.keys() | got.keys()):
        if key not in got:
            raise UserError(f"{misfit}: the file lacks the tensor {key!r}.")
        if key not in want:
            raise UserError(f"{misfit}: the file has a tensor {short(key)} that the model has no place for.")
        shape, dtype = got[key]
        need = tuple(want[key].shape)
        if key.startswith("base.") and id(want[key]) in vocabulary(model):  # it may have grown by new tokens
            need = (shape[0], *need[1:]) if shape and shape[0] > 0 else need
        if shape != need:
            raise UserError(f"{misfit}: {key!r} has shape {list(shape)} in the file, but the model needs {list(need)}.")
        if want[key].is_floating_point() != (dtype in FLOATS) or (
            not want[key].is_floating_point() and OTHERS.get(dtype) != want[key].dtype
        ):
            raise UserError(f"{misfit}: {key!r} has dtype {dtype} in the file, but the model needs {want[key].dtype}.")
    return base_keys


def _check_base(model: nn.Module, metadata: AdapterMetadata, base_keys: dict[str, str], misfit: str) -> None:
    want = metadata.base.fingerprint
    got = fingerprint(model, base_keys, like=want)
    if want is not None and got is not None and not agree(want, got):
        raise UserError(
            f"{misfit}: it was trained on other weights, those of {short(metadata.base.name_or_path)}"
            + (f" at revision {short(metadata.base.revision)}" if metadata.base.revision else "")
            + ". Load that base (check_base=False loads the adapter nevertheless)."
        )
