"""What a bake writes: which files, and in them every answer as it was typed."""

import ast
import keyword
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from bakery import TEMPLATE
from conftest import SOURCES, Bake, Run, texts, tracked, typed
from cookiecutter.exceptions import FailedHookException
from cookiecutter.generate import generate_context
from cookiecutter.prompt import prompt_for_config
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from packaging.requirements import Requirement

from hooks.post_gen_project import PARTS
from hooks.pre_gen_project import complaint

FILES = {
    ".env.example",
    ".gitattributes",
    ".gitignore",
    "LICENSE",
    "Makefile",
    "README.md",
    "configs/ddp.yaml",
    "configs/debug.yaml",
    "configs/defaults.yaml",
    "configs/digits.yaml",
    "configs/fsdp.yaml",
    "configs/gpu.yaml",
    "configs/media.yaml",
    "configs/sweep.yaml",
    "main.py",
    "my_project/__init__.py",
    "my_project/data.py",
    "my_project/engine/__init__.py",
    "my_project/engine/artifacts.py",
    "my_project/engine/bar.py",
    "my_project/engine/callbacks.py",
    "my_project/engine/cli.py",
    "my_project/engine/endings.py",
    "my_project/engine/launchers.py",
    "my_project/engine/media.py",
    "my_project/engine/mistakes.py",
    "my_project/engine/origins.py",
    "my_project/engine/predictions.py",
    "my_project/engine/ranks.py",
    "my_project/engine/references.py",
    "my_project/engine/resume.py",
    "my_project/engine/run.py",
    "my_project/engine/sync.py",
    "my_project/engine/wandb.py",
    "my_project/model.py",
    "my_project/network.py",
    "pyproject.toml",
    "tests/conftest.py",
    "tests/test_configs.py",
    "tests/test_engine.py",
    "tests/test_research.py",
    "tests/test_training.py",
}
HOSTILE = [
    "He said \"yes\" and 'no', and \"\"\"maybe\"\"\" or '''not'''",
    "one line\nand another",
    "a tab\tand a backslash at the end \\",
    r"C:\new\table and \u0041 and \N{DASH}",
    "Größe, 数字, 👩\N{ZERO WIDTH JOINER}🔬, no\N{NO-BREAK SPACE}break",
    "{{ cookiecutter.license }} {% raw %} %} }} {# braces #} ${run} {x}",
    "- 1: [a, b] # & * ! | > @ = ~ null",
    "<b>bold</b> *star* _under_ `code` [link](x) &amp; $math$ ~~gone~~ ![image](x)",
    "1. first",
    "# heading",
]
REFUSED_BY_WANDB = re.compile(r"[/\\#?%:\n]")
LICENCES = {  # its name in pyproject.toml, how the text begins and ends
    "MIT": ("MIT", "MIT License", "OTHER DEALINGS IN THE\nSOFTWARE.\n"),
    "BSD-3-Clause": ("BSD-3-Clause", "BSD 3-Clause License", "POSSIBILITY OF SUCH DAMAGE.\n"),
    "Apache-2.0": ("Apache-2.0", " " * 33 + "Apache License", "limitations under the License.\n"),
    "Proprietary": ("LicenseRef-Proprietary", "Copyright (c) 1999 Jo", "permission of the copyright holder.\n"),
}


def words(markdown: str) -> str:
    """What a reader sees of Markdown: no formatting, blanks run together."""
    blocks = (block.children or [] for block in MarkdownIt().enable("strikethrough").parse(markdown))
    return one_line(" ".join("".join(piece.content for piece in block if "text" in piece.type) for block in blocks))


def one_line(text: str) -> str:
    return " ".join(text.split())


def default_answers(**answers: str) -> dict[str, str]:
    context = generate_context(str(TEMPLATE / "cookiecutter.json"), extra_context=typed(answers))
    return dict(prompt_for_config(context, no_input=True))


TAKEN = set(" ".join(default_answers()["_taken"].values()).split())  # type: ignore[attr-defined]


def test_a_bake_has_exactly_these_files(project: Path) -> None:
    assert {name for name, _ in texts(project)} == FILES


@pytest.fixture
def whole(bake: Bake) -> Path:
    """The project of someone who takes every part."""
    return bake(**dict.fromkeys(PARTS, "yes"))


@pytest.mark.parametrize("option", PARTS)
def test_an_option_adds_its_files_and_a_mention_of_them_and_changes_no_other(
    option: str, bake: Bake, project: Path
) -> None:
    without, chosen = dict(texts(project)), dict(texts(bake(**{option: "yes"})))
    parts = {name.format(package_name="my_project") for name in PARTS[option]}
    changed = {"README.md"} | ({"pyproject.toml"} if option == "fabric" else set())  # mypy's list of files
    assert {name for name in chosen if chosen[name] != without.get(name)} == parts | changed
    assert without.keys() == chosen.keys() - parts
    assert not any(Path(part).name in text for part in parts - {"slurm/README.md"} for _, text in texts(project))


