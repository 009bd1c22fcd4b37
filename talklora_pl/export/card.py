"""The model card of an adapter folder."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import yaml
from torch import Tensor

from talklora_pl.adapter.hub import is_repository_name
from talklora_pl.adapter.metadata import AdapterMetadata
from talklora_pl.base.heads import HEADS


@dataclass
class Facts:
    """What a run knows about an adapter.

    Attributes:
        data: names of the data sets.
        metrics: newest values by name.
        routing: how the experts were used, newest values by name.
        steps: optimiser steps.
        labels: names of the classes.
        license: of the adapter, an identifier of the hub such as ``apache-2.0``.
    """

    data: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    routing: dict[str, float] = field(default_factory=dict)
    steps: int | None = None
    labels: list[str] = field(default_factory=list)
    license: str | None = None


def card(metadata: AdapterMetadata, tensors: dict[str, Tensor], facts: Facts, peft: bool) -> str:
    """README.md: what was trained on what, how well, and how to load it."""
    base, adapter = metadata.base, metadata.adapter
    head = HEADS[base.task or "causal_lm"]
    hub_base = base.name_or_path if is_repository_name(base.name_or_path) else None
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": head.pipeline,
        "license": facts.license or "unknown",
        "tags": ["talklora-pl", "lora", "mixture-of-experts", f"experts:{adapter['experts']['name']}"],
    }
    if hub_base:
        front["base_model"] = hub_base
        front["base_model_relation"] = "adapter"
    numbers = sum(t.numel() for t in tensors.values())
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {_title(metadata)}\n\nA mixture of low-rank experts ({numbers:,} trained numbers) for "
        f"`{base.name_or_path or base.class_name}`"
        + (f" at revision `{base.revision}`" if base.revision else "")
        + (f", its weights in {base.quantization} while it was" if base.quantization else ",")
        + " trained with talklora-pl. The base's weights are not in this folder.",
        "## Method\n\n" + _table(_method(metadata)),
    ]
    if facts.data:
        sections.append("## Data\n\n" + "\n".join(f"* {name}" for name in facts.data))
    if facts.metrics:
        after = f" after {facts.steps:,} optimiser steps" if facts.steps is not None else ""
        sections.append(f"## Metrics{after}\n\n" + _table({k: f"{v:.6g}" for k, v in facts.metrics.items()}))
    sections.append("## Routing\n\n" + _table(_routing(metadata) | {k: f"{v:.6g}" for k, v in facts.routing.items()}))
    sections.append("## Licence\n\n" + _licence(facts.license))
    sections.append("## How to load\n\n" + _loading(head.auto_class, peft))
    return "\n\n".join(sections) + "\n"


def _title(metadata: AdapterMetadata) -> str:
    adapter = metadata.adapter
    parts = [adapter[k]["name"] for k in ("experts", "communication", "router")]
    return f"{metadata.base.class_name} with experts `{parts[0]}`, communication `{parts[1]}`, router `{parts[2]}`"


def _method(metadata: AdapterMetadata) -> dict[str, str]:
    adapter = metadata.adapter
    rows = {k: _component(adapter[k]) for k in ("experts", "communication", "router")}
    rows["balance"] = ", ".join(_component(b) for b in adapter["balance"]) or "none"
    rows["allocation"] = _component(adapter.get("allocation") or {"name": "uniform"})
    rows["rank"] = str(adapter["rank"] or f"{adapter['expert_rank']} per expert")
    rows["alpha"] = str(adapter["alpha"] if adapter["alpha"] is not None else "equal to the reference rank")
    rows["targets"] = str(adapter["targets"])
    if adapter["plain"]:
        rows["plain LoRA"] = f"rank {adapter['plain']['rank']} on {adapter['plain']['targets']}"
    if adapter["modules_to_save"]:
        rows["trained along"] = ", ".join(adapter["modules_to_save"])
    return rows


def _component(data: dict[str, Any]) -> str:
    options = ", ".join(f"{k} {v}" for k, v in data.items() if k not in ("name", "options"))
    return data["name"] + (f" ({options})" if options else "")


def _routing(metadata: AdapterMetadata) -> dict[str, str]:
    counts = Counter(metadata.experts_per_layer.values())
    return {
        "adapted modules": str(len(metadata.experts_per_layer) + len(metadata.plain_layers)),
        "experts per module": ", ".join(f"{n} in {c} modules" for n, c in sorted(counts.items())),
    }


def _table(rows: dict[str, str]) -> str:
    clean = {k: v.replace("|", "\\|").replace("\n", " ") for k, v in rows.items()}
    return "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in clean.items())


def _licence(name: str | None) -> str:
    if name:
        return f"This adapter: {name}. The base model has its own licence."
    return "The licence of this adapter was not stated. The base model has its own licence."


def _loading(auto: str, peft: bool) -> str:
    text = f"""With `pip install talklora-pl`, by itself or by any program that takes a `transformers` model:

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained(FOLDER, trust_remote_code=True)  # base=NAME: another place of the base
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

or onto a base that is loaded already:

```python
from talklora_pl import load_adapter

load_adapter(base_model, FOLDER)
```"""
    if peft:
        text += """

Its routing does not depend on the token, so PEFT loads it without talklora-pl:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, FOLDER + "/peft")
```"""
    return text
