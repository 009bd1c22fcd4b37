"""Text data for fine-tuning: what a row is (`rows`), how it is written (`formats`), its tokens, batches and module."""

from talklora_pl.data.module import TextData
from talklora_pl.data.source import Source

__all__ = ["Source", "TextData"]
