"""Files and rows: every shape of data, and every mistake named by file, place and column."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from talklora_pl.data.prepare import resolve_source
from talklora_pl.data.rows import Example, RowReader, check_format, row_kind
from talklora_pl.data.source import BadRow, Reader, Source
from talklora_pl.errors import UserError
from talklora_pl.objectives.classification import Classification
from talklora_pl.objectives.sft import SFT

ROWS = [{"prompt": "über", "completion": "a"}, {"prompt": "q", "completion": "b"}]


def read(path: str | Path, **options: Any) -> list[dict[str, Any] | BadRow]:
    return [row for _, row in Reader(Source(str(path), **options))]


def test_all_file_types_hold_the_same(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "bom.jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (tmp_path / "a.csv").write_text('prompt,completion\n"über",a\nq,b\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\nüber\ta\nq\tb\n", encoding="utf-8")
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    for file in tmp_path.iterdir():
        assert read(file) == ROWS, file.name


def test_a_folder_loads_like_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "test.jsonl").write_text(json.dumps(ROWS[1]))
    assert read(folder) == ROWS
    assert read(folder, split="test") == ROWS[1:]
    with pytest.raises(UserError, match="split: nope"):
        read(folder, split="nope")


def test_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    monkeypatch.setenv("SOME_DIR", str(tmp_path))
    assert read("$SOME_DIR/a.json") == ROWS
    with pytest.raises(UserError, match=r"\$NO_SUCH_DIR/a.json: the environment variable"):
        read("$NO_SUCH_DIR/a.json")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b'[{"prompt": "x"},\n {"prompt": }]', r"a.json, line 2, character 13: broken JSON"),
        ("a.json", b'{"prompt": "x"}\n{"prompt": "y"}', r"must end in .jsonl"),
        ("a.json", b'"text"', r"expected a list of objects"),
        ("a.json", b'["\xff"]', r"a.json, line 1: invalid UTF-8"),
        ("a.csv", b"prompt,completion\nx,y\n\xff,z\n", r"a.csv, line 3: invalid UTF-8"),
        ("a.parquet", b"PAR1 this is not parquet", r"a.parquet: not a readable Parquet file"),
        (
            "a.csv",
            b'a,b\n1,2\n\n"3\n3",4\n"5,6\n7,8\n9,10\n',
            r"a.csv, line 6: the row that begins here .*the rest cannot be read",
        ),
        ("a.csv", b'a,b\n1,"x"y\n', r"a.csv, line 2: the row that begins here is broken CSV"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"a.csv, line 1: more than one column has the name 'a'"),
        ("a.csv", b"a;b\n1;2\n", r"a.csv, line 1: columns seem to be separated by ';'"),
        ("a.pdf", b"text", r"unknown file type '.pdf'. Known: .jsonl"),
        ("a.parquet.gz", b"text", r"unknown file type '.parquet.gz'. .*all but .parquet compressed"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"no/such/rows.jsonl: there is no such file"):
        read("no/such/rows.jsonl")
    with pytest.raises(UserError, match=r"no such file, and it cannot be loaded as a data set of the hub"):
        read("nobody/nothing")


def test_lines_that_cannot_be_read_are_bad_rows(tmp_path: Path) -> None:
    lines = [b'{"a": 1}', b'{"a": ', b"[1]", b'{"a": "\xff"}', b"", b'{"a": 2}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    got = list(Reader(Source(str(tmp_path / "a.jsonl"))))
    assert [place for place, _ in got] == [f"line {i}" for i in (1, 2, 3, 4, 6)]
    problems = [row.problem if isinstance(row, BadRow) else row for _, row in got]
    assert problems[0] == {"a": 1} and problems[4] == {"a": 2}
    assert problems[1] == "broken JSON at character 7: Expecting value"
    assert problems[2] == "a row must be an object, got list"
    assert problems[3] == "invalid UTF-8 at byte 8 of the line"


def test_csv_with_a_wrong_number_of_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3\n4,5,6\n")
    got = list(Reader(Source(str(tmp_path / "a.csv"))))
    assert got[0] == ("line 2", {"a": "1", "b": "2"})
    assert [(place, row.problem) for place, row in got[1:]] == [
        ("line 3", "2 columns expected, got 1"),
        ("line 4", "2 columns expected, got 3"),
    ]


def test_csv_cells_may_be_long_and_have_several_lines(tmp_path: Path) -> None:
    long = "x" * 300_000
    (tmp_path / "a.csv").write_text(f'a,b\n"1\n2",2\n\n{long},3\n')
    got = list(Reader(Source(str(tmp_path / "a.csv"))))
    assert got == [("line 2", {"a": "1\n2", "b": "2"}), ("line 5", {"a": long, "b": "3"})]


def test_a_folder_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=r"set: a folder.* It holds no data file"):
        read(tmp_path / "set")
    (tmp_path / "set" / "a.jsonl").write_text('{"a": 1}')
    (tmp_path / "set" / "b.jsonl").write_text('{"b": "x"}')
    with pytest.raises(UserError, match=r"set: a folder.* Name a file in it \(a.jsonl, b.jsonl\)") as error:
        read(tmp_path / "set")
    assert "An error occurred while generating" not in str(error.value)


def example(kind: str, row: dict[str, Any], columns: dict[str, Any] | None = None, **options: Any) -> Example:
    return RowReader(Source("f", rows=kind, columns=columns or {}), **options)(row)


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "chat"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "chat"),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction"),
        ({"text": "a"}, "text"),
        ({"prompt": "a", "chosen": "b"}, None),
        ({"text": "a", "completion": 3}, None),
    ],
)
def test_rows_of_another_kind_are_told_of_it(row: dict[str, Any], kind: str | None) -> None:
    with pytest.raises(BadRow) as error:
        RowReader(Source("f"))(row)
    assert str(error.value).partition("or say rows: ")[2] == (kind or "")


def test_kinds_of_rows() -> None:
    assert example("instruction", {"instruction": "i", "input": None, "output": "o"}) == Example("i", "", [], ["o"], 0)
    assert example("instruction", {"instruction": "i", "input": "x", "output": "o"}).input == "x"
    assert example("completion", {"prompt": "", "completion": "o"}) == Example("", "", [], ["o"], 0)
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "more": 1}]
    assert example("chat", {"messages": messages}).messages == messages  # every key
    row = {"question": "q", "choices": ["x", "y"], "label": 1}
    assert example("choice", row) == Example("q", "", [], ["x", "y"], 1)
    assert example("classification", {"text": "t", "label": 3}, num_classes=4) == Example("t", label=3)
    assert example("classification", {"text": "t", "label": "b"}, classes=["a", "b"]).label == 1


def test_columns() -> None:
    hub = {"question": "q", "choices": {"label": ["1", "2"], "text": ["x", "y"]}, "answerKey": "2"}
    names = {"choices": "choices.text", "choice_labels": "choices.label", "label": "answerKey"}
    assert example("choice", hub, names) == Example("q", "", [], ["x", "y"], 1)
    wide = {"question": "q", "option1": "x", "option2": "y", "answer": "B"}
    assert example("choice", wide, {"choices": ["option1", "option2"], "label": "answer"}).label == 1
    cell = {"question": "q", "choices": '["x", "y"]', "label": "1"}
    assert example("choice", cell) == Example("q", "", [], ["x", "y"], 1)


def test_a_label_that_can_mean_two_choices_is_refused() -> None:
    def label(label: Any, choices: list[str], **columns: Any) -> int | None:
        names = {"choice_labels": "choice_labels"} if columns else {}
        return example("choice", {"question": "q", "choices": choices, "label": label, **columns}, names).label

    numbers = ["1", "2", "3"]
    assert [label(value, numbers) for value in (1, "B", "0", "3")] == [1, 1, 0, 2]
    assert label("1", ["5", "1"]) == label("1", ["x", "y"]) == 1
    for value, choices in (("1", numbers), ("A", ["B", "A"]), ("x", ["x", "x"])):
        with pytest.raises(BadRow, match=r"can mean each of the choices .*integer") as bad:
            label(value, choices)
        assert bad.value.column == "label"
    # names that the user lists are never indices
    assert label("1", ["x", "y"], choice_labels=[1, 2]) == label(1, ["x", "y"], choice_labels=[1, 2]) == 0
    assert label("A", ["B", "A"], choice_labels=["A", "B"]) == 0
    with pytest.raises(BadRow, match="0 is none of the choices: 1, 2"):
        label(0, ["x", "y"], choice_labels=[1, 2])
    stars = {"classes": ["1", "2", "3"]}
    assert [example("classification", {"text": "t", "label": x}, **stars).label for x in ("1", 3)] == [0, 2]
    assert example("classification", {"text": "t", "label": "1"}, classes=["no", "yes"]).label == 1


def test_predicting_needs_no_answers() -> None:
    assert example("completion", {"prompt": "p"}, require_answers=False) == Example("p")
    assert example("choice", {"question": "q", "choices": ["x", "y"]}, require_answers=False).label is None
    assert example("chat", {"messages": [{"role": "user", "content": "u"}]}, require_answers=False).answers == []
    assert example("classification", {"text": "t"}, require_answers=False).label is None


CHOICE = {"question": "q", "choices": ["x", "y"], "label": 1}


@pytest.mark.parametrize(
    "kind, row, column, problem",
    [
        ("completion", {"prompt": "p"}, "completion", r"is missing \(the row has 'prompt'\); map it"),
        ("completion", {"prompt": "p", "completion": None}, "completion", "is null"),
        ("completion", {"prompt": "p", "completion": "  "}, "completion", "is empty"),
        ("completion", {"prompt": "p", "completion": 4}, "completion", "must be text, got int"),
        ("completion", {"prompt": ["p"], "completion": "c"}, "prompt", "must be text"),
        ("completion", {"prompt": "p", "completion": "\ud800"}, "completion", "surrogate"),
        ("instruction", {"instruction": "", "output": "o"}, "instruction", "is empty"),
        ("chat", {"messages": []}, "messages", "must be a list"),
        ("chat", {"messages": [{"role": "user", "content": "u"}]}, "messages", "last message must be the assistant's"),
        ("chat", {"messages": [{"role": "robot", "content": "u"}]}, "messages[0].role", "got 'robot'"),
        ("chat", {"messages": ["hi"]}, "messages[0]", "must be an object"),
        ("chat", {"messages": [{"role": "user"}]}, "messages[0].content", "must be text"),
        ("choice", CHOICE | {"label": 2}, "label", "2 is out of range: there are 2 choices"),
        ("choice", CHOICE | {"label": -1}, "label", "out of range"),
        ("choice", CHOICE | {"label": "z"}, "label", "neither an index nor one of the choices"),
        ("choice", CHOICE | {"label": True}, "label", "neither"),
        ("choice", CHOICE | {"label": "--1"}, "label", "neither"),
        ("choice", CHOICE | {"label": "9" * 5000}, "label", "neither"),
        ("choice", CHOICE | {"choices": "x"}, "choices", "must be a list"),
        ("choice", CHOICE | {"choices": ["x"]}, "choices", "at least two"),
        ("choice", CHOICE | {"choices": ["x", ""]}, "choices[1]", "is empty"),
        ("classification", {"text": "t", "label": 9}, "label", "9 is out of range: there are 3 classes"),
        ("classification", {"text": "t", "label": "b"}, "label", "data.labels"),
    ],
)
def test_bad_rows(kind: str, row: dict[str, Any], column: str, problem: str) -> None:
    with pytest.raises(BadRow, match=problem) as bad:
        example(kind, row, num_classes=3)
    assert bad.value.column == column


def test_kind_and_format_are_decided_together() -> None:
    def decided(classify: bool = False, **options: Any) -> tuple[str | None, str | None]:
        source = resolve_source(Source("f", **options), Classification() if classify else SFT())
        return source.rows, source.format

    assert decided() == ("completion", "plain")
    assert decided(format="cloze") == ("choice", "cloze")
    assert decided(format="alpaca") == ("instruction", "alpaca")
    assert decided(format="chat") == ("chat", "chat")
    assert decided(rows="choice", format="chat") == ("choice", "chat")
    assert decided(True) == ("classification", "plain")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rows": "choise"}, "Did you mean 'choice'"),
        ({"format": "alpacca"}, "Did you mean 'alpaca'"),
        ({"rows": "chat", "format": "cloze"}, "chat rows need format: chat"),
        (
            {"rows": "classification"},
            r"causal_lm; set model.base.task: sequence_classification \(.*model.base.num_labels or data.labels",
        ),
        ({"columns": {"promt": "x"}}, "Did you mean 'prompt'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^f: .*{message}"):
        resolve_source(Source("f", **options), SFT())


@pytest.mark.parametrize("rows, remedy", [("chat", r"model.base.path\."), ("choice", "or another format")])
def test_a_tokenizer_without_a_chat_template(rows: str, remedy: str) -> None:
    with pytest.raises(UserError, match=f"^f: format: chat needs .*{remedy}"):
        resolve_source(Source("f", rows=rows, format="chat"), SFT(), has_template=False)
    resolve_source(Source("f", rows="choice"), SFT(), has_template=False)


def test_a_template_needs_its_place() -> None:
    check_format("Q: {prompt}", row_kind("completion"))
    with pytest.raises(UserError, match="must contain"):
        check_format("Q: {question}", row_kind("completion"))


def test_task_names(jsonl: Callable[..., str]) -> None:
    assert Source("a/b/my-set.train.jsonl").task_name == "my_set_train"
    assert Source("tau/commonsense_qa").task_name == "commonsense_qa"
    assert Source("x.csv", task="T").task_name == "T"


# -- rows that are Python objects


class Mapped:
    """A data set in PyTorch's way: indexed, never iterated."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return ROWS[i]


