"""Recorded steps give what the steps themselves give. Instead of a CUDA graph it is a tape on a CPU (tests/tape.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from talklora_pl import FineTuner, UserError, captured
from talklora_pl.adapter import AdapterConfig, inject
from talklora_pl.adapter.adapters import disable_adapter
from talklora_pl.base import BaseModel
from talklora_pl.callbacks import FiniteGuard, LoadBalance, RunMetrics
from talklora_pl.captured import PLAIN, CapturedSteps
from talklora_pl.inputs import NO_LOSS, filled, labelled, packed
from talklora_pl.objectives.preference import Preference
from talklora_pl.objectives.sft import SFT
from talklora_pl.step import Passed, captured_steps, forward
from tests import tape
from tests.data import tiny
from tests.methods.matrix import randomise
from tests.methods.test_configs import METHODS, config_of

ROWS = [(27, 31), (32, 21), (19, 31), (32, 22), (26, 32)]  # tokens: as many labels and columns once they are filled
PACKS = [(27, 20, 15), (32, 20, 11), (30, 17, 14), (9, 28, 8, 16), (30, 18, 14)]
NUMBERS = {"weight": 0.25, "balance_weight": 0.5}


def batches(pack: bool) -> Iterator[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    for lengths in PACKS if pack else ROWS:
        ids = [torch.randint(2, 60, (n,), generator=draw).tolist() for n in lengths]
        batch = labelled(ids, [[NO_LOSS] * (n // 3) + row[n // 3 :] for n, row in zip(lengths, ids)], 0)
        yield packed(batch) if pack else batch


WHOLE_BLOCKS = {"graphlora", "mixlora"}
"""Their experts work at once, which no float64 can: in it they look for the tokens of each, and cannot be recorded."""


def exact(method: str) -> float:
    """Bound of what is equal but for rounding."""
    return 1e-4 if method in WHOLE_BLOCKS else 1e-10


def dtype_of(method: str) -> Any:
    return "float32" if method in WHOLE_BLOCKS else "float64"


def model_with(config: AdapterConfig, dtype: Any = "float64") -> Any:
    # its norms are in float32 at most, token by token; attention by hand would be too, over all columns
    model = tiny.llama(vocab_size=64, max_position_embeddings=64, attn_implementation="sdpa")
    adapter = inject(model.to(getattr(torch, dtype)), replace(config, dtype=dtype))
    randomise(adapter.to(getattr(torch, dtype)), 1)
    return model.train()


def whole(config: AdapterConfig) -> AdapterConfig:
    """Without dropout."""
    return replace(config, dropout_input=0.0, dropout_output=0.0, dropout_routing=0.0)


def steps_of(model: Any, said: list[str] | None = None) -> CapturedSteps:
    def compute(batch: dict[str, Any]) -> tuple[Tensor, Passed]:
        passed = forward(model, SFT(), batch)
        return passed.loss(batch["weight"], batch["balance_weight"]), passed.without_gradients()

    return CapturedSteps(model, compute, [].append if said is None else said.append, tape.record)


def results(steps: CapturedSteps, batch: dict[str, Any], plain: bool = False) -> tuple[list[Any], list[Tensor]]:
    """Loss and gradients of a step, and the mean weights of every layer."""
    loss, passed = steps.compute({**batch, **NUMBERS}) if plain else steps(batch, NUMBERS)
    gradients = torch.autograd.grad(loss, steps.trained, allow_unused=True)
    shares = [r.weight_share() for r in passed.routing]
    return [loss.detach(), *gradients], [*passed.each.values(), *shares]


def same(got: Any, want: Any, bound: float) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=bound, atol=bound, equal_nan=True)


def recorded(steps: CapturedSteps) -> bool:
    return bool(steps._graphs)


def counts(model: Any) -> list[Tensor]:
    return [b.clone() for b in model.talklora.buffers()]


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("method", METHODS)
def test_a_recorded_step_gives_what_the_step_gives(method: str, pack: bool) -> None:
    """Other rows of other lengths, other weights, numbers and counts than those that were recorded."""
    model, said = model_with(whole(config_of(method)), dtype_of(method)), list[str]()
    steps = steps_of(model, said)
    for i, batch in enumerate(batches(pack)):
        before = counts(model)
        got = results(steps, batch)
        after = counts(model)
        for b, value in zip(model.talklora.buffers(), before):
            b.copy_(value)
        want = results(steps, batch, plain=True)
        for a, b in zip((*got, after), (*want, counts(model))):
            same(a, b, exact(method))
        assert recorded(steps) == (i >= PLAIN) and not said, said
        with torch.no_grad():
            for p in steps.trained:
                p.mul_(1.1)


@pytest.mark.parametrize("method", ["talklora", "mixlora"])
def test_random_numbers_are_drawn_anew(method: str) -> None:
    """Those that the step itself would draw for a batch of this shape."""
    config = replace(config_of(method), dropout_input=0.1, dropout_routing=0.1 if method == "talklora" else 0.0)
    model = model_with(config, dtype_of(method))
    for module in model.modules():
        if hasattr(module, "recompute"):  # as on a GPU that records
            module.recompute = False
    steps, losses = steps_of(model), set()
    for i, batch in enumerate([*batches(False)] * 2):
        torch.manual_seed(i)
        got = results(steps, batch)
        if recorded(steps):
            torch.manual_seed(i)
            same(got[0], results(steps, filled(batch), plain=True)[0], exact(method))
            losses.add(float(got[0][0]))
    assert len(losses) == 8


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
def test_filled_rows_change_nothing(pack: bool) -> None:
    model = model_with(whole(config_of("talklora_gnn")))
    steps = steps_of(model)
    for batch in batches(pack):
        more = filled(batch)
        assert more["input_ids"].shape[1] >= batch["input_ids"].shape[1]
        assert len(more["loss_index"]) >= len(batch["loss_index"])
        if pack:
            borders = more["row_borders"]
            assert borders[-1] == more["input_ids"].shape[1] and borders.diff().min() >= 0
            assert borders.diff().max() <= more["longest_row"] and borders.dtype == torch.int32
            assert torch.equal(borders[: len(batch["row_borders"])], batch["row_borders"])
        before = counts(model)
        want = results(steps, batch, plain=True)
        for b, value in zip(model.talklora.buffers(), before):
            b.copy_(value)
        for a, b in zip(results(steps, more, plain=True), want):
            same(a, b, 1e-12)


def test_rows_are_not_filled_beyond_what_the_model_can_read() -> None:
    batch = labelled([list(range(5, 38))] * 2, [list(range(5, 38))] * 2, 0)
    assert [filled(batch, n)["input_ids"].shape[1] for n in (None, 64, 35, 33, 20)] == [36, 36, 35, 33, 33]
    pack = packed(batch)
    assert filled(pack, 20)["input_ids"].shape[1] == 72  # whose positions are those of its rows
    assert filled(batch, 34)["loss_index"][:64].tolist() == [r * 34 + i for r in range(2) for i in range(32)]


def test_what_changes_is_recorded_anew() -> None:
    model, said = model_with(whole(config_of("talklora"))), list[str]()
    steps = steps_of(model, said)
    first, *_ = batches(False)
    for _ in range(PLAIN + 1):
        results(steps, first)
    router = next(m for m in model.modules() if getattr(m, "temperature", None))
    for temperature in (2.0, 3.0):
        router.temperature = temperature
        same(results(steps, first)[0], results(steps, first, plain=True)[0], 1e-10)
        assert recorded(steps)
    p = next(p for p in model.parameters() if p.requires_grad)
    p.data = p.data * 2
    same(results(steps, first)[0], results(steps, first, plain=True)[0], 1e-10)
    assert not said
    for temperature in (4.0, 5.0, 6.0):
        router.temperature = temperature
        same(results(steps, first)[0], results(steps, first, plain=True)[0], 1e-10)
    assert said == ["steps are not recorded: numbers or tensors of the model change again and again."]
    assert not recorded(steps)


@pytest.mark.parametrize("what", ["frozen", "freed", "off", "without its dropout"])
def test_a_change_that_is_no_number_is_seen(what: str) -> None:
    model = model_with(whole(config_of("talklora")))
    last = [p for p in model.parameters() if p.requires_grad][-1]
    last.requires_grad_(what != "freed")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
            module.train(what == "without its dropout")
    steps = steps_of(model)
    first, *_ = batches(False)
    for _ in range(PLAIN + 1):
        results(steps, first)
    assert recorded(steps)
    last.requires_grad_(what != "frozen")
    if what == "without its dropout":
        model.model.eval()
    with disable_adapter(model) if what == "off" else nullcontext():
        loss, _ = steps(first, NUMBERS)
        same([loss], [steps.compute({**first, **NUMBERS})[0]], 1e-10)
    if what == "freed":
        loss.backward()
        assert last.grad is not None
    assert any(p is last for p in steps.trained) == (what != "frozen")


@pytest.mark.parametrize("place", ["model.layers.1", ""])
def test_a_hook_is_called(place: str) -> None:
    model, said, calls = model_with(whole(config_of("talklora"))), list[str](), list[int]()
    steps = steps_of(model, said)
    first, *_ = batches(False)
    for _ in range(PLAIN + 1):
        results(steps, first)
    hook = model.get_submodule(place).register_forward_hook(lambda *args: calls.append(1))
    for _ in range(2):
        results(steps, first)
    hook.remove()
    results(steps, first)
    assert len(calls) == 2 and recorded(steps)
    assert said == [
        f"steps are computed as they are while {place or 'LlamaForCausalLM'} has a hook, which a recorded step would "
        "not call."
    ]
    router = next(m for m in model.modules() if getattr(m, "temperature", None))
    for _ in range(captured.CHANGES + 1):
        router.temperature += 1
        results(steps, first)
    assert len(said) == 2 and "again and again" in said[1]


def test_gradients_of_a_step_that_is_gone() -> None:
    steps = steps_of(model_with(config_of("talklora")))
    first, *_ = batches(False)
    for _ in range(PLAIN):
        results(steps, first)
    loss, _ = steps(first, NUMBERS)
    steps(first, NUMBERS)
    with pytest.raises(RuntimeError, match="Another step has been replayed"):
        torch.autograd.grad(loss, steps.trained)


def test_a_recording_has_parameters_of_its_own() -> None:
    """On the memory of the others, whose nodes of autograd may belong to another stream."""
    model, seen = model_with(whole(config_of("talklora"))), list[list[Tensor]]()
    steps = steps_of(model)
    compute = steps.compute

    def watched(batch: dict[str, Any]) -> tuple[Tensor, Passed]:
        if isinstance(batch["weight"], Tensor):
            seen.append([p for p in model.parameters() if p.requires_grad])
        return compute(batch)

    steps.compute = watched
    for batch in batches(True):
        results(steps, batch)
    assert seen and {id(p) for p in steps.trained} == {id(p) for p in model.parameters() if p.requires_grad}
    for own in seen:
        assert not {id(p) for p in own} & {id(p) for p in steps.trained}
        assert [p.data_ptr() for p in own] == [p.data_ptr() for p in steps.trained]


def test_shapes_beyond_the_most_are_computed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "MOST", 1)
    steps = steps_of(model_with(whole(config_of("talklora"))))
    for pack in (False, True):
        for batch in batches(pack):
            same(results(steps, batch)[0], results(steps, batch, plain=True)[0], 1e-10)
    assert len(steps._graphs) == 1


@pytest.mark.parametrize("what", ["rows", "wait", "gradients"])
def test_what_cannot_be_recorded_is_computed_as_it_is(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = whole(config_of("talklora"))
    if what == "rows":
        config = replace(config, balance=AdapterConfig.from_dict({"balance": [{"name": "localised"}]}).balance)
    model, said = model_with(config), list[str]()
    steps = steps_of(model, said)
    if what == "wait":
        compute = steps.compute
        steps.compute = lambda batch: compute({**batch, "weight": float(batch["weight"])})
        steps.record = ends_badly
    if what == "gradients":
        monkeypatch.setattr(captured._Graph, "run_once", _halved(captured._Graph.run_once))
    for batch in batches(True):
        same(results(steps, batch)[0], results(steps, batch, plain=True)[0], 1e-10)
    (line,) = said
    assert (
        not recorded(steps)
        and {"rows": "asks for the rows", "wait": "not permitted", "gradients": "away from"}[what] in line
    )


def ends_badly(run: Any) -> Any:
    """A recording that failed fails once more when it ends."""
    try:
        return tape.record(run)
    except RuntimeError:
        raise RuntimeError("because of an earlier error")  # noqa: B904


def _halved(run: Any) -> Any:
    def run_once(graph: Any) -> None:
        run(graph)
        graph.gradients = [None if g is None else g / 2 for g in graph.gradients]

    return run_once


# --- whole fits


class _Weights(L.Callback):
    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.replays = 0

    def on_train_batch_end(self, trainer: Any, tuner: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].detach().clone())
        self.replays = tuner._captured.turn if tuner._captured else 0


def fit(
    base: BaseModel, config: AdapterConfig, folder: Path, cuda_graph: bool, *more: L.Callback, **options: Any
) -> Any:
    L.seed_everything(0, verbose=False)
    tuner, seen = FineTuner(base, config, cuda_graph=cuda_graph), _Weights()
    data = [
        b | {"step_tokens": 40 + i, "micro_steps": 2, "id": ["a"], "task": ["t"] * 2}
        for i, b in enumerate(batches(False))
    ]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=2,
        callbacks=[seen, FiniteGuard(skip=9), RunMetrics(), LoadBalance(figures=False), *more],
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(tuner, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    metrics = {n: v for n, v in trainer.callback_metrics.items() if not n.startswith("cost/")}
    return [*seen.losses, *(p.detach() for p in tuner.trained().values()), *counts(tuner.model)], metrics, seen


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "KIND", "cpu")
    monkeypatch.setattr(captured, "cuda_graphs", lambda: tape.record)


class Poison(L.Callback):
    def on_train_batch_start(self, trainer: Any, tuner: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 5:
            batch["step_tokens"] = float("nan")


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize("method", ["talklora", "graphlora", "lossfree"])
def test_a_fit_is_the_same(method: str, tmp_path: Path) -> None:
    """Weights, logged numbers, counts and balancing biases, with a step in it that is left out."""
    dtype = dtype_of(method)
    base = BaseModel(tiny.save_model(tmp_path).path, dtype=dtype, attn_implementation="sdpa")
    config = replace(whole(config_of(method)), dtype=dtype)
    (want, logged, _), (got, also, seen) = (fit(base, config, tmp_path, on, Poison()) for on in (False, True))
    same(got, want, exact(method))
    assert logged.keys() == also.keys()
    for name, value in logged.items():
        torch.testing.assert_close(also[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert seen.replays >= 9


@pytest.mark.usefixtures("recorder")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"device": torch.device("meta")}, "there is no GPU"),
        ({"objective": Preference()}, "objective preference"),
        ({"scaler": 1}, "float16"),
        ({"world_size": 2}, "balance losses"),
        ({"strategy": object()}, "strategy object"),
    ],
)
def test_what_stands_in_the_way_is_said(change: dict[str, Any], why: str) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    around = {"strategy": trainer.strategy, "world_size": 1, "scaler": None} | change
    tuner = SimpleNamespace(
        trainer=SimpleNamespace(**around, precision_plugin=SimpleNamespace(scaler=around["scaler"])),
        device=around.get("device", torch.device("cpu")),
        adapter_config=config_of("graphlora"),
        objective=around.get("objective", SFT()),
    )
    with pytest.warns(UserWarning, match=f"model.cuda_graph: steps are not recorded: .*{why}"):
        assert captured_steps(tuner) is None


def test_layers_that_are_computed_again_are_refused() -> None:
    with pytest.raises(UserError, match="gradient_checkpointing: off"):
        FineTuner(BaseModel("x"), gradient_checkpointing="full", cuda_graph=True)
