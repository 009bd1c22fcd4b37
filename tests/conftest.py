"""What all tests share: no hub, one thread, a tiny Llama."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from functools import partial

import hypothesis
import pytest
import torch
from transformers import PreTrainedModel

from talklora_pl.sites import fused
from tests.data import tiny

hypothesis.settings.register_profile("untimed", deadline=None)  # how long an example takes is the machine's affair
hypothesis.settings.load_profile("untimed")

LLAMA3_8B = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
"""Sizes of Llama-3-8B, for counts on the meta device."""


def tiny_llama(**changes: int) -> PreTrainedModel:
    """A random 2-layer Llama of width 32, with key/value heads fewer than query heads."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": False,
    }
    return tiny.llama(attn_implementation="eager", **sizes | changes).eval()


@pytest.fixture
def plain_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout by its own operator, as on a GPU; with its masks the numbers of earlier versions were written down."""
    monkeypatch.setattr(fused, "drop", partial(torch.native_dropout, train=True))
    monkeypatch.setattr(fused, "dropped", torch.ops.aten.native_dropout_backward)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_llama()
