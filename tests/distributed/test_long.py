"""A long run takes no more of anything at its end than at its beginning; docs/distributed.md has 2,000 steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.runs import fit


@pytest.mark.slow
def test_memory_open_files_and_event_file_stay_bounded(config: Path, tmp_path: Path) -> None:
    """75 epochs, each with a validation and a checkpoint."""
    options = ["--trainer.max_steps", "600", "--trainer.max_epochs", "-1", "--trainer.log_every_n_steps", "10"]
    options += ["--trainer.callbacks+=tests.distributed.faults.Figures", "--trainer.callbacks.folder", str(tmp_path)]
    fit(config, tmp_path, *options)
    steps, megabytes, files, _ = np.loadtxt(tmp_path / "figures").T
    assert steps[-1] == 600
    assert megabytes[-1] - megabytes[0] < 5
    assert files[-1] == files[0]
    assert sum(f.stat().st_size for f in tmp_path.glob("**/events.out.tfevents.*")) < 60 * 2_000 + 75 * 2_000
