"""A mistake is one line with the option, what was expected, what came, the nearest right name."""

import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Commands
from conftest import Run

FIT = "fit --config @digits "

COMMANDS = {
    "": r"expected a subcommand \(fit, validate, test, predict, sync, runs\), got nothing",
    "sync --entit x": r"sync: expected runs, --runs_root, --entity or --project, got --entit",
    "fti --config @digits": r"expected a subcommand .*, got fti; did you mean fit\?",
    "--config @digits fit": r"expected a subcommand .*, got --config, which comes after it",
    "fit --config": r"--config: expected one argument",
    "test --ckpt_path": r"--ckpt_path: expected one argument",
    "fit": r"--model: missing; give a configuration, such as --config configs/digits.yaml",
    "test --config @digits": r"test: expected --ckpt_path RUN",
    "validate --config @digits": r"validate: expected --ckpt_path RUN",
    "predict --config @digits": r"predict: expected --ckpt_path RUN",
    "test --ckpt_path @digits": r"digits.yaml: not a checkpoint that can be read",
}
FLAGS = {  # after FIT
    "--trainer.max_epoch 1": (
        r"--trainer.max_epoch: no such option; did you mean trainer.max_epochs\?"
    ),
    "--trainer.max_epochs abc": r"--trainer.max_epochs: expected int or null, got abc",
    "--model.lrr 1": r"--model.lrr: no such option; did you mean lr\?",
    "--model.init_args.lrr=1": r"--model.init_args.lrr: no such option; did you mean lr\?",
    "--model.lr abc": r"--model.lr: expected float, got abc",
    "--model.optimizer Adan": r"--model.optimizer: no class Adan; did you mean Adam\?",
    "--callbacks.checkpoint.save_topk 3": (
        r"--callbacks.checkpoint.save_topk: no such option; .* save_top_k\?"
    ),
    "--callbacks.checkpont null": (
        r"--callbacks.checkpont: no such option; did you mean callbacks.checkpoint\?"
    ),
    "--trainer.logger.porject x": (
        r"--trainer.logger.porject: no such option; did you mean project\?"
    ),
    "--trainer.accelerator cppu": r"accelerator='cppu'.* cpu",
    "--trainer 3": r"--trainer: .*3",
    "--trainer.max_epochs=": r"--trainer.max_epochs: expected int or null, got nothing",
    "--trainer.val_check_interval 100": r"val_check_interval.*19",
    "--trainer.callbacks EarlyStopping": r"--trainer.callbacks: missing: monitor",
    "--model.lr_scheduler CosineAnnealingLR": r"--model.lr_scheduler: missing: T_max",
    "--model.lr": r"expected one argument",
    "--ckpt_path=": r"--ckpt_path: expected a checkpoint file, RUN or RUN:last",
    "--ckpt_path wandb:a/b": (
        r"--ckpt_path: expected wandb:ENTITY/PROJECT/NAME:ALIAS, got wandb:a/b"
    ),
    "--resume 123": r"--resume: expected a run, got 123",
    "--init_from last": r"--init_from: expected a checkpoint file, RUN or RUN:last, got last",
    "extra": r"unrecognized arguments: extra",
    # classes
    "--model Clasifier": r"--model: no class Clasifier; did you mean Classifier\?",
    "--model odd_duck.model.Clasifier": (
        r"--model: no class odd_duck.model.Clasifier .*; .* Classifier\?"
    ),
    "--model odd_duc.model.Classifier": (
        r"no class odd_duc.model.Classifier \(No module named 'odd_duc'\)"
    ),
    "--model Zyxwv": r"--model: no class Zyxwv; a class that is not in .*path",
    "--lr 0.1": r"--lr: no such option; did you mean model.lr\?",
    "--batch_size 3": r"--batch_size: no such option; did you mean data.batch_size\?",
    "--model mistaken.Outer --model.inner mistaken.Iner": (
        r"--model.inner: no class mistaken.Iner \(module 'mistaken' has no attribute 'Iner'\)"
    ),
    "--model mistaken.Outer --model.inner mistaken.Other": (
        r"--model.inner: expected Inner, got mistaken.Other"
    ),
    "--model mistaken.Outer --model.inner mistaken.Inner --model.inner.sise 3": (
        r"--model.inner.sise: no such option; did you mean size\?"
    ),
    "--model mistaken_syntax.Outer": (
        r"--model: mistaken_syntax.Outer cannot be imported: \S+mistaken_syntax.py, line 2: inv"
    ),
    "--model mistaken_import.Outer": (
        r"--model: mistaken_import.Outer cannot be imported: ZeroDivisionError: division by zero"
    ),
    "--model mistaken_old.Old": (
        r"--model: expected a class of lightning.pytorch, got mistaken_old.Old of pytorch_lightning"
    ),
    "--trainer.logger CSVLoger": r"--trainer.logger: no class CSVLoger; did you mean CSVLogger\?",
    # checkpoints
    "--ckpt_path last": r"--ckpt_path last: run \S+ is new and has no checkpoint; expected a check",
    "--ckpt_path best": r"--ckpt_path best: run \S+ is new and has no checkpoint; expected a check",
    "--ckpt_path hpc": r"--ckpt_path hpc: run \S+ is new and has no checkpoint; expected a check",
    "--ckpt_path nowhere": r"--ckpt_path: expected a checkpoint file, RUN or RUN:last, got nowhere",
    # names of metrics
    "--callbacks.checkpoint.monitor val/accu": (
        r"callbacks.checkpoint.monitor: no metric named val/accu was logged.* val/acc\?"
    ),
    "--callbacks.checkpoint.monitor val/accu --trainer.fast_dev_run true": (
        r"no metric named val/accu was logged.* val/acc\?"
    ),
    "--callbacks.checkpoint.monitor val/accu --trainer.num_sanity_val_steps 0": (
        r"no metric named val/accu was logged"
    ),
    "--callbacks.early_stopping.strict true --callbacks.early_stopping.monitor train/los": (
        r"callbacks.early_stopping.monitor: .* train/loss\?"
    ),
    "--model.lr_scheduler lightning.pytorch.cli.ReduceLROnPlateau"
    " --model.lr_scheduler.monitor val/los": (
        r"ReduceLROnPlateau.monitor: no metric named val/los was logged; .*;"
        r" did you mean val/loss\?"
    ),
    # Lightning's own
    "--callbacks.checkpoint.monitor null --callbacks.checkpoint.save_top_k 3": (
        r"save_top_k=3.*not a valid"
    ),
}
MISTAKES = COMMANDS | {FIT + flags: expected for flags, expected in FLAGS.items()}

