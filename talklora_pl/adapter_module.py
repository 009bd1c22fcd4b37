"""The module that trains an adapter, as callbacks know it: they stand below :class:`~talklora_pl.module.FineTuner`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L

from talklora_pl.adapter import Adapter, AdapterConfig
from talklora_pl.adapter.metadata import AdapterMetadata
from talklora_pl.base import BaseModel
from talklora_pl.evaluation import Generation
from talklora_pl.names import ADAPTERS
from talklora_pl.optim import ParamGroup
from talklora_pl.routing import RoutingRecord
from talklora_pl.warm_start import SavedAdapter


class AdapterModule(L.LightningModule):
    """A frozen base with one adapter that is trained.

    Attributes:
        base: which pretrained model.
        adapter_config: options of the adapter.
        param_groups: tensors with settings of their own.
        start: the adapter that training begins from, if there is one.
        allocation: experts by module name, decided before the adapter is built; None: as the adapter's rule says.
        model: the base with the adapter, once it is built.
        routing: of the newest training micro-step.
        tokenizer: the base's.
        method: name of the shipped method, if it is one.
    """

    base: BaseModel
    adapter_config: AdapterConfig
    param_groups: list[ParamGroup]
    start: SavedAdapter | None
    allocation: dict[str, int] | None
    model: Any
    routing: list[RoutingRecord]
    tokenizer: Any
    method: str | None = None

    @property
    def adapter(self) -> Adapter:
        """The adapter that is trained."""
        return getattr(self.model, ADAPTERS)["default"]

    @abstractmethod
    def generation(self, max_new_tokens: int | None = None) -> Generation:
        """Answers prompts with the model as it is now, as the evaluation does.

        Args:
            max_new_tokens: None: the evaluation's.
        """

    @abstractmethod
    def adapter_metadata(self, like: str | None = None) -> AdapterMetadata:
        """What a checkpoint and an exported folder hold of the run's method.

        Args:
            like: a fingerprint that the base's will be compared with, maybe of an earlier version.
        """