def test_rows_in_python_hold_what_a_file_holds() -> None:
    import datasets
    import pandas

    dataset = datasets.Dataset.from_list(ROWS)
    given = [ROWS, tuple(ROWS), dataset, dataset.with_format("torch"), dataset.to_iterable_dataset()]
    for rows in (*given, pandas.DataFrame(ROWS), iter(ROWS), (dict(row) for row in ROWS), Mapped()):
        source = Source(rows, limit=9)
        assert [row for _, row in Reader(source)] == [row for _, row in Reader(source)] == ROWS, type(rows)
        assert source.task_name == "data"


def test_rows_in_python_are_told_by_their_content() -> None:
    import datasets

    def identity(rows: Any) -> str:
        return Reader(Source(rows)).identity

    copies = (list(ROWS), [dict(row) for row in ROWS])
    assert identity(copies[0]) == identity(copies[1]) != identity(ROWS[::-1])
    saved = [datasets.Dataset.from_list(rows) for rows in (ROWS, ROWS, ROWS[::-1])]
    assert identity(saved[0]) == identity(saved[1]) != identity(saved[2])


def test_numbers_of_numpy_and_missing_values_of_pandas() -> None:
    import numpy as np
    import pandas

    rows = [{"text": "a", "label": np.int64(1), "more": (np.float32(0.5), np.array([1, 2]))}]
    assert [row for _, row in Reader(Source(rows))] == [{"text": "a", "label": 1, "more": [0.5, [1, 2]]}]
    frame = pandas.DataFrame({"prompt": ["a", None], "label": [1.0, float("nan")]})
    assert [row for _, row in Reader(Source(frame))] == [{"prompt": "a", "label": 1}, {"prompt": None, "label": None}]


