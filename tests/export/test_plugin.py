"""An adapter with a component of one's own: whoever loads it says where the component is, and is told so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from talklora_pl import AdapterConfig, UserError, export_adapter, load_adapter
from talklora_pl.communication import Communication
from talklora_pl.registry import import_plugins
from tests.export import models

PLUGIN = '''
"""Everyone hears one expert."""

from dataclasses import dataclass

import torch

from talklora_pl.communication import Communication, CommunicationModule
from talklora_pl.registry import register


class OneSpeaks(CommunicationModule):
    def __init__(self, features, layer, speaker):
        super().__init__(features)
        self.speaker = speaker
        self.gain = torch.nn.Parameter(layer.zeros(1))

    def forward(self, m_TEF, x_TD):
        return m_TEF + self.gain * m_TEF[:, self.speaker : self.speaker + 1]


@register("one_speaks")
@dataclass
class Options(Communication):
    speaker: int = 0

    def build(self, layer, features):
        return OneSpeaks(features, layer, self.speaker)
'''


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As in a process that has not imported the component."""
    monkeypatch.setattr(Communication, "_members", dict(Communication._members))

    def unknown() -> None:
        Communication._members.pop("one_speaks")
        del sys.modules["one_speaks"]

    yield unknown
    sys.modules.pop("one_speaks", None)


def test_a_component_of_ones_own(tmp_path: Path, forget: Any) -> None:
    plugin = tmp_path / "one_speaks.py"
    plugin.write_text(PLUGIN)
    base = models.save_base(tmp_path / "base", "llama")
    model = models.load(base)
    import_plugins([str(plugin)])
    models.train(model, AdapterConfig.from_dict({"rank": 8, "communication": {"name": "one_speaks", "speaker": 2}}))
    want = models.logits(model)
    folder = export_adapter(model, tmp_path / "adapter", tokenizer=AutoTokenizer.from_pretrained(base))
    forget()

    loaders = {
        "load_adapter": lambda **o: load_adapter(models.load(base), folder, **o) and None,
        "from_pretrained": lambda **o: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **o),
        "pipeline": lambda **o: (
            pipeline("text-generation", model=str(folder), trust_remote_code=True, model_kwargs=o).model
        ),
    }
    for load in loaders.values():
        with pytest.raises(UserError, match=r"Unknown communication 'one_speaks'.*plugins=\["):
            load()
    for name, load in loaders.items():
        got = load(plugins=[str(plugin)])
        assert got is None or torch.equal(models.logits(got), want), name
        forget()
    import_plugins([str(plugin)])  # or import it as any module, before
    assert torch.equal(models.logits(loaders["from_pretrained"]()), want)
