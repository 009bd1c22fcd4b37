"""What every method file computes, written down: 20 losses and the exported tensors of a tiny float64 model.

    python -m tests.sameness record     # write tests/losses/*.json anew, with a reason in the commit
    python -m tests.sameness exact      # bit for bit, on the machine that recorded: a refactoring changes nothing

The model computes in float64 throughout (no float32 norm or softmax as Llama has them), so that numbers of two machines
agree far below the 1e-10 that ``tests/methods/test_sameness.py`` asks for.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, StableLmConfig

from tests.data.tiny import tokenizer

METHODS = sorted(p.stem for p in (Path(__file__).parents[1] / "configs/method").glob("*.yaml"))
RECORDED = Path(__file__).parent / "losses"
STEPS = 20
WORDS = ["river", "stone", "cloud", "lamp", "paper", "green", "seven", "quiet", "north", "apple"]


class Losses(L.Callback):
    """Keeps the loss of every training step."""

    values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        Losses.values.append(float(outputs["loss"]))


def run(method: str, folder: Path) -> dict[str, Any]:
    """Train ``method`` by the command line and describe what came out."""
    from talklora_pl.cli import main

    base, data = folder / "base", folder / "rows.jsonl"
    if not base.exists():
        torch.manual_seed(0)
        config = StableLmConfig(
            vocab_size=264,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=256,
            eos_token_id=257,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.float64).save_pretrained(base)
        tokenizer().save_pretrained(base)
        draw = random.Random(0)
        rows = [{"prompt": " ".join(draw.choices(WORDS, k=3)), "completion": draw.choice(WORDS)} for _ in range(60)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Losses.values = []
    options = {
        "config": f"method/{method}",
        "model.base.path": base,
        "model.base.dtype": "float64",
        "model.base.attn_implementation": "sdpa",
        "model.adapter.dtype": "float64",
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 0.01,
        "data.train": data,
        "data.val_size": 0,
        "data.batch_size": 4,
        "data.cache_dir": folder / "cache",
        "trainer.max_steps": STEPS,
        "trainer.accumulate_grad_batches": 1,
        "trainer.callbacks": "tests.sameness.Losses",
        "trainer.default_root_dir": folder / method,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.logger": "false",
    }
    assert main(["fit", *(f"--{key}={value}" for key, value in options.items())]) == 0
    (adapter,) = (folder / method).rglob("last/talklora.json")
    about = json.loads(adapter.read_text())
    tensors = load_file(adapter.parent / "adapter.safetensors")
    return {
        "losses": Losses.values,
        "experts_per_layer": about["experts_per_layer"],
        "norms": {name: float(value.double().norm()) for name, value in sorted(tensors.items())},
        "sha256": about["tensors_sha256"],
    }


def main(verb: str) -> int:
    """``record`` or ``exact``; the exit status."""
    wrong = []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            now, file = run(method, Path(folder)), RECORDED / f"{method}.json"
            if verb == "record":
                file.write_text(json.dumps(now, indent=1) + "\n")
            elif now != json.loads(file.read_text()):
                wrong.append(method)
    print(f"{len(METHODS)} methods, differing: {', '.join(wrong) or 'none'}")
    return bool(wrong)


if __name__ == "__main__":
    from tests import sameness  # the callback's class by its importable name, not __main__'s

    sys.exit(sameness.main(*sys.argv[1:]))
