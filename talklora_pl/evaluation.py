"""Scores: multiple choice by ranking, classification, exact match by generation; per task and their mean.

B rows, S tokens, Q questions, C choices, N positions whose token is scored, V vocabulary, T tasks.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from talklora_pl.base.description import Description
from talklora_pl.durable import write_whole
from talklora_pl.errors import UserError
from talklora_pl.inputs import NO_LOSS, labelled, masked, model_inputs, to_device
from talklora_pl.pieces import label_nll
from talklora_pl.shared_prefix import runs_trees, shared_nll

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import GenerationConfig


@dataclass(frozen=True)
class Evaluation:
    """How answers are scored.

    Attributes:
        compare_base: `test` shows the base model's own scores beside the adapter's.
        max_new_tokens: of a generated answer (rows without choices, in `test` and `predict`); 0: generate nothing.
        num_beams: beams of the search; 1 is greedy.
        generation: `greedy` goes by these options alone, whatever the base's generation_config says; `base` takes that
            for the rest (sampling, temperature, penalties, suppressed tokens).
        answer_pattern: regular expression; a generated answer is right if its first match equals the first match in the
            right answer. None: the whole texts must be equal, white space around them aside.
    """

    compare_base: bool = True
    max_new_tokens: int = 32
    num_beams: int = 1
    answer_pattern: str | None = None
    generation: Literal["greedy", "base"] = "greedy"

    def __post_init__(self) -> None:
        """Raises: UserError for an option that no test could use."""
        for name, least in (("max_new_tokens", 0), ("num_beams", 1)):
            if getattr(self, name) < least:
                raise UserError(f"model.evaluation.{name}: {getattr(self, name)} is less than {least}.")
        try:
            re.compile(self.answer_pattern or "")
        except re.error as e:
            raise UserError(
                f"model.evaluation.answer_pattern: {self.answer_pattern!r} is no regular expression: {e}."
            ) from None


def row_nll(nll_N: Tensor, row_N: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of each row and how many these are, both (B,)."""
    sum_B = nll_N.new_zeros(rows).index_add_(0, row_N, nll_N)
    return sum_B, nll_N.new_zeros(rows).index_add_(0, row_N, torch.ones_like(nll_N))


def choice_scores(nll_B: Tensor, tokens_B: Tensor, group_B: Tensor, choice_B: Tensor) -> Tensor:
    """Mean log-likelihood per token of every choice, (Q, C); minus infinity where a question has fewer choices.

    The mean (not the sum) makes long answers comparable with short ones.
    """
    questions, choices = int(group_B.max()) + 1, int(choice_B.max()) + 1
    scores_QC = nll_B.new_full((questions, choices), -math.inf)
    scores_QC[group_B, choice_B] = -nll_B / tokens_B.clamp(min=1)
    return scores_QC


def exact_match(output: str, answer: str, pattern: str | None = None) -> bool:
    """Whether a generated text is the right answer, see :class:`Evaluation`. A text without a match is wrong."""
    if pattern is None:
        return output.strip() == answer.strip()
    found, wanted = re.search(pattern, output), re.search(pattern, answer)
    return found is not None and wanted is not None and found[0] == wanted[0]


@dataclass
class BatchScores:
    """What one evaluation batch gave, per question.

    Attributes:
        nll_Q, tokens_Q: summed loss and what it is averaged over: negative log-likelihood of the right answer and its
            tokens; both 0 where a question does not count or its answer is unknown.
        scores_QC: of the choices (or classes); a question with one answer has one.
        ranked_Q, generated_Q: by which of the two a question is judged; neither, where its answer is unknown.
        right_Q: whether it was answered rightly.
        texts: generated answers, each with the mean log-likelihood of its tokens; None where choices were ranked, or
            nothing was generated. Empty: nothing was generated at all.
    """

    nll_Q: Tensor
    tokens_Q: Tensor
    scores_QC: Tensor
    ranked_Q: Tensor
    generated_Q: Tensor
    right_Q: Tensor
    texts: list[tuple[str, float] | None] = field(default_factory=list)


