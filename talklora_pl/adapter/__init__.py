"""The adapter core: a frozen layer plus a mixture of low-rank experts."""

from talklora_pl.adapter.adapters import adapter_rows, adapter_set, disable_adapter, remove_adapter, set_adapter
from talklora_pl.adapter.config import AdapterConfig, PlainLoRA
from talklora_pl.adapter.inject import Adapter, balance_loss, inject
from talklora_pl.routing import Routing, RoutingCollector, RoutingRecord

__all__ = [
    "Adapter",
    "AdapterConfig",
    "PlainLoRA",
    "Routing",
    "RoutingCollector",
    "RoutingRecord",
    "adapter_rows",
    "adapter_set",
    "balance_loss",
    "disable_adapter",
    "inject",
    "remove_adapter",
    "set_adapter",
]
