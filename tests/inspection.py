"""What holds of every project: its files are those that were chosen, parse and name no other."""

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from conftest import every_file
from hatchling.metadata.core import ProjectMetadata
from hatchling.metadata.spec import DEFAULT_METADATA_VERSION, get_core_metadata_constructors
from hatchling.plugin.manager import PluginManager
from markdown_it import MarkdownIt
from markdown_it.token import Token

from hooks.post_gen_project import unwanted

PARSERS: dict[str, Callable[[str], object]] = {
    ".py": ast.parse,
    ".json": json.loads,
    ".ipynb": json.loads,
    ".toml": tomllib.loads,
}
PARSERS |= dict.fromkeys((".yaml", ".yml"), yaml.safe_load)
JINJA = re.compile(r"(?<!\$)\{\{|\{%|\{#|cookiecutter\b")
FILE = re.compile(r"(?<![\w/.<>-])[\w./-]+\.(?:yaml|yml|py|sbatch|toml|md)(?![\w/.])")
PAGE = MarkdownIt().enable("strikethrough")
TABLES = MarkdownIt().enable("table")
MADE_BY_RUNS = {"config.yaml"}


def one_line(text: str) -> str:
    return " ".join(text.split())


def words(markdown: str) -> str:
    """What a reader sees of Markdown: no formatting, blanks run together."""
    blocks = (block.children or [] for block in PAGE.parse(markdown))
    return one_line(
        " ".join(
            "".join(piece.content for piece in block if "text" in piece.type) for block in blocks
        )
    )


def tokens(markdown: str) -> Iterator[Token]:
    for block in PAGE.parse(markdown):
        yield from (block, *(block.children or []))


def named_files(page: Path) -> Iterator[str]:
    """Files that a page names in its commands, code and links."""
    for token in tokens(page.read_text(encoding="utf-8")):
        if token.type in ("code_inline", "fence", "code_block"):
            yield from FILE.findall(token.content)
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if target and not re.match(r"https?://|#", target):
            yield target.partition("#")[0]


def made_files(page: str) -> set[str]:
    """Files that a page has one make: by a block that begins with the name, or by `cp`."""
    made = r"^(?:```\w+\n# (\S+?)(?:,.*)?|cp \S+ (\S+))$"
    return {name for names in re.findall(made, page, re.MULTILINE) for name in names if name}


def inspect(project: Path, answers: Mapping[str, Any], plain: bool = True) -> None:
    """Fails where a project is not sound; `plain` says that no answer holds braces."""
    package, absent = str(answers["package_name"]), set(unwanted(dict(answers)))
    files = {
        path.relative_to(project).as_posix(): path for path in project.rglob("*") if path.is_file()
    }
    assert files.keys() == every_file(package) - absent
    for name, path in files.items():
        text = path.read_bytes().decode()
        PARSERS.get(path.suffix, str)(text)
        assert not plain or not JINJA.search(text), f"{name} holds {JINJA.search(text)}"
    for page in [path for path in files.values() if path.suffix == ".md"]:
        folders = (
            project,
            page.parent,
            project / "configs",
            project / package,
            project / package / "engine",
        )
        made = made_files(page.read_text(encoding="utf-8"))
        for name in set(named_files(page)) - MADE_BY_RUNS - made:
            assert any((folder / name).exists() for folder in folders), f"{page.name} names {name}"


def longest_paragraph(markdown: str) -> str:
    """Return the paragraph, item or cell of a table with the most words."""
    texts = [block.content for block in TABLES.parse(markdown) if block.type == "inline"]
    return max(texts, key=lambda text: len(text.split()))


def links(page: Path) -> list[str]:
    """Return where the links of a page lead that stay within the repository."""
    targets = [str(token.attrs.get("href") or "") for token in tokens(page.read_text("utf-8"))]
    return [target for target in targets if target and not re.match(r"https?://|mailto:", target)]


def anchors(markdown: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    blocks = PAGE.parse(markdown)
    titles = [
        "".join(piece.content for piece in after.children or [])
        for block, after in pairwise(blocks)
        if block.type == "heading_open"
    ]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def metadata(project: Path) -> str:
    """Return what a package index would be told of a project, in the words of its build backend."""
    settings = ProjectMetadata(str(project), PluginManager())
    settings.validate_fields()
    return str(get_core_metadata_constructors()[DEFAULT_METADATA_VERSION](settings))
