"""What is trained on is what the chat template writes: ids, learned answers, and what is said where it drops a part."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from talklora_pl.data.chat import ChatTemplate, Written
from talklora_pl.data.encode import Encoder
from talklora_pl.data.source import BadRow
from talklora_pl.data.turns import Conversation
from talklora_pl.inputs import NO_LOSS
from tests.data.templates import FAMILIES, Family, tokenizer

U, A, S = (
    (lambda text, role=role, **more: {"role": role, "content": text, **more})
    for role in ("user", "assistant", "system")
)
ONE = [U("hi"), A("hello")]
THREE = [U("hi"), A("hello"), U("1 and 2?"), A("3"), U("hi"), A(" e, hello\n3 ")]


def chat(
    family: str | Family, train_on: Any = "all", mode: Any = "text"
) -> tuple[PreTrainedTokenizerFast, ChatTemplate]:
    tok = tokenizer(FAMILIES[family] if isinstance(family, str) else family)
    return tok, ChatTemplate(Encoder(tok, mode), tok.eos_token_id, train_on)


def runs(tok: PreTrainedTokenizerFast, row: Written) -> list[str]:
    """The texts learned, one for each run of labels."""
    out: list[list[int]] = []
    for i, label in enumerate(row.labels):
        if label != NO_LOSS:
            assert label == row.ids[i]
            if i == 0 or row.labels[i - 1] == NO_LOSS:
                out.append([])
            out[-1].append(label)
    return [tok.decode(ids) for ids in out]


def of_template(tok: PreTrainedTokenizerFast, turns: list[dict[str, Any]], **more: Any) -> list[int]:
    return tok.apply_chat_template(turns, tokenize=True, return_dict=False, **more)


def as_parts(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def expected(family: Family, answers: list[str]) -> list[str]:
    """What is learned of answers, with white space at the ends of a text aside: many templates strip it."""
    patterns = [family.earlier or family.learned] * (len(answers) - 1) + [family.learned]
    return [
        "".join(p.replace("A", a, 1).split()) if "A" not in family.tokens else "" for p, a in zip(patterns, answers)
    ]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "turns", [ONE, THREE, [S("Be brief."), *ONE], [S("Be brief."), *THREE]], ids=["1", "3", "s1", "s3"]
)
def test_families(name: str, turns: list[dict[str, Any]]) -> None:
    family = FAMILIES[name]
    tok, write = chat(family)
    if turns[0]["role"] == "system" and not family.system:
        pytest.skip("its template takes no system turn")
    row = write(Conversation(turns))
    shown = as_parts(turns) if name == "parts_only" else turns
    ids = of_template(tok, shown)
    ends_itself = name not in ("falcon", "glm4")
    assert row.ids == (ids if ends_itself else [*ids, tok.eos_token_id])
    assert len(row.labels) == len(row.ids)
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    want = expected(family, answers)
    assert ["".join(text.split()) for text in runs(tok, row)] == want
    assert [text for text in row.notices if "left out" in text] == []
    last = chat(family, "last")[1](Conversation(turns))
    assert last.ids == row.ids and ["".join(text.split()) for text in runs(tok, last)] == want[-1:]
    # generation starts from what a server sends
    if name not in ("r1", "qwq", "header_always"):
        assert row.ids[: row.start] == of_template(tok, shown[:-1], add_generation_prompt=True)
    assert [label for label in row.labels[: row.start] if label != NO_LOSS] == [
        i for i, label in zip(row.ids[: row.start], row.labels[: row.start]) if label != NO_LOSS
    ]
    asked = write(Conversation(turns[:-1]))
    assert set(asked.labels) == {NO_LOSS} and asked.start == len(asked.ids)
    if name not in ("r1", "qwq"):
        assert asked.ids == row.ids[: row.start]


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_stops_where_the_template_ends_an_answer(name: str) -> None:
    tok, write = chat(name)
    row = write(Conversation(ONE))
    ends = write.ends or [tok.eos_token_id]
    assert sum(row.ids[row.start :].count(end) for end in ends) == 1


# -- special tokens that the data spell ------------------------------------------------------------------------------


def trained(kind: str, family: Family) -> PreTrainedTokenizerFast:
    """A tokenizer with merges, of a kind in use, which knows the tokens of a family."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    text = ["hello world, the price is 12 euros", "[INST] what </s> is <s> this [/INST] assistant user system\n\n"] * 9
    text += [" ".join("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789<>[]()|/_.,?!:#'\"{}｜▁\n")]
    text += ["<th ink > </ think>\n\n", " and 1 and 2 and 3?\n"] * 9
    special = list(family.tokens)
    if kind == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    elif kind == "unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=140, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=180, special_tokens=["<unk>"], show_progress=False)
        if kind == "prepend":  # Llama 2 and Mistral, as converted for years
            steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            core.normalizer = normalizers.Sequence(steps)
        else:
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        core.decoder = decoders.Metaspace()
    core.train_from_iterator(text, trainer)
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=token == "<|end|>") for token in special]
    )
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=family.template,
        bos_token=special[0],
        eos_token=special[1],
        unk_token="<unk>",
    )


