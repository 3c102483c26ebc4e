"""The engine's structure: who imports whom, private names, sizes of functions, and words."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bakery import TEMPLATE
from command import Commands
from conftest import EVERY_PART, Bake
from lightning.pytorch import Trainer

# From the top: a file imports only from rows above its own.
ROWS = (
    "version",
    "screen",
    "errors",
    "files",
    "metrics_log",
    "run",
    "run_record",
    "lightning_internals",
    "random_streams",
    "sampler_state",
    "batches",
    "data_order",
    "epoch_start",
    "distributed",
    "host_copy",
    "checkpoint_record",
    "readable",
    "checkpoint_writer",
    "checkpoint_io",
    "wandb_internals",
    "wandb_session",
    "wandb_options",
    "wandb_log",
    "wandb_uploads",
    "wandb_sync",
    "wandb_ending",
    "wandb_logger",
    "train_state",
    "background_saves",
    "checkpoints",
    "resume",
    "metrics",
    "restore",
    "recorder",
    "progress",
    "shutdown",
    "prediction_samples",
    "prediction_parts",
    "predictions",
    "legacy",
    "layers",
    "wandb_variables",
    "provenance",
    "parser",
    "error_messages",
    "placeholders",
    "runs_table",
    "runs",
    "commands",
    "command_line",
    "session",
    "cli",
    "fabric",
    "references",
    "__init__",
)
OUTSIDE = ("fabric", "references", "__init__")  # optional; warns when it is imported
STANDARD_LIBRARY_ONLY = ("version", "screen", "errors", "files", "metrics_log", "wandb_internals")
WITHOUT_TORCH = (*STANDARD_LIBRARY_ONLY, "run", "wandb_session", "commands")
LONGEST_FUNCTION, HIGHEST_COMPLEXITY = 45, 9  # lines; ruff's C901
INTERNALS = ("lightning_internals", "wandb_internals")
# Variables that the engine both writes and reads, by file. The others are for the processes of
# other ranks and of W&B's client.
READ_BACK = {
    "cli": {"WANDB_RUN_ID"},  # the id that was asked for, before there is a run
    "resume": {"WANDB_RUN_ID"},
    "run": {"RUNS_ROOT"},
    "distributed": {"PARENT_VARIABLE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"},  # launchers'
    "wandb_session": {"HTTP_TIMEOUT", "SERVICE"},  # to restore it
    "wandb_variables": {"WANDB_DIR"},  # before there is a run
}
CONTAINERS = re.compile(
    r"([\w.]*\.)?(list|dict|set|bytearray|ExitStack|defaultdict|OrderedDict|Counter|deque|Weak\w+)\("
)
PRIVATE_WORDS = re.compile(
    r"\b((go|goes|going|gone|went) on|anew|lent|of (its|one's) own|nobody logs|bit by bit)\b"
)


@pytest.fixture(scope="module")
def engine(bake: Bake) -> dict[str, ast.Module]:
    """The files of the engine, parsed, by name."""
    folder = bake(**EVERY_PART) / "my_project" / "engine"
    return {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in folder.glob("*.py")}


@pytest.fixture(scope="module")
def classes(command: Commands) -> list[type]:
    """The classes that the engine defines."""
    names = [f"odd_duck.engine.{name}" for name in ROWS if name not in OUTSIDE]
    found = [kind for name in names for kind in vars(importlib.import_module(name)).values()]
    defined = [kind for kind in found if inspect.isclass(kind) and kind.__module__ in names]
    return list(dict.fromkeys(defined))


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the files of the engine that a file imports, within functions too."""
    for node in ast.walk(tree):
        names = [name.name for name in getattr(node, "names", ()) if isinstance(name, ast.alias)]
        if isinstance(node, ast.Import):
            yield from (name.partition(".engine.")[2] for name in names if ".engine." in name)
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            inside = re.fullmatch(r"(?:\.|.*\bengine(?:\.|$))(\w*)", module)
            if inside:
                yield from [inside[1]] if inside[1] else names


def upward(trees: dict[str, ast.Module]) -> list[str]:
    """Return the imports of files that are in no row, or not in one above."""
    return [
        f"{name} imports {other}"
        for name, tree in trees.items()
        for other in imported(tree)
        if other not in ROWS[: ROWS.index(name)]
    ]


def test_a_file_imports_only_from_rows_above_it(engine: dict[str, ast.Module]) -> None:
    assert set(engine) == set(ROWS)
    assert upward(engine) == []


