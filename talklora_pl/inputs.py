"""From rows of tokens to the arguments of a model, and back to the logits that carry loss.

B rows, S tokens of the longest of them, V vocabulary, N positions whose next token carries loss. Rows are padded on the
right unless said otherwise; the attention mask alone says what is real.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NO_LOSS = -100
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What of a batch the model is called with."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """(B,S) from ragged rows."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([[*more, *row] if left else [*row, *more] for row, more in zip(rows, fill)])


def masked(rows: Sequence[Sequence[int]], pad_id: int, left: bool = False) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, both (B,S)."""
    return {"input_ids": pad(rows, pad_id, left), "attention_mask": pad([[1] * len(row) for row in rows], 0, left)}


def labelled(rows: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """:func:`masked` rows with their ``labels`` (B,S), not shifted, and the :func:`loss_positions` of these."""
    labels_BS = pad(labels, NO_LOSS)
    return masked(rows, pad_id) | {"labels": labels_BS} | loss_positions(labels_BS)


def loss_positions(labels_BS: Tensor) -> dict[str, Tensor]:
    """Where loss is, as an index: made on the CPU with the batch, it spares the device a search that it would wait for.

    Returns:
        All (N,) and int64: ``loss_index``, positions in the flattened (B,S) whose next token carries loss;
        ``loss_target``, that token; ``loss_row``, the row.
    """
    targets_BS = F.pad(labels_BS[:, 1:], (0, 1), value=NO_LOSS)
    row_N, column_N = (targets_BS != NO_LOSS).nonzero(as_tuple=True)
    index_N = row_N * labels_BS.shape[1] + column_N
    return {"loss_index": index_N, "loss_target": targets_BS[row_N, column_N], "loss_row": row_N}


def token_logits(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at the positions whose next token carries loss.

    The vocabulary projection sees gathered, contiguous rows only: on a CPU a strided slice of bf16 rows is two orders
    of magnitude slower, and everywhere the rest of the (B,S,V) logits is not needed. (``logits_to_keep`` of
    transformers keeps the same columns of every row.)

    Args:
        model: a causal language model.
        batch: of :func:`labelled`; the index is made from ``labels`` where a batch of another origin has none.

    Returns:
        logits_NV, the tokens to predict (N,), and the batch row of each (N,).
    """
    if "loss_index" not in batch:
        batch = {**batch, **to_device(loss_positions(batch["labels"].cpu()), batch["labels"].device)}
    index_N = batch["loss_index"]
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(
        lambda _, args: (args[0].flatten(0, 1).index_select(0, index_N).unsqueeze(0), *args[1:])
    )
    try:
        logits_1NV = model(**model_inputs(batch)).logits
    finally:
        hook.remove()
    return logits_1NV.squeeze(0), batch["loss_target"], batch["loss_row"]


def summed_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Sum over the targets, in float32 where the base computes in less."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, targets_N, reduction="sum")
