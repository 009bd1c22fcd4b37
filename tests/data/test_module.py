"""TextData: from files to batches, cached, with all problems in one message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from talklora_pl.base import BaseModel
from talklora_pl.data import Source, TextData
from talklora_pl.data.tokens import NO_LOSS
from talklora_pl.errors import UserError
from tests.data.tiny import save_model, tokenizer

Jsonl = Callable[..., str]
QA = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}"} for i in range(20)]
CHOICES = [{"id": f"c{i}", "question": f"q{i}", "choices": ["x"] * (2 + i % 3), "label": i % 2} for i in range(9)]


def data(base: BaseModel, stage: str = "fit", **options: Any) -> TextData:
    module = TextData(base=base, **{"max_length": 100, **options})
    if stage == "fit":
        module.prepare_data()
    module.setup(stage)
    return module


def test_training_batches(base: BaseModel, jsonl: Jsonl) -> None:
    train = data(base, train=jsonl(QA), val_size=0, batch_size=6)
    batches = list(train.train_dataloader())
    assert len(batches) == len(train.train_dataloader()) == 4
    for batch in batches:
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
        assert batch["step_tokens"] == int((batch["labels"][:, 1:] != NO_LOSS).sum())
        assert batch["micro_steps"] == 1
        assert set(batch["task"]) == {"rows"}
        assert bool((batch["labels"] == NO_LOSS).logical_or(batch["attention_mask"] == 1).all())
    assert sorted(i for b in batches for i in b["id"]) == sorted(f"rows-{i}" for i in range(20))
    assert train.val_dataloader() == []


def test_the_last_token_of_every_row_is_a_learned_eos_and_pads_are_never_learned(base: BaseModel, jsonl: Jsonl) -> None:
    for batch in data(base, train=jsonl(QA), batch_size=6).train_dataloader():
        ends = batch["attention_mask"].sum(1) - 1
        assert batch["input_ids"].gather(1, ends[:, None]).eq(257).all()
        assert batch["labels"].gather(1, ends[:, None]).eq(257).all()
        assert batch["labels"][batch["attention_mask"] == 0].eq(NO_LOSS).all()
        assert batch["input_ids"][:, 0].eq(256).all()


CHATS = [
    {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a</s>", "name": "Ann"}],
        "tools": [{"function": {"name": "f"}}],
        "origin": "web",
        "task": "talk",
        "id": i,
        "empty": None,
    }
    for i in range(3)
]


def test_what_is_left_out_is_said_once_for_each_source(
    base: BaseModel, jsonl: Jsonl, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(jsonl(CHATS)).parent)
    for _ in range(2):  # also where the rows come from the cache
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            data(base, train=["rows.jsonl", jsonl(CHATS[:1], "more.jsonl")], val_size=0, rows="chat")
        said = [record.message for record in caplog.records if record.message.startswith("Warning: rows.jsonl")]
        caplog.clear()
        assert len(said) == 4
        for text in (
            "name of a turn is left out",
            "tools are left out",
            "column 'origin' is not used",
            "'</s>', which is",
        ):
            assert [line for line in said if text in line and line.endswith("(3 rows)")]


def test_an_input_that_no_row_fills(base: BaseModel, jsonl: Jsonl) -> None:
    rows = [{"instruction": "i", "output": "o"}]
    with pytest.raises(UserError, match=r"no column fills \{input\}"):
        data(base, train=jsonl(rows), rows="instruction", format="{input}: {prompt}", val_size=0)
    data(
        base,
        train=jsonl([*rows, {**rows[0], "input": "x"}]),
        rows="instruction",
        format="{input}: {prompt}",
        val_size=0,
    )


def test_generation_ends_as_the_format_does(base: BaseModel, jsonl: Jsonl, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    other = save_model(folder)
    tok = tokenizer(chat=str(tokenizer().chat_template).replace("eos_token", "bos_token"))
    tok.save_pretrained(folder)
    assert data(other, train=jsonl(CHATS), val_size=0, rows="chat").eos_id == 256
    assert data(other, train=jsonl(QA), val_size=0).eos_id == 257
    last = data(other, train=jsonl([{"messages": CHATS[0]["messages"] * 2}]), val_size=0, rows="chat", train_on="last")
    (batch,) = last.train_dataloader()
    assert tok.decode([t for t in batch["labels"][0].tolist() if t != NO_LOSS]) == "a</s><s>"


def test_choices_train_on_the_right_one_and_are_all_there_in_evaluation(base: BaseModel, jsonl: Jsonl) -> None:
    rows = [{"question": f"q{i}", "choices": ["no", "yes"], "label": 1} for i in range(4)]
    module = data(base, train=jsonl(rows), val_size=2, format="cloze", batch_size=2, eval_batch_size=4)
    (batch,) = module.train_dataloader()
    learned = [tokenizer().decode([t for t in row.tolist() if t != NO_LOSS]) for row in batch["labels"]]
    assert learned == [" yes</s>"] * 2
    (batch,) = module.val_dataloader()
    assert batch["input_ids"].shape[0] == 4
    assert (batch["group"].tolist(), batch["choice"].tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert (batch["answer"].tolist(), batch["real"].tolist()) == ([1, 1], [True, True])
    assert batch["answers"] == [["no", "yes"]] * 2


def test_validation_split_is_fixed_by_the_seed(base: BaseModel, jsonl: Jsonl) -> None:
    path = jsonl(QA)

    def val_ids(**options: Any) -> list[str]:
        module = data(base, train=path, **options)
        train, val = module.tables["train"]["id"], module.tables["val"]["id"]
        assert sorted([*train, *val]) == sorted(f"rows-{i}" for i in range(20))
        return list(val)

    assert val_ids(val_size=5) == val_ids(val_size=0.25)
    assert val_ids(val_size=5, seed=1) != val_ids(val_size=5)
    module = data(base, "validate", train=path, val_size=5)
    assert list(module.tables["val"]["id"]) == val_ids(val_size=5)
    with pytest.raises(UserError, match="val_size: 20 rows"):
        data(base, train=path, val_size=20)


def test_several_sources_keep_their_tasks(base: BaseModel, jsonl: Jsonl) -> None:
    module = data(
        base,
        train=[Source(jsonl(QA, "sums.jsonl"), limit=3), Source(jsonl(CHOICES, "mc.jsonl"), "quiz", format="cloze")],
        val_size=0,
    )
    assert list(module.tables["train"]["task"]) == ["sums"] * 3 + ["quiz"] * 9
    assert module.tasks == ["quiz", "sums"]


def test_rows_may_name_their_tasks(base: BaseModel, jsonl: Jsonl) -> None:
    path = jsonl([row | {"task": "ab"[i % 2], "skill": "c"} for i, row in enumerate(QA)])
    assert data(base, train=path, val_size=0).tasks == ["a", "b"]
    assert data(base, train=[Source(path, columns={"task": "skill"})], val_size=0).tasks == ["c"]
    assert data(base, train=[Source(path, task="d")], val_size=0).tasks == ["d"]


def test_columns_map_every_field(base: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "nested.jsonl"
    rows = [{"in": f"{i}", "out": "x", "meta": {"uid": 100 + i, "skill": "ab"[i % 2]}} for i in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = {"prompt": "in", "completion": "out", "id": "meta.uid", "task": "meta.skill"}
    table = data(base, train=str(path), columns=columns, val_size=0).tables["train"]
    assert (list(table["id"]), list(table["task"])) == (["100", "101", "102", "103"], ["a", "b", "a", "b"])
    for field, column, near in (("completion", "uot", "'out'"), ("id", "meta.uip", "'meta.uid'")):
        for mode in ("error", "skip"):
            with pytest.raises(UserError, match=f"no row has {column!r}. Did you mean {near}") as error:
                data(base, train=str(path), columns=columns | {field: column}, on_bad_row=mode)
            assert str(error.value).count("\n") == 1 and f"columns: {{{field}: {column}}}" in str(error.value)
    predict = data(base, "predict", predict=str(path), columns=columns | {"completion": "not there yet"})
    assert len(predict.tables["predict"]) == 4


def test_prepared_once(base: BaseModel, jsonl: Jsonl, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(QA)
    first = list(data(base, train=path).tables["train"])
    folders = set(own_cache.rglob("rows.arrow"))
    assert len(folders) == 1
    import talklora_pl.data.prepare as prepare

    monkeypatch.setattr(prepare, "ordered", None)  # a second preparation would fail
    assert list(data(base, train=path).tables["train"]) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache))
    data(base, train=path, max_length=50)
    jsonl([*QA, *QA])
    assert len(data(base, train=path, val_size=0).tables["train"]) == 40


def test_all_problems_in_one_message(base: BaseModel, jsonl: Jsonl, tmp_path: Path) -> None:
    good, bad = jsonl(QA), jsonl([QA[0], {"prompt": "p"}, QA[1], {"prompt": "p", "completion": ""}], "bad.jsonl")
    with pytest.raises(UserError) as error:
        data(base, train=[good, bad, "missing.jsonl", Source(good, format="cloce")])
    message = str(error.value)
    assert f"{bad}, line 2, column 'completion': is missing" in message
    assert f"{bad}, line 4, column 'completion': is empty" in message
    assert "missing.jsonl: there is no such file" in message
    assert "unknown format 'cloce'" in message
    assert "on_bad_row: skip" in message


def test_one_mistake_is_said_once(base: BaseModel, jsonl: Jsonl) -> None:
    path = jsonl([{"in": "p", "out": "x"}] * 24)
    for options in ({}, {"rows": "chat"}, {"on_bad_row": "skip"}):
        with pytest.raises(UserError) as error:
            data(base, train=path, **options)
        _, empty, problem = str(error.value).splitlines()  # and nothing recommends to skip them all
        assert "holds no usable row" in empty
        assert re.search(rf"{path}, lines 1-24 \(24 rows\), column '\w+': is missing", problem)


def test_many_problems_are_counted(base: BaseModel, jsonl: Jsonl) -> None:
    rows = [{"prompt": "p", "completion": "c", "n": 0}, *({"prompt": "p", f"column {i}": 0} for i in range(50))]
    with pytest.raises(UserError, match=r"and 30 problems more\n .*on_bad_row: skip"):
        data(base, train=jsonl(rows))


def test_a_broken_csv_is_never_half_read(base: BaseModel, tmp_path: Path) -> None:
    lines = ["prompt,completion", *(f"{i},x" for i in range(111))]
    lines[11] = '"10,x'
    (tmp_path / "a.csv").write_text("\n".join(lines))
    for mode in ("error", "skip"):
        with pytest.raises(UserError, match=r"a.csv, line 12: .*the rest cannot be read"):
            data(base, train=str(tmp_path / "a.csv"), on_bad_row=mode)


def test_a_fit_looks_for_the_files_of_later_stages(base: BaseModel, jsonl: Jsonl) -> None:
    with pytest.raises(UserError, match=r"nosuch.jsonl: there is no such file"):
        data(base, train=jsonl(QA), test="nosuch.jsonl")


def test_skipping_bad_rows_writes_a_report(
    base: BaseModel, jsonl: Jsonl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("talklora_pl.data.report.rank_zero_info", said.append)
    path = jsonl([*QA, {"prompt": "p"}])
    options: dict[str, Any] = {"on_bad_row": "skip", "val_size": 0}
    for _ in range(2):  # from the cache as well
        report = tmp_path / "out" / "bad.jsonl"
        report.unlink(missing_ok=True)
        module = data(base, train=path, bad_row_report=str(report), **options)
        assert said[-1].startswith(
            f"Warning: 1 bad row was left out; it is listed in {report}. The first: {path}, line"
        )
        assert len(module.tables["train"]) == 20
        (entry,) = map(json.loads, report.read_text().splitlines())
        assert (entry["file"], entry["place"], entry["column"]) == (path, "line 21", "completion")
    with pytest.raises(UserError, match=r"data.bad_row_report: .*cannot be written"):
        data(base, train=path, bad_row_report=str(tmp_path), **options)
    with pytest.raises(UserError, match="holds no usable row"):
        data(base, train=jsonl([{"prompt": "p"}]), on_bad_row="skip")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_length": 129}, "more than the model's context of 128"),
        ({"train": None}, "data.train: there is nothing to fit"),
        ({"train": []}, "data.train: there is nothing to fit"),
    ],
)
def test_options(base: BaseModel, jsonl: Jsonl, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data(base, **{"train": jsonl(QA), **options})


def test_options_and_rows_that_are_wrong_come_in_one_message(base: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": ""}\n{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError) as e:
        TextData(base=base, train=str(path), max_length=9999, batch_size=0).setup("fit")
    for words in ("data.batch_size: 0", "data.max_length: 9999", "line 1, column 'completion': is empty"):
        assert words in str(e.value)


def test_a_cache_that_cannot_be_written(base: BaseModel, jsonl: Jsonl, tmp_path: Path) -> None:
    path = jsonl(QA)
    with pytest.raises(UserError, match=r"data.cache_dir: the prepared rows cannot be kept in .*rows.jsonl"):
        data(base, train=path, cache_dir=path)


def test_what_is_trained_on_is_said(base: BaseModel, jsonl: Jsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("talklora_pl.data.report.rank_zero_info", said.append)
    module = data(base, train=jsonl(QA), val_size=3)
    assert said == ["data.train: rows: 20 rows", "data.val_size: 3 of these 20 rows validate, 17 train"]
    assert (len(module.tables["val"]), len(module.tables["train"])) == (3, 17)


def test_an_empty_file(base: BaseModel, jsonl: Jsonl) -> None:
    with pytest.raises(UserError, match="holds no usable row"):
        data(base, train=jsonl([]))


def test_prediction_needs_no_answers(base: BaseModel, jsonl: Jsonl) -> None:
    module = data(base, "predict", predict=jsonl([{"prompt": "p"}, {"prompt": "longer"}]))
    (batch,) = module.predict_dataloader()
    assert batch["answer"].tolist() == [-1, -1]
    assert batch["labels"].eq(NO_LOSS).all()
    assert batch["prompt_length"].tolist() == batch["attention_mask"].sum(1).tolist() == [7, 2]


def test_classification(base: BaseModel, jsonl: Jsonl, tmp_path: Path) -> None:
    classifier = BaseModel(base.path, task="sequence_classification", num_labels=3)
    rows = [{"text": f"text {i}", "label": "abc"[i % 3]} for i in range(7)]
    names = tmp_path / "labels.json"
    names.write_text('["a", "b", "c"]')
    module = data(classifier, train=jsonl(rows), labels=str(names), val_size=2, batch_size=5)
    (batch,) = module.train_dataloader()
    assert batch["labels"].tolist() == ["abc".index(rows[int(i[5:])]["label"]) for i in batch["id"]]
    assert batch["step_tokens"] == 5
    (batch,) = module.val_dataloader()
    assert torch.equal(batch["labels"], batch["answer"])
    with pytest.raises(UserError, match=r"data.labels: 2 classes, but model.base.num_labels is 3"):
        data(classifier, train=jsonl(rows), labels=["a", "b"])
    with pytest.raises(UserError, match="completion rows do not fit"):
        data(classifier, train=jsonl(QA), rows="completion")
