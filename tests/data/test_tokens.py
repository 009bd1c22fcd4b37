"""Loss on answers only, one EOS, BOS as the tokenizer wants it, truncation that keeps the response marker."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from talklora_pl.data.rows import Example
from talklora_pl.data.source import BadRow
from talklora_pl.data.tokens import NO_LOSS, Tokenize
from talklora_pl.errors import UserError
from tests.data.tiny import tokenizer


def learned(tok: PreTrainedTokenizerFast, labels: list[int]) -> str:
    return tok.decode([label for label in labels if label != NO_LOSS])


def one(tok: PreTrainedTokenizerFast, example: Example, format: str, max_length: int = 500) -> tuple[str, str, Any]:
    """Text, text with loss, and the tokens of an example with one answer."""
    tokens = Tokenize(tok, max_length)(example, format)
    (ids,), (labels,) = tokens.input_ids, tokens.labels
    assert len(ids) == len(labels)
    assert all(label in (NO_LOSS, token) for token, label in zip(ids, labels))
    return tok.decode(ids), learned(tok, labels), tokens


@pytest.mark.parametrize("bos", [True, False])
def test_formats(bos: bool) -> None:
    tok = tokenizer(bos=bos)
    start = "<s>" if bos else ""
    question = Example(prompt="2+2?", answers=["4"])
    assert one(tok, question, "plain")[:2] == (start + "2+2?4</s>", "4</s>")
    assert one(tok, question, "cloze")[:2] == (start + "Question: 2+2?\nAnswer: 4</s>", " 4</s>")
    assert one(tok, question, "Q: {prompt}\nA:\n")[:2] == (start + "Q: 2+2?\nA:\n4</s>", "4</s>")
    assert one(tok, question, "alpaca")[:2] == (
        start + "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.  \n\n### Instruction:\n2+2?\n\n### Response:\n4</s>",
        "4</s>",
    )
    assert "### Input:\nmore\n\n### Response:\n" in one(tok, Example("x", input="more", answers=["y"]), "alpaca")[0]
    assert one(tok, question, "chat")[:2] == (start + "[user]2+2?\n[assistant]4</s>\n", "4</s>")
    assert "None" not in one(tok, question, "chat")[0]


def test_a_placeholder_in_the_text_is_text() -> None:
    example = Example(prompt="{input} {prompt}", input="i", answers=["a"])
    assert one(tokenizer(), example, "{prompt}|{input}:")[0] == "<s>{input} {prompt}|i: a</s>"


def test_the_prompt_has_the_tokens_it_has_when_it_is_asked() -> None:
    tok = tokenizer()  # " a" is one token, but the prompt ends in a space of its own
    tokens = Tokenize(tok, 50)(Example(prompt="x ", answers=["a"]), "plain")
    asked = Tokenize(tok, 50)(Example(prompt="x "), "plain")
    assert tokens.input_ids[0][: tokens.prompt_length] == asked.input_ids[0]
    assert asked.labels == [[NO_LOSS] * len(asked.input_ids[0])]


def test_chat_learns_every_assistant_turn_and_nothing_else() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": "second"},
    ]
    text, loss, tokens = one(tokenizer(), Example(messages=messages), "chat")
    assert text == "<s>[system]S\n[user]u\n[assistant]first</s>\n[user]v\n[assistant]second</s>\n"
    assert loss == "first</s>second</s>"
    assert tokenizer().decode(tokens.input_ids[0][: tokens.prompt_length]).endswith("[user]v\n[assistant]")
    asked = Tokenize(tokenizer(), 500)(Example(messages=messages[:4]), "chat")
    assert asked.input_ids[0] == tokens.input_ids[0][: tokens.prompt_length]


def test_chat_template_without_end_of_turn_still_ends_once() -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    text, loss, _ = one(tokenizer(chat=template), Example(prompt="q", answers=["a"]), "chat")
    assert (text, loss) == ("<user>q<assistant>a</s>", "a</s>")


def test_choices_share_their_prompt() -> None:
    tok = tokenizer()
    for format in ("cloze", "chat"):
        tokens = Tokenize(tok, 500)(Example(prompt="q", answers=["yes", "no way"], label=1), format)
        n = tokens.prompt_length
        assert tokens.input_ids[0][:n] == tokens.input_ids[1][:n]
        assert [learned(tok, labels).strip() for labels in tokens.labels] == ["yes</s>", "no way</s>"]


@pytest.mark.parametrize("format", ["alpaca", "cloze", "chat"])
def test_truncation_keeps_bos_marker_and_answer(format: str) -> None:
    tok = tokenizer()
    text, loss, tokens = one(tok, Example(prompt="long " * 50 + "end", answers=["answer"]), format, max_length=40)
    marker = {
        "alpaca": "end\n\n### Response:\nanswer</s>",
        "cloze": "end\nAnswer: answer</s>",
        "chat": "end\n[assistant]answer</s>\n",
    }
    assert text.startswith("<s>") and text.endswith(marker[format])
    assert loss.strip() == "answer</s>"
    full = Tokenize(tok, 4000)(Example(prompt="long " * 50 + "end", answers=["answer"]), format)
    assert len(tokens.input_ids[0]) == 40
    assert tokens.cut == len(full.input_ids[0]) - 40


def test_choices_are_cut_alike() -> None:
    tokens = Tokenize(tokenizer(), 30)(Example(prompt="x" * 99, answers=["b", "bbbbbbbb"], label=0), "cloze")
    n = tokens.prompt_length
    assert tokens.input_ids[0][:n] == tokens.input_ids[1][:n]
    assert max(map(len, tokens.input_ids)) == 30


@pytest.mark.parametrize("format", ["alpaca", "chat", "plain"])
def test_an_answer_that_does_not_fit_is_a_bad_row(format: str) -> None:
    with pytest.raises(BadRow, match="max_length"):
        Tokenize(tokenizer(), 20)(Example(prompt="q", answers=["answer " * 5]), format)


def test_pad_that_is_eos_does_not_hide_the_end() -> None:
    tok = tokenizer()
    tok.pad_token = tok.eos_token
    assert one(tok, Example(prompt="q", answers=["a"]), "plain")[1] == "a</s>"


def test_no_eos() -> None:
    with pytest.raises(UserError, match="eos_token"):
        Tokenize(tokenizer(eos=False), 20)
    tok = tokenizer(eos=False)
    assert Tokenize(tok, 20, eos_token="</s>")(Example(prompt="q", answers=["a"]), "plain").labels[0][-1] == 257
    with pytest.raises(UserError, match="no token '<nope>'"):
        Tokenize(tok, 20, eos_token="<nope>")


def test_an_answer_that_gives_no_token_is_a_bad_row() -> None:
    with pytest.raises(BadRow, match="no token"):
        Tokenize(tokenizer(), 20)(Example(prompt="q", answers=[""]), "plain")


@pytest.mark.parametrize("format", ["plain", "cloze", "alpaca", "chat", "Q: {prompt}\nA:"])
def test_special_tokens_that_the_data_spell(format: str) -> None:
    tok = tokenizer()
    example = Example(prompt="is <s>12</s> or", answers=["<s>12</s> 9 euros"])
    text, loss, tokens = one(tok, example, format)
    assert loss.strip() == "<s>12</s> 9 euros</s>"
    (ids,) = tokens.input_ids
    assert (ids.count(256), ids.count(257)) == (1, 1) and ids[0] == 256  # BOS and the end alone
    assert text.count("<s>12</s>") == 2
    assert ["'</s>'" in n or "'<s>'" in n for n in tokens.notices] == [True, True]
    control = Tokenize(tok, 500, special_tokens_in_data="control")(example, format)
    assert control.notices == [] and control.input_ids[0].count(257) == 3
    assert tok.decode([label for label in control.labels[0] if label != NO_LOSS]).strip() == "<s>12</s> 9 euros</s>"


def test_special_tokens_of_a_template_of_ones_own_are_tokens() -> None:
    tok = tokenizer()
    text, loss, tokens = one(tok, Example(prompt="<s>a", answers=["b"]), "<s>{prompt}</s>\n")
    assert text == "<s><s>a</s>\nb</s>" and tokens.input_ids[0].count(256) == 1 and tokens.input_ids[0].count(257) == 2
    assert loss == "b</s>"


def test_a_text_to_classify_spells_no_special_token() -> None:
    tok = tokenizer()
    tokens = Tokenize(tok, 50, ends=False).text(Example(prompt="a</s>"), "plain")
    assert tokens.input_ids[0].count(257) == 0 and tok.decode(tokens.input_ids[0]) == "<s>a</s>" and tokens.notices
    assert Tokenize(tok, 4, ends=False).text(Example(prompt="a</s>"), "plain").input_ids[0][1:] == [64, 27, 14]


def test_the_answer_is_what_generation_has_to_write() -> None:
    from tests.data.templates import FAMILIES
    from tests.data.templates import tokenizer as of

    turns = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": " 3 "}]
    wanted = {"qwen3": "<think>\n\n</think>\n\n 3", "llama3": "3", "harmony": "final 3", "phi3": "3"}
    for name, text in wanted.items():
        assert Tokenize(of(FAMILIES[name]), 500)(Example(messages=turns), "chat").answer == text
    assert Tokenize(of(FAMILIES["phi3"]), 500)(Example(messages=turns[:1]), "chat").answer is None
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tokens = Tokenize(of(FAMILIES["llama3.1"]), 500)(Example(messages=[turns[0], call]), "chat")
    assert tokens.answer == '{"name": "f", "parameters": {}}'


def test_train_on_last() -> None:
    turns = [{"role": role, "content": c} for role, c in (("user", "u"), ("assistant", "a"))] * 2
    assert one(tokenizer(), Example(messages=turns), "chat")[1] == "a</s>a</s>"
    tokens = Tokenize(tokenizer(), 500, train_on="last")(Example(messages=turns), "chat")
    assert learned(tokenizer(), tokens.labels[0]) == "a</s>"


def test_the_end_of_a_format() -> None:
    tokenize = Tokenize(tokenizer(chat=str(tokenizer().chat_template).replace("eos_token", "'<s>'")), 500)
    assert (tokenize.end("chat"), tokenize.end("plain")) == (256, 257)


def test_cutting_leaves_something_to_learn() -> None:
    turns = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "learned"},
        {"role": "user", "content": "v" * 40},
        {"role": "assistant", "content": "not", "weight": 0},
    ]
    assert learned(tokenizer(), Tokenize(tokenizer(), 200)(Example(messages=turns), "chat").labels[0]) == "learned</s>"
    with pytest.raises(BadRow, match="leaves no room"):
        Tokenize(tokenizer(), 50)(Example(messages=turns), "chat")


def test_classification_is_the_tokenizers_own() -> None:
    tokenize = Tokenize(tokenizer(eos=False), 6, ends=False).text
    tokens = tokenize(Example(prompt="abc"), "plain")
    assert (tokens.input_ids, tokens.labels) == ([[256, *tokenizer(bos=False)("abc").input_ids]], [])
    long = tokenize(Example(prompt="abcdefghij"), "plain")
    assert (len(long.input_ids[0]), long.cut) == (6, 5)
