"""``export CHECKPOINT --merge static``: a checkpoint as one LoRA (or plain weights), with a report of what it costs."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn
from transformers import AutoTokenizer

from talklora_pl.adapter import disable_adapter, set_adapter
from talklora_pl.adapter.adapters import adapter_set, get_adapter, remove_adapter
from talklora_pl.adapter.files import write_json
from talklora_pl.adapter.hub import is_repository_name
from talklora_pl.adapter.metadata import AdapterMetadata, read_metadata
from talklora_pl.base import BaseModel, load_tokenizer
from talklora_pl.base.description import describe
from talklora_pl.base.heads import HEADS
from talklora_pl.data import TextData
from talklora_pl.data.source import Source
from talklora_pl.distributed.checkpoint import read_checkpoint
from talklora_pl.durable import folder_beside
from talklora_pl.errors import UserError
from talklora_pl.evaluation import Evaluation, Generation
from talklora_pl.export.auto import from_pretrained
from talklora_pl.export.fidelity import Fidelity, Turn, compare
from talklora_pl.export.merge import low_rank, merge_changes, merged_weights
from talklora_pl.export.peft import write_lora
from talklora_pl.export.run import export_checkpoint, find_checkpoint, into_full_precision
from talklora_pl.export.static import (
    MeanRouting,
    add_static,
    mean_routing,
    padded,
    refuse_what_is_not_linear,
    truncated,
    vllm_rank,
)
from talklora_pl.objectives import choose
from talklora_pl.sites import LowRank

HELD_BACK = 0.2
"""Share of the rows that judges the merge, where no other data are named."""
ROWS_AT_A_TIME = 4  # two copies of the logits of a batch are in memory
REPORT = "fidelity.json"
OF_THE_RUN = ("rows", "format", "columns", "labels", "max_length", "eos_token", "train_on", "special_tokens_in_data")
"""Options of data that a run's config.yaml lends to this one."""


