"""Whole or not at all, with the user's file mode, and nothing left beside it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from talklora_pl.durable import beside, folder_beside, write_whole


def test_a_failed_write_leaves_the_file_from_before(tmp_path: Path) -> None:
    place = tmp_path / "file"
    write_whole(place, lambda part: part.write_text("first"))

    def fail(part: Path) -> None:
        part.write_text("hal")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(place, fail)
    assert place.read_text() == "first" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_and_folders_have_the_mode_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        # safetensors by itself writes files that only their owner reads
        write_whole(tmp_path / "file", lambda part: save_file({"x": torch.zeros(1)}, part))
        with folder_beside(tmp_path / "folder") as work:
            work.rename(tmp_path / "folder")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_a_folder_that_was_not_put_in_place_is_gone(tmp_path: Path) -> None:
    beside(tmp_path / "folder").mkdir()  # of a killed process of the same number
    with pytest.raises(ValueError), folder_beside(tmp_path / "folder") as work:
        (work / "half").touch()
        raise ValueError
    assert not os.listdir(tmp_path)
