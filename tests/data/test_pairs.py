"""Two texts to classify, in the tokenizer's own form for pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast

from talklora_pl.base import BaseModel
from talklora_pl.data import TextData
from talklora_pl.data.rows import Example
from talklora_pl.data.tokens import Tokenize
from talklora_pl.inputs import model_inputs
from talklora_pl.objectives.classification import Classification
from tests.data.tiny import tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij"]
FORMS = {
    "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "roberta": ("[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B [SEP]"),
}


def words(form: str, **options: Any) -> PreTrainedTokenizerFast:
    """One token a word."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    single, pair = FORMS[form]
    core.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if form == "bert" else [])]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=inputs, **names, **options)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "texts", [("a b c", "d e"), ("a", "d e f g h i j"), ("a b c d e f g", "h"), ("a b c d", "e f g h")]
)
def test_pairs_are_what_the_tokenizer_makes_of_them(form: str, texts: tuple[str, str], side: str) -> None:
    tok = words(form, truncation_side=side)
    for length in (7, 8, 9, 30):
        tokens = Tokenize(tok, length, ends=False, token_types=2).pair(Example(texts[0], pair=texts[1]), "plain")
        wanted = tok(*texts, truncation=True, max_length=length)
        assert (tokens.input_ids, tokens.token_type_ids) == ([wanted.input_ids], wanted.get("token_type_ids", []))
        assert tokens.cut == len(tok(*texts).input_ids) - len(wanted.input_ids)


def test_a_model_with_one_kind_of_tokens_is_told_of_none() -> None:
    assert Tokenize(words("bert"), 30, ends=False).pair(Example("a", pair="b"), "plain").token_type_ids == []


def test_a_tokenizer_without_a_form_for_pairs_is_said() -> None:
    tok = tokenizer(bos=False)
    tokens = Tokenize(tok, 30).pair(Example("ab", pair="cd"), "plain")
    assert tokens.input_ids == [tok("abcd").input_ids] and "puts nothing between" in tokens.notices[-1]
    assert Tokenize(tokenizer(), 30).pair(Example("ab", pair="cd"), "plain").notices == []


def test_the_model_is_told_which_text_a_token_is_of(tmp_path: Any) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    words("bert").save_pretrained(tmp_path)
    rows = [{"text": "a b", "text_pair": "c", "label": "x"}, {"text": "d e f g h", "label": "y"}]
    base = BaseModel(str(tmp_path), task="sequence_classification")
    module = TextData(rows, val_size=0, batch_size=2, length_grouped=False, base=base)
    module.setup("fit")
    (batch,) = module.train_dataloader()
    inputs = model_inputs(batch)
    kinds = dict(zip(inputs["attention_mask"].sum(1).tolist(), inputs["token_type_ids"].tolist()))
    assert kinds == {6: [0, 0, 0, 0, 1, 1, 0], 7: [0] * 7}
    alone = [
        dict(words("bert")("a b", "c", return_tensors="pt")),
        dict(words("bert")("d e f g h", return_tensors="pt")),
    ]
    logits = torch.cat([model(**one).logits for one in alone])[batch["labels"]]
    assert torch.allclose(model(**inputs).logits, logits, atol=1e-6)
    assert Classification().loss(model, batch)[1] == 2
