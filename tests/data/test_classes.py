"""Classes without a map to be typed: from the training data, kept in checkpoints and exported folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from talklora_pl.base import BaseModel
from talklora_pl.data import Source, TextData
from talklora_pl.data.classes import Classes, collect
from talklora_pl.errors import UserError
from talklora_pl.objectives.classification import Classification

Jsonl = Callable[..., str]


def rows(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def found(*labels: Any, **options: Any) -> Classes | None:
    return collect([Source(rows(*labels))], Classification(), **options)


@pytest.mark.parametrize(
    "labels, names",
    [
        (["spam", "ham", "spam"], ["ham", "spam"]),
        ([1, 0, 2, 0], []),
        (["1", "0"], []),  # as a CSV file has them
        ([1.0, 0.0], []),
        ([True, False], ["False", "True"]),
        ([5, 1, 10], ["1", "5", "10"]),
        ([-1, 1], ["-1", "1"]),
        (["01", "1"], ["01", "1"]),
        (["x", None, "", "y"], ["x", "y"]),
        (["x", 1], ["1", "x"]),
    ],
)
def test_names_are_sorted_and_numbers_from_0_are_classes_as_they_are(labels: list[Any], names: list[str]) -> None:
    count = len({str(label) for label in labels if label not in (None, "")})
    assert found(*labels) == found(*reversed(labels)) == Classes(count, names)


def test_no_labels() -> None:
    assert found(None, "") is None
    assert collect([Source([{"text": "t"}]), Source("missing.jsonl")], Classification()) is None


def test_one_class_is_nothing_to_learn() -> None:
    with pytest.raises(UserError, match=r"data.train: every row has the label 'a'"):
        found("a", "a")


def test_the_number_that_the_user_wants() -> None:
    assert found(0, 2, num_labels=5) == Classes(5, [])
    assert found(1, 2, 3, num_labels=3) == Classes(3, ["1", "2", "3"])
    with pytest.raises(UserError, match=r"num_labels: 3, but the training data have 2 classes \(a, b\)\. Leave it out"):
        found("a", "b", num_labels=3)


def test_classes_that_the_base_has_already_keep_their_order() -> None:
    assert found("a", "c", known=["c", "b", "a"]) == Classes(3, ["c", "b", "a"])
    assert found("a", "d", known=["c", "b", "a"]) == Classes(2, ["a", "d"])


def test_classes_of_datasets() -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "b", "a"])}
    )
    dataset = datasets.Dataset.from_list(rows(0, 2, -1), features=features)
    assert collect([Source(dataset)], Classification()) == Classes(3, ["z", "b", "a"])
    assert collect([Source(dataset.to_iterable_dataset())], Classification()) == Classes(3, ["z", "b", "a"])
    assert collect([Source(dataset), Source(rows("c"))], Classification()) == Classes(3, ["a", "c", "z"])


# -- in the module


def data(base: BaseModel, stage: str = "fit", **options: Any) -> TextData:
    module = TextData(base=base, **{"max_length": 100, "val_size": 0, **options})
    if stage == "fit":
        module.prepare_data()
    module.setup(stage)
    return module


@pytest.fixture
def classifier(base: BaseModel) -> BaseModel:
    return BaseModel(base.path, task="sequence_classification")


def test_words_become_classes(classifier: BaseModel, jsonl: Jsonl, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("talklora_pl.data.report.rank_zero_info", said.append)
    module = data(classifier, train=jsonl(rows("no", "yes", "maybe")), val=jsonl(rows("yes"), "val.jsonl"))
    assert list(module.tables["train"]["label"]) == [1, 2, 0] and list(module.tables["val"]["label"]) == [2]
    assert (module.num_classes, module.class_names) == (3, ["maybe", "no", "yes"])
    assert "data.labels: 3 classes: maybe, no, yes" in said
    (batch,) = module.val_dataloader()
    assert batch["answers"] == [["maybe", "no", "yes"]]


@pytest.mark.parametrize("label", ["eggs", 1, 0])
def test_a_label_that_training_lacks_is_refused_by_name(classifier: BaseModel, jsonl: Jsonl, label: Any) -> None:
    val = jsonl(rows("spam", label), "val.jsonl")
    message = rf"val.jsonl, line 2, column 'label': {label!r} is none of the classes of the training data: ham, spam"
    with pytest.raises(UserError, match=message):
        data(classifier, train=jsonl(rows("spam", "ham")), val=val)


def test_numbers_that_do_not_begin_at_0(classifier: BaseModel, jsonl: Jsonl) -> None:
    module = data(classifier, train=jsonl(rows(5, 1, 3, 3)))
    assert (list(module.tables["train"]["label"]), module.class_names) == ([2, 0, 1, 1], ["1", "3", "5"])
    with pytest.raises(UserError, match="2 is none of the classes of the training data: 1, 3, 5"):
        data(classifier, train=jsonl(rows(5, 1, 3)), val=jsonl(rows(2), "val.jsonl"))


def test_class_labels_meet_the_names_that_the_user_lists(classifier: BaseModel) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    dataset = datasets.Dataset.from_list(rows(0, 1), features=features)
    assert list(data(classifier, train=dataset).tables["train"]["label"]) == [0, 1]
    assert list(data(classifier, train=dataset, labels=["pos", "neg"]).tables["train"]["label"]) == [1, 0]


def test_a_run_keeps_its_classes(classifier: BaseModel, tmp_path: Path) -> None:
    """From words to a checkpoint, an exported folder and predictions, without the training data."""
    import json

    import lightning as L
    from transformers import AutoConfig

    from talklora_pl import FineTuner
    from talklora_pl.adapter import AdapterConfig
    from talklora_pl.export.run import export_checkpoint

    def trainer(**options: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        return L.Trainer(default_root_dir=tmp_path, **quiet | options)

    tuner = FineTuner(classifier, AdapterConfig(rank=8))
    fit = trainer(max_steps=1, enable_checkpointing=False)
    fit.fit(tuner, datamodule=TextData(rows("b", "c", "a", "b"), val_size=0, batch_size=4))
    assert tuner.base.num_labels == tuner.model.config.num_labels == 3
    path = tmp_path / "run.ckpt"
    fit.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["talklora"]["base"]["num_labels"] == 3
    assert checkpoint["TextData"] == {"num_classes": 3, "class_names": ["a", "b", "c"]}

    again = FineTuner(replace(classifier, num_labels=3), AdapterConfig(rank=8))
    asked = TextData(predict=[{"text": "text 1"}])
    trainer().predict(again, datamodule=asked, ckpt_path=str(path))
    (record,) = map(json.loads, (tmp_path / "predictions.jsonl").read_text().splitlines())
    assert record["answer"] == "abc"[record["choice"]] and len(record["scores"]) == 3

    other = TextData(rows("x", "y", "z"), val_size=0, base=classifier)
    other.setup("fit")
    with pytest.raises(UserError, match=r"the checkpoint's classes are a, b, c; those of .* are x, y, z"):
        other.load_state_dict(checkpoint["TextData"])

    folder = export_checkpoint(path, tmp_path / "adapter")
    assert AutoConfig.from_pretrained(folder).id2label == {0: "a", 1: "b", 2: "c"}
