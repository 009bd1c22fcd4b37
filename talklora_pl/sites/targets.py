"""Which layers of a model are adapted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from talklora_pl.errors import UserError
from talklora_pl.names import in_base, layer_index, leaf
from talklora_pl.registry import did_you_mean
from talklora_pl.sites.base_experts import base_mixtures, why_not


def widths(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a Linear or of GPT-2's Conv1D, whose weight is stored the other way round."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features  # type: ignore[return-value]


def is_linear(module: nn.Module) -> bool:
    """A Linear (quantised ones included, which subclass it) or a Conv1D."""
    return isinstance(module, (nn.Linear, Conv1D))


def parse_layers(layers: list[int] | str | None) -> list[range] | None:
    """Ranges behind ``0-15``, ``4-``, ``0,2,5-7`` or a list of numbers; None means all."""
    if layers is None:
        return None
    if not isinstance(layers, str):
        return [range(i, i + 1) for i in layers]
    out = []
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:(-)\s*(\d*)\s*)?", part)
        if match is None:
            raise UserError(f"layers: cannot read {part!r} in {layers!r}; write for example 0-15, 4- or 0,2,5-7.")
        first, dash, last = match.groups()
        out.append(range(int(first), (int(last) if last else 10**9) + 1 if dash else int(first) + 1))
    return out


def matches(name: str, pattern: list[str] | str) -> bool:
    """Whether a module's name is among leaf or whole names, or matches a regular expression."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == p or name.endswith("." + p) for p in pattern)


def _check_regex(key: str, pattern: list[str] | str) -> None:
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as e:
            raise UserError(f"{key}: {pattern!r} is not a regular expression: {e}.") from None


def output_heads(model: nn.Module) -> set[int]:
    """ids of modules that ``all-linear`` leaves out: the vocabulary projection and heads outside of the layers."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    return {id(head)} if head is not None else set()


def select(
    modules: Mapping[str, nn.Module], targets: list[str] | str, exclude: list[str] | str, layers: list[int] | str | None
) -> dict[str, nn.Module]:
    """Those of ``modules`` that the options of :func:`find_targets` choose, in their order."""
    ranges = parse_layers(layers)
    _check_regex("targets", targets)
    _check_regex("exclude", exclude)
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        index = layer_index(name)
        if not matches(name, targets) or matches(name, exclude):
            continue
        if ranges is not None and (index is None or not any(index in r for r in ranges)):
            continue
        found[name] = module
    return found


def find_targets(
    model: nn.Module,
    targets: list[str] | str,
    exclude: list[str] | str = "",
    layers: list[int] | str | None = None,
) -> dict[str, nn.Module]:
    """The Linears to adapt, and the fused experts of the base that are named, by full name, in model order.

    Args:
        targets: leaf names, a regular expression over whole names, or ``all-linear`` (of the numbered layers).
        exclude: leaf names or a regular expression.
        layers: decoder layers, see :func:`parse_layers`.

    Raises:
        UserError: a name or the whole selection matches nothing; lists near misses.
    """
    linears = {n: m for n, m in model.named_modules() if is_linear(m) and in_base(n)}
    mixtures = base_mixtures(model)
    if targets == "all-linear":
        heads = output_heads(model)
        body = {n: m for n, m in linears.items() if layer_index(n) is not None and id(m) not in heads}
        found = select(body, ".*", exclude, layers)
    else:
        both = {n: m for n, m in model.named_modules() if n in linears or n in mixtures}
        found = select(both, targets, exclude, layers)
        # an expression for whatever is below a mixture is about the Linears there
        found = {n: m for n, m in found.items() if n in linears or not matches(f"{n}.", targets)}
    for name in found.keys() & mixtures.keys():
        if reason := why_not(mixtures[name]):
            raise UserError(f"targets: {name!r} holds the experts of this base's own mixture, but {reason}.")
    leaves = Counter(map(leaf, linears))
    overview = (
        f"Linear layers (count): {', '.join(f'{name} ({count})' for name, count in leaves.items())}. targets: "
        "all-linear takes all Linears in the layers of any model."
    )
    if mixtures:
        overview += (
            f" The experts of this base's own mixture are fused tensors ({next(iter(mixtures))!r}), which take plain "
            f"LoRA by their name: plain: {{targets: [{leaf(next(iter(mixtures)))}], rank: 8}}."
        )
    kind = type(model).__name__
    if not isinstance(targets, str):
        for target in targets:
            if any(matches(n, [target]) for n in [*linears, *mixtures]):
                continue
            other = next((m for n, m in model.named_modules() if n and matches(n, [target])), None)
            if other is None:
                why = f"No layer of this {kind} is called {target!r}."
            else:
                why = f"{target!r} is a {type(other).__name__}; only Linear and Conv1D layers can be targets here."
            raise UserError(f"targets: {why}{did_you_mean(target, leaves)} {overview}")
    if not found:
        raise UserError(
            f"targets {targets!r} with exclude {exclude!r} and layers {layers!r} match nothing in this {kind}. "
            f"{overview}"
        )
    return found
