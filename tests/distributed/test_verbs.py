"""Everything but training works where the base is sharded: the verbs and the export say what one process says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from talklora_pl.cli import main
from tests.distributed.runs import Run, fit


def rounded(value: Any) -> Any:
    """Padding differs between layouts, and the last digits with it."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 6) if isinstance(value, float) else value


@pytest.mark.slow
def test_two_processes_with_a_sharded_base_say_what_one_says(config: Path, tmp_path: Path) -> None:
    """Scores of choices, generated answers, predictions and folders; of a checkpoint that two of them wrote."""
    sums = [{"id": f"s{i}", "prompt": "p" * i, "completion": str(i)} for i in range(1, 6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    given = yaml.safe_load(config.read_text())
    given["data"]["test"] = given["data"]["predict"] = [
        {"path": given["data"]["val"], "rows": "choice"},
        {"path": str(tmp_path / "sums.jsonl"), "rows": "completion"},
    ]
    given["model"]["evaluation"] = {"max_new_tokens": 4}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(given))
    options = ["--trainer.strategy", "fsdp", "--data.batch_size", "2", "--data.eval_batch_size", "64"]
    options += ["--trainer.callbacks+=SampleOutputs", "--trainer.callbacks.count", "2"]
    last = fit(tmp_path / "my.yaml", tmp_path / "fit", *options, ranks=2)
    events = EventAccumulator(str(last.parents[1]), size_guidance={"tensors": 0})
    events.Reload()
    # all questions are in a batch of the first process: the second has none, and works for the answers
    (shown,) = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/text_summary")]
    assert shown.count("prompt:") == shown.count("right:") == 2
    found: dict[int, list[Any]] = {1: [], 2: []}
    for ranks, said in found.items():
        for verb in ("validate", "test", "predict"):
            folder = tmp_path / f"{verb}{ranks}"
            argv = [verb, "--config", str(tmp_path / "my.yaml"), "--ckpt_path", str(last), "--run_name", "mine"]
            argv += ["--trainer.default_root_dir", str(folder), "--trainer.callbacks+=tests.distributed.faults.Metrics"]
            argv += ["--trainer.callbacks.folder", str(folder)]
            run = Run.start(folder, argv + (["--trainer.strategy", "fsdp"] if ranks == 2 else []), ranks)
            assert run.wait() == [0] * ranks, run.log()
            name = {"validate": "metrics.json", "test": "test_scores.json", "predict": "predictions.jsonl"}[verb]
            (file,) = folder.rglob(name)
            said.append(
                [rounded(json.loads(line)) for line in file.read_text().splitlines()]
                if verb == "predict"
                else rounded(json.loads(file.read_text()))
            )
    assert found[2] == found[1]
    metrics, scores, predictions = found[1]
    assert metrics["val_loss"] > 0 and len(predictions) == 12 and set(scores["adapter"]) >= {"val", "sums"}
    assert main(["export", str(last), "--out", str(tmp_path / "exported")]) == 0
    written, gathered = (
        load_file(f / "adapter.safetensors") for f in (tmp_path / "exported", last.parents[1] / "adapters/last")
    )
    assert written.keys() == gathered.keys() and all(torch.equal(written[k], gathered[k]) for k in written)
