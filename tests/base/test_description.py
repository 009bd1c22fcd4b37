"""One fact, one place: pad id, vocabulary, context length and ends of text, of many families."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, GenerationConfig

from talklora_pl.base.description import context_length, describe
from tests.data.tiny import tokenizer

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
}


def tiny(kind: str, **changes: Any) -> Any:
    return AutoConfig.for_model(kind, **TINY | changes)


@pytest.mark.parametrize(
    ("kind", "changes", "length"),
    [
        ("bert", {}, 20),
        ("electra", {}, 20),
        ("roberta", {}, 18),  # counts from pad + 1
        ("roberta", {"pad_token_id": 5}, 14),
        ("xlm-roberta", {}, 18),
        ("xlm-roberta-xl", {}, 18),
        ("camembert", {}, 18),
        ("roberta-prelayernorm", {}, 18),
        ("data2vec-text", {}, 18),
        ("mpnet", {"pad_token_id": 3}, 18),  # whatever the pad is
        ("longformer", {"attention_window": [4], "num_hidden_layers": 1}, 18),
        ("nystromformer", {}, 20),  # its table is larger than it says
        ("distilbert", {"dim": 16, "hidden_dim": 16, "n_heads": 2, "n_layers": 1}, 20),
        ("gpt2", {"bos_token_id": 1, "eos_token_id": 1}, 20),
        ("opt", {"ffn_dim": 16, "word_embed_proj_dim": 16}, 20),  # its table is larger than it says
        ("llama", {}, 20),
        (
            "modernbert",
            {"pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1},
            20,
        ),
    ],
)
def test_the_longest_sequence_is_one_that_the_model_reads(kind: str, changes: dict[str, Any], length: int) -> None:
    config = tiny(kind, **changes)
    assert context_length(config) == length == describe(config).default_length
    model = AutoModel.from_config(config)
    assert model(input_ids=torch.full((1, length), 7)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "bert", "gpt2"])
def test_one_token_more_is_too_long(kind: str) -> None:
    config = tiny(kind, eos_token_id=1, bos_token_id=1)
    length = context_length(config)
    assert length
    with pytest.raises((IndexError, RuntimeError)):
        AutoModel.from_config(config)(input_ids=torch.full((1, length + 1), 7))


@pytest.mark.parametrize(("kind", "length"), [("t5", None), ("bloom", None), ("mamba", None), ("mpt", 2048)])
def test_models_without_positions_have_no_limit(kind: str, length: int | None) -> None:
    assert context_length(AutoConfig.for_model(kind)) == length


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20}, 80),  # Qwen
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 5}, 20),  # Llama
        ({"rope_type": "default"}, 20),
    ],
)
def test_positions_beyond_those_trained_at_first(rope: dict[str, Any], length: int) -> None:
    assert context_length(tiny("llama", rope_parameters={"rope_theta": 10000.0, **rope})) == length


def test_the_text_part_of_a_composite_model_counts() -> None:
    config = AutoConfig.for_model("llava", text_config=tiny("llama", eos_token_id=3, pad_token_id=4).to_dict())
    facts = describe(config)
    assert (facts.vocab_size, facts.context_length, facts.pad_id, facts.eos_ids) == (64, 20, 4, (3,))


def test_the_tokenizers_length_is_a_default_where_there_is_no_limit() -> None:
    config, tok = AutoConfig.for_model("t5"), tokenizer()
    assert describe(config, tok).default_length == 512  # 1e30: nothing said
    tok.model_max_length = 100
    facts = describe(config, tok)
    assert (facts.default_length, facts.context_length) == (100, None)
    assert describe(tiny("llama"), tok).default_length == 20


@pytest.mark.parametrize(
    ("pad", "eos", "in_config", "want"),
    [
        (True, True, 7, 258),  # the tokenizer's, whatever the configuration says
        (False, True, 7, 257),  # end of text, as texts do not hold it
        (False, False, 7, 7),
        (False, False, -1, 5),
        (False, False, None, 5),
    ],
)
def test_pad_id(pad: bool, eos: bool, in_config: int | None, want: int) -> None:
    config = tiny("llama", vocab_size=300, eos_token_id=5)
    config.pad_token_id = in_config
    assert describe(config, tokenizer(pad=pad, eos=eos)).pad_id == want


def test_a_pad_without_a_row_is_no_pad() -> None:
    assert describe(tiny("llama", vocab_size=3, bos_token_id=0, eos_token_id=None, pad_token_id=9)).pad_id == 0


def test_tokens_beyond_the_embedding() -> None:
    tok = tokenizer(pad=True)
    assert describe(tiny("llama", vocab_size=264), tok).beyond == {}
    tok.add_tokens(["<tool>", "<city>"])
    facts = describe(tiny("llama", vocab_size=260), tok)
    assert facts.beyond == {260: "<tool>", 261: "<city>"} and facts.num_tokens == 262 == len(tok)
    assert describe(tiny("llama", vocab_size=262), tok).beyond == {}


def test_placeholders_of_images_need_no_row() -> None:
    """Gemma 3 1B reads text alone, with the tokenizer of its larger siblings."""
    tok = tokenizer(pad=True)
    tok.add_tokens(["<image_soft_token>"], special_tokens=True)
    tok.image_token = "<image_soft_token>"
    assert describe(tiny("llama", vocab_size=260), tok).beyond == {}


def test_holes_between_ids_count() -> None:
    tok: Any = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 99})
    assert describe(tiny("llama"), tok).num_tokens == 100


def test_ends_of_text_from_everywhere() -> None:
    config = tiny("llama", vocab_size=300, eos_token_id=[5, 6])
    assert describe(config).eos_ids == (5, 6)
    tok = tokenizer()
    assert describe(config, tok, GenerationConfig(eos_token_id=[256, 8])).eos_ids == (257, 256)  # 8 is a letter
    assert describe(tiny("bert")).eos_ids == ()
