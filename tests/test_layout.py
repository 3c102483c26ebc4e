"""The engine's structure: who imports whom, private names, sizes of functions, and words."""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bakery import TEMPLATE
from conftest import EVERY_PART, Bake

# From the top: a file imports only from rows above its own.
ROWS = (
    "version",
    "errors",
    "files",
    "run",
    "lightning_internals",
    "batches",
    "distributed",
    "checkpoint_io",
    "wandb_session",
    "wandb_uploads",
    "wandb_sync",
    "wandb_logger",
    "train_state",
    "checkpoints",
    "resume",
    "metrics",
    "restore",
    "recorder",
    "progress",
    "shutdown",
    "predictions",
    "legacy",
    "layers",
    "provenance",
    "parser",
    "error_messages",
    "placeholders",
    "commands",
    "command_line",
    "session",
    "cli",
    "fabric",
    "references",
    "__init__",
)
STANDARD_LIBRARY_ONLY = ("version", "errors", "files")
WITHOUT_TORCH = (*STANDARD_LIBRARY_ONLY, "run", "wandb_session", "commands")
LONGEST_FUNCTION = 45  # lines
INTERNALS = "lightning_internals"
PACKAGES = ("lightning", "torch", "torchmetrics", "jsonargparse", "wandb", "numpy")
# Variables that the engine writes for the processes of other ranks and of W&B's client. Only what
# decides the id of a run reads them, before there is one.
FOR_CHILDREN = {"WANDB_RUN_ID", "RUNS_ROOT", "WANDB_DIR", "WANDB_DATA_DIR"}
READERS = {"cli": {"WANDB_RUN_ID"}, "resume": {"WANDB_RUN_ID"}, "run": {"RUNS_ROOT"}}
PRIVATE_WORDS = (
    "nobody logs",
    "goes on",
    "going on",
    "of its own",
    "of one's own",
    "made anew",
    "bit by bit",
)


@pytest.fixture(scope="module")
def engine(bake: Bake) -> dict[str, ast.Module]:
    """The files of the engine, parsed, by name."""
    folder = bake(**EVERY_PART) / "my_project" / "engine"
    return {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in folder.glob("*.py")}


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the files of the engine that a file imports, within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names = [node.module] if node.module else [name.name for name in node.names]
            yield from names


def upward(trees: dict[str, ast.Module]) -> list[str]:
    return [
        f"{name} imports {other}"
        for name, tree in trees.items()
        for other in imported(tree)
        if ROWS.index(other) >= ROWS.index(name)
    ]


def test_a_file_imports_only_from_rows_above_it(engine: dict[str, ast.Module]) -> None:
    assert set(engine) == set(ROWS)
    assert upward(engine) == []


def test_an_upward_import_is_seen_within_a_function_too() -> None:
    planted = ast.parse("def f():\n    from .cli import CLI\n")
    assert upward({"run": planted}) == ["run imports cli"]
    assert upward({"run": ast.parse("from . import cli")}) == ["run imports cli"]


def outside(tree: ast.Module) -> set[str]:
    """Return the packages that a file imports when it is imported."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {name.name.partition(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).partition(".")[0])
    return names - set(sys.stdlib_module_names)


def test_what_has_to_start_fast_imports_neither_torch_nor_lightning(
    engine: dict[str, ast.Module],
) -> None:
    for name in STANDARD_LIBRARY_ONLY:
        assert not outside(engine[name]), name
    for name in WITHOUT_TORCH:
        assert outside(engine[name]) <= {"filelock"}, name


def test_contributing_lists_the_files_in_their_order() -> None:
    page = (TEMPLATE / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)(?:\.py)?` \|", page, re.MULTILINE)
    assert [name for name in listed if name in ROWS] == list(ROWS)


# No state in modules, no value by the environment.


def changed_names(tree: ast.Module) -> set[str]:
    """Return names whose content is changed somewhere in the file."""
    changing = {"append", "extend", "add", "update", "pop", "clear", "remove", "setdefault"}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in changing:
            names.add(ast.unparse(node.value))
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            names.add(ast.unparse(node.value))
        if isinstance(node, ast.Global):
            names |= set(node.names)
    return names


def module_state(tree: ast.Module) -> list[str]:
    """Return names at module level that hold something which the file changes."""
    assigned = set()
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        assigned |= {target.id for target in targets if isinstance(target, ast.Name)}
    return sorted(assigned & changed_names(tree))


def test_no_module_has_a_state(engine: dict[str, ast.Module]) -> None:
    assert {name: module_state(tree) for name, tree in engine.items() if module_state(tree)} == {}
    assert module_state(ast.parse("A = []\ndef f():\n    A.append(1)\n")) == ["A"]
    assert module_state(ast.parse("A: dict = {}\ndef f():\n    A['x'] = 1\n")) == ["A"]


def variables_read(tree: ast.Module) -> set[str]:
    """Return the environment variables that a file reads."""
    read = set()
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript) else ""
        loads = not isinstance(node, ast.Subscript) or isinstance(node.ctx, ast.Load)
        found = re.match(r"os\.environ(?:\.get\(|\.setdefault\(|\[)'(\w+)'", text)
        if found and loads:
            read.add(found[1])
    return read


def test_no_value_travels_by_the_environment_within_a_process(
    engine: dict[str, ast.Module],
) -> None:
    readers = {name: variables_read(tree) & FOR_CHILDREN for name, tree in engine.items()}
    assert {name: read for name, read in readers.items() if read} == READERS
    assert variables_read(ast.parse("os.environ.get('WANDB_RUN_ID')")) == {"WANDB_RUN_ID"}


# Private names.


def private_names(tree: ast.Module) -> list[str]:
    """Return uses of names of other objects and packages that begin with an underscore."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            if ast.unparse(node.value) not in ("self", "cls", "super()", "os"):  # os._exit
                found.append(ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module), *(name.name for name in node.names)]
            found += [name for name in names if re.search(r"(^|\.)_[a-z]", name)]
    return found


