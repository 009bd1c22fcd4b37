"""A model answers the questions of a task, without its adapter and with it.

Q questions of a batch, C choices.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from talklora_pl.adapter import disable_adapter
from talklora_pl.adapter.hub import adapter_folder
from talklora_pl.adapter.io import load_adapter
from talklora_pl.adapter.metadata import BaseInfo, read_metadata
from talklora_pl.base import BaseModel, describe_base, load_base, load_tokenizer
from talklora_pl.data import Source, TextData
from talklora_pl.errors import UserError
from talklora_pl.evaluation import Evaluation, Generation, predictions
from talklora_pl.inputs import to_device
from talklora_pl.objectives import Objective, choose
from talklora_pl.tasks.task import Task

Records = list[dict[str, Any]]


def load(
    adapter: str | None,
    base: str | None,
    task: str | None,
    dtype: Any = "auto",
    attn_implementation: str | None = None,
    device: str | None = None,
) -> tuple[Any, BaseModel, BaseModel]:
    """A model in eval mode, which base it is, and whose tokenizer belongs to it.

    Args:
        adapter: folder of an adapter or of a run, or repository on the hub; None: the base alone.
        base: its base; None: the one that the adapter remembers.
        task: of the base; None: as the adapter says, else a language model.
        dtype, attn_implementation: of the base.
        device: where it runs; None: a GPU where there is one.

    Raises:
        UserError: one of them cannot be had, or they do not belong together.
    """
    folder = None if adapter is None else adapter_folder(adapter)
    info = BaseInfo() if folder is None else read_metadata(folder).base
    if not (path := base or info.name_or_path):
        raise UserError("evaluate: --base: the adapter does not say which model it belongs to; name it.")
    options: dict[str, Any] = {"task": task or info.task or "causal_lm", "num_labels": info.num_labels}
    options |= {"revision": None if base else info.revision, "resize_embeddings": True}
    model_of = BaseModel(path, dtype=dtype, attn_implementation=attn_implementation, **options)
    own = folder is not None and (folder / "tokenizer_config.json").is_file()  # it may have new tokens
    model = load_base(model_of, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    if folder is not None:
        load_adapter(model, folder)
    return model.eval(), model_of, replace(model_of, path=str(folder), revision=None) if own else model_of


@dataclass
class Answering:
    """How questions are asked.

    Attributes:
        model: with its adapter on, if it has one.
        base: which model that is.
        tokens: whose tokenizer: the base's, or the adapter's own.
        sides: ``base`` and ``adapter``, or one of them.
        ways: ``generation``: an answer is generated and searched for the words of the choices; ``ranking``: the answers
            are ranked by their mean log-likelihood per token; ``cloze``: likewise the texts of the choices themselves,
            after the bare question. A classifier has ``classes``.
        search: how answers are generated.
        format: in the place of the tasks' own.
        batch_size: rows (choices) of a batch.
        max_length: tokens of a row.
    """

    model: Any
    base: BaseModel
    tokens: BaseModel
    sides: Sequence[str]
    ways: Sequence[str]
    search: Evaluation = field(default_factory=Evaluation)
    format: str | None = None
    batch_size: int = 16
    max_length: int | None = None

    def __call__(self, task: Task, way: str, questions: Records) -> Records:
        """A record per question: `id`, `task`, `by`, `label` or `value`, and for each side its `pick` (number of a
        choice, or the value; None: nothing was found), `scores` of the choices, and the `text` that was generated.

        Raises:
            UserError: the questions cannot be asked this way.
        """
        start = time.perf_counter()
        objective = choose(self.base)[1]
        classes = self._classes(task, questions) if way == "classes" else None
        data, cut = self._data(task, way, questions, objective, classes)
        out = [{"id": q["id"], "task": task.name, "by": way} | _right(q) for q in questions]
        generate = None
        if way == "generation":
            options = Evaluation(True, self.search.max_new_tokens, self.search.num_beams, task.pattern)
            facts = describe_base(self.tokens)
            generate = Generation(self.model, load_tokenizer(self.tokens), facts, data.eos_id, options)
        for side in self.sides:
            alone = side == "base" and len(self.sides) > 1
            with torch.no_grad(), disable_adapter(self.model) if alone else nullcontext():
                for batch in data.test_dataloader():
                    scored = objective.score(self.model, to_device(batch, self.model.device), generate)
                    for found in predictions(scored, batch):
                        question, record = questions[found["index"]], out[found["index"]]
                        if classes:
                            found["choice"] = classes.choice[found["choice"]]
                            found["scores"] = [
                                found["scores"][classes.choice.index(i)] for i in range(len(classes.choice))
                            ]
                        record[side] = _pick(task, question, found)
        seconds = time.perf_counter() - start
        print(f"{task.name} by {way}: {len(questions)} questions, {seconds:.1f} s{cut}", file=sys.stderr, flush=True)
        return out

    def _data(
        self, task: Task, way: str, questions: Records, objective: Objective, classes: Classes | None
    ) -> tuple[TextData, str]:
        """The data, and what was cut of them, for people."""
        rows: Records
        kind, format = "choice", self.format or task.format
        if way == "generation":
            kind, rows = "instruction", [{k: q[k] for k in ("id", "instruction", "output")} for q in questions]
        elif classes:
            kind, format, rows = "classification", "plain", classes.rows
        else:
            prompt, answers = ("instruction", "outputs") if way == "ranking" else ("question", "choices")
            format = "cloze" if way == "cloze" else format
            rows = [
                {"id": q["id"], "question": q[prompt], "choices": q[answers], "label": q.get("label", 0)}
                for q in questions
            ]
        data = TextData(
            test=[Source(rows, task=task.name, rows=kind, format=format)],
            labels=classes and classes.names,
            eval_batch_size=self.batch_size,
            max_length=self.max_length,
            base=self.tokens,
            objective=objective,
        )
        (done,) = data.prepared("test")["test"]
        data.setup("test")
        cut = f"; {done.cut_rows} prompts lost {done.cut_tokens} tokens (--max_length)" if done.cut_rows else ""
        return data, cut

    def _classes(self, task: Task, questions: Records) -> Classes:
        if task.text is None:
            raise UserError(f"task {task.name}: no entry says what text a classifier reads.")
        config = self.model.config
        choices = questions[0]["choices"]
        names = [config.id2label[i] for i in range(config.num_labels)]
        plain = {name.replace("_", " ").casefold(): name for name in names}  # the hub's are often upper case
        named = set(choices) == set(plain)
        order = [choices.index(name) for name in plain] if named else list(range(len(choices)))
        if config.num_labels != len(choices):
            raise UserError(
                f"task {task.name}: it has {len(choices)} classes, and the classifier {config.num_labels}: it was "
                "trained for another."
            )
        rows = [
            {key: q[key] for key in ("id", "text", "text_pair") if key in q}
            | {"label": plain[choices[q["label"]]] if named else q["label"]}
            for q in questions
        ]
        return Classes(rows, names if named else None, order)


class Classes(NamedTuple):
    """Rows for a classifier.

    Attributes:
        names: of its classes, where they are those of the task; None: they are its choices by number.
        choice: which choice of the task each of its classes is.
    """

    rows: Records
    names: list[str] | None
    choice: list[int]


def _right(question: dict[str, Any]) -> dict[str, Any]:
    return {key: question[key] for key in ("label", "value") if key in question}


def _number(word: str | None) -> float | None:
    try:
        return None if word is None else float(word)
    except ValueError:
        return None  # the pattern finds more than numbers


def _pick(task: Task, question: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {key: found[key] for key in ("text", "scores") if key in found}
    if "text" in found:
        word = task.word(found["text"])
        if task.value is not None:
            pick: Any = _number(word)
        else:
            words = [task.word(output) for output in question["outputs"]]
            pick = words.index(word) if word in words and word is not None else None
    else:
        pick = found["choice"]
        if task.value is not None:
            pick = float(question["choices"][pick])
    return {"pick": pick, **out}
