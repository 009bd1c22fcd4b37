"""Adapter folders: one safetensors file with everything trained, one JSON with names and options.

=======================  ==========================================================================
``adapter.safetensors``  tensors of the adapter (``layers.*``, ``bank.*``, ``balance.*``) and, as
                         ``base.<name>``, tensors of the base that were trained along (a new head)
``talklora.json``        format version, what base it belongs to, adapter options, experts per layer
=======================  ==========================================================================

Reading a folder imports nothing that it names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from talklora_pl.adapter.config import AdapterConfig
from talklora_pl.adapter.host import adapter_set, remove_adapter
from talklora_pl.adapter.inject import Adapter, adapted_modules, inject
from talklora_pl.errors import UserError
from talklora_pl.registry import import_plugins

FORMAT_VERSION = 1
TENSORS = "adapter.safetensors"
CONFIG = "talklora.json"


def trained_along(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the base itself that are trained along with the adapter, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("talklora.")}


def base_info(model: nn.Module) -> dict[str, Any]:
    """What an adapter remembers of its base."""
    config = getattr(model, "config", None)
    return {
        "name_or_path": getattr(config, "_name_or_path", "") or "",
        "revision": getattr(config, "_commit_hash", None),
        "model_type": getattr(config, "model_type", None),
        "class": type(model).__name__,
    }


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default", **info: Any) -> Path:
    """Write an adapter of ``model`` to ``folder``; every file appears whole or not at all.

    Args:
        info: further plain data for the JSON file, such as ``base`` in place of what the model says of itself.

    Raises:
        UserError: the model has no such adapter.
    """
    adapters = adapter_set(model)
    if name not in adapters:
        raise UserError(f"There is no adapter {name!r}; loaded: {', '.join(adapters) or 'none'}.")
    adapter: Any = adapters[name]
    tensors = dict(adapter.state_dict())
    tensors |= {f"base.{n}": p.detach() for n, p in trained_along(model).items()}
    about = {
        "format_version": FORMAT_VERSION,
        "base": base_info(model),
        "adapter": adapter.config.to_dict(),
        "experts_per_layer": adapter.experts_per_layer,
        **info,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file, write in (
        (TENSORS, lambda p: save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, p, {"format": "pt"})),
        (CONFIG, lambda p: p.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")),
    ):
        part = folder / f".{file}.{os.getpid()}"
        write(part)
        part.replace(folder / file)
    return folder


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON of an adapter folder, checked for form.

    Raises:
        UserError: no such file, not JSON, keys missing or of the wrong type, or another format version.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is no adapter folder: there is no {CONFIG} in it.")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not readable as JSON: {e}") from None
    version = about.get("format_version") if isinstance(about, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version!r}; this talklora_pl reads version {FORMAT_VERSION}.")
    for key in ("adapter", "experts_per_layer", "base"):
        if not isinstance(about.get(key), dict):
            raise UserError(f"{path}: {key!r} is missing or not a mapping.")
    for layer, count in about["experts_per_layer"].items():
        if type(count) is not int or not 1 <= count <= 4096:
            raise UserError(f"{path}: experts_per_layer[{layer!r}] is {count!r}, not a number of experts.")
    return about


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    trainable: bool = False,
    plugins: list[str] | None = None,
) -> Adapter:
    """Give ``model`` the adapter of a folder and turn it on. On any error the model is left as it was.

    Args:
        model: the base, as it was when the adapter was trained.
        trainable: leave the adapter's tensors trainable.
        plugins: modules of your own to import first, if the adapter uses components that they register.

    Raises:
        UserError: damaged or foreign files, unknown components, or an adapter for another model (shapes named).
    """
    import_plugins(plugins or [])
    about = read_config(folder)
    try:
        config = AdapterConfig.from_dict(about["adapter"])
    except UserError as e:
        raise UserError(f"{Path(folder) / CONFIG}: {e}") from None
    path = Path(folder) / TENSORS
    try:
        with safe_open(path, "pt") as f:
            shapes = {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118
            try:
                adapter = inject(model, config, name, about["experts_per_layer"], device="meta")
            except UserError as e:
                raise UserError(f"The adapter in {folder} does not fit this {type(model).__name__}: {e}") from None
            try:
                _check_shapes(folder, model, adapter, shapes)
                tensors = {k: f.get_tensor(k) for k in shapes}
            except BaseException:
                remove_adapter(model, name)
                raise
    except FileNotFoundError:
        raise UserError(f"{folder} is no adapter folder: there is no {TENSORS} in it.") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or not a safetensors file: {e}") from None

    along = {k.removeprefix("base."): tensors.pop(k) for k in list(tensors) if k.startswith("base.")}
    device = {n: next(m.parameters()).device for n, m in adapted_modules(model).items()}  # type: ignore[attr-defined]
    default = next(iter(device.values()))
    adapter.load_state_dict(
        {k: v.to(device.get(_layer_of(k, device), default)) for k, v in tensors.items()}, assign=True
    )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in along.items():
            parameters[key].copy_(value)
    adapter.requires_grad_(trainable)
    return adapter


def _layer_of(key: str, layers: dict[str, torch.device]) -> str:
    """Name of the adapted module that a tensor belongs to, or the empty string for shared ones."""
    if not key.startswith("layers."):
        return ""
    parts = key.removeprefix("layers.").split(".")
    return next((n for i in range(len(parts), 0, -1) if (n := ".".join(parts[:i])) in layers), "")


def _check_shapes(folder: Any, model: nn.Module, adapter: Adapter, got: dict[str, tuple[int, ...]]) -> None:
    want: dict[str, tuple[int, ...]] = {k: tuple(v.shape) for k, v in adapter.state_dict().items()}
    parameters = dict(model.named_parameters())
    for key in got:
        if key.startswith("base.") and key.removeprefix("base.") in parameters:
            want[key] = tuple(parameters[key.removeprefix("base.")].shape)
    where = f"The adapter in {folder} does not fit this {type(model).__name__}"
    for key in want.keys() | got.keys():
        if key not in got:
            raise UserError(f"{where}: the file lacks the tensor {key!r}.")
        if key not in want:
            raise UserError(f"{where}: the file has a tensor {key!r} that the model has no place for.")
        if want[key] != got[key]:
            raise UserError(
                f"{where}: {key!r} has shape {list(got[key])} in the file, but the model needs {list(want[key])}."
            )


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes: adapter tensors (``talklora.*``) and base tensors trained along, by name."""
    adapters = {f"talklora.{k}": v for k, v in adapter_set(model).state_dict().items()}
    return adapters | {n: p.detach() for n, p in trained_along(model).items()}
