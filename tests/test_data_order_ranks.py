"""Loaders of any kind on two real ranks: what each trains on and evaluates, ours beside stock's."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bakery import environment
from conftest import Bake
from test_launchers import TORCHRUN

SCRIPT = """
import json, os, sys, warnings
import numpy
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, SequentialSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from loaders import Bucketed, Data, Endless, Free, Notes, Numbers, loaders
from my_project.engine.distributed import ExactEvaluation
from my_project.engine.train_state import TrainState

warnings.simplefilter("ignore")


class Unseeded(Endless):
    def __init__(self):
        super().__init__()
        self.generator = numpy.random.default_rng()

    def __iter__(self):
        return iter(self.generator.permutation(self.n).tolist())


class KeepsItsIterator(DataLoader):
    # It makes its iterator in its constructor, as the loader of ultralytics does.

    def __init__(self, dataset, **options):
        super().__init__(dataset, **options)
        self.kept = super().__iter__()

    def __iter__(self):
        return iter(list(self.kept) if self.kept else [])


class TwoRanks(Data):
    def train_dataloader(self):
        if self.kind == "a loader with a state":
            return StatefulDataLoader(Numbers(), batch_size=4, shuffle=True)
        if self.kind == "a loader that keeps its iterator":
            return KeepsItsIterator(Numbers(), batch_size=4)
        if self.kind == "unseeded":
            return DataLoader(Numbers(), batch_size=4, sampler=Unseeded())
        return super().train_dataloader()

    def val_dataloader(self):
        own = Bucketed(SequentialSampler(Numbers(20)), 4)
        return [DataLoader(Numbers(20), batch_sampler=own), DataLoader(Numbers(10), batch_size=4)]


class Counts(Notes):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx, dataloader_idx)
        self.log("count", float(len(batch)), reduce_fx="sum", sync_dist=True)


def epochs(kind, ours, workers=0):
    seed_everything(3, verbose=False)
    model = Counts()
    callbacks = [TrainState(), ExactEvaluation()] if ours else []
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=not ours, callbacks=callbacks,
        limit_train_batches=4 if kind == "endless" else 1.0,
    )
    trainer.fit(model, datamodule=TwoRanks(kind, workers))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    rows = [(row[0], row[1], [int(index) for index in row[3][::4]]) for row in model.rows]
    return {"rows": rows, "metrics": metrics}


torch.distributed.init_process_group("gloo")
found = {}
for words in sys.argv[2:]:
    kind, whose, workers = words.split("/")
    try:
        found[words] = epochs(kind, whose == "ours", int(workers))
    except Exception as error:
        found[words] = repr(error)
with open(f"{sys.argv[1]}-{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
"""
SHARED = ("shuffle", "in order", "bucketed", "weighted", "subset", "bucketed by its own order")
OURS = (
    "a loader with a state",
    "a loader that keeps its iterator",
    "arrays",
    "free",
    "texts",
    "slices",
    "token budget",
    "unsized",
    "shuffles",
    "unseeded",
    "no batch size",
    "endless",
    "an incomplete last batch",
)
TASKS = [
    *[f"{kind}/ours/0" for kind in (*SHARED, *OURS)],
    *[f"{kind}/stock/0" for kind in SHARED],
    *[f"{kind}/ours/1" for kind in ("texts", "bucketed")],
]


@pytest.fixture(scope="module")
def ranks(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks make of all tasks, in one start."""
    home = tmp_path_factory.mktemp("ranks")
    project = bake(home)
    (project / "script.py").write_text(SCRIPT)
    (project / "loaders.py").write_text(Path(__file__).with_name("loaders.py").read_text())
    words = [*TORCHRUN, "2", "--standalone", "script.py", str(home / "rank"), *TASKS]
    env = environment(home) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words,
        cwd=project,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return [json.loads((home / f"rank-{rank}.json").read_text()) for rank in range(2)]


def epoch(found: Any, what: str, number: int = 0) -> list[list[int]]:
    assert isinstance(found, dict), found
    return [indices for name, at, indices in found["rows"] if name == what and at == number]


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if "/ours/" in task])
def test_two_ranks_train_on_other_samples_and_on_equally_many_batches(
    task: str, ranks: list[dict[str, Any]]
) -> None:
    for number in (0, 1):
        one, other = (epoch(rank[task], "train", number) for rank in ranks)
        if number and "keeps its iterator" in task:
            continue  # which has only one
        assert len(one) == len(other) > 0
        if not task.startswith(("weighted", "endless")):  # which draw some twice
            both = Counter(index for batch in one + other for index in batch)
            assert both.most_common(1)[0][1] == 1, both


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED)
def test_a_rank_takes_as_many_batches_of_as_many_samples_as_in_stock(
    kind: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        ours, stock = (epoch(rank[f"{kind}/{whose}/0"], "train") for whose in ("ours", "stock"))
        assert [len(batch) for batch in ours] == [len(batch) for batch in stock]


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if "/ours/" in task])
def test_two_ranks_evaluate_each_sample_once_by_any_batch_sampler(
    task: str, ranks: list[dict[str, Any]]
) -> None:
    assert isinstance(ranks[0][task], dict), ranks[0][task]
    for rank in ranks:
        counts = rank[task]["metrics"]
        assert counts["count/dataloader_idx_0"] == 20
        assert counts["count/dataloader_idx_1"] == 10


@pytest.mark.slow
def test_ranks_that_are_spawned_train_and_leave_one_whole_run(bake: Bake, tmp_path: Path) -> None:
    project = bake(tmp_path)
    line = (
        "main.py fit --config configs/digits.yaml --trainer.max_epochs 1"
        " --trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp_spawn"
    )
    env = environment(tmp_path) | {"OMP_NUM_THREADS": "1", "RUNS_ROOT": str(tmp_path / "runs")}
    done = subprocess.run(
        [sys.executable, *line.split()],
        cwd=project,
        env=env | {"WANDB_MODE": "offline"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert "val/acc" in (run / "metrics.csv").read_text()
    assert len(list(run.glob("wandb/offline-run-*/*.wandb"))) == 1
