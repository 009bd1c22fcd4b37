"""Warnings about the routing: one line when something starts, and no more until it has ended and starts again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from talklora_pl.monitoring.metrics import Load


@dataclass
class AlertRules:
    """What is alarming, in a layer, at so many logged steps in a row.

    Attributes:
        collapse_share: one expert has more than this share of the weight (dense routers) or is selected by more than
            this share of the tokens (routers that select; layers that select all experts are left out).
        dead_share: at least this share of the experts is dead.
        router_z: mean of logsumexp(logits)^2 is above this, or is no number: 2500 means logits of about 50, where a
            softmax has long stopped to learn.
        patience: logged steps in a row.
    """

    collapse_share: float = 0.9
    dead_share: float = 0.5
    router_z: float = 2500.0
    patience: int = 5


class Alerts:
    """Counts how long each layer has been in which alarming state."""

    def __init__(self, rules: AlertRules) -> None:
        self.rules = rules
        self.steps: dict[str, dict[str, int]] = {"collapse": {}, "dead_experts": {}, "router_z": {}}

    def state(self) -> dict[str, Any]:
        """For the checkpoint, so that a resumed run neither repeats nor forgets."""
        return {key: dict(layers) for key, layers in self.steps.items()}

    def restore(self, state: dict[str, Any]) -> None:
        for key in self.steps:
            self.steps[key] = dict(state.get(key, {}))

    def check(self, load: Load, step: int, dead_below: float) -> Iterator[tuple[str, int, str]]:
        """Take in one logged step.

        Yields:
            name of the alert, number of layers in this state for long enough, and the warning if they are the first.
        """
        metrics = load.per_layer(dead_below)
        undecided_L = load.selected_L >= load.experts_L
        share_L = load.token_share_LE.amax(-1)
        z_L = metrics["router_z"]
        bad = {
            "collapse": (share_L > self.rules.collapse_share) & ~undecided_L,
            "dead_experts": metrics["dead_experts"] >= self.rules.dead_share,
            "router_z": ~torch.isfinite(z_L) | (z_L > self.rules.router_z),
        }
        value = {"collapse": share_L, "dead_experts": metrics["dead_experts"], "router_z": z_L}
        for key, bad_L in bad.items():
            before = self._alarmed(key)
            self.steps[key] = {
                name: self.steps[key].get(name, 0) + 1
                for name, is_bad in zip(load.layers, bad_L.tolist(), strict=True)
                if is_bad
            }
            now = self._alarmed(key)
            yield key, len(now), "" if before or not now else self._say(key, now, load, value[key], step)

    def _alarmed(self, key: str) -> list[str]:
        return [name for name, steps in self.steps[key].items() if steps >= self.rules.patience]

    def _say(self, key: str, layers: list[str], load: Load, value_L: Tensor, step: int) -> str:
        worst = max(layers, key=lambda name: value_L[load.layers.index(name)].nan_to_num(float("inf")).item())
        row = load.layers.index(worst)
        v = value_L[row].item()
        what, remedy = {
            "collapse": (
                f"expert {int(load.share_LE[row].argmax())} has {v:.0%} of the tokens",
                "Add or strengthen a balance loss, or lower the router's learning rate (model.param_groups).",
            ),
            "dead_experts": (
                f"{v:.0%} of its experts are dead",
                "Add or strengthen a balance loss, or use fewer experts.",
            ),
            "router_z": (
                f"mean logsumexp(logits)^2 is {v:.3g}",
                "Add the balance loss z_loss, or lower the router's learning rate (model.param_groups).",
            ),
        }[key]
        return (
            f"{key}: step {step}, {len(layers)} of {len(load.layers)} routed layers, worst {worst}: {what}, at "
            f"{self.rules.patience} logged steps in a row. {remedy}"
        )
