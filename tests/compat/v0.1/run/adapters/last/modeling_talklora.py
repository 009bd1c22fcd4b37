"""Loads this folder as a model: its base, named in config.json, with the adapter in it.

Needs the package talklora-pl; the adapter's arithmetic is there, not here.
"""

from transformers import PreTrainedModel

try:
    from talklora_pl.export.auto import from_pretrained
except ModuleNotFoundError as e:
    if e.name != "talklora_pl":
        raise
    raise ImportError(
        "This model is an adapter made with talklora-pl, which is not installed here: pip install talklora-pl"
    ) from None


class TalkLoRAForCausalLM(PreTrainedModel):
    """Gives the base's own class, a causal language model, with the adapter on."""

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        return from_pretrained("AutoModelForCausalLM", folder, **kwargs)


class TalkLoRAForSequenceClassification(PreTrainedModel):
    """Gives the base's own class, a classifier with the trained head, with the adapter on."""

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        return from_pretrained("AutoModelForSequenceClassification", folder, **kwargs)
