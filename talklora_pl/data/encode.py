"""Text to token ids, where what the data say stays text: a `</s>` in an answer is four characters, not the end."""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Literal

from talklora_pl.data.source import BadRow
from talklora_pl.internals.transformers import encodes_by_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private characters of Unicode that stand for the special tokens, in the order of their ids: one range for those that
# the data spell, one for those that a format or chat template writes.
SPELLED, WRITTEN, END = 0x100000, 0x108000, 0x10FFFD
_PRIVATE = re.compile(f"[{chr(SPELLED)}-{chr(END)}]")

# Patterns of byte-level tokenizers (GPT-2; Llama 3, Qwen 2 and 3.5, GPT-4o; digits by one or three)
_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# The words that a text falls into, whose ids do not depend on each other. All of them divide it before a space that
# follows anything but white space. GPT-2's also does before any other white space there, and around a single line
# break; the others let line breaks end what is before them, and divide after those.
_BY_GPT2 = re.compile(r"\n(?=\S)|\s*\S+(?:[^\S \t\r\n]\s*(?:\S+|\Z))*|\s+")
_AFTER_BREAK = r"[^\S ]\s*(?<=[\r\n])(?=[^\s/])"
_BY_OTHERS = re.compile(rf"\s*\S+(?:(?!{_AFTER_BREAK})[^\S ]\s*(?:\S+|\Z))*(?:{_AFTER_BREAK})?|\s+")
MANY = 200_000  # words whose ids are remembered


