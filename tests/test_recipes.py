"""The recipes in docs/recipes/: copied into a fresh project, run, judged by what comes out."""

import ast
import base64
import csv
import fcntl
import importlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import wave
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import optuna
import pyarrow.parquet
import pyte
import pytest
import torch
import yaml
from bakery import TEMPLATE, environment
from command import Commands
from conftest import Bake, blocks
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from wandb_record import recorded
from wandb_server import WandbServer

RECIPES = TEMPLATE / "docs" / "recipes"
PAGES = sorted(page for page in RECIPES.iterdir() if page.name != "README.md")
NAMES = {"my_project": "odd_duck"}  # what a recipe says stands for others


@dataclass(frozen=True)
class Project:
    """A fresh project with two runs, RUN and OTHER, into which recipes are copied."""

    folder: Path
    env: dict[str, str]
    names: dict[str, str]

    def filled(self, text: str) -> str:
        return re.sub(rf"\b({'|'.join(self.names)})\b", lambda name: self.names[name[0]], text)

    def take(self, recipe: str) -> list[str]:
        """Copies the files of a recipe, and gives its commands."""
        commands = []
        for kind, block in blocks((RECIPES / recipe).read_text()):
            if kind == "bash":
                commands += self.filled(block).splitlines()
            else:
                content = self.filled(block)
                (name,) = re.findall(r"\A# (\S+)$", content, re.MULTILINE)
                assert not (self.folder / name).exists(), "it would replace a file of the project"
                (self.folder / name).write_text(content)
        return commands

    def start(self, command: str, screen: int | IO[str]) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ("bash", "-c", f"exec {command}"),
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=screen,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, command: str, code: int = 0) -> str:
        """Runs a command and gives what it printed."""
        process = self.start(command, subprocess.PIPE)
        try:
            printed, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == code, f"{command}: {printed}"
        assert "Would install" not in printed, "requirements.txt lacks what a recipe needs"
        return printed

    def runs(self) -> list[Path]:
        """The runs that were made here, the oldest first."""
        made = {file.parent for file in self.folder.glob("runs/*/config.yaml")}
        return sorted(
            (run for run in made if run.name not in self.names.values()), key=os.path.getctime
        )


@pytest.fixture(scope="module")
def two_runs(command: Commands) -> list[Path]:
    """Runs of the example: one that learns and one that hardly does."""
    runs = [
        command(f"fit --config @digits --trainer.max_epochs 3 --model.lr {lr}").run
        for lr in (0.005, 0.0001)
    ]
    return [run for run in runs if run]


@pytest.fixture
def project(bake: Bake, tmp_path: Path, two_runs: list[Path]) -> Project:
    folder = bake(tmp_path, package_name="odd_duck", project_slug="Odd.Duck")
    for run in two_runs:
        shutil.copytree(run, folder / "runs" / run.name, symlinks=True)
    env = environment(tmp_path / "e") | {
        "PIP_DRY_RUN": "1",
        "PIP_NO_INDEX": "1",
    }  # no test installs anything
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return Project(folder, env, NAMES | {"RUN": two_runs[0].name, "OTHER": two_runs[1].name})


