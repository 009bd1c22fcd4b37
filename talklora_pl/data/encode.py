"""Text to token ids, where what the data say stays text: a `</s>` in an answer is four characters, not the end."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from talklora_pl.data.source import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private characters of Unicode that stand for the special tokens, in the order of their ids: one range for those that
# the data spell, one for those that a format or chat template writes.
SPELLED, WRITTEN, END = 0x100000, 0x108000, 0x10FFFD
_PRIVATE = re.compile(f"[{chr(SPELLED)}-{chr(END)}]")


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
            if _PRIVATE.search(value):
                raise BadRow("holds characters from the end of Unicode's private use area, which are reserved here")
            try:
                value.encode()
            except UnicodeEncodeError:  # "\ud800" is valid in JSON
                raise BadRow("holds half a surrogate pair, which is no text") from None
            return self._special.sub(lambda match: self._char[match[0]], value) if self.as_text else value
        if isinstance(value, dict):
            return {key: self.protect(item) for key, item in value.items()}
        return [self.protect(item) for item in value] if isinstance(value, list) else value

    def spelled(self, text: str) -> list[str]:
        """The special tokens that data have spelled in a protected text."""
        return sorted({self._name[char] for char in _PRIVATE.findall(text)})

    def notices(self, text: str) -> list[str]:
        """What is to be said of a protected text."""
        remedy = "data.special_tokens_in_data: control reads it as the token"
        return [f"spells the special token {name!r}, which is read as text ({remedy})" for name in self.spelled(text)]

    def readable(self, text: str) -> str:
        """A protected text as it was."""
        return _PRIVATE.sub(lambda match: self._name[match[0]], text)

    def ids(self, text: str) -> list[int]:
        """Ids of a protected text. Raises BadRow: the tokenizer cannot read a special token as text."""
        if _PRIVATE.search(text):
            return self._as_text(text)[0]
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else []

    def spans(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a protected text, and the tokens that hold anything of each span of its characters.

        Returns:
            the ids, and for each span the first of its tokens and the one after its last.

        Raises:
            BadRow: the tokenizer cannot read a special token as text.
        """
        if self._backend is not None:
            ids, offsets = self._as_text(text)
            if _PRIVATE.search(text) or ids == self.ids(text):
                where = [(len(self._swap(text[:a])), len(self._swap(text[:b]))) for a, b in spans]
                starts, ends = [a for a, _ in offsets], [b for _, b in offsets]
                return ids, [(first := bisect_right(ends, a), max(first, bisect_left(starts, b))) for a, b in where]
        ids = self.ids(text)
        # a tokenizer in Python tells no places: compare with what it makes of the text so far
        return ids, [(self._common(ids, text[:a]), self._common(ids, text[:b])) for a, b in spans]

    def _common(self, ids: list[int], text: str) -> int:
        pairs = enumerate(zip(ids, self.ids(text)))
        return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(self.ids(text))))

    def _swap(self, text: str) -> str:
        """Special tokens that the template wrote as private characters, those that the data spell as text."""
        offset = WRITTEN - SPELLED
        text = self._special.sub(lambda match: chr(ord(self._char[match[0]]) + offset), text)
        return re.sub(f"[{chr(SPELLED)}-{chr(WRITTEN - 1)}]", lambda match: self._name[match[0]], text)

    @cached_property
    def _backend(self) -> tuple[Any, dict[int, int]] | None:
        """A copy of the tokenizer that reads special tokens as text and private characters as special tokens.

        The private characters are added tokens that are not special, cut from the text just as their originals.
        """
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        from tokenizers import AddedToken, Tokenizer

        copy: Any = Tokenizer.from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
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


def alternatives(texts: Any) -> re.Pattern[str]:
    """A pattern for any of the texts, the longest first; it never matches where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
