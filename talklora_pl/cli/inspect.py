"""``python -m talklora_pl inspect``: run text through a trained adapter and see what its experts do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from talklora_pl.cli.parse import parse
from talklora_pl.errors import UserError
from talklora_pl.paths import expand

if TYPE_CHECKING:
    from talklora_pl.monitoring.inspection import Inspection

MAX_CLASSES = 1 << 20


def inspect(
    adapter: str,
    base: str | None = None,
    data: str | None = None,
    text: str | None = None,
    output: str = "inspect.html",
    rows: str | None = None,
    format: str | None = None,
    limit: int = 100,
    examples: int = 8,
    batch_size: int = 16,
    max_length: int | None = None,
    task: Literal["causal_lm", "sequence_classification"] | None = None,
    num_labels: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: str | None = None,
    plugins: list[str] | str = (),  # type: ignore[assignment]
) -> None:
    """See what the experts of an adapter do: a summary here, and one HTML file with pictures and coloured text.

    Args:
        adapter: folder of the adapter, folder of a run, or repository on the hub.
        base: hub name, folder, .gguf file or package:NAME/FILE of its base model; by default the one it remembers.
        data: files or data sets to run through it, one or several with commas between; each is a task.
        text: a text to run through it.
        output: HTML file to write.
        rows: what a row of the data is, as in training.
        format: how a row is written as text, as in training.
        limit: rows to read in all, spread evenly over the data.
        examples: texts to show token by token.
        batch_size: rows at a time.
        max_length: tokens of a text; by default 512, or the model's context where that is less.
        task: the head of the model; by default what the adapter remembers.
        num_labels: number of classes, for sequence_classification; by default what the adapter remembers.
        dtype: of the frozen weights.
        device: where to run; by default a GPU where there is one.
        plugins: modules or .py files with components of your own that the adapter uses.
    """
    if not data and not text:
        raise UserError("inspect: give --data FILE or --text TEXT; without text there is nothing to route.")
    for name, value in (("limit", limit), ("examples", examples), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"--{name}: must be at least 1, got {value}.")
    page = Path(expand(output))
    if page.suffix not in (".html", ".htm"):
        raise UserError(f"--output: {output!r} should be an .html file.")
    if not page.parent.is_dir():
        raise UserError(f"--output: there is no folder {str(page.parent)!r}.")

    import torch

    from talklora_pl.adapter.hub import adapter_folder
    from talklora_pl.adapter.io import load_adapter
    from talklora_pl.adapter.metadata import read_metadata
    from talklora_pl.base import BaseModel, load_base, load_config, load_tokenizer
    from talklora_pl.base.description import describe
    from talklora_pl.base.heads import HEADS
    from talklora_pl.data import TextData
    from talklora_pl.data.source import Source
    from talklora_pl.registry import import_plugins

    import_plugins(plugins)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:  # torch without CUDA asserts
        raise UserError(f"--device: {device!r} cannot be used here: {str(e).splitlines()[0]}") from e
    folder = adapter_folder(adapter)
    metadata = read_metadata(folder)
    path = base or metadata.base.name_or_path
    if not path:
        raise UserError("--base: the adapter does not say which model it belongs to; name it.")
    remembered, classes = metadata.base.task, metadata.base.num_labels
    task = task or (remembered if remembered in [*HEADS] else "causal_lm")  # type: ignore[assignment]
    model_of = BaseModel(path, task=task, dtype=dtype)  # type: ignore[arg-type]
    if model_of.head.classifies and num_labels is None and type(classes) is int and 0 < classes <= MAX_CLASSES:
        num_labels = classes
    # what has grown is in the adapter's folder
    model_of = replace(model_of, num_labels=num_labels, resize_embeddings=True)
    # the adapter's own tokenizer may have new tokens
    reads = replace(model_of, path=str(folder)) if (folder / "tokenizer_config.json").is_file() else model_of
    tokenizer = load_tokenizer(reads)
    known = describe(load_config(model_of), tokenizer)
    max_length = max_length or known.default_length
    batches = list(_texts(tokenizer, [text], max_length, known.pad_id)) if text else []
    if data:
        sources: list[str | Source] = [Source(name.strip()) for name in data.split(",")]
        module = TextData(
            predict=sources, rows=rows, format=format, base=reads, eval_batch_size=batch_size, max_length=max_length
        )
        module.setup("predict")
        table = module.tables["predict"]
        module.tables["predict"] = table.select(range(0, len(table), -(-len(table) // limit)))
        batches += list(module.predict_dataloader())

    model = load_base(model_of, device)
    loaded = load_adapter(model, folder)
    from talklora_pl.monitoring import inspection  # matplotlib, only now that it is needed
    from talklora_pl.monitoring import page as html_page

    found = inspection.inspect(model, loaded, tokenizer, batches, examples)
    config = loaded.config
    facts = {
        "adapter": str(adapter),
        "base": str(path),
        "experts": config.experts.name,
        "communication": config.communication.name,
        "router": config.router.name,
        "read": f"{found.texts} texts, {int(found.load.tokens_N.sum())} tokens",
    }
    page.write_text(html_page.html(found, f"Experts of {Path(adapter).name}", facts), encoding="utf-8")
    summary(found, facts)
    print(f"\nwrote {page} ({page.stat().st_size / 1e6:.1f} MB)")


def _texts(tokenizer: Any, texts: list[str], max_length: int, pad_id: int) -> Iterator[dict[str, Any]]:
    from talklora_pl.inputs import masked

    ids = [tokenizer(text)["input_ids"][:max_length] for text in texts]
    if not all(ids):
        raise UserError("--text: there is no token in it.")
    yield masked(ids, pad_id) | {"task": ["text"] * len(texts)}


def summary(found: Inspection, facts: dict[str, str]) -> None:
    """The report on the terminal."""
    from rich.console import Console
    from rich.table import Table

    from talklora_pl.monitoring.figures import by_kind, short
    from talklora_pl.monitoring.page import METRICS

    console = Console()
    if not console.is_terminal:  # a pipe has no width to fit in
        console = Console(width=140)
    for key, value in facts.items():
        console.print(f"[bold]{key:<14}[/bold]{value}", highlight=False)
    load = found.load
    if not load.layers:
        console.print("Every layer has one expert: there is no routing to look at.")
        return
    places = [found.layers.index(name) for name in load.layers]
    values = load.per_layer() | {key: value_L[places] for key, value_L in found.sensitivity.items()}
    table = Table(title="Means over layers", title_justify="left")
    for column in ("kind of layer", "layers", *(name for name, _ in METRICS.values())):
        table.add_column(column, justify="left" if column == "kind of layer" else "right")
    everything = {"all": list(range(len(load.layers)))}
    for kind, rows in (by_kind(load.layers) | everything).items():
        table.add_row(kind, str(len(rows)), *(f"{float(values[key][rows].nanmean()):.3g}" for key in METRICS))
    console.print(table)

    worst = values["max_vio"].argsort(descending=True)[:5].tolist()
    table = Table(title="Least even layers", title_justify="left")
    for column in ("layer", "load of every expert (1 is ideal)"):
        table.add_column(column)
    for i in worst:
        loads = load.relative_LE[i][: int(load.experts_L[i])].tolist()
        table.add_row(short(load.layers[i]), "  ".join(f"{v:.2f}" for v in loads))
    console.print(table)

    if len(load.tasks) > 1:
        distance_LN = load.task_distance_LN()
        table = Table(title="Tasks", title_justify="left")
        for column in ("task", "tokens", "mean distance", "most its own in", "load there"):
            table.add_column(column, justify="right" if column in ("tokens", "mean distance") else "left")
        for j, name in enumerate(load.tasks):
            i = int(distance_LN[:, j].argmax())
            n = int(load.experts_L[i])
            relative = "  ".join(f"{v:.2f}" for v in (load.task_share_LNE[i, j, :n] * n).tolist())
            row = (name or "(none)", str(int(load.tokens_N[j])), f"{float(distance_LN[:, j].mean()):.3f}")
            table.add_row(*row, short(load.layers[i]), relative)
        console.print(table)


def main(verb: str, argv: list[str]) -> None:
    """The verb."""
    inspect(**parse(verb, inspect, argv, positional=True))
