"""How much a small change of a layer's input changes who speaks: "communication smooths routing", as a number.

T tokens, D input width, E experts, F features per expert.

For a token x with routing weights w(x) and u uniform on the unit sphere:

    change(x)   = E_u || w(x + eps |x| u) - w(x) || / (eps || w(x) ||)         relative change per relative perturbation
    jacobian(x) = || dw/dx ||_F |x| / || w(x) ||                               the exact derivative, all directions

For small eps the root mean square of the first over u is jacobian(x) / sqrt(D). A router that selects also jumps where
the selection changes: the first sees that, the second does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from talklora_pl.sites.mixture import Mixture


def deciding_layers(adapter: nn.Module) -> dict[str, Mixture]:
    """The modules that decide between experts, by the name under which they are recorded."""
    return {m.name: m for m in adapter.modules() if isinstance(m, Mixture) and m.decides}


class DecisionInputs:
    """Inside ``with DecisionInputs(...) as inputs:`` a forward pass leaves what its decisions were made from.

    Args:
        adapter: whose layers.
        mask: attention mask of the forward pass; pads are not taken.
        tokens: at most so many tokens of every layer, spread over the batch.

    Attributes:
        x: input of every layer that decided, (T,D), by name.
    """

    def __init__(self, adapter: nn.Module, mask: Tensor, tokens: int = 32) -> None:
        self.layers = deciding_layers(adapter)
        self.mask_T = mask.reshape(-1).bool()
        self.tokens = tokens
        self.x: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> DecisionInputs:
        for name, layer in self.layers.items():
            hook = lambda module, args, name=name: self._take(name, args[1])  # noqa: E731
            self._hooks.append(layer.communication.register_forward_pre_hook(hook))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _take(self, name: str, x_TD: Tensor) -> None:
        real_TD = x_TD[self.mask_T] if len(self.mask_T) == len(x_TD) else x_TD
        step = max(1, len(real_TD) // self.tokens)
        self.x[name] = real_TD[::step][: self.tokens].detach().clone()


@torch.no_grad()
def communication_matrices(adapter: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Who listens to whom in every layer that has such a matrix, (E,E) with listeners in rows, by name.

    Args:
        adapter: whose layers.
        inputs: inputs of the layers, for communication that depends on the token.
    """
    found = {}
    for name, layer in deciding_layers(adapter).items():
        matrix = layer.communication.matrix()
        if matrix is None and inputs and name in inputs:
            matrix = layer.communication.matrix(layer.node_features(inputs[name]))
        if matrix is not None and len(matrix) > 1:
            found[name] = matrix.detach().float().cpu()
    return found


def routing_weights(layer: Mixture, x_TD: Tensor) -> Tensor:
    """w_TE of a layer as a function of its input alone, in the precision of the trained tensors."""
    weights_TE: Tensor = layer.router(x_TD, layer.communication(layer.node_features(x_TD), x_TD)).weights_TE
    return weights_TE


def relative_change(layer: Mixture, x_TD: Tensor, eps: float = 1e-2, directions: int = 4, seed: int = 0) -> Tensor:
    """change(x) of every token, (T,), over ``directions`` random directions that the seed decides."""
    generator = torch.Generator().manual_seed(seed)
    w_TE = routing_weights(layer, x_TD)
    size_T = x_TD.norm(dim=-1, keepdim=True)
    changes = []
    for _ in range(directions):
        u_TD = torch.randn(x_TD.shape, generator=generator, dtype=torch.float64).to(x_TD)
        moved_TE = routing_weights(layer, x_TD + eps * size_T * u_TD / u_TD.norm(dim=-1, keepdim=True))
        changes.append((moved_TE - w_TE).norm(dim=-1) / (eps * w_TE.norm(dim=-1)))
    return torch.stack(changes).mean(0)


def relative_jacobian(layer: Mixture, x_TD: Tensor) -> Tensor:
    """jacobian(x) of every token, (T,): one backward pass per expert, since tokens do not influence each other."""
    x_TD = x_TD.detach().requires_grad_()
    w_TE = routing_weights(layer, x_TD)
    squares_T = torch.zeros_like(w_TE[:, 0])
    for w_T in w_TE.unbind(-1):
        if w_T.requires_grad:  # else the router does not look at the token
            (row_TD,) = torch.autograd.grad(w_T.sum(), x_TD, retain_graph=True)
            squares_T = squares_T + row_TD.square().sum(-1)
    return (squares_T.sqrt() * x_TD.norm(dim=-1) / w_TE.norm(dim=-1)).detach()


class Sensitivity(Metric):
    """Means over tokens and ranks of both numbers, per layer.

    Args:
        layers: number of experts of the layers, by name.
        eps: relative size of the perturbation.
        directions: random directions per token.
    """

    full_state_update = False
    change: Tensor
    jacobian: Tensor
    tokens: Tensor

    def __init__(self, layers: Mapping[str, int], eps: float = 1e-2, directions: int = 4) -> None:
        super().__init__()
        self.rows = {name: i for i, name in enumerate(layers)}
        self.eps, self.directions = eps, directions
        for state in ("change", "jacobian", "tokens"):
            self.add_state(state, torch.zeros(len(layers)), "sum")

    def update(self, inputs: DecisionInputs) -> None:
        """Measure at the inputs of one forward pass."""
        # evaluation may run in inference mode, whose tensors take no part in gradients and must not be changed outside
        with torch.inference_mode(False), torch.enable_grad():
            sums = {
                state: torch.zeros(len(self.rows), device=self.device) for state in ("change", "jacobian", "tokens")
            }
            for name, x_TD in inputs.x.items():
                if name not in self.rows or not len(x_TD):
                    continue
                layer, row = inputs.layers[name], self.rows[name]
                with torch.autocast(x_TD.device.type, enabled=False):
                    x_TD = x_TD.clone().to(next(layer.router.parameters(), torch.zeros(())).dtype)
                    with torch.no_grad():
                        sums["change"][row] = relative_change(layer, x_TD, self.eps, self.directions).sum()
                    sums["jacobian"][row] = relative_jacobian(layer, x_TD).sum()
                    sums["tokens"][row] = len(x_TD)
        for state, value_L in sums.items():
            setattr(self, state, getattr(self, state) + value_L)

    def compute(self) -> dict[str, Tensor]:
        """``change`` and ``jacobian``, (L,); no number for a layer without tokens."""
        return {"change": self.change / self.tokens, "jacobian": self.jacobian / self.tokens}