@dataclass
class StaticOptions:
    """How to merge and how to judge it.

    Attributes:
        data: files or data sets that the weights of the experts are measured on, commas between.
        eval_data: others to judge by; None: a fifth of ``data``, which then takes no part in the measurement.
        form: a LoRA folder of PEFT, or the whole model with the change in its weights.
        rank: of the LoRA, which is truncated to it; None: as it comes.
        engine: ``vllm``: one rank for all layers, and what vLLM cannot serve is refused.
        rows, format: of the data; None: as in the run.
        limit: rows to read of each of the two.
        max_new_tokens: of a generated answer; 0: nothing is generated.
        license: for the model card.
        device: where to measure.
    """

    data: str
    eval_data: str | None = None
    form: Literal["lora", "weights"] = "lora"
    rank: int | None = None
    engine: Literal["vllm"] | None = None
    rows: str | None = None
    format: str | None = None
    limit: int = 1000
    max_new_tokens: int = 32
    license: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        """Raises: UserError for what cannot be meant."""
        if self.form == "weights" and (self.rank or self.engine or self.license):
            raise UserError("export: --rank, --for and --license are for --form lora; plain weights have no rank.")
        for name, least in (("rank", 1), ("limit", 2), ("max_new_tokens", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"export: --{name} must be at least {least}, got {value}.")
        measured, judged = ({name.strip() for name in given.split(",")} for given in (self.data, self.eval_data or ""))
        if both := {os.path.realpath(name) for name in measured} & {os.path.realpath(name) for name in judged}:
            raise UserError(
                f"export: --data and --eval-data both name {sorted(both)[0]}: what took part in the merge cannot judge "
                "it. Leave --eval-data out, and a fifth of --data is held back."
            )


@dataclass
class StaticReport:
    """What a static merge is, and how close it comes to the adapter.

    Attributes:
        exact: the routing is constant, so that nothing is lost but by truncation and rounding.
        ranks: number of Linears by the rank of their change.
        discarded: share of the change's energy (squared Frobenius norm) that truncation took, of all Linears together
            and of the worst one by name.
        routing: mean weights of each decision.
        data: what was measured and judged on.
    """

    form: str
    exact: bool
    fidelity: Fidelity
    routing: dict[str, MeanRouting]
    ranks: dict[int, int] = field(default_factory=dict)
    rank: int | None = None
    discarded: tuple[float, str, float] | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """``fidelity.json``."""
        lora: dict[str, Any] = {"linears_by_rank": self.ranks, "padded_to": self.rank}
        if self.discarded is not None:
            share, worst, most = self.discarded
            lora["discarded_energy"] = {"all": share, "worst": most, "worst_linear": worst}
        return {
            "merge": "static",
            "form": self.form,
            "routing_is_constant": self.exact,
            "data": self.data,
            "fidelity": self.fidelity.to_dict(),
            "lora": lora if self.form == "lora" else None,
            "routing": {n: {"mean": r.w_E.tolist(), "deviation": r.deviation} for n, r in self.routing.items()},
        }

    def sentences(self) -> list[str]:
        """What a reader has to know, for the terminal and the card."""
        out = []
        if self.exact:
            out.append("The routing of this adapter is constant: the merge is exact up to rounding.")
        else:
            most = max(self.routing.values(), key=lambda r: r.deviation, default=None)
            moved = f" (weights of a token are up to {most.deviation:.3f} from the mean of a layer)" if most else ""
            out.append(f"The routing depends on the token; the merge has its mean weights{moved}, so it is not exact.")
        if self.discarded is not None:
            share, worst, most_lost = self.discarded
            out.append(f"Truncation discarded {share:.2%} of the change's energy, at most {most_lost:.2%} ({worst}).")
        if self.rank is not None:
            out.append(f"vLLM serves it from --enable-lora --max-lora-rank {vllm_rank(self.rank)} on.")
        return out


def static_checkpoint(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    options: StaticOptions,
    base: str | None = None,
) -> StaticReport:
    """Write the static merge of a checkpoint, with its report beside it.

    Args:
        folder: must not hold anything yet.
        base: as in :func:`~talklora_pl.export.run.export_checkpoint`.

    Raises:
        UserError: no fixed weights make one change of the adapter, the data cannot be read, or as
            :func:`~talklora_pl.export.run.export_checkpoint`: all before the weights are loaded.
    """
    path, folder = find_checkpoint(Path(checkpoint)), Path(folder)
    saved = read_checkpoint(path)
    metadata = AdapterMetadata.from_dict(saved["talklora"], path)
    exact = refuse_what_is_not_linear(metadata.config(), metadata.experts_per_layer)
    if options.engine == "vllm":
        _refuse_what_vllm_lacks(metadata)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; choose another place.")
    if options.form == "weights":
        into_full_precision(metadata, base)
    with tempfile.TemporaryDirectory() as scratch:
        adapter = export_checkpoint(path, Path(scratch) / "adapter", base, options.license)
        metadata = read_metadata(adapter)  # with the base that was asked for
        reads = BaseModel(str(adapter), task=metadata.base.task)  # type: ignore[arg-type]
        data, evaluation = _data(path, reads, options, saved.get("TextData", {}).get("class_names"))
        model = from_pretrained(reads.head.auto_class, adapter)
        model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        report, changes = measure(model, data, evaluation, options, exact)
        if options.form == "weights":
            merge_changes(model, changes)
        with _new_folder(folder) as work:
            if options.form == "weights":
                model.save_pretrained(work)
            else:
                saved_along = adapter_set(model).switch.values_of("default")
                write_lora(work, changes, saved_along, metadata, model)
                (work / "README.md").write_text(_card(metadata, report, options), encoding="utf-8")
            write_json(work / REPORT, report.to_dict())
            if (adapter / "tokenizer_config.json").is_file():
                AutoTokenizer.from_pretrained(adapter).save_pretrained(work)
    return report


def measure(
    model: Any, data: TextData, evaluation: Evaluation, options: StaticOptions, exact: bool
) -> tuple[StaticReport, dict[str, LowRank]]:
    """The changes that the mean weights make, and how close they come to the adapter ``default`` of ``model``.

    Args:
        data: set up for a fit: ``train`` is measured, ``val`` judges.
        exact: whether the routing is constant.
    """
    adapter = get_adapter(model)
    layers: dict[str, nn.Module] = dict(adapter.layers.named_modules())
    head = HEADS[data.base.task]  # type: ignore[union-attr]
    _, objective = choose(data.base)  # type: ignore[arg-type]
    tables = {name: _some(data.tables[name], options.limit) for name in ("train", "val")}

    def learned(name: str) -> Iterator[dict[str, Any]]:
        table = tables[name]
        for at in range(0, len(table), ROWS_AT_A_TIME):
            rows: Any = table[at : at + ROWS_AT_A_TIME]
            yield dict(objective.collate(rows, data.pad_id, True))

    routing = {} if exact else mean_routing(model, adapter, learned("train"))
    changes = low_rank(adapter, layers, {n: r.w_E.to(model.device) for n, r in routing.items()})
    discarded = None
    if options.form == "lora":
        if fused := [n for n, c in changes.items() if c.A_PD.dim() == 3]:
            raise UserError(
                f"--merge static: {fused[0]!r} are experts of the base's own mixture, for which PEFT's folder has no "
                "lasting form. --form weights writes the whole model."
            )
        if options.rank is not None:
            changes, discarded = _truncate(changes, options.rank)
    report = StaticReport(options.form, exact, Fidelity(), routing, discarded=discarded)
    if options.form == "lora":
        if options.engine == "vllm":
            report.rank = max(len(c.A_PD) for c in changes.values())
            vllm_rank(report.rank)
            changes = {n: padded(c, report.rank) for n, c in changes.items()}
        report.ranks = dict(sorted(Counter(len(c.A_PD) for c in changes.values()).items()))
    data.tables["val"] = tables["val"]
    tokenizer = load_tokenizer(data.base)  # type: ignore[arg-type]
    facts = describe(model.config, tokenizer, model.generation_config if not head.classifies else None)
    answers = Generation(model, tokenizer, facts, data.eos_id, evaluation) if evaluation.max_new_tokens else None
    with _beside(model, changes, options.form) as static:
        models: dict[str, Turn] = {"base": partial(disable_adapter, model), "static": static, "exact": nullcontext}
        if not objective.base_has_score:
            del models["base"]
        report.fidelity = compare(model, models, objective, learned("val"), data.val_dataloader(), data.tasks, answers)
    names = {"train": options.data, "val": options.eval_data or options.data}
    report.data = {
        what: {"from": [Path(n.strip()).name for n in names[split].split(",")], "rows": len(tables[split])}
        for what, split in (("measured_on", "train"), ("judged_on", "val"))
    }
    report.data["held_back"] = options.eval_data is None
    return report, changes


@contextmanager
def _beside(model: Any, changes: dict[str, LowRank], form: str) -> Iterator[Turn]:
    """A way to make the model what will be written, for as long as this lasts; otherwise it has its adapter on."""
    if form == "lora":

        @contextmanager
        def turn() -> Iterator[None]:
            set_adapter(model, "static")
            try:
                yield
            finally:
                set_adapter(model, "default")

        add_static(model, changes)
        set_adapter(model, "default")
        try:
            yield turn
        finally:
            remove_adapter(model, "static")
        return
    pairs = merged_weights(model, changes)

    @contextmanager
    def exchanged() -> Iterator[None]:
        """The merged weights are in place; the trained head is, too, but none of the layers' adapters."""
        before = [weight.data for weight, _ in pairs]
        for weight, new in pairs:
            weight.data = new
        try:
            with adapter_set(model).switch.without_layers():
                yield
        finally:
            for (weight, _), old in zip(pairs, before):
                weight.data = old

    yield exchanged


@torch.no_grad()
def _truncate(changes: dict[str, LowRank], rank: int) -> tuple[dict[str, LowRank], tuple[float, str, float]]:
    """Changes of at most ``rank``; and the share of energy that is gone: of all, and the worst Linear with its own."""
    out, kept, whole, lost = {}, 0.0, 0.0, dict[str, float]()
    for name, change in changes.items():
        out[name], mine, all_of_it = truncated(change, rank) if len(change.A_PD) > rank else (change, 1.0, 1.0)
        if len(change.A_PD) <= rank:
            mine = all_of_it = float((change.B_PO.mT.double() @ change.A_PD.double()).square().sum())
        kept, whole = kept + mine, whole + all_of_it
        lost[name] = 1 - mine / all_of_it if all_of_it else 0.0
    worst = max(lost, key=lost.__getitem__)
    return out, (1 - kept / whole if whole else 0.0, worst, lost[worst])


def _refuse_what_vllm_lacks(metadata: AdapterMetadata) -> None:
    """Raises: UserError for an adapter that vLLM would refuse or serve without a part of it."""
    head, along = HEADS[metadata.base.task or "causal_lm"], metadata.adapter["modules_to_save"]
    if head.classifies or along:
        what = f"{', '.join(along)} was trained along" if along else "it is a classifier"
        raise UserError(
            f"--for vllm: {what}, and vLLM loads LoRA on Linears only (no modules_to_save). --form weights writes a "
            "whole model."
        )


def _data(
    path: Path, base: BaseModel, options: StaticOptions, classes: list[str] | None
) -> tuple[TextData, Evaluation]:
    """The rows to measure and to judge, read as the run read its own, and how it judged answers.

    Raises:
        UserError: rows that are wrong, or too few.
    """
    run = _options_of_run(path)
    asked: dict[str, Any] = {k: v for k, v in run.get("data", {}).items() if k in OF_THE_RUN and v is not None}
    asked |= {k: v for k in ("rows", "format") if (v := getattr(options, k)) is not None}
    if base.head.classifies and classes:
        asked["labels"] = classes
    data = TextData(
        train=[Source(name.strip()) for name in options.data.split(",")],
        val=[Source(name.strip()) for name in options.eval_data.split(",")] if options.eval_data else None,
        val_size=HELD_BACK,
        eval_batch_size=16,
        base=base,
        **asked,
    )
    data.setup("fit")
    if not len(data.tables["train"]) or not len(data.tables["val"]):
        raise UserError("--data: too few rows to measure on some and to judge by others; name --eval-data.")
    judged = run.get("model", {}).get("evaluation") or {}
    known = {k: v for k, v in judged.items() if k in ("num_beams", "answer_pattern", "generation") and v is not None}
    return data, Evaluation(max_new_tokens=options.max_new_tokens, **known)


def _options_of_run(path: Path) -> dict[str, Any]:
    """The run's config.yaml, if it is where a fit leaves it; of a moved checkpoint nothing is known."""
    for folder in (path.parent.parent, path.parent):
        try:
            found = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(found, dict):
            return {k: v for k, v in found.items() if isinstance(v, dict)}
    return {}


def _some(table: Any, limit: int) -> Any:
    """At most ``limit`` rows, spread evenly."""
    if len(table) <= limit:
        return table
    print(f"{limit} of {len(table)} rows are used, spread evenly; --limit sets how many.")
    return table.select([i * len(table) // limit for i in range(limit)])


def _card(metadata: AdapterMetadata, report: StaticReport, options: StaticOptions) -> str:
    """README.md of the LoRA folder."""
    base = metadata.base
    front: dict[str, Any] = {"library_name": "peft", "license": options.license or "unknown", "tags": ["lora"]}
    if is_repository_name(base.name_or_path):
        front["base_model"] = base.name_or_path
    models = list(report.fidelity.kl)
    rows = [f"| | {' | '.join(models)} |", f"|---|{'---|' * len(models)}"]
    for what, values in report.fidelity.lines():
        cells = " | ".join(values.get(m, "–") for m in models)
        rows.append(f"| {what.replace('|', chr(92) + '|')} | {cells} |")
    on = report.data["judged_on"]
    held = "held back from the merge" if report.data["held_back"] else "not used for the merge"
    return (
        "\n\n".join(
            [
                f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
                f"# LoRA for `{base.name_or_path or base.class_name}`, merged from a mixture of experts",
                " ".join(report.sentences()),
                f"## Fidelity\n\nOn {on['rows']} rows of {', '.join(on['from'])}, {held}; `exact` is the adapter "
                "itself, `static` what is in this folder.\n\n" + "\n".join(rows),
                "## How to load\n\n```python\nfrom peft import PeftModel\n\n"
                "model = PeftModel.from_pretrained(base_model, FOLDER)\n```",
            ]
        )
        + "\n"
    )


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which is then at ``folder``, where nothing is."""
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with folder_beside(folder.absolute()) as work:
            yield work
            if folder.exists():
                folder.rmdir()
            work.rename(folder)
    except OSError as e:
        raise UserError(f"{folder} could not be written: {e.strerror or e}.") from e
