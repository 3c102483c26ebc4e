"""The loop of the option `fabric`: the numbers of the Trainer, and a run like any other."""

import csv
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from bakery import environment
from conftest import Bake, command_lines
from wandb_server import WandbServer

FABRIC = (
    "train_fabric.py --config configs/fabric.yaml --trainer.logger false --trainer.accelerator cpu"
)
TRAINER = (
    "main.py fit --config configs/digits.yaml --trainer.logger false --trainer.accelerator cpu"
)
STEPWISE = (
    " --model.optimizer SGD --model.optimizer.momentum 0.9 --model.lr 0.05"
    " --model.lr_scheduler OneCycleLR --model.lr_scheduler.max_lr 0.1"
    " --model.lr_scheduler.total_steps 57"
)
PLATEAU = (
    " --model.lr_scheduler lightning.pytorch.cli.ReduceLROnPlateau"
    " --model.lr_scheduler.monitor val/loss --model.lr_scheduler.patience 0"
    " --model.lr_scheduler.threshold 0.5"
)


class Place:
    """A project with the option, and what is done in it."""

    def __init__(self, project: Path, env: dict[str, str]) -> None:
        self.project, self.env = (
            project,
            env | {"RUNS_ROOT": str(project / "runs"), "OMP_NUM_THREADS": "1"},
        )

    def start(
        self, run: str, line: str, env: dict[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, *line.split()],
            cwd=self.project,
            env=self.env | (env or {}) | {"WANDB_RUN_ID": run},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(
        self, run: str, line: str, code: int = 0, env: dict[str, str] | None = None
    ) -> str:
        process = self.start(run, line, env)
        try:
            screen = process.communicate(timeout=300)[0]
        finally:
            process.kill()
        assert process.returncode == code, screen
        return screen

    def folder(self, run: str) -> Path:
        return self.project / "runs" / run

    def values(self, run: str, name: str) -> dict[int, float]:
        with (self.folder(run) / "metrics.csv").open() as stream:
            return {
                int(row["step"]): float(row[name])
                for row in csv.DictReader(stream)
                if row.get(name)
            }


@pytest.fixture(scope="module")
def place(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> Place:
    home = tmp_path_factory.mktemp("f")
    return Place(bake(home, fabric="yes"), environment(home / "e"))


def errors(screen: str) -> list[str]:
    return [line for line in screen.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ""),
        pytest.param(2, "", marks=pytest.mark.slow),
        pytest.param(1, STEPWISE, marks=pytest.mark.slow),
        pytest.param(1, PLATEAU, marks=pytest.mark.slow),
    ],
    ids=["one", "two", "stepwise", "plateau"],
)
def test_the_loop_and_the_trainer_have_the_same_losses(
    place: Place, ranks: int, options: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    for kind, line in (("loop", FABRIC), ("trainer", TRAINER)):
        place(f"{kind}-{name}", f"{line} --trainer.max_epochs 3 --trainer.devices {ranks}{options}")
    for metric in ("train/loss", "val/loss", "val/acc"):
        ours, theirs = (place.values(f"{kind}-{name}", metric) for kind in ("loop", "trainer"))
        assert len(ours) >= 3
        assert ours == pytest.approx(theirs, abs=1e-5)
    (rates,) = {
        tuple(place.values(f"loop-{name}", key).values()) for key in ("lr-AdamW", "lr-SGD")
    } - {()}
    assert (len(set(rates)) == 1) == (not options)


def test_what_the_loop_leaves_is_what_the_trainer_leaves(place: Place) -> None:
    place("left", f"{FABRIC} --trainer.max_epochs 2")
    place("left-tested", "main.py test --ckpt_path left --trainer.logger false")
    assert 0 < place.values("left-tested", "test/acc").popitem()[1] <= 1
    assert {path.name for path in place.folder("left").iterdir()} == {
        *(".lock", "checkpoints", "config.yaml", "metrics.csv", "metrics.jsonl", "run.json")
    }
    code = "from my_project.engine import load\n"
    code += "print(load('left').training, len(load('left:last').hparams))"
    (place.project / "look.py").write_text(code)
    assert place("look", "look.py") == "False 6\n"
    (refused,) = errors(place("left", "main.py fit --resume left", code=2))
    assert refused.endswith(
        "expected a checkpoint that a Trainer can resume from, got another; see --init_from"
    )
    place("begun", f"{TRAINER} --init_from left --trainer.max_epochs 1")
    place("again", "train_fabric.py --config runs/left/config.yaml")
    assert place.values("again", "train/loss") == place.values("left", "train/loss")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            "--trainer.max_epoch 3",
            "--trainer.max_epoch: no such option; did you mean trainer.max_epochs?",
        ),
        (
            "--trainer.accumulate_grad_batches 2",
            "--trainer.accumulate_grad_batches: no such option",
        ),
        (
            "--callbacks.checkpoint.monitor val/ac",
            "no metric named val/ac was logged; there are val/acc, val/loss; did you mean val/acc?",
        ),
        ("--resume nothing", "--resume: expected a run, got nothing"),
    ],
)
def test_a_mistake_is_one_line(place: Place, options: str, line: str) -> None:
    (error,) = errors(place("mistaken", f"{FABRIC} {options}", code=2))
    assert line in error
    assert not [*place.folder("mistaken").glob("checkpoints/*")]


