"""`main.py runs`, from folders alone: the list, one run, a comparison, a picture, removing."""

import csv
import importlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bakery import environment, in_terminal
from command import Commands, Outcome
from filelock import FileLock
from matplotlib import image

FIT = (
    "fit --config @digits --trainer.limit_train_batches 4 --trainer.log_every_n_steps 2"
    " --trainer.logger false"
)


@pytest.fixture(scope="module")
def runs(command: Commands, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The command line, with a folder of runs that are told apart by their learning rates."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv("RUNS_ROOT", str(root))
        command = replace(command, runs=root)
        for line in (
            f"{FIT} --run_id good --trainer.max_epochs 2 --model.lr 0.0001",
            f"{FIT} --run_id better --trainer.max_epochs 2 --model.lr 0.01",
            "test --ckpt_path good --run_id tested --trainer.logger false",
            f"{FIT} --run_id no-score --trainer.max_epochs 1 --monitor null"
            " --callbacks.summaries null",
        ):
            outcome = command(line)
            assert (outcome.code, outcome.err) == (0, ""), outcome
        yield command


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text()))


def cells(outcome: Outcome) -> list[list[str]]:
    """The cells of a printed table, the header first."""
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return [re.split(r"\s{2,}", line.strip()) for line in outcome.out.splitlines()]


def test_the_best_is_first_and_evaluations_stand_below_the_run_that_they_evaluate(
    runs: Commands,
) -> None:
    outcome = runs("runs")
    header, *rows = cells(outcome)
    assert header == ["run", "state", "epoch", "val/acc", "age", "size", "options"]
    assert [row[0] for row in rows] == ["better", "good", "tested", "no-score"]
    better = record(runs.runs / "better")
    assert rows[0][1:4] == ["finished", "2/2", f"{better['best']['val/acc']:.4g}"]
    assert better["best"]["val/acc"] > record(runs.runs / "good")["best"]["val/acc"]
    tested = outcome.out.splitlines()[3]
    assert tested.startswith("  tested")
    values = record(runs.runs / "tested")["metrics"]
    assert f"test  test/acc={values['test/acc']:.4g}  test/loss=" in re.sub("  +", "  ", tested)


def test_options_that_all_runs_share_are_left_out(runs: Commands) -> None:
    lines = runs("runs").out.splitlines()
    assert re.search(r"  lr=0.01  max_epochs=2 *$", lines[1])
    assert "limit_train_batches" not in "".join(lines)
    assert "lr=0.0001" in lines[2]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--filter lr=0.0001", ["good", "tested"]),
        ("--filter model.lr<0.005 --filter verb=fit", ["good", "no-score"]),
        ("--filter model.lr!=0.01 --filter verb=fit", ["good", "no-score"]),
        ("--filter best>0", ["better", "good"]),
        ("--filter verb=te*", ["tested"]),
        ("--filter state=failed", []),
        ("--sort lr --filter verb=fit", ["good", "no-score", "better"]),
        ("--sort lr --reverse --filter verb=fit", ["better", "no-score", "good"]),
        ("--sort val/loss --filter best>0", ["better", "good"]),
        ("--sort run", ["better", "good", "no-score", "tested"]),
    ],
)
def test_the_list_is_filtered_and_sorted(flags: str, expected: list[str], runs: Commands) -> None:
    outcome = runs(f"runs --columns run {flags}")
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines == ["no runs that match"] if not expected else lines[0].strip() == "run"
    assert [line.strip() for line in lines[1:]] == expected


@pytest.mark.parametrize(
    ("columns", "expected"), [(58, ()), (68, ("age",)), (200, ("age", "size"))]
)
def test_a_narrow_terminal_has_fewer_columns_and_whole_options(
    columns: int, expected: tuple[str, ...], runs: Commands, tmp_path: Path
) -> None:
    env = environment(tmp_path / "e") | {"RUNS_ROOT": str(runs.runs), "NO_COLOR": "1"}
    env.pop("COLUMNS", None)  # pytest-xdist sets it
    screen = in_terminal(("main.py", "runs"), runs.project, env, columns)
    lines = re.sub(r"\x1b\[[\d;]*m", "", screen).splitlines()
    assert max(map(len, lines)) <= columns
    header = lines[0].split()
    assert header == ["run", "state", "epoch", "val/acc", *expected, "options"]
    assert any("lr=0.01" in line for line in lines)


