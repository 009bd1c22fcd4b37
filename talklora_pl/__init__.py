"""Fine-tune any Hugging Face model with a mixture of low-rank experts that talk to each other."""

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a checkout, callbacks/ and configs/ lie beside this folder; an installed package has them inside.
_root = Path(__file__).parent.parent
if not (Path(__file__).parent / "callbacks").exists() and (_root / "callbacks").exists():
    __path__.append(str(_root))

# Imported on first use: `--help` and adapter loading need not pay for Lightning and datasets.
_lazy = {
    "AdapterConfig": "talklora_pl.adapter",
    "PlainLoRA": "talklora_pl.adapter",
    "inject": "talklora_pl.adapter",
    "disable_adapter": "talklora_pl.adapter",
    "load_adapter": "talklora_pl.adapter.io",
    "save_adapter": "talklora_pl.adapter.io",
    "set_adapter": "talklora_pl.adapter",
    "remove_adapter": "talklora_pl.adapter",
    "merge_adapter": "talklora_pl.export.merge",
    "export_adapter": "talklora_pl.export",
    "push_adapter": "talklora_pl.hub",
    "FineTuner": "talklora_pl.module",
    "TextData": "talklora_pl.data",
    "register": "talklora_pl.registry",
    "UserError": "talklora_pl.errors",
}
__all__ = sorted(_lazy)


def __getattr__(name: str) -> Any:
    if name in _lazy:
        return getattr(importlib.import_module(_lazy[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
