"""Refuse answers that would make a project which Python, pip or Windows cannot take.

Runs before any file is written; cookiecutter then removes the folder again. A slug that no folder
should get, not even for a moment, arrives in `__refused_slug`: cookiecutter.json has put a harmless
one in its place.
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
    """Return the valid name that comes closest to what was typed."""
    name = re.sub("[^A-Za-z0-9]+", separator, answer)[:LONGEST].strip(separator)
    name = name or f"my{separator}project"
    if separator == "_" and not name[0].isalpha():
        name = f"project_{name}"[:LONGEST]
    return f"{name}{separator}project" if name.lower().replace("-", "_") in taken else name


def complaint_of_slug(slug: str, taken: dict[str, str]) -> str | None:
    better = nearest(slug, "-", taken)
    if len(slug) > LONGEST or not re.fullmatch("[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", slug):
        rule = f"up to {LONGEST} letters a-z, digits, dots, dashes, underscores"
        return (
            f"project_slug {slug!a} is no name for a folder that works everywhere"
            f" ({rule}, with a letter or digit at both ends): type {better!r} instead."
        )
    folder, distribution = slug.split(".")[0].lower(), re.sub("[._-]+", "_", slug).lower()
    if taken.get(folder) == RESERVED:
        return f"project_slug {slug!r} is {RESERVED}: type {better!r} instead."
    if taken.get(distribution) == NEEDED:
        return f"project_slug {slug!r} is {NEEDED}: type {better!r} instead."
    return None


def complaint_of_package(package: str, taken: dict[str, str]) -> str | None:
    better = nearest(package, "_", taken)
    if len(package) > LONGEST or not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", package):
        rule = f"up to {LONGEST} letters a-z, digits and underscores, a letter first"
        return f"package_name {package!a} cannot be imported ({rule}): type {better!r} instead."
    use = taken.get(package.lower())  # the file systems of Windows and macOS ignore case
    if not use and (keyword.iskeyword(package) or package in sys.stdlib_module_names):
        use = "taken by Python itself"
    if not use:
        return None
    return f"package_name {package!r} is {use}: type {better!r} instead."


def complaint_of_wandb(variable: str, answer: str) -> str | None:
    if len(answer) <= 128 and not UNTRACKED.search(answer):
        return None
    better = UNTRACKED.sub("-", CONTROL.sub("", answer))[:128]
    return f"{variable} {answer!a} is refused by Weights & Biases: type {better!a} instead."


def complaint_of_text(answers: dict[str, Any]) -> str | None:
    title = answers["project_name"]
    if not CONTROL.sub("", title).strip():
        return f"project_name {title!a} is no title: type 'My Project' instead."
    for variable, answer in answers.items():
        if not variable.startswith("_") and isinstance(answer, str) and CONTROL.search(answer):
            better = CONTROL.sub("", answer)
            return f"{variable} holds a control character: type {better!a} instead."
    return None


def complaint(answers: dict[str, Any]) -> str | None:
    """Return a sentence about the first wrong answer, with what to type instead; else None."""
    taken = {name: use for use, names in answers["_taken"].items() for name in names.split()}
    refused = answers["__refused_slug"]
    slug: str = json.loads(refused) if refused else answers["project_slug"]
    said = complaint_of_slug(slug, taken) or complaint_of_package(answers["package_name"], taken)
    if said:
        return said
    email = answers["author_email"]
    if email and not EMAIL.fullmatch(email):
        return f"author_email {email!a} is no address: type one like jo@example.com, or nothing."
    for variable in ("wandb_project", "wandb_entity"):
        if said := complaint_of_wandb(variable, answers[variable]):
            return said
    return complaint_of_text(answers)


if __name__ == "__main__":
    # tojson never leaves three quotes in a row
    sys.exit(complaint(json.loads(r"""{{ cookiecutter | tojson }}""")))
