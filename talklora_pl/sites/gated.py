"""Gated feed-forward blocks: down(act(gate(x)) * up(x)), whatever a model calls the parts.

T tokens, D input and output width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from talklora_pl.errors import UserError
from talklora_pl.names import in_base, leaf
from talklora_pl.sites.base_experts import base_mixtures
from talklora_pl.sites.left_out import only_reached
from talklora_pl.sites.targets import is_linear, select, widths

# names of (gate, up, down); no name for up: gate and up are the two halves of one Linear
LAYOUTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate_up_proj", None, "down_proj"))
ACTIVATIONS = ("act_fn", "activation_fn", "activation", "act")


@dataclass(frozen=True)
class GatedFFN:
    """Names of the parts of a block that computes down(act(gate(x)) * up(x))."""

    gate: str
    up: str | None
    down: str
    act: str

    def hidden(self, block: Any, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(gate_TH, up_TH) before the nonlinearity."""
        gate = getattr(block, self.gate)(x_TD)
        return gate.chunk(2, dim=-1) if self.up is None else (gate, getattr(block, self.up)(x_TD))

    def activation(self, block: Any) -> Callable[[Tensor], Tensor]:
        act: Callable[[Tensor], Tensor] = getattr(block, self.act)
        return act

    def width(self, block: nn.Module) -> tuple[int, int]:
        """(D, H)."""
        hidden, out = widths(getattr(block, self.down))
        return out, hidden


def gated_ffn(block: nn.Module) -> GatedFFN:
    """How ``block`` is made, by the names of its parts.

    Raises:
        UserError: it is no gated feed-forward block of Linears; says why.
    """
    for gate, up, down in LAYOUTS:
        named = [getattr(block, n, None) for n in (gate, up, down) if n is not None]
        act = next((n for n in ACTIVATIONS if callable(getattr(block, n, None))), None)
        if act is not None and all(isinstance(m, nn.Module) and is_linear(m) for m in named):
            return GatedFFN(gate, up, down, act)
    raise UserError(_why_not(block))


@torch.no_grad()
def _computes_as_named(block: Any, parts: GatedFFN) -> bool:
    p = next(block.parameters())
    if p.is_meta or hasattr(p, "device_mesh"):  # no weights here, or a part of them
        return True
    dtype = p.dtype if p.is_floating_point() else torch.get_default_dtype()
    x_1D = torch.linspace(-1, 1, parts.width(block)[0], device=p.device, dtype=dtype).unsqueeze(0)
    g_1H, u_1H = parts.hidden(block, x_1D)
    want, got = block(x_1D), getattr(block, parts.down)(parts.activation(block)(g_1H) * u_1H)
    return isinstance(want, Tensor) and torch.allclose(want, got, rtol=1e-2, atol=1e-2 * want.abs().max().item())


def find_gated(
    model: nn.Module,
    targets: list[str] | str,
    exclude: list[str] | str,
    layers: list[int] | str | None,
    keep: Container[str] = (),
) -> dict[str, nn.Module]:
    """The gated feed-forward blocks that the options of :func:`~talklora_pl.sites.targets.find_targets` choose.

    Raises:
        UserError: the targets match nothing, or something else.
    """
    modules = {n: m for n, m in model.named_modules() if n and in_base(n)}
    found = only_reached(model, select(modules, targets, exclude, layers), targets, keep)
    for name, module in found.items():
        try:
            parts = gated_ffn(module)
            # what the parts are for is not told by their names alone
            if not _computes_as_named(module, parts):
                raise UserError(_why_not(module))
        except UserError as e:
            raise UserError(f"targets: these experts are whole gated blocks, and {name!r} is none: {e}.") from None
    if not found:
        blocks = sorted({leaf(n) for n, m in modules.items() if _is_gated(m)})
        raise UserError(
            f"targets {targets!r} match no feed-forward block of this {type(model).__name__}; "
            f"its gated blocks are called: {', '.join(blocks) or 'it has none'}."
        )
    return found


def _is_gated(block: nn.Module) -> bool:
    try:
        return gated_ffn(block) is not None
    except UserError:
        return False


def _why_not(block: nn.Module) -> str:
    cls = type(block).__name__
    if mixtures := base_mixtures(block):
        return (
            f"it is a {cls}, the mixture of experts of the base itself, whose weights are fused tensors "
            f"({', '.join(n for n in mixtures if n) or cls}); adapt the attention of such a model, give its experts "
            "plain LoRA (plain: {targets: [experts], rank: 8}), or choose a dense one"
        )
    if is_linear(block):
        return f"it is a {cls}; name the block around it, often called mlp"
    linears = [n for n, m in block.named_modules() if is_linear(m)]
    leaves = ", ".join(leaf(n) for n in linears)
    return (
        f"it is a {cls} of {', '.join(linears) or 'no Linear'}, and does not compute down(act(gate(x)) * up(x)); put "
        f"experts per Linear there instead (experts: lora, targets: [{leaves}])"
    )
