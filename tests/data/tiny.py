"""A byte-level tokenizer and a model of two layers, made in a moment, with or without special tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from talklora_pl.base import BaseModel

SIZES: dict[str, float] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
"""Of the tiny models of all tests."""

CHAT = (
    "{{ bos_token or '' }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer(
    bos: bool = True, eos: bool = True, pad: bool = False, chat: str | None = CHAT
) -> PreTrainedTokenizerFast:
    """One token a byte, except `merged` pairs; `<s>` is put before every text if there is a BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)} | {"<s>": 256, "</s>": 257, "<pad>": 258, "Ġa": 259}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 256)]
        )
    names = {"bos_token": "<s>"} if bos else {}
    names |= {"eos_token": "</s>"} if eos else {}
    names |= {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat, **names)


def save_model(folder: Path, **changes: float) -> BaseModel:
    """A random Llama with the tokenizer above, as a folder."""
    llama(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return BaseModel(str(folder))


def llama(attn_implementation: str | None = None, **changes: float) -> PreTrainedModel:
    """A random Llama of these sizes."""
    options = SIZES | {"vocab_size": 264, "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 257}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**options | changes), attn_implementation=attn_implementation)
