"""Preparation: the same tokens by word and as a whole, in one process and in several; a cache that mends itself."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from talklora_pl.base import BaseModel
from talklora_pl.data import TextData
from talklora_pl.data.encode import _WORDS, Encoder
from talklora_pl.data.parallel import ordered
from talklora_pl.errors import UserError
from tests.data.tiny import tokenizer

Jsonl = Callable[..., str]
SPLITS = [None, *_WORDS, _WORDS[1].replace(r"\p{N}", r"\p{N}{1,3}", 1)]


def byte_level(pattern: str | None, nfc: bool = False, **flags: bool) -> PreTrainedTokenizerFast:
    """Merges across every kind of border, so that a text divided in a wrong place has other tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [
        ("a", "b"),
        ("Ġ", "a"),
        ("ab", "Ġ"),
        ("a", "Ġ"),
        ("Ġ", "Ġ"),
        ("a", "?"),
        ("?", "Ċ"),
        ("Ċ", "Ċ"),
        ("'", "s"),
    ]
    pairs += [("Ġa", "b"), ("b", "'"), ("1", "1"), ("a", "1"), ("Ċ", "a"), ("Ġ", "?")]
    vocab = {char: i for i, char in enumerate([*alphabet, *("".join(pair) for pair in pairs)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    if nfc:
        core.normalizer = normalizers.NFC()
    if pattern is None:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    if flags:
        from tokenizers import AddedToken

        made.add_tokens([AddedToken("<x>", **flags)])
    return made


TEXTS = st.text(st.sampled_from("aabbAsS?/'1 \n\n\r\t é\u0301\u2028\x1c日<x>"), max_size=40)


@pytest.mark.parametrize("nfc", [False, True])
@pytest.mark.parametrize("pattern", SPLITS)
@given(text=TEXTS)
def test_word_by_word_gives_the_ids_of_the_tokenizer(pattern: str | None, nfc: bool, text: str) -> None:
    made = TOKENIZERS.setdefault((pattern, nfc), byte_level(pattern, nfc, lstrip=True, rstrip=True))
    encoder = ENCODERS.setdefault((pattern, nfc), Encoder(made))
    assert encoder._divides
    assert encoder.ids(text) == made(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("nfc", [False, True])
@pytest.mark.parametrize("pattern", [None, _WORDS[1]])
@given(text=TEXTS, more=TEXTS, a=st.integers(0, 40), b=st.integers(0, 40))
def test_places_word_by_word_and_what_is_settled(
    pattern: str | None, nfc: bool, text: str, more: str, a: int, b: int
) -> None:
    made = TOKENIZERS.setdefault((pattern, nfc), byte_level(pattern, nfc, lstrip=True, rstrip=True))
    encoder = ENCODERS.setdefault((pattern, nfc), Encoder(made))
    whole = ENCODERS.setdefault((pattern, nfc, "whole"), Encoder(made))
    whole.__dict__["_divides"] = False
    a, b = sorted(min(place, len(text)) for place in (a, b))
    assert encoder.spans(text, [(a, b)]) == whole.spans(text, [(a, b)])
    n = encoder.settled(text)
    assert whole.ids(text[:n]) + whole.ids(text[n:] + more) == whole.ids(text + more)


def test_added_tokens_are_cut_out_first() -> None:
    made = byte_level(None)
    from tokenizers import AddedToken

    made.add_tokens([AddedToken(text, normalized=False) for text in ("<x>", "<x>>", "a?")])
    encoder = Encoder(made)
    for text in ("ab<x>>ab a?'s", "aa? <x> ab", "<x><x>>\n\na", " a?"):
        assert encoder._by_word(text) and encoder.ids(text) == made(text, add_special_tokens=False).input_ids


def test_half_a_surrogate_pair_is_for_its_row_to_refuse() -> None:
    encoder = Encoder(byte_level(None))
    encoder.meet(["ab", "a \ud800"])
    assert encoder.ids("ab ab") == byte_level(None)("ab ab", add_special_tokens=False).input_ids


TOKENIZERS: dict[Any, Any] = {}
ENCODERS: dict[Any, Encoder] = {}


def test_what_may_divide_elsewhere_is_read_whole() -> None:
    assert not Encoder(tokenizer())._divides  # its pattern divides nothing
    assert not Encoder(byte_level(r"\w+ \w+|."))._divides
    spaced = byte_level(None)
    spaced.add_tokens(["a b"])
    assert not Encoder(spaced)._divides and Encoder(spaced).ids("xa bx") == spaced("xa bx").input_ids
    worded = byte_level(None)
    from tokenizers import AddedToken

    worded.add_tokens([AddedToken("ab", single_word=True)])
    assert not Encoder(worded)._divides


def test_order_and_memory_of_several_processes() -> None:
    held, most = 0, 0

    def items() -> Any:
        nonlocal held, most
        for i in range(60):
            held += 1
            most = max(most, held)
            yield i

    pid = os.getpid()
    out = []
    for number, process in ordered(lambda i: (i * i, os.getpid()), items(), 2):
        held -= 1
        out.append(number)
        assert process != pid
    assert out == [i * i for i in range(60)]
    assert most <= 7


def test_a_process_that_dies_is_one_message() -> None:
    with pytest.raises(UserError, match=r"data\.num_proc: a process .* was killed"):
        list(ordered(lambda i: os.kill(os.getpid(), signal.SIGKILL), range(9), 2))


def prepared(base: BaseModel, path: str, **options: Any) -> tuple[list[dict[str, Any]], TextData]:
    data = TextData(path, base=base, val_size=0, **options)
    data.prepare_data()
    data.setup("fit")
    return list(data.tables["train"]), data


@pytest.mark.parametrize("options", [{}, {"documents": "packed", "rows": "text", "columns": {"text": "completion"}}])
def test_one_process_or_several(
    base: BaseModel, jsonl: Jsonl, tmp_path: Path, caplog: Any, options: dict[str, Any]
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"{i} " * (i % 5 + 1), "completion": "ab " * (i % 3 + 1), "more": i % 2 or None} for i in range(1300)
    ]
    rows[700]["completion"] = ""
    path = jsonl(rows)
    made = []
    for count in (1, 2):
        with caplog.at_level("INFO"):
            made.append(
                prepared(
                    base,
                    path,
                    on_bad_row="skip",
                    bad_row_report=str(tmp_path / f"bad{count}.jsonl"),
                    num_proc=count,
                    cache_dir=str(tmp_path / f"{count}"),
                    **options,
                )[0]
            )
    assert made[0] == made[1] and len(made[0]) > 60
    assert (tmp_path / "bad1.jsonl").read_text() == (tmp_path / "bad2.jsonl").read_text()
    reports = [json.loads(next((tmp_path / n).rglob("report.json")).read_text()) for n in ("1", "2")]
    assert reports[0] == reports[1]
    unused = {"the column 'more' is not used": 650}
    if options:  # the one row that is left out has no 'more'
        unused = {"the columns 'prompt', 'more' (in 650 rows) are not used": 1299}
    assert reports[0]["notices"] == unused
    assert "Prepared" in caplog.text and "1,300 rows in" in caplog.text and "rows/s" in caplog.text


@pytest.mark.parametrize(
    ("name", "keep"), [("rows.arrow", 0), ("rows.arrow", 700), ("report.json", 0), ("rows.arrow", None)]
)
def test_a_damaged_entry_is_made_anew(
    base: BaseModel, jsonl: Jsonl, own_cache: Path, name: str, keep: int | None
) -> None:
    import talklora_pl.cache

    path = jsonl([{"prompt": "p", "completion": str(i)} for i in range(20)])
    first, _ = prepared(base, path)
    file = next(own_cache.rglob(name))
    whole = file.read_bytes()
    time = file.stat().st_mtime_ns
    torn = whole[:keep] if keep is not None else whole[:900] + bytes([whole[900] ^ 1]) + whole[901:]
    file.write_bytes(torn)
    os.utime(file, ns=(time, time))
    talklora_pl.cache._digests.clear()  # as in another process
    with pytest.warns(UserWarning, match=f"{name} was c.*; it is made anew"):
        assert prepared(base, path)[0] == first
    assert next(own_cache.rglob(name)).read_bytes() == whole
    assert not [f for f in own_cache.rglob("*") if f.name.endswith(".tmp")]


def test_an_entry_without_its_mark_is_made_anew(base: BaseModel, jsonl: Jsonl, own_cache: Path) -> None:
    path = jsonl([{"prompt": "p", "completion": str(i)} for i in range(20)])
    prepared(base, path)
    next(own_cache.rglob("complete.json")).unlink()
    with pytest.warns(UserWarning, match="was not finished"):
        prepared(base, path)
    assert list(own_cache.rglob("complete.json"))
