"""Small random models of several families as folders, and adapters on them as if trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from talklora_pl.adapter import Adapter, AdapterConfig, inject
from talklora_pl.allocation.rules import Listed
from talklora_pl.routers.top_k import TopK
from tests.data.tiny import SIZES, tokenizer
from tests.methods.test_configs import METHODS, config_of

VOCABULARY = 264
SMALL: dict[str, Any] = {
    **SIZES,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 258,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 256}
FAMILIES: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=1),
    "qwen2": transformers.Qwen2Config(**SMALL, num_key_value_heads=1, tie_word_embeddings=True),
    "phi3": transformers.Phi3Config(**SMALL, num_key_value_heads=1),
    "gpt2": transformers.GPT2Config(**GPT2, eos_token_id=257),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16),
    "bert": transformers.BertConfig(**SMALL, num_labels=3),
    "roberta": transformers.RobertaConfig(**SMALL | {"max_position_embeddings": 300}, num_labels=3),
    "llama_classifier": transformers.LlamaConfig(**SMALL, num_labels=3),
}
CLASSIFIERS = ("bert", "roberta", "llama_classifier")
IDS = torch.tensor([[258, 258, 7, 8, 9, 200], [1, 2, 3, 4, 5, 6]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def save_base(folder: Path, family: str, seed: int = 0) -> Path:
    """A random model of a family with its tokenizer."""
    torch.manual_seed(seed)
    auto: Any = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForCausalLM
    auto.from_config(FAMILIES[family]).save_pretrained(folder)
    tokenizer(pad=True).save_pretrained(folder)
    return folder


def load(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The base, as a user loads it."""
    auto: Any = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype).eval()


def train(
    model: PreTrainedModel, config: AdapterConfig, seed: int = 0, name: str = "default", **options: Any
) -> Adapter:
    """An adapter whose floating-point tensors all have values of their own, as after a training."""
    adapter = inject(model, config, name, **options)
    generator = torch.Generator().manual_seed(seed)
    along = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("talklora.")]
    with torch.no_grad():
        for t in [*adapter.state_dict().values(), *along]:
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=generator) * 0.3)
    return adapter


def cases() -> dict[str, tuple[str, AdapterConfig]]:
    """(family, options) by name: every method file on a Llama, and TalkLoRA on every family."""
    out = {f"llama-{m}": ("llama", config_of(m)) for m in METHODS}
    mola = replace(config_of("mola"), allocation=Listed([3, 1]))
    for way, k in {"list": [3, 1], "table": {3: 3, 1: 1}}.items():
        out[f"llama-mola_k_{way}"] = ("llama", replace(mola, router=TopK(k=k)))
    for family in FAMILIES:
        head = {"roberta": ["classifier"], "bert": ["classifier"], "llama_classifier": ["score"]}.get(family, [])
        out[family] = (family, AdapterConfig(targets="all-linear", rank=8, modules_to_save=head))
    return out


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK).logits


def unsigned(folder: Path) -> Path:
    """The folder as version 0.1 wrote it, and as a stranger may: with no digest but that of the tensors."""
    file = folder / "talklora.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in data.items() if k not in ("sha256", "files_sha256")}))
    return folder
