"""Ways on from a checkpoint: a model, a run that begins with its weights, and a line where it will not do."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import Commands

BRIEF = " --trainer.logger false --trainer.max_epochs 1 --trainer.limit_train_batches 3 --trainer.log_every_n_steps 1"


@pytest.fixture(scope="module")
def trained(command: Commands) -> Path:
    run = command("fit --config @digits" + BRIEF).run
    assert run is not None
    return run


def weights(file: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["state_dict"]
    return state


def test_a_model_is_loaded_in_a_fresh_interpreter_from_elsewhere(
    trained: Path, command: Commands, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from odd_duck.engine.references import load;"
        "m = load(sys.argv[2]); total = sum(p.double().sum() for p in m.parameters()).item();"
        "print(type(m).__name__, m.training, total)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script, command.project, moved], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    best = next(file for file in (moved / "checkpoints").iterdir() if file.name != "last.ckpt")
    expected = sum(value.double().sum().item() for value in weights(best).values())
    assert printed[:2] == ["Classifier", "False"]
    assert float(printed[2]) == pytest.approx(expected)


def test_a_run_that_begins_with_anothers_weights_is_new_and_says_what_did_not_fit(
    trained: Path, command: Commands
) -> None:
    same = command(f"fit --init_from {trained.name} --trainer.max_steps 0 --trainer.logger false")
    assert (same.code, same.err) == (0, ""), same.err
    assert "weights  " not in same.out
    frozen = command(f"fit --init_from {trained.name}:last --model.lr 0{BRIEF} --model.optimizer SGD")
    assert frozen.run is not None
    new, old = weights(frozen.run / "checkpoints" / "last.ckpt"), weights(trained / "checkpoints" / "last.ckpt")
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert torch.load(frozen.run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    wider = command(f"fit --init_from {trained.name} --model.width 48{BRIEF}")
    assert re.search(r"weights  network.0.weight stays as it was: \(48, 1, 3, 3\) here, \(32, 1, 3, 3\)", wider.out)


def test_weights_of_another_kind_of_model_are_refused(trained: Path, command: Commands) -> None:
    boring = "lightning.pytorch.demos.boring_classes.Boring"
    watched = "--callbacks.checkpoint.monitor null --callbacks.early_stopping null --callbacks.summaries null"
    outcome = command(
        f"fit --init_from {trained.name} --model {boring}Model --data {boring}DataModule {watched}{BRIEF}"
    )
    assert outcome.code == 2
    assert re.match(r"error: --init_from: none of the \d+ tensors in \S+ fits BoringModel\n$", outcome.err)


@pytest.mark.parametrize("words", ["test --init_from {}", "fit --init_from {} --ckpt_path {}"])
def test_init_from_is_for_fit_alone(words: str, trained: Path, command: Commands) -> None:
    outcome = command(words.replace("{}", trained.name))
    assert (outcome.code, outcome.err) == (2, "error: --init_from is for fit, in place of --ckpt_path\n")


def test_what_the_model_no_longer_takes_is_left_out_with_a_warning(
    trained: Path, command: Commands, tmp_path: Path
) -> None:
    old = tmp_path / "old.ckpt"
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["vocabulary"] = 100
    torch.save(content, old)
    outcome = command(f"test --config @digits --ckpt_path {old} --trainer.logger false")
    assert outcome.code == 0
    assert re.fullmatch(r"warning: the model no longer takes vocabulary, which \S*old.ckpt has\n", outcome.err)


def test_a_broken_checkpoint_is_named_and_the_newest_whole_one_too(
    trained: Path, command: Commands, tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(trained / "checkpoints", folder)
    last = folder / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    outcome = command(f"test --config @digits --ckpt_path {folder.parent}:last")
    assert outcome.code == 2
    assert re.fullmatch(
        r"error: \S+last.ckpt: not a checkpoint .*; \S+epoch-000-step-000003.ckpt can be\n", outcome.err
    )


def test_a_checkpoint_of_a_class_that_is_gone_is_one_line(trained: Path, command: Commands, tmp_path: Path) -> None:
    gone = tmp_path / "gone.ckpt"
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["_class_path"] = "odd_duck.model.Gone"
    torch.save(content, gone)
    outcome = command(f"test --config @digits --ckpt_path {gone}")
    assert outcome.code == 2
    assert "odd_duck.model.Gone" in outcome.err
    assert outcome.err.count("\n") == 1
