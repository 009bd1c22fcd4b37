"""Pages of the site that are made: from README and other files outside docs/, from the package's parts and docstrings.

A hook of mkdocs (mkdocs.yml). A page of docs/ reads the same on GitHub: its links to files outside docs/ lead to pages
that show those files.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import posixpath
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import griffe
import yaml
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pathspec.gitignore import GitIgnoreSpec

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from docstrings import ROLE, markdown  # noqa: E402

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
}
"""Files of the repository that are pages; others that a page links to are under files/."""

API: dict[str, list[str]] = {
    "Train": ["fit", "Trained", "method", "methods", "FineTuner", "talklora_pl.optim", "UserError"],
    "Adapters": [
        "AdapterConfig", "PlainLoRA", "inject", "remove_adapter", "set_adapter", "disable_adapter", "adapter_rows",
        "save_adapter", "load_adapter", "export_adapter", "merge_adapter", "push_adapter", "RoutingCollector",
        "balance_loss", "BalanceMixin",
    ],
    "Data and bases": ["TextData", "Source", "BaseModel", "talklora_pl.data.rows.Example", "talklora_pl.data.rows.Row"],
    "Base classes of parts": [
        "register", "talklora_pl.spec.LayerSpec", "talklora_pl.routing.Routing", "talklora_pl.routing.RoutingRecord",
        "talklora_pl.experts.Experts", "talklora_pl.experts.LinearExperts", "talklora_pl.sites.Site",
        "talklora_pl.communication.Communication", "talklora_pl.communication.CommunicationModule",
        "talklora_pl.routers.Router", "talklora_pl.routers.RouterModule", "talklora_pl.routers.scores.Scored",
        "talklora_pl.balance.Balance", "talklora_pl.balance.BalanceLoss", "talklora_pl.allocation.Allocation",
        "talklora_pl.objectives.Objective", "talklora_pl.data.rows.RowKind",
    ],
    "Callbacks": ["talklora_pl.callbacks"],
}  # fmt: skip
"""Pages of the reference: names that the package exports, and full paths. Every exported name must be on one."""

LINK = re.compile(r'(\]\(|\bsrc=")([^)"#:\s]+)(?=[)"#])')
_sources: dict[str, str] = {}  # page -> its file in the repository


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the package together as it is installed, for griffe, and fill the navigation."""
    tree = Path(tempfile.mkdtemp(prefix="talklora-site-")) / "talklora_pl"
    shutil.copytree(ROOT / "talklora_pl", tree, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "callbacks", tree / "callbacks", ignore=shutil.ignore_patterns("__pycache__"))
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(tree.parent)]
    config["package_tree"] = str(tree.parent)
    return config


def on_post_build(config: MkDocsConfig) -> None:
    """Remove what on_config made."""
    shutil.rmtree(config["package_tree"])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    _sources.clear()
    for file in files.documentation_pages():
        _sources[file.src_uri] = f"docs/{file.src_uri}"
    made: dict[str, str] = {}
    for source, page in PAGES.items():
        made[page] = (ROOT / source).read_text("utf-8")
        _sources[page] = source
    reference = reference_pages()
    made |= reference
    wanted = [(source, made.get(page) or (ROOT / source).read_text("utf-8")) for page, source in _sources.items()]
    while wanted:  # files that pages link to, and files that these link to
        source, text = wanted.pop()
        for target in {repository_path(source, found[2]) for found in LINK.finditer(text)}:
            page = site_path(target)
            if page is None or page in _sources or target.startswith("docs/"):
                continue
            _sources[page] = target
            made[page] = shown(ROOT / target)
            wanted.append((target, made[page] if target.endswith(".md") else ""))
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    assert config.nav is not None
    for entry in config.nav:
        if "Reference" in entry:
            entry["Reference"] = navigation(list(reference))
    listed = str(config.nav)
    left = [page for page in _sources if f"'{page}'" not in listed]
    for entry in config.nav:
        if "How to" in entry:  # a new page of docs/ has a place until mkdocs.yml gives it a better one
            entry["How to"] += [page for page in left if page not in made]
    config.not_in_nav = GitIgnoreSpec.from_lines(f"/{page}" for page in left if page in made)
    return files


