"""From a run, or a checkpoint of one, to an exported folder."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import AutoTokenizer

from talklora_pl.adapter.metadata import AdapterMetadata
from talklora_pl.base import BaseModel, load_config, load_tokenizer, portable
from talklora_pl.base.description import describe, pool_before
from talklora_pl.base.heads import HEADS
from talklora_pl.base.quantization import quantization_of
from talklora_pl.distributed.checkpoint import read_checkpoint
from talklora_pl.errors import UserError
from talklora_pl.export import write_folder
from talklora_pl.export.auto import from_pretrained
from talklora_pl.export.card import Facts
from talklora_pl.export.merge import ALTERNATIVES, merge_adapter, why_not
from talklora_pl.paths import expand

RUN = "talklora_run"
"""Entry of a checkpoint with what the model card tells of its run."""


def facts_of(trainer: L.Trainer) -> Facts:
    """What the model card tells of a run: plain data."""
    numbers = {k: float(v) for k, v in trainer.callback_metrics.items()}
    numbers = {k: v for k, v in numbers.items() if math.isfinite(v)}
    data: Any = getattr(trainer, "datamodule", None)
    sources = getattr(data, "sources", {})
    return Facts(
        data=[f"{split}: {_data_name(s)}" for split in ("train", "val") for s in sources.get(split, [])],
        metrics={
            k: v
            for k, v in sorted(numbers.items())
            if not k.startswith(("load/", "val_load/", "alerts/", "train/", "cost/"))
        },
        routing={k: v for k, v in sorted(numbers.items()) if k.startswith("load/") and k.count("/") == 1},
        steps=trainer.global_step,
        labels=list(getattr(data, "class_names", [])),
    )


def _data_name(source: Any) -> str:
    """Name of a data set, without the folders of this machine."""
    local = os.path.exists(expand(source.path)) or os.path.isabs(source.path)
    return Path(source.path).name if local else source.path


def export_tensors(
    folder: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: AdapterMetadata, base: BaseModel, facts: Facts
) -> Path:
    """:func:`~talklora_pl.export.write_folder` with the configuration and the tokenizer of ``base``."""
    config: Any = load_config(base)
    try:
        tokenizer = load_tokenizer(base)
    except UserError:
        tokenizer = None  # a base without one has been trained, so it can be exported
    if base.head.classifies:
        pool_before(config, describe(config, tokenizer).pad_id)
        if len(facts.labels) == config.num_labels:
            config.id2label = dict(enumerate(facts.labels))
            config.label2id = {name: i for i, name in enumerate(facts.labels)}
    return write_folder(folder, tensors, metadata, config, tokenizer, facts)


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    base: str | None = None,
    license: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the adapter folder of a checkpoint.

    Args:
        checkpoint: a file, or the folder of a run: its best checkpoint, or the last where there is no best.
        base: another place of the base's configuration and tokenizer; it is also what the folder will name.
        license: of the adapter, for the model card.
        trust_remote_code: run Python code that comes with the base.

    Raises:
        UserError: not a checkpoint of this package, or its base cannot be found.
    """
    path = find_checkpoint(Path(expand(checkpoint)))
    data = read_checkpoint(path)
    metadata = AdapterMetadata.from_dict(data["talklora"], path)
    if metadata.base.task not in HEADS or not all(isinstance(t, Tensor) for t in data["state_dict"].values()):
        raise UserError(f"{path} is damaged: it is no checkpoint of a run with an adapter.")
    if base is not None:
        metadata = replace(metadata, base=replace(metadata.base, name_or_path=portable(base), revision=None))
    info: Any = metadata.base
    model = BaseModel(
        path=info.name_or_path,
        task=info.task,
        revision=info.revision,
        num_labels=info.num_labels,
        trust_remote_code=trust_remote_code,
    )
    if (kind := load_config(model).model_type) != info.model_type:
        raise UserError(f"The adapter of {path} belongs to a {info.model_type} model, and {model.path} is a {kind}.")
    labels = data.get("TextData", {}).get("class_names", [])
    facts = Facts(**data[RUN]) if RUN in data else Facts(steps=data["global_step"], labels=labels)
    return export_tensors(folder, tensors_of(data), metadata, model, replace(facts, license=license or facts.license))


def merge_checkpoint(
    checkpoint: str | os.PathLike[str], folder: str | os.PathLike[str], base: str | None = None
) -> Path:
    """Write the whole model of a checkpoint with its adapter merged into the weights, as ``save_pretrained`` does.

    Args:
        folder: must not hold anything yet.

    Raises:
        UserError: the adapter cannot be merged (before any weights are loaded), or as :func:`export_checkpoint`.
    """
    path, folder = find_checkpoint(Path(expand(checkpoint))), Path(expand(folder))
    metadata = AdapterMetadata.from_dict(read_checkpoint(path)["talklora"], path)
    if reason := why_not(metadata.config(), metadata.experts_per_layer):
        raise UserError(f"The adapter of {path} cannot be merged: {reason}. {ALTERNATIVES}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; choose another place.")
    into_full_precision(metadata, base)
    with tempfile.TemporaryDirectory() as scratch:
        adapter = export_checkpoint(path, Path(scratch) / "adapter", base)
        model = from_pretrained(HEADS[str(metadata.base.task)].auto_class, adapter)
        merge_adapter(model)
        model.save_pretrained(folder)
        if (adapter / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(adapter).save_pretrained(folder)
    return folder


def into_full_precision(metadata: AdapterMetadata, base: str | None) -> None:
    """Before a merge into weights: say what they are, where the adapter was trained on others.

    Raises:
        UserError: the base's weights are stored in few bits, so nothing can be added to them.
    """
    path, revision = (base, None) if base else (metadata.base.name_or_path, metadata.base.revision)
    if stored := quantization_of(load_config(BaseModel(path, task=metadata.base.task, revision=revision))):  # type: ignore[arg-type]
        raise UserError(
            f"The weights of {path!r} are stored in few bits ({stored}), and a merge would be lost in their rounding. "
            "--base FULL_PRECISION names the same model as it was before; the adapter alone exports without it."
        )
    if trained := metadata.base.quantization:
        rank_zero_info(
            f"The adapter was trained on {trained} weights and goes into those of {path} in full precision, from which "
            "they differ by rounding."
        )


def tensors_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an adapter file, from a checkpoint's."""
    ours = "model.talklora.default."
    out: dict[str, Tensor] = {}
    for key, value in checkpoint["state_dict"].items():
        if key.startswith(ours) or not key.startswith("model.talklora."):  # what a run compares with is not its outcome
            out[key.removeprefix(ours) if key.startswith(ours) else f"base.{key.removeprefix('model.')}"] = value
    return out


def find_checkpoint(path: Path) -> Path:
    """The checkpoint to export: ``path`` itself, or in the folder of a run the best, else the last."""
    if not path.is_dir():
        return path
    for name in ("best.ckpt", "last.ckpt"):
        for place in (path / name, path / "checkpoints" / name):
            if place.is_file():
                return place
    raise UserError(f"There is no best.ckpt or last.ckpt in {path} or in {path / 'checkpoints'}.")


def store_facts(checkpoint: dict[str, Any], facts: Facts) -> None:
    """Keep the facts of the run in a checkpoint."""
    checkpoint[RUN] = asdict(facts)


def gather_full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in memory of this process; every process has to call this, since a tensor may be spread over several."""
    out: dict[str, Any] = {}
    for key, value in tensors.items():
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        out[key] = full.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return out