@pytest.mark.parametrize("name", list(FAMILIES))
def test_answers_are_where_they_were_in_turns_of_the_same_roles(name: str) -> None:
    """What is found by the conversation before, and what several renderings find."""
    _, quick = chat(name)
    _, slow = chat(name)
    slow.__dict__["_frame"] = lambda *_: None

    def outcome(write: ChatTemplate, turns: list[dict[str, Any]]) -> Any:
        try:
            return write(Conversation(turns))
        except BadRow as e:
            return e.problem

    texts = [["hi", "hello", "1 and 2?", "3"], ["price?", "12", "hi", "hi"], ["3", "<think>", " 1", "2 "], ["1"] * 4]
    for q, a, r, b in texts:
        for turns in ([U(q), A(a)], [U(q), A(a), U(r), A(b)], [S(b), U(q), A(a), U(r), A(b)], [S(a), U(b), A(b)]):
            assert outcome(quick, turns) == outcome(slow, turns), turns


KINDS = ["bytes", "prepend", "first", "always", "never", "unigram"]
FEW = ["qwen3", "llama2", "llama3", "mistral0.3", "nemo", "phi3", "vicuna", "r1", "smollm3", "harmony"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FEW)
def test_ids_are_the_templates_with_every_kind_of_tokenizer(kind: str, name: str) -> None:
    tok = trained(kind, FAMILIES[name])
    write = ChatTemplate(Encoder(tok), tok.eos_token_id)
    turns = [U("what is this?\n"), A("hello world"), U("price?"), A("12 euros, <think> and\n\n3?")]
    row = write(Conversation(turns))
    assert row.ids == of_template(tok, turns)
    first, second = ("".join(text.split()) for text in runs(tok, row))
    assert "helloworld" in first and "12euros,<think>and3?" in second
    assert [label for label in row.labels if label != NO_LOSS][-1] == write.ends[0]
    assert "price" not in first + second


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FEW)
def test_a_special_token_that_an_answer_spells_is_text(kind: str, name: str) -> None:
    family = FAMILIES[name]
    tok = trained(kind, family)
    write = ChatTemplate(Encoder(tok), tok.eos_token_id)
    spelled = f"and {family.tokens[1]} is {family.tokens[0]}12{family.tokens[1]} world"
    turns = [U(f"what {spelled}?"), A("hello"), U("price?"), A(spelled)]
    row = write(Conversation(turns))
    plain = write(Conversation([U("what ?"), A("hello"), U("price?"), A("and 12")]))
    special = {tok.convert_tokens_to_ids(token) for token in family.tokens}
    assert [i for i in row.ids if i in special] == [i for i in plain.ids if i in special]  # those of the template
    assert sum(family.tokens[1] in notice for notice in row.notices) == 1
    learned = [label for label in row.labels[row.start :] if label != NO_LOSS]
    assert learned[-1] == write.ends[0] and learned.count(write.ends[0]) == 1
    shown = "".join(tok.decode(learned).replace("▁", "").split())
    assert "".join(spelled.replace("▁", "").split()) in shown
    control = ChatTemplate(Encoder(tok, "control"), tok.eos_token_id)(Conversation(turns))
    assert control.ids == of_template(tok, turns) and not [n for n in control.notices if "spells" in n]