@dataclass
class Generation:
    """Continues prompts until a token that ends the text.

    Attributes:
        model: as it is now, adapter on or off.
        tokenizer: the base's.
        facts: of the base.
        eos_id: the token that ends an answer, beside those of the base.
        options: how to search, and what a right answer is.
        any_rank: whether something holds here or on any of the ranks that share a sharded model; None: none do.
    """

    model: Any
    tokenizer: Any
    facts: Description
    eos_id: int
    options: Evaluation
    any_rank: Callable[[bool], bool] | None = None

    def __call__(self, prompts: Sequence[Tensor]) -> list[tuple[str, float]]:
        """Args:
            prompts: token ids, each of shape (S,).

        Returns:
            each text and the mean log-likelihood of its tokens, its end among them: what choices are ranked by.
        """
        device, pad = prompts[0].device, self.facts.pad_id
        new = self.options.max_new_tokens
        if self.facts.positions is not None:
            new = min(new, max(1, self.facts.positions - max(map(len, prompts))))
            prompts = [ids[max(0, len(ids) + new - self.facts.positions) :] for ids in prompts]
            if new < self.options.max_new_tokens:
                _say_cut(self.facts.positions, self.options.max_new_tokens)
        asked = [ids.tolist() for ids in prompts]
        left = to_device(masked(asked, pad, left=True), device)  # all end alike
        ends = {self.eos_id, *self.facts.eos_ids}
        config = self._config(new, sorted(ends))
        before, self.model.generation_config = self.model.generation_config, config  # it fills what ours leaves open
        # the last position of a prompt is a slice, for which PyTorch copies a head without gradients once per row
        whole = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: (args[0].contiguous(), *args[1:])
        )
        try:
            out = self.model.generate(
                **model_inputs(left),
                generation_config=config,
                tokenizer=self.tokenizer,
                # ranks that share a sharded model must take equally many steps
                synced_gpus=self.any_rank is not None,
            )
        finally:
            self.model.generation_config = before
            whole.remove()
        width = left["input_ids"].shape[1]
        answers = [_until(ends, ids) for ids in out[:, width:].tolist()]
        rows = [before + answer for before, answer in zip(asked, answers)]
        labels = [[NO_LOSS] * len(before) + answer for before, answer in zip(asked, answers)]
        nll_B, tokens_B = answer_nll(self.model, to_device(labelled(rows, labels, pad), device))
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return list(zip(texts, (-nll_B / tokens_B).tolist()))

    def _config(self, new: int, ends: list[int]) -> GenerationConfig:
        from transformers import GenerationConfig

        fixed: dict[str, Any] = {
            "max_new_tokens": new,
            "use_cache": True,
            "pad_token_id": self.facts.pad_id,
            "eos_token_id": ends,
        }
        if self.options.generation == "greedy":
            return GenerationConfig(**fixed, num_beams=self.options.num_beams, do_sample=False)
        config = copy.deepcopy(self.facts.generation)
        if self.options.num_beams > 1:
            fixed["num_beams"] = self.options.num_beams
        config.update(**fixed, max_length=None, num_return_sequences=1, return_dict_in_generate=False)
        return config


@functools.cache  # once
def _say_cut(positions: int, asked: int) -> None:
    rank_zero_warn(
        f"Some prompts leave no room for model.evaluation.max_new_tokens: {asked} among the {positions} positions that "
        "the model has. Their answers are shorter; a smaller data.max_length leaves more room."
    )


def _until(ends: set[int], ids: list[int]) -> list[int]:
    """Up to the first token that ends the text, with it."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]


def answer_nll(model: Any, batch: Mapping[str, Any], share: bool = False) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of each row's labelled tokens, and their number, both (B,) and float32 at least.

    Args:
        share: compute what rows of one ``group`` share once, see :mod:`~talklora_pl.shared_prefix`. The same numbers.
    """
    rows = len(batch["input_ids"])
    if share and runs_trees(model) and (shared_N := shared_nll(model, batch)) is not None:
        return row_nll(shared_N, batch["loss_row"], rows)
    nll_N, row_N = label_nll(model, batch)
    return row_nll(nll_N, row_N, rows)


