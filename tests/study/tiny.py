"""Studies of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def study(project: Path, **entries: Any) -> Path:
    """A study's file."""
    plain = {"config": "method/lora", "set": {"model.adapter.rank": 4}}
    talk = {"config": "method/talklora", "set": {"model.adapter.rank": 8}}
    whole = {"config": str(project / "common.yaml"), "methods": {"lora": plain, "talk": talk}, "seeds": 2} | entries
    path = project / "study.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path
