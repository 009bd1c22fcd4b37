"""Rows of the hub become the published prompts and answers; files of tasks that are wrong are one clear message."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from talklora_pl.cli import main
from talklora_pl.errors import UserError
from talklora_pl.shipped import shipped_configs
from talklora_pl.tasks.answer import _pick
from talklora_pl.tasks.scores import measure
from talklora_pl.tasks.task import read_file, read_tasks
from tests.tasks import hub

# LLM-Adapters' form of the rows of hub.py: prompt, output, answer
PUBLISHED = {
    "boolq": (
        "Please answer the following question with true or false, question: is the moon a star?\n\n"
        "Answer format: true/false",
        "false",
    ),
    "piqa": (
        "Please choose the correct solution to the question: cool soup\n\nSolution1: blow on it\n\n"
        "Solution2: heat it\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    "social_i_qa": (
        "Please choose the correct answer to the question: Ann fell. What next?\n\nAnswer1: she flew "
        "Answer2: she got up Answer3: she sang\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Baking: A man kneads. he\n\nEnding1: sings. "
        "Ending2: bakes. Ending3: flies. Ending4: melts.\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending2",
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: The cup fell "
        "off the desk as the _ was small.\n\nOption1: cup Option2: desk Answer format: option1/option2",
        "option2",
    ),
    "arc_easy": (
        "Please choose the correct answer to the question: What is cold?\n\nAnswer1: ice Answer2: steam\n\n"
        "Answer format: answer1/answer2",
        "answer1",
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: Books stand\n\nAnswer1: on a shelf Answer2: in the sea "
        "Answer3: in a nest\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    ),
    "csqa": (
        "Please choose the correct answer to the question: Whales live?\n\nAnswer1: on a shelf Answer2: in the sea "
        "Answer3: in a nest\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(hub.write(tmp_path_factory.mktemp("hub")))


def test_prompts_and_answers_are_the_published_ones(data: str) -> None:
    for name, (prompt, answer) in PUBLISHED.items():
        (task,) = read_tasks(name)
        question = task.questions(task.split, data)[-1]
        assert question["instruction"] == prompt
        assert (question["output"], question["answer"]) == (f"the correct answer is {answer}", answer)
        assert question["outputs"][question["label"]] == question["output"]
        # the paper's rule finds every word in the answer that holds it
        assert [task.word(output) for output in question["outputs"]] == question["words"]


def test_a_suite_is_its_tasks() -> None:
    eight = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    assert [task.name for task in read_tasks("commonsense")] == eight
    assert [task.name for task in read_tasks("csqa, rte")] == ["csqa", "rte"]
    assert {task.metrics[0] for task in read_tasks("glue")} == {"accuracy", "matthews", "pearson"}


def test_every_shipped_task_names_a_data_set_and_its_words_are_found() -> None:
    for file in (shipped_configs() / "tasks").glob("*.yaml"):
        for task in read_file(file).values():
            assert task.path.count("/") == 1
            assert task.split != task.train


@pytest.mark.parametrize(
    ("generated", "pick"),
    [
        ("the correct answer is answer2", 1),
        ("answer3, not answer1", 2),  # the first counts
        ("Answer2", None),  # as published: in lower case
        ("answer5", None),  # no choice of this question
        ("", None),
    ],
)
def test_the_first_word_of_an_answer_counts(generated: str, pick: int | None, data: str) -> None:
    (task,) = read_tasks("csqa")
    (question,) = task.questions("validation", data)
    assert _pick(task, question, {"text": generated, "scores": [0.0]})["pick"] == pick


def test_metrics() -> None:
    def of(name: str, pairs: list[tuple[float | None, float]]) -> dict[str, float]:
        (task,) = read_tasks(name)
        key = "label" if task.value is None else "value"
        return measure(task, [{key: right, "base": {"pick": pick}} for pick, right in pairs], "base")

    # 3 true positives, 1 false positive, 2 false negatives (one of them unanswered), 2 true negatives
    pairs = [(1, 1), (1, 1), (1, 1), (1, 0), (0, 1), (None, 1), (0, 0), (0, 0)]
    assert of("mrpc", pairs) == pytest.approx({"accuracy": 5 / 8, "f1": 6 / 9, "unanswered": 1 / 8})
    assert of("cola", pairs)["matthews"] == pytest.approx((3 * 2 - 1 * 2) / (4 * 4 * 5 * 3) ** 0.5)
    assert of("mnli", [(2, 2), (None, 0), (None, 2), (1, 0)])["accuracy"] == 0.25
    found = of("stsb", [(1.0, 0.0), (2.0, 1.0), (4.0, 5.0), (3.0, 2.0)])
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(8 / (5 * 14) ** 0.5)
    assert of("stsb", [(1.0, 0.0), (1.0, 5.0)])["pearson"] == 0.0


def test_a_value_is_read_from_an_answer() -> None:
    (task,) = read_tasks("stsb")
    question = {"choices": ["0", "1", "2", "3", "4", "5"]}
    assert _pick(task, question, {"text": "about 3.8 of 5"})["pick"] == 3.8
    assert _pick(task, question, {"choice": 4, "scores": [0.0] * 6})["pick"] == 4.0
    object.__setattr__(task, "pattern", "[a-z]+")
    assert _pick(task, question, {"text": "about 3.8 of 5"})["pick"] is None


GOOD = {
    "path": "a/b",
    "question": "q",
    "choices": "c",
    "label": "l",
    "prompt": "{{ question }}",
    "words": "{{ choice }}",
    "pattern": "x",
}


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("pattren", "x", "no entry 'pattren'. Did you mean 'pattern'"),
        ("question", None, "question is missing"),
        ("pattern", "(", "no regular expression"),
        ("metrics", ["acuracy"], "no 'acuracy'. Did you mean 'accuracy'?"),
        ("metrics", [], "name at least one"),
        ("metrics", ["pearson"], "pearson is for answers with a value"),
        ("value", "v", "a label or a value, and not both"),
        ("prompt", "{{ question", "prompt: "),
        ("choices", "[a,", "choices: "),
        ("format", "alpacca", "no format. Did you mean 'alpaca'?"),
        ("label", 1, "label: 1 must be text"),
    ],
)
def test_a_wrong_entry_is_named(entry: str, value: object, message: str, tmp_path: Path) -> None:
    import yaml

    content = {k: v for k, v in (GOOD | {entry: value}).items() if v is not None}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"mine": content}))
    with pytest.raises(UserError) as e:
        read_tasks(str(tmp_path / "mine.yaml"))
    assert message in str(e.value) and "mine" in str(e.value)


def test_what_is_not_there_is_said_before_any_weights(data: str) -> None:
    with pytest.raises(UserError, match="no task 'bolq'"):
        read_tasks("bolq")
    with pytest.raises(UserError, match="hf download nyu-mll/glue"):
        read_tasks("rte")[0].questions("validation", str(Path(data) / "empty"))
    (task,) = read_tasks("csqa")
    object.__setattr__(task, "label", "answer")
    with pytest.raises(UserError, match=r"row 1 .*columns .*answerKey.*task csqa: label: 'answer' is undefined"):
        task.questions("validation", data)
    object.__setattr__(task, "label", "7")
    with pytest.raises(UserError, match="label: 7 is none of 3 choices"):
        task.questions("validation", data)


def test_a_task_is_no_program(data: str) -> None:
    (task,) = read_tasks("csqa")
    object.__setattr__(task, "question", "question.__class__.__mro__")
    with pytest.raises(UserError, match="unsafe"):
        task.questions("validation", data)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("prompt", "{{ 1 / 0 }}", "prompt: division by zero"),
        ("prompt", "{{ range(10000000) }}", "prompt: Range too big"),
        ("prompt", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "prompt: maximum recursion"),
        ("choices", "none", "choices: None is no list of texts"),
        ("choices", "q", "choices: 'why' is no list of texts"),
        ("choices", "[1, 2]", r"choices: \[1, 2\] is no list of texts"),
        ("metrics", ["f1"], "f1 is for two choices, not 3"),
        ("value", "q", "value: could not convert string to float: 'why'"),
    ],
)
def test_a_row_that_an_entry_does_not_fit_is_one_message(
    entry: str, value: object, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/test.jsonl").write_text('{"q": "why", "c": ["1", "2", "3"], "l": 0}\n')
    content = GOOD | {entry: value}
    if entry == "value":
        content = {k: v for k, v in content.items() if k != "label"} | {"metrics": ["pearson"]}
    (tmp_path / "mine.yaml").write_text(json.dumps({"mine": content}))
    (task,) = read_tasks(str(tmp_path / "mine.yaml"))
    with pytest.raises(UserError, match=message):
        task.questions("test", str(tmp_path))


def test_the_name_of_a_task_is_no_way_out_of_the_folder(tmp_path: Path) -> None:
    for name in ("../../elsewhere", "/tmp/elsewhere", ".."):
        (tmp_path / "mine.yaml").write_text(json.dumps({name: GOOD}))
        with pytest.raises(UserError, match="a folder of that name"):
            read_tasks(str(tmp_path / "mine.yaml"))


def test_a_task_of_your_own_as_the_page_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs/evaluate.md").read_text("utf-8")
    (entry,) = re.findall(r"```yaml\n(# mine\.yaml\n.*?)```", page, flags=re.S)
    (tmp_path / "mine.yaml").write_text(entry)
    (tmp_path / "me/colours").mkdir(parents=True)
    row = {"question": "Colour of grass?", "first": "green", "second": "red", "answer": "0"}
    (tmp_path / "me/colours/train.jsonl").write_text(json.dumps(row) + "\n")
    argv = [
        "data",
        "write",
        "--tasks",
        str(tmp_path / "mine.yaml"),
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "rows"),
    ]
    assert main(argv) == 0
    assert "colours/train.jsonl: 1 rows" in capsys.readouterr().out
    (written,) = (tmp_path / "rows/colours/train.jsonl").read_text().splitlines()
    asked = json.loads(written)
    assert (asked["instruction"], asked["answer"]) == ("Colour of grass?\n1: green 2: red", "1")