def test_segments_between_the_templates_tokens_are_read_as_text() -> None:
    tok = trained("bytes", FAMILIES["llama3"])
    row = ChatTemplate(Encoder(tok), tok.eos_token_id)(Conversation([U("a <|eot_id|> b"), A("<|eot_id|>")]))
    head, end, begin = (
        tok.convert_tokens_to_ids(f"<|{name}|>") for name in ("start_header_id", "end_header_id", "begin_of_text")
    )

    def text(t: str) -> list[int]:
        return tok(t, add_special_tokens=False, split_special_tokens=True).input_ids

    stop = tok.convert_tokens_to_ids("<|eot_id|>")
    user = [begin, head, *text("user"), end, *text("\n\na <|eot_id|> b"), stop]
    assert row.ids == [*user, head, *text("assistant"), end, *text("\n\n<|eot_id|>"), stop]


# -- what else a row says --------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}, "id": "abcdefghi"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALLED = [
    U("rain?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "no"},
    A("No rain."),
    U("sure?"),
    A("Yes."),
]


@pytest.mark.parametrize(
    "name, call",
    {
        "qwen2.5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
        "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
        "llama3.1": '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>',
        "mistral0.3": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}, "id": "abcdefghi"}]</s>',
        "nemo": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}, "id": "abcdefghi"}]</s>',
        "deepseek3": "<｜tool▁call▁begin｜>weather\n"
        '```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜><｜end▁of▁sentence｜>',
    }.items(),
)
def test_calls_of_tools_are_learned(name: str, call: str) -> None:
    tok, write = chat(name)
    row = write(Conversation(CALLED, tools=TOOLS))
    answers = runs(tok, row)
    assert answers[0].lstrip("\n") == call and len(answers) == 3
    if name in ("mistral0.3", "nemo"):
        assert answers[1:] == [" No rain.</s>", " Yes.</s>"]
    assert all(text in answer for text, answer in zip(["No rain.", "Yes."], answers[1:]))
    as_text = [
        {**CALLED[1], "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]}
    ]
    if name in ("qwen2.5", "llama3.1", "mistral0.3"):  # these write the tools
        assert row.ids == of_template(tok, CALLED, tools=TOOLS)
        assert not row.notices and "weather" in tok.decode(row.ids[:300]).split("rain?")[0] + tok.decode(row.ids)
    if name == "deepseek3":  # its template takes the arguments as JSON alone; an object is written as that
        assert row.ids == of_template(tok, [CALLED[0], *as_text, *CALLED[2:]])
    last = chat(name, "last")[1](Conversation(CALLED, tools=TOOLS))
    assert runs(tok, last) == answers[-1:]


def test_arguments_that_become_json_within_json_are_said() -> None:
    as_text = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
    turns = [CALLED[0], {**CALLED[1], "tool_calls": [as_text]}, *CALLED[2:]]
    said = {name: str(chat(name)[1](Conversation(turns, tools=TOOLS)).notices) for name in ("qwen2.5", "qwen3")}
    assert "JSON as text" in said["qwen2.5"] and "JSON as text" not in said["qwen3"]


def test_calls_that_the_template_does_not_write_are_refused_by_name() -> None:
    for name in ("chatml", "llama3", "gemma", "zephyr", "parts_only"):
        with pytest.raises(BadRow, match="tool_calls"):
            chat(name)[1](Conversation(CALLED, tools=TOOLS))


@pytest.mark.parametrize("name", ["chatml", "qwen3", "deepseek3", "glm4"])
def test_tools_that_the_template_does_not_write_are_said(name: str) -> None:
    assert [n for n in chat(name)[1](Conversation(ONE, tools=TOOLS)).notices if n.startswith("tools are left out")]
    assert "tools" not in str(chat("qwen2.5")[1](Conversation(ONE, tools=TOOLS)).notices)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts(key: str) -> None:
    turns = [U("hi"), A("hello", **{key: "a greeting"}), U("1+2"), A("3", **{key: "add them"})]
    tok, write = chat("qwen3")
    row = write(Conversation(turns))
    assert row.ids == of_template(tok, turns)
    assert runs(tok, row) == ["hello<|im_end|>", "<think>\nadd them\n</think>\n\n3<|im_end|>"]
    assert [n for n in row.notices if n.startswith("reasoning_content of an answer is left out")]  # the first one's
    assert not write(Conversation(turns[2:])).notices
    tok, write = chat("harmony")
    assert "<|channel|>analysis<|message|>add them<|end|>" in runs(tok, write(Conversation(turns)))[1]
    notices = chat("llama3")[1](Conversation(turns)).notices
    assert any(key in notice and "left out" in notice for notice in notices)


def test_thoughts_within_the_content() -> None:
    turns = [U("hi"), A("<think>\ngreet\n</think>\n\nhello"), U("1+2"), A("<think>\nadd\n</think>\n\n3")]
    learned = {}
    for name in ("qwen3", "qwq", "r1", "llama3"):
        tok, write = chat(name)
        row = write(Conversation(turns))
        assert row.ids == of_template(tok, turns)
        learned[name] = runs(tok, row)
        assert any("part of an answer is left out" in n for n in row.notices) == (name != "llama3")
    assert learned["qwen3"] == ["hello<|im_end|>", "<think>\nadd\n</think>\n\n3<|im_end|>"]
    assert learned["qwq"] == ["hello<|im_end|>", "add\n</think>\n\n3<|im_end|>"]
    assert learned["r1"] == ["\n\nhello<｜end▁of▁sentence｜>", "\n\n3<｜end▁of▁sentence｜>"]
    assert learned["llama3"][1] == "<think>\nadd\n</think>\n\n3<|eot_id|>"


def test_an_opening_that_the_answers_do_not_have_is_said() -> None:
    assert [n for n in chat("r1")[1](Conversation(ONE)).notices if "<think>" in n]
    assert not chat("llama3")[1](Conversation(ONE)).notices


@pytest.mark.parametrize("name", ["chatml", "qwen3", "nemo", "smollm3", "r1", "llama2"])
@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}, {"loss": 0}, {"weight": 0.0}])
def test_an_answer_that_is_not_to_be_learned(name: str, key: dict[str, Any]) -> None:
    tok, write = chat(name)
    turns = [U("a"), A("wrong", **key), U("b"), A("good", weight=1)]
    row, plain = (
        write(Conversation(turns)),
        write(Conversation([{k: t[k] for k in ("role", "content")} for t in turns])),
    )
    assert row.ids == plain.ids
    assert runs(tok, row) == runs(tok, plain)[1:] and "good" in runs(tok, row)[0]
    with pytest.raises(BadRow, match="no answer in it is to be learned"):
        write(Conversation([U("a"), A("b", **key)]))
    assert runs(tok, write(Conversation([U("a"), A("good"), U("b"), A("wrong", **key)])))[0].strip().startswith("good")


