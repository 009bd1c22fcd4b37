"""A LoRA folder that PEFT wrote, as an adapter with one expert. Of its files nothing is run and no pattern is tried.

R rank, D input width, O output width.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talklora_pl.adapter.config import AdapterConfig
from talklora_pl.adapter.files import open_tensors, read_json, short
from talklora_pl.adapter.metadata import AdapterMetadata, BaseInfo
from talklora_pl.base.heads import HEADS
from talklora_pl.communication.identity import NoCommunication
from talklora_pl.errors import UserError
from talklora_pl.experts.lora import LoRA
from talklora_pl.routers.softmax import Uniform

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

# what is read here, or has no effect once an adapter is trained
READ = {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "bias", "modules_to_save"}
READ |= {"base_model_name_or_path", "revision", "task_type", "peft_type", "init_lora_weights", "use_rslora"}
WITHOUT_EFFECT = {"auto_mapping", "inference_mode", "peft_version", "fan_in_fan_out", "qalora_group_size"}
WITHOUT_EFFECT |= {"eva_config", "megatron_core", "runtime_config", "ensure_weight_tying", "low_cpu_mem_usage"}
# the tensors tell which modules are adapted
WITHOUT_EFFECT |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
KEEP_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights with which the base stays what it was; others, such as pissa, move weights of it."""
NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


def is_peft(folder: Path) -> bool:
    """Whether a folder has the form that PEFT writes."""
    return (folder / CONFIG).is_file()


@dataclass
class PeftLoRA:
    """A plain LoRA: y += scale x Aᵀ B per Linear.

    Attributes:
        options: ``adapter_config.json``.
        pairs: (A_RD, B_RO) in float32 by module.
        scales: alpha / rank, by module; alpha / √rank under rsLoRA (arXiv 2312.03732).
        saved: tensors of the base that were trained along, by name.
    """

    options: dict[str, Any]
    pairs: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    saved: dict[str, Tensor]


def read_peft(folder: Path) -> tuple[AdapterMetadata, dict[str, Tensor]]:
    """The adapter of a folder, by the tensor names of an adapter file.

    Raises:
        UserError: damaged files, or an adapter that is not plain LoRA of one rank and scale; says what stands against.
    """
    read = read_lora(folder)
    sizes = {(len(A_RD), read.scales[name] * len(A_RD)) for name, (A_RD, _) in read.pairs.items()}
    if len(sizes) > 1:
        raise UserError(
            f"The PEFT adapter in {folder} has layers of unequal (rank, alpha), by rank_pattern or alpha_pattern: "
            f"{sorted(sizes)}. An adapter here has one of each. (model.adapter.init_from takes it.)"
        )
    ((rank, alpha),) = sizes
    out = {f"base.{name}": tensor for name, tensor in read.saved.items()}
    for name, (A_RD, B_RO) in read.pairs.items():
        out[f"layers.{name}.experts.A"], out[f"layers.{name}.experts.B"] = A_RD[None], B_RO[None]
    saved = read.options.get("modules_to_save") or []
    config = AdapterConfig(
        targets=sorted(read.pairs),
        num_experts=1,
        rank=rank,
        alpha=alpha,
        dropout_input=float(read.options.get("lora_dropout") or 0.0),
        experts=LoRA(),
        communication=NoCommunication(),
        router=Uniform(),
        # PEFT also lists heads that the base does not have
        modules_to_save=sorted(m for m in map(str, saved) if any(f".{m}." in f".{k}" for k in read.saved)),
    )
    tasks = {head.peft: task for task, head in HEADS.items()}
    base = {"name_or_path": read.options.get("base_model_name_or_path"), "revision": read.options.get("revision")}
    info = BaseInfo.from_dict({**base, "task": tasks.get(read.options.get("task_type", ""))}, folder / CONFIG)
    return AdapterMetadata(info, config.to_dict(), dict.fromkeys(read.pairs, 1), []), out


def read_lora(folder: Path) -> PeftLoRA:
    """The LoRA of a folder.

    Raises:
        UserError: damaged files, or an adapter that is not plain LoRA; says what stands against.
    """
    options = read_json(folder / CONFIG)
    where = f"The PEFT adapter in {folder}"
    if against := _not_plain(options):
        raise UserError(f"{where} is no plain LoRA: {'; '.join(against)}. Such an adapter cannot be started from.")
    if not (folder / TENSORS).is_file():
        raise UserError(f"{where} has no {TENSORS} (a .bin file is not read: save it with safe_serialization=True).")
    with open_tensors(folder, TENSORS) as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    saved = options.get("modules_to_save") or []
    others: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := NAME.fullmatch(key):
            parts.setdefault(match[1], {})[match[2]] = tensor
            continue
        name = re.sub(r"\.modules_to_save(\.default)?\.", ".", key.removeprefix("base_model.model."))
        if "lora_" in key or not any(f".{module}." in f".{name}" for module in saved):
            raise UserError(f"{where} has a tensor that plain LoRA on linear layers does not have: {short(key)}.")
        others[name] = tensor
    pairs = {}
    for name, pair in parts.items():
        if (
            pair.keys() != {"A", "B"}
            or any(t.dim() != 2 for t in pair.values())
            or len(pair["A"]) != pair["B"].shape[1]
        ):
            raise UserError(f"{where}: lora_A and lora_B of {short(name)} do not belong together.")
        pairs[name] = pair["A"].to(torch.float32), pair["B"].to(torch.float32).t().contiguous()
    if not parts:
        raise UserError(f"{where} has no LoRA tensors.")
    return PeftLoRA(options, pairs, _scales(where, options, {n: len(A) for n, (A, _) in pairs.items()}), others)


def _not_plain(options: dict[str, Any]) -> list[str]:
    """What makes an adapter another one than plain LoRA on linear layers, one phrase each."""
    kind = options.get("peft_type")
    if kind != "LORA":
        return [f"its peft_type is {short(kind)}"]
    out = [f"{key}: {short(value)}" for key, value in options.items() if value and key not in READ | WITHOUT_EFFECT]
    if options.get("bias", "none") != "none":
        out.append(f"bias: {short(options['bias'])}")
    if (start := options.get("init_lora_weights")) not in KEEP_BASE:
        out.append(f"init_lora_weights: {short(start)} (it belongs to a base whose weights were changed)")
    return out


def _scales(where: str, options: dict[str, Any], ranks: dict[str, int]) -> dict[str, float]:
    """alpha / rank (alpha / √rank under rsLoRA) of every layer. A pattern of PEFT is a regular expression; only plain
    names are taken."""
    r, alpha = options.get("r"), options.get("lora_alpha")
    patterns = [options.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    numbers = [r, alpha, *(v for p in patterns for v in p.values())]
    if any(type(n) not in (int, float) or n <= 0 for n in numbers):
        raise UserError(f"{where}: r, lora_alpha and their patterns must be numbers above 0.")
    for key, pattern in zip(("rank_pattern", "alpha_pattern"), patterns):
        if unclear := [p for p in pattern if not re.fullmatch(r"[\w.]+", p)]:
            raise UserError(f"{where}: {key} has a regular expression, which is not read: {short(unclear[0])}.")
    sizes = {}
    for name, rank in ranks.items():
        own = [next((v for p, v in pattern.items() if f".{name}".endswith(f".{p}")), None) for pattern in patterns]
        expected = own[0] or r
        if rank != expected:
            raise UserError(f"{where}: {short(name)} has rank {rank}, and {CONFIG} says {expected}.")
        sizes[name] = float(own[1] or alpha or 0) / (math.sqrt(rank) if options.get("use_rslora") else rank)
    return sizes
