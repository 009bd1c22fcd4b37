"""An adapter that is a fixed low-rank change, as the folder that PEFT writes for LoRA."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from talklora_pl.adapter.files import write_json
from talklora_pl.adapter.inject import build
from talklora_pl.adapter.metadata import AdapterMetadata
from talklora_pl.base.heads import HEADS
from talklora_pl.export.merge import low_rank, why_not
from talklora_pl.sites import LowRank


def write_peft(folder: Path, tensors: dict[str, Tensor], metadata: AdapterMetadata, config: PretrainedConfig) -> bool:
    """Write ``folder`` if the adapter is a fixed low-rank change of the weights; whether it is one.

    Scale, cores and uniform weights are multiplied into ``lora_B``, so PEFT's own scale is 1.
    """
    options = metadata.config()
    experts = metadata.experts_per_layer
    if why_not(options, experts) is not None:
        return False
    head = HEADS[metadata.base.task or "causal_lm"]
    with torch.device("meta"):
        model = head.auto(config).from_config(config)
    adapter, built = build(model, metadata.exact_config(options), experts, device="cpu")
    adapter.load_state_dict({k: tensors[k] for k in adapter.state_dict()}, assign=True)
    saved = {k.removeprefix("base."): v for k, v in tensors.items() if k.startswith("base.")}
    if any(model.get_parameter(n).shape != v.shape for n, v in saved.items()):
        return False  # PEFT has no place for new tokens without its own embedding code
    changes = low_rank(adapter, {n: layer for n, (_, layer) in built.items()})
    if any(c.A_PD.dim() == 3 for c in changes.values()):
        return False  # on fused experts PEFT's folder is tied to its own way of wrapping parameters
    folder.mkdir()
    write_lora(folder, changes, saved, metadata, model)
    return True


def write_lora(
    folder: Path, changes: dict[str, LowRank], saved: dict[str, Tensor], metadata: AdapterMetadata, model: nn.Module
) -> None:
    """Write the two files of a LoRA folder of PEFT.

    Args:
        folder: is there.
        changes: of each Linear; those whose rank is not the most frequent one are listed by PEFT's patterns.
        saved: tensors of the base that were trained along, by name.
        model: the base, also without weights.
    """
    head = HEADS[metadata.base.task or "causal_lm"]
    rank = Counter(len(c.A_PD) for c in changes.values()).most_common(1)[0][0]
    others = {n: len(c.A_PD) for n, c in changes.items() if len(c.A_PD) != rank}
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": head.peft,
            "base_model_name_or_path": metadata.base.name_or_path,
            "revision": metadata.base.revision,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": others,
            "alpha_pattern": others,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": any(isinstance(model.get_submodule(n), Conv1D) for n in changes),
            "target_modules": sorted(changes),
            "modules_to_save": sorted(metadata.adapter["modules_to_save"]) or None,
        },
    )
    ready = {f"{n}.lora_A.weight": c.A_PD for n, c in changes.items()}
    ready |= {f"{n}.lora_B.weight": c.B_PO.t() for n, c in changes.items()} | saved
    out = {f"base_model.model.{k}": v.detach().contiguous().cpu().clone() for k, v in ready.items()}
    save_file(out, folder / "adapter_model.safetensors", {"format": "pt"})