@pytest.mark.parametrize("key", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}, {"weight": 2}])
def test_half_a_weight_is_refused(key: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match=next(iter(key))):
        chat("chatml")[1](Conversation([U("a"), A("b", **key)]))


def test_keys_of_a_turn() -> None:
    with pytest.raises(BadRow, match="'mood'"):
        chat("chatml")[1](Conversation([U("a", mood="sad"), A("b")]))
    for absent in (None, [], {}):
        chat("chatml")[1](Conversation([U("a", mood=absent), A("b")]))
    named = Family(
        FAMILIES["chatml"].template.replace("m['content']", "m['content'] ~ (m.mood or '')"),
        FAMILIES["chatml"].tokens,
        "",
    )
    tok, write = chat(named)
    assert "asad" in tok.decode(write(Conversation([U("a", mood="sad"), A("b")])).ids)
    assert not write(Conversation([U("a", mood=""), A("b")])).notices  # it is read, if it writes nothing
    row = chat("chatml")[1](Conversation([U("a", name="Ann"), A("b")]))
    assert ["name" in notice for notice in row.notices] == [True]
    everything = Family("{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}", FAMILIES["chatml"].tokens, "")
    tok, write = chat(everything)
    assert "sad" in tok.decode(write(Conversation([U("a", mood="sad"), A("b")])).ids)