def inherited_privates(module: object) -> list[str]:
    """Return private names of a base class of another package that a class of ours uses."""
    found = []
    for kind in vars(module).values():
        if not inspect.isclass(kind) or kind.__module__ != getattr(module, "__name__", ""):
            continue
        own = set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(kind)))
        for base in kind.__mro__[1:]:
            if base.__module__.partition(".")[0] in PACKAGES:
                theirs = set(re.findall(r"\b(?:self\.|def )(_[a-z]\w*)", inspect.getsource(base)))
                found += [f"{kind.__name__}.{name}" for name in sorted(own & theirs)]
    return found


def test_private_names_of_other_packages_stand_in_one_file(
    engine: dict[str, ast.Module],
) -> None:
    found = {name: private_names(tree) for name, tree in engine.items() if name != INTERNALS}
    assert {name: uses for name, uses in found.items() if uses} == {}
    assert private_names(ast.parse("trainer._results")) == ["trainer._results"]
    assert private_names(ast.parse("from torch._x import y")) == ["torch._x"]


def test_no_class_uses_a_private_name_of_its_base(command: object) -> None:
    for name in ROWS:
        if name not in ("fabric", "references", "__init__"):
            assert inherited_privates(importlib.import_module(f"odd_duck.engine.{name}")) == []


# Sizes.


def long_functions(tree: ast.Module) -> list[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1}"
        for node in functions
        if node.end_lineno and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]


def test_no_function_is_longer_than_45_lines(engine: dict[str, ast.Module]) -> None:
    found = {name: long_functions(tree) for name, tree in engine.items()}
    assert {name: functions for name, functions in found.items() if functions} == {}
    assert long_functions(ast.parse("def f():\n" + "    x = 1\n" * 45))


# Words.


def test_no_private_word_is_in_a_project_or_in_the_docs(bake: Bake) -> None:
    folder = bake(**EVERY_PART)
    files = [file for file in folder.rglob("*") if file.suffix in (".py", ".md", ".yaml", ".toml")]
    pages = {file.name: file.read_text(encoding="utf-8") for file in files}
    docs = [*TEMPLATE.glob("*.md"), *TEMPLATE.glob("docs/**/*.md")]
    pages |= {file.name: file.read_text(encoding="utf-8") for file in docs}
    found = [
        f"{name}: {word}"
        for name, text in pages.items()
        for word in PRIVATE_WORDS
        if word in " ".join(text.split()).lower()
    ]
    assert found == []


def test_the_version_is_that_of_the_newest_release(command: object) -> None:
    changelog = (TEMPLATE / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## (\d\S+) \(", changelog, re.MULTILINE)[0]
    assert importlib.import_module("odd_duck.engine").__version__ == newest


def test_the_layout_names_the_template(bake: Bake) -> None:
    folder: Path = bake(**EVERY_PART) / "my_project"
    team = {file.name for file in folder.glob("*.py")}
    assert team == {
        "__init__.py",
        "callbacks.py",
        "cli.py",
        "data.py",
        "model.py",
        "network.py",
    }
