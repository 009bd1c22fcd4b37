"""What a loaded base lacks: named, and trained along where it is a head, else refused; and an embedding that grows.

A parameter that is made up is left trainable; everything else of the base is frozen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from talklora_pl.errors import UserError

Shape = tuple[int, ...]


def settle(model: Any, path: str, report: Mapping[str, Any], new_head: bool) -> None:
    """Act on what ``from_pretrained`` reports: unfreeze and name a head that is made up, refuse any other such weight.

    Args:
        model: just loaded and frozen.
        path: of the base, for messages.
        report: ``missing_keys``, ``unexpected_keys``, and ``mismatched_keys`` (name, stored shape, the model's shape).
        new_head: the task puts a head on the base, which learns what follows the layers.

    Raises:
        UserError: weights of the body are missing or have another shape.
    """
    mismatched: dict[str, tuple[Shape, Shape]] = {
        n: (tuple(stored), tuple(need)) for n, stored, need in report["mismatched_keys"]
    }
    parameters = dict(model.named_parameters(remove_duplicate=False))
    made_up = [n for n in parameters if n in report["missing_keys"] or n in mismatched]
    head = set(head_parameters(model)) if new_head else set()
    if body := [n for n in made_up if n not in head]:
        name = body[0]
        what = f"lack {name}"
        if name in mismatched:
            stored, need = mismatched[name]
            what = f"hold {name} as {list(stored)}, its config.json asks for {list(need)}"
        more = f" (and {len(body) - 1} more)" if len(body) > 1 else ""
        raise UserError(
            f"model.base.path: the weights in {path!r} {what}{more}. They would begin at random and stay so. Is it "
            "the whole model, and is its config.json the one that belongs to these weights?"
        )
    for name in made_up:
        parameters[name].requires_grad_(True)
    fate = "at random at first, trained and saved with the adapter."
    if others := [n for n in made_up if n in mismatched and n.endswith("weight")]:
        (had, *_), (wanted, *_) = mismatched[others[0]]
        rank_zero_info(
            f"The head of {path} ({others[0]}) has {had} classes, this run {wanted}. The head is new: {fate}"
        )
    if lacking := _modules(n for n in made_up if n not in mismatched):
        rank_zero_info(f"{path} lacks {' and '.join(lacking)}: {fate}")
    foreign = sorted(n for n in report["unexpected_keys"] if not new_head or _in_layer(n))
    if foreign:
        rank_zero_warn(
            f"{path} holds {len(foreign)} tensors that {type(model).__name__} has no place for, such as {foreign[0]}. "
            "They are not used."
        )


def head_parameters(model: nn.Module) -> list[str]:
    """Parameters of the head: all outside of the body, and in it a pooler or what else follows the last layer."""
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    body = [n for n in names if n.startswith(prefix)]
    last = max((i for i, n in enumerate(body) if _in_layer(n)), default=-1)
    kept = {n for n in body[: last + 1] if "pooler" not in n.split(".")}
    return [n for n in names if n not in kept]


def new_modules(model: nn.Module) -> list[str]:
    """Modules of a base, just loaded, that have trainable parameters: what the adapter has to train and save."""
    return _modules(n for n, p in model.named_parameters() if p.requires_grad)


# --- the vocabulary


def vocabulary(model: Any) -> dict[int, Tensor]:
    """Parameters with a row per token, by identity: those of the token embedding and of the output head."""
    modules = [getattr(model, get, lambda: None)() for get in ("get_input_embeddings", "get_output_embeddings")]
    return {id(p): p for module in modules if module is not None for p in module.parameters(recurse=False)}


@torch.no_grad()
def grow_vocabulary(model: Any, num_tokens: int) -> None:
    """Give embedding and head a row for each token, and unfreeze them; a new row is the mean of the old ones."""
    weight = model.get_input_embeddings().weight
    rows = len(weight)
    if not weight.is_meta:
        say_growth(rows, num_tokens)
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    for p in vocabulary(model).values():
        p[rows:] = p[:rows].float().mean(0).to(p.dtype)
        p.requires_grad_(True)


def grown(stored: Tensor, rows: int) -> Tensor:
    """A stored matrix of the vocabulary as :func:`grow_vocabulary` makes it."""
    mean = stored.float().mean(0, keepdim=True).to(stored.dtype)
    return torch.cat([stored, mean.expand(rows - len(stored), *stored.shape[1:])])


def say_growth(rows: int, num_tokens: int) -> None:
    rank_zero_info(f"The vocabulary grows from {rows} to {num_tokens} rows; it is trained and saved with the adapter.")


def _modules(parameters: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(n.rpartition(".")[0] for n in parameters))


def _in_layer(name: str) -> bool:
    return re.search(r"(^|\.)\d+\.", name) is not None
