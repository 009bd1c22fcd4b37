"""Rows that begin alike, in one pass: what the choices of a question share is computed once.

A causal model computes the same for equal beginnings, whatever follows them. So the rows of a question are laid out as
a tree: each token once, with the position that it has in its rows, hearing what stands before it in them and nothing
else. Every layer of an adapter decides token by token, and sees of every token what it would see in the plain rows.

The plain rows are the reference: :func:`~talklora_pl.evaluation.answer_nll`. The tree is for models whose attention
takes a mask of its own and positions of its own, which :func:`runs_trees` tries out once.

B rows, S tokens of the longest of them, Q questions, W tokens of the largest tree, N tokens that are scored, U places
of the trees whose logits they need, V vocabulary, E experts.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from talklora_pl import varlen
from talklora_pl.base.description import text_config
from talklora_pl.inputs import MODEL_INPUTS, masked, model_inputs, pad
from talklora_pl.internals.transformers import attention_of
from talklora_pl.names import ADAPTERS
from talklora_pl.routing import RoutingCollector

LAYERS = {"full_attention", "sliding_attention"}
NOISE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far logits of one model may be apart that are computed in another order, relative to the largest of them; 1e-4 in
wider dtypes: models compute softmax and rotary positions in float32 whatever their own."""


class Trees(NamedTuple):
    """The rows of a batch as trees, one a question.

    Attributes:
        inputs: of the model: ``input_ids`` and ``position_ids`` (Q,W), and ``attention_mask`` (Q,1,W,W), what is added
            to the scores. There are no pads: a shorter tree repeats its last token.
        place_BS: where every token of the rows is in the flattened trees; those of pads are anywhere.
    """

    inputs: dict[str, Tensor]
    place_BS: Tensor


def trees_of(batch: Mapping[str, Any], dtype: torch.dtype) -> Trees | None:
    """The trees of a batch; None where no two rows of a question begin alike.

    Args:
        batch: right-padded rows with ``group`` (B,), their question.
        dtype: in which the model computes attention.
    """
    group_B, lengths_B = batch["group"].tolist(), batch["attention_mask"].sum(1).tolist()
    nodes: list[list[tuple[int, int, int]]] = [[] for _ in range(max(group_B) + 1)]  # parent, token, position
    known: dict[tuple[int, int, int], int] = {}
    places: list[list[int]] = []
    for row, group, length in zip(batch["input_ids"].tolist(), group_B, lengths_B):
        at, place = -1, []
        for position, token in enumerate(row[:length]):
            parent, at = at, known.setdefault((group, at, token), len(nodes[group]))
            if at == len(nodes[group]):
                nodes[group].append((parent, token, position))
            place.append(at)
        places.append(place)
    if sum(map(len, nodes)) == sum(lengths_B):
        return None
    nodes = [tree or [(-1, 0, 0)] for tree in nodes]
    width = max(map(len, nodes))
    hears_QWW = torch.zeros(len(nodes), width, width, dtype=torch.bool)
    for hears_WW, tree in zip(hears_QWW, nodes):
        for i, (parent, _, _) in enumerate(tree):
            if parent >= 0:
                hears_WW[i] = hears_WW[parent]
            hears_WW[i, i] = True
        hears_WW[len(tree) :] = hears_WW[len(tree) - 1]
        tree += tree[-1:] * (width - len(tree))
    _, ids_QW, positions_QW = torch.tensor(nodes).unbind(-1)
    mask_Q1WW = torch.zeros(hears_QWW.shape, dtype=dtype).masked_fill_(~hears_QWW, torch.finfo(dtype).min)[:, None]
    device = batch["input_ids"].device
    inputs = {"input_ids": ids_QW, "attention_mask": mask_Q1WW, "position_ids": positions_QW}
    place_BS = pad(places, 0) + torch.tensor(group_B)[:, None] * width
    return Trees({name: tensor.to(device) for name, tensor in inputs.items()}, place_BS.to(device))


