"""From an example to token ids and labels: loss on answers only, one EOS, BOS as the tokenizer wants it, truncation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from talklora_pl.data import formats
from talklora_pl.data.source import BadRow
from talklora_pl.errors import UserError
from talklora_pl.inputs import NO_LOSS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from talklora_pl.data.rows import Example


@dataclass
class Tokens:
    """One example as tokens.

    Attributes:
        input_ids: one sequence, or one per choice.
        labels: of the same shapes, -100 where there is no loss (not shifted); empty for classification.
        prompt_length: how many tokens of the first sequence come before the (last) answer: what generation starts from;
            0 where nothing is asked.
        cut: prompt tokens that did not fit.
    """

    input_ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    prompt_length: int = 0
    cut: int = 0


class Tokenize:
    """Args:
    tokenizer: the base model's.
    max_length: tokens of the longest sequence; longer prompts lose their first tokens (after BOS).
    eos_token: for a tokenizer without an end-of-sequence token.
    ends: answers end with that token, so there must be one.

    Raises:
        UserError: no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        eos_token: str | None = None,
        ends: bool = True,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.eos: Any = tokenizer.eos_token_id if eos_token is None else tokenizer.convert_tokens_to_ids(eos_token)
        if ends and (self.eos is None or (eos_token and self.eos == tokenizer.unk_token_id)):
            raise UserError(
                "data.eos_token: the tokenizer has no "
                + (f"token {eos_token!r}." if eos_token else "end-of-sequence token; without it no answer ever ends.")
                + " Name one token of its vocabulary."
            )
        # BOS as the tokenizer wants it: what it puts before a text by itself
        bare = self._ids("a")
        full = list(tokenizer("a").input_ids)
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self.bos = full[:start]
        self.identity = _identity(tokenizer)

    def __call__(self, example: Example, format: str) -> Tokens:
        """A prompt and its answers. Raises BadRow: an answer does not fit, or the tokenizer makes no token of it."""
        if format != "chat":
            text = formats.write(example, format)
            return self._answers(text.prompt, text.answers, text.marker, add_bos=True)
        if example.messages:
            return self._chat(example.messages)
        prompt = "\n".join(filter(None, (example.prompt, example.input)))
        user = [{"role": "user", "content": prompt}]
        turns = [[*user, {"role": "assistant", "content": answer}] for answer in example.answers]
        if len(turns) < 2:  # one answer to learn, or none yet
            return self._chat(turns[0] if turns else user)
        opened = self._render(user, open=True)
        answers = [self._after(opened, self._render(turn)) for turn in turns]
        return self._answers(opened, answers, marker=self._after(self._render(user), opened))

    def text(self, example: Example, format: str) -> Tokens:
        """A prompt alone, with the tokenizer's own special tokens."""
        text = formats.write(example, format).prompt
        ids = list(self.tokenizer(text, verbose=False).input_ids)
        cut = max(0, len(ids) - self.max_length)
        if cut:
            ids = list(self.tokenizer(text, truncation=True, max_length=self.max_length).input_ids)
        return Tokens([ids], cut=cut)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text of the data, without the special tokens around it."""
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else []

    def _continue(self, before: str, before_ids: list[int], text: str) -> list[int]:
        """Tokens of a text after another, which keeps the tokens it has alone: those seen when the model is asked."""
        both = self._ids(before + text)
        n = len(before_ids)
        return both[n:] if both[:n] == before_ids else self._ids(text)

    def _answers(self, prompt: str, answers: list[str], marker: str, add_bos: bool = False) -> Tokens:
        prompt_ids = self._ids(prompt)
        rows = [self._end(self._continue(prompt, prompt_ids, answer))[0] for answer in answers]
        there = prompt_ids[: len(self.bos)] == self.bos
        head = self.bos if there or add_bos else []
        prompt_ids = prompt_ids[len(self.bos) :] if there else prompt_ids
        longest = max(map(len, rows), default=0)
        cut = self._overflow(len(head) + len(prompt_ids) + longest, len(prompt_ids), marker)
        context = head + prompt_ids[cut:]
        no_loss = [NO_LOSS] * len(context)
        labels = [no_loss + ids for ids in rows] or [no_loss]
        return Tokens([context + ids for ids in rows] or [context], labels, len(context), cut)

    def _end(self, answer: list[int]) -> tuple[list[int], list[int]]:
        """An answer with exactly one end, and what came after its end: a chat template may write a line break there."""
        if not answer:
            raise BadRow("the tokenizer makes no token of an answer, so there is nothing to learn")
        end = answer.index(self.eos) + 1 if self.eos in answer else len(answer)
        return (answer[:end] if self.eos in answer else [*answer, self.eos]), answer[end:]

    def _overflow(self, length: int, cuttable: int, marker: str) -> int:
        """How many of the cuttable tokens have to go."""
        cut = max(0, length - self.max_length)
        if cut > cuttable - len(self._ids(marker)):
            raise BadRow(
                f"its answer needs {length - cuttable} tokens with the end of the prompt before it, "
                f"and a sequence has {self.max_length} (data.max_length)"
            )
        return cut

    def _chat(self, messages: list[dict[str, str]]) -> Tokens:
        ids: list[int] = []
        labels: list[int] = []
        text = ""  # written so far
        rest: list[int] = []  # what the template put after the end of the last answer
        for i in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
            opened, closed = self._render(messages[:i], open=True), self._render(messages[: i + 1])
            ids, labels = ids + rest, labels + [NO_LOSS] * len(rest)
            context = self._continue(text, ids, self._after(text, opened))
            answer, rest = self._end(self._continue(opened, ids + context, self._after(opened, closed)))
            start = len(ids) + len(context)
            ids, labels, text = ids + context + answer, labels + [NO_LOSS] * len(context) + answer, closed
        if messages[-1]["role"] != "assistant":  # to predict for
            opened = self._render(messages, open=True)
            ids = ids + rest
            ids = ids + self._continue(text, ids, self._after(text, opened))
            labels, start = [NO_LOSS] * len(ids), len(ids)
        before = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        marker = self._after(self._render(before), self._render(before, open=True))
        head = len(self.bos) if ids[: len(self.bos)] == self.bos else 0
        cut = self._overflow(len(ids), start - head, marker)
        ids, labels = ids[:head] + ids[head + cut :], labels[:head] + labels[head + cut :]
        return Tokens([ids], [labels], start - cut, cut)

    def _render(self, messages: list[dict[str, str]], open: bool = False) -> str:
        if not messages:
            return ""
        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
                messages, tokenize=False, add_generation_prompt=open
            )
        except Exception as e:  # a template is a program; many raise for an order of roles that they do not know
            raise BadRow(f"the chat template refuses these messages: {e}") from e

    def _after(self, before: str, text: str) -> str:
        if not text.startswith(before):
            raise BadRow(
                "the chat template rewrites earlier turns, so its answers cannot be found; give one turn a row"
            )
        return text[len(before) :]


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what decides the tokens of a text."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    specials = [
        type(tokenizer).__name__,
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer("a").input_ids,
    ]
    return hashlib.sha256((state + str(specials)).encode()).hexdigest()
