"""Rows of `text` alone, for continued pretraining."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from talklora_pl.data.rows import Example, Row, RowKind
from talklora_pl.data.source import BadRow
from talklora_pl.data.tokens import Tokens
from talklora_pl.inputs import NO_LOSS
from talklora_pl.registry import register

if TYPE_CHECKING:
    from collections.abc import Iterable

    from talklora_pl.data.tokens import Tokenize


@register("text")
@dataclass
class Text(RowKind):
    """A document, learned whole; in `predict` a text to continue."""

    question = ("text",)
    by_template = False
    by_chat = False

    def read(self, row: Row) -> Example:
        return Example(prompt=row.text("text"), label=0 if row.require_answers else None)

    def sequences(self, example: Example, format: str, tokenize: Tokenize) -> Iterable[Tokens]:
        return [tokenize(example, format)] if example.label is None else pieces(example.prompt, tokenize)


def pieces(text: str, tokenize: Tokenize) -> Iterator[Tokens]:
    """A text and its end as sequences of at most ``max_length`` tokens, all of which are learned, each once.

    Every sequence has the tokenizer's BOS. A later one begins with the last token of the one before it, without loss,
    so that no token is learned without the one that it follows.

    Raises:
        BadRow: there is nothing to learn, or no room for two tokens.
    """
    protected = tokenize.encoder.protect(text)
    bos, ids = tokenize.bos, tokenize.encoder.ids(protected)
    ids = ids[len(bos) :] if ids[: len(bos)] == bos else ids
    ids = ids if ids[-1:] == [tokenize.eos] else [*ids, tokenize.eos]
    room = tokenize.max_length - len(bos)
    if len(bos) + len(ids) < 2:
        raise BadRow("the tokenizer makes no token of it, so there is nothing to learn")
    if room < 2:
        raise BadRow(f"a sequence of {tokenize.max_length} tokens (data.max_length) leaves no room to learn it")
    for start in range(0, max(1, len(ids) - 1), room - 1):
        piece = ids[start : start + room]
        seen = 1 if start else 0
        labels = [NO_LOSS] * (len(bos) + seen) + piece[seen:]
        yield Tokens([bos + piece], [labels], notices=tokenize.encoder.notices(protected))
