"""What is wrong with the options of ``TextData``: lines of the one message that says everything at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from talklora_pl.base import BaseModel
from talklora_pl.data.source import Source
from talklora_pl.objectives import Objective

LEAST = {
    "shuffle_buffer": 1,
    "batch_size": 1,
    "eval_batch_size": 1,
    "max_length": 1,
    "num_workers": 0,
    "val_size": 0,
    "num_proc": 1,
}
"""Of each number the smallest value that it may have."""


def wrong_numbers(given: Mapping[str, float | None]) -> dict[str, str]:
    """Of each number of :data:`LEAST` that is too small, what to say; None is never wrong."""
    return {
        name: f"data.{name}: {given[name]} is less than {least}."
        for name, least in LEAST.items()
        if (value := given[name]) is not None and value < least
    }


def wrong_lengths(max_length: int, context: int | None, max_tokens: int | None, objective: Objective) -> list[str]:
    """What is wrong with tokens of a sequence and of a batch.

    Args:
        max_length: tokens of a sequence.
        context: what the model can take; None: there is no end.
        max_tokens: of a batch by tokens.
        objective: whose batches.
    """
    out = []
    if context is not None and max_length > context:
        out.append(f"data.max_length: {max_length} is more than the model's context of {context} tokens.")
        max_length = context
    if max_tokens is not None:
        if not objective.packs:
            out.append(
                f"data.max_tokens: the rows of objective {objective.name} cannot be packed; use data.batch_size."
            )
        if max_tokens < max_length:
            out.append(f"data.max_tokens: {max_tokens} is less than data.max_length, {max_length}.")
    return out


def wrong_shares(sources: Mapping[str, list[Source]], temperature: float | None) -> list[str]:
    """What is wrong with weights and temperature."""
    weights = [source.weight for source in sources["train"]]
    given = [weight for weight in weights if weight is not None]
    out = []
    if any(source.weight is not None for name, of in sources.items() if name != "train" for source in of):
        out.append("weight: only sources of data.train have a share of an epoch.")
    if given and len(given) < len(weights):
        out.append("data.train: give all sources a weight, or none.")
    if any(not 0 < weight < math.inf for weight in given):
        out.append("data.train: a weight is a number of more than 0.")
    if given and temperature is not None:
        out.append("data.temperature: the sources have weights already.")
    if temperature is not None and not temperature >= 0.1:  # below, powers of the numbers are infinite
        out.append(f"data.temperature: {temperature} is less than 0.1.")
    return out


def wrong_in_a_stream(
    train: list[Source],
    base: BaseModel,
    *,
    splits: bool,
    documents: str,
    on_leak: str,
    labels: Any,
    temperature: float | None,
) -> list[str]:
    """What cannot be where the training data are a stream.

    Args:
        train: the streams.
        base: what is trained.
        splits: validation data are to be split off.
        documents, on_leak, labels, temperature: options of ``TextData``.
    """
    out = []
    if splits:
        out.append("data.val_size: nothing can be split off a stream: name data.val, or set data.val_size: 0.")
    if documents == "packed":
        out.append("data.documents: packed cannot join texts of a stream; data.max_tokens packs them.")
    if on_leak != "warn":
        out.append(f"data.on_leak: {on_leak} needs all training rows at once, which a stream has not.")
    if base.head.classifies and not labels and base.num_labels is None:
        out.append("data.labels: the classes cannot be looked for in a stream: list them, or say base.num_labels.")
    if temperature is not None:
        out.append("data.temperature: the rows of a stream are not counted; give each source a weight.")
    if len(train) > 1 and any(source.weight is None for source in train):
        out.append("data.train: each of several streams needs a weight: how many rows they have is not known.")
    return out


def wrong_trainer_of_a_stream(trainer: Any, validates: bool) -> list[str]:
    """What in the options of a Trainer goes by epochs, which a stream has not."""
    out = []
    if trainer.max_steps is None or trainer.max_steps < 0:
        out.append("trainer.max_steps: a stream has no known end, so say after how many steps the run ends.")
    if trainer.limit_train_batches != 1.0:
        out.append("trainer.limit_train_batches: a stream has no epochs to cut short; use trainer.max_steps.")
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
        out.append("trainer.callbacks: GradientAccumulationScheduler goes by epochs, and a stream has none.")
    if validates and type(trainer.val_check_interval) is not int and trainer.limit_val_batches:
        out.append("trainer.val_check_interval: say a number of batches: a stream has no epochs.")
    return out
