"""The models that are compared: one frozen base, whose weights all variants share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import yaml
from torch import nn

from talklora_pl.adapter import AdapterConfig, inject
from talklora_pl.shipped import shipped_configs

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
RANK = 32
LLAMAS: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
}


def method(name: str, **options: Any) -> AdapterConfig:
    """A shipped method, without dropout."""
    data = yaml.safe_load((shipped_configs() / "method" / f"{name}.yaml").read_text())["model"]["adapter"]
    return replace(AdapterConfig.from_dict(_plain(data)), **{"dropout_input": 0.0, **options})


def _plain(value: Any) -> Any:
    if isinstance(value, dict) and "class_path" in value:
        return {"name": value["class_path"], **_plain(value.get("init_args") or {})}
    if isinstance(value, dict):
        families = ("experts", "communication", "router", "allocation")
        return {k: {"name": v} if k in families and isinstance(v, str) else _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


class One(nn.Module):
    """One Linear under a name that adapters can target."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.q_proj = nn.Linear(*reversed(weight.shape), bias=False, device="meta", dtype=weight.dtype)
        self.q_proj.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)


class Base:
    """A Llama of random weights in bf16; :meth:`copy` makes another model of the same tensors."""

    def __init__(self, shape: str, device: str, layers: int | None = None) -> None:
        from transformers import LlamaConfig

        sizes = LLAMAS[shape] | ({} if layers is None else {"num_hidden_layers": layers})
        self.config, self.device = LlamaConfig(**sizes, max_position_embeddings=8192), device
        self.vocabulary = sizes["vocab_size"]
        self.first = self._build(None)

    def copy(self) -> Any:
        return self._build(self.first)

    def _build(self, like: Any) -> Any:
        from transformers import AutoModelForCausalLM

        attention = "eager" if self.device == "cpu" else "sdpa"
        with torch.device("meta" if like is not None else self.device):
            model: Any = AutoModelForCausalLM.from_config(
                self.config, dtype=torch.bfloat16, attn_implementation=attention
            )
        if like is not None:
            model.load_state_dict(like.state_dict(), assign=True)
            model.tie_weights()
            theirs = dict(like.named_modules())
            for name, module in model.named_modules():  # what no state holds
                module._buffers.update(theirs[name]._buffers)
                if hasattr(module, "original_inv_freq"):
                    module.original_inv_freq = theirs[name].original_inv_freq
        model.config.use_cache = False
        return model.requires_grad_(False).train()


def adapted(model: Any, name: str, **options: Any) -> Any:
    torch.manual_seed(1)
    config = method(name, **options)
    inject(model, config)
    return model.train()


def peft_lora(model: Any, targets: list[str] | None = None, causal: bool = True, dropout: float = 0.0) -> Any:
    """PEFT's LoRA of the same total rank; its adapters are float32."""
    from peft import LoraConfig, get_peft_model

    task = {"task_type": "CAUSAL_LM"} if causal else {}
    options = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=targets or TARGETS, **task)
    return get_peft_model(model, options).train()
