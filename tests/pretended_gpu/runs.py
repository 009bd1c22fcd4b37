"""Runs on the pretended GPU, by name: ``python -m tests.pretended_gpu.runs NAME...`` gives a line of JSON for each."""

from __future__ import annotations

from tests.pretended_gpu.gpu import GPU, PretendedGPU  # before torch

# isort: split
import json
import logging
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import SingleDeviceStrategy

from talklora_pl import pieces, shared_prefix, trials
from talklora_pl.adapter import AdapterConfig, inject, set_adapter
from talklora_pl.adapter.io import load_adapter, save_adapter
from talklora_pl.balance import Balance
from talklora_pl.base import load_base
from talklora_pl.callbacks import FiniteGuard, LoadBalance, Preemption, RoutingSensitivity, RunMetrics, SampleOutputs
from talklora_pl.callbacks.progress import EpochProgress
from talklora_pl.data import TextData
from talklora_pl.data.source import Source
from talklora_pl.module import FineTuner
from talklora_pl.objectives.preference import Preference
from talklora_pl.registry import get
from tests.data.tiny import save_model
from tests.methods.test_configs import METHODS, config_of

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
DATA = Path(tempfile.mkdtemp())
BASE = replace(save_model(DATA / "model", **SIZES), dtype="bfloat16")
ONE_LAYER = replace(save_model(DATA / "one", **SIZES, num_hidden_layers=1), dtype="bfloat16")
PACKED = {"max_tokens": 128}
BALANCE = ("importance_cv", "localised", "normal", "poisson", "switch", "z_loss")
UNIFORM = config_of("lora").allocation
"""A rule that reads no weights: there are none."""


class NoAccelerator(CPUAccelerator):
    """Sets no device up."""

    def setup_device(self, device: torch.device) -> None:
        assert device == GPU


class OneGPU(SingleDeviceStrategy):
    """Leaves the model where it is at the end."""

    def __init__(self) -> None:
        super().__init__(device=GPU, accelerator=NoAccelerator())

    def teardown(self) -> None:
        pass


class Replays(L.Callback):
    """How many steps were replays."""

    number = 0

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.number = pl_module._captured.turn if pl_module._captured else 0


def lines(name: str, make: Callable[[int], dict[str, Any]]) -> Source:
    path = DATA / f"{name}.jsonl"
    path.write_text("".join(json.dumps(make(i)) + "\n" for i in range(12)))
    return Source(path=str(path), task=name)


def text(i: int) -> str:
    return "12345"[i % 5] * (1 + i % 4)


QUESTIONS = {
    "train": [lines("questions", lambda i: {"question": text(i), "choices": [str(i % 5), "no"], "label": 0})],
    "rows": "choice",
}
EQUAL = {
    "train": [lines("equal", lambda i: {"question": "1234", "choices": [str(i % 5), "no"], "label": 0})],
    "rows": "choice",
    "val_size": 0,
}
"""Batches of one shape."""
PAIRS = {
    "train": [lines("pairs", lambda i: {"prompt": text(i), "chosen": "ab", "rejected": "cde"})],
    "rows": "preference",
}
CLASSES = {"train": [lines("classes", lambda i: {"text": text(i), "label": "ab"[i % 2]})], "rows": "classification"}


@contextmanager
def steps_of(gpu: PretendedGPU) -> Iterator[list[list[tuple[str, str]]]]:
    """The waits of every training step."""
    waits: list[list[tuple[str, str]]] = []
    advance = _TrainingEpochLoop.advance

    def watched(loop: Any, *args: Any) -> None:
        gpu.waits = []
        advance(loop, *args)
        waits.append(gpu.waits)
        gpu.waits = []

    _TrainingEpochLoop.advance = watched  # type: ignore[method-assign]
    try:
        yield waits
    finally:
        _TrainingEpochLoop.advance = advance  # type: ignore[method-assign]


