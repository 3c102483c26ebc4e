"""The same numbers on any number of ranks, for data of any size, and for one shared batch."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from bakery import environment
from conftest import Bake
from test_launchers import TORCHRUN

SIZES = (1, 2, 3, 5, 37)
VERBS = ("validate", "test", "predict")
# What a team writes, with no word of ranks. BatchNorm has buffers, which DDP sends around; a float
# is logged as users do.
SMALL = """
import torch
from my_project.data import Digits, Images
from my_project.model import Classifier
from torch import nn

class Few(Digits):
    def __init__(self, evaluated: int = 37, parts: int = 1, trained: int = 48, **options):
        super().__init__(**options)
        self.evaluated, self.parts, self.trained = evaluated, parts, trained

    def setup(self, stage):
        super().setup(stage)
        self.train = Images(*self.train[: self.trained])
        self.val, self.test = (Images(*part[: self.evaluated]) for part in (self.val, self.test))

    def val_dataloader(self):
        loaders = [super(Few, self).val_dataloader() for _ in range(self.parts)]
        return loaders if self.parts > 1 else loaders[0]

class Normed(Classifier):
    def __init__(self, norm: bool = True, **options):
        super().__init__(**options)
        if norm:
            self.network.insert(1, nn.BatchNorm2d(self.network[0].out_channels))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        self.log("val/brightness", batch[0].mean(), sync_dist=True, batch_size=len(batch[0]))

class Plain(Normed):
    def __init__(self, **options):
        super().__init__(norm=False, **options)
"""
COMMANDS = """
import os, sys
from main import main

for line in open(sys.argv[1]).read().splitlines():
    run, *words = line.split()
    os.environ["WANDB_RUN_ID"] = run
    ranks = os.environ.get("WORLD_SIZE", "1")
    main([*words, "--trainer.accelerator", "cpu", "--trainer.devices", ranks])
"""
FIT = (
    "fit --config configs/digits.yaml --model small.{model} "
    "--data small.Few --data.evaluated {size} --data.parts {parts} --data.batch_size {batch} "
    "--callbacks.checkpoint null --callbacks.early_stopping null --callbacks.summaries null "
    "--trainer.logger false "
    "--trainer.max_epochs 2 --model.width 4 --trainer.log_every_n_steps 1 "
)


def values(run: Path, table: str = "metrics.csv") -> list[dict[str, float]]:
    with (run / table).open() as stream:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(stream)
        ]


@pytest.fixture(scope="module")
def runs(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 1, 2 and 3 ranks make of the same commands, many in one process to save seconds."""
    home = tmp_path_factory.mktemp("exact")
    project = bake(home)
    (project / "small.py").write_text(SMALL)
    (project / "commands.py").write_text(COMMANDS)
    env = environment(home) | {"OMP_NUM_THREADS": "1", "RUNS_ROOT": str(home / "runs")}

    def carry_out(ranks: int, lines: list[str]) -> None:
        (project / f"{ranks}.txt").write_text("\n".join(lines))
        words = [*TORCHRUN, str(ranks), "--standalone"] if ranks > 1 else [sys.executable]
        process = subprocess.Popen(
            [*words, "commands.py", f"{ranks}.txt"],
            cwd=project,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            screen = process.communicate(timeout=300)[0]
        finally:
            process.kill()  # and with it, its ranks
        assert not process.returncode, screen

    trained = [
        f"{{}}ranks-{size} "
        + FIT.format(model="Normed", size=size, parts=2 if size == 3 else 1, batch=4)
        for size in SIZES
    ]
    for ranks in (2, 3):
        again = [
            f"{ranks}ranks-{size}-{verb} {verb} --ckpt_path {ranks}ranks-{size}:last"
            for size in SIZES
            for verb in VERBS
        ]
        shared = f"{ranks}ranks-shared " + FIT.format(
            model="Plain", size=37, parts=1, batch=12 // ranks
        )
        shared += "--model.dropout 0 --model.optimizer SGD"
        carry_out(ranks, [line.format(ranks) for line in trained] + [*again, shared])
    alone = [
        f"alone-{ranks}-{size}-{verb} {verb} --ckpt_path {ranks}ranks-{size}:last"
        for ranks in (2, 3)
        for size in SIZES
        for verb in VERBS
    ]
    shared = "1ranks-shared " + FIT.format(model="Plain", size=37, parts=1, batch=12)
    carry_out(1, [*alone, shared + "--model.dropout 0 --model.optimizer SGD"])
    return home / "runs"


def assert_close(one: dict[str, float], other: dict[str, float], within: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value == pytest.approx(other[name], abs=within, rel=0), name


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_evaluating_gives_what_one_rank_gives(runs: Path, ranks: int, size: int, verb: str) -> None:
    (alone,), (together,) = (
        values(runs / f"alone-{ranks}-{size}-{verb}"),
        values(runs / f"{ranks}ranks-{size}-{verb}"),
    )
    assert_close(alone, together)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_predicting_gives_each_sample_once_and_in_order(runs: Path, ranks: int, size: int) -> None:
    alone = values(runs / f"alone-{ranks}-{size}-predict", "predictions.csv")
    together = values(runs / f"{ranks}ranks-{size}-predict", "predictions.csv")
    assert [row["index"] for row in alone] == list(range(size))
    for one, other in zip(alone, together, strict=True):
        assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_validating_within_fit_gives_what_one_rank_gives(runs: Path, ranks: int, size: int) -> None:
    (alone,) = values(runs / f"alone-{ranks}-{size}-validate")
    rows = [
        row
        for row in values(runs / f"{ranks}ranks-{size}")
        if any(name.startswith("val/") for name in row)
    ]
    assert len(rows) == 2
    names = {name for name in alone if name.startswith("val/")}
    assert names == {"val/acc", "val/loss", "val/brightness"} or size == 3
    assert_close({name: alone[name] for name in names}, {name: rows[-1][name] for name in names})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_share_a_batch_train_as_one_that_has_it_all(runs: Path, ranks: int) -> None:
    alone, together = values(runs / "1ranks-shared"), values(runs / f"{ranks}ranks-shared")
    rows = [(one, other) for one, other in zip(alone, together, strict=True) if "val/loss" in one]
    assert len(rows) == 2
    for one, other in rows:
        assert_close(one, other, within=1e-5)
