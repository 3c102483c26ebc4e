"""The main job as a person does it: `python main.py fit`; its screen, files and record in W&B."""

import csv
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from bakery import FOREIGN
from conftest import Bake
from wandb_record import Recorded, recorded

Person = Callable[..., str]

# What W&B's first line offers.
HINTS = r"see      wandb leet .+\nsend     python .+ sync .+"
SCREEN = rf"""
run      .+
model    Classifier, 21,386 parameters
device   CPU
W&B      offline \(no key; to log in: wandb login\)
{HINTS}
(epoch \d+ +step \d+ +lr-AdamW 0.002  train/loss \S+  val/acc \S+  val/loss \S+(  best)?
)+(stopped  after epoch \d+: val/acc no longer gets better
)?best     val/acc \S+  val/loss \S+  epoch \d+
W&B      .+
saved    .+\.ckpt.?
test     python .*main.py'? test --ckpt_path \S+
"""


@pytest.fixture(scope="module")
def person(tmp_path_factory: pytest.TempPathFactory) -> Person:
    """Type a command, in a home without earlier runs, and read the screen."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
    environment = kept | {"HOME": str(home), "WANDB_BASE_URL": "http://127.0.0.1:9"}

    def types(*words: str | Path, cwd: Path) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return types


@dataclass(frozen=True)
class Trained:
    """The project of a person, its only run, and what was on the screen."""

    project: Path
    folder: Path
    screen: str
    record: Recorded

    @property
    def rows(self) -> list[dict[str, Any]]:
        with (self.folder / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    def values(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows if row[name]]


@pytest.fixture(scope="module")
def trained(bake: Bake, tmp_path_factory: pytest.TempPathFactory, person: Person) -> Trained:
    """The example, in a project under an odd name, from another folder with a space in its name."""
    away = tmp_path_factory.mktemp("some where")
    project = bake(
        away, project_name="Émile's 3rd “Ente”", package_name="ente3", wandb_project='a "b" {c}'
    )
    screen = person(
        project / "main.py", "fit", "--config", project / "configs" / "digits.yaml", cwd=away
    )
    (folder,) = (project / "runs").iterdir()
    return Trained(project, folder, screen, recorded(folder))


def test_every_line_on_the_screen_is_ours(trained: Trained) -> None:
    assert re.fullmatch(SCREEN.lstrip(), trained.screen), trained.screen


def test_the_printed_command_tests_the_best_checkpoint_to_the_promised_accuracy(
    trained: Trained, person: Person
) -> None:
    python, *words = shlex.split(trained.screen.splitlines()[-1])[1:]
    assert python == "python"
    screen = person(*words, cwd=trained.project.parent)  # where it was typed
    (accuracy,) = re.findall(r"test/acc\W+([\d.]+)", screen)
    assert float(accuracy) >= 0.97
    assert "arn" not in screen


def test_a_run_is_one_folder(trained: Trained) -> None:
    assert sorted(path.name for path in trained.folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "metrics.jsonl",
        "run.json",
        "wandb",
    ]
    best, last = sorted(path.name for path in (trained.folder / "checkpoints").iterdir())
    assert re.fullmatch(r"epoch-\d{3}-step-\d{6}\.ckpt", best)
    assert last == "last.ckpt"
    assert best in trained.screen


def test_the_metrics_file_has_every_value_in_columns_as_lightning_names_them(
    trained: Trained,
) -> None:
    assert list(trained.rows[0])[:2] == ["step", "epoch"]
    assert len(trained.values("val/acc")) == trained.screen.count("val/loss") - 1 == 20
    assert len(trained.values("train/loss")) == 20 * 19 // 5


def test_wandb_has_the_whole_configuration_nested_and_once(trained: Trained) -> None:
    config = {
        key: value for key, value in trained.record.config.items() if key not in ("_wandb", "run")
    }
    assert config == yaml.safe_load((trained.folder / "config.yaml").read_text())
    options = {"seed_everything", "test_after_fit", "weights_only", "predictions"}
    options |= {"compile", "matmul_precision", "monitor", "mode", "optimizer", "lr_scheduler"}
    assert set(config) == {"trainer", "model", "data", "callbacks", *options}
    assert config["model"]["init_args"]["lr"] == 0.002
    assert config["trainer"]["logger"]["init_args"]["project"] == 'a "b" {c}'


def test_wandb_knows_the_run_by_the_name_of_its_folder(trained: Trained) -> None:
    assert trained.record.id == trained.folder.name
    assert re.match("[a-z].*-", trained.record.id)  # else YAML may read it as a number
    assert (trained.record.project, trained.record.job_type) == ('a "b" {c}', "fit")
    assert trained.record.exit_code == 0


def test_every_row_in_wandb_carries_the_step_of_the_trainer(trained: Trained) -> None:
    assert len(trained.record.history) == len(trained.rows)
    assert all("trainer/global_step" in row for row in trained.record.history)
    assert [row["val/acc"] for row in trained.record.history if "val/acc" in row] == trained.values(
        "val/acc"
    )


@pytest.mark.parametrize(("name", "goal"), [("val/acc", "max"), ("val/loss", "min")])
def test_wandb_summarizes_by_the_best_value_over_the_step_of_the_trainer(
    name: str, goal: str, trained: Trained
) -> None:
    metric = trained.record.metrics[name]
    assert [kind for kind in ("min", "max", "last", "none") if getattr(metric.summary, kind)] == [
        goal
    ]
    assert (metric.step_metric, metric.options.step_sync) == ("trainer/global_step", True)


def test_the_best_validation_stands_in_wandbs_summary(trained: Trained) -> None:
    summary, accuracies = trained.record.summary, trained.values("val/acc")
    best = accuracies.index(max(accuracies))
    assert summary["best/val/acc"] == max(accuracies)
    assert summary["best/val/loss"] == trained.values("val/loss")[best]
    assert summary["best/epoch"] == best
    assert f"epoch {best}" in trained.screen.partition("best  ")[2]


def test_nothing_lies_in_the_home_or_where_the_person_stood(
    trained: Trained, person: Person
) -> None:
    assert os.listdir(trained.project.parent) == [trained.project.name]
    home = Path(
        person("-c", "from pathlib import Path; print(Path.home())", cwd=trained.project).strip()
    )
    assert [path for path in home.rglob("*") if path.is_file() and ".cache" not in path.parts] == []


def test_two_devices_train_by_ddp_in_one_run(trained: Trained, person: Person) -> None:
    runs = trained.project / "runs"
    before = set(runs.iterdir())
    line = (
        "main.py fit --config configs/digits.yaml --trainer.accelerator cpu --trainer.devices 2"
        " --trainer.max_epochs 2 --test_after_fit true"
    )
    screen = person(*line.split(), cwd=trained.project)
    (folder,) = set(runs.iterdir()) - before
    assert "Initializing" not in screen
    assert "device   2 x CPU; --trainer.devices 1 for one" in screen
    assert screen.count("\nrun ") + screen.startswith("run ") == 1
    record = recorded(folder)
    assert record.config["trainer"]["devices"] == "2"
    assert "\nbatch    128 samples a step, 2 batches of 64\n" in screen
    assert record.config["run"]["batch_size"] == 128
    # Of `--test_after_fit`, in the same run.
    assert sum("test/acc" in row for row in record.history) == 1
    assert (folder / "checkpoints" / "last.ckpt").exists()


SILENCED = """
import os, sys, warnings
from pathlib import Path
os.environ["PATH"] += os.pathsep + str(Path("bin").absolute())
Path("bin").mkdir()
Path("bin/srun").touch(0o755)
os.sched_getaffinity = lambda pid: set(range(16))  # enough cores for Lightning to ask for workers
from main import main
from ente3.engine import session
session.silence_libraries = lambda: warnings.simplefilter("always")
fit = ["fit", "--config", "configs/digits.yaml", "--trainer.logger", "false"]
fit += ["--trainer.max_epochs", "1"]
main(fit)
main([*fit, "--trainer.barebones", "true"])
main(["test", "--ckpt_path", sys.argv[1], "--trainer.logger", "false"])
resumed = ["fit", "--resume", sys.argv[1], "--trainer.limit_train_batches", "1"]
main([*resumed, "--trainer.max_epochs", "21"])
main([*fit[:-1], "22", "--ckpt_path", sys.argv[1] + ":last", "--trainer.limit_train_batches", "1"])
os.environ["WANDB_RUN_ID"] = "within-an-epoch"
main([*fit, "--trainer.val_check_interval", "12"])
del os.environ["WANDB_RUN_ID"]
main(["fit", "--ckpt_path", "within-an-epoch"])
try:
    main([*fit, "--ckpt_path", "best"])
except SystemExit:  # there is none
    pass
"""


def test_each_silenced_message_would_still_be_shown(trained: Trained, person: Person) -> None:
    """When this fails, a library has changed: take its entry out of engine/session.py's tables."""
    screen = person("-c", SILENCED, trained.folder.name, cwd=trained.project)
    for message in (
        "`isinstance(treespec, LeafSpec)` is deprecated",
        "You are trying to `self.log()` but `Trainer(barebones=True)`",
        "Be aware that when using `ckpt_path`, callbacks used",
        "does not have many workers",
        "You're resuming from a checkpoint that ended before the epoch ended",
        "The dirpath has changed",
        "exists and is not empty",
        "The `srun` command is available",
        "Tip: For seamless cloud logging",
        "Seed set to 42",
    ):
        assert message in screen, f"nobody says {message!r} any more"
