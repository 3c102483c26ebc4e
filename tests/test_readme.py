"""What the pages of a project say works as it stands: README.md and docs/."""

import csv
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from bakery import environment
from command import Commands, Outcome
from conftest import EVERY_PART, NO_PART, SOURCES, Bake, Run, blocks, command_lines
from inspection import anchors, links, longest_paragraph

OWN = "own.md"  # is read by test_walkthrough.py
FILES = ("README.md", *(f"docs/{page.name}" for page in sorted((SOURCES / "docs").glob("*.md"))))
PACKAGE = "odd_duck"  # of the fixture `command`
PAGES = {
    name: (SOURCES / name)
    .read_text(encoding="utf-8")
    .replace("{{ cookiecutter.package_name }}", PACKAGE)
    for name in FILES
    if OWN not in name
}
MOST_WORDS, LONGEST_PARAGRAPH = 1200, 60
# Sections whose code other tests run: test_extension.py and test_sweeps.py.
ELSEWHERE = ("Extend the command line", "A grid in W&B")


def sections() -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each section of all pages."""
    for page in PAGES.values():
        for part in re.split(r"^##+ ", page, flags=re.MULTILINE):
            yield part.partition("\n")[0], part


def changes_files(text: str) -> bool:
    """Whether a section has one write, copy or change a file, or type a loop."""
    begin = r"^(?:```(?:python|yaml)\n# \S+\.(?:py|yaml)\b|```diff|cp |for )"
    return bool(re.search(begin, text, re.MULTILINE))


WITH_CODE = {
    title: text for title, text in sections() if changes_files(text) and title not in ELSEWHERE
}
LINES = [
    line for title, text in sections() if title not in WITH_CODE for line in command_lines(text)
]
RUNS = [line for line in LINES if line.startswith("python main.py runs")]
TRAINING = [line for line in dict.fromkeys(LINES) if line.startswith("python main.py fit")]
CODES = [code for page in PAGES.values() for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page)]
FLAGS = [
    code
    for code in dict.fromkeys(CODES)
    if code.startswith("--")
    and not re.search("config|ckpt_path|init_from|resume|help|NAME CLASS|max-restarts", code)
]
INLINE = [
    code.removeprefix("python main.py ")
    for code in dict.fromkeys(CODES)
    if re.match(r"(python main.py )?(fit|validate|test|predict) -", code)
    and not re.search("CLASS|<run>", code)
]
VALUES = {
    "--data": "Digits",
    "--data.num_workers": "1",
    "--model.lr": "0.1",
    "--run_id": "named",
    "--runs_root": ".",
    "--trainer.max_time": "00:00:01:00",
}
INSTALLATION = ["python3 -m venv .venv", ". .venv/bin/activate", 'pip install --editable ".[dev]"']
SHORT = "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.log_every_n_steps 1"


def test_there_is_no_command_of_a_kind_that_no_test_runs() -> None:
    kinds = {
        line
        for line in LINES
        if line not in (*TRAINING, *RUNS, *INSTALLATION)
        and not line.startswith(("make ", "torchrun --nnodes 2 ", "python train_fabric.py"))
    }
    # In test_wandb.py, test_sync.py, test_sweeps.py, test_hosts.py, test_fabric.py and
    # test_updates.py.
    assert kinds == {
        "python main.py test --ckpt_path RUN",
        "python main.py predict --ckpt_path RUN",
        "python main.py test --config configs/digits.yaml"
        " --ckpt_path wandb:ENTITY/PROJECT/model-RUN:best",
        "python main.py sync",
        "python main.py sync RUN",
        "wandb sweep configs/sweep.yaml",
        "wandb sweep configs/grid.yaml",
        "wandb agent ENTITY/PROJECT/SWEEP",
        "pip install cruft",
        "cruft check",
        "cruft update",
    }
    assert (len(TRAINING), len(FLAGS), len(INLINE)) > (10, 15, 5)


@pytest.mark.parametrize("line", [line for line in TRAINING if "RUN" not in line])
def test_a_training_command_trains(
    line: str, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(command.project)
    outcome = command([*shlex.split(line)[2:], *SHORT.split()])
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    assert (outcome.run is None) == ("--print_config" in line)


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_in_the_text_is_an_option(flag: str, command: Commands) -> None:
    words = shlex.split(flag) if " " in flag else [flag, VALUES[flag]]
    outcome = command(["fit", "--config", "@digits", *words, "--trainer.fast_dev_run", "true"])
    assert (outcome.code, outcome.err) == (0, ""), outcome.err


def test_the_commands_on_runs_work(
    command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS_ROOT", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    for name in ("RUN", "OTHER"):
        line = f"fit --config @digits --run_id {name} --trainer.logger false {SHORT}"
        assert command(line).code == 0
    assert len(RUNS) > 8
    for line in RUNS:
        words = shlex.split(line)[2:]
        outcome = command([*words, "--yes"] if "rm" in words else words)
        assert (outcome.code, outcome.err) == (0, ""), (line, outcome)
        assert outcome.out
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["OTHER"]
    flags = [code.split() for code in CODES if re.match("runs .*--", code)]
    assert len(flags) > 8
    for _, *action, flag in (words[: 3 if words[1][0] != "-" else 2] for words in flags):
        assert f"{flag} " in command(["runs", *action, "--help"]).out
    assert (tmp_path / "runs.png").exists()


@pytest.fixture(scope="module")
def trained(command: Commands) -> Outcome:
    """A short run, and what it printed."""
    outcome = command("fit --config @digits --trainer.max_epochs 2")
    assert outcome.run
    return outcome


@pytest.fixture
def run_folder(trained: Outcome) -> Path:
    assert trained.run
    return trained.run


@pytest.mark.parametrize("code", INLINE)
def test_a_command_in_the_text_works(
    code: str, command: Commands, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(command.project)
    words = [word.replace("RUN", run_folder.name) for word in shlex.split(code)]
    if code.startswith("fit") and "help" not in code:
        words += ["--trainer.max_epochs", "2"]
    outcome = command(words)
    assert (outcome.code, outcome.err) == (0, ""), outcome.err


def test_the_screen_of_the_readme_is_the_one_that_a_run_prints(
    trained: Outcome, command: Commands
) -> None:
    (shown,) = [text for kind, text in blocks(PAGES["README.md"]) if kind == "text"]
    assert max(map(len, shown.splitlines())) <= 100

    def names(text: str) -> list[list[str]]:
        """Return the words of each line that hold no number, path or dots; of equal lines one."""
        lines = [re.sub("^(epoch.*)  best$", r"\1", line) for line in text.splitlines()]
        words = [re.findall(r"(?<!\S)[a-zA-Z&/-]+(?!\S)", line) for line in lines]
        return [line for line, _ in itertools.groupby(filter(None, words))]

    printed = names(trained.out)
    for said, line in zip(names(shown), printed, strict=True):
        assert said == line[: len(said)], (said, line)
        assert said == line or said[0] == "W&B"  # which is cut to fit


def test_a_run_is_tested_and_run_again_as_the_text_says(command: Commands) -> None:
    trained = command("fit --config @digits --config @debug")
    assert trained.run is not None
    for reference in (
        trained.run.name,
        f"{trained.run.name}:last",
        str(trained.run),
        trained.run / "checkpoints/last.ckpt",
    ):
        for verb in ("test", "validate", "predict"):
            outcome = command(f"{verb} --ckpt_path {reference}")
            assert (outcome.code, outcome.err) == (0, ""), outcome.err
            assert outcome.run not in (None, trained.run)
    for way in ("--resume", "--ckpt_path", "--init_from"):
        outcome = command(f"fit {way} {trained.run.name} --trainer.max_epochs 3")
        assert (outcome.code, outcome.err) == (0, ""), outcome.err
        assert (outcome.run is None) == (way == "--resume")
    trained = command("fit --config @digits --config @debug")
    assert trained.run is not None
    again = command(f"fit --config {trained.run}/config.yaml")
    assert again.run is not None
    assert (again.run / "metrics.csv").read_text() == (trained.run / "metrics.csv").read_text()


def test_the_tree_of_a_run_is_true(run_folder: Path) -> None:
    tree = set(re.findall(r"^      ([\w.]+)/?  ", PAGES["docs/runs.md"], re.MULTILINE))
    assert {path.name for path in run_folder.iterdir()} == tree


def test_every_make_target_that_the_text_names_exists(
    command: Commands, run: Run, tmp_path: Path
) -> None:
    targets = {line.split()[1] for line in LINES if line.startswith("make ")}
    targets |= {code.split()[1] for code in CODES if code.startswith("make ")}
    assert targets == {"train", "test", "check", "fix", "lock"}
    for target in targets:
        run("make", "--dry-run", target, cwd=command.project)


# Sections with code: each in a fresh project with one run, RUN.


@dataclass(frozen=True)
class Followed:
    """A project in which one has done what a section says, and what that printed."""

    project: Path
    printed: str
    before: Path  # RUN

    def runs(self) -> list[Path]:
        """The runs that were made, the oldest first."""
        made = [file.parent for file in self.project.glob("runs/*/config.yaml")]
        return sorted((run for run in made if run != self.before), key=os.path.getctime)

    def metrics(self, run: Path) -> dict[str, str]:
        """Return the last value of each metric."""
        with (run / "metrics.csv").open(newline="") as file:
            return {name: row[name] for row in csv.DictReader(file) for name in row if row[name]}


def write(project: Path, kind: str, block: str) -> None:
    """Write, extend or change the file that the first line of a block names."""
    first, _, rest = block.partition("\n")
    named = re.fullmatch(r"(?:#|---) (\S+?)(, .*)?", first)
    if not named:
        return  # a line for a file that the text names
    file = project / named[1]
    if kind == "diff":
        text = file.read_text(encoding="utf-8")
        for part in rest.split("@@\n"):
            lines = part.splitlines(keepends=True)
            old = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
            new = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
            assert text.count(old) == 1, old
            text = text.replace(old, new)
    elif named[2] == ", at its end":
        text = f"{file.read_text(encoding='utf-8')}\n\n{rest}"
    else:
        text = rest if file.suffix == ".py" else block
    file.write_text(text, encoding="utf-8")


@pytest.fixture
def follow(bake: Bake, run_folder: Path, tmp_path: Path) -> Callable[[str], Followed]:
    project = bake(tmp_path, package_name=PACKAGE, project_slug="Odd.Duck")
    before = project / "runs" / run_folder.name
    shutil.copytree(run_folder, before, symlinks=True)
    (project / "new").mkdir()
    for number in range(3):
        numpy_file(project / "new" / f"{number}.npy")
    env = environment(tmp_path / "e")
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"

    def shell(line: str) -> str:
        done = subprocess.run(
            ("bash", "-c", line),
            cwd=project,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}: {done.stdout}"
        return done.stdout

    def follow(text: str) -> Followed:
        printed = []
        for kind, block in blocks(re.sub(r"\bRUN\b", before.name, text)):
            if kind != "bash":
                write(project, kind, block)
                continue
            for line in block.splitlines():
                printed.append(shell(re.sub(r"(main.py fit[^;]*)", rf"\1 {SHORT}", line)))
        shell("ruff check .")
        shell("ruff format --check .")
        return Followed(project, "".join(printed), before)

    return follow


def numpy_file(file: Path) -> None:
    import numpy as np

    np.save(file, np.zeros((1, 8, 8), dtype=np.float32))


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(
        run / "checkpoints" / "last.ckpt", weights_only=True
    )["state_dict"]
    return state


def named_after_folds(done: Followed) -> None:
    runs = done.runs()
    assert [run.name for run in runs] == ["fold-0", "fold-1", "fold-2"]
    assert [yaml.safe_load((run / "config.yaml").read_text())["fold"] for run in runs] == [0, 1, 2]
    assert len({done.metrics(run)["val/loss"] for run in runs}) == 3


def only_the_last_layer_changed(done: Followed) -> None:
    (run,) = done.runs()
    best = next((done.before / "checkpoints").glob("epoch*"))
    old = torch.load(best, weights_only=True)["state_dict"]
    changed = {name for name, value in weights(run).items() if not torch.equal(value, old[name])}
    assert changed == {"network.8.weight", "network.8.bias"}


def sets_are_apart(done: Followed) -> None:
    first, second = done.runs()
    assert {"val/acc", "other/acc"} <= done.metrics(first).keys()
    # 360 images of the other set alone, no mixture with the 180 of the first one.
    assert float(done.metrics(first)["other/acc"]) * 360 % 1 == pytest.approx(0, abs=1e-3)
    assert "other/loss" in (second / "config.yaml").read_text()


def has_a_row_per_file(done: Followed) -> None:
    (run,) = done.runs()
    with (run / "predictions.csv").open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["0.npy", "1.npy", "2.npy"]


def has_the_fold(done: Followed) -> None:
    (run,) = done.runs()
    assert yaml.safe_load((run / "config.yaml").read_text())["fold"] == 3


def has_two_named(prefix: str) -> Callable[[Followed], None]:
    def check(done: Followed) -> None:
        assert len(done.runs()) == 2
        assert all(run.name.startswith(prefix) for run in done.runs())

    return check


def logs_the_norm(done: Followed) -> None:
    assert float(done.metrics(done.runs()[0])["train/gradient_norm"]) > 0


def unfreezes_at_an_epoch(done: Followed) -> None:
    (run,) = done.runs()
    finetuning = yaml.safe_load((run / "config.yaml").read_text())["callbacks"]["finetuning"]
    assert finetuning["init_args"]["unfreeze_backbone_at_epoch"] == 5
    only_the_last_layer_changed(done)


OUTCOMES: dict[str, Callable[[Followed], None]] = {
    "A second experiment": lambda done: None,
    "Freeze the backbone": only_the_last_layer_changed,
    "Unfreeze it later": unfreezes_at_an_epoch,
    "From Python, in a notebook": lambda done: None,
    "Add an argument and a link": has_the_fold,
    "Your own callback": logs_the_norm,
    "Several validation sets": sets_are_apart,
    "On new files": has_a_row_per_file,
    "In a service": lambda done: None,
    "A grid in the shell": has_two_named("lr-0.00"),
    "Seeds": has_two_named("seed-"),
    "Folds": named_after_folds,
}


def test_each_section_with_code_is_followed() -> None:
    assert WITH_CODE.keys() == OUTCOMES.keys()


@pytest.mark.parametrize(
    "title",
    [
        pytest.param(title, marks=[pytest.mark.slow] if "\nfor " in text else [])
        for title, text in WITH_CODE.items()
    ],
)
def test_a_section_with_code_works_as_it_stands(
    title: str, follow: Callable[[str], Followed]
) -> None:
    OUTCOMES[title](follow(WITH_CODE[title]))


# Lengths and links.


@pytest.fixture(params=[EVERY_PART, NO_PART], ids=["every part", "no part"])
def baked(request: pytest.FixtureRequest, bake: Bake) -> Path:
    return bake(**request.param)


def test_the_readme_is_short_and_so_is_each_paragraph(baked: Path) -> None:
    assert len((baked / "README.md").read_text(encoding="utf-8").split()) <= MOST_WORDS
    for page in baked.rglob("*.md"):
        longest = longest_paragraph(page.read_text(encoding="utf-8"))
        assert len(longest.split()) <= LONGEST_PARAGRAPH, f"{page.name}: {longest}"


def test_each_page_says_first_what_is_in_it_and_is_in_the_readme(baked: Path) -> None:
    listed = set(links(baked / "README.md"))
    for page in (baked / "docs").iterdir():
        title, blank, first = page.read_text(encoding="utf-8").splitlines()[:3]
        assert re.match(r"# \w", title), page.name
        assert not blank, page.name
        assert re.match(r"\W*\w.*\.$", first), page.name
        assert f"docs/{page.name}" in listed


def test_every_link_leads_somewhere(baked: Path) -> None:
    for page in baked.rglob("*.md"):
        for link in links(page):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.is_file(), f"{page.name} links {link}"
            if anchor:
                assert anchor in anchors(target.read_text(encoding="utf-8")), (
                    f"{page.name} links {link}"
                )


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("https://example.com/team/template.git", "https://example.com/team/template"),
        ("gh:team/template", "https://github.com/team/template"),
        ("https://key@example.com/team/template", ""),
        ("/somewhere/template", ""),
    ],
)
def test_the_templates_address_is_told_if_a_browser_opens_it(template: str, told: str) -> None:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = str(SOURCES.parent / "templates")
    environment = Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined)
    macros = environment.get_template("text.jinja").module
    assert macros.template_address({"_template": template}) == told  # type: ignore[attr-defined]
    assert macros.template_address({}) == ""  # type: ignore[attr-defined]
