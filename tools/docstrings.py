"""Docstrings for the site: what reStructuredText writes another way than Markdown does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([\w.]+)`")
TABLE = re.compile(r"^( *)=+(?: +=+)+ *\n.*?^ *=+(?: +=+)+ *$(?=\n\n|\n?\Z)", re.M | re.S)


def markdown(text: str, resolve: Callable[[str], str] = str) -> str:
    """A docstring in Markdown. References become links where the site has what they name.

    Args:
        text: the docstring.
        resolve: the full path of a name.
    """

    def link(found: re.Match[str]) -> str:
        name = found[2].rsplit(".", 1)[-1] if found[1] else found[2]
        return f'<autoref identifier="{resolve(found[2])}" optional><code>{name}</code></autoref>'

    text = TABLE.sub(lambda m: f"{m[1]}```text\n{m[0]}\n{m[1]}```", text)
    return ROLE.sub(link, re.sub(r"::\n\n", ":\n\n", text))


class Docstrings(griffe.Extension):
    """Applies it to everything that griffe has read of a package."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self.walk(pkg)

    def walk(self, obj: griffe.Object) -> None:
        def resolve(name: str) -> str:
            try:
                return obj.resolve(name.split(".")[0]) + name[len(name.split(".")[0]) :]
            except griffe.NameResolutionError:
                return name

        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, resolve)
        for member in obj.members.values():
            if not member.is_alias:
                self.walk(member)  # type: ignore[arg-type]
