"""What the screen shows while a run trains: in a terminal, in a file, with many values, resumed."""

import importlib
import inspect
import io
import logging
import mmap
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyte
import pytest
import torch
from bakery import environment, in_terminal
from command import Commands
from conftest import Bake
from lightning.pytorch.accelerators import cuda
from lightning.pytorch.callbacks import Timer

MANY = """
import os, signal, time, warnings
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader


class Many(LightningModule):
    def __init__(self, metrics: int = 3, signal_at: int = -1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 4)

    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        if self.global_step == 30:
            warnings.warn("a warning in the middle")
        if self.global_step == self.hparams.signal_at:
            os.kill(os.getpid(), signal.SIGINT)
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        time.sleep(0.02)
        self.log("val/acc", 1 - self.layer(batch).square().mean())
        for number in range(self.hparams.metrics):
            self.log(f"val/metric_{number}", self.layer(batch).mean() * 10**number)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self):
        return DataLoader(torch.ones(50, 4))

    def val_dataloader(self):
        return DataLoader(torch.ones(20, 4))
"""
FIT = (
    *("main.py", "fit", "--model", "many.Many", "--trainer.logger", "false"),
    *("--callbacks.summaries", "null"),
)
COLOUR = re.compile(r"\x1b\[[\d;]*m")
BAR = re.compile(
    r"epoch \d/2(, validating \d+/20)? \|(?P<bar>.{8,})\| (\?|\d+)/50"
    r"(  [\d.]+ (it/s|s/it))?(  left \d\d:\d\d(, run \d\d:\d\d)?)?"
)
VALUE = r"[\w/-]+ -?[\d.]+(e[+-]\d+)?"
LINE = re.compile(rf"epoch (\d) +step (\d+) +(best  |      ){VALUE}(  {VALUE})*")
CONTINUED = re.compile(rf"    {VALUE}(  {VALUE})*(  \+(\d+) in metrics.csv)?")


@dataclass(frozen=True)
class Seen:
    """What a terminal was sent, and what its screen showed after each move to a line's start."""

    sent: str
    screens: list[list[str]]

    @property
    def last(self) -> list[str]:
        return self.screens[-1]


Terminal = Callable[..., Seen]


def watched(sent: str, columns: int) -> Seen:
    """Return the screens of a terminal of 40 lines."""
    screen = pyte.Screen(columns, 40)
    stream = pyte.Stream(screen)
    screens = []
    for piece in re.split(r"(?=\r)", sent):
        stream.feed(piece)
        screens.append([row.rstrip() for row in screen.display if row.strip()])
    return Seen(sent, screens)


