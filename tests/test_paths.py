"""Paths mean the same wherever an option takes one."""

from __future__ import annotations

from pathlib import Path

import pytest

from talklora_pl.base import portable
from talklora_pl.errors import UserError
from talklora_pl.paths import expand


def test_home_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/me")
    assert expand("$SCRATCH/runs") == expand("${SCRATCH}/runs") == f"{tmp_path}/runs"
    assert expand("~/runs") == "/home/me/runs" and expand(Path("a/b")) == "a/b"
    assert portable("$SCRATCH") == str(tmp_path.resolve())


def test_an_unknown_variable_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCRATCH", raising=False)
    with pytest.raises(UserError, match=r"\$SCRATCH/runs: the environment variable \$SCRATCH is not set"):
        expand("$SCRATCH/runs")
    odd = tmp_path / "$cash"
    odd.touch()
    assert expand(odd) == str(odd)