def test_baking_once_more_without_a_part_leaves_what_a_team_put_beside_it(run: Run, tmp_path: Path) -> None:
    again = ("--no-input", "--default-config", "--overwrite-if-exists", "--output-dir", tmp_path / "out", TEMPLATE)
    command = (sys.executable, "-m", "cookiecutter", *again)
    run(*command, "slurm=yes", cwd=tmp_path)
    parts = tmp_path / "out" / "my-project" / "slurm"
    assert len([*parts.iterdir()]) == len(PARTS["slurm"])
    (parts / "ours.sbatch").touch()
    run(*command, "slurm=no", cwd=tmp_path)
    assert [file.name for file in parts.iterdir()] == ["ours.sbatch"]


def test_no_jinja_is_left_over(whole: Path) -> None:
    for name, text in texts(whole):
        assert not re.search(r"\{\{|\{%|\{#|cookiecutter", name + text), name


def test_no_line_ends_in_blanks_and_every_file_in_one_newline(whole: Path) -> None:
    for name, text in texts(whole):
        assert not re.search(r"[ \t\r]$", text, re.MULTILINE), name
        assert not text or re.search(r"[^\n]\n\Z", text), name


def test_python_files_of_the_template_hold_no_jinja_but_the_package_to_import() -> None:
    for path in SOURCES.rglob("*.py"):
        text = re.sub(r"^(from|import) \{\{ cookiecutter\.package_name \}\}", "", path.read_text(), flags=re.MULTILINE)
        assert not re.search(r"\{\{|\{%|\{#", text), path


def test_names_are_legal_on_windows(whole: Path) -> None:
    for names in (tracked(), [name for name, _ in texts(whole)]):
        assert len({name.lower() for name in names}) == len(names), "two names differ in capitals only"
        for name in names:
            assert not re.search(r'[<>:"|?*\\]|[. ](/|$)', name)
            assert not {part.split(".")[0].lower() for part in name.split("/")} & {"con", "prn", "aux", "nul"}
            assert len(name) <= 120


@pytest.mark.parametrize("text", HOSTILE)
def test_free_text_arrives_unharmed(text: str, bake: Bake) -> None:
    track = REFUSED_BY_WANDB.sub("-", text)
    project = bake(
        project_name=text, description=text, author_name=text, project_slug="p", package_name="p",
        wandb_project=track, wandb_entity=track,
    )  # fmt: skip
    metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["description"] == text
    assert metadata["authors"] == [{"name": text.replace("\n", " ")}]
    logger = yaml.safe_load((project / "configs/defaults.yaml").read_text(encoding="utf-8"))["trainer"]["logger"]
    assert (logger["init_args"]["project"], logger["init_args"]["entity"]) == (track, track)
    assert text.replace("\n", " ") in (project / "LICENSE").read_text(encoding="utf-8")
    readme = words((project / "README.md").read_text(encoding="utf-8"))
    assert readme.count(one_line(text)) >= 2, "the name and the description"
    for path in project.rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"))


def test_yaml_and_toml_parse_and_an_empty_entity_is_null(project: Path) -> None:
    for path in project.rglob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
    defaults = yaml.safe_load((project / "configs/defaults.yaml").read_text())
    assert defaults["trainer"]["logger"]["init_args"]["entity"] is None
    metadata = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert metadata["authors"] == [{"name": "The authors of My Project"}]


@pytest.mark.parametrize("accept_hooks", [True, False])
@pytest.mark.parametrize("choice", LICENCES)
def test_the_licence_is_the_chosen_one(choice: str, accept_hooks: bool, bake: Bake, tmp_path: Path) -> None:
    author = {"author_name": "Jo", "author_email": "jo@example.com"}
    project = bake(tmp_path, accept_hooks, license=choice, __year="1999", **author)
    spdx, begin, end = LICENCES[choice]
    text = (project / "LICENSE").read_text()
    assert text.startswith(begin)
    assert text.endswith(end)
    assert ("Copyright (c) 1999 Jo\n" in text) == (choice != "Apache-2.0")
    metadata = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert metadata["license"] == spdx
    assert metadata["authors"] == [{"name": author["author_name"], "email": author["author_email"]}]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_chosen_python_reaches_every_tool(version: str, bake: Bake) -> None:
    settings = tomllib.loads((bake(python_version=version) / "pyproject.toml").read_text())
    assert settings["project"]["requires-python"] == f">={version}"
    assert settings["tool"]["ruff"]["target-version"] == f"py{version.replace('.', '')}"
    assert settings["tool"]["mypy"]["python_version"] == version


NO_FOLDER = [
    "",
    " ",
    ".",
    "..",
    ".git",
    "-x",
    "x.",
    "x ",
    "a b",
    "a/b",
    "../x",
    r"a\b",
    "a:b",
    "größe",
    "a\nb",
    "x" * 61,
]
RESERVED = ["CON", "nul.txt", "com1", "torch", "Scikit.Learn"]
NO_MODULE = ["", "1a", "a b", "a-b", "a.b", "größe", "_x", "__init__", "x" * 61]
HIDING = ["class", "None", "none", "torch", "Torch", "lightning", "wandb", "main", "tests", "Configs", "runs", "json"]


