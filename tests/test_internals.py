"""A release of Lightning without a private name that we use: one line, or a clear end."""

import importlib
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import Commands, Outcome

FIT = (
    "fit --config @digits --trainer.logger false --trainer.max_epochs 2"
    " --trainer.limit_train_batches 8 --trainer.log_every_n_steps 1"
    " --callbacks.last_checkpoint.every_n_train_steps 3"
)
LINE = re.compile(r"warning: this release of Lightning does not allow ([^\n(]+) \([^\n]+\)\n")


class Hidden:
    """An object of Lightning's without its private names."""

    def __init__(self, visible: Any) -> None:
        object.__setattr__(self, "visible", visible)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"no {name}")
        value = getattr(self.visible, name)
        is_lightnings = type(value).__module__.startswith("lightning.")
        return Hidden(value) if is_lightnings else value

    def __getitem__(self, key: Any) -> Any:
        raise KeyError(key)


@pytest.fixture
def internals(command: Commands) -> Any:
    return importlib.import_module("odd_duck.engine.lightning_internals")


@pytest.fixture
def hide(internals: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Hide private names from one function, wherever the engine calls it."""

    def hide(name: str, module: str) -> None:
        original = getattr(internals, name)
        user = importlib.import_module(f"odd_duck.engine.{module}")

        def hidden(thing: Any, *rest: Any) -> Any:
            return original(Hidden(thing), *rest)

        monkeypatch.setattr(user, name, hidden)

    return hide


def run_folder(outcome: Outcome) -> Path:
    assert outcome.error is None, outcome.error
    assert outcome.code == 0, outcome.err
    assert outcome.run is not None
    assert (outcome.run / "checkpoints" / "last.ckpt").exists()
    return outcome.run


@pytest.mark.parametrize(
    ("module", "nicety"),
    [
        ("result", "faster logging"),
        ("call", "skipping empty hooks"),
        ("training_epoch_loop", "faster steps"),
    ],
)
def test_a_training_works_without_what_makes_it_faster(
    module: str,
    nicety: str,
    internals: Any,
    command: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = run_folder(command(FIT))
    monkeypatch.setattr(internals, module, SimpleNamespace())
    outcome = command(FIT)
    run = run_folder(outcome)
    (said,) = LINE.findall(outcome.err)
    assert said == nicety
    assert (run / "metrics.csv").read_text() == (usual / "metrics.csv").read_text()


def test_a_training_within_an_epoch_is_saved_without_the_means(
    hide: Any, command: Commands
) -> None:
    hide("epoch_results", "train_state")
    outcome = command(FIT)
    run_folder(outcome)
    assert set(LINE.findall(outcome.err)) == {"resuming the means of an epoch"}


def test_a_training_works_without_the_wrapper_of_batch_samplers(
    hide: Any, command: Commands
) -> None:
    hide("unwrap_batch_sampler", "batches")
    run_folder(command(FIT))


def test_steps_are_counted_by_the_optimizer_where_the_loop_hides_its_own(
    internals: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert internals.steps_in_checkpoint({"loops": {}, "global_step": 7}) == 7
    assert LINE.search(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["validation_values", "current_results"])
def test_what_would_be_wrong_without_a_name_ends_in_one_line(internals: Any, name: str) -> None:
    trainer = Hidden(SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace())))
    errors = importlib.import_module("odd_duck.engine.errors")
    with pytest.raises(errors.RunError, match="this release of Lightning hides what"):
        getattr(internals, name)(trainer)


def test_an_ended_epoch_that_cannot_be_counted_ends_in_one_line(internals: Any) -> None:
    errors = importlib.import_module("odd_duck.engine.errors")
    trainer = SimpleNamespace(fit_loop=SimpleNamespace())
    with pytest.raises(errors.RunError, match="cannot resume here"):
        internals.end_restored_epoch(trainer)


def test_ranks_that_cannot_be_taken_over_are_left_to_lightning(internals: Any) -> None:
    for strategy in (SimpleNamespace(), SimpleNamespace(launcher=None)):
        assert internals.take_over_launched_ranks(SimpleNamespace(strategy=strategy)) == []


def test_hooks_of_a_team_and_of_others_stay_functions(internals: Any, command: Commands) -> None:
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import LearningRateMonitor

    class Theirs(Callback):
        pass

    theirs, lightnings = Theirs(), LearningRateMonitor()
    internals.strip_noop_hooks([theirs, lightnings])
    assert callable(theirs.on_train_batch_start)
    assert lightnings.on_validation_batch_end is None
    assert callable(lightnings.on_train_batch_start)


@pytest.mark.filterwarnings("ignore:The .srun. command")  # where SLURM is installed
def test_lightnings_broadcast_before_each_batch_is_left_out_for_a_command_alone(
    internals: Any,
) -> None:
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    loop: Any = trainer.fit_loop.epoch_loop
    original = loop._broadcast_sigterm_tensor
    internals.skip_sigterm_broadcast(trainer, skip=True)
    assert loop._broadcast_sigterm_tensor != original
    internals.skip_sigterm_broadcast(trainer, skip=False)
    assert loop._broadcast_sigterm_tensor == original


class Hooks:
    """Functions as Lightning asks for the parameters of a hook."""

    def plain(self, batch: Any) -> None:
        pass

    def two(self, batch: Any, batch_idx: int) -> None:
        pass

    def any_number(self, *args: Any) -> None:
        pass

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise AssertionError("a model is not compared")


@dataclass
class Unhashable:
    number: int = 0

    def __call__(self, batch: Any, batch_idx: int) -> None:
        pass


def test_parameters_of_a_hook_are_those_that_lightning_finds(internals: Any) -> None:
    module: Any = importlib.import_module("lightning.pytorch.core.module")

    original = module.is_param_in_hook_signature
    hooks = Hooks()
    functions = [hooks.plain, hooks.two, hooks.any_number, lambda batch, extra: None]
    questions: list[tuple[Any, ...]] = [("batch_idx",), ("batch_idx", True), ("x", False, 2)]
    with internals.signatures_read_once():
        assert module.is_param_in_hook_signature is not original
        for _ in range(2):  # the second time by what is known
            for function in functions:
                for words in questions:
                    found = module.is_param_in_hook_signature(function, *words)
                    assert found == original(function, *words)
                named = module.is_param_in_hook_signature(function, "batch_idx", min_args=2)
                assert named == original(function, "batch_idx", min_args=2)
    assert module.is_param_in_hook_signature is original


def note_questions(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list to which each question about a hook's parameters is added."""
    asked: list[Any] = []
    original = module.is_param_in_hook_signature

    def question(*args: Any, **options: Any) -> bool:
        asked.append(args)
        return bool(original(*args, **options))

    monkeypatch.setattr(module, "is_param_in_hook_signature", question)
    return asked


def test_a_signature_is_read_once(internals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("lightning.pytorch.core.module")
    asked = note_questions(module, monkeypatch)
    with internals.signatures_read_once():
        for _ in range(5):
            module.is_param_in_hook_signature(Hooks().two, "batch_idx", explicit=True)
    assert len(asked) == 1


def test_a_hook_that_is_another_object_each_time_is_not_kept(
    internals: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each step would add one, with its model, until the command ends."""
    module: Any = importlib.import_module("lightning.pytorch.core.module")
    asked = note_questions(module, monkeypatch)
    with internals.signatures_read_once():
        for hook in (partial(Hooks().two, batch_idx=3), Unhashable(), Unhashable()):
            module.is_param_in_hook_signature(hook, "batch_idx")
    assert len(asked) == 3


@pytest.mark.filterwarnings("ignore:The .srun. command")  # where SLURM is installed
def test_only_a_profiler_that_measures_nothing_is_left_out(internals: Any) -> None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler

    class Theirs(PassThroughProfiler):
        pass

    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    for kind in (Theirs, SimpleProfiler):
        trainer: Any = Trainer(profiler=kind(), accelerator="cpu", **options)
        internals.strip_noop_profiler(trainer)
        assert "profile" not in vars(trainer.profiler)
    trainer = Trainer(accelerator="cpu", **options)
    internals.strip_noop_profiler(trainer)
    with trainer.profiler.profile("an action") as name:
        assert name == "an action"

    # As a decorator, as a team's code may use it.
    assert trainer.profiler.profile("another")(lambda: 3)() == 3
