"""A key that stands twice is refused wherever a user's JSON or YAML is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from talklora_pl.adapter.files import read_json as read_adapter_file
from talklora_pl.cli.options import read_yaml as read_config
from talklora_pl.data.source import BadRow, Reader, Source
from talklora_pl.errors import UserError
from talklora_pl.strict import read_json, read_yaml


def test_json() -> None:
    assert read_json('{"a": {"b": 1}, "c": [{"b": 1}, {"b": 2}]}') == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 2}]}
    with pytest.raises(ValueError, match="the key 'b' stands twice"):
        read_json('{"a": [{"b": 1, "b": 1}]}')


def test_yaml() -> None:
    assert read_yaml("x: &x {q: 1}\ny: {<<: *x, q: 2}\nz: *x") == {"x": {"q": 1}, "y": {"q": 2}, "z": {"q": 1}}
    for text in ("a: 1\n'a': 2", "a: {b: 1, c: 2, b: 3}", "- a: 1\n  a: 1"):
        with pytest.raises(yaml.YAMLError, match=r"the key '\w' stands twice"):
            read_yaml(text)


def test_where_users_write_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"my.yaml is not readable as YAML: the key 'lr' stands twice"):
        read_config("model:\n  lr: 1\n  lr: 2\n", "my.yaml")
    file = tmp_path / "talklora.json"
    file.write_text('{"a": 1, "a": 2}')
    with pytest.raises(UserError, match="the key 'a' stands twice"):
        read_adapter_file(file)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "prompt": "b"}\n{"prompt": "c"}\n')
    (first, bad), (_, good) = Reader(Source(str(rows)))
    assert first == "line 1" and isinstance(bad, BadRow) and "the key 'prompt' stands twice" in str(bad)
    assert good == {"prompt": "c"}