@pytest.mark.parametrize(
    ("variable", "answer", "instead"),
    [("project_slug", name, r"type '[A-Za-z0-9-]+' instead") for name in NO_FOLDER]
    + [("project_slug", name, f"type '{name.replace('.', '-')}-project' instead") for name in RESERVED]
    + [("package_name", name, r"type '[a-z][a-z0-9_]*' instead") for name in NO_MODULE]
    + [("package_name", name, f"type '{name}_project' instead") for name in HIDING]
    + [
        ("author_email", "jo at home", "type one like jo@example.com"),
        ("author_email", 'jo"@example.com\n', "type one like jo@example.com"),
        ("wandb_project", "team/project", "type 'team-project' instead"),
        ("wandb_entity", "x" * 129, f"type '{'x' * 128}' instead"),
        ("description", "a\x07bell", "type 'abell' instead"),
        ("author_name", "half of an emoji: \udc00", "type 'half of an emoji: ' instead"),
    ],
)
def test_a_bad_answer_is_refused_with_what_to_type_instead_and_nothing_left(
    variable: str, answer: str, instead: str, bake: Bake, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output_dir = tmp_path / "here"
    output_dir.mkdir()
    with pytest.raises(FailedHookException, match="exit status: 1"):
        bake(output_dir, **{variable: answer})
    sentence = capfd.readouterr().err.splitlines()[0]
    assert sentence.startswith(variable)
    assert re.search(instead, sentence)
    assert list(tmp_path.rglob("*")) == [output_dir]


def test_a_slug_that_is_an_absolute_path_makes_no_folder_there(bake: Bake, tmp_path: Path) -> None:
    for accept_hooks in (True, False):
        try:
            bake(tmp_path / f"out-{accept_hooks}", accept_hooks, project_slug=str(tmp_path / "deep" / "er"))
        except FailedHookException:
            assert accept_hooks
        assert not (tmp_path / "deep").exists()


def test_the_command_exits_with_1_after_the_sentence(run: Run, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "cookiecutter", "--no-input", "--output-dir", str(tmp_path / "out"), str(TEMPLATE))
    assert run(*command, "package_name=torch", cwd=tmp_path, code=1).startswith("package_name 'torch' is a package")
    assert not list((tmp_path / "out").glob("*"))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=100) | st.sampled_from([*HOSTILE, *sorted(TAKEN | sys.stdlib_module_names), "3D", "x y " * 50]))
def test_the_derived_names_are_right_when_one_just_presses_enter(name: str) -> None:
    answers = default_answers(project_name=name)
    slug, package = answers["project_slug"], answers["package_name"]
    assert re.fullmatch("[a-z0-9]([a-z0-9-]*[a-z0-9])?", slug)
    assert package.isidentifier()
    assert not keyword.iskeyword(package)
    assert not {slug, package} & (TAKEN | sys.stdlib_module_names)
    assert max(len(slug), len(package), len(answers["wandb_project"])) <= 60
    assert complaint(answers | {"project_name": ""}) is None


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=70) | st.text("aB1.-_/\\", max_size=8) | st.sampled_from(sorted(TAKEN)))
def test_a_slug_that_gets_another_folder_is_always_refused(slug: str) -> None:
    answers = default_answers(project_slug=slug, package_name="p", wandb_project="")
    assert answers["project_slug"] == slug or complaint(answers)


def test_every_module_that_a_name_could_hide_is_known(run: Run, project: Path) -> None:
    needed = "main, lightning.pytorch, sklearn.datasets, tensorboardX, torch.utils.tensorboard, pytest, hydra, rich"
    files = "{name for name, module in sys.modules.items() if hasattr(module, '__file__')}"
    printed = run(sys.executable, "-B", "-c", f"import {needed}, sys; print('modules:', *{files})", cwd=project)
    modules = {name.split(".")[0] for name in printed.split("modules: ")[1].splitlines()[0].split()}
    assert "torch" in modules
    known = TAKEN | {"my_project", "sitecustomize", "usercustomize"}
    assert {name for name in modules if name[0] != "_" and name.lower() not in known} == set()
    assert {name.lower() for name in {*sys.stdlib_module_names, *keyword.kwlist} if name[0] != "_"} <= TAKEN


def test_the_project_asks_for_versions_that_the_template_is_tested_with(project: Path) -> None:
    lines = [line for line in (TEMPLATE / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    tested = {pin.name: str(pin.specifier).removeprefix("==") for pin in map(Requirement, lines)}
    asked = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, asked["dependencies"] + asked["optional-dependencies"]["dev"]):
        assert requirement.specifier.contains(tested[requirement.name]), requirement
        assert {clause.operator for clause in requirement.specifier} == {">=", "<"}, requirement
