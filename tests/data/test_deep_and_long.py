"""Numbers of thousands of digits and lists in lists in lists: one message with the place, never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from talklora_pl.adapter.files import read_json
from talklora_pl.allocation.rules import File
from talklora_pl.data.classes import listed
from talklora_pl.data.rows.chat import _parsed
from talklora_pl.data.source import BadRow, Reader, Source
from talklora_pl.errors import UserError
from talklora_pl.runs import Run

LONG, DEEP = "9" * 5000, "[" * 20_000 + "]" * 20_000


@pytest.mark.parametrize("value", [LONG, DEEP])
def test_in_rows(tmp_path: Path, value: str) -> None:
    good = '{"prompt": "a", "completion": "b"}'
    bad = f'{{"prompt": "x", "completion": "y", "key": {value}}}'
    (tmp_path / "a.jsonl").write_text(f"{good}\n{bad}\n{good}\n")
    rows = list(Reader(Source(str(tmp_path / "a.jsonl"))))
    assert [isinstance(row, BadRow) for _, row in rows] == [False, True, False] and rows[1][0] == "line 2"
    (tmp_path / "a.json").write_text(f"[{good}, {bad}]")
    with pytest.raises(UserError, match=r"a\.json: "):
        list(Reader(Source(str(tmp_path / "a.json"))))
    assert _parsed(value) == value  # a cell of a table


@pytest.mark.parametrize("value", [LONG, DEEP])
def test_in_files_beside_rows(tmp_path: Path, value: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(f'{{"names": {value}}}')
    with pytest.raises(UserError, match=r"data\.labels: .*file\.json"):
        listed(str(file))
    with pytest.raises(UserError, match=r"file\.json: not valid"):
        File(str(file)).allocate([], 4)
    with pytest.raises(UserError, match=r"file\.json is not readable as JSON"):
        read_json(file)
    file.rename(tmp_path / "run.json")
    assert Run(tmp_path).record == {}
