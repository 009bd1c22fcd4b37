"""Every page of the repository: its links lead somewhere, and GitHub and the site read it as the same."""

from __future__ import annotations

import posixpath
import re
import runpy
from functools import cache
from pathlib import Path

import markdown
import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"), ROOT / "tests/golden/README.md"]
)
GITHUB = MarkdownIt("commonmark").enable("table")


@cache
def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    tokens = GITHUB.parse(page.read_text("utf-8"))
    titles = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    words = ["".join(part.content for part in title.children or ()) for title in titles]
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    html = GITHUB.render(page.read_text("utf-8"))
    for link in re.findall(r'(?:href|src)="([^"]+)"', html):
        target, _, anchor = link.partition("#")
        if not re.match(r"[a-z]+:", target):
            file = Path(posixpath.normpath(page.parent / target)) if target else page
            assert file.exists() and file.is_relative_to(ROOT), link
            assert not anchor or anchor in anchors(file), link


def test_the_page_on_pypi_leads_to_the_files() -> None:
    absolute = runpy.run_path(str(ROOT / "tools/readme_links.py"))["absolute"]
    text = (ROOT / "README.md").read_text("utf-8")
    pages = (text, absolute(text, "https://a/b/c", "v1"))
    before, after = (re.findall(r'(href|src)="([^"]+)"', GITHUB.render(page)) for page in pages)
    assert {kind for kind, link in before if not link.startswith("https:")} == {"href", "src"}
    kinds = {"href": "https://a/b/c/blob/v1/", "src": "https://a/b/c/raw/v1/"}
    assert after == [(kind, link if link.startswith("https:") else kinds[kind] + link) for kind, link in before]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_two_parsers_see_one_page(page: Path) -> None:
    """Python-Markdown, which makes the site, wants blank lines before lists and four spaces in them."""
    text = page.read_text("utf-8")
    titled = re.sub(r"^(`{3,}\w+) [\w./-]+$", r"\1", text, flags=re.M)  # the site shows the name as a title
    site = markdown.markdown(titled, extensions=["tables", "fenced_code", "md_in_html", "sane_lists"])

    def seen(html: str) -> dict[str, int]:
        return {
            tag: len(re.findall(f"<{tag}[ >]", html)) for tag in ("h1", "h2", "h3", "li", "table", "pre", "a", "img")
        }

    assert seen(site) == seen(GITHUB.render(text))
