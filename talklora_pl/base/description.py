"""What the rest of the package needs to know of a base, read once from its configuration, tokenizer and defaults."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

DEFAULT_LENGTH = 512
LONGEST = 1 << 24  # tokenizers write 1e30 where there is no limit
MEDIA = ("image", "video", "audio", "boi", "eoi", "boa", "eoa")


@dataclass(frozen=True)
class Description:
    """Facts of a base model.

    Attributes:
        pad_id: fills short rows. A classifier pools at the last token that is not this one, so the model has to know
            the same id, see :func:`pool_before`. Any id that is no part of a text does: the attention mask says what
            is real.
        vocab_size: rows of the token embedding; None: it has no such table.
        num_tokens: ids that the tokenizer can give, those of added tokens included.
        beyond: tokens for which the embedding has no row, by id. Placeholders of images, video and sound do not count:
            multimodal families share a tokenizer with their models of text alone.
        context_length: tokens of the longest sequence that the model can read; None: no limit is known.
        positions: the same where the model cannot take one step more (a table of positions, as GPT-2 has it); None
            where it computes them (rotary ones), so that generating may go beyond.
        default_length: tokens of a sequence where nobody says.
        eos_ids: tokens that end a text, the tokenizer's first.
        generation: how the base generates by default.
    """

    pad_id: int
    vocab_size: int | None
    num_tokens: int
    beyond: dict[int, str]
    context_length: int | None
    positions: int | None
    default_length: int
    eos_ids: tuple[int, ...]
    generation: GenerationConfig


def describe(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation: GenerationConfig | None = None,
) -> Description:
    """Read the facts.

    Args:
        config: of the base; that of its text part counts where it has several.
        tokenizer: of the base, if it has one.
        generation: of the base; None: by its configuration.
    """
    from transformers import GenerationConfig

    generation = generation or GenerationConfig.from_model_config(config)
    text = text_config(config)
    vocab_size = getattr(text, "vocab_size", None)
    tokens = {i: token for token, i in tokenizer.get_vocab().items()} if tokenizer is not None else {}
    num_tokens = max(tokens, default=-1) + 1
    rows = math.inf if vocab_size is None else max(vocab_size, num_tokens)  # it may grow
    media = _media_tokens(tokenizer)
    context = context_length(config)
    ends = _ids([tokenizer], "eos_token_id")
    # only added tokens end a text: some configurations name an id that is a letter to the tokenizer
    added = getattr(tokenizer, "added_tokens_decoder", None)
    ends += tuple(i for i in _ids([generation, text, config], "eos_token_id") if added is None or i in added)
    # the tokenizer's own first: it alone says what never occurs in a text
    pads = (*_ids([tokenizer], "pad_token_id", "eos_token_id"), *_ids([text, config], "pad_token_id"))
    pads += _ids([text, config], "eos_token_id")
    return Description(
        pad_id=next((i for i in pads if i < rows), 0),
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        beyond={i: tokens[i] for i in sorted(tokens) if i >= (vocab_size or rows) and tokens[i] not in media},
        context_length=context,
        positions=None if _rope(text) else context,
        default_length=min(DEFAULT_LENGTH, context or getattr(tokenizer, "model_max_length", DEFAULT_LENGTH)),
        eos_ids=tuple(dict.fromkeys(ends)),
        generation=generation,
    )


def text_config(config: PretrainedConfig) -> Any:
    """The part of a configuration that describes the language model."""
    try:
        return config.get_text_config()
    except ValueError:  # it has a text encoder and a decoder
        return config.get_text_config(decoder=True)


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether the model reads a whole text, as BERT does, and cannot continue one."""
    return _has_masked_lm(config) and not getattr(config, "is_decoder", False)


def pool_before(config: PretrainedConfig, pad_id: int) -> None:
    """Let a decoder that classifies pool at its last token that is not ``pad_id``.

    Encoders pool elsewhere, and RoBERTa counts its positions from its own pad.
    """
    for part in (config, text_config(config)):
        if not is_encoder(config) or getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = pad_id


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens of the longest sequence that the model can read; None where the configuration sets no limit."""
    text = text_config(config)
    # OPT, BART and BioGPT enlarge their table by the offset that they add; T5 and Bloom have no positions
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not isinstance(length, int) or not 0 < length < LONGEST:
        return None
    rope = _rope(text)
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if isinstance(factor, (int, float)):  # Qwen names the length before YaRN, Llama the one that it reaches
        length = max(length, int(factor * (original or length)))
    return length - _unusable_positions(config)


def _rope(text: Any) -> dict[str, Any]:
    return getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}


def _unusable_positions(config: PretrainedConfig) -> int:
    """Rows at the beginning of the position table that no token gets: RoBERTa and its relatives count from
    ``padding_idx`` + 1, which only their code says."""
    import torch
    from transformers import AutoModel

    if not _has_masked_lm(config):
        return 0
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(copy.deepcopy(config))
    except Exception:  # a configuration that cannot be built is refused where the model is loaded
        return 0
    tables = [m for n, m in model.named_modules() if n.endswith("position_embeddings")]
    return max((m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), default=0)


def _has_masked_lm(config: PretrainedConfig) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    return config.model_type in ENCODERS


def _ids(sources: list[Any], *names: str) -> tuple[int, ...]:
    """The token ids that these attributes hold, in order; some hold a list, None, or -1 for none."""
    given = [getattr(source, name, None) for source in sources for name in names]
    flat = [i for value in given for i in (value if isinstance(value, (list, tuple)) else [value])]
    return tuple(dict.fromkeys(i for i in flat if type(i) is int and i >= 0))


def _media_tokens(tokenizer: Any) -> set[str]:
    names = [f"{kind}_token" for kind in MEDIA]
    return {str(token) for name in names if (token := getattr(tokenizer, name, None)) is not None}