def score_answers(model: Any, batch: Mapping[str, Any], generate: Generation | None = None) -> BatchScores:
    """Rank the choices of questions that have several; generate other answers and compare them with the right one.

    Args:
        model: as it is now, adapter on or off.
        batch: one row per choice; without `group` every row is a question of its own.
        generate: None: nothing is generated.
    """
    rows = len(batch["input_ids"])
    group_B = batch.get("group", torch.arange(rows, device=batch["input_ids"].device))
    choice_B = batch.get("choice", torch.zeros_like(group_B))
    answer_Q = batch.get("answer", torch.zeros_like(group_B))
    real_Q = batch.get("real", torch.ones_like(answer_Q, dtype=torch.bool))

    nll_B, tokens_B = answer_nll(model, batch, share="group" in batch and not model.training)
    scores_QC = choice_scores(nll_B, tokens_B, group_B, choice_B)
    gold_B = (choice_B == answer_Q[group_B]) & real_Q[group_B]
    several_Q = scores_QC.isfinite().sum(1) > 1
    known_Q = (answer_Q >= 0) & real_Q
    # what has a right answer but no text of it is learned whole: nothing is asked
    asks_Q = (
        torch.tensor([bool(texts) for texts in batch.get("answers", [[""]] * len(answer_Q))]).to(known_Q) | ~known_Q
    )
    right_Q = several_Q & (scores_QC.argmax(1) == answer_Q)

    texts: list[tuple[str, float] | None] = [None] * len(answer_Q)
    open_Q = ~several_Q & real_Q & asks_Q if generate else torch.zeros_like(several_Q)
    asked = open_Q.nonzero()[:, 0].tolist()
    if generate and (generate.any_rank or bool)(bool(asked)):  # ranks that share a model compute together
        asked = asked or [0]  # not open, so what is generated for it is dropped
        first_Q = [int((group_B == q).nonzero()[0, 0]) for q in asked]
        prompts = [batch["input_ids"][row, : int(batch["prompt_length"][q])] for row, q in zip(first_Q, asked)]
        for q, answer in zip(asked, generate(prompts)):
            texts[q] = answer if open_Q[q] else None
            if open_Q[q] and known_Q[q]:
                right_Q[q] = exact_match(answer[0], batch["answers"][q][0], generate.options.answer_pattern)
    return BatchScores(
        nll_Q=nll_B.new_zeros(len(answer_Q)).index_add_(0, group_B, nll_B * gold_B),
        tokens_Q=nll_B.new_zeros(len(answer_Q)).index_add_(0, group_B, tokens_B * gold_B),
        scores_QC=scores_QC,
        ranked_Q=several_Q & known_Q,
        generated_Q=open_Q & known_Q,
        right_Q=right_Q,
        texts=texts,
    )


class TaskScores(Metric):
    """Totals per task, summed exactly over batches and ranks; fillers and unknown answers do not count.

    Args:
        tasks: all tasks there can be, in the same order on all ranks.
    """

    totals: Tensor
    # columns of the totals
    RANKED, RANKED_RIGHT, GENERATED, GENERATED_RIGHT, NLL, TOKENS = range(6)

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = list(tasks)
        zeros = torch.zeros(len(self.tasks), 6, dtype=torch.float64)
        self.add_state("totals", zeros, dist_reduce_fx="sum")

    def update(self, scored: BatchScores, tasks: Sequence[str]) -> None:
        """Add a batch; ``tasks`` names the task of each of its questions."""
        task_Q = torch.tensor([self.tasks.index(task) for task in tasks], device=self.totals.device)
        columns = (
            scored.ranked_Q,
            scored.ranked_Q & scored.right_Q,
            scored.generated_Q,
            scored.generated_Q & scored.right_Q,
            scored.nll_Q,
            scored.tokens_Q,
        )
        self.totals.index_add_(0, task_Q, torch.stack([c.to(self.totals) for c in columns], 1))

    def compute(self) -> dict[str, dict[str, float]]:
        """Per task: number of `questions` and, as far as they were measured, `accuracy`, `exact_match`, `loss` (per
        token). Under ``mean``: the mean of each over tasks, but the loss over all tokens."""
        out: dict[str, dict[str, float]] = {}
        for task, total in zip(self.tasks, self.totals.tolist()):
            scores = {}
            if total[self.RANKED]:
                scores["accuracy"] = total[self.RANKED_RIGHT] / total[self.RANKED]
            if total[self.GENERATED]:
                scores["exact_match"] = total[self.GENERATED_RIGHT] / total[self.GENERATED]
            if total[self.TOKENS]:
                scores["loss"] = total[self.NLL] / total[self.TOKENS]
            if scores:
                out[task] = scores | {"questions": int(total[self.RANKED] + total[self.GENERATED])}
        mean = {}
        for name in ("accuracy", "exact_match"):
            if values := [scores[name] for scores in out.values() if name in scores]:
                mean[name] = sum(values) / len(values)
        every = self.totals.sum(0).tolist()
        if every[self.TOKENS]:
            mean["loss"] = every[self.NLL] / every[self.TOKENS]
        return out | {"mean": mean}