def fit(adapter: AdapterConfig, *callbacks: L.Callback, data: Any = None, module: Any = None, **trainer: Any) -> Any:
    """Two steps of a whole fit, of which the second logs."""
    gpu = PretendedGPU()
    model = FineTuner(
        **{
            "base": BASE,
            "adapter": replace(adapter, allocation=UNIFORM),
            **(module or {}),
        }
    )
    options = {"batch_size": 3, "val_size": 4, "max_length": 64, "length_grouped": False, **QUESTIONS, **(data or {})}
    defaults = {
        "strategy": OneGPU(),
        "max_steps": 2,
        "log_every_n_steps": 2,
        "limit_val_batches": 0,
        "gradient_clip_val": 1.0,
        "logger": CSVLogger(DATA),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
    }
    replays = Replays()
    watchers = [FiniteGuard(), RunMetrics(), LoadBalance(figures=False), Preemption(), replays]
    with steps_of(gpu) as waits, gpu:
        L.Trainer(**defaults | trainer, callbacks=[*callbacks, *watchers]).fit(model, TextData(**options))
    assert model.base.head.classifies or trials.reads_back_only(model.model)
    return {"waits": waits, "operators": len(gpu.operators), "replays": replays.number}


def of_rows() -> Any:
    """Decoding token by token, then rows with adapters of their own, loaded while the model is there."""
    gpu = PretendedGPU()
    with gpu, torch.no_grad():
        model = load_base(BASE, GPU)
        inject(model, config_of("talklora"), device=GPU)
        save_adapter(model.eval(), DATA / "adapter")
        load_adapter(model, DATA / "adapter", name="two")
        set_adapter(model, "default")
        ids = torch.ones(2, 4, dtype=torch.long, device=GPU)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=0)
        gpu.waits = []
        model(input_ids=ids)
        model(input_ids=ids, adapter_names=["two", "default"])
    return {"waits": [gpu.waits], "operators": len(gpu.operators)}


_derivative, _obstacle = trials._derivative, shared_prefix._obstacle


def _heard(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A trial asks which tokens are heard: one of them, neither the last of five nor of the first three."""
    _derivative(logits, x)
    heard = torch.zeros(x.shape)
    heard[:, 3] = 1
    return heard


def _no_obstacle(model: Any) -> str:
    """The trial runs, and whatever it says of numbers is not believed."""
    assert "refuses" not in _obstacle(model)
    return ""


trials._derivative, shared_prefix._obstacle = _heard, _no_obstacle


def _in_pieces() -> Any:
    pieces.MOST_ROWS, before = 2, pieces.MOST_ROWS
    try:
        return fit(replace(config_of("talklora"), compat="published"), data=PACKED)  # with all dropouts
    finally:
        pieces.MOST_ROWS = before


RUNS: dict[str, Callable[[], Any]] = {
    "rows": of_rows,
    "balance": lambda: fit(replace(config_of("mola"), balance=[get(Balance, name)() for name in BALANCE]), data=PACKED),
    "padded": lambda: fit(config_of("mixlora"), module={"gradient_checkpointing": "selective"}),
    "preference": lambda: fit(config_of("mola"), data=PAIRS, module={"objective": Preference()}),
    "pieces": _in_pieces,
    "mixed": lambda: fit(
        config_of("talklora"), module={"base": replace(BASE, dtype="float32")}, precision="bf16-mixed"
    ),
    "float32": lambda: fit(config_of("mixlora"), module={"base": replace(BASE, dtype="float32")}),
    "accumulated": lambda: fit(
        config_of("lossfree"),
        EpochProgress(),
        accumulate_grad_batches=2,
        enable_progress_bar=True,
    ),
    "classification": lambda: fit(
        config_of("talklora"), data=CLASSES, module={"base": replace(BASE, task="sequence_classification")}
    ),
    "validation": lambda: fit(
        config_of("mixlora"), RoutingSensitivity(), SampleOutputs(), limit_val_batches=1.0, val_check_interval=1
    ),
}
RECORDED = {"max_steps": 6, "log_every_n_steps": 6}
for _method in METHODS:
    if "alphalora" in _method:  # without its allocation it is another one
        continue
    RUNS[f"{_method} packed"] = lambda m=_method: fit(
        config_of(m), data=PACKED, module={"base": ONE_LAYER, "gradient_checkpointing": "full"}
    )
    RUNS[f"{_method} captured"] = lambda m=_method: fit(
        config_of(m), data=EQUAL | PACKED, module={"base": ONE_LAYER, "cuda_graph": True}, **RECORDED
    )
RUNS["padded captured"] = lambda: fit(
    config_of("talklora"), data=EQUAL, module={"base": ONE_LAYER, "cuda_graph": True}, **RECORDED
)


def main(names: list[str]) -> None:
    """Without names: all of them."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for name in names or RUNS:
        try:
            found = {"error": None, **RUNS[name]()}
        except Exception as e:
            traceback.print_exc()
            found = {"error": f"{type(e).__name__}: {e}", "waits": [], "operators": 0}
        print("RUN", json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
