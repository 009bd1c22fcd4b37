"""What stands behind ``AutoModel...from_pretrained(FOLDER, trust_remote_code=True)``: base first, then the adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from talklora_pl.adapter.files import open_tensors, read_json, shapes_of, short
from talklora_pl.adapter.hub import is_repository_name, local_folder
from talklora_pl.adapter.io import load_adapter
from talklora_pl.adapter.metadata import read_metadata
from talklora_pl.base import resolve
from talklora_pl.base.description import pool_before, text_config
from talklora_pl.base.heads import HEADS
from talklora_pl.errors import UserError
from talklora_pl.internals.transformers import take_attention

BASE, REVISION = "base_model_name_or_path", "base_model_revision"
"""Where ``config.json`` names the base."""
LABELS = ("id2label", "label2id", "problem_type")
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
OURS = ("_from_auto", "_commit_hash", "adapter_kwargs", "trust_remote_code", "code_revision", "subfolder")


def from_pretrained(
    auto_class: str,
    folder: str | os.PathLike[str],
    config: PretrainedConfig | None = None,
    base: str | os.PathLike[str] | PreTrainedModel | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    check_base: bool = True,
    plugins: list[str] | str | None = None,
    trainable: bool = False,
    **options: Any,
) -> Any:
    """The base model with the adapter of ``folder`` on, in eval mode; an instance of the base's own class.

    Args:
        auto_class: name of the class of transformers that loads the base.
        folder: exported adapter folder or hub repository.
        config: what the caller made of the folder's ``config.json``; what differs from the file goes to the base.
        base: another place of the base (hub name, folder), or the loaded base itself.
        base_revision: of the base on the hub.
        revision: of the adapter on the hub.
        check_base, plugins, trainable: as in :func:`talklora_pl.load_adapter`.
        options: of the base's ``from_pretrained`` (dtype, device_map, attn_implementation, ...). The base's own remote
            code is never run; load such a base yourself and pass it as ``base``.

    Raises:
        UserError: the folder or the base cannot be loaded, or they do not belong together.
    """
    hub = {k: options.pop(k) for k in HUB if k in options}
    options = {k: v for k, v in options.items() if k not in OURS}
    here = local_folder(folder, revision, **hub)
    read_metadata(here)  # what is damaged is refused before a base is loaded
    settings = read_json(here / "config.json")
    info = None
    if isinstance(base, PreTrainedModel):
        model: Any = base
    else:
        path, base_revision = _where(here, settings, base, base_revision)
        hub["revision"] = base_revision
        base_config = _base_config(here, path, config, hub)
        head = next(head for head in HEADS.values() if head.auto_class == auto_class)
        if head.classifies:
            _take_labels(here, base_config)
            options.setdefault("ignore_mismatched_sizes", True)  # the head is the adapter's
        loaded = _load(head.auto(base_config), path, config=base_config, **hub, **options)
        model, info = loaded if options.get("output_loading_info") else (loaded, None)
    plugins = [plugins] if isinstance(plugins, str) else plugins
    load_adapter(model, here, check_base=check_base, plugins=plugins, trainable=trainable)
    model.eval()
    return model if info is None else (model, info)


def _where(here: Path, settings: dict[str, Any], base: Any, revision: str | None) -> tuple[str, str | None]:
    """Path or name of the base, and its revision."""
    if base is not None:
        return resolve(str(base)), revision
    named, at = settings.get(BASE), revision or settings.get(REVISION)
    place = f"{here / 'config.json'}: {BASE}"
    if not isinstance(named, str) or not named or not isinstance(at, (str, type(None))):
        raise UserError(f"{place} does not say what the base is; pass base=NAME.")
    if ".." in named or not (is_repository_name(named) or named.startswith("package:") or os.path.isabs(named)):
        raise UserError(f"{place} is {short(named)}, neither a hub name nor a full path; pass base=NAME.")
    if os.path.isabs(named) and not Path(named).exists():
        raise UserError(f"{place}: the base {short(named)} is not on this machine; pass base=FOLDER or base=HUB_NAME.")
    return resolve(named), at


def _take_labels(here: Path, config: PretrainedConfig) -> None:
    """The adapter's classes; a number of them that its own tensors do not have would only take memory."""
    written = AutoConfig.from_pretrained(here)
    with open_tensors(here) as f:
        rows = {shape[0] for key, (shape, _) in shapes_of(f).items() if key.startswith("base.") and shape}
    if written.num_labels not in rows:
        raise UserError(f"{here / 'config.json'}: no trained head in the folder has {written.num_labels} classes.")
    for key in LABELS:
        if (value := getattr(written, key, None)) is not None:
            setattr(config, key, value)
    if (pad_id := text_config(written).pad_token_id) is not None:
        pool_before(config, pad_id)


def _base_config(here: Path, path: str, config: Any, hub: dict[str, Any]) -> PretrainedConfig:
    """The base's own configuration, with what the caller asked for."""
    out = _load(AutoConfig, path, **hub)
    if config is not None:
        before, asked = AutoConfig.from_pretrained(here).to_dict(), config.to_dict()
        for key, value in asked.items():
            if before.get(key) != value and key not in ("auto_map", BASE, REVISION):
                setattr(out, key, value)
        take_attention(out, config)
    return out


def _load(auto: Any, path: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(path, **options)
    except (OSError, ValueError) as e:
        first = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(f"The adapter's base {path!r} cannot be loaded: {first}. base=NAME names another place.") from e
