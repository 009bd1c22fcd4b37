"""A conversation with an adapter: lines in, answers out as they come, coloured by their experts."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import GenerationConfig, TextStreamer

from talklora_pl.adapter import RoutingCollector, RoutingRecord, disable_adapter
from talklora_pl.data.example import Example
from talklora_pl.data.source import BadRow
from talklora_pl.data.tokens import Tokenize

COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red", "bright_cyan", "bright_yellow")
"""Of experts by number, from the beginning again where there are more."""
HELP = """/base     answer the last question by the base, without the adapter
/experts  colour every token by its strongest expert, or no longer
/new      forget the conversation
/quit     leave (or Ctrl-D)"""


class Talk:
    """A conversation.

    Args:
        model: with its adapter on.
        format: of a question; only `chat` remembers what was said before.
        experts: colour tokens.
        facts: of the base.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        format: str,
        system: str | None,
        experts: bool,
        facts: Any,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        self.model, self.tokenizer, self.format, self.experts = model, tokenizer, format, experts
        self.begin = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = list(self.begin)
        self.prompt: list[int] = []  # of the last question
        self.console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        room = (facts.context_length or 1 << 20) - max_new_tokens
        self.tokenize = Tokenize(tokenizer, max(room, 1))
        self.config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            pad_token_id=facts.pad_id,
            eos_token_id=sorted({self.tokenize.end(format), *facts.eos_ids}),
        )
        model.generation_config = self.config  # it fills what ours leaves open

    def run(self) -> None:
        """Lines from the terminal, or from a pipe."""
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line in ("/quit", "/exit"):
                return
            if line:
                self.say(line)

    def say(self, line: str) -> None:
        """Answer one line, or do what it commands."""
        if line == "/help":
            self.console.print(HELP)
        elif line == "/new":
            self.turns, self.prompt = list(self.begin), []
        elif line == "/experts":
            self.experts = not self.experts
        elif line == "/base":
            if not self.prompt:
                self.console.print("There is no question yet.")
                return
            with disable_adapter(self.model):
                self.answer("base: ", experts=False)
        elif line.startswith("/"):
            self.console.print(f"There is no command {line.split()[0]}. /help lists them.")
        else:
            self.ask(line)

    def ask(self, line: str) -> None:
        """Answer a question."""
        turns = [*self.turns, {"role": "user", "content": line}]
        example = Example(messages=turns) if self.format == "chat" else Example(prompt=line)
        try:
            tokens = self.tokenize(example, self.format)
        except BadRow as e:
            self.console.print(f"This cannot be asked: {e.problem}")
            return
        if tokens.cut:
            self.console.print(f"({tokens.cut} tokens at the beginning no longer fit; /new forgets what was said.)")
        (self.prompt,) = tokens.input_ids
        if answer := self.answer("", self.experts):
            self.turns = [*turns, {"role": "assistant", "content": answer}]

    @torch.inference_mode()
    def answer(self, label: str, experts: bool) -> str:
        """Answer the last question word by word; Ctrl-C ends the answer."""
        self.console.print(label, end="")
        ids = torch.tensor([self.prompt], device=self.model.device)
        streamer = Streamer(self.tokenizer, self.console)
        try:
            call = {"attention_mask": torch.ones_like(ids), "generation_config": self.config, "streamer": streamer}
            if experts:
                with RoutingCollector(self.model) as collector:
                    streamer.records = collector.records
                    self.model.generate(ids, **call)
            else:
                self.model.generate(ids, **call)
        except KeyboardInterrupt:
            streamer.end()
        if experts:
            self.console.print(streamer.legend())
        return "".join(streamer.said)


class Streamer(TextStreamer):
    """Prints an answer as it comes: words, or tokens in the colours of their experts.

    A token's routing is known when it is read, with the next one: so a coloured token comes one step late.

    Attributes:
        records: what a collector has collected since the last token; None: no colours.
        said: the pieces of the answer.
    """

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console, self.said = console, list[str]()
        self.records: list[RoutingRecord] | None = None
        self.waiting: int | None = None
        self.ids: list[int] = []
        self.counts: Counter[int] = Counter()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.said.append(text)
        self.console.print(text, end="\n" if stream_end else "")

    def put(self, value: Any) -> None:
        if self.records is None:
            super().put(value)
            return
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return  # the first records are of the prompt, and come with the first token
        self._show()
        self.waiting = int(value.flatten()[-1])

    def _show(self, last: bool = False) -> None:
        """The token that waits, now that its routing is there."""
        expert = strongest(self.records or [])
        if self.records is not None:
            self.records.clear()
        if self.waiting is None:
            return
        self.ids.append(self.waiting)
        text = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        if expert is not None:
            self.counts[expert] += 1
        if text.endswith("\ufffd") and not last:  # the character goes on in the next token
            return
        piece = text[len("".join(self.said)) :]
        self.said.append(piece)
        self.console.print(Text(piece, style="" if expert is None else COLOURS[expert % len(COLOURS)]), end="")

    def end(self) -> None:
        if self.records is None:
            super().end()
            return
        self._show(last=True)  # it was not read by the model, so it has no colour
        self.next_tokens_are_prompt, self.waiting = True, None
        self.console.print()

    def legend(self) -> Text:
        """Which colour is whose, and how many tokens each had."""
        if len(self.ids) < 2 and not self.counts:
            return Text("(too short an answer for a token's routing to be known)", style="dim")
        if not self.counts:
            return Text("(no token of it was routed: every layer has one expert)", style="dim")
        out = Text("strongest expert: ", style="dim")
        for expert, count in sorted(self.counts.items()):
            out.append(f"{expert}", style=COLOURS[expert % len(COLOURS)])
            out.append(f" {count} token{'s' if count > 1 else ''}  ", style="dim")
        return out


def strongest(records: list[RoutingRecord]) -> int | None:
    """The expert with the largest weight for the last token, summed over the layers that have a choice."""
    weights = [r.routing.weights_TE[-1].float().cpu() for r in records if r.routing.weights_TE.shape[1] > 1]
    if not weights:
        return None
    total_E = torch.zeros(max(map(len, weights)))
    for w_E in weights:
        total_E[: len(w_E)] += w_E
    return int(total_E.argmax())
