"""A process of its own: loads every exported folder under argv[1] in both ways, prints the differences as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import talklora_pl


@torch.no_grad()
def main(root: Path) -> None:
    want = load_file(root / "expected.safetensors")
    inputs = {"input_ids": want.pop("ids"), "attention_mask": want.pop("mask")}
    out: dict[str, dict[str, float]] = {}
    for name, logits in want.items():
        folder, base = root / name, root / f"base-{name.split('-')[0]}"
        classifies = "SequenceClassification" in (folder / "config.json").read_text()
        auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
        by_auto = auto.from_pretrained(folder, trust_remote_code=True)
        by_hand = auto.from_pretrained(base).eval()
        talklora_pl.load_adapter(by_hand, folder)
        out[name] = {
            way: (model(**inputs).logits - logits).abs().max().item()
            for way, model in (("auto", by_auto), ("load_adapter", by_hand))
        }
        out[name]["off"] = 0.0
        with talklora_pl.disable_adapter(by_hand):
            out[name]["off"] = (by_hand(**inputs).logits - logits).abs().max().item()
    print(json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