def test_an_upward_import_is_seen_within_a_function_too() -> None:
    planted = ast.parse("def f():\n    from .cli import CLI\n")
    assert upward({"run": planted}) == ["run imports cli"]
    for line in (
        "from . import cli",
        "if TYPE_CHECKING:\n    from .cli import CLI",
        "from ..engine.cli import CLI",
        "from my_project.engine import cli",
        "import my_project.engine.cli",
    ):
        assert upward({"run": ast.parse(line)}) == ["run imports cli"], line
    assert upward({"run": ast.parse("from .run import Run")}) == ["run imports run"]
    assert upward({"run": ast.parse("from .nowhere import x")}) == ["run imports nowhere"]
    assert upward({"run": ast.parse("from .files import PROJECT")}) == []


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


def assigned_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the names that a file assigns at module level, and what to."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield ast.unparse(target), ast.unparse(node.value)


def class_attributes_set(tree: ast.Module) -> set[str]:
    """Return attributes of classes that a file assigns."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} | {"cls"}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            found |= {ast.unparse(node)} & {f"{name}.{node.attr}" for name in names}
    return found


def module_state(tree: ast.Module) -> list[str]:
    """Return what a file keeps between calls: containers, globals, caches, classes' attributes."""
    changed = changed_names(tree)
    state = class_attributes_set(tree)
    for name, value in assigned_names(tree):
        container = value[0] in "[{" or bool(CONTAINERS.match(value))
        constant = name.isupper() or name.startswith("__")
        if name in changed or (container and not constant) or "ExitStack(" in value:
            state.add(name)
    for node in ast.walk(tree):
        for decorator in getattr(node, "decorator_list", ()):
            if re.match(r"(functools\.)?(lru_)?cache\b", ast.unparse(decorator)):
                state.add(getattr(node, "name", ""))
    return sorted(state)


def test_no_module_has_a_state(engine: dict[str, ast.Module]) -> None:
    assert {name: module_state(tree) for name, tree in engine.items() if module_state(tree)} == {}


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("A = []\ndef f():\n    A.append(1)\n", "A"),
        ("A: dict = {}\ndef f():\n    A['x'] = 1\n", "A"),
        ("A = {}\ndef f():\n    del A['x']\n", "A"),
        ("A = 1\ndef f():\n    global A\n    A = 2\n", "A"),
        ("seen = set()\n", "seen"),
        ("LOCKS = ExitStack()\n", "LOCKS"),
        ("class A:\n    x = 1\ndef f():\n    A.x = 2\n", "A.x"),
        ("@functools.cache\ndef f():\n    return 1\n", "f"),
    ],
)
def test_a_state_of_a_module_is_seen(planted: str, name: str) -> None:
    assert module_state(ast.parse(planted)) == [name]


def test_a_constant_is_no_state() -> None:
    assert module_state(ast.parse("A = {'x': 1}\ndef f():\n    return A['x']\n")) == []