def test_turns_that_the_template_drops_are_said() -> None:
    dropped = Family(
        "{% for m in messages if m.role != 'system' %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        FAMILIES["chatml"].tokens,
        "",
    )
    row = chat(dropped)[1](Conversation([S("e"), *ONE]))  # the letter stands elsewhere
    assert [n for n in row.notices if n.startswith("the system turn is left out")]
    assert [n for n in chat("mistral0.3")[1](Conversation([S("Be brief."), *ONE])).notices if "system turn" in n]
    row = chat("falcon")[1](Conversation([U("rain?"), {"role": "tool", "content": "no"}, A("no")]))
    assert [n for n in row.notices if n.startswith("the tool turn is left out")]


@pytest.mark.parametrize("name", ["gemma3", "chatml", "llama3", "parts_only", "qwen3"])
def test_content_in_parts(name: str) -> None:
    tok, write = chat(name)
    row = write(Conversation(as_parts(ONE)))
    assert row.ids == write(Conversation(ONE)).ids and runs(tok, row) == runs(tok, write(Conversation(ONE)))
    mixed = [U("hi"), *as_parts([A("hello")])]
    assert write(Conversation(mixed)).ids == row.ids


def test_a_template_that_refuses_is_quoted() -> None:
    with pytest.raises(BadRow, match="System role not supported"):
        chat("gemma")[1](Conversation([S("x"), *ONE]))
    with pytest.raises(BadRow, match="must alternate"):
        chat("mistral0.1")[1](Conversation([U("a"), U("b"), A("c")]))


def test_an_answer_that_is_not_written_is_refused() -> None:
    silent = Family("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", ("<s>", "</s>"), "")
    with pytest.raises(BadRow, match="cannot be found"):
        chat(silent)[1](Conversation([U("a"), A("zebra")]))
    shouting = "{% for m in messages %}{{ m.role }}:{{ m.content | upper }}{{ loop.length }}\n{% endfor %}"
    with pytest.raises(BadRow, match="turn 2 cannot be found"):  # neither its text nor a prefix
        chat(Family(shouting, ("<s>", "</s>"), ""))[1](Conversation([U("a"), A("zebra"), U("b"), A("HORSE")]))


