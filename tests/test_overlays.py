"""Overlays do what they say: as far as a CPU can go, and one line where it cannot."""

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Commands
from conftest import Bake, Run
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

BRIEF = "--trainer.logger false --callbacks.early_stopping null --trainer.log_every_n_steps 1"
# torch's FSDP trains on a CPU if it is told to. It does not copy what it then gathers: the second
# half does.
SHARDED = """
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig
from torch.distributed.fsdp import OptimStateKeyType, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

class OnCpu(FSDPStrategy):
    def _setup_model(self, model):
        options = {"sharding_strategy": self.sharding_strategy, **self.kwargs}
        return FSDP(model, device_id=torch.device("cpu"), **options)

    def whole(self):
        configs = FullStateDictConfig(), FullOptimStateDictConfig(rank0_only=True)
        return FSDP.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, *configs)

    def lightning_module_state_dict(self):
        with self.whole():
            return self.model.state_dict()

    def optimizer_state(self, optimizer):
        with self.whole():
            state = FSDP.optim_state_dict(self.model, getattr(optimizer, "optimizer", optimizer))
            if self.global_rank:
                return state
            return FSDP.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, self.model)
"""


class Late(SingleDeviceStrategy):
    """Restore as strategies for sharded models do: after callbacks have seen the fit start."""

    restore_checkpoint_after_setup = True


class Kinds(Callback):
    """What a step computes with."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, torch.dtype]] = SEEN

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network: Any = pl_module.network
        network.register_forward_hook(lambda _, __, output: self.seen.add(("output", output.dtype)))

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self.seen |= {("weights", weight.dtype) for weight in pl_module.parameters()}
        self.seen |= {("optimizer", state["exp_avg"].dtype) for state in optimizer.state.values()}


SEEN: set[tuple[str, torch.dtype]] = set()


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_mixed_precision_multiplies_in_bfloat16_keeps_weights_in_32_bits_and_learns(
    command: Commands,
) -> None:
    SEEN.clear()
    flags = "--trainer.max_epochs 8 --trainer.callbacks+=test_overlays.Kinds --compile false"
    outcome = command(f"fit --config @digits --config @gpu {BRIEF} {flags}")
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    assert {
        ("output", torch.bfloat16),
        ("weights", torch.float32),
        ("optimizer", torch.float32),
    } == SEEN
    assert outcome.run is not None
    assert max(float(row["val/acc"]) for row in rows(outcome.run) if row["val/acc"]) > 0.94


COMPILED = """
class Compiled(Callback):
    def on_train_start(self, trainer, pl_module):
        parts = pl_module.named_children()
        names = [name for name, part in parts if part._compiled_call_impl is not None]
        print(f"compiled {names} {torch.get_float32_matmul_precision()}")
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles by a C++ compiler")
def test_a_compiled_model_learns_the_same_and_leaves_checkpoints_that_need_no_compiler(
    bake: Bake, run: Run, tmp_path: Path
) -> None:
    project = bake(tmp_path)
    (project / "seen.py").write_text(
        f"import torch\nfrom lightning.pytorch import Callback\n{COMPILED}"
    )
    fit = f"main.py fit --config configs/digits.yaml {BRIEF} --trainer.max_epochs 1 "
    # Without dropout, since a compiled one draws otherwise.
    fit += (
        "--trainer.limit_train_batches 8 --model.dropout 0 --model.optimizer SGD --model.lr 0.05 "
    )
    for name, options in {
        "plain": "",
        "compiled": "--compile true --matmul_precision high",
    }.items():
        words = f"{fit}{options} --trainer.callbacks+ seen.Compiled".split()
        screen = run(
            sys.executable, *words, cwd=project, WANDB_RUN_ID=name, RUNS_ROOT=str(tmp_path / "runs")
        )
        assert ("compiled ['network'] high" in screen) == (name == "compiled"), screen
    states = [
        torch.load(tmp_path / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)[
            "state_dict"
        ]
        for name in ("plain", "compiled")
    ]
    assert states[0].keys() == states[1].keys()
    for name, weights in states[0].items():
        torch.testing.assert_close(weights, states[1][name], atol=1e-4, rtol=1e-3)
    again = "--resume compiled --trainer.max_epochs 2 --compile false"
    run(
        sys.executable,
        "main.py",
        "fit",
        *again.split(),
        cwd=project,
        RUNS_ROOT=str(tmp_path / "runs"),
    )


def test_without_a_gpu_a_sharded_model_is_refused_in_one_line(command: Commands) -> None:
    outcome = command("fit --config @digits --config @fsdp --trainer.accelerator cpu")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert "`fsdp` requires a GPU" in outcome.err
    wrong = command("fit --config @digits --config @fsdp --trainer.strategy.sharding_strategy SOME")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1), wrong.err
    assert wrong.err.startswith("error: --trainer.strategy.sharding_strategy: ")


def test_a_run_whose_strategy_restores_late_keeps_its_rows_and_its_learning_rate(
    command: Commands,
) -> None:
    late = "--trainer.strategy test_overlays.Late --trainer.strategy.device cpu"
    late += " --trainer.accelerator cpu"
    whole = command(f"fit --config @digits {late} {BRIEF} --trainer.max_epochs 3").run
    part = command(f"fit --config @digits {late} {BRIEF} --trainer.max_epochs 2").run
    assert whole is not None
    assert part is not None
    refused = command(f"fit --resume {part.name} --trainer.max_epochs 3 --model.lr 0.5")
    assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
    assert refused.err.startswith("error: Late cannot resume with new optimizer options; ")
    assert command(f"fit --resume {part.name} --trainer.max_epochs 3").code == 0
    assert rows(part) == rows(whole)


@pytest.mark.slow
def test_a_sharded_model_leaves_checkpoints_like_any_other_and_goes_on_from_them(
    bake: Bake, run: Run, tmp_path: Path
) -> None:
    """Two ranks, sharded, equal two of DDP, also when resumed, and are tested on one device."""
    project = bake(tmp_path)
    (project / "sharded.py").write_text(SHARDED)

    def ran(name: str, words: str) -> Path:
        given = {"OMP_NUM_THREADS": "1", "RUNS_ROOT": str(tmp_path / "runs"), "WANDB_RUN_ID": name}
        run(sys.executable, "main.py", *words.split(), cwd=project, **given)
        return tmp_path / "runs" / name

    momentum = "--model.optimizer SGD --model.optimizer.momentum 0.9 --model.lr 0.1"
    two = f"fit --config configs/digits.yaml {BRIEF} {momentum} --trainer.accelerator cpu"
    two += " --trainer.devices 2"
    wrapped = "--trainer.strategy.auto_wrap_policy [torch.nn.Conv2d,torch.nn.Linear]"
    ddp = ran("r-ddp", f"{two} --trainer.max_epochs 2")
    ran("r-fsdp", f"{two} --trainer.strategy sharded.OnCpu {wrapped} --trainer.max_epochs 1")
    fsdp = ran("r-fsdp", "fit --resume r-fsdp --trainer.max_epochs 2")
    assert rows(fsdp) == rows(ddp)
    ours, theirs = (
        torch.load(one / "checkpoints" / "last.ckpt", weights_only=True) for one in (fsdp, ddp)
    )
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    one = "--trainer.devices 1 --trainer.strategy auto"
    tested = [
        rows(ran(f"t-{name}", f"test --ckpt_path {name} {one}")) for name in ("r-fsdp", "r-ddp")
    ]
    assert tested[0] == tested[1]