class Encoder:
    """Token ids as the tokenizer makes them of a text, without the special tokens it puts around one.

    Texts of the data go through :meth:`protect` before they are written into a prompt; :meth:`readable` is the way
    back. Added tokens that are not special (`<think>`) are tokens wherever they stand.

    Args:
        tokenizer: the base model's.
        special_tokens_in_data: `text`: special tokens that the data spell are read as text; `control`: as the tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, special_tokens_in_data: Literal["text", "control"] = "text"
    ) -> None:
        self.tokenizer, self.as_text = tokenizer, special_tokens_in_data == "text"
        self._words: dict[str, tuple[int, ...]] = {}  # tuples of numbers are no work for the garbage collector
        added = tokenizer.added_tokens_decoder
        special: dict[str, Any] = {token.content: i for i, token in added.items() if token.special}
        special |= {name: tokenizer.convert_tokens_to_ids(name) for name in tokenizer.all_special_tokens}
        self.special: dict[str, int] = special  # content -> id
        self.added = {token.content for token in added.values()} | set(special)
        self._special = alternatives(special)
        self._char = {name: chr(SPELLED + k) for k, name in enumerate(special)}
        self._name = {char: name for name, char in self._char.items()}

    def protect(self, value: Any) -> Any:
        """A text of the data, or all texts in lists and dicts, with special tokens replaced by private characters.

        Raises:
            BadRow: the data hold such characters themselves.
        """
        if isinstance(value, str):
            if _reserved(value):
                raise BadRow("holds characters from the end of Unicode's private use area, which are reserved here")
            try:
                value.encode()
            except UnicodeEncodeError:  # "\ud800" is valid in JSON
                raise BadRow("holds half a surrogate pair, which is no text") from None
            if self.as_text and self._special.search(value):
                return self._special.sub(lambda match: self._char[match[0]], value)
            return value
        if isinstance(value, dict):
            return {key: self.protect(item) for key, item in value.items()}
        return [self.protect(item) for item in value] if isinstance(value, list) else value

    def spelled(self, text: str) -> list[str]:
        """The special tokens that data have spelled in a protected text."""
        return sorted({self._name[char] for char in _PRIVATE.findall(text)})

    def notices(self, text: str) -> list[str]:
        """What is to be said of a protected text."""
        if not _reserved(text):
            return []
        remedy = "data.special_tokens_in_data: control reads it as the token"
        return [f"spells the special token {name!r}, which is read as text ({remedy})" for name in self.spelled(text)]

    def readable(self, text: str) -> str:
        """A protected text as it was."""
        return _PRIVATE.sub(lambda match: self._name[match[0]], text)

    def ids(self, text: str) -> list[int]:
        """Ids of a protected text. Raises BadRow: the tokenizer cannot read a special token as text."""
        if _reserved(text):
            return self._as_text(text)[0]
        if not text:
            return []
        if self._fast is None:
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        return self._by_words(text) if self._by_word(text) else self._encode([text])[0]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [list(encoding.ids) for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def _by_words(self, text: str) -> list[int]:
        """The ids word by word, most of which were seen before."""
        words = self._divided(text)
        try:
            return list(chain.from_iterable(map(self._words.__getitem__, words)))
        except KeyError:
            self._learn(set(words))
        return list(chain.from_iterable(map(self._words.__getitem__, words)))

    def _divided(self, text: str) -> list[str]:
        """The parts of a text whose ids do not depend on each other: words, and added tokens where those are cut out
        first."""
        words = self._divides.findall  # type: ignore[union-attr]
        if self._cut is None or self._cut.search(text) is None:
            return words(text)
        parts = self._cut.split(text)  # every other one is a token
        return [word for part in parts for word in (words(part) if part not in self.added else (part,))]

    def meet(self, texts: Iterable[str]) -> None:
        """Ask for the ids of all words of many texts that come next: for many at once the tokenizer takes half as long
        as for a few."""
        if self._divides:
            # half a surrogate pair: its row is refused when it is read
            with suppress(UnicodeEncodeError, TypeError):
                self._learn(set().union(*map(self._divided, texts)))

    def _learn(self, words: set[str]) -> None:
        """Ask for the ids of words that are new."""
        known = self._words
        if new := list(words.difference(known)):
            if len(known) > MANY:
                known.clear()
                new = list(words)
            known.update(zip(new, map(tuple, self._encode(new))))

    def settled(self, text: str) -> int:
        """How many first characters of a protected text have their ids whatever is written after it."""
        if _reserved(text) or not self._by_word(text):
            return 0
        at = text.rfind(" ")
        while at > 0 and text[at - 1].isspace():
            at = text.rfind(" ", 0, at)
        return max(at, 0)

    def spans(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a protected text, and the tokens that hold anything of each span of its characters.

        Returns:
            the ids, and for each span the first of its tokens and the one after its last.

        Raises:
            BadRow: the tokenizer cannot read a special token as text.
        """
        if not _reserved(text) and self._by_word(text):
            return self._spans_by_words(text, spans)
        if self._backend is not None:
            ids, offsets = self._as_text(text)
            if _PRIVATE.search(text) or ids == self.ids(text):
                where = [(len(self._swap(text[:a])), len(self._swap(text[:b]))) for a, b in spans]
                starts, ends = [a for a, _ in offsets], [b for _, b in offsets]
                return ids, [(first := bisect_right(ends, a), max(first, bisect_left(starts, b))) for a, b in where]
        ids = self.ids(text)
        # a tokenizer in Python tells no places: compare with what it makes of the text so far
        return ids, [(self._common(ids, text[:a]), self._common(ids, text[:b])) for a, b in spans]

    def _spans_by_words(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """As :meth:`spans`: only the words in which one begins or ends are asked for the places of their tokens."""
        words = self._divided(text)
        self._learn(set(words))
        parts = [self._words[word] for word in words]
        starts = list(accumulate(map(len, words), initial=0))  # of the words, in characters
        firsts = list(accumulate(map(len, parts), initial=0))  # and in tokens

        def token(at: int, end: bool) -> int:
            """How many tokens end (for the start of a span), or begin (for its end), before a place."""
            i = bisect_right(starts, at) - 1
            if i >= len(words) or starts[i] == at:
                return firsts[min(i, len(words))]
            places = self._fast.encode(words[i], add_special_tokens=False).offsets
            before = [b <= at - starts[i] if not end else a < at - starts[i] for a, b in places]
            return firsts[i] + sum(before)

        found = [(first := token(a, False), max(first, token(b, True))) for a, b in spans]
        return list(chain.from_iterable(parts)), found

    def _common(self, ids: list[int], text: str) -> int:
        pairs = enumerate(zip(ids, self.ids(text)))
        return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(self.ids(text))))

    def _swap(self, text: str) -> str:
        """Special tokens that the template wrote as private characters, those that the data spell as text."""
        offset = WRITTEN - SPELLED
        text = self._special.sub(lambda match: chr(ord(self._char[match[0]]) + offset), text)
        return re.sub(f"[{chr(SPELLED)}-{chr(WRITTEN - 1)}]", lambda match: self._name[match[0]], text)

    @cached_property
    def _fast(self) -> Any:
        """The tokenizer's core, which makes the same ids without the wrapping around them; None: it has none."""
        if not encodes_by_backend(self.tokenizer):
            return None
        copy = self._copy()
        copy.post_processor = None  # it would trim the offsets
        copy.encode_special_tokens = bool(self.tokenizer.split_special_tokens)  # type: ignore[attr-defined]
        return copy

    @cached_property
    def _divides(self) -> re.Pattern[str] | None:
        """Finds the words of a text; None: its ids may depend on each other wherever it is divided."""
        if self._fast is None:
            return None
        steps, model = _options(self._fast.pre_tokenizer), self._fast.model
        steps = steps.get("pretokenizers", [steps])
        normalizer = _options(self._fast.normalizer).get("type", "NFC")
        if type(model).__name__ != "BPE" or model.dropout or normalizer != "NFC":
            return None
        for token in self._added:
            text = token.content
            if len(text.split()) != 1 or (_swallows(token) and (text[0].isalnum() or text[-1].isalnum())):
                return None
        patterns = [s["pattern"].get("Regex", "").replace("{1,3}", "") for s in steps if s.get("type") == "Split"]
        patterns += [_WORDS[0] for s in steps if s.get("type") == "ByteLevel" and s["use_regex"]]
        others = {s.get("type") for s in steps} - {"Split", "ByteLevel", "Digits"}
        if others or not patterns or not set(patterns) <= set(_WORDS):
            return None
        return _BY_GPT2 if patterns[0] == _WORDS[0] else _BY_OTHERS

    def _by_word(self, text: str) -> bool:
        """Whether a text is divided so: the tokenizer does, and the text holds no token that takes spaces beside it."""
        return bool(self._divides) and not (self._greedy and self._greedy.search(text))

    @cached_property
    def _greedy(self) -> re.Pattern[str] | None:
        greedy = [token.content for token in self._added if _swallows(token)]
        return alternatives(greedy) if greedy else None

    @cached_property
    def _cut(self) -> re.Pattern[str] | None:
        """Cuts added tokens out of a text, where the tokenizer does so before anything else; None: it may not."""
        tokens = self._added
        if not tokens or any(token.normalized for token in tokens) or self._fast.encode_special_tokens:
            return None
        return re.compile(f"({alternatives(token.content for token in tokens).pattern})")

    @cached_property
    def _added(self) -> list[Any]:
        return list(self._fast.get_added_tokens_decoder().values())

    def _copy(self) -> Any:
        from tokenizers import Tokenizer

        copy: Any = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        copy.no_truncation()
        copy.no_padding()
        return copy

    @cached_property
    def _backend(self) -> tuple[Any, dict[int, int]] | None:
        """A copy of the tokenizer that reads special tokens as text and private characters as special tokens.

        The private characters are added tokens that are not special, cut from the text just as their originals.
        """
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            return None
        from tokenizers import AddedToken

        copy = self._copy()
        copy.post_processor = None  # it would trim the offsets
        copy.encode_special_tokens = True
        ids = {}
        for name, i in self.special.items():
            old = self.tokenizer.added_tokens_decoder.get(i)
            flags = {f: getattr(old, f, False) for f in ("lstrip", "rstrip", "single_word", "normalized")}
            char = chr(ord(self._char[name]) + WRITTEN - SPELLED)
            copy.add_tokens([AddedToken(char, special=False, **flags)])
            ids[copy.token_to_id(char)] = i
        return copy, ids

    def _as_text(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets (in the swapped text)."""
        names = ", ".join(map(repr, self.spelled(text)))
        remedy = "; with data.special_tokens_in_data: control it is read as the token"
        if self._backend is None:
            raise BadRow(f"spells the special token {names}, which this slow tokenizer cannot read as text{remedy}")
        copy, original = self._backend
        encoding = copy.encode(self._swap(text), add_special_tokens=False)
        if names and not set(encoding.ids).isdisjoint(set(original.values()) - {self.tokenizer.unk_token_id}):
            raise BadRow(f"spells the special token {names}, which the tokenizer makes of plain text too{remedy}")
        return [original.get(i, i) for i in encoding.ids], encoding.offsets


def _reserved(text: str) -> bool:
    """Whether a text holds any of the private characters."""
    return not text.isascii() and _PRIVATE.search(text) is not None


def _options(part: Any) -> Any:
    """Of a part of a tokenizer's core; those of the whole core hold its vocabulary, which takes half a second."""
    return {} if part is None else json.loads(part.__getstate__())


def _swallows(token: Any) -> bool:
    """Whether an added token depends on what stands beside it, or takes it."""
    return bool(token.lstrip or token.rstrip or token.single_word)


def alternatives(texts: Any) -> re.Pattern[str]:
    """A pattern for any of the texts, the longest first; it never matches where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
