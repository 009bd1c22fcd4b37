"""DDP and FSDP2 runs export what one process exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.runs import fit, make_project


@pytest.mark.slow
def test_two_processes_export_what_one_does(tmp_path: Path) -> None:
    config = make_project(tmp_path)
    options = ("--data.batch_size", "2", "--trainer.val_check_interval", "2")
    runs = {"one": fit(config, tmp_path / "one", "--trainer.val_check_interval", "2")}
    for strategy in ("ddp", "fsdp"):
        runs[strategy] = fit(config, tmp_path / strategy, "--trainer.strategy", strategy, *options, ranks=2)
    folders = {name: checkpoint.parents[1] / "adapters" for name, checkpoint in runs.items()}
    for which in ("last", "best"):
        one = folders["one"] / which
        for strategy in ("ddp", "fsdp"):
            two = folders[strategy] / which
            want, got = load_file(one / "adapter.safetensors"), load_file(two / "adapter.safetensors")
            assert want.keys() == got.keys()
            assert all(torch.allclose(got[k], want[k], atol=1e-11) for k in want)
            want, got = (json.loads((f / "talklora.json").read_text()) for f in (one, two))
            assert {k: v for k, v in want.items() if k not in ("tensors_sha256", "sha256")} == {
                k: v for k, v in got.items() if k not in ("tensors_sha256", "sha256")
            }
            assert got["base"]["fingerprint"]
            assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
            AutoModelForCausalLM.from_pretrained(two, trust_remote_code=True)
            assert sorted(p.name for p in two.parent.iterdir()) == ["best", "last"]
