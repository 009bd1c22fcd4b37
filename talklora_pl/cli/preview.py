"""Rows as the model reads them, with what is learned marked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import lightning as L
from rich.console import Console
from rich.text import Text

from talklora_pl.base import load_tokenizer
from talklora_pl.cli.lightning import CLI, run
from talklora_pl.data.table import numbers
from talklora_pl.inputs import NO_LOSS


class Preview(CLI):
    """The command line of `fit`, up to where it would begin."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)

    def after_instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def pieces(tokenizer: Any, ids: list[int], labels: list[int]) -> Iterator[tuple[str, bool]]:
    """The text of each run of tokens that are learned or not, in order."""
    done, text = 0, ""
    for learned, group in groupby(labels or [NO_LOSS] * len(ids), lambda label: label != NO_LOSS):
        done += len(list(group))
        whole = tokenizer.decode(ids[:done], clean_up_tokenization_spaces=False)
        # a run decoded by itself would lose the space before its first word
        yield whole[len(text) :], learned
        text = whole


def marked(tokenizer: Any, ids: list[int], labels: list[int], terminal: bool) -> Text:
    """A sequence for people."""
    out = Text()
    for text, learned in pieces(tokenizer, ids, labels):
        if learned:
            out.append(text if terminal else f"[[{text}]]", "bold green")
        else:
            out.append(text)
    if terminal:
        out.highlight_words([t for t in tokenizer.all_special_tokens if t], "reverse")
    return out


def preview(argv: list[str], limit: int = 3) -> None:
    """Print rows.

    Args:
        argv: options of `fit`.
        limit: rows of each source.

    Raises:
        UserError: all that is wrong with the options or the rows.
    """
    console = Console(highlight=False, soft_wrap=True)
    # an end that nothing comes to, so that none is missed
    data = run("fit", ["--trainer.max_epochs=1", *argv], Preview).datamodule
    data.prepare_data()
    tokenizer = load_tokenizer(data.base)
    for name, parts in data.prepared("fit").items():
        for part in parts:
            for row in part.table.select(range(min(limit, len(part.table)))):
                _print(console, tokenizer, name, row)
            tokens, learned = (int(numbers(part.table, name).sum()) for name in ("length", "loss_tokens"))
            what = f"{learned} of {tokens} tokens learned" if part.table[0]["labels"] else f"{tokens} tokens"
            console.print(Text(f"=== data.{name}: {part.source.path}: {len(part.table)} rows, {what}", "bold"))
    for work in data.streams:
        for row in work.first(limit):
            _print(console, tokenizer, "train", row)
        console.print(Text(f"=== data.train: {work.source.path}: a stream", "bold"))


def _print(console: Console, tokenizer: Any, name: str, row: dict[str, Any]) -> None:
    """One row, all its choices."""
    several = len(row["input_ids"]) > 1
    for choice, ids in enumerate(row["input_ids"]):
        labels = row["labels"][choice] if row["labels"] else []
        counts = f"{len(ids)} tokens, {sum(label != NO_LOSS for label in labels[1:])} learned"
        if several:
            right = choice == row["label"]
            counts = f"choice {choice}, " + (f"right: {counts}" if right else f"wrong: {len(ids)} tokens")
            labels = labels if right else []
        if not row["labels"]:
            counts = f"{len(ids)} tokens, class {row['label']}"
        console.print(Text(f"--- data.{name}: {row['id']}: {counts}", "dim"))
        console.print(marked(tokenizer, ids, labels, console.is_terminal))
