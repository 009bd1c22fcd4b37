"""From an example to token ids and labels: loss on answers only, one EOS, BOS as the tokenizer wants it, truncation."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from talklora_pl.data import formats
from talklora_pl.data.chat import ChatTemplate
from talklora_pl.data.encode import Encoder
from talklora_pl.data.example import Example, Tokens
from talklora_pl.data.source import BadRow
from talklora_pl.data.turns import Conversation
from talklora_pl.errors import UserError
from talklora_pl.inputs import NO_LOSS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokenize:
    """Args:
    tokenizer: the base model's.
    max_length: tokens of the longest sequence; longer prompts lose their first tokens (after BOS).
    eos_token: for a tokenizer without an end-of-sequence token.
    ends: answers end with that token, so there must be one.
    train_on: of a conversation, learn `all` answers or the `last`.
    special_tokens_in_data: read special tokens that the data spell as `text`, or as the tokens that they are.
    token_types: how many kinds of tokens the model tells apart.

    Raises:
        UserError: no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        eos_token: str | None = None,
        ends: bool = True,
        train_on: Literal["all", "last"] = "all",
        special_tokens_in_data: Literal["text", "control"] = "text",
        token_types: int = 1,
    ) -> None:
        self.tokenizer, self.max_length, self.train_on = tokenizer, max_length, train_on
        self.encoder = Encoder(tokenizer, special_tokens_in_data)
        self.eos: Any = tokenizer.eos_token_id if eos_token is None else tokenizer.convert_tokens_to_ids(eos_token)
        if ends and (self.eos is None or (eos_token and self.eos == tokenizer.unk_token_id)):
            raise UserError(
                "data.eos_token: the tokenizer has no "
                + (f"token {eos_token!r}." if eos_token else "end-of-sequence token; without it no answer ever ends.")
                + " Name one token of its vocabulary."
            )
        # BOS as the tokenizer wants it: what it puts before a text by itself
        bare = self.encoder.ids("a")
        full = list(tokenizer("a").input_ids)
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self.bos, self._after = full[:start], full[start + len(bare) :]
        self.token_types = token_types
        self.identity = _identity(tokenizer, train_on, special_tokens_in_data, str(token_types))

    @cached_property
    def chat(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.encoder, self.eos, self.train_on)

    def end(self, format: str) -> int:
        """The token that ends an answer in a format: generation stops there."""
        return self.chat.ends[0] if format == "chat" and self.chat.ends else self.eos

    def __call__(self, example: Example, format: str) -> Tokens:
        """A prompt and its answers. Raises BadRow: an answer does not fit, or the tokenizer makes no token of it."""
        return self._chat(example) if format == "chat" else self._plain(*self._written(example, format))

    def text(self, example: Example, format: str) -> Tokens:
        """A prompt alone, with the tokenizer's own special tokens."""
        (text, _, _), notices = self._written(example, format)
        if not notices:
            ids = list(self.tokenizer(text, verbose=False).input_ids)
            cut = max(0, len(ids) - self.max_length)
            if cut:
                ids = list(self.tokenizer(text, truncation=True, max_length=self.max_length).input_ids)
            return Tokens([ids], cut=cut)
        ids = self.encoder.ids(text)
        cut = max(0, len(self.bos) + len(ids) + len(self._after) - self.max_length)
        kept = ids[cut:] if self.tokenizer.truncation_side == "left" else ids[: len(ids) - cut]
        return Tokens([[*self.bos, *kept, *self._after]], cut=cut, notices=notices)

    def pair(self, example: Example, format: str) -> Tokens:
        """Two texts in the tokenizer's own form for them; where they are too long, the longer one is cut first."""
        (text, _, _), notices = self._written(example, format)
        pair = self.encoder.protect(example.pair)
        notices = [*notices, *self.encoder.notices(pair)]
        frame, a, b = self.tokenizer("a", "b"), self.encoder.ids("a"), self.encoder.ids("b")
        full = list(frame.input_ids)
        first = _find(full, a, 0)
        second = _find(full, b, first + len(a))
        between = full[first + len(a) : second]
        if not between:
            notices.append("the tokenizer puts nothing between text and text_pair; a format can: '{prompt} ... '")
        texts = [self.encoder.ids(text), self.encoder.ids(pair)]
        room = self.max_length - (len(full) - len(a) - len(b))
        lengths = [len(ids) for ids in texts]
        cut = max(0, sum(lengths) - room)
        if cut:
            short = min(*lengths, room // 2)
            lengths = [short, room - short] if lengths[0] <= lengths[1] else [room - short, short]
        left = self.tokenizer.truncation_side == "left"
        texts = [ids[len(ids) - n :] if left else ids[:n] for ids, n in zip(texts, lengths)]
        ids = [*full[:first], *texts[0], *between, *texts[1], *full[second + len(b) :]]
        kinds: list[int] = []
        if self.token_types > 1 and (types := list(frame.get("token_type_ids") or ())):
            kinds = types[:first] + [types[first]] * lengths[0] + types[first + len(a) : second]
            kinds += [types[second]] * lengths[1] + types[second + len(b) :]
        return Tokens([ids], cut=cut, notices=notices, token_type_ids=kinds)

    def _written(self, example: Example, format: str) -> tuple[formats.Written, list[str]]:
        prompt, more, answers = self.encoder.protect([example.prompt, example.input, example.answers])
        text = formats.write(Example(prompt, more, answers=answers), format)
        return text, self.encoder.notices("".join((prompt, more, *answers)))

    def _continue(self, before: str, before_ids: list[int], text: str) -> list[int]:
        """Tokens of a text after another, which keeps the tokens it has alone: those seen when the model is asked."""
        at = self.encoder.settled(before)
        tail = self.encoder.ids(before[at:]) if at else before_ids
        both, n = self.encoder.ids(before[at:] + text), len(tail)
        return both[n:] if both[:n] == tail else self.encoder.ids(text)

    def _plain(self, text: formats.Written, notices: list[str]) -> Tokens:
        prompt_ids = self.encoder.ids(text.prompt)
        rows = [self._end(self._continue(text.prompt, prompt_ids, answer)) for answer in text.answers]
        there = prompt_ids[: len(self.bos)] == self.bos
        prompt_ids = prompt_ids[len(self.bos) :] if there else prompt_ids
        longest = max(map(len, rows), default=0)
        length = len(self.bos) + len(prompt_ids) + longest
        marker = len(self.encoder.ids(text.marker)) if length > self.max_length else 0
        cut = self._overflow(length, len(prompt_ids), marker)
        context = self.bos + prompt_ids[cut:]
        no_loss = [NO_LOSS] * len(context)
        labels = [no_loss + ids for ids in rows] or [no_loss]
        return Tokens([context + ids for ids in rows] or [context], labels, len(context), cut, notices)

    def _end(self, answer: list[int]) -> list[int]:
        if not answer:
            raise BadRow("the tokenizer makes no token of an answer, so there is nothing to learn")
        return answer if answer[-1] == self.eos else [*answer, self.eos]

    def _overflow(self, length: int, cuttable: int, marker: int) -> int:
        """How many of the cuttable tokens have to go; `marker` of them must stay."""
        cut = max(0, length - self.max_length)
        if cut > cuttable - marker:
            raise BadRow(
                f"its answer needs {length - cuttable} tokens with the end of the prompt before it, "
                f"and a sequence has {self.max_length} (data.max_length)"
            )
        return cut

    def _chat(self, example: Example) -> Tokens:
        if example.messages:
            endings = example.endings or [[]]
            conversations = [Conversation(example.messages + e, example.tools, example.variables) for e in endings]
        else:
            user = {"role": "user", "content": "\n".join(filter(None, (example.prompt, example.input)))}
            turns = [[user, {"role": "assistant", "content": answer}] for answer in example.answers] or [[user]]
            conversations = [Conversation(messages) for messages in turns]
        rows = [self.chat(conversation) for conversation in conversations]
        start, bos = min(row.start for row in rows), len(self.bos)
        head = bos if rows[0].ids[:bos] == self.bos else 0
        cut = self._overflow(max(len(row.ids) for row in rows), start - head, rows[0].marker)
        ids, labels = (
            [[*x[:head], *x[head + cut :]] for x in xs] for xs in zip(*((row.ids, row.labels) for row in rows))
        )
        if cut and any(set(row) == {NO_LOSS} != set(whole.labels) for row, whole in zip(labels, rows)):
            raise BadRow(
                f"the last answer leaves no room for those to learn in {self.max_length} tokens (data.max_length)"
            )
        notices = [notice for row in rows for notice in row.notices]
        tokens = Tokens(ids, labels, start - cut, cut, notices)
        if len(rows) == 1 and start < len(rows[0].ids):
            tokens.answer = str(self.tokenizer.decode(rows[0].ids[start:], skip_special_tokens=True)).strip()
        return tokens


def _find(ids: list[int], part: list[int], start: int) -> int:
    for i in range(start, len(ids) - len(part) + 1):
        if ids[i : i + len(part)] == part:
            return i
    raise BadRow("has a text_pair, and in this tokenizer's form for pairs the two texts cannot be found")


def _identity(tokenizer: PreTrainedTokenizerBase, *options: str) -> str:
    """Digest of what decides the tokens of a text."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    specials = [
        type(tokenizer).__name__,
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer("a").input_ids,
        options,
    ]
    return hashlib.sha256((state + str(specials)).encode()).hexdigest()
