"""The same recipe by this package and by the Trainer of transformers with PEFT: CPU seconds of whole training steps.

SmolLM2-135M in bfloat16, 16 rows of 107 tokens with the last 7 labelled, rank 32, with and without dropout of 0.05 on
the input of the adapters; ours also with compiled decoder layers. Fits of some steps take turns, and the first steps of
each (``BEFORE``) are not counted. The peer runs as ``TrainingArguments(bf16=True)`` does, under autocast.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from benchmarks.models import RANK, TARGETS, method
from talklora_pl.base import BaseModel, load_base
from talklora_pl.module import FineTuner

ROWS, LENGTH, LABELLED, STEPS, BEFORE = 16, 107, 7, 6, 2
DROPOUTS = (0.0, 0.05)


class _Clock(L.Callback):
    """The processor's time at the end of every step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(time.process_time())

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.marks, self.marks[1:])][BEFORE - 1 :]


def measured(base: str, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every step that is counted, by variant; those of one round stand at the same places."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", "model.compile: layers")  # layers that stay as they are would be another variant
    torch.manual_seed(0)
    ids_BS = torch.randint(5, 5000, (ROWS, LENGTH))
    labels_BS = ids_BS.where(torch.arange(LENGTH) >= LENGTH - LABELLED, -100)
    rows = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": labels_BS}
    with tempfile.TemporaryDirectory() as folder:
        theirs = _transformers(base, rows, folder)
        runs: dict[str, Callable[[], list[float]]] = {}
        for p in DROPOUTS:
            runs[f"HF Trainer + PEFT LoRA, dropout {p:g}"] = partial(theirs, p)
            runs[f"talklora, dropout {p:g}"] = _ours(base, rows, p)
            runs[f"talklora, model.compile: layers, dropout {p:g}"] = _ours(base, rows, p, "layers")
        spent: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                spent[name] += run()
    return spent


def _ours(base: str, rows: dict[str, torch.Tensor], dropout: float, compiled: Any = "off") -> Callable[[], list[float]]:
    config = method("talklora", dropout_input=dropout)
    model = FineTuner(BaseModel(base, dtype="bfloat16"), config, compile=compiled)

    def run() -> list[float]:
        clock = _Clock()
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=STEPS,
            limit_val_batches=0,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader([rows] * STEPS, batch_size=None))  # type: ignore[arg-type]
        return clock.seconds()

    return run


def _transformers(base: str, rows: dict[str, torch.Tensor], folder: str) -> Callable[[float], list[float]]:
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

    frozen: Any = load_base(BaseModel(base, dtype="bfloat16"), "cpu")
    configs = {
        f"dropout{p:g}".replace(".", ""): LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=p, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        for p in DROPOUTS
    }
    first, second = configs
    model: Any = get_peft_model(frozen, configs[first], adapter_name=first)
    model.add_adapter(second, configs[second])
    data = [{name: tensor[i % ROWS] for name, tensor in rows.items()} for i in range(ROWS * STEPS)]
    names = dict(zip(DROPOUTS, configs))

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.clock = _Clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.clock.on_train_batch_end()

    def run(dropout: float) -> list[float]:
        model.set_adapter(names[dropout])
        options = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            max_steps=STEPS,
            bf16=True,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        said = Clock()
        trainer = Trainer(
            model=model,
            args=options,
            train_dataset=data,  # type: ignore[arg-type]
            data_collator=default_data_collator,
            callbacks=[said],
        )
        trainer.train()
        return said.clock.seconds()

    return run
