from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.runs import fit, make_project


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config of the tiny project all runs share: 4 rows a step, 8 steps an epoch, 8 steps."""
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Last checkpoint of the uninterrupted run of one process."""
    return fit(config, tmp_path_factory.mktemp("reference"))