def repository_path(source: str, link: str) -> str:
    """What a link in a file means, relative to the root of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def site_path(target: str) -> str | None:
    """The page that shows a file of the repository; None if there is no such file."""
    if target.startswith("..") or not (ROOT / target).is_file():
        return None
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return PAGES.get(target) or f"files/{target if target.endswith('.md') else target + '.md'}"


def shown(file: Path) -> str:
    """A file as a page."""
    text = file.read_text("utf-8")
    if file.suffix == ".md":
        return text
    if file.suffix == ".ipynb":
        return notebook(json.loads(text), file.name)
    kind = {".py": "python", ".yaml": "yaml", ".sh": "bash"}.get(file.suffix, "text")
    return f"# {file.name}\n\n````{kind}\n{text}````\n"


def notebook(content: dict[str, Any], name: str) -> str:
    """An executed notebook as a page: texts, code, and what it printed and drew."""
    out = []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            out.append(source)
            continue
        out.append(f"````python\n{source}\n````")
        for result in cell["outputs"]:
            data = result.get("data", {})
            printed = "".join(result.get("text") or data.get("text/plain") or "")
            if "image/png" in data:
                out.append(f"![what the cell drew](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif printed.strip() and result.get("name") != "stderr":
                out.append(f"````text\n{printed.rstrip()}\n````")
    page = "\n\n".join(out)
    return page if page.lstrip().startswith("# ") else f"# {name}\n\n{page}"


def on_page_markdown(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository become links of the site; a file's name behind the language of a block its title."""
    source = _sources.get(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri) or "."

    def link(found: re.Match[str]) -> str:
        target = site_path(repository_path(source or "", found[2]))
        if target is None:
            return found[0]
        if found[1] != "](":  # HTML is left as it is: the address of the page in the site
            target = re.sub(r"\.md$", ".html", target)
        return found[1] + posixpath.relpath(target, here)

    if source is not None:
        text = LINK.sub(link, text)
    return re.sub(r"^(`{3,}\w+) ([\w./-]+)$", r'\1 title="\2"', text, flags=re.M)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Equations become MathML, which browsers draw by themselves."""

    def equation(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(_unescape(found[2]), display=display)

    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', equation, html, flags=re.S)


def _unescape(text: str) -> str:
    for entity, letter in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(entity, letter)
    return " ".join(text.split())


# ---- what is made from the package


def reference_pages() -> dict[str, str]:
    """Page -> Markdown, in the order of the navigation."""
    os.environ["COLUMNS"] = "86"  # of help texts
    return {"reference/commands.md": commands(), "reference/configs.md": configs(), **api(), **parts()}


def api() -> dict[str, str]:
    """Docstrings of what the package exports."""
    import talklora_pl

    pages = {}
    missing = set(talklora_pl.__all__)
    for title, names in API.items():
        lines = [f"# {title}\n"]
        for name in names:
            missing.discard(name)
            path = name
            if "." not in name:
                thing = getattr(talklora_pl, name)
                path = f"{thing.__module__}.{thing.__qualname__}"
            lines.append(f"::: {path}\n")
        pages[f"reference/api/{title.lower().replace(' ', '-')}.md"] = "\n".join(lines)
    if missing:
        raise ValueError(f"tools/site.py: exported names on no page of the reference: {sorted(missing)}")
    return pages


def parts() -> dict[str, str]:
    """A page for every registered component, and one that lists them."""
    from talklora_pl import registry
    from talklora_pl.cli.parts import FAMILIES

    index = ["# Parts\n", "What `python -m talklora_pl components` lists, one page for each.\n"]
    pages = {"reference/parts/index.md": ""}
    modules: dict[str, str] = {}  # where each is documented: several components can share one
    for key, family in FAMILIES.items():
        index += [f"\n## {key}\n", "| name | what it is |", "|---|---|"]
        for name in registry.names(family):
            cls = registry.get(family, name)
            summary = markdown(cls.__doc__ or "").strip().split("\n")[0]
            index.append(f"| [`{name}`]({key}/{name}.md) | {summary} |")
            pages[f"reference/parts/{key}/{name}.md"] = part(key, name, cls)
            if cls.__module__ in modules:
                see = f"On the page of [`{modules[cls.__module__]}`]({modules[cls.__module__]}.md#its-module).\n"
            else:
                modules[cls.__module__] = name
                see = f"::: {cls.__module__}\n    options: {{heading_level: 3, show_root_heading: false}}\n"
            pages[f"reference/parts/{key}/{name}.md"] += f"## Its module\n\n{see}"
    pages["reference/parts/index.md"] = "\n".join(index) + "\n"
    return pages


def part(key: str, name: str, cls: Any) -> str:
    """The page of one component: what it is, its options, a config with them, and who uses it."""
    from talklora_pl import registry

    sections = docstring(cls)
    text = "\n\n".join(s.value for s in sections if s.kind is griffe.DocstringSectionKind.text)
    lines = [f"# {name}\n", f"{text}\n"]
    options = registry.options(cls)
    if options:
        meaning: dict[str, str] = {}
        for parent in reversed(cls.__mro__[:-1]):  # the nearest class has the last word
            for section in docstring(parent):
                if section.kind is griffe.DocstringSectionKind.attributes:
                    for item in section.value:
                        meaning |= {n: " ".join(item.description.split()) for n in re.split(r",\s*", item.name)}
        lines += ["## Options\n", "| option | type | default | |", "|---|---|---|---|"]
        for option, kind, default in options:
            kind = re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace("'", "").replace(", ", " | "), kind)
            meant = meaning.get(option, "").replace("|", "&#124;")
            lines.append(f"| `{option}` | `{kind}` | `{yaml_value(default)}` | {meant} |")
        lines.append("")
    config = yaml.safe_dump(config_of(key, name, options), sort_keys=False)
    lines.append(f"## In a config\n\n```yaml\n{config}```\n")
    users = [file.stem for file in sorted((ROOT / "configs/method").glob("*.yaml")) if uses(file, key, name)]
    if users:
        lines.append("Methods that use it: " + ", ".join(f"[`{u}`](../../configs.md#method{u})" for u in users) + ".\n")
    return "\n".join(lines)


def docstring(cls: Any) -> list[griffe.DocstringSection]:
    """Sections of a class's own docstring."""
    import inspect

    text = cls.__dict__.get("__doc__") or ""
    if text.startswith(f"{cls.__name__}("):  # made by dataclass, for want of one
        return []
    return griffe.Docstring(markdown(inspect.cleandoc(text))).parse("google", warnings=False)


