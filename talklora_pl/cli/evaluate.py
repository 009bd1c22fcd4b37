"""``python -m talklora_pl evaluate``: a base and an adapter on benchmarks, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from talklora_pl.cli.parse import parse
from talklora_pl.errors import UserError

if TYPE_CHECKING:
    from talklora_pl.tasks.task import Task

WAYS = ("generation", "ranking", "cloze")
SCORES, PREDICTIONS, SAMPLES = "scores.json", "predictions.jsonl", "harness_samples.jsonl"


def evaluate(
    adapter: str | None = None,
    base: str | None = None,
    tasks: str | None = None,
    by: str | None = None,
    harness: str | None = None,
    harness_include: str | None = None,
    num_fewshot: int | None = None,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    out: str = "evaluation",
    format: str | None = None,
    num_beams: int = 4,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    max_length: int | None = None,
    task: Literal["causal_lm", "sequence_classification"] | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    attn_implementation: str | None = None,
    device: str | None = None,
    plugins: list[str] | str = (),  # type: ignore[assignment]
) -> None:
    """Score an adapter beside its base, or a base alone, on benchmarks.

    Args:
        adapter: folder of the adapter, folder of a run, or repository on the hub; without it the base alone.
        base: hub name, folder, .gguf file or package:NAME/FILE; by default the one that the adapter remembers.
        tasks: with commas between: commonsense (eight tasks), glue, names of single tasks, or YAML files of your own.
        by: with commas between: generation, ranking, cloze (docs/evaluate.md); by default generation,ranking.
        harness: with commas between: tasks of lm-evaluation-harness, which then asks and scores itself.
        harness_include: folder of further tasks for it.
        num_fewshot: solved examples that it puts before each question; by default as its task says.
        data: folder that holds the data sets under their hub names, for machines without the hub.
        split: in the place of the tasks' own.
        limit: of each task, the first so many questions.
        out: folder for scores.json and predictions.jsonl.
        format: how questions are written, in the place of the tasks' own: plain, alpaca, chat, or a text with {prompt}.
        num_beams: of generation; 1 is greedy.
        max_new_tokens: of generation.
        batch_size: rows (choices) of a batch.
        max_length: tokens of a row; by default 512, or what the model reads if that is less.
        task: what a base without an adapter is.
        dtype: of the frozen weights.
        attn_implementation: of the base; by default as in training, with --harness as transformers has it.
        device: where to run; by default a GPU where there is one.
        plugins: modules or .py files with components of your own that the adapter uses.
    """
    if adapter is None and base is None:
        raise UserError("evaluate: what? --adapter FOLDER, --base MODEL, or both.")
    if tasks is None and harness is None:
        raise UserError("evaluate: on what? --tasks commonsense, or --harness TASKS for those of lm-eval.")
    counts = {"limit": limit, "batch_size": batch_size, "num_beams": num_beams, "max_new_tokens": max_new_tokens}
    for name, number in {**counts, "max_length": max_length}.items():
        if number is not None and number < 1:
            raise UserError(f"evaluate: --{name} {number} is less than 1.")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"evaluate: --num_fewshot {num_fewshot} is less than 0.")
    ways = [way.strip() for way in (by or "generation,ranking").split(",")]
    if wrong := [way for way in ways if way not in WAYS]:
        raise UserError(f"evaluate: --by: {wrong[0]!r} is none of {', '.join(WAYS)}.")
    folder = Path(out)
    if (folder / SCORES).exists():
        raise UserError(f"evaluate: {folder / SCORES} is there already; name another folder with --out.")

    if folder.exists() and not folder.is_dir():
        raise UserError(f"evaluate: --out: {folder} is a file; name a folder.")

    from talklora_pl.tasks.task import read_tasks

    names, manager = [name.strip() for name in (harness or "").split(",")], None
    if harness is not None:
        from talklora_pl.tasks.harness import find_tasks

        manager = find_tasks(names, harness_include)
    chosen = read_tasks(tasks) if tasks is not None else []
    asked = {t.name: t.questions(split or t.split, data, limit) for t in chosen}  # before the weights are read

    from talklora_pl.evaluation import Evaluation
    from talklora_pl.registry import import_plugins
    from talklora_pl.tasks.answer import Answering, load

    import_plugins(plugins)
    attention = attn_implementation or ("sdpa" if harness is not None else None)
    model, base_model, tokens = load(adapter, base, task, dtype, attention, device)
    sides = ["base", "adapter"] if adapter is not None else ["base"]
    if base_model.head.classifies:
        if by or harness:
            raise UserError("evaluate: a classifier is asked for classes alone: leave out --by and --harness.")
        # the base's head is new where the adapter's is trained
        ways, sides = ["classes"], sides[-1:]
    search = Evaluation(max_new_tokens=max_new_tokens, num_beams=num_beams)
    ask = Answering(model, base_model, tokens, sides, ways, search, format, batch_size, max_length)
    result: dict[str, Any] = {
        "adapter": adapter,
        "base": base_model.path,
        "options": {"split": split, "limit": limit, "format": format, "num_beams": num_beams, "dtype": str(model.dtype)}
        | {"max_new_tokens": max_new_tokens, "max_length": max_length, "num_fewshot": num_fewshot},
    }
    folder.mkdir(parents=True, exist_ok=True)
    if chosen:
        result |= _answer(ask, chosen, asked, folder)
    if harness is not None:
        from talklora_pl.base import load_tokenizer
        from talklora_pl.evaluation import write_lines
        from talklora_pl.tasks.harness import run

        options: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "num_fewshot": num_fewshot}
        found, samples = run(model, load_tokenizer(tokens), names, sides, manager=manager, **options)
        result["harness"] = found
        write_lines(folder / SAMPLES, samples)
    (folder / SCORES).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _show(result, chosen, sides, folder)


def _answer(ask: Any, tasks: list[Task], asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Scores by task and way of asking, and their means; predictions are written task by task."""
    from talklora_pl.tasks.scores import means, measure

    found: dict[str, Any] = {}
    with (folder / PREDICTIONS).open("w", encoding="utf-8") as file:
        for task in tasks:
            for way in ask.ways:
                records = ask(task, way, asked[task.name])
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                file.flush()
                scores = {side: measure(task, records, side) for side in ask.sides}
                found.setdefault(task.name, {})[way] = {"questions": len(records), **scores}
    return {"tasks": found, "mean": means(found, tasks)}