def test_marks_of_the_template_decide() -> None:
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}END<|im_end|>\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tok, write = chat(Family(marked.replace("END", ""), FAMILIES["chatml"].tokens, ""))
    row = write(Conversation(THREE))
    assert runs(tok, row) == [f"{text}<|im_end|>" for text in ("hello", "3", " e, hello\n3 ")]
    assert any("marks leave out the end" in notice for notice in row.notices)
    whole = marked.replace("{% endgeneration %}END<|im_end|>\n", "<|im_end|>\n{% endgeneration %}")
    tok, write = chat(Family(whole, FAMILIES["chatml"].tokens, ""))
    row = write(Conversation(THREE))
    mask = tok.apply_chat_template(THREE, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert [label != NO_LOSS for label in row.labels] == [bool(m) for m in mask] and not row.notices
    assert runs(tok, chat(Family(whole, FAMILIES["chatml"].tokens, ""), "last")[1](Conversation(THREE))) == [
        " e, hello\n3 <|im_end|>\n"
    ]


def test_variables_of_the_template() -> None:
    tok, write = chat("smollm3")
    row = write(Conversation(ONE, variables={"enable_thinking": False}))
    assert row.ids == of_template(tok, ONE, enable_thinking=False) and not row.notices
    assert tok.decode(row.ids[: row.start]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n")
    assert any("mood is left out" in n for n in write(Conversation(ONE, variables={"mood": 1})).notices)
    for name in ("tokenize", "chat_template", "add_generation_prompt"):
        with pytest.raises(BadRow, match=name):
            write(Conversation(ONE, variables={name: True}))


def test_nothing_is_learned_of_a_text_that_repeats() -> None:
    """Short answers stand in the questions, the header and the end of a turn too."""
    for name in FAMILIES:
        tok, write = chat(name)
        turns = [U("e"), A("e"), U("end"), A("n"), U("user"), A("model")]
        row = write(Conversation(turns))
        assert ["".join(t.split()) for t in runs(tok, row)] == expected(FAMILIES[name], ["e", "n", "model"])


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "r1", "vicuna", "harmony", "smollm3"])
@pytest.mark.parametrize("roles", ["aua", "uaa", "a", "uauua"])
def test_turns_in_any_order(name: str, roles: str) -> None:
    tok, write = chat(name)
    turns = [{"u": U, "a": A}[role](f"text {i}") for i, role in enumerate(roles)]
    row = write(Conversation(turns))
    assert row.ids == of_template(tok, turns)
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    got = runs(tok, row)
    assert len(got) == len(answers) and all(a in g and g.count("text") == 1 for a, g in zip(answers, got))


def test_another_template_for_tools() -> None:
    tok = tokenizer(FAMILIES["llama3"])
    plain: Any = tok.chat_template
    tok.chat_template = {
        "default": plain,
        "tool_use": plain.replace("{% set loop", "{{ tools | tojson }}{% set loop", 1),
    }
    row = ChatTemplate(Encoder(tok), tok.eos_token_id)(Conversation(ONE, tools=TOOLS))
    assert "weather" in tok.decode(row.ids) and runs(tok, row) == ["hello<|eot_id|>"] and not row.notices


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tokenizer_that_tells_no_places(name: str) -> None:
    write, slow = chat(name)[1], chat(name)[1]
    slow.encoder.__dict__["_backend"] = None
    assert slow(Conversation(THREE)) == write(Conversation(THREE))
    with pytest.raises(BadRow, match="slow tokenizer"):
        slow(Conversation([U(FAMILIES[name].tokens[1]), A("a")]))


PARTS = ["a", "e", "assistant", "Assistant:", "USER: ", "ASSISTANT:", "User: ", "\n\n", " ", "end", "[INST]", "[/INST]"]
PARTS += ["model\n", "é漢", "12", ":", ">", "\nFalcon:", "|>", "<|", "{'type': 'text'}", "</think", "<s>", "</s>"]


@pytest.mark.parametrize("name", FAMILIES)
def test_any_text(name: str) -> None:
    """Texts made of what templates write around them."""
    family, draw = FAMILIES[name], random.Random(0)
    tok, write = chat(family)

    def text() -> str:
        return "".join(draw.choices(PARTS, k=draw.randint(1, 5))) + draw.choice("xyz")

    for _ in range(20):
        answers = [text() for _ in range(draw.randint(1, 3))]
        turns = [turn for answer in answers for turn in (U(text()), A(answer))]
        turns = [S(text()), *turns] if family.system else turns
        row = write(Conversation(turns))
        assert ["".join(got.split()) for got in runs(tok, row)] == expected(family, answers)
        if not any("spells" in notice for notice in row.notices) and name != "parts_only":
            ids = of_template(tok, turns)
            assert row.ids[: len(ids)] == ids
