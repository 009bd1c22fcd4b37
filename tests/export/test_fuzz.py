"""Mutated adapter folders: each loads, or gives one clear error and leaves the model as it was. No crash, no hang."""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from talklora_pl import AdapterConfig, UserError, load_adapter, remove_adapter, save_adapter, typed
from talklora_pl.allocation import Allocation
from talklora_pl.balance import Balance
from talklora_pl.communication import Communication
from talklora_pl.experts import Experts
from talklora_pl.routers import Router
from tests.export import models
from tests.export.models import unsigned
from tests.methods.test_configs import config_of

HOSTILE: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        3,
        4097,
        2**31,
        2**63,
        2**70,
        1e308,
        0.5,
        -0.5,
        "",
        "a" * 10_000,
        [],
        {},
        [[]],
        [None],
        [""],
    ),
    *("../../../etc/passwd", "/etc/passwd", "..", "os.system", "__import__('os')", "talklora_pl.experts.lora.LoRA"),
    *("(a+)+$", "((a|a)*)*b", "all-linear", ".*", "model", "default", "\x00", "\ud800", "💥", "talklora.default"),
    *(
        {"name": "os.system"},
        {"name": "lora", "x": 1},
        {"class_path": "os.system"},
        {"name": ["lora"]},
        list(range(5000)),
    ),
    {"name": "gnn", "rounds": 10**9},
    {"name": "gnn", "nodes": "embeddings", "width": 10**9},
    {"name": "attention", "heads": 10**9},
    {"name": "mlp_mixer", "expansion": 1e300},
    {"name": "top_k", "k": 10**9},
]


# --- mutations


def spots(data: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in nested plain data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [spot for key, value in items for spot in [(data, key), *spots(value)]]


def mutate_data(data: Any, rng: random.Random) -> Any:
    """The same plain data with one or two values replaced, removed, moved or renamed."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 2))):
        if not (places := spots(data)):
            return data
        container, key = rng.choice(places)
        action = rng.random()
        if action < 0.65:
            container[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif action < 0.75:
            del container[key]
        elif action < 0.85 and isinstance(container, dict):
            container[rng.choice([str(h)[:50] for h in HOSTILE])] = container.pop(key)
        else:
            other, there = rng.choice(places)
            container[key] = copy.deepcopy(other[there] if there in other or isinstance(there, int) else None)
    return data


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, repeated, inserted."""
    out, at = bytearray(data), rng.randrange(max(len(data), 1))
    action = rng.randrange(6)
    if action == 0:
        out = out[:at]
    elif action == 1:
        out[at:at] = rng.randbytes(rng.choice((1, 8, 1000)))
    elif action == 2:
        del out[at : at + rng.choice((1, 8, 1000))]
    elif action == 3:
        out[at:at] = out[at : at + 64]
    else:
        for _ in range(rng.choice((1, 1, 10))):
            out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    action = rng.random()
    if action < 0.75:
        return json.dumps(mutate_data(json.loads(data), rng)).encode()
    if action < 0.8:
        deep = rng.choice((b"[" * 100_000, b'{"a":' * 100_000, b"[" * 5000 + b"]" * 5000))
        return rng.choice(
            (deep, data.replace(b'"adapter": {', b'"adapter": {"deep": ' + deep + b","), b"NaN", b"1" * 5000)
        )
    return mutate_bytes(data, rng)


def mutate_tensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    action = rng.random()
    if action < 0.6:
        header = json.dumps(mutate_data(json.loads(header), rng)).encode()
    elif action < 0.7:
        header = mutate_bytes(header, rng)
    elif action < 0.8:
        return rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(data))).to_bytes(8, "little") + data[8:]
    elif action < 0.9:
        body = mutate_bytes(body, rng)
    else:
        return mutate_bytes(data, rng)
    return len(header).to_bytes(8, "little") + header + body


def mutate_folder(good: Path, folder: Path, rng: random.Random) -> None:
    shutil.copytree(good, folder)
    tensors, about = folder / "adapter.safetensors", folder / "talklora.json"
    if rng.random() < 0.55:
        about.write_bytes(mutate_json(about.read_bytes(), rng))
        return
    tensors.write_bytes(mutate_tensors(tensors.read_bytes(), rng))
    if rng.random() < 0.8:  # an attacker knows how to compute a digest
        data = json.loads(about.read_text())
        data["tensors_sha256"] = sha256(tensors.read_bytes()).hexdigest()
        about.write_text(json.dumps(data))


# --- what must hold


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Watch:
    """Files opened while it is on. Audit hooks cannot be removed, so there is one for all tests."""

    def __init__(self) -> None:
        self.opened: list[str] | None = None
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.opened is not None and event in ("open", "import", "exec", "os.system", "subprocess.Popen"):
            self.opened.append(f"{event}: {args[0]}")


def state(model: Any) -> list[Any]:
    parameters = [(n, id(p), p.requires_grad, p.data_ptr(), p._version) for n, p in model.named_parameters()]
    return [
        *parameters,
        *((n, type(m)) for n, m in model.named_modules()),
        sorted(vars(model)),
        model.config.vocab_size,
    ]


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def fuzz(count: int, seed: int, tmp_path: Path, watch: Watch) -> dict[str, int]:
    rng = random.Random(seed)
    base = models.save_base(tmp_path / "base", "llama")
    configs = {
        "talklora": config_of("talklora"),
        "mixlora": config_of("mixlora"),
        "graphlora": config_of("graphlora"),
        "head": AdapterConfig(rank=8, modules_to_save=["lm_head"]),
    }
    for name, config in configs.items():
        model = models.load(base)
        models.train(model, config)
        unsigned(save_adapter(model, tmp_path / name))
    for family in (Allocation, Balance, Communication, Experts, Router):  # type hints are read once, by evaluation
        for component in family._members.values():
            typed.problems(component, {})
    model = models.load(base)
    for name in configs:  # everything that is imported late is imported now
        load_adapter(model, tmp_path / name)
        remove_adapter(model)
    before, logits = state(model), models.logits(model)
    outcomes = {"loaded": 0, "refused": 0}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    folder = tmp_path / "mutated"
    for case in range(count):
        mutate_folder(tmp_path / rng.choice(list(configs)), folder, rng)
        where = f"case {case} of seed {seed}: "
        watch.opened = []
        try:
            with at_most(20):
                load_adapter(model, folder)
        except UserError as e:
            outcomes["refused"] += 1
            assert 20 < len(str(e)) < 3000 and "\n" not in str(e), where + str(e)
            assert state(model) == before, where + str(e)
        except BaseException as e:
            raise AssertionError(f"{where}{type(e).__name__}: {e}") from e
        else:
            outcomes["loaded"] += 1
            with at_most(20):
                models.logits(model)
            remove_adapter(model)
        opened, watch.opened = watch.opened, None
        assert all(str(folder) in o for o in opened), where + str(opened)
        shutil.rmtree(folder)
        if case % 100 == 0:
            assert torch.equal(models.logits(model), logits), where
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 600 * 1024, f"{grown} KiB"
    return outcomes


def test_mutated_folders(tmp_path: Path, watch: Watch) -> None:
    outcomes = fuzz(250, 0, tmp_path, watch)
    assert outcomes["refused"] > 150 and outcomes["loaded"] > 3


@pytest.mark.slow
def test_many_mutated_folders(tmp_path: Path, watch: Watch) -> None:
    fuzz(2100, 1, tmp_path, watch)