@pytest.fixture(scope="module")
def terminal(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    """Runs a command in a terminal of this width; each once."""
    project = bake(tmp_path_factory.mktemp("terminal"))
    (project / "many.py").write_text(MANY)
    seen: dict[Any, Seen] = {}

    def run(*words: str, columns: int = 80, code: int = 0, **variables: str) -> Seen:
        key = (words, columns, *variables.items())
        if key not in seen:
            environ = environment(tmp_path_factory.mktemp("e")) | {"TERM": "xterm", "NO_COLOR": ""}
            environ |= variables
            screen = in_terminal(words, project, environ, columns, code=code)
            seen[key] = watched(screen, columns)
        return seen[key]

    return run


@pytest.fixture(params=[(80, 15), (100, 3)], ids=["80 columns, 15 metrics", "100 columns, 3"])
def training(request: pytest.FixtureRequest, terminal: Terminal) -> tuple[Seen, int, int]:
    """A training of two epochs, the terminal's width, and the number of its metrics."""
    columns, metrics = request.param
    variables = {"NO_COLOR": "1"} if columns == 100 else {}
    words = (*FIT, "--trainer.max_epochs", "2", "--model.metrics", str(metrics))
    return terminal(*words, columns=columns, **variables), columns, metrics + 3


def test_one_bar_has_epoch_steps_speed_and_time_left(training: tuple[Seen, int, int]) -> None:
    seen, columns, _ = training
    bars = [[row for row in screen if "|" in row] for screen in seen.screens]
    assert all(len(rows) <= 1 for rows in bars)
    drawn = [row for rows in bars for row in rows if not row.startswith("Sanity ")]
    for row in drawn:
        assert BAR.fullmatch(row), row
        assert len(row) < columns
    assert any(row.startswith("epoch 1/2, validating ") for row in drawn)
    assert any(re.search(r"it/s  left \d\d:\d\d, run \d\d:\d\d$", row) for row in drawn)
    assert not any("|" in row for row in seen.last)


def test_a_validation_alone_has_a_bar_too(terminal: Terminal) -> None:
    assert terminal(*FIT, "--trainer.max_epochs", "1", "--run_id", "shown").last
    seen = terminal("main.py", "validate", "--ckpt_path", "shown", "--trainer.logger", "false")
    bars = [row for screen in seen.screens for row in screen if "|" in row]
    assert any(re.search(r"\| 20/20  .*took 00:0", row) for row in bars), seen.last
    assert any("val/acc" in row for row in seen.last)


def test_a_line_for_each_epoch_stays_with_whole_values(training: tuple[Seen, int, int]) -> None:
    seen, columns, metrics = training
    at = [number for number, row in enumerate(seen.last) if row.startswith("epoch ")]
    found = [LINE.fullmatch(seen.last[number]) for number in at]
    assert [line and line.group(1, 2) for line in found] == [("0", "50"), ("1", "100")]
    for number in at:
        first, second = seen.last[number : number + 2]
        assert " best  val/acc " in first  # the one that decides
        more = CONTINUED.fullmatch(second)
        assert more, second
        values, _, rest = "  ".join((first.partition("best")[2], second)).partition("  +")
        hidden = int(rest.partition(" ")[0] or 0)
        assert len(re.findall(VALUE, values)) + hidden == metrics
        assert max(map(len, (first, second))) <= columns


def test_colours_are_for_terminals_whose_user_wants_them(
    training: tuple[Seen, int, int],
) -> None:
    seen, columns, _ = training
    assert bool(COLOUR.search(seen.sent)) == (columns == 80)
    assert ("\x1b[1;32mbest\x1b[0m" in seen.sent) == (columns == 80)


def test_what_is_loaded_is_said_first_and_does_not_stay(training: tuple[Seen, int, int]) -> None:
    seen, *_ = training
    assert seen.screens[0] == ["loading  torch, lightning"]
    run = next(screen for screen in seen.screens if any(row.startswith("run ") for row in screen))
    assert not any("loading" in row for row in run)


def test_warnings_stand_above_the_bar(training: tuple[Seen, int, int]) -> None:
    seen, *_ = training
    (first,) = [number for number, row in enumerate(seen.last) if "/many.py:" in row]
    assert seen.last[first].startswith("/")
    assert "a warning in the middle" in "".join(seen.last[first : first + 3])


def test_a_signal_leaves_no_part_of_the_bar(terminal: Terminal) -> None:
    seen = terminal(*FIT, "--model.signal_at", "40", "--trainer.max_epochs", "9", code=130)
    said = "stopping after this batch; press Ctrl-C again to stop now"
    assert seen.last[-3:-1] == [said, "stopped  by SIGINT"]
    assert re.fullmatch(r"resume   python main\.py fit --resume runs/\S+", seen.last[-1])
    assert not any("|" in row for row in seen.last)


def test_an_error_stands_in_the_place_of_what_is_loading(terminal: Terminal) -> None:
    seen = terminal("main.py", "fit", "--model", "many.Manx", code=2)
    assert seen.last[0].startswith("error: --model: no class many.Manx")


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_is_loaded_is_said_by_the_first_rank_before_torch_is_imported(
    variable: str, rank: str, terminal: Terminal
) -> None:
    code = "import my_project.engine, sys; print(my_project.engine.command(['fit']), *sys.modules)"
    seen = terminal("-c", code, **{variable: rank})
    assert seen.sent.startswith("\x1b[1;36mloading") == (rank == "0")
    assert " torch" not in seen.sent.replace("loading  torch", "")


def fit(command: Commands, words: str) -> list[str]:
    outcome = command(f"fit {words} --trainer.logger false")
    assert outcome.code == 0, outcome
    return [row for row in outcome.out.splitlines() if row.startswith("epoch ")]


def test_a_file_has_a_line_for_each_epoch_and_which_is_best_also_when_resumed(
    command: Commands,
) -> None:
    words = "--config @digits --trainer.limit_train_batches 4 --run_id marks"
    rows = fit(command, f"{words} --trainer.max_epochs 4 --trainer.check_val_every_n_epoch 2")
    rows += fit(command, "--resume marks --trainer.max_epochs 8")
    assert [row.split()[:4] for row in rows] == [
        ["epoch", str(epoch), "step", str(4 * epoch + 4)] for epoch in range(8)
    ]
    best = 0.0
    for number, row in enumerate(rows):
        value = re.search(r"val/acc ([\d.]+)", row)
        assert bool(value) == (number % 2 == 1), row  # no old value where there was no validation
        better = value is not None and float(value[1]) > best
        assert row.endswith("  best") == better, row
        best = max(best, float(value[1])) if value else best
    assert "best" in rows[1]


def test_validations_within_an_epoch_have_their_lines(command: Commands) -> None:
    words = "--config @digits --trainer.limit_train_batches 4 --trainer.max_epochs 2"
    rows = fit(command, f"{words} --trainer.val_check_interval 2")
    assert [row.split()[3] for row in rows] == ["2", "4", "6", "8"]
    assert rows[0].endswith("best")
    (row,) = fit(command, f"{words} --trainer.max_epochs 1 --trainer.limit_val_batches 0")
    assert row.split()[:4] == ["epoch", "0", "step", "4"]


@pytest.fixture
def progress(command: Commands) -> Any:
    return importlib.import_module("odd_duck.engine.progress")


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_five_times_a_second_at_most(
    progress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    with progress.Bar(lambda values: ("bar", [f"{values['n']}"]), total=1000) as bar:
        for _ in range(1000):
            now[0] += 0.001
            bar.n += 1
            bar.refresh()
        drawn = screen.getvalue().count("bar |")
    assert 4 <= drawn <= 6


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
@pytest.mark.parametrize("total", [None, 10, 1_000_000])
def test_a_bar_fits_any_width(
    columns: int, total: int | None, progress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setenv("NO_COLOR", "1")
    values = {"n": 7, "total": total, "initial": 0, "rate": 123.4, "elapsed": 1.0}
    tails = progress.tails(values, 123.4, ["left 100:00:00, run 1000:00:00", "left 100:00:00"])
    with progress.Bar(lambda _: ("epoch 100/1000", tails), total=total) as bar:
        bar.dynamic_ncols = lambda _: (columns, 24)
        text = str(bar)
    assert len(text) <= columns - 2
    assert text.startswith("epoch 100/1000 |")
    assert text.endswith("run 1000:00:00" if columns > 60 else ("00:00", f"7/{total or '?'}"))


@pytest.mark.parametrize(("columns", "longest"), [(-1, 78), (0, 78), (1, 8), (12, 10)])
def test_a_bar_is_drawn_where_a_terminal_has_no_width(
    columns: int, longest: int, progress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setenv("NO_COLOR", "1")
    with progress.Bar(lambda _: ("epoch 1/10", ["7/10", ""]), total=10) as bar:
        bar.dynamic_ncols = lambda _: (columns, 24)
        assert 0 < len(str(bar)) <= longest


@pytest.mark.parametrize(
    ("limits", "total", "expected"),
    [
        ({"max_epochs": 4}, 100, (8, 28)),  # ten batches a second
        ({"max_epochs": -1}, 100, (8, None)),
        ({"max_epochs": 4}, None, (None, None)),
        ({"max_epochs": -1, "max_steps": 160}, 100, (8, 12)),
        ({"max_epochs": -1, "max_steps": 160}, None, (None, 12)),
        ({"max_epochs": 4, "max_steps": 50}, 100, (1, 1)),
        ({"max_epochs": -1, "max_time": 60}, None, (None, 60)),
        ({"max_epochs": 4, "max_time": 5}, 100, (5, 5)),
    ],
)
def test_the_time_left_is_that_of_the_nearest_limit(
    limits: dict[str, int], total: int | None, expected: tuple[Any, Any], progress: Any
) -> None:
    bar = progress.TrainingBar()
    timer = Timer(duration={"seconds": limits.pop("max_time", 10**9)})
    callbacks = [timer] if (timer.time_remaining() or 0) < 10**6 else []
    trainer: dict[str, Any] = {"max_steps": -1, "current_epoch": 1, "global_step": 40}
    trainer |= {"accumulate_grad_batches": 1, "callbacks": callbacks, **limits}
    bar._trainer = SimpleNamespace(**trainer)
    assert bar.seconds_left(20, total, 10.0) == pytest.approx(expected)


def test_messages_about_gpus_that_a_reader_cannot_act_on_are_left_out(
    command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When this fails, a library has changed: take its entry out of engine/session.py's tables."""
    about_gpus = "CUDA_VISIBLE_DEVICES: [%s]"
    assert "CUDA_VISIBLE_DEVICES: [" in inspect.getsource(cuda), about_gpus
    stream = "The AccumulateGrad node's stream does not match the stream of the node that produced"
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        assert text.find(stream.encode()) > 0
    logger = logging.getLogger("lightning.pytorch.accelerators.cuda")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    session = importlib.import_module("odd_duck.engine.session")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        session.silence_libraries()
        warnings.warn(stream, stacklevel=1)
    assert not caught
    assert not logger.isEnabledFor(logging.INFO)


def test_a_line_of_very_many_values_is_found_in_few_trials(
    progress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials of all counts of values, from all of them down, took seconds in each epoch."""
    tried: list[int] = []

    def counted(*args: int) -> Iterator[int]:
        for number in range(*args):
            tried.append(number)
            yield number

    monkeypatch.setattr(progress, "range", counted, raising=False)
    lines = progress.fitted([f"val/metric_{number} 0.1" for number in range(10_000)], 20, 80)
    assert len(tried) < 50
    assert lines[1].endswith("in metrics.csv")
    assert all(len(line) <= 80 for line in lines)
    shortest = progress.fitted([f"{number % 10} 1" for number in range(1_000)], 20, 80)
    assert [len(line) > 50 for line in shortest] == [True, True]  # none more would fit