def variables(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Return the environment variables that a file reads, and those that it writes.

    One whose name is a constant of the file counts under the name of the constant.
    """
    read, written = set[str](), set[str]()
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript | ast.Compare) else ""
        if key := re.match(r"os\.environ(?:\.(get|pop|setdefault)\(|\[)'?(\w+)", text):
            stored = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
            (written if stored or key[1] == "setdefault" else read).add(key[2])
        if asked := re.match(r"'?(\w+)'? (?:not )?in os\.environ$", text):
            read.add(asked[1])
        if updated := re.match(r"os\.environ\.update\((.*)\)$", text, re.DOTALL):
            pairs = re.findall(r"\b(\w+)=|'(\w+)':", updated[1])
            written |= {keyword or quoted for keyword, quoted in pairs}
    return read, written


def test_no_value_travels_by_the_environment_within_a_process(
    engine: dict[str, ast.Module],
) -> None:
    found = {name: variables(tree) for name, tree in engine.items()}
    written = set().union(*(names for _, names in found.values()))
    assert {"WANDB_RUN_ID", "RUNS_ROOT", "WANDB_DIR"} <= written
    both = {name: read & written for name, (read, _) in found.items()}
    assert {name: names for name, names in both.items() if names} == READ_BACK


@pytest.mark.parametrize(
    ("planted", "read", "written"),
    [
        ("os.environ.get('A')", {"A"}, set()),
        ("x = os.environ['A']", {"A"}, set()),
        ("'A' in os.environ", {"A"}, set()),
        ("os.environ['A'] = '1'", set(), {"A"}),
        ("os.environ.setdefault('A', '1')", set(), {"A"}),
        ("os.environ.update(A='1', B=str(2))", set(), {"A", "B"}),
        ("os.environ.update({'A': '1', **others})", set(), {"A"}),
    ],
)
def test_a_variable_of_the_environment_is_seen(
    planted: str, read: set[str], written: set[str]
) -> None:
    assert variables(ast.parse(planted)) == (read, written)


# Private names.


def private_names(tree: ast.Module) -> list[str]:
    """Return uses of names of other objects and packages that begin with one underscore."""
    found = []
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
        if isinstance(node, ast.Attribute) and text != "os._exit":
            own = ast.unparse(node.value) in ("self", "cls", "super()")
            found += [text] if re.match(r"_(?!_)", node.attr) and not own else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module), *(name.name for name in node.names)]
            found += [name for name in names if re.search(r"(^|\.)_(?!_)", name)]
        if re.match(r"(get|set|has|del)attr\((?!self,).*, '_(?!_)", text):
            found.append(text)
    return found


def inherited_privates(kind: type) -> list[str]:
    """Return private names of bases in other packages that a class uses or overrides."""
    private = r"\b(?:self\.|cls\.|super\(\)\.|def )(_(?!_)\w+)"
    used = set(re.findall(private, inspect.getsource(kind)))
    here = kind.__module__.partition(".")[0]
    found = set()
    for base in kind.__mro__[1:]:
        if base.__module__.partition(".")[0] not in {here, *sys.stdlib_module_names}:
            found |= used & {*re.findall(private, inspect.getsource(base)), *vars(base)}
    return [f"{kind.__name__}.{name}" for name in sorted(found)]


def test_private_names_of_other_packages_stand_in_one_file(
    engine: dict[str, ast.Module],
) -> None:
    found = {name: private_names(tree) for name, tree in engine.items() if name not in INTERNALS}
    assert {name: uses for name, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    ("planted", "use"),
    [
        ("trainer._results", "trainer._results"),
        ("self.trainer._results.x", "self.trainer._results"),
        ("from torch._x import y", "torch._x"),
        ("from torch import _C", "_C"),
        ("getattr(trainer, '_results', None)", "getattr(trainer, '_results', None)"),
    ],
)
def test_a_private_name_is_seen(planted: str, use: str) -> None:
    assert private_names(ast.parse(planted)) == [use]


def test_no_class_uses_a_private_name_of_its_base(classes: list[type]) -> None:
    assert len(classes) > 30
    found = [name for kind in classes for name in inherited_privates(kind)]
    assert found == []


class Planted(Trainer):
    def look(self) -> Any:
        return self._data_connector

    def _run(self, *args: Any, **kwargs: Any) -> None: ...


def test_a_private_name_of_a_base_is_seen() -> None:
    assert inherited_privates(Planted) == ["Planted._data_connector", "Planted._run"]


# Sizes.


def long_functions(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            found += [f"{node.name}: {lines}"] if lines > LONGEST_FUNCTION else []
    return found


def complex_functions(path: Path) -> list[str]:
    """Return the functions that are too complex for ruff, as its lines."""
    limit = f"lint.mccabe.max-complexity={HIGHEST_COMPLEXITY}"
    ruff = (Path(sys.executable).with_name("ruff"), "check", "--isolated", "--no-cache")
    options = ("--select", "C901", "--config", limit, "--output-format", "concise", "--quiet")
    done = subprocess.run([*ruff, *options, path], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def test_no_function_is_longer_than_45_lines(engine: dict[str, ast.Module]) -> None:
    found = {name: long_functions(tree) for name, tree in engine.items()}
    assert {name: functions for name, functions in found.items() if functions} == {}
    assert long_functions(ast.parse("def f():\n" + "    x = 1\n" * 45)) == ["f: 46"]
    assert long_functions(ast.parse("async def f():\n" + "    x = 1\n" * 44)) == []


def test_no_function_is_more_complex_than_9(bake: Bake, tmp_path: Path) -> None:
    assert complex_functions(bake(**EVERY_PART) / "my_project" / "engine") == []
    for branches, found in ((8, 0), (9, 1)):
        file = tmp_path / f"{branches}.py"
        file.write_text("def f(x):\n" + "    if x:\n        x()\n" * branches)
        assert len(complex_functions(file)) == found


# Words.


def private_words(text: str) -> list[str]:
    return [found[0] for found in PRIVATE_WORDS.finditer(" ".join(text.split()).lower())]


def test_no_private_word_is_in_a_project_or_in_the_docs(bake: Bake) -> None:
    folder = bake(**EVERY_PART)
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "LICENSE"]
    files += [
        *TEMPLATE.glob("*.md"),
        *TEMPLATE.glob("docs/**/*.md"),
        *TEMPLATE.glob("docs/**/*.ipynb"),
    ]
    found = {
        str(file.relative_to(folder if folder in file.parents else TEMPLATE)): words
        for file in files
        if (words := private_words(file.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "planted", ["it goes\n  on", "to go on", "of its own", "nobody logs x", "Anew", "a lent sample"]
)
def test_a_private_word_is_seen(planted: str) -> None:
    assert len(private_words(planted)) == 1
    assert private_words("silent, ago one, excellent, talent") == []


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
