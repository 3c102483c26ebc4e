"""Checkpoints are written beside the training: whole or not there, as they were, in order."""

import csv
import errno
import importlib
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
import types
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bakery import environment
from command import Commands, Outcome
from conftest import Bake
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),  # torch's own use of it
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
]
BRIEF = (
    "fit --config @digits --trainer.max_epochs 2 --trainer.limit_train_batches 6"
    " --trainer.log_every_n_steps 1 --trainer.logger false"
)
LARGE = 1 << 19  # floats: 2 MiB, for which a buffer is kept
Pair = namedtuple("Pair", "first second")


class Marked(Tensor):
    """A plain subclass, as MONAI's MetaTensor is."""


@pytest.fixture
def engine(command: Commands) -> Callable[[str], Any]:
    return lambda name: importlib.import_module(f"odd_duck.engine.{name}")


@pytest.fixture
def io(engine: Callable[[str], Any]) -> Iterator[Any]:
    made = engine("checkpoint_io").BackgroundCheckpointIO()
    yield made
    made.teardown()


def content(
    step: int = 1, fill: float = 1.0, sparse: bool = False, size: int = LARGE
) -> dict[str, Any]:
    """Return what a checkpoint may hold, of every kind of tensor."""
    shared = torch.full((size,), fill)
    state = OrderedDict(
        large=shared,
        part=shared[100:200],
        turned=shared[:6].view(2, 3).T,
        small=torch.arange(5.0) + fill,
        empty=torch.empty(0),
        half=torch.ones(4, dtype=torch.bfloat16),
        quantized=torch.quantize_per_tensor(torch.arange(4.0), 0.1, 2, torch.quint8),
        complex=torch.tensor([1 + 2j]).conj(),
        marked=torch.arange(3.0).as_subclass(Marked),
        parameter=nn.Parameter(torch.ones(3)),
    )
    if sparse:
        state["sparse"] = torch.eye(3).to_sparse()
    state._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    return {
        "state_dict": state,
        "global_step": step,
        "epoch": 0,
        "optimizer_states": [{"momentum": shared, "lr": np.float64(0.1), 3: {"step": 1}}],
        "nested": [(1, "a"), {"b": None}, torch.Size([2, 3]), torch.float32],
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        same_form = one.layout == other.layout and one.dtype == other.dtype
        if one.layout != torch.strided:
            return same_form and torch.equal(one.to_dense(), other.to_dense())
        return same_form and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def read(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_a_file_written_in_the_background_is_what_torch_would_have_written(
    io: Any, tmp_path: Path
) -> None:
    given = content(sparse=True)
    plain = {**given, "optimizer_states": [{**given["optimizer_states"][0], "lr": 0.1}]}
    plain["state_dict"] = given["state_dict"].copy()
    plain["state_dict"]["marked"] = torch.arange(3.0)
    torch.save(plain, tmp_path / "stock.ckpt")
    with io.in_background():
        io.save_checkpoint(given, tmp_path / "ours.ckpt")
    io.finish_writing()
    stock, ours = read(tmp_path / "stock.ckpt"), read(tmp_path / "ours.ckpt")
    assert equal(stock, ours)
    assert ours["state_dict"]._metadata == {"": {"version": 2}}
    large, part = ours["state_dict"]["large"], ours["state_dict"]["part"]
    assert part.untyped_storage().data_ptr() == large.untyped_storage().data_ptr()
    momentum = ours["optimizer_states"][0]["momentum"]
    assert momentum.untyped_storage().data_ptr() == large.untyped_storage().data_ptr()
    sizes = [(tmp_path / name).stat().st_size for name in ("stock.ckpt", "ours.ckpt")]
    assert abs(sizes[0] - sizes[1]) < 5000  # memory that is shared is there once


def test_what_changes_after_a_save_is_not_in_its_file(io: Any, tmp_path: Path) -> None:
    given = content(sparse=True)
    notes: dict[str, Any] = {"list": [1], "array": np.arange(3), "pair": Pair(1, [2])}
    given["notes"] = notes
    with io.in_background():
        io.save_checkpoint(given, tmp_path / "a.ckpt")
    for value in given["state_dict"].values():
        if value.layout == torch.strided and not value.is_quantized and value.numel():
            value.data.fill_(9)
    notes["list"].append(2)
    notes["array"][:] = 9
    notes["pair"].second.append(3)
    io.finish_writing()
    ours = torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert float(ours["state_dict"]["large"].max()) == 1
    assert ours["state_dict"]["small"].tolist() == [1, 2, 3, 4, 5]
    assert ours["notes"]["list"] == [1]
    assert ours["notes"]["array"].tolist() == [0, 1, 2]
    assert ours["notes"]["pair"] == Pair(1, [2])


@pytest.fixture
def slow(engine: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have files written only while the event is set, as on a disk that is busy."""
    writer, free = engine("checkpoint_writer"), threading.Event()
    write = writer.Pieces.write

    def wait_and_write(self: Any, data: Any) -> int:
        while not free.wait(0.01):
            if self.abandoned():
                break
        return int(write(self, data))

    monkeypatch.setattr(writer.Pieces, "write", wait_and_write)
    return free


def test_a_second_save_waits_for_the_first_and_both_are_what_they_were(
    io: Any, slow: threading.Event, tmp_path: Path
) -> None:
    threading.Timer(0.5, slow.set).start()
    began = time.monotonic()
    with io.in_background():
        io.save_checkpoint(content(1, 1.0), tmp_path / "1.ckpt")
        io.begin_writing()
        first = time.monotonic() - began
        io.save_checkpoint(content(2, 2.0), tmp_path / "2.ckpt")
    assert first < 0.4 < time.monotonic() - began
    io.finish_writing()
    for step in (1, 2):
        assert float(read(tmp_path / f"{step}.ckpt")["state_dict"]["large"].min()) == step


def test_buffers_are_kept_so_that_memory_grows_by_one_copy(io: Any, tmp_path: Path) -> None:
    with io.in_background():
        for step in range(4):
            io.save_checkpoint(content(step, float(step)), tmp_path / f"{step}.ckpt")
            io.begin_writing()
    io.settle()
    kept = list(io._host.buffers.values())
    assert [buffer.nbytes for buffer in kept] == [LARGE * 4]


def test_one_step_is_written_once_under_all_its_names(io: Any, tmp_path: Path) -> None:
    best, last, old = (tmp_path / f"{name}.ckpt" for name in ("best", "last", "old"))
    old.write_bytes(b"old")
    given = content()
    with io.in_background():
        io.save_checkpoint(given, best)
        io.remove_checkpoint(old)
        io.save_checkpoint({**given, "epoch": 1}, last)
    io.take_over(last, True)
    assert old.exists()
    io.finish_writing()
    assert best.samefile(last)
    assert read(best)["epoch"] == 1
    assert not old.exists()


@pytest.mark.parametrize("change", ["weights", "step", "keys"])
def test_another_content_is_another_file(change: str, io: Any, tmp_path: Path) -> None:
    best, last, given = tmp_path / "best.ckpt", tmp_path / "last.ckpt", content()
    with io.in_background():
        io.save_checkpoint(given, best)
        if change == "weights":
            given["state_dict"]["small"].add_(1)
        if change == "step":
            given["global_step"] = 2
        if change == "keys":
            given.pop("nested")
        io.save_checkpoint(given, last)
    io.take_over(last, True)
    io.finish_writing()
    assert not best.samefile(last)
    assert not equal(read(best), read(last))


def test_a_file_system_without_hard_links_gets_copies(
    io: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    with io.in_background():
        io.save_checkpoint(content(), best)
        io.save_checkpoint(content(), last)
    io.take_over(last, True)
    io.finish_writing()
    assert not best.samefile(last)
    assert best.read_bytes() == last.read_bytes()


def test_a_checkpoint_takes_its_place_after_what_was_logged_before_it(
    io: Any, tmp_path: Path
) -> None:
    written = threading.Event()
    io.writer.mark = lambda: written.is_set
    with io.in_background():
        io.save_checkpoint(content(), tmp_path / "last.ckpt")
    io.begin_writing()
    time.sleep(0.3)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt.part"]
    written.set()
    io.finish_writing()
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_cannot_be_written_ends_the_queue_and_is_said_once(io: Any, tmp_path: Path) -> None:
    old, refused, later = tmp_path / "old.ckpt", tmp_path / "no" / "a.ckpt", tmp_path / "b.ckpt"
    old.write_bytes(b"old")
    (tmp_path / "no").write_bytes(b"a file, not a folder")
    with io.in_background():
        io.save_checkpoint(content(), refused)
        io.remove_checkpoint(old)
        io.save_checkpoint(content(2, 2.0), later)
    io.writer.wait()
    with pytest.raises(BaseException, match=r"a.ckpt cannot be written, and is as it was: \w+"):
        io.begin_writing()
    io.begin_writing()  # once
    assert old.exists()
    assert not later.exists()
    with io.in_background():
        io.save_checkpoint(content(3, 3.0), later)  # the disk may be free again
    io.finish_writing()
    assert later.exists()


@pytest.mark.parametrize("size", [LARGE, 1000])  # small ones do not wait for those before them
@pytest.mark.parametrize("changing", [True, False])
def test_a_logger_is_told_of_a_file_before_the_next_save_removes_it(
    size: int, changing: bool, io: Any, slow: threading.Event, tmp_path: Path
) -> None:
    told: list[tuple[str, bool]] = []
    files = [tmp_path / f"{number}.ckpt" for number in range(5)]
    threading.Timer(0.3, slow.set).start()
    for number, file in enumerate(files):
        with io.in_background():
            io.save_checkpoint(content(number, float(number), size=size), file)
            io.tell(lambda path: told.append((path.name, path.exists())), file)
            if number:
                io.remove_checkpoint(files[number - 1])
            fill = number + 10.0 * (changing and number % 2)  # as if they were averages
            io.save_checkpoint(content(number, fill, size=size), tmp_path / "last.ckpt")
        time.sleep(0.1)  # the training continues
        io.begin_writing()
    io.finish_writing()
    assert told == [(file.name, True) for file in files]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["4.ckpt", "last.ckpt"]


def test_only_what_was_asked_for_since_the_last_step_is_dropped(
    io: Any, slow: threading.Event, tmp_path: Path
) -> None:
    told: list[str] = []
    files = [tmp_path / f"{number}.ckpt" for number in range(3)]
    for number, file in enumerate(files):
        with io.in_background():
            io.save_checkpoint(content(number, size=1000), file)
            io.tell(told.append, file.name)
            if number:
                io.remove_checkpoint(files[number - 1])
        if number < 2:
            io.begin_writing()
    io.drop_held()
    slow.set()
    io.finish_writing()
    assert told == ["0.ckpt", "1.ckpt"]
    assert [file.name for file in tmp_path.iterdir()] == ["1.ckpt"]


def test_a_file_that_is_written_again_before_it_was_removed_stays(io: Any, tmp_path: Path) -> None:
    for number in range(2):
        with io.in_background():
            io.save_checkpoint(content(number), tmp_path / "last.ckpt")
            io.save_checkpoint(content(number), tmp_path / "other.ckpt")
            io.remove_checkpoint(tmp_path / "best.ckpt")
            io.save_checkpoint(content(number, size=1000), tmp_path / "best.ckpt")
            io.save_checkpoint(content(number, 2.0), tmp_path / "last.ckpt")
        io.begin_writing()
    io.finish_writing()
    assert (tmp_path / "best.ckpt").exists()


# The engine's record.


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def test_the_record_is_read_without_running_what_a_file_says(
    engine: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record, reading = engine("checkpoint_record"), engine("readable")
    with Path("evil.ckpt").open("wb") as file:
        torch.save({"state_dict": {}, "evil": Evil()}, file)
    record.append_record(Path("evil.ckpt"), {"step": 7})
    assert record.read_record(Path("evil.ckpt")) == {"step": 7}
    with pytest.raises(SystemExit) as refused:
        reading.read_checkpoint(Path("evil.ckpt"))
    assert re.search(r"holds (posix|nt)\.system; --weights_only false reads", str(refused.value))
    assert not Path("pwned").exists()
    assert "Evil" not in str(reading.about_checkpoint(Path("evil.ckpt")))


def test_a_checkpoint_with_a_record_is_read_by_torch_as_any_other(
    io: Any, engine: Callable[[str], Any], tmp_path: Path
) -> None:
    file = tmp_path / "a.ckpt"
    io.save_checkpoint({**content(), "engine": {"run_id": "r1", "best": "b.ckpt"}}, file)
    for how in ({}, {"mmap": True}):
        assert torch.load(file, weights_only=True, **how)["global_step"] == 1  # type: ignore[arg-type]
    assert engine("readable").is_complete(file)
    record = engine("checkpoint_record").read_record(file)
    assert (record["run_id"], record["best"], record["step"]) == ("r1", "b.ckpt", 1)


# In a training.


THEIRS = '''
import os
import time

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO


class SavesItself(Callback):
    """Saves a checkpoint and reads it, as in stock."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        file = os.path.join(trainer.default_root_dir, "own", "own.ckpt")
        trainer.save_checkpoint(file)
        assert torch.load(file, weights_only=True)["global_step"] == trainer.global_step


class ReadsItsOwn(ModelCheckpoint):
    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        assert os.path.exists(self.best_model_path), self.best_model_path
        self.looked = getattr(self, "looked", 0) + 1

    def on_train_end(self, trainer, pl_module):
        assert self.looked == trainer.max_epochs


class AtTheEnd(Callback):
    """Reads the best checkpoint in each hook that comes after the training."""

    def on_train_end(self, trainer, pl_module):
        best = trainer.checkpoint_callback.best_model_path
        assert torch.load(best, weights_only=True)["state_dict"]
        assert os.path.exists(os.path.join(os.path.dirname(best), "last.ckpt"))

    on_fit_end = on_train_end


class Listens(DummyLogger):
    """Looks at each file that it is told of, at once."""

    told = 0

    def after_save_checkpoint(self, checkpoint_callback):
        files = [*checkpoint_callback.best_k_models, checkpoint_callback.last_model_path]
        for file in filter(None, files):
            assert torch.load(file, weights_only=True)["state_dict"]
        type(self).told += 1


class OwnIO(TorchCheckpointIO):
    saved = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.saved.append(os.path.basename(path))
        super().save_checkpoint(checkpoint, path, storage_options)


class Fails(Callback):
    """Fails at a step, with a disk that takes nothing more at a step before."""

    def __init__(self, step: int = 8, full: int = 1000000):
        self.step, self.full = step, full

    def on_train_batch_start(self, trainer, pl_module, *args):
        if trainer.global_step == self.full:
            import resource

            trainer.strategy.checkpoint_io.settle()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100000, resource.RLIM_INFINITY))
        if trainer.global_step == self.step:
            raise ValueError("the original error")


class FailsBeforeRows(Callback):
    """Fails after the callbacks have saved, and before the values are logged."""

    def __init__(self, where: str, step: int):
        self.where, self.step = where, step

    def setup(self, trainer, pl_module, stage):
        connector = trainer._logger_connector
        update = getattr(connector, self.where)

        def fail():
            if trainer.global_step == self.step:
                raise ValueError("another rank is gone")
            update()

        setattr(connector, self.where, fail)
'''


@pytest.fixture(scope="module", autouse=True)
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "saving_theirs.py").write_text(THEIRS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module("saving_theirs")


def names(outcome: Outcome) -> list[str]:
    assert outcome.run is not None
    return sorted(file.name for file in (outcome.run / "checkpoints").iterdir())


def clean(outcome: Outcome) -> None:
    assert (outcome.code, outcome.err) == (0, ""), outcome.error or outcome.err


@pytest.mark.parametrize("callback", ["SavesItself", "ReadsItsOwn", "AtTheEnd"])
def test_what_a_team_saves_or_reads_is_there_as_in_stock(callback: str, command: Commands) -> None:
    outcome = command(f"{BRIEF} --trainer.callbacks+ saving_theirs.{callback}")
    clean(outcome)
    assert "last.ckpt" in names(outcome)


def test_loggers_are_told_of_files_that_are_there(command: Commands, theirs: Any) -> None:
    line = BRIEF.replace("--trainer.logger false", "--trainer.logger saving_theirs.Listens")
    clean(command(line))
    assert theirs.Listens.told == 4


@pytest.mark.parametrize("plugin", ["AsyncCheckpointIO", "saving_theirs.OwnIO"])
def test_a_checkpoint_io_that_is_given_is_left_alone(
    plugin: str, command: Commands, theirs: Any
) -> None:
    theirs.OwnIO.saved.clear()
    outcome = command(f"{BRIEF} --trainer.plugins {plugin} --test_after_fit true")
    clean(outcome)
    best, last = names(outcome)
    assert last == "last.ckpt"
    assert outcome.run is not None
    assert read(outcome.run / "checkpoints" / "last.ckpt")["global_step"] == 12
    if "Own" in plugin:
        assert theirs.OwnIO.saved.count("last.ckpt") == 2
        assert best in theirs.OwnIO.saved
    clean(command(f"fit --resume {outcome.run.name} --trainer.max_epochs 3"))


def test_remote_folders_are_written_by_fsspec(command: Commands) -> None:
    import fsspec  # type: ignore[import-untyped]

    where = "memory://saves"
    outcome = command(
        f"{BRIEF} --callbacks.checkpoint.dirpath {where} --callbacks.last_checkpoint.dirpath"
        f" {where} --test_after_fit true"
    )
    clean(outcome)
    files = fsspec.filesystem("memory").glob("/saves/*.ckpt")
    assert sorted(Path(file).name for file in files)[1:] == ["last.ckpt"]
    assert f"saved    {where}/epoch-" in outcome.out
    assert "test/acc" in outcome.out


def test_a_link_as_the_last_checkpoint_never_dangles(command: Commands) -> None:
    line = f"{BRIEF} --callbacks.checkpoint.save_last link --callbacks.last_checkpoint null"
    outcome = command(line)
    clean(outcome)
    assert outcome.run is not None
    last = outcome.run / "checkpoints" / "last.ckpt"
    assert last.is_symlink()
    assert read(last)["global_step"] == 12


def test_the_version_counter_sees_files_that_are_still_to_come(command: Commands) -> None:
    named = "--callbacks.checkpoint.filename same --callbacks.checkpoint.save_top_k -1"
    outcome = command(f"{BRIEF} {named} --callbacks.checkpoint.enable_version_counter true")
    clean(outcome)
    assert names(outcome) == ["last.ckpt", "same-v1.ckpt", "same.ckpt"]


def test_without_checkpointing_nothing_is_written(command: Commands) -> None:
    outcome = command(f"{BRIEF} --trainer.enable_checkpointing false")
    clean(outcome)
    assert outcome.run is not None
    assert not list(outcome.run.rglob("*.ckpt"))


@pytest.fixture
def limits() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("limits")
def test_a_full_disk_is_one_line_at_the_next_step_and_leaves_what_was_there(
    command: Commands,
) -> None:
    full = "--trainer.callbacks+ saving_theirs.Fails --trainer.callbacks.full 7"
    outcome = command(f"{BRIEF} {full} --trainer.callbacks.step 1000 --trainer.max_epochs 4")
    assert outcome.code == 1
    assert re.fullmatch(
        r"error: \S+last.ckpt cannot be written, and is as it was: File too large\n", outcome.err
    )
    best, last = names(outcome)
    assert outcome.run is not None
    for file in (best, last):
        assert read(outcome.run / "checkpoints" / file)["global_step"] == 6


@pytest.mark.usefixtures("limits")
def test_a_full_disk_does_not_hide_what_ended_the_training(command: Commands) -> None:
    full = "--trainer.callbacks+ saving_theirs.Fails --trainer.callbacks.full 7"
    outcome = command(f"{BRIEF} {full}")
    assert str(outcome.error) == "the original error"
    assert re.fullmatch(
        r"warning: \S+last.ckpt cannot be written, .*: File too large\n", outcome.err
    )
    assert read((outcome.run or Path()) / "checkpoints" / "last.ckpt")["global_step"] == 6


def test_an_error_saves_the_state_before_the_command_ends(
    command: Commands, slow: threading.Event
) -> None:
    threading.Timer(3, slow.set).start()
    outcome = command(f"{BRIEF} --trainer.callbacks+ saving_theirs.Fails")
    assert str(outcome.error) == "the original error"
    assert read((outcome.run or Path()) / "checkpoints" / "last.ckpt")["global_step"] == 8


@pytest.mark.parametrize(
    ("where", "step"), [("update_train_step_metrics", 4), ("update_train_epoch_metrics", 6)]
)
def test_a_checkpoint_whose_values_an_error_kept_from_being_logged_is_not_kept(
    where: str, step: int, command: Commands
) -> None:
    fails = f"--trainer.callbacks+ saving_theirs.FailsBeforeRows --trainer.callbacks.where {where}"
    fails += f" --trainer.callbacks.step {step}"
    line = f"{BRIEF} --callbacks.last_checkpoint.every_n_train_steps 1 {fails}"
    outcome = command(line)
    assert str(outcome.error) == "another rank is gone"
    run = outcome.run or Path()
    assert read(run / "checkpoints" / "last.ckpt")["global_step"] == step - 1
    again = command(f"fit --resume {run} --trainer.callbacks.step -1")
    assert again.code == 0, again
    with (run / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(12))


def test_the_training_does_not_wait_for_a_slow_disk(
    command: Commands, slow: threading.Event, engine: Callable[[str], Any]
) -> None:
    class Steps(Callback):
        steps = 0

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 11:  # five steps after the save of the first epoch
                Steps.steps = trainer.global_step
                slow.set()

    module = types.ModuleType("stepping")
    module.Steps = Steps  # type: ignore[attr-defined]
    Steps.__module__ = "stepping"
    sys.modules["stepping"] = module
    outcome = command(f"{BRIEF} --trainer.callbacks+ stepping.Steps")
    clean(outcome)
    assert Steps.steps == 11
    assert read((outcome.run or Path()) / "checkpoints" / "last.ckpt")["global_step"] == 12


def test_nothing_is_left_where_temporary_files_lie(
    command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    clean(command(BRIEF))
    assert not list(tmp_path.iterdir())


def test_callbacks_and_loggers_are_as_they_were_after_the_training(
    engine: Callable[[str], Any], tmp_path: Path
) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    saves, reading = engine("background_saves"), engine("checkpoint_io")
    saving, logger = ModelCheckpoint(tmp_path), DummyLogger()
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=0,
        log_every_n_steps=1,
        accelerator="cpu",
        logger=logger,
        plugins=[reading.BackgroundCheckpointIO()],
        callbacks=[saves.BackgroundSaves((ModelCheckpoint,)), saving],
        enable_progress_bar=False,
    )
    trainer.fit(BoringModel())
    assert Path(saving.best_model_path).exists()
    assert not {"_save_checkpoint", "file_exists"} & vars(saving).keys()
    assert "after_save_checkpoint" not in vars(logger)
    assert "checkpoints" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.slow
def test_kills_at_any_moment_leave_a_whole_checkpoint_from_which_the_run_resumes(
    bake: Bake, tmp_path: Path
) -> None:
    project = bake(tmp_path)
    env = environment(tmp_path) | {"RUNS_ROOT": str(tmp_path / "runs"), "OMP_NUM_THREADS": "1"}
    fit = (
        "fit --config configs/digits.yaml --model.width 192 --trainer.max_steps 24"
        " --callbacks.last_checkpoint.every_n_train_steps 1 --trainer.logger false"
        " --trainer.log_every_n_steps 1"
    )

    def start(words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "main.py", *words.split()]
        with (tmp_path / "screen.txt").open("a") as screen:
            return subprocess.Popen(command, cwd=project, env=env, text=True, stderr=screen)

    whole = start(f"{fit} --run_id whole")
    assert whole.wait(120) == 0
    folder = tmp_path / "runs" / "killed" / "checkpoints"
    last, step, moments = folder / "last.ckpt", 0, random.Random(18)
    for number in range(8):
        for part in folder.glob("*.part"):  # else it would be taken for one of this start
            part.unlink()
        process = start("fit --resume killed" if last.exists() else f"{fit} --run_id killed")
        deadline = time.monotonic() + 60
        while not list(folder.glob("*.part")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moments.choice([0, 0.002, 0.05, 0.2, 0.5]))
        process.kill()
        process.wait()
        if last.exists():
            found = read(last)["global_step"]  # whole, or it would not be read
            assert found >= step, f"kill {number}: from {step} back to {found}"
            step = found
    assert 0 < step < 24
    ended = start("fit --resume killed")
    assert ended.wait(120) == 0, (tmp_path / "screen.txt").read_text()
    ours, theirs = (
        read(tmp_path / "runs" / name / "checkpoints" / "last.ckpt") for name in ("killed", "whole")
    )
    assert equal(ours["state_dict"], theirs["state_dict"])
    assert not list(folder.glob("*.part"))


# What is read back.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("readable")
    (folder / "hard_to_read.py").write_text(HARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


HARD = """
import enum
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


class Meta(torch.Tensor):
    pass


class Kind(enum.Enum):
    A = 1


class Base(BoringModel):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.step(batch))


class Numpy(Base):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.01)
        return [optimizer], [LambdaLR(optimizer, lambda epoch: np.float64(1 / (1 + epoch)))]


class Arrays(Base):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["arrays"] = [np.arange(3), np.array("a"), timedelta(1), Path("x")]

    def on_load_checkpoint(self, checkpoint):
        assert checkpoint["arrays"][0].tolist() == [0, 1, 2]


class Subclass(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3).as_subclass(Meta))


class AClass(Base):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        self.hparams["kind"] = nn.Linear


class AnEnum(Base):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["kind"] = {"of": [Kind.A]}


class Device(Base):
    def __init__(self, device: torch.device = torch.device("cpu"), width: int = 3):
        super().__init__()
        assert isinstance(device, torch.device)
"""
LOSS = (
    "--callbacks.early_stopping null --callbacks.summaries null"
    " --callbacks.checkpoint.monitor val/loss --callbacks.checkpoint.mode min"
    " --trainer.logger false --trainer.max_epochs 1 --trainer.limit_train_batches 2"
    " --trainer.limit_val_batches 1 --trainer.log_every_n_steps 1"
)
WAYS = [
    "test --ckpt_path {}",
    "validate --ckpt_path {}:last",
    "fit --resume {} --trainer.max_epochs 2",
    "fit --ckpt_path {}",
    "fit --init_from {}",
]


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize("kind", ["Numpy", "Arrays", "Subclass", "Device"])
def test_checkpoints_of_ordinary_values_are_read_on_all_ways(kind: str, command: Commands) -> None:
    line = f"fit --model hard_to_read.{kind} --data hard_to_read.BoringDataModule {LOSS}"
    trained = command(line)
    clean(trained)
    assert trained.run is not None
    for way in WAYS:
        clean(command(way.format(trained.run.name)))


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize(
    ("kind", "key", "held"),
    [
        ("AClass", "hyper_parameters.kind", "torch.nn.modules.linear.Linear"),
        ("AnEnum", "kind.of.0", "hard_to_read.Kind"),
    ],
)
def test_what_is_not_read_is_said_at_the_first_save_and_weights_only_false_reads_it(
    kind: str, key: str, held: str, command: Commands
) -> None:
    line = f"fit --model hard_to_read.{kind} --data hard_to_read.BoringDataModule {LOSS}"
    trained = command(f"{line} --trainer.max_epochs 2")
    assert trained.code == 0
    needs = f"warning: checkpoints of this run need --weights_only false to be read: {key} holds"
    assert trained.err == f"{needs} {held}\n"
    assert trained.run is not None
    for way in WAYS:
        refused = command(way.format(trained.run.name))
        assert refused.code == 2
        assert re.fullmatch(
            rf"error: \S+\.ckpt: holds {held}; --weights_only false reads it, and .*\n", refused.err
        )
        read = command(f"{way.format(trained.run.name)} --weights_only false")
        assert read.code == 0, read.error or read.err
    load = importlib.import_module("odd_duck.engine").load
    assert load(trained.run.name, weights_only=False).training is False


def test_the_record_says_what_a_command_needs(
    command: Commands, engine: Callable[[str], Any], tmp_path: Path
) -> None:
    trained = command(BRIEF)
    assert trained.run is not None
    last = trained.run / "checkpoints" / "last.ckpt"
    record = engine("checkpoint_record").read_record(last)
    assert (record["step"], record["epoch"], record["run_id"]) == (12, 1, trained.run.name)
    assert record["best"] in names(trained)
    assert record["monitor"] == "val/acc"
    assert record["model_class"] == "odd_duck.model.Classifier"
    assert record["config"]["model"]["init_args"]["lr"] == 0.002
    # A command reads the record alone: of a file whose pickle is broken it still finds the best.
    copy = tmp_path / trained.run.name
    shutil.copytree(trained.run, copy)
    assert (
        engine("checkpoints").best_checkpoint(copy / "checkpoints" / "last.ckpt").name
        == (record["best"])
    )