def test_a_loss_that_is_no_number_ends_the_loop_and_leaves_what_was_good(place: Place) -> None:
    place("good", f"{FABRIC} --trainer.max_epochs 1")
    file = place.folder("good") / "checkpoints" / "last.ckpt"
    before = file.read_bytes()
    screen = place(
        "good", "train_fabric.py --resume good --trainer.max_epochs 9 --data.batch_size 64", code=0
    )
    assert re.search(
        r"epoch 8 +step 171 +lr-AdamW 0.002  train/loss \S+  val/acc \S+  val/loss \S+\n", screen
    )
    assert file.read_bytes() != before
    (error,) = errors(
        place(
            "lost", f"{FABRIC} --trainer.max_epochs 9 --model.optimizer SGD --model.lr 1e30", code=1
        )
    )
    assert error.startswith("error: train/loss is nan at step 5, which is not saved; ")
    assert not [*place.folder("lost").glob("checkpoints/*")]


def test_a_checkpoint_of_the_trainer_is_refused_in_one_line(place: Place) -> None:
    place("other", f"{TRAINER} --trainer.max_epochs 1")
    file = place.folder("other") / "checkpoints" / "last.ckpt"
    shutil.copy(file, place.project / "other.ckpt")
    screen = place("taken", f"{FABRIC} --ckpt_path other.ckpt", code=2)
    assert errors(screen) == [
        "error: other.ckpt: expected a checkpoint of train_fabric.py, got another"
    ]


def wait_for(file: Path, rows: int) -> None:
    for _ in range(600):
        if file.exists() and len(file.read_text().splitlines()) > rows:
            return
        time.sleep(0.05)
    raise AssertionError(f"{file} has no {rows} rows")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_run_that_is_ended_goes_on_bit_by_bit(
    place: Place, ranks: int, number: signal.Signals
) -> None:
    line = f"{FABRIC} --trainer.max_epochs 60 --trainer.devices {ranks}"
    name = f"{number.name}-{ranks}"
    process = place.start(name, line)
    try:
        wait_for(place.folder(name) / "metrics.jsonl", 20)
        process.send_signal(number)
        screen = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == (143 if number == signal.SIGTERM else -9), screen
    if number == signal.SIGTERM:
        assert "\nresume   python train_fabric.py fit --resume" in screen
        at = torch.load(place.folder(name) / "checkpoints" / "last.ckpt", weights_only=True)[
            "loop"
        ]["at"]
        assert at[2] > at[0] * (19 if ranks == 1 else 9)  # within an epoch
    last = at[0] + 2 if number == signal.SIGTERM else 8
    time.sleep(1)  # until another rank is gone too
    place(name, f"train_fabric.py --resume {name} --trainer.max_epochs {last}")
    place(f"{name}-whole", f"{line} --trainer.max_epochs {last}")
    texts = [(place.folder(run) / "metrics.csv").read_text() for run in (name, f"{name}-whole")]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_the_commands_of_the_page_work(place: Place) -> None:
    lines = command_lines((place.project / "docs" / "fabric.md").read_text())
    assert len(lines) == 4
    for number, line in enumerate(lines):
        run = {2: "page-0"}.get(number, f"page-{number}")
        words = line.removeprefix("python ").replace("RUN", "page-0")
        short = " --trainer.max_epochs 1" if number < 2 else ""
        assert f"runs/{run}" in place(run, words + short)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def sent(request: pytest.FixtureRequest, place: Place) -> Iterator[tuple[WandbServer, str, Place]]:
    """A run that is sent as it trains, and resumed once."""
    with WandbServer() as server:
        run = f"sent-{request.param}"
        line = "train_fabric.py --config configs/fabric.yaml --trainer.accelerator cpu "
        line += "--trainer.logger.log_model all "
        place(
            run, f"{line}--trainer.max_epochs 2 --trainer.devices {request.param}", env=server.env()
        )
        place(run, f"train_fabric.py --resume {run} --trainer.max_epochs 4", env=server.env())
        yield server, run, place


def test_wandb_has_the_record_that_it_has_of_a_trainer(
    sent: tuple[WandbServer, str, Place],
) -> None:
    server, name, place = sent
    run = server.runs[name]
    assert (run.state, run.exit_code, run.job_type) == ("finished", 0, "fit")
    saved = yaml.safe_load((place.folder(name) / "config.yaml").read_text())
    about = dict(run.config)
    assert about.pop("run")["command"].startswith("train_fabric.py fit --resume")
    about.pop("ckpt_path")
    assert about == saved
    assert all("trainer/global_step" in row for row in run.history)
    rows = {row["trainer/global_step"]: row["val/acc"] for row in run.history if "val/acc" in row}
    assert rows == pytest.approx(place.values(name, "val/acc"))
    assert len(rows) == 4
    assert run.summary["best/val/acc"] == pytest.approx(max(rows.values()))
    assert run.metrics["val/acc"].summary == ["max"]
    assert run.metrics["val/acc"].step == "trainer/global_step"


def test_checkpoints_are_versions_with_their_aliases(
    sent: tuple[WandbServer, str, Place], tmp_path: Path
) -> None:
    server, name, place = sent
    members = server.collections[f"model-{name}"].members
    (best,), (latest,) = (
        [one for one in members if alias in one.aliases] for alias in ("best", "latest")
    )
    rows = place.values(name, "val/acc")
    assert best.artifact.metadata["score"] == pytest.approx(max(rows.values()))
    assert latest.artifact.metadata["step"] == max(rows) + 1
    (tmp_path / "model.ckpt").write_bytes(best.artifact.files["model.ckpt"])
    assert "state_dict" in torch.load(tmp_path / "model.ckpt", weights_only=True)


def test_the_loop_is_at_most_150_lines_and_names_no_plumbing(place: Place) -> None:
    text = (place.project / "train_fabric.py").read_text()
    assert len(text.splitlines()) <= 150
    assert not re.search("wandb|os\\.environ|RUNS", text.partition('"""')[2].partition('"""')[2])