def test_rows_in_python_have_a_short_name_that_survives_copies() -> None:
    import copy
    import pickle
    from dataclasses import asdict, replace

    source = replace(Source(ROWS), rows="completion")
    assert str(source.path) == "2 rows in Python" and asdict(source)["path"] == "2 rows in Python"
    for same in (source, copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert [row for _, row in Reader(same)] == ROWS
    assert Source(iter(ROWS)).path == "list_iterator in Python"
    assert Source(Path("a") / "b.jsonl").path == "a/b.jsonl"


def test_objects_that_are_no_rows() -> None:
    import datasets

    for wrong in (3, b"rows", None):
        with pytest.raises(UserError, match=f"{type(wrong).__name__} is not what data can be: .*list of dicts"):
            Source(wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"DatasetDict names its splits: give one, such as data\['train'\]"):
        Source(datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)))
    with pytest.raises(UserError, match="dict is one row: give a list"):
        Source(ROWS[0])
    (_, row), *_ = Reader(Source(["text"]))
    assert isinstance(row, BadRow) and row.problem == "a row must be a dict, got str"


# -- folders, compressed files, texts


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    import datasets

    one, other = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[1:])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, validation=other).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "one") == read(tmp_path / "both") == ROWS
    assert read(tmp_path / "both", split="validation") == ROWS[1:]
    with pytest.raises(UserError, match=r"both: there is no split 'validatoin'. Did you mean 'validation'\?"):
        read(tmp_path / "both", split="validatoin")
    with pytest.raises(UserError, match="one: a data set without splits, so leave out split: test"):
        read(tmp_path / "one", split="test")
    assert len({Reader(Source(str(tmp_path / name))).identity for name in ("one", "both")}) == 1


