"""The dropout of an adapter where other libraries look for it."""

from __future__ import annotations

from torch import nn

SHARES = ("dropout_input", "dropout_routing", "dropout_output")


class Dropouts(nn.Dropout):
    """Stands for the dropout of all layers, which are attributes of theirs and no modules: whoever sets ``p`` of every
    ``nn.Dropout`` of a model to 0, as TRL's DPOTrainer does, turns these off too. It is never called.

    Args:
        layers: whose modules have the shares.
    """

    _layers: tuple[nn.Module, ...] = ()  # in a tuple: they are no children

    def __init__(self, layers: nn.Module) -> None:
        super().__init__(0.0)
        self._layers = (layers,)

    @property
    def p(self) -> float:
        """The largest share; to set it sets all that are above 0."""
        return max((share for _, _, share in self._shares()), default=0.0)

    @p.setter
    def p(self, value: float) -> None:
        for module, name, _ in self._shares():
            setattr(module, name, float(value))

    def _shares(self) -> list[tuple[nn.Module, str, float]]:
        found = (
            (m, name, getattr(m, name, None)) for layers in self._layers for m in layers.modules() for name in SHARES
        )
        return [(m, name, share) for m, name, share in found if isinstance(share, float | int) and share > 0]
