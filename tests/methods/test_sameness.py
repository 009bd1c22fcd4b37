"""Every method file still computes what was written down: 20 losses and the exported tensors, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import sameness


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sameness")


@pytest.mark.parametrize("method", sameness.METHODS)
@pytest.mark.usefixtures("plain_dropout")
def test_losses_and_exported_tensors_are_those_written_down(method: str, folder: Path) -> None:
    want, got = json.loads((sameness.RECORDED / f"{method}.json").read_text()), sameness.run(method, folder)
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-10, abs=0)
    assert got["experts_per_layer"] == want["experts_per_layer"]
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-10, abs=1e-12)