def test_compressed_files_hold_the_same(tmp_path: Path) -> None:
    import bz2
    import gzip
    import lzma

    import pyarrow

    contents = {
        "a.jsonl": "\n".join(map(json.dumps, ROWS)),
        "a.json": json.dumps(ROWS),
        "a.csv": "prompt,completion\nüber,a\nq,b\n",
    }
    zstd = pyarrow.Codec("zstd")
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}
    for name, content in contents.items():
        for ending, compress in pack.items():
            path = tmp_path / (name + ending)
            path.write_bytes(bytes(compress(content.encode())))
            assert read(path) == ROWS, path.name
            assert Source(str(path)).task_name == "a"
            path.write_bytes(path.read_bytes()[:-9])
            with pytest.raises(UserError, match=rf"{path.name}: cannot be decompressed as {ending}"):
                read(path)
            path.write_text("not compressed")
            with pytest.raises(UserError, match=rf"{path.name}: cannot be decompressed as {ending}"):
                read(path)


def test_a_text_is_a_document_or_its_paragraphs_or_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\n\nOne\r\ntwo\n \n\n  three über\n".encode())

    def places(**options: Any) -> list[tuple[str, str]]:
        return [(place, row["text"]) for place, row in Reader(Source(str(path), **options))]  # type: ignore[index]

    assert places() == [("line 1", "\n\nOne\ntwo\n \n\n  three über\n")]
    assert places(sample_by="paragraph") == [("line 3", "One\ntwo"), ("line 7", "  three über")]
    assert places(sample_by="line") == [("line 3", "One"), ("line 4", "two"), ("line 7", "  three über")]
    path.write_bytes(b"a\n\xff")
    with pytest.raises(UserError, match=r"a.txt, line 2: invalid UTF-8"):
        places()


