"""What an adapter costs on one Linear: forward + backward (with input gradients) as a ratio to the frozen layer.

    python benchmarks/layer.py --width 4096 --tokens 1024 --dtype bfloat16

All variants run in turn within each round, so that a busy machine slows all of them; the medians of the rounds' ratios
are printed with their quartiles. PEFT's LoRA has the same total rank.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from talklora_pl.adapter import AdapterConfig, inject
from talklora_pl.communication.identity import NoCommunication
from talklora_pl.communication.talking import Talking
from talklora_pl.experts.lora import LoRA
from talklora_pl.experts.shared_b import SharedB
from talklora_pl.routers.softmax import Softmax, Uniform


class Model(nn.Module):
    """One Linear under a name that adapters can target."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(width, width, bias=False, dtype=dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def ours(width: int, dtype: torch.dtype, rank: int, **parts: Any) -> nn.Module:
    model = Model(width, dtype)
    inject(model, AdapterConfig(targets=["proj"], rank=rank, **parts))
    return model.train()


def peft_lora(width: int, dtype: torch.dtype, rank: int, dropout: float) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=["proj"])
    return get_peft_model(Model(width, dtype), options).train()


def seconds(model: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> float:
    start = time.perf_counter()
    model(x).backward(dy)
    return time.perf_counter() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--width", type=int, default=4096)
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--rank", type=int, default=32)
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = p.parse_args()
    dtype = getattr(torch, args.dtype)
    talking: Any = {"experts": SharedB(), "communication": Talking(), "router": Softmax("features")}
    plain: Any = {"experts": LoRA(), "communication": NoCommunication(), "router": Uniform(), "num_experts": 1}
    size = (args.width, dtype, args.rank)
    models: dict[str, nn.Module] = {
        "frozen": Model(args.width, dtype),
        "lora": ours(*size, dropout_input=0.0, **plain),
        "talklora": ours(*size, dropout_input=0.0, **talking),
        "talklora, dropout_input 0.05": ours(*size, dropout_input=0.05, **talking),
        "talklora, compat published": ours(*size, compat="published", **talking),
    }
    try:
        models["PEFT LoRA"] = peft_lora(*size, dropout=0.0)
        models["PEFT LoRA, dropout 0.05"] = peft_lora(*size, dropout=0.05)
    except ImportError:
        print("peft is not installed: without it")
    x = torch.randn(args.tokens, args.width, dtype=dtype, requires_grad=True)
    dy = torch.randn(args.tokens, args.width, dtype=dtype)
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(args.rounds + 2):
        for name, model in models.items():
            t = seconds(model, x, dy)
            if round_ >= 2:
                times[name].append(t)
    frozen = torch.tensor(times["frozen"])
    print(
        f"width {args.width}, {args.tokens} tokens, rank {args.rank}, {args.dtype}, {torch.get_num_threads()} threads"
    )
    print(f"{'frozen':<32}{frozen.median() * 1e3:8.1f} ms")
    for name, t in times.items():
        if name != "frozen":
            q1, q2, q3 = (torch.tensor(t) / frozen).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            print(f"{name:<32}{q2:8.3f} x   ({q1:.3f}-{q3:.3f})")


if __name__ == "__main__":
    main()
