"""From a checkpoint: a model, a run that starts with its weights, and a line where it won't do."""

import csv
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command import Commands

BRIEF = (
    " --trainer.logger false --trainer.max_epochs 1 --trainer.limit_train_batches 3"
    " --trainer.log_every_n_steps 1"
)


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
        "import sys; sys.path.insert(0, sys.argv[1]); from odd_duck.engine import load;"
        "m = load(sys.argv[2]); total = sum(p.double().sum() for p in m.parameters()).item();"
        "print(type(m).__name__, m.training, total)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script, command.project, moved],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
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
    assert "parameters " not in same.out
    frozen = command(
        f"fit --init_from {trained.name}:last --model.lr 0{BRIEF} --model.optimizer SGD"
    )
    assert frozen.run is not None
    new, old = (
        weights(frozen.run / "checkpoints" / "last.ckpt"),
        weights(trained / "checkpoints" / "last.ckpt"),
    )
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert (
        torch.load(frozen.run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    )
    wider = command(f"fit --init_from {trained.name} --model.width 48{BRIEF}")
    assert re.search(
        r"parameters network.0.weight: \(48, 1, 3, 3\) here, \(32, 1, 3, 3\)", wider.out
    )


def test_weights_of_another_kind_of_model_are_refused(trained: Path, command: Commands) -> None:
    boring = "lightning.pytorch.demos.boring_classes.Boring"
    watched = "--callbacks.checkpoint.monitor null --callbacks.early_stopping null"
    kind = f"--model {boring}Model --data {boring}DataModule {watched} --callbacks.summaries null"
    outcome = command(f"fit --init_from {trained.name} {kind}{BRIEF}")
    assert outcome.code == 2
    assert re.match(
        r"error: --init_from: none of the \d+ tensors in \S+ fits BoringModel\n$", outcome.err
    )


@pytest.mark.parametrize("words", ["test --init_from {}", "fit --ckpt_path {} --init_from {}"])
def test_init_from_is_for_fit_alone(words: str, trained: Path, command: Commands) -> None:
    outcome = command(words.replace("{}", trained.name))
    assert outcome.code == 2
    assert re.fullmatch(
        r"error: --init_from: (is for fit; test takes|cannot be given together with) --ckpt_path\n",
        outcome.err,
    )


def test_what_the_model_no_longer_takes_is_left_out_with_a_warning(
    trained: Path, command: Commands, tmp_path: Path
) -> None:
    old = tmp_path / "old.ckpt"
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"] |= {"vocabulary": 100, "saved_by_the_model": 3}
    content["engine"]["config"]["model"]["init_args"]["vocabulary"] = 100
    torch.save(content, old)
    outcome = command(f"test --config @digits --ckpt_path {old} --trainer.logger false")
    assert outcome.code == 0
    assert re.fullmatch(
        r"warning: the model no longer takes vocabulary, which \S*old.ckpt has\n", outcome.err
    )
    assert not importlib.import_module("odd_duck.engine").load(str(old)).training


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
        r"error: \S+last.ckpt: not a checkpoint .*; \S+epoch-000-step-000003.ckpt can be\n",
        outcome.err,
    )


def test_a_checkpoint_of_a_class_that_is_gone_is_one_line(
    trained: Path, command: Commands, tmp_path: Path
) -> None:
    gone = tmp_path / "gone.ckpt"
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["_class_path"] = "odd_duck.model.Gone"
    torch.save(content, gone)
    outcome = command(f"test --ckpt_path {gone} --data Digits")
    assert outcome.code == 2
    assert re.fullmatch(
        r"error: the class of the checkpoint's model cannot be imported, odd_duck.model.Gone: .*;"
        r" --model CLASS says where it is now\n",
        outcome.err,
    )


