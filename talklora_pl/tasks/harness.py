"""lm-evaluation-harness in this process, on a model without its adapter and with it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from talklora_pl.adapter import disable_adapter
from talklora_pl.errors import UserError


def find_tasks(tasks: Sequence[str], include: str | None = None) -> Any:
    """lm-eval's manager of tasks, which knows these.

    Args:
        tasks: names of lm-eval's tasks, groups or tags.
        include: folder of further tasks, as ``lm_eval --include_path``.

    Raises:
        UserError: lm-eval is not installed, or has no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--harness needs the package lm-eval: pip install 'talklora-pl[eval]'.")
    if include is not None and not Path(include).is_dir():
        raise UserError(f"--harness_include: there is no folder {include!r}.")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise UserError(f"--harness: lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists those it has.")
    return manager


def run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    sides: Sequence[str],
    *,
    manager: Any = None,
    batch_size: int = 16,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> tuple[dict[str, dict[str, dict[str, float]]], list[dict[str, Any]]]:
    """Scores by task and side, and lm-eval's samples (answers of each question), with `task` and `side`.

    Args:
        model: with its adapter on, if it has one; its attention as ``from_pretrained`` gives it, so that the last
            digits are those of lm-eval's own command line.
        tokenizer: of the model.
        tasks: names of lm-eval's tasks.
        sides: ``base`` and ``adapter``, or one of them.
        manager: of :func:`find_tasks`.
        batch_size: rows of a batch.
        limit: of each task, the first so many questions.
        num_fewshot: solved examples before each question; None: as the task says.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    samples: list[dict[str, Any]] = []
    for side in sides:
        alone = side == "base" and len(sides) > 1
        with disable_adapter(model) if alone else nullcontext():
            found: Any = lm_eval.simple_evaluate(
                lm, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=num_fewshot
            )
        for task, values in found["results"].items():
            own = {key.removesuffix(",none"): v for key, v in values.items() if isinstance(v, float)}
            scores.setdefault(task, {})[side] = own
            questions = found["n-samples"].get(task, {}).get("effective")
            if questions:
                scores[task].setdefault("questions", questions)
        for task, rows in found["samples"].items():
            samples += [{"task": task, "side": side, **json.loads(json.dumps(row, default=str))} for row in rows]
    return scores, samples