def table(tuned: dict[str, dict[str, float]], base: dict[str, dict[str, float]] | None) -> Table:
    """Results of :meth:`TaskScores.compute` for people: a line per task, the base model's number beside the adapter's.

    The loss is shown where nothing else was measured; the JSON file always has it.
    """
    from rich.table import Table

    out = Table(title="Test scores")
    names = ["base model"] if base else []
    out.add_column("task", overflow="fold")  # the only one that gives way in a narrow window
    for column in ("questions", "metric", *names, "with\nadapter", "standard\nerror"):
        out.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    for task, scores in tuned.items():
        if task == "mean" and len(tuned) == 2:
            continue
        if task == "mean":
            out.add_section()
        n = int(scores.get("questions", 0))
        judged: list[str] = [name for name in ("accuracy", "exact_match") if name in scores]
        for name in judged or ["loss"]:
            if name in scores:
                p = scores[name]
                before = [f"{base[task][name]:.3f}" if name in base.get(task, {}) else "–"] if base else []
                error = f"{math.sqrt(p * (1 - p) / n):.3f}" if n and name != "loss" else ""
                out.add_row(task, str(n) if n else "", name.replace("_", " "), *before, f"{p:.3f}", error)
    return out


def write_json(path: Path, tuned: dict[str, Any], base: dict[str, Any] | None) -> None:
    """The same as JSON: ``{"adapter": {task: scores}, "base": {task: scores}}``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"adapter": tuned} | ({"base": base} if base else {}), indent=1) + "\n"
    write_whole(path, lambda part: part.write_text(text, "utf-8"))


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Records as JSON lines."""
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    write_whole(path, lambda part: part.write_text(text, "utf-8"))


def judged(scored: BatchScores, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of :func:`predictions`, each with what it counts for: `right` where it was judged, and the `loss` per
    token of the right answer where that is known."""
    out = predictions(scored, batch)
    real = [q for q, real in enumerate(batch["real"].tolist()) if real]
    judged_Q, loss_Q = scored.ranked_Q | scored.generated_Q, scored.nll_Q / scored.tokens_Q
    for record, q in zip(out, real, strict=True):
        if judged_Q[q]:
            record["right"] = bool(scored.right_Q[q])
        if scored.tokens_Q[q]:
            record["loss"] = float(loss_Q[q])
    return out


def predictions(scored: BatchScores, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """A record per question: `index` in the data, `id`, `task`; `text`, or `choice` and its `answer`; and `scores`: the
    mean log-likelihood per token of the text or of every choice (of classes: their log-probabilities)."""
    out = []
    for q, (index, name, task) in enumerate(zip(batch["index"].tolist(), batch["id"], batch["task"])):
        if not batch["real"][q]:
            continue
        record: dict[str, Any] = {"index": index, "id": name, "task": task}
        scores = [round(score, 6) for score in scored.scores_QC[q].tolist() if math.isfinite(score)]
        if scored.texts and (generated := scored.texts[q]):
            record |= {"text": generated[0], "scores": [round(generated[1], 6)]}
        elif len(scores) > 1:
            choice = max(range(len(scores)), key=scores.__getitem__)
            record |= {"choice": choice, "scores": scores}
            if choice < len(batch["answers"][q]):
                record["answer"] = batch["answers"][q][choice]
        out.append(record)
    return out