@pytest.mark.parametrize("name", ["Classifier", "odd_duck.model.Classifier"])
@pytest.mark.parametrize(
    "words", ["test --ckpt_path", "predict --ckpt_path", "fit --init_from", "fit --ckpt_path"]
)
def test_a_class_that_has_moved_is_named_on_the_command_line(
    words: str, name: str, trained: Path, command: Commands, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.ckpt"
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["_class_path"] = "another_package.model.Gone"
    content["engine"]["config"]["model"]["class_path"] = "another_package.model.Gone"
    torch.save(content, moved)
    brief = BRIEF.replace("max_epochs 1", "max_epochs 2") if "fit" in words else ""
    line = f"{words} {moved} --data Digits --model {name} --trainer.logger false {brief}"
    outcome = command(line)
    assert (outcome.code, outcome.err) == (0, ""), outcome.error or outcome.err


def test_load_takes_the_class_that_a_model_has_now(trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.ckpt"
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["_class_path"] = "another_package.model.Gone"
    torch.save(content, moved)
    engine = importlib.import_module("odd_duck.engine")
    kind = importlib.import_module("odd_duck.model").Classifier
    assert isinstance(engine.load(str(moved), model_class=kind), kind)


@pytest.fixture
def half(command: Commands) -> Path:
    short = "--trainer.max_epochs 2 --trainer.logger false --trainer.log_every_n_steps 1"
    run = command(f"fit --config @digits {short}").run
    assert run is not None
    return run


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_resumed_run_goes_on_in_its_folder_from_its_step_with_its_best(
    half: Path, command: Commands
) -> None:
    before = rows(half)
    outcome = command(f"fit --resume {half.name} --trainer.max_epochs 4")
    assert (outcome.code, outcome.err, outcome.run) == (0, "", None), outcome.err
    after = rows(half)
    assert after[: len(before)] == before
    steps = [int(row["step"]) for row in after if row["train/loss"]]
    assert steps == list(range(4 * 19))
    assert len(list((half / "checkpoints").iterdir())) == 2
    assert yaml.safe_load((half / "config.yaml").read_text())["trainer"]["max_epochs"] == 4
    best = max(float(row["val/acc"]) for row in after if row["val/acc"])
    assert f"best     val/acc {best:.4g}" in outcome.out


def test_a_resumed_run_keeps_its_id_and_a_new_one_may_be_named(
    half: Path, command: Commands
) -> None:
    refused = command(f"fit --resume {half.name} --run_id other")
    expected = f"error: --resume names {half.name}, --run_id names other; --ckpt_path begins a new"
    assert refused.code == 2
    assert refused.err.startswith(expected)
    line = f"--trainer.logger false --trainer.max_epochs 3 --run_id named-{half.name}"
    named = command(f"fit --ckpt_path {half.name} {line}")
    assert (named.code, named.run) == (0, half.with_name(f"named-{half.name}"))
    again = command(f"fit --ckpt_path {half.name} {line}")
    assert again.code == 2
    assert re.search("has checkpoints already; to resume it: .* fit --resume .*named-", again.err)


def test_a_moved_run_resumes_and_keeps_what_was_best(
    half: Path, command: Commands, tmp_path: Path
) -> None:
    moved = tmp_path / "else-where"
    shutil.move(half, moved)
    for file in moved.glob("checkpoints/epoch*"):
        os.utime(file)  # as if copied last
    outcome = command(f"fit --resume {moved} --trainer.max_epochs 3 --trainer.limit_val_batches 1")
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    assert re.search(r"from     \S+last.ckpt\n", outcome.out)
    state = torch.load(moved / "checkpoints" / "last.ckpt", weights_only=True)
    (kept,) = [
        value for key, value in state["callbacks"].items() if key.startswith("ModelCheckpoint")
    ]
    assert Path(kept["best_model_path"]).parent == moved / "checkpoints"
    assert Path(kept["best_model_path"]).exists()
    assert str(half) not in str(kept)


STEP = "--model.lr_scheduler StepLR --model.lr_scheduler.step_size 1 --model.lr_scheduler.gamma 0.5"
COSINE = "--model.lr_scheduler CosineAnnealingLR --model.lr_scheduler.T_max 4"
CYCLE = (
    "--model.lr_scheduler OneCycleLR --model.lr_scheduler.total_steps 12"
    " --model.lr_scheduler.max_lr"
)
SCHEDULES = {
    "none": ("--model.lr 0.002", "--model.lr 0.0005"),
    "other options": (
        "--model.optimizer AdamW",
        "--model.optimizer AdamW --model.optimizer.weight_decay 0.5",
    ),
    "StepLR": (f"{STEP} --model.lr 0.002", f"{STEP} --model.lr 0.0005"),
    "StepLR, of another step": (STEP, STEP.replace("size 1", "size 2")),
    "cosine": (f"{COSINE} --model.lr 0.002", f"{COSINE} --model.lr 0.0005"),
    "OneCycle": (f"{CYCLE} 0.002", f"{CYCLE} 0.0005"),
}
SHORT = " --trainer.logger false --trainer.log_every_n_steps 1 --trainer.limit_train_batches 3"
DETAILED = (
    f"{SHORT} --callbacks.lr_monitor.log_weight_decay true --callbacks.lr_monitor.log_momentum true"
)


def test_a_moved_run_is_evaluated_from_anywhere_by_every_verb(
    trained: Path, command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "else-where")
    monkeypatch.chdir(tmp_path)
    (best,) = (tmp_path / "else-where").glob("checkpoints/epoch*")
    for reference, file in {
        "else-where": best.name,
        "else-where:last": "last.ckpt",
        str(best): best.name,
    }.items():
        for verb in ("validate", "test", "predict"):
            outcome = command(f"{verb} --ckpt_path {reference}")
            assert (outcome.code, outcome.err) == (0, ""), outcome.err
            assert f"from     else-where/checkpoints/{file}\n" in outcome.out


@pytest.mark.parametrize(
    ("schedule", "way"), [*((name, "--resume") for name in SCHEDULES), ("cosine", "--ckpt_path")]
)
def test_new_options_of_the_optimizer_act_as_in_a_fresh_run_and_its_moments_stay(
    schedule: str, way: str, command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = SCHEDULES[schedule]
    old = command(f"fit --config @digits --trainer.max_epochs 2{DETAILED} {before}").run
    fresh = command(f"fit --config @digits --trainer.max_epochs 3{DETAILED} {after}").run
    assert old is not None
    assert fresh is not None
    saved = torch.load(old / "checkpoints" / "last.ckpt", weights_only=True)
    moments = saved["optimizer_states"][0]["state"]
    seen = str(tmp_path / "seen.pt")
    (tmp_path / "moments.py").write_text(
        "import torch\nfrom lightning.pytorch import Callback\n\n\nclass Moments(Callback):\n"
        "    def on_train_start(self, trainer, pl_module):\n"
        f"        torch.save(trainer.optimizers[0].state_dict()['state'], {seen!r})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = f"fit {way} {old.name}:last" if way == "--ckpt_path" else f"fit {way} {old.name}"
    outcome = command(f"{line} --trainer.max_epochs 3 {after} --trainer.callbacks+ moments.Moments")
    sys.modules.pop("moments")
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    assert all(
        torch.equal(seen[n][name], moments[n][name])
        for n in moments
        for name in ("exp_avg", "exp_avg_sq")
    )
    options = [name for name in rows(fresh)[0] if name.startswith("lr-")]
    assert len(options) == 3

    def later(run: Path) -> list[list[str]]:
        return [
            [row[name] for name in options]
            for row in rows(run)
            if row[options[0]] and int(row["step"]) > 5
        ]

    assert later(outcome.run or old) == later(fresh) != []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("", "--model.optimizer SGD", "expected AdamW, as it was saved, got SGD"),
        ("", COSINE, "expected AdamW, as it was saved, got AdamW and CosineAnnealingLR each epoch"),
        (
            STEP,
            f"{CYCLE} 0.1",
            "expected AdamW and StepLR each epoch, .*, got AdamW and OneCycleLR each step",
        ),
        (
            f"{CYCLE} 0.1",
            f"{CYCLE} 0.1 --model.lr_scheduler.total_steps 5",
            "OneCycleLR: Tried to step .* times.*",
        ),
        (
            "--model.lr_scheduler lightning.pytorch.cli.ReduceLROnPlateau"
            " --model.lr_scheduler.monitor val/loss",
            "--model.lr 0.5",
            "ReduceLROnPlateau: cannot resume with a new learning rate; see --init_from",
        ),
        (
            "",
            "--model.width 16",
            r"the checkpoint does not fit Classifier: size mismatch for \S+: .* \(and \d+ more\)",
        ),
    ],
)
def test_what_a_run_cannot_go_on_with_is_one_line(
    before: str, after: str, said: str, command: Commands
) -> None:
    run = command(f"fit --config @digits --trainer.max_epochs 2{SHORT} {before}").run
    assert run is not None
    files = [run / name for name in ("checkpoints/last.ckpt", "config.yaml", "metrics.csv")]
    before_it = [file.read_bytes() for file in files]
    outcome = command(f"fit --resume {run.name} --trainer.max_epochs 3 {after}")
    assert (outcome.code, outcome.error) == (2, None)
    assert re.fullmatch(rf"error: .*{said}.*\n", outcome.err), outcome.err
    assert [file.read_bytes() for file in files] == before_it


def test_a_new_patience_takes_effect(half: Path, command: Commands) -> None:
    line = f"fit --resume {half.name} --trainer.max_epochs 9 --model.lr 0"
    line += " --callbacks.early_stopping.patience 1"
    assert "stopped  after epoch" in command(line).out


def test_a_finished_run_that_is_resumed_says_so(half: Path, command: Commands) -> None:
    outcome = command(f"fit --resume {half.name}")
    assert (outcome.code, outcome.err) == (0, "")
    assert "done     nothing was left to train after step 38" in outcome.out


@pytest.mark.parametrize("count", ["SLURM_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"])
def test_a_restart_goes_on_and_any_other_second_start_is_refused(
    half: Path, command: Commands, monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", half.name)
    line = "fit --config @digits --trainer.max_epochs 3 --trainer.logger false"
    line += " --trainer.log_every_n_steps 1"
    refused = command(line)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert re.search(rf"fit --resume \S*{half.name}$", refused.err, re.MULTILINE)
    monkeypatch.setenv(count, "0")
    assert command(line).code == 2
    monkeypatch.setenv(count, "1")
    assert command(line).code == 0
    assert [int(row["step"]) for row in rows(half) if row["train/loss"]] == list(range(3 * 19))
    other = command("fit --resume " + half.name.replace("r", "x"))
    assert other.code == 2
    assert f"did you mean {half.name}?" in other.err
    monkeypatch.setenv("WANDB_RUN_ID", "another-1")
    unlike = command(f"fit --resume {half.name}")
    assert unlike.err == f"error: --resume names {half.name}, WANDB_RUN_ID names another-1\n"


def test_a_broken_last_checkpoint_is_passed_over(half: Path, command: Commands) -> None:
    last = half / "checkpoints" / "last.ckpt"
    cut = last.read_bytes()[:1000]
    last.unlink()  # the best one may be the same file
    last.write_bytes(cut)
    outcome = command(f"fit --resume {half.name} --trainer.max_epochs 3")
    assert outcome.code == 0
    assert re.fullmatch(
        r"warning: \S+last.ckpt is broken, \S+epoch-\S+ is the newest complete one\n", outcome.err
    )


def test_wandb_knows_a_resumed_run_by_its_id(command: Commands) -> None:
    logger = "--trainer.logger odd_duck.engine.wandb_logger.RunWandbLogger"  # over false
    run = command(f"fit --config @digits --config @debug {logger}").run
    assert run is not None
    assert command(f"fit --resume {run.name} --trainer.max_epochs 3").code == 0
    logs = sorted(run.glob("wandb/*run-*/*.wandb"))
    assert [log.name for log in logs] == [f"run-{run.name}.wandb"] * 2


def test_a_run_that_lives_is_left_alone_and_one_that_was_killed_goes_on(
    command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "fit --config configs/digits.yaml --trainer.max_epochs 999 --trainer.logger false"
    with subprocess.Popen(
        [
            sys.executable,
            "main.py",
            *line.split(),
            "--callbacks.early_stopping",
            "null",
            "--runs_root",
            tmp_path,
        ],
        cwd=command.project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert any(printed.startswith("epoch 2 ") for printed in process.stdout)
        (run,) = tmp_path.iterdir()
        second = command(f"fit --resume {run} --trainer.max_epochs 1")
        monkeypatch.setenv("WANDB_RUN_ID", run.name)
        joined = command(f"test --ckpt_path {run} --runs_root {tmp_path}")
        monkeypatch.delenv("WANDB_RUN_ID")
        assert process.poll() is None
        process.kill()
    assert (second.code, second.err) == (
        2,
        f"error: run {run.name}: another process is at work on it\n",
    )
    assert (joined.code, joined.err) == (second.code, second.err)
    before = rows(run)
    outcome = command(
        f"fit --resume {run} --trainer.limit_train_batches 19 --trainer.max_steps {1 + 19 * 10}"
    )
    assert (outcome.code, outcome.error) == (0, None), outcome.err
    assert rows(run)[: len(before)] == before
    assert sorted(file.name for file in (run / "checkpoints").iterdir())[-1] == "last.ckpt"
