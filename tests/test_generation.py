"""What a bake writes: which files, and what the choices change in them."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from bakery import TEMPLATE
from conftest import ASKED, EVERY_PART, NO_PART, SOURCES, Bake, Run, default_answers, texts, tracked
from packaging.requirements import Requirement

from hooks.post_gen_project import PARTS

FILES = {
    ".env.example",
    ".gitattributes",
    ".github/dependabot.yml",
    ".github/workflows/ci.yml",
    ".gitignore",
    ".pre-commit-config.yaml",
    "LICENSE",
    "Makefile",
    "README.md",
    "docs/checkpoints.md",
    "docs/cli.md",
    "docs/data-and-model.md",
    "docs/devices.md",
    "docs/own.md",
    "docs/predict.md",
    "docs/runs.md",
    "docs/sweeps.md",
    "docs/updates.md",
    "docs/wandb.md",
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
    "my_project/callbacks.py",
    "my_project/cli.py",
    "my_project/data.py",
    "my_project/engine/__init__.py",
    "my_project/engine/batches.py",
    "my_project/engine/data_order.py",
    "my_project/engine/epoch_start.py",
    "my_project/engine/random_streams.py",
    "my_project/engine/sampler_state.py",
    "my_project/engine/screen.py",
    "my_project/engine/checkpoint_io.py",
    "my_project/engine/wandb_log.py",
    "my_project/engine/background_saves.py",
    "my_project/engine/checkpoint_writer.py",
    "my_project/engine/readable.py",
    "my_project/engine/checkpoint_record.py",
    "my_project/engine/host_copy.py",
    "my_project/engine/checkpoints.py",
    "my_project/engine/cli.py",
    "my_project/engine/command_line.py",
    "my_project/engine/commands.py",
    "my_project/engine/distributed.py",
    "my_project/engine/error_messages.py",
    "my_project/engine/errors.py",
    "my_project/engine/files.py",
    "my_project/engine/layers.py",
    "my_project/engine/legacy.py",
    "my_project/engine/lightning_internals.py",
    "my_project/engine/metrics.py",
    "my_project/engine/metrics_log.py",
    "my_project/engine/parser.py",
    "my_project/engine/placeholders.py",
    "my_project/engine/prediction_parts.py",
    "my_project/engine/prediction_samples.py",
    "my_project/engine/predictions.py",
    "my_project/engine/progress.py",
    "my_project/engine/provenance.py",
    "my_project/engine/recorder.py",
    "my_project/engine/references.py",
    "my_project/engine/restore.py",
    "my_project/engine/resume.py",
    "my_project/engine/run.py",
    "my_project/engine/run_record.py",
    "my_project/engine/runs.py",
    "my_project/engine/runs_table.py",
    "my_project/engine/session.py",
    "my_project/engine/shutdown.py",
    "my_project/engine/train_state.py",
    "my_project/engine/version.py",
    "my_project/engine/wandb_logger.py",
    "my_project/engine/wandb_ending.py",
    "my_project/engine/wandb_session.py",
    "my_project/engine/wandb_internals.py",
    "my_project/engine/wandb_options.py",
    "my_project/engine/wandb_variables.py",
    "my_project/engine/wandb_sync.py",
    "my_project/engine/wandb_uploads.py",
    "my_project/model.py",
    "my_project/network.py",
    "pyproject.toml",
    "tests/conftest.py",
    "tests/test_configs.py",
    "tests/test_engine.py",
    "tests/test_research.py",
    "tests/test_training.py",
}
LICENCES = {  # its name in pyproject.toml, how the text begins and ends
    "MIT": ("MIT", "MIT License", "OTHER DEALINGS IN THE\nSOFTWARE.\n"),
    "BSD-3-Clause": ("BSD-3-Clause", "BSD 3-Clause License", "POSSIBILITY OF SUCH DAMAGE.\n"),
    "Apache-2.0": ("Apache-2.0", " " * 33 + "Apache License", "limitations under the License.\n"),
    "Proprietary": (
        "LicenseRef-Proprietary",
        "Copyright (c) 1999 Jo",
        "permission of the copyright holder.\n",
    ),
}


OPTIONS = [
    (option, answer)
    for option, answers in ASKED.items()
    for answer in (answers if isinstance(answers, list) else [True] if answers is False else [])
    if default_answers(**NO_PART)[option] != answer
]
CHANGED = {  # by an option, besides the files that are there for it alone
    "wandb_checkpoints": {"configs/defaults.yaml"},
    "license": {"LICENSE", "pyproject.toml"},
    "python_version": {"README.md", "pyproject.toml"},
    "slurm": {"README.md", "docs/devices.md"},
    "fabric": {"README.md", "docs/data-and-model.md", "pyproject.toml"},  # mypy's list of files
    "docker": {"README.md"},
}


def test_a_bake_has_exactly_these_files(project: Path) -> None:
    assert {name for name, _ in texts(project)} == FILES


@pytest.fixture
def whole(bake: Bake) -> Path:
    """The project of someone who takes every part."""
    return bake(**EVERY_PART)


@pytest.mark.parametrize(("option", "answer"), OPTIONS)
def test_an_option_adds_its_files_and_a_mention_of_them_and_changes_no_other(
    option: str, answer: str | bool, bake: Bake
) -> None:
    without, chosen = (
        dict(texts(bake(**NO_PART))),
        dict(texts(bake(**NO_PART | {option: str(answer)}))),
    )
    parts = {name.format(package_name="my_project") for name in PARTS.get((option, answer), [])}
    assert {name for name in chosen if chosen[name] != without.get(name)} == parts | CHANGED.get(
        option, set()
    )
    assert without.keys() == chosen.keys() - parts
    assert not any(
        Path(part).name in text for part in parts - {"slurm/README.md"} for text in without.values()
    )


def test_every_part_belongs_to_an_answer_that_can_be_given() -> None:
    assert PARTS.keys() <= set(OPTIONS)


def test_baking_once_more_without_a_part_leaves_what_a_team_put_beside_it(
    run: Run, tmp_path: Path
) -> None:
    again = (
        "--no-input",
        "--default-config",
        "--overwrite-if-exists",
        "--output-dir",
        tmp_path / "out",
        TEMPLATE,
    )
    command = (sys.executable, "-m", "cookiecutter", *again)
    run(*command, "slurm=yes", cwd=tmp_path)
    parts = tmp_path / "out" / "my-project" / "slurm"
    assert len([*parts.iterdir()]) == len(PARTS["slurm", True])
    (parts / "ours.sbatch").touch()
    run(*command, "slurm=no", cwd=tmp_path)
    assert [file.name for file in parts.iterdir()] == ["ours.sbatch"]


def test_no_line_ends_in_blanks_and_every_file_in_one_newline(whole: Path, project: Path) -> None:
    for name, text in [*texts(whole), *texts(project)]:
        assert not re.search(r"[ \t\r]$", text, re.MULTILINE), name
        assert not text or re.search(r"[^\n]\n\Z", text), name


def test_python_files_of_the_template_hold_no_jinja_but_the_package_to_import() -> None:
    for path in SOURCES.rglob("*.py"):
        text = re.sub(
            r"^ *(from|import) \{\{ cookiecutter\.package_name \}\}",
            "",
            path.read_text(),
            flags=re.MULTILINE,
        )
        assert not re.search(r"\{\{|\{%|\{#", text), path


def test_names_are_legal_on_windows(whole: Path) -> None:
    for names in (tracked(), [name for name, _ in texts(whole)]):
        assert len({name.lower() for name in names}) == len(names), (
            "two names differ in capitals only"
        )
        for name in names:
            assert not re.search(r'[<>:"|?*\\]|[. ](/|$)', name)
            assert not {part.split(".")[0].lower() for part in name.split("/")} & {
                "con",
                "prn",
                "aux",
                "nul",
            }
            assert len(name) <= 120


def test_an_empty_entity_is_null_and_an_empty_author_has_a_name(project: Path) -> None:
    defaults = yaml.safe_load((project / "configs/defaults.yaml").read_text())
    assert defaults["trainer"]["logger"]["init_args"]["entity"] is None
    metadata = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert metadata["authors"] == [{"name": "The authors of My Project"}]


@pytest.mark.parametrize("accept_hooks", [True, False])
@pytest.mark.parametrize("choice", LICENCES)
def test_the_licence_is_the_chosen_one(
    choice: str, accept_hooks: bool, bake: Bake, tmp_path: Path
) -> None:
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


def test_the_project_asks_for_versions_that_the_template_is_tested_with(project: Path) -> None:
    lines = [
        line
        for line in (TEMPLATE / "requirements.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]
    tested = {pin.name: str(pin.specifier).removeprefix("==") for pin in map(Requirement, lines)}
    asked = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    for requirement in map(
        Requirement, asked["dependencies"] + asked["optional-dependencies"]["dev"]
    ):
        assert requirement.specifier.contains(tested[requirement.name]), requirement
        assert {clause.operator for clause in requirement.specifier} == {">=", "<"}, requirement
