"""What `datasets` does beside its documented interface."""

from __future__ import annotations

from pathlib import Path

import datasets

from talklora_pl.internals.datasets import content_digest


def test_a_changed_folder_has_another_digest(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "train.jsonl"

    def digest(cache: str) -> str:
        return content_digest(datasets.load_dataset(str(file.parent), split="train", cache_dir=str(tmp_path / cache)))

    file.write_text('{"a": 1}\n')
    one = digest("x")
    assert one and digest("x") == digest("y") == one
    file.write_text('{"a": 2, "b": 1}\n')
    assert digest("x") != one
