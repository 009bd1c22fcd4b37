"""What `datasets` does beside its documented interface."""

from __future__ import annotations

from pathlib import Path

import datasets

from talklora_pl.internals.datasets import content_digest, row_writer


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


def test_written_rows_come_back(tmp_path: Path) -> None:
    features = datasets.Features({"ids": datasets.List(datasets.Value("int32")), "name": datasets.Value("string")})
    rows = [{"ids": [1, 2], "name": "a"}, {"ids": [], "name": "b"}]
    with row_writer(str(tmp_path / "rows.arrow"), features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    assert list(datasets.Dataset.from_file(str(tmp_path / "rows.arrow"))) == rows
