"""From rows of tokens to the arguments of a model, and back to the logits that carry loss.

B rows, S tokens of the longest of them, V vocabulary, D width, N positions whose next token carries loss. Rows are
padded on the right unless said otherwise; the attention mask alone says what is real. A *packed* batch has its rows one
after the other in a single row of T tokens, without pads: positions begin anew with each, and none sees another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from talklora_pl import trials, varlen
from talklora_pl.routing import PackedRows

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


def packed(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of :func:`labelled` rows without its pads.

    Returns:
        ``input_ids``, ``position_ids``, ``attention_mask`` and ``labels``, all (1,T); the :func:`loss_positions`;
        ``token_row`` (T,), the row of every token; ``row_borders`` (B + 1,) int32, where the rows begin and the last
        one ends; ``longest_row``, a number.
    """
    real_BS = batch["attention_mask"].bool()
    row_T, position_T = real_BS.nonzero(as_tuple=True)
    # no token foretells the first one of the next row
    labels_1T = batch["labels"][real_BS].where(position_T > 0, NO_LOSS).unsqueeze(0)
    positions = loss_positions(labels_1T)
    length_B = real_BS.sum(1)
    return {
        "input_ids": batch["input_ids"][real_BS].unsqueeze(0),
        "position_ids": position_T.unsqueeze(0),
        "attention_mask": torch.ones_like(labels_1T),
        "labels": labels_1T,
        "token_row": row_T,
        "row_borders": F.pad(length_B.cumsum(0), (1, 0)).int(),
        "longest_row": int(length_B.max()),
        **positions,
        "loss_row": row_T[positions["loss_index"]],
    }


def packed_rows(batch: Mapping[str, Any]) -> PackedRows | None:
    """Whose token is whose, of a packed batch; of another None."""
    if "row_borders" not in batch:
        return None
    return PackedRows(batch["token_row"], None if batch.get("filled") else len(batch["row_borders"]) - 1)


def filled(batch: Mapping[str, Any], longest: int | None = None) -> dict[str, Any]:
    """The tensors of a batch of :func:`labelled` or :func:`packed` rows, with sizes that many batches have in common.

    Columns are rounded up to one of eight sizes between two powers of two, labels to one of four, rows of a packed
    batch to powers of two. What is added is behind all that is real, masked and without loss, and in a packed batch
    rows of its own, so nothing real changes by it.

    Args:
        batch: of :func:`labelled` or :func:`packed`.
        longest: tokens of the longest row that the model can read; None: of any.

    Returns:
        tensors; ``longest_row`` of a packed batch, a number; ``filled``, which is true.
    """
    out: dict[str, Any] = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    B, S = batch["input_ids"].shape
    N, more = len(batch["loss_index"]), _up_to(S, 8) - S
    if longest is not None and "row_borders" not in batch:
        more = max(0, min(more, longest - S))
    fill = {"input_ids": 0, "attention_mask": 0, "position_ids": 0, "token_type_ids": 0, "labels": NO_LOSS}
    out |= {name: F.pad(out[name], (0, more), value=value) for name, value in fill.items() if name in out}
    if B > 1:  # the index is into the flattened rows, which have grown
        out["loss_index"] = out["loss_index"] + out["loss_row"] * more
    fill = {"loss_index": 0, "loss_target": NO_LOSS, "loss_row": 0}
    out |= {name: F.pad(out[name], (0, _up_to(max(N, 8), 4) - N), value=value) for name, value in fill.items()}
    if "row_borders" in batch:
        out["token_row"] = F.pad(out["token_row"], (0, more))
        out["longest_row"] = row = _up_to(batch["longest_row"])
        borders = out["row_borders"]
        rows = _up_to(len(borders) + -(-more // row)) - len(borders)  # the last of them may be empty
        ends = torch.arange(1, rows + 1, dtype=borders.dtype, device=borders.device) * row + S
        out["row_borders"] = torch.cat([borders, ends.clamp(max=S + more)])
    return out | {"filled": True}


def _up_to(n: int, sizes: int = 1) -> int:
    """``n`` rounded up to the next of so many sizes between two powers of two."""
    step = max(1, 2 ** (n - 1).bit_length() // (2 * sizes))
    return -(-n // step) * step


def causal_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch of :func:`labelled` or :func:`packed` rows a causal model is called with: no mask.

    No token of a row sees the pads behind it, and a mask of them would keep attention from its fast kernels. A model
    that reads forward too gets the mask (see :func:`~talklora_pl.trials.reads_back_only`), and so does a batch of
    unknown origin, whose pads may be on the left.
    """
    inputs: dict[str, Any] = model_inputs(batch)
    if "row_borders" in batch:
        del inputs["attention_mask"]
        return inputs | varlen.arguments(model, batch["row_borders"], batch["longest_row"])
    if "loss_index" in batch and trials.reads_back_only(model):
        inputs.pop("attention_mask", None)
    return inputs


def token_logits(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits at the positions whose next token carries loss.

    The vocabulary projection sees gathered, contiguous rows only: on a CPU a strided slice of bf16 rows is two orders
    of magnitude slower, and everywhere the rest of the (B,S,V) logits is not needed. (``logits_to_keep`` of
    transformers keeps the same columns of every row.)

    Args:
        model: a causal language model.
        batch: of :func:`labelled` or :func:`packed`; the index is made from ``labels`` where a batch of another origin
            has none.

    Returns:
        logits_NV, the tokens to predict (N,), and the batch row of each (N,).
    """
    inputs = causal_inputs(model, batch)
    if "loss_index" not in batch:
        batch = {**batch, **to_device(loss_positions(batch["labels"].cpu()), batch["labels"].device)}
    index_N = batch["loss_index"]
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(
        lambda _, args: (args[0].flatten(0, 1).index_select(0, index_N).unsqueeze(0), *args[1:])
    )
    try:
        with varlen.packed("row_borders" in batch):
            logits_1NV = model(**inputs).logits
    finally:
        hook.remove()
    return logits_1NV.squeeze(0), batch["loss_target"], batch["loss_row"]


def summed_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Sum over the targets, in float32 where the base computes in less."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, targets_N, reduction="sum")
