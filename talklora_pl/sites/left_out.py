"""What targets seem to say and do not get, said once: Linears that no text reaches, and the base's own experts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from functools import cache

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from talklora_pl.errors import UserError
from talklora_pl.names import decoder_layer, leaf
from talklora_pl.sites.base_experts import base_mixtures, why_not
from talklora_pl.sites.reached import TrialFailed, unreached
from talklora_pl.sites.targets import is_linear, matches, select


def only_reached(
    model: nn.Module, found: Mapping[str, nn.Module], targets: list[str] | str, keep: Container[str] = ()
) -> dict[str, nn.Module]:
    """``found`` without Linears, or blocks of them, that a text does not reach.

    Those stay whose whole names are given in ``targets`` or are in ``keep``.

    Raises:
        UserError: nothing would be left.
    """
    given = set() if isinstance(targets, str) else set(targets)
    given.update(name for name in found if name in keep)
    if given.issuperset(found):
        return dict(found)
    try:
        dead = unreached(model)
    except TrialFailed as e:
        _say(
            f"targets: whether a text reaches all of them could not be tried on this {type(model).__name__} ({e}); all "
            "are adapted. If some get no gradient, name them under exclude."
        )
        return dict(found)
    idle = [name for name, module in found.items() if name not in given and _is_dead(name, module, dead)]
    if not idle:
        return dict(found)
    count = f"{len(idle)} of {len(found)} modules"
    remedy = "To adapt them all the same, in a training loop that feeds them, list their whole names."
    if len(idle) == len(found):
        raise UserError(
            f"targets: {targets!r} match only modules that the model does not run through on a text, and there is "
            f"nothing to learn there: {summary(idle)}. {remedy}"
        )
    _say(
        f"targets: {count} are left out, since the model does not run through them on a text: {summary(idle)}. {remedy}"
    )
    return {name: module for name, module in found.items() if name not in idle}


def _is_dead(name: str, module: nn.Module, dead: Iterable[str]) -> bool:
    linears = [f"{name}.{n}" if n else name for n, m in module.named_modules() if is_linear(m)]
    return bool(linears) and all(n in dead for n in linears)


def say_which_experts_are_left_out(
    model: nn.Module,
    found: Container[str],
    targets: list[str] | str,
    exclude: list[str] | str,
    layers: list[int] | str | None,
) -> None:
    """Tell of fused experts of the base that the targets seem to mean and that get nothing."""
    mixtures = {n: m for n, m in base_mixtures(model).items() if n not in found}
    missed = [n for n in select(mixtures, ".*", exclude, layers) if _suggested(n, mixtures[n], targets)]
    if not missed:
        return
    reason = why_not(mixtures[missed[0]])
    name = leaf(missed[0])
    remedy = f"plain: {{targets: [{name}], rank: 8}} gives them plain LoRA."
    if reason:
        remedy = f"They cannot be adapted here: {reason}."
    _say(
        f"targets: the experts of this base's own mixture are left out ({summary(missed)}): their weights are fused "
        f"tensors and no Linears. {remedy}"
    )


def _suggested(name: str, mixture: nn.Module, targets: list[str] | str) -> bool:
    parts = [n for n, _ in mixture.named_parameters(recurse=False)]
    if "gate_up_proj" in parts:
        parts += ["gate_proj", "up_proj"]
    return targets == "all-linear" or any(matches(f"{name}.{part}", targets) for part in parts)


def summary(names: Iterable[str], most: int = 6) -> str:
    """``model.layers.*.mixer.dt_proj (24), …``: names that differ in numbers alone, counted; many kinds by layer."""
    names = list(names)
    kinds = Counter(re.sub(r"\b\d+\b", "*", name) for name in names)
    if len(kinds) > most:
        kinds = Counter(re.sub(r"\b\d+\b", "*", decoder_layer(name) or name) for name in names)
    shown = [f"{kind} ({count})" for kind, count in list(kinds.items())[:most]]
    return ", ".join(shown) + (f" and {len(kinds) - most} more" if len(kinds) > most else "")


@cache
def _say(text: str) -> None:
    rank_zero_info(text)