def test_what_wandb_lacks_is_in_the_list(copied: Commands) -> None:
    unsent(copied.runs / "good")
    header, *rows = cells(copied("runs"))
    assert header[6] == "wandb"
    assert [row[0] for row in rows if "unsent" in row] == ["good"]


def unsent(folder: Path) -> Path:
    """Make a run one that W&B has not got."""
    log = folder / "wandb" / f"offline-run-1-{folder.name}" / f"run-{folder.name}.wandb"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"")
    return log


def test_columns_are_metrics_and_options_too(runs: Commands) -> None:
    header, first, *_ = cells(runs("runs --columns run,lr,val/loss,duration,monitor"))
    assert header == ["run", "model.lr", "val/loss", "duration", "monitor"]
    loss = record(runs.runs / "better")["best"]["val/loss"]
    assert first[:3] == ["better", "0.01", f"{loss:.4g}"]
    assert first[4] == "val/acc"


def test_json_and_csv_have_the_values_as_numbers(runs: Commands) -> None:
    listed = json.loads(runs("runs --json").out)
    assert [one["run"] for one in listed] == ["better", "good", "tested", "no-score"]
    better, good, tested, none = listed
    assert better["best"] == record(runs.runs / "better")["best"]["val/acc"]
    assert better["options"]["model.lr"] == 0.01
    assert (tested["evaluates"], good["evaluates"], none["best"]) == ("good", None, None)
    assert good["size"] == sum(
        file.stat().st_size for file in (runs.runs / "good").rglob("*") if file.is_file()
    )
    rows = list(csv.DictReader(io.StringIO(runs("runs --csv").out)))
    assert [row["model.lr"] for row in rows[:2]] == ["0.01", "0.0001"]
    assert float(rows[0]["best"]) == better["best"]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("runs lst", "runs: expected list, show, diff, rm, plot, got lst; did you mean list?"),
        ("runs --sort model.lrr", "runs --sort: expected run, verb, .*; did you mean model.lr?"),
        ("runs --columns run,epocs", "runs --columns: .*; got epocs; did you mean epoch?"),
        ("runs --filter stat=x", "runs --filter: .*; got stat; did you mean state?"),
        ("runs --filter val/acc", "runs --filter: expected such as val/acc>0.9, .*; got val/acc"),
        ("runs --filter 'best>high'", "runs --filter: expected a number after >; got best>high"),
        ("runs --filter class_path=x", r"runs --filter: expected .*; got class_path.*"),
        ("runs --sort save_top_k --no", "runs: unrecognized arguments: --no"),
        ("runs show", "runs show: the following arguments are required: RUN"),
        ("runs show goode", "runs: expected a run, got goode; did you mean good?"),
        ("runs diff good", "runs diff: expected two runs or more, got one"),
        ("runs diff good good", "runs diff: expected two runs or more, got one"),
        ("runs plot good --metric val/los", "runs plot: none .* val/los; did you mean val/loss?"),
        ("runs plot no-score", "runs plot: expected --metric NAME; these runs have no monitor"),
        ("runs plot good --output x.doc", "runs plot --output: expected a file with .*; got x.doc"),
        ("runs plot good --output no/x.png", "runs plot --output: no/x.png: No such file or .*"),
        ("run", "expected a subcommand .*, got run; did you mean runs?"),
    ],
)
def test_a_mistake_is_one_line(
    line: str, error: str, runs: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = runs(line)
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert re.fullmatch(f"error: {error}\n".replace("?", r"\?"), outcome.err), outcome.err
    assert not list(tmp_path.iterdir())


def test_a_run_is_shown_with_its_evaluations_and_checkpoints(runs: Commands) -> None:
    outcome = runs("runs show good")
    lines = [line.split(None, 1) for line in outcome.out.splitlines()]
    shown = dict(line for line in lines if len(line) == 2)
    best = record(runs.runs / "good")["best"]
    assert shown["state"] == "fit finished"
    assert shown["command"].endswith("--model.lr 0.0001")
    assert shown["epoch"] == "2/2, step 8"
    assert f"val/acc={best['val/acc']:.4g}" in shown["best"]
    assert "model.lr=0.0001" in shown["options"]
    saved = [text for name, text in lines if name == "saved"]
    assert {Path(text.split()[0]).name for text in saved} == {
        file.name for file in (runs.runs / "good" / "checkpoints").iterdir()
    }
    assert shown["test"].startswith("tested  test/acc=")


def test_what_differs_between_runs_is_shown_by_option(runs: Commands) -> None:
    header, *rows = cells(runs("runs diff good better"))
    assert header == ["good", "better"]
    differing = {row[0]: row[1:] for row in rows}
    best = [record(runs.runs / run)["best"] for run in ("good", "better")]
    assert differing.pop("model.lr") == ["0.0001", "0.01"]
    assert differing["best val/loss"] == [f"{one['val/loss']:.4g}" for one in best]
    assert {name.split()[0] for name in differing} == {"state", "epoch", "best"}


def test_metrics_are_drawn_into_a_picture(runs: Commands, tmp_path: Path) -> None:
    picture = tmp_path / "losses.png"
    line = f"runs plot good better --metric val/loss --metric val/acc --output {picture}"
    outcome = runs(line)
    assert outcome.code == 0, outcome
    assert outcome.out.endswith("losses.png\n")
    pixels = image.imread(picture)[..., :3]
    height, width = pixels.shape[:2]
    assert (width, height) == (1200, 1050)
    for half in (pixels[: height // 2], pixels[height // 2 :]):  # matplotlib's first two colours
        for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
            near = abs(half - [part / 255 for part in colour]).max(axis=-1) < 0.02
            assert near.sum() > 300


@pytest.fixture
def copied(runs: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """The same runs in a folder of this test."""
    root = tmp_path / "runs"
    shutil.copytree(runs.runs, root)
    monkeypatch.setenv("RUNS_ROOT", str(root))
    return replace(runs, runs=root)


def answered(words: list[str], answer: str, cwd: Path, env: dict[str, str]) -> tuple[int, str]:
    """Run a command in a terminal, and type an answer; return its exit code and the screen."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(words, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, f"{answer}\n".encode())
    screen = b""
    try:
        while piece := os.read(ours, 65536):
            screen += piece
    except OSError:  # on Linux, its end
        pass
    os.close(ours)
    return process.wait(), screen.decode()


@pytest.mark.parametrize(("answer", "left"), [("y", ["better", "no-score"]), ("", None)])
def test_runs_are_removed_after_a_question(
    answer: str, left: list[str] | None, copied: Commands, tmp_path: Path
) -> None:
    before = sorted(path.name for path in copied.runs.iterdir())
    words = [sys.executable, "main.py", "runs", "rm", "good", "tested"]
    env = environment(tmp_path / "e") | {"RUNS_ROOT": str(copied.runs), "NO_COLOR": "1"}
    code, said = answered(words, answer, copied.project, env)
    assert re.search(r"remove \S*good, \S*tested: 2 runs, \d+\.\d [kM]B\? \[y/N\]", said), said
    assert sorted(path.name for path in copied.runs.iterdir()) == (left or before)
    assert code == (0 if left else 2)
    assert ("removed  2 runs" if left else "error: runs rm: nothing was removed") in said


def test_removing_asks_for_yes_where_there_is_no_terminal(
    copied: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    outcome = copied("runs rm good")
    expected = "error: runs rm: expected --yes where there is no terminal to answer in\n"
    assert (outcome.code, outcome.err) == (2, expected)
    assert copied("runs rm good better --yes").code == 0
    assert sorted(path.name for path in copied.runs.iterdir()) == ["no-score", "tested"]


def test_a_live_run_an_unsent_one_and_what_is_no_run_are_not_removed(copied: Commands) -> None:
    names = sorted(path.name for path in copied.runs.iterdir())
    (copied.runs / "data").mkdir()
    (copied.runs / "link").symlink_to(copied.runs / "better")
    (copied.runs / "code").mkdir()
    (copied.runs / "code" / "config.yaml").write_text("")
    for other in ("data", "link", "code", str(copied.project / "configs")):
        refused = copied(f"runs rm good {other} --yes")
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert "is no folder of a run" in refused.err
    shutil.rmtree(copied.runs / "code")
    (copied.runs / "link").unlink()
    with FileLock(copied.runs / "better" / ".lock"):
        refused = copied("runs rm good better --yes")
        assert "better: a process is at work on it" in refused.err
    unsent(copied.runs / "no-score")
    refused = copied("runs rm good no-score --yes")
    assert re.search("no-score: W&B has not got all of it; .*sync.* --unsent", refused.err)
    assert sorted(path.name for path in copied.runs.iterdir()) == sorted([*names, "data"])
    assert copied("runs rm no-score --yes --unsent").code == 0
    assert not (copied.runs / "no-score").exists()


def test_what_is_no_run_is_not_listed_and_runs_of_older_engines_are(copied: Commands) -> None:
    (copied.runs / "notes.txt").write_text("none")
    (copied.runs / "plots").mkdir()
    (copied.runs / ".removed-x").mkdir()
    (copied.runs / ".removed-x" / "config.yaml").write_text("")
    (copied.runs / "better" / "run.json").unlink()
    (copied.runs / "good" / "run.json").write_text("{")
    states = {row[0]: row[1] for row in cells(copied("runs --columns run,state"))[1:]}
    expected = {"better": "unknown", "good": "unknown", "no-score": "finished"}
    assert states == {**expected, "tested": "finished"}
    for foreign in ('{"began": "2024"}', '{"metrics": null}', '{"options": []}', "[]"):
        (copied.runs / "good" / "run.json").write_text(foreign)
        assert copied("runs").code == 0
        assert copied("runs --csv").code == 0
    assert copied("runs show better").code == 0
    (copied.runs / "no-score" / "config.yaml").unlink()
    assert copied("runs diff better no-score").code == 0


def test_an_empty_folder_and_none_are_no_error(
    runs: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path, tmp_path / "none"):
        outcome = runs(f"runs --runs_root {root}")
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.startswith("no runs in ")


def test_listing_imports_neither_torch_nor_wandb(runs: Commands) -> None:
    heavy = "'torch', 'lightning', 'wandb', 'numpy', 'matplotlib', 'jsonargparse'"
    code = "import sys; from main import main; main(sys.argv[1:])"
    code = f"{code}\nprint({{{heavy}}} & {{*sys.modules}})"
    for line in (["runs"], ["runs", "show", "good"], ["runs", "diff", "good", "better"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *line],
            cwd=runs.project,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.endswith("set()\n"), done.stdout + done.stderr


# The state of a run.


@pytest.mark.parametrize(
    ("number", "state"), [(signal.SIGKILL, "killed"), (signal.SIGTERM, "stopped")]
)
def test_a_run_that_ends_early_is_seen_as_what_it_is(
    number: int, state: str, copied: Commands, tmp_path: Path
) -> None:
    line = f"{FIT} --run_id ends --trainer.max_epochs -1 --callbacks.early_stopping null"
    words = line.replace("@digits", "configs/digits.yaml").split()
    process = subprocess.Popen(
        [sys.executable, "main.py", *words],
        cwd=copied.project,
        env=environment(tmp_path / "e") | {"RUNS_ROOT": str(copied.runs)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: list((copied.runs / "ends").glob("checkpoints/last.ckpt")))
        until(lambda: record(copied.runs / "ends")["epoch"] > 0)
        (row,) = cells(copied("runs --filter run=ends --columns run,state,epoch"))[1:]
        assert row[:2] == ["ends", "training"]
        assert int(row[2]) > 0  # no limit
        refused = copied("runs rm ends --yes")
        assert "a process is at work on it" in refused.err
    finally:
        os.kill(process.pid, number)
        process.wait()
    assert cells(copied("runs --filter run=ends --columns run,state"))[1:] == [["ends", state]]
    shown = copied("runs show ends").out
    assert re.search(r"^resume   python \S*main.py fit --resume \S*ends$", shown, re.MULTILINE)
    last = copied.runs / "ends" / "checkpoints" / "last.ckpt"
    epochs = torch.load(last, weights_only=True)["epoch"] + 2  # run.json may be seconds behind
    resumed = copied(f"fit --resume ends --trainer.max_epochs {epochs}")
    assert resumed.code == 0, resumed
    after = record(copied.runs / "ends")
    assert after["state"] == "finished"
    assert after["command"].startswith("main.py fit --resume ends")
    assert {"model", "trainer.limit_train_batches"} <= set(after["given"])


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            if holds():
                return
        except (OSError, ValueError):  # not there yet
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_name_that_another_run_has_is_refused(copied: Commands) -> None:
    before = (copied.runs / "good" / "checkpoints" / "last.ckpt").read_bytes()
    outcome = copied(f"{FIT} --run_id good --trainer.max_epochs 3")
    problem = (
        r"error: run good has checkpoints already; to resume it: python \S*main.py fit --resume "
    )
    assert (outcome.code, bool(re.match(problem, outcome.err))) == (2, True), outcome
    assert (copied.runs / "good" / "checkpoints" / "last.ckpt").read_bytes() == before
    assert record(copied.runs / "good")["state"] == "finished"
    outcome = copied(f"{FIT} --run_id tested")
    problem = "error: run tested is there already, a test without checkpoints; expected another "
    assert (outcome.code, outcome.err.startswith(problem)) == (2, True), outcome
    assert record(copied.runs / "tested")["verb"] == "test"


def test_a_resumed_run_keeps_what_it_has_reached_also_where_it_fails_at_once(
    fails: Commands,
) -> None:
    before = record(fails.runs / "good")
    assert fails("fit --resume good --trainer.max_epochs 3 --model fails_early.InSetup").code == 1
    after = record(fails.runs / "good")
    assert (after["state"], after["error"]) == ("failed", "ValueError: no data")
    reached = ("best", "epoch", "step", "began", "monitor", "mode")
    assert {name: after[name] for name in reached} == {name: before[name] for name in reached}


FAILS = """
import torch
from lightning.pytorch import LightningModule
from odd_duck.model import Classifier


class InTheFirstBatch(Classifier):
    def training_step(self, batch, batch_idx):
        raise ValueError("no\\nsuch shape")


class InSetup(Classifier):
    def setup(self, stage):
        raise ValueError("no data")


class InOptimizers(Classifier):
    def configure_optimizers(self):
        raise ValueError("no optimizer")


class Writes(Classifier):
    def setup(self, stage):
        open(f"{self.trainer.loggers[-1].save_dir}/notes.txt", "w").close()
        raise ValueError("no data")


class InTheSecondBatch(Classifier):
    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            raise ValueError("no\\nsuch shape")
        return super().training_step(batch, batch_idx)
"""


@pytest.fixture
def fails(copied: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    (tmp_path / "fails_early.py").write_text(FAILS)
    monkeypatch.syspath_prepend(tmp_path)
    return copied


@pytest.mark.parametrize("model", ["InTheFirstBatch", "InSetup", "InOptimizers"])
@pytest.mark.parametrize("flags", ["", "--trainer.logger.offline true"])
def test_a_start_that_fails_leaves_no_folder(model: str, flags: str, fails: Commands) -> None:
    before = sorted(fails.runs.iterdir())
    line = FIT.replace("--trainer.logger false", flags) if flags else FIT
    outcome = fails(f"{line} --model fails_early.{model}")
    assert outcome.code == 1
    assert isinstance(outcome.error, ValueError)
    assert sorted(fails.runs.iterdir()) == before
    assert re.search(r"^removed  \S+: it has nothing to keep$", outcome.out, re.MULTILINE)
    assert "sync" not in outcome.out.partition("removed")[2]


def test_a_start_that_fails_keeps_what_it_did_not_make(fails: Commands) -> None:
    outcome = fails(f"{FIT} --model fails_early.Writes")
    assert outcome.run is not None
    assert (outcome.run / "notes.txt").exists()
    assert record_state(outcome.run) in ("failed", None)
    before = sorted(file.name for file in (fails.runs / "good").iterdir())
    more = "fit --resume good --trainer.max_epochs 3"
    assert fails(f"{more} --model fails_early.InTheFirstBatch").code == 1
    assert before == sorted(file.name for file in (fails.runs / "good").iterdir())
    assert record(fails.runs / "good")["state"] == "failed"


def record_state(folder: Path) -> str | None:
    file = folder / "run.json"
    return str(json.loads(file.read_text())["state"]) if file.exists() else None


def test_a_run_that_fails_says_why_in_its_record(fails: Commands) -> None:
    outcome = fails(f"{FIT} --model fails_early.InTheSecondBatch --run_id fails")
    assert outcome.code == 1
    (row,) = cells(fails("runs --filter state=failed --columns run,state,step,error"))[1:]
    assert row == ["fails", "failed", "1", "ValueError: no"]
    assert "error    ValueError: no\n" in fails("runs show fails").out


def test_an_evaluation_that_joins_a_run_leaves_its_record(copied: Commands) -> None:
    before = record(copied.runs / "good")
    joined = copied("test --ckpt_path good --run_id good --trainer.logger false")
    assert joined.code == 0, joined
    assert record(copied.runs / "good") == before


def test_a_run_of_several_ranks_has_one_record(copied: Commands, tmp_path: Path) -> None:
    line = f"{FIT} --run_id ranks --trainer.max_epochs 1 --trainer.devices 2"
    words = line.replace("@digits", "configs/digits.yaml").split()
    subprocess.run(
        [sys.executable, "main.py", *words, "--trainer.accelerator", "cpu"],
        cwd=copied.project,
        env=environment(tmp_path / "e") | {"RUNS_ROOT": str(copied.runs)},
        capture_output=True,
        check=True,
    )
    made = record(copied.runs / "ranks")
    assert (made["state"], made["epoch"], made["step"]) == ("finished", 1, 4)


def test_what_a_checkpoints_run_brings_is_no_option_of_the_command(copied: Commands) -> None:
    line = "fit --init_from good --model.lr 0.02 --run_id tuned --trainer.logger false"
    assert copied(line).code == 0
    assert record(copied.runs / "tuned")["given"] == ["model.lr", "trainer.logger"]
    assert record(copied.runs / "tuned")["options"]["trainer.max_epochs"] == 2


def test_values_that_are_no_number_come_last(copied: Commands) -> None:
    file = copied.runs / "good" / "run.json"
    text = file.read_text()
    assert '"val/loss": ' in text
    file.write_text(re.sub(r'"val/loss": [\d.]+', '"val/loss": NaN', text))
    listed = cells(copied("runs --sort val/loss --columns run --filter verb=fit"))
    assert [row[0] for row in listed[1:]] == ["better", "no-score", "good"]
    assert json.loads(copied("runs --json").out)[0]["best_metrics"]


SAVES = """
from lightning.pytorch import Callback


class Raises(Callback):
    def on_train_end(self, trainer, pl_module):
        raise ValueError("at the end")
"""


def test_a_spawned_training_that_fails_keeps_its_checkpoints(
    copied: Commands, tmp_path: Path
) -> None:
    (tmp_path / "saves.py").write_text(SAVES)
    line = f"{FIT} --run_id spawned --trainer.max_epochs 1 --trainer.strategy ddp_spawn"
    line += " --trainer.accelerator cpu --trainer.devices 1 --trainer.callbacks+ saves.Raises"
    words = line.replace("@digits", "configs/digits.yaml").split()
    env = environment(tmp_path / "e") | {"RUNS_ROOT": str(copied.runs), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "main.py", *words],
        cwd=copied.project,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert (copied.runs / "spawned" / "checkpoints" / "last.ckpt").exists()
    assert record(copied.runs / "spawned")["state"] == "failed"


def test_ctrl_c_in_the_wait_for_wandb_keeps_a_finished_test(
    copied: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutdown = importlib.import_module("odd_duck.engine.shutdown")
    waits = [True]

    def interrupted(loggers: Any, code: int) -> None:
        if waits.pop() if waits else False:
            raise shutdown.ExitBySignal(signal.SIGINT)

    monkeypatch.setattr(shutdown, "finish_wandb", interrupted)
    outcome = copied("test --ckpt_path good --trainer.logger false")
    assert outcome.code == 130
    assert outcome.run is not None
    assert "test/acc" in (outcome.run / "metrics.csv").read_text()
    assert record(outcome.run)["state"] == "stopped"


@pytest.mark.parametrize(
    ("name", "text", "removed"),
    [
        ("config.yaml", "a: 1", True),
        ("wandb/offline-run-1-x/run-x.wandb", "", True),
        ("metrics.jsonl", '{"_row": 0, "_stage": "fit", "_step": 0, "lr": 1}\n', True),
        ("metrics.jsonl", '{"_row": 0, "_stage": "fit", "_step": 1, "lr": 1}\n', False),
        ("metrics.jsonl", '{"_row": 0, "_stage": "test", "_step": 0, "acc": 1}\n', False),
        ("checkpoints/last.ckpt", "", False),
        ("uploads/1-best.ckpt", "", False),
        ("error.txt", "", False),
        ("notes.txt", "", False),
    ],
)
def test_a_folder_that_holds_something_is_not_removed(
    name: str, text: str, removed: bool, command: Commands, tmp_path: Path
) -> None:
    run = importlib.import_module("odd_duck.engine.run").Run("x", tmp_path)
    file = run.folder / name
    file.parent.mkdir(parents=True)
    (run.folder / "run.json").write_text("{}")
    file.write_text(text)
    assert run.remove_unused() == removed
    assert run.folder.exists() != removed