def yaml_value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def config_of(key: str, name: str, options: list[tuple[str, str, Any]]) -> dict[str, Any]:
    """Options of a run that name the component, with its defaults."""
    from talklora_pl.cli.parts import FAMILIES

    if key == "rows":
        return {"data": {"rows": name}}
    chosen: Any = {"class_path": name, "init_args": {n: d for n, _, d in options}} if options else {"class_path": name}
    if key == "objective":
        return {"model": {"objective": chosen}}
    assert key in FAMILIES
    return {"model": {"adapter": {key: [chosen] if key == "balance" else chosen}}}


def uses(file: Path, key: str, name: str) -> bool:
    """Whether a method's file names a component."""
    value = yaml.safe_load(file.read_text("utf-8"))["model"]["adapter"].get(key)
    values = value if isinstance(value, list) else [value]
    return name in [v.get("class_path") if isinstance(v, dict) else v for v in values]


def configs() -> str:
    """The configs that come with the package, as they are."""
    lines = ["# Shipped configs\n", "Any of these after `--config`, several in a row: what comes later counts.\n"]
    for file in sorted((ROOT / "configs").rglob("*.yaml"), key=lambda f: (f.parent.name != "method", f)):
        lines += [
            f"## {file.relative_to(ROOT / 'configs').with_suffix('')}\n",
            f"```yaml\n{file.read_text('utf-8')}```\n",
        ]
    return "\n".join(lines)


def commands() -> str:
    """``--help`` of every verb."""
    from talklora_pl.cli import VERBS, main

    lines = [
        "# Commands\n",
        "`python -m talklora_pl VERB`. The options of `fit`, `validate`, `test` and `predict` are the same.\n",
    ]
    lines += [
        "| verb | |",
        "|---|---|",
        *(f"| [`{verb}`](#{verb}) | {text} |" for verb, (_, text) in VERBS.items()),
        "",
    ]
    for verb, (module, text) in VERBS.items():
        lines += [f"## {verb}\n", f"{text[0].upper()}{text[1:]}.\n"]
        if module == "lightning" and verb != "fit":
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            main([verb, "--help"])
        # where the options begin: what comes before is the same once more
        help_text = printed.getvalue().partition("\noptions:\n")[2] or printed.getvalue()
        help_text = ROLE.sub(lambda found: found[2], help_text)
        lines.append(f"````text\n{help_text.rstrip()}\n````\n")
    return "\n".join(lines)


def navigation(pages: list[str]) -> list[Any]:
    """Nested lists as mkdocs has them, by folder."""
    out: list[Any] = []
    for page in pages:
        level = out
        for folder in page.split("/")[1:-1]:
            title = {"api": "Python", "parts": "Parts"}.get(folder, folder)
            found = next((entry for entry in level if isinstance(entry, dict) and title in entry), None)
            if found is None:
                found = {title: []}
                level.append(found)
            level = found[title]
        level.append(page)
    return out
