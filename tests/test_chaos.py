"""A run that is killed and resumed is, bit for bit, the run that was never interrupted."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import OWN_KINDS, Lab, Setup, Strike, compare, write_research
from command import Commands
from conftest import Bake
from loaders import KINDS

LINE = (
    "fit --config @digits --model chaotic.Restless"
    " --data chaotic.NoisyDigits --data.noise true --trainer.max_epochs 2"
    " --trainer.limit_train_batches 4 --trainer.log_every_n_steps 1 --trainer.val_check_interval 2"
    " --model.lr_scheduler OneCycleLR --model.lr_scheduler.max_lr 0.02"
    " --model.lr_scheduler.total_steps 8"
    " --trainer.logger chaotic.Frozen --trainer.logger.run ${run}"
    " --callbacks.last_checkpoint.every_n_train_steps 1"
)


@dataclass(frozen=True)
class Frozen:
    """An undisturbed run, and its folder as it was before each row that it logged."""

    reference: Path
    copies: list[Path]
    command: Commands

    def resumed(self, copy: Path, folder: Path) -> list[str]:
        """What a copy differs in once it has been resumed, in a folder of this test."""
        run = folder / copy.parent.name / copy.name
        if not run.exists():
            shutil.copytree(copy, run)
        outcome = self.command(f"fit --resume {run}")
        said = outcome.err.splitlines() + [f"ended with {outcome.code}: {outcome.error}"] * (
            outcome.code != 0
        )
        return said + (compare(self.reference, run).differences if outcome.code == 0 else [])


@pytest.fixture(scope="module")
def frozen(command: Commands, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Frozen]:
    research, copies = tmp_path_factory.mktemp("research"), tmp_path_factory.mktemp("frozen")
    write_research(command.project, research)
    with pytest.MonkeyPatch.context() as environment:
        environment.syspath_prepend(research)
        with environment.context() as while_it_trains:
            while_it_trains.setenv("CHAOS_FROZEN", str(copies))
            outcome = command(LINE)
        assert (outcome.code, outcome.err) == (0, ""), outcome
        assert outcome.run is not None
        yield Frozen(
            outcome.run, [folder / outcome.run.name for folder in sorted(copies.iterdir())], command
        )


def test_another_run_of_the_same_is_equal_and_one_of_another_seed_is_not(
    frozen: Frozen, command: Commands
) -> None:
    again, other = command(LINE).run, command(f"{LINE} --seed_everything 43").run
    assert again is not None
    assert other is not None
    assert compare(frozen.reference, again).differences == []
    differences = " ".join(compare(frozen.reference, other).differences)
    assert all(
        name in differences
        for name in ("state_dict", "optimizer_states", "metrics.csv", "config.yaml")
    )


def test_a_run_that_was_killed_before_any_row_goes_on_as_if_it_had_not_been(
    frozen: Frozen, tmp_path: Path
) -> None:
    copies = [copy for copy in frozen.copies if list(copy.glob("checkpoints/*.ckpt"))]
    assert len(copies) > 16
    wrong = {copy.parent.name: said for copy in copies if (said := frozen.resumed(copy, tmp_path))}
    assert not wrong, "\n".join(f"{name}: {said[:5]}" for name, said in wrong.items())


def test_a_run_whose_last_checkpoint_is_cut_goes_on_from_one_before_as_if_nothing_had_been(
    frozen: Frozen, tmp_path: Path
) -> None:
    copy = frozen.copies[-1]
    run = tmp_path / copy.parent.name / copy.name
    shutil.copytree(copy, run)
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    (warning, *differences) = frozen.resumed(copy, tmp_path)
    assert "last.ckpt is broken, " in warning
    assert differences == []  # the best checkpoint of that step has the same content


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("python", "last.ckpt, state_dict"),
        ("numpy", "last.ckpt, state_dict"),
        ("torch", "last.ckpt, state_dict"),
        ("place", "last.ckpt, state_dict"),
        ("metrics", "metrics.csv: 1 rows lost, 1 wrong"),
        ("rows", "metrics.csv: 1 rows lost, 0 wrong"),
    ],
)
def test_each_thing_that_a_checkpoint_keeps_is_missed_when_it_is_not_there(
    fault: str, where: str, frozen: Frozen, tmp_path: Path
) -> None:
    number = next(
        number
        for number, copy in enumerate(frozen.copies)
        if "step-2-epoch+train-loss" in copy.parent.name
    )
    copy = frozen.copies[number]
    run = tmp_path / copy.parent.name / copy.name
    shutil.copytree(copy, run)
    last = run / "checkpoints" / "last.ckpt"
    if fault == "rows":  # as if it took its place before the row of its step was there
        saved = (later / "checkpoints" / "last.ckpt" for later in frozen.copies[number + 1 :])
        shutil.copy(next(file for file in saved if file.read_bytes() != last.read_bytes()), last)
    content = torch.load(last, weights_only=True)
    bookmark = content["train_state"]
    if fault in ("python", "numpy", "torch"):
        later = torch.load(frozen.reference / "checkpoints" / "last.ckpt", weights_only=True)[
            "train_state"
        ]
        bookmark["ranks"][0]["random"][fault] = later["ranks"][0]["random"][fault]
    if fault == "place":
        bookmark["batch"] += 1
    if fault == "metrics":
        bookmark["ranks"][0]["states"].clear()
    torch.save(content, last)
    differences = frozen.resumed(copy, tmp_path)
    assert any(difference.startswith(where) for difference in differences), differences


@pytest.fixture(scope="module")
def lab(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    home = tmp_path_factory.mktemp("c")
    with Lab(home, bake(home)) as lab:
        yield lab
    lab.server.check()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_one(seed: int, lab: Lab) -> None:
    played = lab.play(seed, most=3)
    assert not played.verdict.differences, str(played)


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_checkpoint_leaves_the_one_before(lab: Lab) -> None:
    strikes = [Strike("write", count, 0.002, "all") for count in (2, 3, 4)]
    played = lab.disturb(1000, Setup(every=2, workers=2), strikes)
    assert any("mid-write" in kill for kill in played.kills), str(played)
    assert not played.verdict.differences, str(played)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["first", "rank", "all"])
def test_two_ranks_go_on_whichever_was_killed(whom: str, lab: Lab) -> None:
    number = ["first", "rank", "all"].index(whom)
    strikes = [Strike("step", count, 0.01, whom) for count in (7, 9)]
    played = lab.disturb(2000 + number, Setup(devices=2, every=2), strikes, real=[number == 0] * 3)
    assert len(played.kills) == 2
    assert not played.left, str(played)
    assert not played.verdict.differences, str(played)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("shuffles lists", {"workers": 2, "noise": True, "halves": True}),
        ("token budget", {"devices": 2, "schedule": "cycle"}),
        ("steered", {"devices": 2, "workers": 2, "extra": "reload"}),
        ("stream", {"schedule": "epochs", "extra": "accumulation"}),
        ("endless", {"schedule": "estimated", "extra": "SWA"}),
        ("cycle, unsized", {"schedule": "plateau", "extra": "hook"}),
    ],
)
def test_a_kind_of_loader_is_read_on_where_a_kill_left_it(
    kind: str, more: dict[str, Any], lab: Lab
) -> None:
    strikes = [Strike("step", count, 0.01, "all") for count in (7, 6)]
    setup = Setup(kind=kind, every=2, **more)
    played = lab.disturb(3000 + [*KINDS, *OWN_KINDS].index(kind), setup, strikes)
    assert len(played.kills) == 2
    assert not played.verdict.differences, str(played)


@pytest.mark.slow
def test_a_run_that_max_steps_ended_and_a_kill_too_is_the_undisturbed_one(lab: Lab) -> None:
    strikes = [Strike("limit", 5, 0, "all"), Strike("step", 7, 0.01, "all")]
    strikes.append(Strike("limit", 4, 0, "all"))
    played = lab.disturb(4000, Setup(kind="curriculum", every=2, schedule="epochs"), strikes)
    assert len(played.limits) == 2, str(played)
    assert not played.verdict.differences, str(played)


@pytest.mark.slow
def test_an_epoch_that_max_steps_cuts_short_leaves_no_means_of_its_part(lab: Lab) -> None:
    setup = Setup(kind="unsized", every=2, halves=True, extra="hook", schedule="plateau")
    played = lab.disturb(7, setup, [Strike("limit", 18, 0, "all")])
    assert not played.verdict.differences, str(played)