FILES = {
    "trainer:\n  max_epoch: 3\n": (
        r"file.yaml: trainer.max_epoch: no such option; did you mean trainer.max_epochs\?"
    ),
    "modle:\n  lr: 3\n": r"file.yaml: modle.lr: no such option; did you mean model\?",
    "data:\n  init_args:\n    batch_sze: 3\n": (
        r"file.yaml: data.init_args.batch_sze: no such option; .* batch_size\?"
    ),
    "data:\n  init_args:\n    batch_size: many\n": (
        r"file.yaml: data.init_args.batch_size: expected int, got many"
    ),
    "model:\n  class_path: Clasifier\n": (
        r"file.yaml: model: no class Clasifier; did you mean Classifier\?"
    ),
    "trainer:\n#  max_epochs: 3\n": r"file.yaml: trainer: expected options, got None",
    "model:\n  class_path: Classifier\n  lr: 0.3\n": r"file.yaml: model.class_path: .* init_args",
    "ckpt_path: some.ckpt\n": (
        r"--ckpt_path: expected a checkpoint file, RUN or RUN:last, got some.ckpt"
    ),
    "resume: some\n": r"--resume: expected a run, got some",
    "trainer: 3\n": r"file.yaml: trainer: expected options, got 3",
    # An id that YAML reads as a number.
    "trainer:\n  logger:\n    class_path: odd_duck.engine.wandb_logger.RunWandbLogger\n"
    "    init_args:\n      group: 123\n": (
        r"file.yaml: trainer.logger.init_args.group: expected str or null, got 123"
    ),
    "trainer:\n  of_a_later_release: 3\n": r"file.yaml: trainer.of_a_later_release: no such option",
    "trainer:\n  - a\n b: c\n": r"file.yaml, line 3: ",
    "- a\n": r"file.yaml: expected sections such as `model:`, got \['a'\]",
    "": r"file.yaml: expected sections such as `model:`, got None",
}


def assert_one_line(err: str, code: int, expected: str) -> None:
    assert code == 2, err
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert re.search(expected, err)


FILES_OF_CODE = {
    "mistaken": """
from odd_duck.model import Classifier

class Inner:
    def __init__(self, size: int = 3):
        pass

class Other:
    pass

class Outer(Classifier):
    def __init__(self, inner: Inner, num_classes: int = 10):
        super().__init__(num_classes=num_classes)
""",
    "mistaken_syntax": "import torch\nclass Outer(:\n",
    "mistaken_import": "1 / 0\nclass Outer: pass\n",
    # As the package of that name has it, with classes that are not those of lightning.pytorch.
    "pytorch_lightning": "class LightningModule:\n    pass\n",
    "mistaken_old": "import pytorch_lightning as pl\n\nclass Old(pl.LightningModule):\n    pass\n",
}


@pytest.fixture(scope="module", autouse=True)
def code(command: Commands) -> Iterator[None]:
    for name, text in FILES_OF_CODE.items():
        (command.project / f"{name}.py").write_text(text.lstrip())
    yield
    sys.modules.pop("pytorch_lightning", None)  # libraries look for it


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line(line: str, command: Commands) -> None:
    offline = " --trainer.logger.offline true"
    outcome = command(line + offline * (line.startswith(FIT) and ".logger" not in line))
    assert_one_line(outcome.err, outcome.code, MISTAKES[line])
    assert outcome.out.count("\n") <= 8, outcome.out


