"""Numbers recorded from the published implementations: where they lie, and the metric they are compared by.

``README.md`` says what every file holds. ``GOLDEN_DIR`` names another folder of the same structure; all sizes come from
the files' own configuration.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "numbers"))

# suggested tolerances, f32 / f64, relative to the largest value of a tensor
TOLERANCE = {
    "talklora": (1e-4, 1e-10),
    "talklora_notalk": (1e-4, 1e-10),
    "moelora": (1e-4, 1e-10),
    "teamlora": (1e-4, 1e-10),
    "hydralora": (1e-4, 1e-10),
    "mola": (1e-4, 1e-10),
    "loramoe": (1e-4, 1e-10),
    "gmoe_router": (2e-4, 1e-6),
    "gmoe_losses": (1e-4, 2e-6),
    "mixlora_balance": (1e-5, 1e-5),
}


def cases(*kinds: str) -> list[Any]:
    """pytest parameters: the files of the given kinds."""
    rows = [row for row in json.loads((GOLDEN_DIR / "manifest.json").read_text()) if row["kind"] in kinds]
    return [pytest.param(GOLDEN_DIR / row["file"], id=row["file"].removesuffix(".safetensors")) for row in rows]


def load(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of one file."""
    with safe_open(file, "pt") as f:
        config = json.loads(f.metadata()["config"])
        return config, {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118


def difference(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference over the largest absolute reference value (plain if the reference is all 0)."""
    assert got.shape == want.shape, (got.shape, want.shape)
    largest = want.abs().max().item()
    return (got.detach() - want).abs().max().item() / (largest or 1.0)


def check(config: dict[str, Any], name: str, got: Tensor, want: Tensor) -> None:
    """Compare one tensor with the tolerance of its kind and dtype."""
    tolerance = TOLERANCE[config["kind"]][config["dtype"] == "float64"]
    assert difference(got, want) <= tolerance, f"{name}: {difference(got, want):.2e} > {tolerance}"
