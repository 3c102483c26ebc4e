"""Refuse answers that would make a project which Python, pip or Windows cannot take.

A local extension of cookiecutter: cookiecutter.json puts all answers through `check_answers` before
a folder is made. A hook that fails would leave the sentence above a traceback of cookiecutter's.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Container, Mapping
from typing import Any

from cookiecutter.exceptions import FailedHookException
from jinja2 import Environment
from jinja2.ext import Extension

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


def complaint_of_slug(slug: str, taken: Mapping[str, str]) -> str | None:
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


def complaint_of_package(package: str, taken: Mapping[str, str]) -> str | None:
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


def complaint_of_text(variable: str, answer: str) -> str | None:
    """Return what is wrong with a text of any words, or an address."""
    better = CONTROL.sub("", answer)
    if variable == "project_name" and not better.strip():
        return f"project_name {answer!a} is no title: type 'My Project' instead."
    if variable == "author_email" and answer and not EMAIL.fullmatch(answer):
        return f"author_email {answer!a} is no address: type one like jo@example.com, or nothing."
    if better == answer:
        return None
    return f"{variable} holds a control character: type {better!a} instead."


def complaint(variable: str, answer: str, taken: Mapping[str, str]) -> str | None:
    """Return a sentence about a wrong answer, with what to type instead; else None."""
    said = None
    if variable == "project_slug":
        said = complaint_of_slug(answer, taken)
    elif variable == "package_name":
        said = complaint_of_package(answer, taken)
    elif variable.startswith("wandb_"):
        said = complaint_of_wandb(variable, answer)
    return said or complaint_of_text(variable, answer)


def complaints(answers: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each wrong answer."""
    uses = answers.get("_taken", {})  # a replay of cookiecutter's asks what is new alone
    taken = {name: use for use, names in uses.items() for name in names.split()}
    said = {
        variable: complaint(variable, answer, taken)
        for variable, answer in answers.items()
        if variable[0] != "_" and isinstance(answer, str)
    }
    slug = answers.get("project_slug")
    if said.get("project_slug") and answers.get("wandb_project") == slug:
        del said["wandb_project"]  # its default: what is wrong is said once
    return [sentence for sentence in said.values() if sentence]


def check_answers(answers: Mapping[str, Any]) -> str:
    """Return nothing; raise what cookiecutter prints as it is, before it ends with 1."""
    if sentences := complaints(answers):
        raise FailedHookException("\n".join(sentences))
    return ""


class CheckAnswers(Extension):
    """Make `check_answers` a filter of cookiecutter.json."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        environment.filters["check_answers"] = check_answers