def table(run: Path) -> list[dict[str, str]]:
    if not (run / "metrics.csv").exists():  # it trains, or was killed
        text = (run / "metrics.jsonl").read_text().rpartition("\n")[0]
        rows = map(json.loads, text.splitlines())
        return [defaultdict(str, {name: str(row[name]) for name in row}) for row in rows]
    with (run / "metrics.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


def logged(run: Path, name: str) -> list[float]:
    return [float(row[name]) for row in table(run) if row.get(name)]


def test_every_recipe_is_in_the_table_of_recipes_and_has_a_test() -> None:
    listed = re.findall(
        r"^\| \[(\S+)\]\((\S+)\) \|", (RECIPES / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == [(page.name, page.name) for page in PAGES]
    tests = "".join(file.read_text() for file in Path(__file__).parent.glob("test_re*.py"))
    assert [page.name for page in PAGES if f'"{page.name}"' not in tests] == []


def test_each_recipe_says_what_it_is_for_what_to_install_what_to_type_and_what_comes_out() -> None:
    for page in PAGES:
        said = re.findall(r"\*\*(.+?):\*\*", page.read_text())
        assert said[:4] == ["What for", "Install", "Commands", "What comes out"], page.name
        for kind, block in blocks(page.read_text()):
            assert kind != "python" or block.count("\n") <= 45, page.name


def test_what_is_copied_passes_the_projects_own_checks(project: Project) -> None:
    for page in PAGES:
        if page.suffix == ".md":
            project.take(page.name)
        else:
            (project.folder / page.name).write_text(project.filled(page.read_text()))
    project("ruff check .")
    project("ruff format --check .")


@pytest.mark.slow
def test_what_is_copied_into_the_package_passes_mypy(project: Project) -> None:
    for name in ("logger.md", "media.md", "parquet.md", "predictions-table.md", "watch.md"):
        project.take(name)
    project("mypy")


def test_several_runs_are_compared_in_one_picture(project: Project) -> None:
    import matplotlib.image  # here, because it takes a second

    picture, accuracy, _ = project.take("compare.md")
    assert not project(picture)
    colours = matplotlib.image.imread(project.folder / "compare.png")[..., :3]
    thirds = [
        colours[:, n * colours.shape[1] // 3 : (n + 1) * colours.shape[1] // 3] for n in range(3)
    ]
    for third in thirds:
        for colour in ((31, 119, 180), (255, 127, 14)):  # matplotlib's first two
            assert (abs(third * 255 - colour).max(axis=2) < 2).sum() > 200
    project(accuracy)
    drawn = (project.folder / "accuracy.svg").read_text()
    texts = re.findall(r"<!-- (.*?) -->", drawn)
    assert {"val/acc", "step", project.names["RUN"], project.names["OTHER"]} <= set(texts)
    assert len(re.findall(r'<g id="axes_\d+">', drawn)) == 1
    assert "train/loss" not in texts
    project(f"{picture} --metrics val/acc nobody/logs/it")


def test_what_is_no_training_is_left_out_of_the_comparison_in_a_line(
    project: Project, command: Commands
) -> None:
    _, accuracy, everything = project.take("compare.md")
    runs = project.folder / "runs"
    killed, torn = runs / "killed", runs / "torn"
    shutil.copytree(runs / project.names["RUN"], killed)
    (killed / "metrics.csv").unlink()
    log = killed / "metrics.jsonl"
    log.write_text(log.read_text() + '{"_row": 99, "_stage": "fi')  # cut by the kill
    tested = command(f"test --ckpt_path {project.names['RUN']} --trainer.logger false").run
    assert tested
    shutil.copytree(tested, runs / "tested")
    torn.mkdir()
    (torn / "metrics.jsonl").write_text("of another program\n")
    (runs / "empty").mkdir()
    (runs / "notes.txt").write_text("a stray file")
    printed = project(everything)
    left_out = "runs/empty, runs/notes.txt, runs/tested, runs/torn"
    assert printed == f"skipped  {left_out}: no training rows\n"
    assert (project.folder / "compare.png").exists()
    project(accuracy.replace(f"runs/{project.names['OTHER']}", "runs/killed runs/tested"))
    texts = re.findall(r"<!-- (.*?) -->", (project.folder / "accuracy.svg").read_text())
    assert {project.names["RUN"], "killed"} <= set(texts)
    assert "tested" not in texts
    (project.folder / "compare.png").unlink()
    refused = project("python compare.py runs/empty runs/notes.txt", code=1)
    assert refused.splitlines()[-1] == "error: there is no run to compare"
    assert not (project.folder / "compare.png").exists()


def test_a_run_is_seen_in_a_terminal(project: Project) -> None:
    summary, viewer = project.take("leet.md")
    printed = project(summary)
    assert re.search(r"^state +finished", printed, re.MULTILINE)
    assert re.search(r"best/val/acc +0\.\d+", printed)
    screen = pyte.Screen(160, 50)
    terminal = pyte.ByteStream(screen)
    child, descriptor = pty.fork()
    if not child:
        os.chdir(project.folder)
        os.execvpe(
            "bash", ("bash", "-c", f"exec {viewer}"), project.env | {"TERM": "xterm-256color"}
        )
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))

    def shows(*names: str) -> bool:
        """Feed the screen until it has these names or the viewer ends, for 30 s at most."""
        end = time.monotonic() + 30
        while time.monotonic() < end and not (
            names and all(name in "\n".join(screen.display) for name in names)
        ):
            if select.select([descriptor], [], [], 0.2)[0]:
                try:
                    terminal.feed(os.read(descriptor, 65536))
                except OSError:  # it has closed its terminal
                    return not names
        return time.monotonic() < end

    try:
        assert shows("train/loss", "val/acc", "val/loss", "best/val/acc", "Finished"), "\n".join(
            screen.display
        )
        os.write(descriptor, b"h")
        assert shows("Toggle this help screen"), "\n".join(screen.display)
        os.write(descriptor, b"hq")
        assert shows(), "it does not quit"
    finally:
        os.kill(child, 9)
        _, status = os.waitpid(child, 0)
        os.close(descriptor)
    assert status == 0


def test_an_exported_model_gives_what_the_model_gives_without_its_code(project: Project) -> None:
    install, export, check = project.take("export.md")
    project(install)
    project(export)
    assert project(check).endswith("model.onnx and model.pt2 give what the model gives\n")
    elsewhere = project.folder.parent / "elsewhere"
    shutil.copytree(project.folder / "exported", elsewhere)
    assert sorted(file.name for file in elsewhere.iterdir()) == ["model.onnx", "model.pt2"]
    script = """
import os, sys, onnxruntime, torch
os.chdir(os.path.dirname(__file__))
from sklearn.datasets import load_digits
pixels, classes = load_digits(return_X_y=True)
images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
(logits,) = onnxruntime.InferenceSession("model.onnx").run(None, {"images": images.numpy()})
program = torch.export.load("model.pt2").module()
assert not {"lightning", "odd_duck"} & sys.modules.keys()
for outputs in (torch.from_numpy(logits), program(images)):
    print(float((outputs.argmax(1) == torch.as_tensor(classes)).float().mean()))
"""
    (elsewhere / "use.py").write_text(script)
    accuracies = [float(line) for line in project(f"python {elsewhere}/use.py").splitlines()]
    best = max(logged(project.folder / "runs" / project.names["RUN"], "val/acc"))
    assert accuracies[0] == accuracies[1] == pytest.approx(best, abs=0.05)
    other = check.replace(project.names["RUN"], project.names["OTHER"])
    assert "not close" in project(other, code=1), "the check passes whatever was exported"


@pytest.mark.slow
def test_a_logger_of_ones_own_gets_everything_beside_wandb_and_alone(project: Project) -> None:
    beside, alone, tensorboard = project.take("logger.md")
    for command in (beside, alone, tensorboard):
        project(command)
    both, single, events = project.runs()
    for run in (both, single):
        config, *rows = [
            json.loads(line) for line in (run / "lines.jsonl").read_text().splitlines()
        ]
        about = config.pop("run")
        assert config == yaml.safe_load((run / "config.yaml").read_text())
        assert about["folder"] == str(run)
        for name in ("train/loss", "val/acc", "lr-AdamW"):
            digits = 4 if run == both else 6
            assert [row[name] for row in rows if name in row] == [
                float(f"{value:.{digits}g}") for value in logged(run, name)
            ]
        assert [row["step"] for row in rows if "val/acc" in row] == [18, 37, 56]
    assert [row["val/acc"] for row in recorded(both).history if "val/acc" in row] == logged(
        both, "val/acc"
    )
    assert not (single / "wandb").exists()
    (file,) = events.rglob("events.out.tfevents.*")
    assert b"val/acc" in file.read_bytes()
    refused = project(f"{beside} --trainer.logger.digits two", code=2)
    assert refused == "error: --trainer.logger.digits: expected int, got two\n"


@pytest.mark.slow
def test_predictions_are_a_parquet_file_with_the_numbers_of_the_model(project: Project) -> None:
    install, command = project.take("parquet.md")
    project(install)
    assert "predictions.parquet, 360 rows\n" in project(command)
    project(command.partition(" --config")[0])
    parquet, plain = project.runs()
    columns = pyarrow.parquet.read_table(parquet / "predictions.parquet")
    assert not (parquet / "predictions.csv").exists()
    with (plain / "predictions.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert columns.column_names == [*rows[0]]
    assert columns["index"].to_pylist() == [int(row["index"]) for row in rows]
    for name in ("p0", "p9"):
        texts = torch.tensor([float(row[name]) for row in rows])
        assert columns.schema.field(name).type == pyarrow.float32()
        assert torch.equal(texts, torch.tensor(columns[name].to_pylist()))  # bit-for-bit


@pytest.mark.slow
def test_predictions_are_a_table_in_wandb(project: Project, wandb_server: WandbServer) -> None:
    (command,) = project.take("predictions-table.md")
    online = replace(project, env=project.env | wandb_server.env())
    online(f"{command} --trainer.accelerator cpu --trainer.devices 2")
    project(f"{command} --trainer.logger false")
    sent_run, _ = project.runs()
    with (sent_run / "predictions.csv").open(newline="") as file:
        names, *rows = csv.reader(file)
    sent = wandb_server.runs[sent_run.name]
    (row,) = [row for row in sent.history if "predictions" in row]
    shown = json.loads(sent.files[row["predictions"]["path"]])
    assert shown["columns"] == names
    assert [[f"{value:.9g}" for value in values] for values in shown["data"]] == rows
    assert {type(value) for value in shown["data"][0][:2]} == {int}


@pytest.mark.slow
def test_gradients_parameters_and_the_graph_are_watched_and_no_hook_stays(
    project: Project, wandb_server: WandbServer
) -> None:
    (command,) = project.take("watch.md")
    hooks = """
from lightning.pytorch import Callback


class Hooks(Callback):
    def teardown(self, trainer, module, stage):
        parts = [*module.modules(), *module.parameters()]
        kinds = ("_forward_hooks", "_backward_hooks")
        hooks = [getattr(part, kind, None) or () for part in parts for kind in kinds]
        print("hooks", sum(map(len, hooks)))
"""
    (project.folder / "odd_duck" / "hooks.py").write_text(hooks)
    online = replace(project, env=project.env | wandb_server.env())
    screen = online(f"{command} --trainer.callbacks+ odd_duck.hooks.Hooks")
    assert "hooks 0\n" in screen
    assert "arn" not in screen
    project(f"{command} --trainer.logger CSVLogger --trainer.logger.save_dir '$run'")
    (sent,) = wandb_server.runs.values()
    parts = {f"{layer}.{kind}" for layer in (0, 3, 8) for kind in ("weight", "bias")}
    names = {f"{kind}/{part}" for kind in ("gradients", "parameters") for part in parts}
    rows = [row for row in sent.history if names & row.keys()]
    assert set().union(*rows) >= names
    assert sum(rows[0]["parameters/0.bias"]["values"]) == 32
    graph = json.loads(sent.files[sent.summary["graph_0"]["path"]])
    assert [node["class_name"].partition("(")[0] for node in graph["nodes"]] == [
        *["Conv2d", "ReLU", "MaxPool2d"] * 2,
        *("Flatten", "Dropout", "Linear"),
    ]
    assert all("trainer/global_step" in row for row in sent.history)


@pytest.mark.slow
def test_media_arrive_once_at_their_step_and_change_no_training(
    project: Project, wandb_server: WandbServer
) -> None:
    install, command = project.take("media.md")
    project(install)
    plain = project.folder / "runs" / project.names["RUN"]
    command += " --model.lr 0.005"  # as in RUN
    online = replace(project, env=project.env | wandb_server.env())
    online(command)
    online(f"{command} --trainer.accelerator cpu --trainer.devices 2")
    project(f"{command} --trainer.logger false")
    alone, of_two, unlogged = project.runs()
    for run, steps, images in ((alone, 19, 64), (of_two, 9, 64)):
        sent = wandb_server.runs[run.name]
        rows = [row for row in sent.history if "sound" in row]
        assert [row["trainer/global_step"] for row in rows] == [steps, 2 * steps, 3 * steps]
        for row in rows:
            sound, cloud = (sent.files[row[name]["path"]] for name in ("sound", "cloud"))
            with wave.open(io.BytesIO(sound)) as opened:
                assert (opened.getframerate(), opened.getnframes()) == (8000, 8000)
            points = json.loads(cloud)
            assert len(points) == images
            assert {len(point) for point in points} == {4}
            assert {point[3] for point in points} == set(range(1, 11))
        assert len({sent.files[row["cloud"]["path"]] for row in rows}) == 3
        assert len([name for name in sent.files if name.startswith("media/")]) == 6
    for run in (alone, unlogged):
        assert table(run) == table(plain)
    assert not (unlogged / "wandb").exists()


@pytest.mark.slow
def test_a_notebook_trains_and_shows_the_worst_samples(project: Project) -> None:
    import matplotlib.image

    notebook = json.loads(project.filled((RECIPES / "notebook.ipynb").read_text()))
    assert [
        cell for cell in notebook["cells"] if cell.get("outputs") or cell.get("execution_count")
    ] == []
    titles = notebook["cells"][-1] | {
        "id": "titles",
        "source": "[panel.get_title() for panel in panels.flat]",
    }
    notebook["cells"].append(titles)
    file = project.folder / "notebook.ipynb"
    file.write_text(json.dumps(notebook))
    project("jupyter execute --inplace --timeout=300 notebook.ipynb")
    outputs = [
        output
        for cell in json.loads(file.read_text())["cells"]
        for output in cell.get("outputs", ())
    ]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}, outputs
    assert "epoch 4   step 95 " in "".join("".join(output.get("text", ())) for output in outputs)
    (picture,) = [
        output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", ())
    ]
    shades = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture)))
    assert shades.shape[1] > 1000
    (run,) = project.runs()
    model = importlib.import_module("odd_duck.engine").load(str(run))
    data = importlib.import_module("odd_duck.data").Digits()
    data.setup("validate")
    images, labels = data.val.tensors
    losses, order = torch.nn.functional.cross_entropy(model(images), labels, reduction="none").sort(
        descending=True
    )
    shown = ast.literal_eval("".join(outputs[-1]["data"]["text/plain"]))
    expected = [
        f"{labels[index]}, taken for {model(images[index][None]).argmax()}\nloss {loss:.2f}"
        for loss, index in zip(losses[:12], order[:12], strict=True)
    ]
    assert shown == expected


