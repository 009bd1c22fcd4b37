"""No process holds the whole base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from talklora_pl.base.weights import SafetensorsWeights
from talklora_pl.distributed.shards import fill_from_files
from talklora_pl.errors import UserError
from tests.data.tiny import save_model
from tests.distributed.runs import Run

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama tied, yarn": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, tie_word_embeddings=True, max_position_embeddings=64, rope_parameters=YARN)
    ),
    "gemma": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    ),
}


def in_shards(folder: Path, size: str) -> None:
    """Write the weights of a saved model anew, in files of at most this size."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)


def on_meta(folder: Path, cls: type[PreTrainedModel]) -> PreTrainedModel:
    with torch.device("meta"):
        model = cls(AutoConfig.from_pretrained(folder)).requires_grad_(False)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_filled_from_files_equals_from_pretrained(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(tmp_path, max_shard_size="20KB")  # several files
    cls = type(MODELS[name]())
    model, whole = on_meta(tmp_path, cls), cls.from_pretrained(tmp_path)
    fill_from_files(model, torch.device("cpu"), torch.device("cpu"))
    for kind in ("named_parameters", "named_buffers"):
        a, b = dict(getattr(model, kind)()), dict(getattr(whole, kind)())
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), kind


def test_the_weights_are_those_of_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2)).save_pretrained(tmp_path)
    asked = []

    def of(base: str, revision: str | None = None) -> SafetensorsWeights:
        asked.append((base, revision))
        raise UserError("stop")

    monkeypatch.setattr(SafetensorsWeights, "of", of)
    with pytest.raises(UserError, match="stop"):
        fill_from_files(on_meta(tmp_path, MixtralForCausalLM), torch.device("cpu"), torch.device("cpu"), "v2")
    assert asked == [(str(tmp_path), "v2")]


def test_another_layout_is_refused(tmp_path: Path) -> None:
    MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="meta_init false"):
        fill_from_files(on_meta(tmp_path, MixtralForCausalLM), torch.device("cpu"), torch.device("cpu"))
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="safetensors"):
        fill_from_files(on_meta(tmp_path, MixtralForCausalLM), torch.device("cpu"), torch.device("cpu"))


@pytest.mark.slow
def test_base_larger_than_a_process_may_hold(config: Path, tmp_path: Path) -> None:
    """A base of 336 MB in eight files, and processes that may take 290 MB more: two of them train it under fsdp, not
    under ddp. When they begin to train they have their halves and no more."""
    base, limit = 336, 290
    save_model(tmp_path / "model", hidden_size=512, intermediate_size=2048, num_hidden_layers=20)
    in_shards(tmp_path / "model", "48MB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 8
    argv = ["fit", "--config", str(config), "--model.base.path", str(tmp_path / "model")]
    argv += ["--model.base.dtype", "float32", "--model.adapter.dtype", "float32", "--trainer.max_steps", "2"]
    argv += ["--model.gradient_checkpointing", "true"]
    argv += ["--data.batch_size", "1", "--trainer.callbacks+=tests.distributed.faults.MemoryLimit"]
    argv += ["--trainer.callbacks.megabytes", str(limit), "--trainer.callbacks.folder"]
    for strategy in ("fsdp", "ddp"):
        folder = tmp_path / strategy
        options = [str(folder), "--trainer.default_root_dir", str(folder), "--trainer.strategy", strategy]
        run = Run.start(folder, [*argv, *options], ranks=2)
        codes = run.wait()
        if strategy == "fsdp":
            assert codes == [0, 0], run.log()
            assert max(float((folder / f"peak.{rank}").read_text()) for rank in (0, 1)) < 0.8 * base
            assert max(float((folder / f"loaded.{rank}").read_text()) for rank in (0, 1)) < 0.6 * base
        else:
            assert 0 not in codes, "the limit proves nothing"
