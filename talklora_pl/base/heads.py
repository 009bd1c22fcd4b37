"""The heads that a base model can get, and what other libraries call each: the values of ``model.base.task``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Head:
    """What follows from ``model.base.task``.

    Attributes:
        auto_class: of transformers, loads the base.
        exported: class in ``modeling_talklora.py`` that loads an exported adapter.
        peft: task type of PEFT.
        pipeline: task of the hub.
        objective: registered name of the objective where none is chosen.
        classifies: it has classes, and its weights are new and not part of the pretrained model.
    """

    auto_class: str
    exported: str
    peft: str
    pipeline: str
    objective: str
    classifies: bool = False

    def auto(self, config: PretrainedConfig) -> Any:
        """The class of transformers that loads a base with this configuration.

        Models of text and images have one of their own; they continue a text like any other.
        """
        import transformers

        from talklora_pl.internals.transformers import has_model

        auto = getattr(transformers, self.auto_class)
        also = transformers.AutoModelForImageTextToText
        if not self.classifies and not has_model(auto, config) and has_model(also, config):
            return also
        return auto

    @property
    def suffix(self) -> str:
        """End of the names of the model classes that have it."""
        return self.auto_class.removeprefix("AutoModel")


HEADS = {
    "causal_lm": Head("AutoModelForCausalLM", "TalkLoRAForCausalLM", "CAUSAL_LM", "text-generation", "sft"),
    "sequence_classification": Head(
        "AutoModelForSequenceClassification",
        "TalkLoRAForSequenceClassification",
        "SEQ_CLS",
        "text-classification",
        "classification",
        classifies=True,
    ),
}
