"""Refuses answers that would make a project which cannot be imported, installed or checked out on Windows.

Runs before any file is written; cookiecutter then removes the folder again. A slug that no folder should get, not even
for a moment, arrives in `__refused_slug`: cookiecutter.json has put a harmless one in its place.
"""

from __future__ import annotations

import json
import keyword
import re
import sys
from collections.abc import Container
from typing import Any

LONGEST = 60
NEEDED, RESERVED = "a package that the project needs", "a name that Windows reserves"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
UNTRACKED = re.compile(r"[/\\#?%:\n]")  # wandb.Settings.validate_project
EMAIL = re.compile(r"[\w%+-]+(\.[\w%+-]+)*@[\w-]+(\.[\w-]+)+", re.ASCII)


def nearest(answer: str, separator: str, taken: Container[str]) -> str:
    """The name that comes closest to what was typed."""
    name = (
        re.sub("[^A-Za-z0-9]+", separator, answer)[:LONGEST].strip(separator)
        or f"my{separator}project"
    )
    if separator == "_" and not name[0].isalpha():
        name = f"project_{name}"[:LONGEST]
    return f"{name}{separator}project" if name.lower().replace("-", "_") in taken else name


def complaint(answers: dict[str, Any]) -> str | None:
    """One sentence about the first answer that will not do, with what to type instead; None if all will."""
    taken = {name: use for use, names in answers["_taken"].items() for name in names.split()}
    refused = answers["__refused_slug"]
    slug: str = json.loads(refused) if refused else answers["project_slug"]
    better = nearest(slug, "-", taken)
    if len(slug) > LONGEST or not re.fullmatch("[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", slug):
        rule = f"up to {LONGEST} letters a-z, digits, dots, dashes, underscores, with a letter or digit at both ends"
        return f"project_slug {slug!a} is no name for a folder that works everywhere ({rule}): type {better!r} instead."
    folder, distribution = slug.split(".")[0].lower(), re.sub("[._-]+", "_", slug).lower()
    if (windows := taken.get(folder) == RESERVED) or taken.get(distribution) == NEEDED:
        return (
            f"project_slug {slug!r} is {RESERVED if windows else NEEDED}: type {better!r} instead."
        )

    package = answers["package_name"]
    better = nearest(package, "_", taken)
    if len(package) > LONGEST or not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", package):
        rule = f"up to {LONGEST} letters a-z, digits and underscores, a letter first"
        return f"package_name {package!a} cannot be imported ({rule}): type {better!r} instead."
    use = taken.get(
        package.lower()
    )  # in small letters, because the file systems of Windows and macOS ignore case
    if use or keyword.iskeyword(package) or package in sys.stdlib_module_names:
        return f"package_name {package!r} is {use or 'taken by Python itself'}: type {better!r} instead."

    if answers["author_email"] and not EMAIL.fullmatch(answers["author_email"]):
        return f"author_email {answers['author_email']!a} is no address: type one like jo@example.com, or nothing."
    for variable in ("wandb_project", "wandb_entity"):
        if len(answers[variable]) > 128 or UNTRACKED.search(answers[variable]):
            better = UNTRACKED.sub("-", CONTROL.sub("", answers[variable]))[:128]
            return f"{variable} {answers[variable]!a} is refused by Weights & Biases: type {better!a} instead."
    if not CONTROL.sub("", answers["project_name"]).strip():
        return f"project_name {answers['project_name']!a} is no title: type 'My Project' instead."
    for variable, answer in answers.items():
        if not variable.startswith("_") and isinstance(answer, str) and CONTROL.search(answer):
            return (
                f"{variable} holds a control character: type {CONTROL.sub('', answer)!a} instead."
            )
    return None


if __name__ == "__main__":
    sys.exit(
        complaint(json.loads(r"""{{ cookiecutter | tojson }}"""))
    )  # tojson never leaves three quotes in a row
