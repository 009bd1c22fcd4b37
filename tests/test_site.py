"""The documentation site: strict links, a page for every component with its options, nothing fetched from elsewhere."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from talklora_pl import registry
from talklora_pl.cli import VERBS
from talklora_pl.cli.parts import FAMILIES

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(needed)
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


def plain(text: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", text))


def test_every_component_has_a_page_with_its_options(site: Path) -> None:
    for key, family in FAMILIES.items():
        for name in registry.names(family):
            cls = registry.get(family, name)
            if not cls.__module__.startswith("talklora_pl."):
                continue  # a plugin of another test in this process
            page = (site / f"reference/parts/{key}/{name}.html").read_text("utf-8")
            for option, _, _ in registry.options(cls):
                assert f"<td><code>{option}</code></td>" in page, (key, name, option)
            block = re.search(r"<pre[^>]*>(.*?)</pre>", page, re.S)
            assert block is not None, (key, name)
            found = yaml.safe_load(plain(block[1]))  # the component with its defaults
            if key == "rows":
                assert found == {"data": {"rows": name}}
                continue
            part = found["model"]["objective"] if key == "objective" else found["model"]["adapter"][key]
            part = part[0] if isinstance(part, list) else part
            made = {"name": part["class_path"], **part.get("init_args", {})}
            assert registry.to_dict(registry.from_dict(family, made)) == made, (key, name)


def test_pages_are_whole(site: Path) -> None:
    assert "<math" in (site / "methods.html").read_text("utf-8")
    commands = plain((site / "reference/commands.html").read_text("utf-8"))
    assert all(verb in commands for verb in VERBS) and "--model.adapter.communication" in commands
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert 'class="arithmatex"' not in text, page  # an equation that stayed text
        fetched = re.findall(r"<(?:script|img|iframe|link)\b[^>]*", text)
        away = [tag for tag in fetched if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag)]
        assert not [tag for tag in away if 'rel="canonical"' not in tag], page
        prose = re.sub(r"<pre.*?</pre>", "", text, flags=re.S).replace("<code>", "`")
        assert not re.search(r":(?:class|meth|func|mod|attr):`", prose), page