def _show(result: dict[str, Any], tasks: list[Task], sides: list[str], folder: Path) -> None:
    import rich

    from talklora_pl.tasks.scores import table

    rows: list[Any] = []
    for task in tasks:
        for way, entry in result["tasks"][task.name].items():
            for metric in task.metrics:
                scores = {side: entry[side][metric] for side in sides}
                rows.append((task.name, way, str(entry["questions"]), metric, scores))
    if len(tasks) > 1:
        rows += [("mean", way, "", "", scores) for way, scores in result["mean"].items()]
    for name, entry in result.get("harness", {}).items():
        for metric in entry[sides[-1]]:
            if "stderr" not in metric:
                scores = {side: entry[side][metric] for side in sides}
                rows.append((name, "lm-eval", str(entry.get("questions", "")), metric, scores))
    rich.print(table(rows, sides), f"Scores: {folder / SCORES}", sep="\n")
    asked = [(e["questions"], e[sides[-1]]["unanswered"]) for t in result.get("tasks", {}).values() for e in t.values()]
    if lost := round(sum(questions * share for questions, share in asked)):
        print(
            f"In {lost} answers of the {sides[-1]} none of the task's words was found; they count as wrong "
            f"(per task: unanswered in {SCORES})."
        )


def main(verb: str, argv: list[str]) -> None:
    """The verb."""
    evaluate(**parse(verb, evaluate, argv))