def eventually(reached: Callable[[], Any], seconds: float = 300) -> Any:
    """What is reached, as soon as it is."""
    end = time.monotonic() + seconds
    while not (result := reached()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return result


class Search:
    """A search by the recipe, which is killed and started again."""

    def __init__(self, project: Project, command: str) -> None:
        self.project, self.command = project, command
        self.runs = project.folder / "runs"
        self.log = project.folder.parent / "search.txt"
        journal = JournalFileBackend(str(self.runs / "search.journal"))
        storage = optuna.storages.JournalStorage(journal)
        self.study = optuna.create_study(storage=storage, study_name="search", direction="maximize")
        self.trainings: list[int] = []  # that a killed search had started
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> "subprocess.Popen[str]":
        with self.log.open("a") as screen:
            self.process = self.project.start(self.command, screen)
        return self.process

    def kill(self) -> None:
        """Kill the search alone, and note which training it had started."""
        if self.process is None:
            return
        pid = self.process.pid
        if self.process.poll() is None:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            self.trainings.extend(os.pidfd_open(int(child)) for child in children)
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        for training in self.trainings:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(training, signal.SIGKILL)
            os.close(training)

    def run_of(self, trial: optuna.trial.FrozenTrial) -> Path:
        return self.runs / str(trial.user_attrs["run"])

    def in_the_middle(self, number: int) -> Path | None:
        """Return the run of a trial once it has logged and saved."""
        run = self.runs / str(self.study.trials[number].user_attrs.get("run", "none"))
        saved = (run / "checkpoints" / "last.ckpt").exists()
        return run if saved and logged(run, "val/acc") else None

    def states(self) -> list[str]:
        return [trial.state.name for trial in self.study.trials]


def kill_twice(search: Search) -> tuple[Path, list[dict[str, str]]]:
    """Kill a search in its first and third trial; return that run, and its rows until then."""
    search.start()
    eventually(lambda: search.in_the_middle(0))
    search.kill()
    (orphan,) = search.trainings
    signal.pidfd_send_signal(orphan, signal.SIGSTOP)  # it surely outlives the search for a while
    search.start()
    time.sleep(10)
    assert search.states() == ["RUNNING", "WAITING", "WAITING"], "two at once"
    signal.pidfd_send_signal(orphan, signal.SIGCONT)
    torn = eventually(lambda: search.in_the_middle(2))
    search.kill()
    signal.pidfd_send_signal(search.trainings[-1], signal.SIGKILL)
    return torn, table(torn)


@pytest.mark.slow
def test_a_search_that_is_killed_continues_with_all_it_had(project: Project) -> None:
    install, command, _ = project.take("optuna.md")
    project(install)
    search = Search(project, command)
    # The last learns so fast that it is not given up.
    for lr, width in ((0.001, 16), (0.0015, 16), (0.01, 64)):
        search.study.enqueue_trial({"lr": lr, "width": width})
    try:
        torn, before = kill_twice(search)
        search.study.enqueue_trial({"lr": 1e-5, "width": 16})
        assert search.start().wait(timeout=600) == 0, search.log.read_text()
    finally:
        search.close()
    ended = search.study.trials
    finished = [trial for trial in ended if trial.state != TrialState.FAIL]
    assert [trial.number for trial in ended if trial.state == TrialState.FAIL] == [0, 2]
    assert len(finished) == 6
    assert {trial.state for trial in finished} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert {search.run_of(trial) for trial in finished} == set(search.runs.glob("search-*"))
    for killed, again in ((0, 3), (2, 5)):
        assert ended[again].params == ended[killed].params
        assert search.run_of(ended[again]) == search.run_of(ended[killed])
        assert ended[again].state == TrialState.COMPLETE
    kept = [row["val/acc"] for row in table(torn)][: len(before)]
    assert kept == [row["val/acc"] for row in before]
    for trial in finished:
        assert_complete(search, trial)
    given_up = ended[4]
    assert (given_up.params["lr"], given_up.state) == (1e-5, TrialState.PRUNED)
    assert len(logged(search.run_of(given_up), "val/acc")) < 20
    assert recorded(search.run_of(given_up)).exit_code == 143
    best = max(trial.value or 0 for trial in finished if trial.state == TrialState.COMPLETE)
    best_line, test_line = search.log.read_text().splitlines()[-2:]
    assert best_line.startswith(f"best     val/acc {best:.4g}  ")
    assert "test/acc" in project(test_line.removeprefix("test     "))


@pytest.mark.slow
def test_a_short_search_trains_in_its_own_process_and_continues(project: Project) -> None:
    _, _, command = project.take("optuna.md")
    file = project.folder / "short_search.py"
    text = file.read_text().replace("*flags]", '*flags, "--trainer.max_epochs=2"]')
    for trials in (1, 3):
        file.write_text(text.replace("TRIALS = 6", f"TRIALS = {trials}"))
        printed = project(command)
    study = optuna.load_study(
        study_name="short_search",
        storage=optuna.storages.JournalStorage(
            JournalFileBackend(str(project.folder / "runs" / "short.journal"))
        ),
    )
    made = {run.name: run for run in project.runs()}
    assert {trial.user_attrs["run"] for trial in study.trials} == made.keys()
    assert len(made) == 3
    for trial in study.trials:
        run = made[trial.user_attrs["run"]]
        assert trial.value == pytest.approx(logged(run, "val/acc")[-1])
        assert Path(trial.user_attrs["checkpoint"]).parent.parent == run
    best_line, test_line = printed.splitlines()[-2:]
    assert best_line.startswith(f"best     val/acc {study.best_value:.4g}  ")
    assert "test/acc" in project(test_line.removeprefix("test     "))


def assert_complete(search: Search, trial: optuna.trial.FrozenTrial) -> None:
    """Each epoch of a trial was logged once, and its value is the best of them."""
    run = search.run_of(trial)
    steps = [int(row["step"]) for row in table(run) if row["val/acc"]]
    assert steps == [19 * epoch + 18 for epoch in range(len(steps))]
    if trial.state == TrialState.COMPLETE:
        assert trial.value == max(logged(run, "val/acc"))
        assert list(trial.intermediate_values.values()) == logged(run, "val/acc")
