"""Fine-tune any Hugging Face model with a mixture of low-rank experts that talk to each other."""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

__version__ = "0.2.0"


class _Checkout:
    """Finds ``talklora_pl.callbacks`` and ``talklora_pl.configs``, which lie beside this folder in a checkout.

    An installed package has them inside, so it needs no finder.
    """

    beside = ("talklora_pl.callbacks", "talklora_pl.configs")

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(Path(__file__).parents[1])]) if name in cls.beside else None


if not (Path(__file__).parent / "callbacks").exists():
    # first, so that an editable install of another checkout does not answer for this one
    sys.meta_path.insert(0, _Checkout)  # type: ignore[arg-type]

# Imported on first use: `--help` and adapter loading need not pay for Lightning and datasets.
_lazy = {
    "fit": "talklora_pl.api",
    "Trained": "talklora_pl.api",
    "method": "talklora_pl.shipped",
    "methods": "talklora_pl.shipped",
    "AdapterConfig": "talklora_pl.adapter",
    "PlainLoRA": "talklora_pl.adapter",
    "inject": "talklora_pl.adapter",
    "disable_adapter": "talklora_pl.adapter",
    "RoutingCollector": "talklora_pl.routing",
    "balance_loss": "talklora_pl.adapter",
    "BalanceMixin": "talklora_pl.other_trainers",
    "load_adapter": "talklora_pl.adapter.io",
    "save_adapter": "talklora_pl.adapter.io",
    "set_adapter": "talklora_pl.adapter",
    "adapter_rows": "talklora_pl.adapter",
    "remove_adapter": "talklora_pl.adapter",
    "merge_adapter": "talklora_pl.export.merge",
    "export_adapter": "talklora_pl.export",
    "push_adapter": "talklora_pl.adapter.hub",
    "BaseModel": "talklora_pl.base",
    "FineTuner": "talklora_pl.module",
    "Source": "talklora_pl.data.source",
    "TextData": "talklora_pl.data",
    "register": "talklora_pl.registry",
    "UserError": "talklora_pl.errors",
}
__all__ = sorted(_lazy)


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(importlib.import_module(_lazy[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