def shared_nll(model: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """Negative log-likelihood of every token that is scored, (N,) and float32 at least, as of the plain rows.

    Args:
        model: a causal language model, for which :func:`runs_trees` holds.
        batch: with ``group`` and what :func:`~talklora_pl.inputs.labelled` makes.

    Returns:
        None where the rows have to be computed as they are.
    """
    window = getattr(text_config(model.config), "sliding_window", None)
    if window is not None and batch["input_ids"].shape[1] > window:
        return None
    if set(batch).intersection(MODEL_INPUTS) != {"input_ids", "attention_mask"}:
        return None
    trees = trees_of(batch, model.dtype)
    if trees is None:
        return None
    unique_U, at_N = trees.place_BS.flatten()[batch["loss_index"]].unique(return_inverse=True)
    with _as_rows(model, trees.place_BS):
        logits_UV = _logits_at(model, trees.inputs, unique_U)
    pieces = logits_UV.split(1024)  # float32 logits are large
    total_U = torch.cat([piece.to(torch.promote_types(piece.dtype, torch.float32)).logsumexp(-1) for piece in pieces])
    return total_U[at_N] - logits_UV[at_N, batch["loss_target"]].to(total_U.dtype)


def _logits_at(model: Any, inputs: Mapping[str, Tensor], index_U: Tensor) -> Tensor:
    """Logits at places of the flattened trees, see :func:`~talklora_pl.inputs.token_logits`."""
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0].flatten(0, 1).index_select(0, index_U).unsqueeze(0), *args[1:])
    )
    try:
        logits_1UV: Tensor = model(**inputs).logits
    finally:
        hook.remove()
    return logits_1UV.squeeze(0)


class _as_rows(AbstractContextManager[None]):
    """Hands what is collected of the trees' routing to the collector outside, as if the plain rows had run."""

    def __init__(self, model: nn.Module, place_BS: Tensor) -> None:
        stacks = [adapter.collectors for adapter in getattr(model, ADAPTERS, {}).values()]
        self.outer = next((stack[-1] for stack in stacks if stack), None)
        self.inner = RoutingCollector(model) if self.outer else None
        self.place_BS = place_BS

    def __enter__(self) -> None:
        if self.inner:
            self.inner.__enter__()

    def __exit__(self, *exc: object) -> None:
        if self.inner and self.outer:
            self.inner.__exit__()
            place_T = self.place_BS.flatten()
            for record in self.inner.records:
                parts: list[Any] = [None if t is None else t.index_select(0, place_T) for t in record.routing]
                self.outer.add(record.layer, type(record.routing)(*parts), self.place_BS.shape)


_tried: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def runs_trees(model: Any) -> bool:
    """Whether a model gives the same for trees as for rows: tried on three short rows, once per model.

    Said once where it does not: state-space layers hear what is next to them, and some attention (ALiBi) counts
    positions by the mask. Ranks that share a model try together.
    """
    if model not in _tried:
        reason = _obstacle(model)
        if reason:
            rank_zero_info(
                f"Choices are ranked row by row, the question again with each of them: {type(model).__name__} {reason}."
            )
        _tried[model] = not reason
    return _tried[model]


def _obstacle(model: Any) -> str:
    config = text_config(model.config)
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return "takes no positions"
    if other := set(getattr(config, "layer_types", None) or ()) - LAYERS:
        return f"has layers of {', '.join(sorted(other))}"
    if (attention := attention_of(model.config)) not in ("eager", "sdpa", varlen.NAME):
        return f"computes attention by {attention}, which takes no mask for every pair of tokens"
    ids = [(7 * i + 11) % config.vocab_size for i in range(18)]
    rows = [ids[:6] + ids[6 + 4 * i : 6 + 4 * (i + 1) - (i == 1)] for i in range(3)]
    batch: dict[str, Any] = {name: tensor.to(model.device) for name, tensor in masked(rows, 0).items()}
    batch["group"] = batch["attention_mask"].new_zeros(3)
    trees = trees_of(batch, model.dtype)
    assert trees is not None
    with RoutingCollector(model) if getattr(model, ADAPTERS, None) else nullcontext():  # nobody wants to know of it
        plain_BSV = model(**model_inputs(batch)).logits
        try:
            tree_TV = model(**trees.inputs).logits.flatten(0, 1)
        except (RuntimeError, ValueError, TypeError, IndexError) as e:
            return f"refuses a tree ({str(e).splitlines()[0] if str(e) else type(e).__name__})"
    real_BS = batch["attention_mask"].bool()
    difference = (tree_TV[trees.place_BS][real_BS] - plain_BSV[real_BS]).abs().max() / plain_BSV[real_BS].abs().max()
    return "" if difference < NOISE.get(model.dtype, 1e-4) else f"gives other logits for a tree ({difference:.1e})"