def test_a_folder_of_texts(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("# two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="1 file is no text and is not read: picture.png"):
        reader = Reader(Source(str(tmp_path)))
    assert list(reader) == [
        ("file a.txt", {"text": "one"}),
        ("file b/two.md", {"text": "# two"}),
        ("file c.txt.gz", {"text": "three"}),
    ]
    (tmp_path / "a.txt").write_text("other")
    with pytest.warns(UserWarning):
        assert Reader(Source(str(tmp_path))).identity != reader.identity


# -- conversations in the shapes of others ---------------------------------------------------------------------------


def test_sharegpt() -> None:
    row = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "no"},
            {"from": "gpt", "value": "No.", "weight": 0},
        ]
    }
    got = example("chat", row)
    assert [turn["role"] for turn in got.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert got.messages[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
    assert got.messages[4] == {"role": "assistant", "content": "No.", "weight": 0} and got.answers == ["No."]
    assert example("chat", {"talk": row["conversations"]}, columns={"messages": "talk"}).messages == got.messages
    assert example("chat", {"messages": None, **row}).messages == got.messages
    with pytest.raises(BadRow, match="JSON of a call"):
        example("chat", {"conversations": [{"from": "function_call", "value": "rain"}]})


def test_what_a_chat_row_says_beside_messages() -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools), [json.dumps(tools[0])]):
        assert example("chat", {"messages": turns, "tools": given}).tools == tools
    assert example("chat", {"messages": turns, "tools": []}).tools is None
    got = example("chat", {"messages": turns, "system": "s", "chat_template_kwargs": {"x": 1}, "documents": [{"a": 1}]})
    assert got.messages[0] == {"role": "system", "content": "s"}
    assert got.variables == {"x": 1, "documents": [{"a": 1}]}
    with pytest.raises(BadRow, match="second system text"):
        example("chat", {"messages": [{"role": "system", "content": "t"}, *turns], "system": "s"})
    for wrong in ("weather", {"name": "f"}, ["f"]):
        with pytest.raises(BadRow, match="must be a list of objects"):
            example("chat", {"messages": turns, "tools": wrong})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert example("chat", {"messages": [turns[0], {"role": "assistant", "content": parts}]}).answers == ["a\nb"]
    with pytest.raises(BadRow, match="type 'image'"):
        example("chat", {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, turns[1]]})
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert example("chat", {"messages": [turns[0], call]}).answers == [""]


def test_prompt_and_completion_as_turns() -> None:
    old = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    new = [{"role": "assistant", "content": "a"}]
    got = example("chat", {"prompt": old, "completion": new})
    assert [turn.get("train") for turn in got.messages] == [None, False, None, None] and got.answers == ["a"]
    assert example("chat", {"prompt": old}, require_answers=False).messages[-1]["role"] == "user"
    with pytest.raises(BadRow, match="rows: chat"):
        example("completion", {"prompt": old, "completion": new})


@pytest.mark.parametrize(
    "rows, template, place",
    [
        ("instruction", "{context}\n{prompt}", "context"),
        ("completion", "{prompt}\n{input}:", "input"),
        ("choice", "{question}{prompt}", "question"),
    ],
)
def test_a_place_that_no_column_fills(rows: str, template: str, place: str) -> None:
    with pytest.raises(UserError, match=f"no column fills {{{place}}}"):
        resolve_source(Source("f", rows=rows, format=template), SFT())
    resolve_source(Source("f", rows=rows, format=template.replace(f"{{{place}}}", f"{{{{{place}}}}}")), SFT())
    resolve_source(Source("f", rows="instruction", format="{input}{prompt}"), SFT())
