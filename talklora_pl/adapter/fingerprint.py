"""A short fingerprint of the base's frozen weights: on other weights than its own an adapter computes nonsense.

It is made of names, shapes and 1,024 numbers spread evenly over all frozen tensors, each rounded to bfloat16. So it
costs milliseconds for any size of model, is the same for float64, float32 and bfloat16 loads of the same weights, and
float16 loads compare equal within rounding. Of the token embedding and the output head only the first rows count: a
base whose vocabulary is padded is the same base. It tells models apart; it is no protection against an attacker.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from talklora_pl.base.loading import vocabulary
from talklora_pl.internals.torch import own_part
from talklora_pl.names import base_parameters
from talklora_pl.sites.targets import is_linear

SAMPLES = 1024
VOCABULARY_ROWS = 16
"""Rows of embedding and head that count; no base has fewer."""


def fingerprint(model: nn.Module, without: Iterable[str] = (), like: str | None = None) -> str | None:
    """``2:<digest of names and shapes>:<samples, base64>``, or None where weights cannot be read as numbers.

    That is so for tensors of classes other than torch's own, and on the meta device. Of a quantised base only what is
    never quantised counts (``q:`` instead of ``2:``): all but the weights of Linears, the output head excepted. Weights
    sharded as DTensors take one all-reduce of the samples, so every process has to call this.

    Args:
        without: names of parameters that are no part of the frozen base: those trained along.
        like: a fingerprint to compare with: earlier versions had no mark and counted all rows, and one of a quantised
            base is compared with the same part of another.
    """
    skip = set(without)
    frozen = {n: p for n, p in base_parameters(model).items() if n not in skip}
    quantised = getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None
    mark = ("q:" if quantised else "2:") if like is None else like[:2] if like[:2] in ("2:", "q:") else ""
    if quantised and mark != "q:":
        return None
    if mark == "q:":
        tokens = vocabulary(model)
        linear = {id(m.weight) for m in model.modules() if is_linear(m)} - tokens.keys()
        frozen = {n: p for n, p in frozen.items() if id(p) not in linear}
    if not frozen or not all(_is_readable(p) for p in frozen.values()):
        return None
    marked = mark != ""
    of_tokens = vocabulary(model) if marked else {}
    shapes = {n: list(p.shape[1:] if id(p) in of_tokens else p.shape) for n, p in frozen.items()}
    structure = hashlib.sha256("\n".join(f"{n} {shape}" for n, shape in sorted(shapes.items())).encode())
    chosen = sorted(frozen)
    if len(chosen) > SAMPLES:
        chosen = [chosen[i * len(chosen) // SAMPLES] for i in range(SAMPLES)]
    each = SAMPLES // len(chosen)
    rows = {n: VOCABULARY_ROWS if id(frozen[n]) in of_tokens else None for n in chosen}
    values = torch.cat([_sample(frozen[n].detach(), each, rows[n]) for n in chosen])
    sharded: Any = next((frozen[n] for n in chosen if _is_sharded(frozen[n])), None)
    if sharded is not None:
        values = values.to(sharded.device_mesh.device_type)  # not where the shards are: they may be in main memory
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    numbers = values.to(torch.bfloat16).cpu().view(torch.int16).numpy().astype("<i2")
    text = f"{structure.hexdigest()[:16]}:{base64.b64encode(numbers.tobytes()).decode()}"
    return mark + text


def agree(one: str, other: str) -> bool:
    """Whether two fingerprints of one version are of the same weights, up to the rounding of a 16-bit load."""
    a, b = _parse(one), _parse(other)
    if a is None or b is None or a[0] != b[0] or len(a[1]) != len(b[1]):
        return False
    return bool(torch.isclose(a[1], b[1], rtol=2**-7, atol=1e-7, equal_nan=True).all())


def _sample(p: Tensor, count: int, rows: int | None = None) -> Tensor:
    """``count`` values of p (of its first ``rows``) at evenly spaced positions, float32; -inf where another process has
    them."""
    numbers = p.numel() if rows is None else math.prod([min(rows, p.shape[0]), *p.shape[1:]])
    count = min(count, numbers)
    at = [(2 * i + 1) * numbers // (2 * count) for i in range(count)]
    if not _is_sharded(p):
        flat = p.reshape(-1) if p.is_contiguous() else p.contiguous().reshape(-1)
        return flat[torch.tensor(at, device=p.device)].float().cpu()
    sharded: Any = p
    local, parts = sharded.to_local(), own_part(sharded)
    out = torch.full((count,), -torch.inf)
    for i, position in enumerate(at):
        here: list[int | None] = []
        for size, part in reversed(list(zip(p.shape, parts, strict=True))):
            position, index = divmod(position, size)
            here.append(index - part.start if part.start <= index < part.stop else None)
        if None not in here:
            out[i] = local[tuple(reversed(here))].float().cpu()
    return out


def _is_readable(p: Tensor) -> bool:
    plain = type(p) in (Tensor, nn.Parameter) or _is_sharded(p)  # others may refuse to be indexed
    return plain and not p.is_meta and p.is_floating_point()


def _is_sharded(p: Tensor) -> bool:
    return hasattr(p, "device_mesh")


def _parse(text: str) -> tuple[str, Tensor] | None:
    digest, _, samples = text.rpartition(":")
    try:
        numbers = np.frombuffer(base64.b64decode(samples, validate=True), "<i2").astype(np.int16)
    except (binascii.Error, ValueError):
        return None
    return digest, torch.from_numpy(numbers).view(torch.bfloat16).float()
