"""Loads this folder as a model: its base, named in config.json, with the adapter in it.

Needs the package talklora-pl; the adapter's arithmetic is there, not here.
"""

try:
    from talklora_pl.export.auto import from_pretrained
except ModuleNotFoundError as e:
    if e.name != "talklora_pl":
        raise
    raise ImportError(
        "This model is an adapter made with talklora-pl, which is not installed here: pip install talklora-pl"
    ) from None


class _Loader:
    """What the auto classes of transformers ask of a class; no model is ever made of this one."""

    auto_class = ""

    @classmethod
    def register_for_auto_class(cls, auto_class=""):
        """Nothing to do: `save_pretrained` of what comes back writes the base's own kind of folder."""

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        return from_pretrained(cls.auto_class, folder, **kwargs)


class TalkLoRAForCausalLM(_Loader):
    """Gives the base's own class, a causal language model, with the adapter on."""

    auto_class = "AutoModelForCausalLM"


class TalkLoRAForSequenceClassification(_Loader):
    """Gives the base's own class, a classifier with the trained head, with the adapter on."""

    auto_class = "AutoModelForSequenceClassification"
