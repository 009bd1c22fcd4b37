"""Bases as they are found: pads that disagree, no pooler, other classes, tokens without rows, penalties, positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from talklora_pl import AdapterConfig, FineTuner, TextData, inject
from talklora_pl.adapter.fingerprint import fingerprint
from talklora_pl.base import BaseModel, describe_base, load_base
from talklora_pl.base.loading import new_modules, settle
from talklora_pl.cli import main
from talklora_pl.distributed.shards import compare_with_files, fill_from_files
from talklora_pl.errors import UserError
from talklora_pl.evaluation import Evaluation
from talklora_pl.inputs import masked
from tests.adapter.test_fingerprint import old_fingerprint
from tests.data.tiny import tokenizer

pytestmark = pytest.mark.slow  # whole fits, one after the other

TINY: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "initializer_range": 0.2,
}
TEXTS = [{"text": word + "!" * n, "label": y} for n in range(6) for y, word in enumerate(("bad", "good"))]


def save(folder: Path, kind: str, auto: Any = AutoModelForCausalLM, tok: Any = None, **changes: Any) -> BaseModel:
    torch.manual_seed(0)
    auto.from_config(AutoConfig.for_model(kind, **TINY | changes)).save_pretrained(folder)
    (tok or tokenizer(pad=True)).save_pretrained(folder)
    return BaseModel(str(folder), dtype="float32")


def classifier(base: BaseModel, classes: int = 3) -> BaseModel:
    base.task, base.num_labels = "sequence_classification", classes
    return base


def fit(root: Path, base: BaseModel, rows: list[dict[str, Any]], *more: str, targets: str = "all-linear") -> Path:
    """Adapter folder of a run of three steps."""
    (root / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = {"task": base.task, "dtype": "float32", "path": base.path} | (
        {"num_labels": base.num_labels} if base.num_labels else {}
    )
    config = {
        "model": {"base": options, "adapter": {"rank": 8, "targets": targets}},
        "data": {"train": str(root / "rows.jsonl"), "val_size": 0, "batch_size": 2},
        "trainer": {
            "max_steps": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "default_root_dir": str(root / "runs"),
        },
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(root / "config.yaml"), *more]) == 0
    return root / "runs" / "version_0" / "adapters" / "last"


def load(folder: Path, auto: Any, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options)


# --- pads


FAMILIES = {
    "llama": {},
    "qwen2": {},
    "mistral": {},
    "phi": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 1},
    "gpt2": {},
    "bert": {},
    "roberta": {"pad_token_id": 1},
}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    ("in_config", "own", "left"),
    [(0, "<pad>", False), (None, "<pad>", True), (None, "</s>", False), (None, None, True), (0, None, False)],
)
def test_a_text_has_the_same_scores_alone_and_in_a_batch(
    kind: str, in_config: int | None, own: str | None, left: bool, tmp_path: Path
) -> None:
    tok = tokenizer(pad=False)
    tok.pad_token, tok.padding_side = own, "left" if left else "right"
    changes = {"pad_token_id": in_config} if kind not in ("bert", "roberta", "opt") else {}
    auto = AutoModelForMaskedLM if kind in ("bert", "roberta") else AutoModelForCausalLM
    base = classifier(save(tmp_path, kind, auto, tok, **FAMILIES[kind] | changes))
    model, facts = load_base(base), describe_base(base)
    rows = [tok(text).input_ids for text in ("bad!!", "good" + "!" * 20, "so")]
    together = masked(rows, facts.pad_id)
    assert together["input_ids"][0, : len(rows[0])].tolist() == rows[0]
    scores = model(**together).logits
    for row, want in zip(rows, scores, strict=True):
        got = model(**masked([row], facts.pad_id)).logits[0]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        changed = [*row[:-1], row[-1] + 1]  # its last token counts, though it may be the pad of the configuration
        if kind not in ("bert", "roberta"):
            assert not torch.allclose(model(**masked([changed], facts.pad_id)).logits[0], got, atol=1e-4)


def test_the_exported_classifier_knows_the_pad(tmp_path: Path) -> None:
    base = classifier(save(tmp_path / "base", "llama", pad_token_id=0), 2)
    folder = fit(tmp_path, base, TEXTS)
    model, tok = load(folder, AutoModelForSequenceClassification), transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["bad!", "good" + "!" * 20]
    together = model(**tok(texts, padding=True, return_tensors="pt")).logits
    alone = torch.cat([model(**tok(text, return_tensors="pt")).logits for text in texts])
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(model(**tok("bad!!", return_tensors="pt")).logits, alone[0], atol=1e-4)


# --- what a base lacks


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_made_up_pooler_is_trained_and_saved(kind: str, tmp_path: Path) -> None:
    base = classifier(save(tmp_path / "base", kind, AutoModelForMaskedLM, pad_token_id=1), 2)
    folder = fit(tmp_path, base, TEXTS)
    lacking = [m.removesuffix(".weight") for m in new_modules(load_base(base))]
    saved = load_file(folder / "adapter.safetensors")
    assert all(f"base.{m}.weight" in saved for m in lacking) and (kind != "bert" or "bert.pooler.dense" in lacking)
    ids = torch.tensor([[100, 101, 102]])
    one, other = (load(folder, AutoModelForSequenceClassification, seed)(input_ids=ids).logits for seed in (1, 2))
    assert torch.equal(one, other)


def test_another_number_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base", "llama", AutoModelForSequenceClassification, num_labels=3)
    folder = fit(tmp_path, classifier(base, 2), TEXTS)
    model = load(folder, AutoModelForSequenceClassification)
    assert model.config.num_labels == 2 and model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2)
    ids = torch.tensor([[100, 101, 102]])
    assert torch.equal(model(ids).logits, load(folder, AutoModelForSequenceClassification, 7)(ids).logits)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_sharded_reading_finds_the_same_new_modules(kind: str, classes: int, tmp_path: Path) -> None:
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForSequenceClassification
    base = classifier(save(tmp_path, kind, auto, pad_token_id=258, num_labels=3), classes)
    whole, model = load_base(base), load_base(base, meta=True)
    settle(model, base.path, compare_with_files(model), new_head=True)
    assert (
        new_modules(model)
        == new_modules(whole)
        == {"bert": ["bert.pooler.dense", "classifier"]}.get(kind, ["score"] if classes == 2 else [])
    )
    inject(model, AdapterConfig(rank=4, num_experts=2, targets="all-linear", modules_to_save=new_modules(model)))
    fill_from_files(model, torch.device("cpu"), torch.device("cpu"))
    for name, p in whole.named_parameters():
        mine = model.get_parameter(name)
        assert not mine.is_meta and mine.isfinite().all()
        assert p.requires_grad or torch.equal(mine, p)


# --- the vocabulary


def with_tools(**options: Any) -> Any:
    tok = tokenizer(pad=True, **options)
    tok.add_tokens([f"<tool{i}>" for i in range(6)])
    return tok


CITIES = [{"prompt": f"{i} <tool1>", "completion": f"<tool2>{i}<tool5>"} for i in range(6)]


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_a_tokenizer_larger_than_the_embedding_is_refused(task: Any, tmp_path: Path) -> None:
    base = save(tmp_path, "llama", tok=with_tools(), vocab_size=260)
    base.task = task
    (tmp_path / "model.safetensors").unlink()  # before the weights are read
    with pytest.raises(UserError, match=r"has 266 tokens, .* has 260 rows: none for '<tool0>' \(260\).* and 1 more"):
        load_base(base)
    with pytest.raises(UserError, match="resize_embeddings: true"):
        FineTuner(base, AdapterConfig()).check()


@pytest.mark.parametrize("kind", ["llama", "tied", "phi", "gpt2"])
def test_the_embedding_grows_is_trained_saved_and_merged(kind: str, tmp_path: Path) -> None:
    changes = {"tie_word_embeddings": True} if kind == "tied" else {}
    base = save(tmp_path / "base", "llama" if kind == "tied" else kind, tok=with_tools(), vocab_size=260, **changes)
    plain = (
        "--model.adapter.num_experts",
        "1",
        "--model.adapter.experts",
        "lora",
        "--model.adapter.communication",
        "none",
    )
    folder = fit(tmp_path, base, CITIES, "--model.base.resize_embeddings", "true", *plain)
    saved = load_file(folder / "adapter.safetensors")
    model = load(folder, AutoModelForCausalLM)
    embedding = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    assert saved[f"base.{embedding}"].shape[0] == 266 == model.config.vocab_size
    start = load_base(BaseModel(base.path, dtype="float32", resize_embeddings=True)).get_input_embeddings().weight
    assert not torch.equal(saved[f"base.{embedding}"][261], start[261])  # the row of <tool1> has learned
    assert torch.equal(model.get_input_embeddings().weight, saved[f"base.{embedding}"])
    ids = torch.tensor([[5, 261, 262, 265]])
    logits = model(ids).logits
    assert logits.shape[-1] == 266

    assert main(["export", str(folder.parents[1]), "--out", str(tmp_path / "merged"), "--merge"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(ids).logits, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_reading_grows_the_embedding_as_well(tied: bool, tmp_path: Path) -> None:
    base = save(tmp_path, "llama", tok=with_tools(), vocab_size=260, tie_word_embeddings=tied)
    base.resize_embeddings = True
    whole, model = load_base(base), load_base(base, meta=True)
    inject(model, AdapterConfig(rank=4, num_experts=2, modules_to_save=new_modules(model)))
    fill_from_files(model, torch.device("cpu"), torch.device("cpu"))
    assert all(torch.equal(model.get_parameter(n), p) for n, p in whole.named_parameters())


def test_nothing_grows_where_nothing_is_lacking(tmp_path: Path) -> None:
    base = save(tmp_path, "llama")
    base.resize_embeddings = True
    model = load_base(base)
    assert new_modules(model) == [] and model.config.vocab_size == 264


# --- generation


DEFAULTS = [
    {"repetition_penalty": 5.0},
    {"do_sample": True, "temperature": 5.0, "top_k": 200},
    {"num_beams": 3, "num_return_sequences": 2},
    {"no_repeat_ngram_size": 1},
    {"return_dict_in_generate": True, "output_scores": True},
    {"suppress_tokens": list(range(200))},
    {"min_new_tokens": 8, "forced_eos_token_id": 257},
    {"max_length": 3},
    {"bad_words_ids": [[i] for i in range(200)]},
    {"stop_strings": ["a"], "cache_implementation": "static"},
]


def answers(base: BaseModel, texts: tuple[str, ...] = ("one", "three", "eleven"), **options: Any) -> list[str]:
    torch.manual_seed(0)
    module = FineTuner(
        base, AdapterConfig(rank=8, targets="all-linear"), evaluation=Evaluation(max_new_tokens=12, **options)
    )
    module.configure_model()
    tok = tokenizer()
    rows = [tok(text).input_ids for text in texts]
    batch = masked(rows, 0)
    batch |= {"labels": torch.full_like(batch["input_ids"], -100), "answer": torch.full((len(rows),), -1)}
    batch |= {"prompt_length": torch.tensor([len(r) for r in rows])}
    return [text for text, _ in module.eval().score(batch, generate=True).texts]  # type: ignore[misc]


def test_what_the_base_says_may_be_nonsense(tmp_path: Path) -> None:
    base = save(tmp_path, "llama")
    want = answers(base)
    (tmp_path / "generation_config.json").write_text('{"num_return_sequences": 2, "do_sample": false}')
    assert answers(base) == want
    module = FineTuner(base, AdapterConfig(rank=8), evaluation=Evaluation(generation="base"))
    with pytest.raises(UserError, match=r"generation_config\.json of .* cannot be used: .*num_return_sequences"):
        module.check()


@pytest.mark.parametrize("defaults", DEFAULTS, ids=lambda d: next(iter(d)))
def test_greedy_is_greedy_whatever_the_base_says(defaults: dict[str, Any], tmp_path: Path) -> None:
    base = save(tmp_path, "llama")
    want = answers(base)
    assert all(len(text) > 3 for text in want)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | defaults))
    assert answers(base) == want


def test_the_defaults_of_the_base_can_be_asked_for(tmp_path: Path) -> None:
    base = save(tmp_path, "llama")
    plain = answers(base)
    assert answers(base, generation="base") == plain
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 5.0}))
    got = answers(base, generation="base")
    assert got != plain and len(got) == 3
    tok, model = tokenizer(), load_base(base)
    assert model.generation_config.repetition_penalty == 5
    ids = tok("three", return_tensors="pt").input_ids
    assert got[1] == tok.decode(model.generate(ids, max_new_tokens=12)[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("defaults", DEFAULTS, ids=lambda d: next(iter(d)))
def test_one_answer_of_the_asked_length_whatever_the_base_says(defaults: dict[str, Any], tmp_path: Path) -> None:
    base, tok = save(tmp_path, "llama"), tokenizer()
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | defaults))
    got = answers(base, generation="base")
    assert len(got) == 3 and all(0 < len(tok(text).input_ids) <= 1 + 3 * 12 for text in got)  # half a letter: 3 bytes


def test_any_of_the_bases_ends_ends_an_answer(tmp_path: Path) -> None:
    base = save(tmp_path, "phi", tok=with_tools(), vocab_size=266)
    model = load_base(base)
    model.lm_head.bias.data[262] = 100  # all that it writes is <tool2>
    model.save_pretrained(tmp_path)
    assert answers(base) == ["<tool2>" * 12] * 3
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [257, 262]}))
    assert answers(base) == ["<tool2>"] * 3


# --- context


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize(("length", "new"), [(40, 12), (60, 4), (63, 1), (64, 1)])
def test_answers_end_where_the_positions_do(kind: str, length: int, new: int, tmp_path: Path) -> None:
    base, tok = save(tmp_path, kind, **FAMILIES[kind] | {"eos_token_id": None}), tokenizer()
    prompt = "w" * (length - 1)  # and BOS
    ids = tok(prompt, return_tensors="pt").input_ids
    if kind == "llama":
        new = 12  # its positions are computed
    else:
        ids = ids[:, max(0, length + new - 64) :]
    want = load_base(base).generate(ids, max_new_tokens=new)[0, ids.shape[1] :]
    assert answers(base, (prompt,)) == [tok.decode(want, skip_special_tokens=True)]


def test_rows_are_cut_to_the_positions_that_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = classifier(save(tmp_path, "roberta", AutoModelForMaskedLM, pad_token_id=1), 2)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": "w" * 99, "label": i % 2}) + "\n" for i in range(6))
    )
    data = TextData(str(tmp_path / "rows.jsonl"), val_size=0, batch_size=2, base=base)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (2, 62)
    load_base(base)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with pytest.raises(UserError, match=r"data\.max_length: 63 is more than the model's context of 62 tokens"):
        TextData(str(tmp_path / "rows.jsonl"), val_size=0, max_length=63, base=base).prepare_data()


# --- fingerprints of earlier versions


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = save(tmp_path / "base", "llama")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CITIES))

    def run(steps: int, ckpt: Path | None = None) -> L.Trainer:
        torch.manual_seed(0)
        data = TextData(str(tmp_path / "rows.jsonl"), val_size=0, batch_size=2, base=base)
        from talklora_pl.callbacks.resume import ExactResume

        trainer = L.Trainer(
            max_steps=steps,
            logger=False,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            callbacks=[ExactResume()],
        )
        trainer.fit(FineTuner(base, AdapterConfig(rank=4)), data, ckpt_path=ckpt, weights_only=True)
        return trainer

    first, old, other = (tmp_path / f"{name}.ckpt" for name in ("first", "old", "other"))
    run(1).save_checkpoint(first)
    state = torch.load(first, weights_only=True)
    mark = state["talklora"]["base"]["fingerprint"]
    assert mark == fingerprint(load_base(base))
    state["talklora"]["base"]["fingerprint"] = old_fingerprint(load_base(base))
    torch.save(state, old)
    assert run(2, old).global_step == 2
    torch.manual_seed(1)
    strange = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path))
    state["talklora"]["base"]["fingerprint"] = old_fingerprint(strange)
    torch.save(state, other)
    with pytest.raises(UserError, match="weights"):
        run(2, other)
