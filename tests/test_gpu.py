"""What only a GPU can show: ``pytest -m gpu`` there. Each fit is of a tiny model and takes seconds."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig

import talklora_pl
from talklora_pl import FineTuner
from talklora_pl.adapter import inject
from talklora_pl.adapter.host import Adapted
from talklora_pl.base import BaseModel
from talklora_pl.callbacks import FiniteGuard
from talklora_pl.captured import PLAIN
from talklora_pl.inputs import labelled, packed, to_device
from talklora_pl.memory.checkpointing import checkpoint_layers
from talklora_pl.memory.estimate import Placement
from talklora_pl.memory.report import estimator
from talklora_pl.objectives.sft import SFT
from talklora_pl.pieces import summed_nll
from talklora_pl.shipped import methods
from talklora_pl.trials import prepare_for_packed_rows
from tests.data.tiny import llama, save_model
from tests.test_captured import batches as steps_of_one_shape

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# a batch of a single row is another shape to the compiler
LENGTHS = ([30, 17, 25], [20, 40], [33, 21, 18], [50, 31], [19, 19, 24])


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    # rows of grouped products are multiples of 16 bytes, the heads such that flash attention takes them
    made = save_model(tmp_path, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    return BaseModel(made.path, dtype="bfloat16")


def batches(pack: bool = False) -> Iterator[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    for lengths in LENGTHS:
        ids = [torch.randint(5, 250, (n,), generator=draw).tolist() for n in lengths]
        batch = labelled(ids, [[-100] * 8 + row[8:] for row in ids], 0)
        yield packed(batch) if pack else batch


class NoWaits(L.Callback):
    """From the third batch on every wait of the host is an error."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx > 1:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    on_exception = on_train_batch_end


def fit(tuner: FineTuner, *callbacks: L.Callback, pack: bool = False, made: Any = None) -> None:
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=1,
        log_every_n_steps=100,
        gradient_clip_val=1.0,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(tuner, DataLoader(made or list(batches(pack)), batch_size=None))  # type: ignore[arg-type]


@pytest.mark.parametrize("checkpointing", ["off", "full"])
@pytest.mark.parametrize("method", methods())
def test_a_step_that_logs_nothing_waits_for_nothing(method: str, checkpointing: Any, base: BaseModel) -> None:
    fit(FineTuner(base, talklora_pl.method(method), gradient_checkpointing=checkpointing), FiniteGuard(), NoWaits())


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad", "RMSprop"])
def test_optimisers(name: str, base: BaseModel) -> None:
    optimizer = partial(getattr(torch.optim, name), lr=0.01)
    fit(FineTuner(base, talklora_pl.method("talklora"), optimizer=optimizer), FiniteGuard())