@pytest.mark.parametrize("name", ["val/accu", "vall/acc", "val/accuracy"])
def test_a_typo_in_a_monitor_is_said_before_the_first_step_and_ends_the_run_after_an_epoch(
    name: str, command: Commands
) -> None:
    outcome = command(f"{FIT} --callbacks.checkpoint.monitor {name} --trainer.logger false")
    problem = f"no metric named {name} was logged; .*; did you mean val/acc"
    assert_one_line(outcome.err, outcome.code, problem)
    hint, _, epochs = outcome.out.partition("epoch 0")
    if name.startswith("val/"):
        assert re.search(f"metrics  callbacks.checkpoint.monitor: {problem}", hint)
    assert "epoch 1" not in epochs


@pytest.mark.parametrize("content", FILES)
def test_a_mistake_in_a_file_is_one_line_that_names_the_file(
    content: str, command: Commands, tmp_path: Path
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(content)
    outcome = command(["fit", "--config", "@digits", "--config", str(file)])
    assert_one_line(outcome.err, outcome.code, FILES[content])
    assert outcome.run is None


def test_a_missing_file_is_one_line_that_names_the_nearest(command: Commands) -> None:
    outcome = command("fit --config @digit")
    assert_one_line(
        outcome.err, outcome.code, r"configs/digit.yaml: no such file; did you mean digits.yaml\?"
    )


@pytest.mark.parametrize("content", [None, "trainer: [\n", ""], ids=["missing", "broken", "empty"])
def test_no_run_starts_without_its_defaults(content: str | None, command: Commands) -> None:
    defaults = command.project / "configs" / "defaults.yaml"
    kept = defaults.read_text()
    try:
        if content is None:
            defaults.unlink()
        else:
            defaults.write_text(content)
        outcome = command(FIT)
    finally:
        defaults.write_text(kept)
    assert_one_line(outcome.err, outcome.code, r"defaults.yaml")
    assert outcome.run is None


BROKEN = """
from lightning.pytorch.demos.boring_classes import BoringModel, BoringDataModule, RandomDataset
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

class Constructor(BoringModel):
    def __init__(self, size: int = 3):
        raise ValueError("size is wrong")

class Misconfigured(BoringModel):
    def training_step(self, batch, batch_idx):
        raise MisconfigurationException("my own word")

class Hook(BoringModel):
    def training_step(self, batch, batch_idx):
        raise KeyError("no such thing")

class Data(RandomDataset):
    def __getitem__(self, index):
        raise TypeError("bad sample")

class Worker(BoringDataModule):
    def train_dataloader(self):
        return DataLoader(Data(32, 64), num_workers=1)
"""
UNWATCHED = (
    "--callbacks.checkpoint.monitor null --callbacks.early_stopping null --callbacks.summaries null"
)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    file = tmp_path_factory.mktemp("users") / "broken.py"
    file.write_text(BROKEN)
    with pytest.MonkeyPatch.context() as path:
        path.syspath_prepend(file.parent)
        yield file


@pytest.mark.parametrize(
    ("model", "data", "line"),
    [
        (
            "broken.Constructor",
            "lightning.pytorch.demos.boring_classes.BoringDataModule",
            "size is wrong",
        ),
        ("broken.Hook", "lightning.pytorch.demos.boring_classes.BoringDataModule", "no such thing"),
        (
            "broken.Misconfigured",
            "lightning.pytorch.demos.boring_classes.BoringDataModule",
            "my own word",
        ),
        ("lightning.pytorch.demos.boring_classes.BoringModel", "broken.Worker", "bad sample"),
    ],
    ids=["constructor", "hook", "their word for a mistake", "data worker"],
)
def test_an_exception_of_the_users_code_ends_with_their_line(
    model: str, data: str, line: str, command: Commands, broken: Path
) -> None:
    outcome = command(f"fit --model {model} --data {data} {UNWATCHED} --trainer.logger false")
    assert outcome.code == 1
    assert outcome.error is not None
    screen = "".join(traceback.format_exception(outcome.error))
    assert line in screen.rstrip().splitlines()[-1]
    files = re.findall(r'File "(.+?)"', screen)
    assert files[-1] == str(broken)
    assert "jsonargparse._" not in screen.rpartition("Traceback")[2]


def test_nothing_is_printed_after_the_users_exception_and_the_exit_code_is_1(
    broken: Path, command: Commands, run: Run
) -> None:
    words = f"fit --model broken.Hook {UNWATCHED}".split()
    screen = run(
        *(sys.executable, command.project / "main.py", *words),
        cwd=broken.parent,
        code=1,
        PYTHONPATH=str(broken.parent),
    )
    assert screen.splitlines()[-1] == "KeyError: 'no such thing'"
    assert screen.count("Traceback") == 1