@pytest.mark.filterwarnings("error:model.compile")
@pytest.mark.parametrize(("method", "checkpointing"), [("talklora", "full"), ("graphlora", "off")])
def test_compiled_layers(method: str, checkpointing: Any, base: BaseModel) -> None:
    """They pass the comparison of gradients, wait for nothing, and nothing is compiled after the second batch."""
    graphs: list[int] = []

    class Graphs(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    config = talklora_pl.method(method, dropout_input=0.05)
    fit(FineTuner(base, config, compile="layers", gradient_checkpointing=checkpointing), NoWaits(), Graphs())
    assert graphs[0] > 0 and len(set(graphs[1:])) == 1


class Prepare(L.Callback):
    """As the data module does that packs rows."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        attention, reason = prepare_for_packed_rows(pl_module.model)
        assert (attention, reason) == ("the variable-length kernel of torch", "")


class Losses(L.Callback):
    """Those of all steps; after the third batch, in which a step is recorded, every wait is an error."""

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict
        self.losses: list[torch.Tensor] = []
        self.replays = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.strict and trainer.global_step > PLAIN:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.losses.append(outputs["loss"].detach().clone())

    def on_exception(self, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.replays = pl_module._captured.turn if pl_module._captured else 0


@pytest.mark.filterwarnings("error:model.cuda_graph")
@pytest.mark.filterwarnings("error:model.compile")
@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("method", "compile"), [*((method, "off") for method in methods()), ("talklora", "layers"), ("graphlora", "layers")]
)
def test_recorded_steps(method: str, compile: Any, pack: bool, base: BaseModel) -> None:
    """They train as the steps themselves do, and draw their random numbers anew."""
    found = []
    for cuda_graph, dropout in ((False, 0.0), (True, 0.0), (True, 0.2)):
        L.seed_everything(0)
        seen = Losses()
        config = talklora_pl.method(method, dropout_input=dropout)
        tuner = FineTuner(base, config, compile=compile, cuda_graph=cuda_graph)
        made = [b | {"step_tokens": 40, "micro_steps": 1} for b in steps_of_one_shape(pack)] * 2
        fit(tuner, seen, FiniteGuard(), *([Prepare()] if pack else []), made=made)
        found.append(torch.stack(seen.losses).float().cpu())
        assert seen.replays == (len(made) - PLAIN if cuda_graph else 0)
    plain, recorded, dropped = found
    assert ((recorded - plain).abs() <= 0.02 * plain.abs()).all(), (plain, recorded)
    assert not torch.equal(dropped, recorded)


@pytest.mark.parametrize("when", ["always", "in the recording"])
def test_a_run_goes_on_when_its_steps_cannot_be_recorded(when: str, base: BaseModel) -> None:
    """With random numbers, which a recording that failed leaves in disorder."""

    class Waits(SFT):
        def loss(self, model: Any, batch: Any) -> Any:
            total, count = super().loss(model, batch)
            if when == "always" or torch.cuda.is_current_stream_capturing():
                total = total * float(total.detach() > 0)
            return total, count

    tuner = FineTuner(base, talklora_pl.method("talklora", dropout_input=0.2), objective=Waits(), cuda_graph=True)
    made = [b | {"step_tokens": 40, "micro_steps": 1} for b in steps_of_one_shape(False)] * 2
    seen = Losses(strict=False)
    with pytest.warns(UserWarning, match="model.cuda_graph: steps are not recorded"):
        fit(tuner, seen, made=made)
    assert seen.replays == 0 and len(seen.losses) == len(made) and torch.stack(seen.losses).isfinite().all()


@pytest.mark.parametrize("compile", ["off", "layers"])
def test_packed_rows_go_through_the_kernel_for_them(compile: Any, base: BaseModel) -> None:
    fit(FineTuner(base, talklora_pl.method("talklora"), compile=compile), Prepare(), NoWaits(), pack=True)


@pytest.mark.parametrize("method", ["graphlora", "mixlora"])
def test_grouped_products_are_those_one_by_one(method: str) -> None:
    model = llama(hidden_size=64, intermediate_size=96, num_attention_heads=4).to(DEVICE, torch.bfloat16)
    adapter = inject(model, talklora_pl.method(method, dropout_input=0.0))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.train()
    gradients = []
    for grouped in (False, True):
        for module in model.modules():
            if isinstance(module, Adapted):
                for layer in module.talklora_adapters.layers.values():
                    layer.grouped = grouped
        adapter.zero_grad()
        summed_nll(model, to_device(next(batches()), DEVICE))[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None]))
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


@pytest.mark.parametrize("method", ["talklora", "mixlora"])
def test_a_static_cache_generates_the_same(method: str) -> None:
    """transformers compiles for it; the changed weights of an adapter are those that it then generates with."""
    model = llama().to(DEVICE)
    adapter = inject(model, talklora_pl.method(method))
    model.eval()
    ids = torch.arange(5, 17, device=DEVICE).view(2, 6)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    for _ in range(2):
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        want = model.generate(ids, pad_token_id=258, **options)
        assert torch.equal(model.generate(ids, pad_token_id=258, cache_implementation="static", **options), want)


@pytest.mark.parametrize("method", ["talklora", "graphlora"])
@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_the_estimate_is_what_a_step_takes(method: str, checkpointing: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8}
    LlamaConfig(**sizes, vocab_size=32000, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    tuner = FineTuner(
        BaseModel(str(tmp_path), dtype="bfloat16", attn_implementation="sdpa"),
        talklora_pl.method(method),
        gradient_checkpointing=checkpointing,
    )
    ids = torch.randint(5, 30000, (8, 512)).tolist()
    batch = labelled(ids, [[-100] * 384 + row[384:] for row in ids], 0)
    told = estimator(tuner, batch).need(checkpointing, Placement()).total
    before = torch.cuda.memory_allocated()
    model: Any = tuner.meta_model().to_empty(device=DEVICE)
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            t.normal_(0, 0.02) if t.is_floating_point() else t.zero_()
    checkpoint_layers(model.train(), checkpointing)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    batch = to_device(batch, DEVICE)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        tuner.objective.loss(model, batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    took = torch.cuda.max_memory_allocated() - before
    assert abs(told / took - 1) < 0.1, (told, took)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base(quantization: Any, base: BaseModel) -> None:
    tuner = FineTuner(BaseModel(base.path, quantization=quantization), talklora_pl.method("talklora"))
    fit(tuner)
    assert all(p.isfinite().all() for p in tuner.model.talklora.parameters())
