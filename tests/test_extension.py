"""A team extends the command line as LightningCLI's documentation says; engine/ stays as it is."""

import contextlib
import io
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Commands, Outcome
from conftest import Bake, Run, blocks

TEAM = """
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

import odd_duck.cli
import odd_duck.engine


class Wide(BoringModel):
    def __init__(self, width: int = 3, device: torch.device = torch.device("cpu")):
        super().__init__()
        self.save_hyperparameters()
        self.width = width

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.step(batch))
        self.log("val/acc", 0.5)

    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.log("train/loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        self.log("test/width", float(self.width))


class Kernel:
    '''What no text can stand for.'''


KERNELS = [Kernel()]  # no import path leads to it


class Kernelled(Wide):
    def __init__(self, width: int = 3, kernel: Kernel = KERNELS[0]):
        super().__init__(width)
        self.kernel = kernel


class Needy(Wide):
    def __init__(self, width: int):
        super().__init__(width)


def make(width: int = 3) -> LightningModule:
    return Wide(width)


class Data(BoringDataModule):
    features = 7


class Unknowing(BoringDataModule):
    def __str__(self):
        raise AssertionError("a link asks for the text of the data module, which calls its loaders")


class Marks(Callback):
    def __init__(self, every: int = 1, label: str = "a"):
        self.every, self.label = every, label


class Exporter(Trainer):
    def export(self, model: LightningModule, datamodule=None, opset: int = 17):
        '''Write a model.'''
        print(f"opset {opset} of {type(model).__name__} in {self.default_root_dir}")


class CLI(odd_duck.cli.CLI):
    callbacks = {**odd_duck.cli.CLI.callbacks, "marks": Marks}

    def add_arguments_to_parser(self, parser):
        super().add_arguments_to_parser(parser)
        parser.add_argument("--fold", type=int, default=0, help="Which part validates.")
        parser.link_arguments("data.features", "model.init_args.width", apply_on="instantiate")
        parser.link_arguments("fold", "trainer.check_val_every_n_epoch", lambda fold: fold + 1)

    @staticmethod
    def subcommands():
        return {**odd_duck.cli.CLI.subcommands(), "export": {"model", "datamodule"}}

    def __init__(self, *classes, **options):
        super().__init__(*classes, **{"trainer_class": Exporter, **options})


class Broken(odd_duck.cli.CLI):
    def add_arguments_to_parser(self, parser):
        parser.link_arguments("data.features", "model.no_such_group.width", apply_on="instantiate")
        parser.link_arguments("not_there", "trainer.max_epochs")


class Plain(odd_duck.engine.CLI):
    def add_arguments_to_parser(self, parser):
        parser.link_arguments("data.features", "model.width", apply_on="instantiate")


class Keeps(odd_duck.cli.CLI):
    def add_arguments_to_parser(self, parser):
        parser.add_lightning_class_args(EMAWeightAveraging, "callbacks.averages")
        parser.set_defaults({"callbacks.averages.decay": 0.5})
"""
SHORT = "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1"
OFF = f"{SHORT} --trainer.logger false --trainer.log_every_n_steps 1"
FIT = f"fit --model team.Wide --data team.Data {OFF}"


@pytest.fixture(scope="module")
def team(command: Commands, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("team")
    (folder / "team.py").write_text(TEAM)
    with pytest.MonkeyPatch.context() as path:
        path.syspath_prepend(folder)
        import team  # type: ignore[import-not-found]

        yield team
        del sys.modules["team"]


Extended = Callable[..., tuple[Outcome, Any]]


@pytest.fixture
def cli(command: Commands, team: Any) -> Extended:
    """Run a command of a team's CLI; return how it ended, and the CLI."""

    def run(line: str | list[str], kind: str = "CLI", *classes: Any, **options: Any) -> Any:
        made = []

        def main(words: list[str]) -> None:
            made.append(getattr(team, kind)(*classes, args=words, **options))

        outcome = Commands(main, command.project, command.runs)(line)
        return outcome, (made or [None])[0]

    return run


def config(outcome: Outcome) -> dict[str, Any]:
    assert outcome.run is not None, outcome.err
    return dict(yaml.safe_load((outcome.run / "config.yaml").read_text()))


def works(outcome: Outcome) -> Outcome:
    assert outcome.error is None, outcome.error
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    return outcome


def test_an_argument_of_the_team_reaches_its_link_and_config_yaml(cli: Extended) -> None:
    outcome, made = cli(f"{FIT} --fold 1")
    works(outcome)
    assert made.trainer.check_val_every_n_epoch == 2
    assert config(outcome)["fold"] == 1


def test_a_link_takes_what_the_data_knows_and_yields_to_what_is_given(cli: Extended) -> None:
    outcome, made = cli(FIT)
    works(outcome)
    assert made.model.width == 7
    assert "width" not in config(outcome)["model"]["init_args"]
    outcome, made = cli(f"{FIT} --model.width 5")
    works(outcome)
    assert made.model.width == 5
    assert config(outcome)["model"]["init_args"]["width"] == 5


def test_a_link_leaves_the_models_default_where_the_data_knows_nothing(cli: Extended) -> None:
    outcome, made = cli(f"fit --model team.Wide --data team.Unknowing {OFF}")
    works(outcome)
    assert made.model.width == 3


def test_a_link_without_a_value_for_a_required_argument_is_one_line(cli: Extended) -> None:
    outcome, _ = cli(f"fit --model team.Needy --data team.Unknowing {OFF}")
    expected = r"error: model.width: missing; Unknowing has no features to take it from\n"
    assert outcome.code == 2
    assert re.fullmatch(expected, outcome.err), outcome.err


def test_a_link_to_something_that_is_not_there_is_one_line(cli: Extended) -> None:
    outcome, _ = cli(FIT, "Broken")
    assert outcome.code == 2
    assert re.fullmatch(r"error: link from [^\n]+\n", outcome.err), outcome.err


def test_what_a_team_extends_is_there_again_in_test_in_resume_and_from_config_yaml(
    cli: Extended,
) -> None:
    extended = "--callbacks.marks.label b --callbacks.marks team.Marks --callbacks.marks.every 2"
    outcome, _ = cli(f"{FIT} --fold 1 {extended}")
    run = works(outcome).run
    assert run is not None
    tested, made = cli(f"test --ckpt_path {run.name} --trainer.logger false")
    works(tested)
    assert made.metrics == {"test/width": 7.0}
    assert made.options_parser.get_defaults(skip_validation=True)["fold"] == 0
    resumed, made = cli(f"fit --resume {run.name} --trainer.max_epochs 2")
    works(resumed)
    assert made.run.folder == run
    assert made.trainer.current_epoch == 2
    marks = made.named_callbacks["marks"]
    assert (marks.every, marks.label) == (2, "b")
    again, made = cli(["fit", "--config", str(run / "config.yaml"), "--trainer.max_epochs", "1"])
    works(again)
    assert made.run.folder != run
    assert made.named_callbacks["marks"].every == 2


def test_a_subcommand_of_the_team_runs(cli: Extended, command: Commands) -> None:
    outcome, _ = cli("export --model team.Wide --data team.Data --opset 18 --trainer.logger false")
    works(outcome)
    assert re.search(r"opset 18 of Wide in .*runs|RUNS_ROOT", outcome.out)
    import odd_duck.engine as engine

    trained, _ = cli(FIT)
    assert works(trained).run is not None
    outcome, made = cli(f"export --ckpt_path {trained.run} --trainer.logger false")
    works(outcome)
    assert made.model.width == 7
    assert engine.command(["export"], also=("export",))
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        engine.command(["exprot"], also=("export",))


# Callbacks by name.

AVERAGES = {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.9}}


def test_a_callback_under_a_new_name_is_changed_in_part_by_later_files_and_flags(
    cli: Extended, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(yaml.safe_dump({"callbacks": {"averages": AVERAGES}}))
    second.write_text("callbacks:\n  averages:\n    init_args:\n      update_every_n_steps: 2\n")
    files = f"--config {first} --config {second}"
    outcome, made = cli(f"{FIT} {files} --callbacks.averages.init_args.decay 0.8")
    works(outcome)
    assert type(made.named_callbacks["averages"]).__name__ == "EMAWeightAveraging"
    recorded = config(outcome)["callbacks"]["averages"]
    assert recorded["class_path"] == "lightning.pytorch.callbacks.EMAWeightAveraging"
    assert recorded["init_args"]["decay"] == 0.8
    assert recorded["init_args"]["update_every_n_steps"] == 2
    assert outcome.run is not None
    again, made = cli(f"fit --config {outcome.run / 'config.yaml'} --callbacks.averages null")
    assert works(again).run is not None
    assert "averages" not in made.named_callbacks
    assert "averages" not in config(again)["callbacks"]
    works(cli(f"fit --config {again.run}/config.yaml")[0])


def test_flags_alone_give_a_callback_a_name(cli: Extended) -> None:
    flags = "--callbacks.averages EMAWeightAveraging --callbacks.averages.decay 0.7"
    outcome, _ = cli(f"{FIT} {flags}")
    works(outcome)
    assert config(outcome)["callbacks"]["averages"]["init_args"]["decay"] == 0.7


def test_class_arguments_as_lightningcli_documents_them_are_added_once(cli: Extended) -> None:
    outcome, made = cli(f"{FIT} --callbacks.averages.decay 0.6", "Keeps")
    works(outcome)
    kinds = [type(callback).__name__ for callback in made.trainer.callbacks]
    assert kinds.count("EMAWeightAveraging") == 1
    assert config(outcome)["callbacks"]["averages"]["decay"] == 0.6


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--callbacks.averages.decay 0.9", r"--callbacks.averages: no such option.*class_path"),
        ("--callbacks.chekpoint null", r"did you mean callbacks.checkpoint\?"),
        ("--callbacks.averages EMAWeightAvraging", r"no class EMAWeightAvraging.*Averaging\?"),
        ("--callbacks.averages no.such.Class", r"--callbacks.averages: no class no.such.Class"),
    ],
)
def test_a_name_without_a_class_is_one_line(cli: Extended, flags: str, expected: str) -> None:
    outcome, _ = cli(f"{FIT} {flags}")
    assert outcome.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err), outcome.err
    assert re.search(expected, outcome.err), outcome.err


# One monitor.


def test_one_option_sets_what_checkpoints_stopping_and_summaries_go_by(cli: Extended) -> None:
    outcome, made = cli(f"{FIT} --monitor val/loss --mode min")
    works(outcome)
    named = made.named_callbacks
    for name in ("checkpoint", "early_stopping"):
        assert (named[name].monitor, named[name].mode) == ("val/loss", "min")
    assert named["summaries"].metrics == {"val/loss": "min"}
    recorded = config(outcome)
    assert recorded["callbacks"]["checkpoint"]["init_args"]["monitor"] == "$monitor"
    assert recorded["monitor"] == "val/loss"


def test_each_place_may_still_have_a_monitor_of_its_own(cli: Extended) -> None:
    outcome, made = cli(f"{FIT} --monitor val/loss --mode min --callbacks.early_stopping.mode max")
    works(outcome)
    named = made.named_callbacks
    assert (named["checkpoint"].mode, named["early_stopping"].mode) == ("min", "max")


def test_without_a_monitor_early_stopping_is_off_and_the_newest_checkpoint_is_kept(
    cli: Extended,
) -> None:
    outcome, made = cli(f"{FIT} --monitor null")
    works(outcome)
    assert "early_stopping" not in made.named_callbacks
    assert made.named_callbacks["checkpoint"].monitor is None
    assert made.named_callbacks["summaries"].metrics == {"val/loss": "min"}
    assert outcome.run is not None
    assert len(list(outcome.run.glob("checkpoints/epoch-*.ckpt"))) == 1
    resumed, made = cli(f"fit --resume {outcome.run.name} --trainer.max_epochs 2")
    works(resumed)
    assert "early_stopping" not in made.named_callbacks


# What LightningCLI takes.


def test_a_function_is_a_class_path_and_is_trained_tested_and_resumed(cli: Extended) -> None:
    outcome, made = cli(f"fit --model team.make --data team.Data {OFF} --model.width 4")
    works(outcome)
    assert made.model.width == 4
    assert outcome.run is not None
    tested, made = cli(f"test --ckpt_path {outcome.run.name} --trainer.logger false")
    works(tested)
    assert made.metrics == {"test/width": 4.0}
    works(cli(f"fit --resume {outcome.run.name} --trainer.max_epochs 2")[0])


def test_fixed_classes_need_no_class_path(cli: Extended, team: Any) -> None:
    classes = (team.Wide, team.Data)
    outcome, made = cli(f"fit {OFF}", "Plain", *classes)
    assert outcome.error is None, outcome.error
    assert outcome.code == 0, outcome.err
    assert made.model.width == 7
    assert outcome.run is not None
    tested, made = cli(
        f"test --ckpt_path {outcome.run.name} --trainer.logger false", "Plain", *classes
    )
    assert tested.code == 0, tested.err
    assert made.metrics == {"test/width": 7.0}


def test_a_default_that_yaml_cannot_hold_stays_a_default(cli: Extended, team: Any) -> None:
    outcome, _ = cli(FIT)
    run = works(outcome).run
    assert run is not None
    tested, _ = cli(f"test --ckpt_path {run.name} --trainer.logger false")
    works(tested)
    outcome, made = cli(f"fit --model team.Kernelled --data team.Data {OFF}")
    assert outcome.code == 0, (outcome.err, outcome.error)
    assert made.model.kernel is team.KERNELS[0]
    assert "kernel" not in config(outcome)["model"]["init_args"]
    tested, made = cli(f"test --ckpt_path {outcome.run} --trainer.logger false")
    assert tested.code == 0, (tested.err, tested.error)
    given, made = cli(f"{FIT} --model.device cpu")
    assert str(made.model.hparams.device) == "cpu", given.err


def test_sections_for_optimizer_and_schedule_work_and_are_resumed(
    cli: Extended, tmp_path: Path
) -> None:
    file = tmp_path / "optimizer.yaml"
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9}}
    schedule = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}
    file.write_text(yaml.safe_dump({"optimizer": optimizer, "lr_scheduler": schedule}))
    outcome, made = cli(f"{FIT} --config {file}")
    assert outcome.code == 0, (outcome.err, outcome.error)
    assert type(made.trainer.optimizers[0]).__name__ == "SGD"
    assert made.trainer.optimizers[0].param_groups[0]["lr"] == 0.005
    assert outcome.run is not None
    line = f"fit --resume {outcome.run.name} --trainer.max_epochs 2 --optimizer.lr 0.02"
    resumed, made = cli(line)
    assert resumed.code == 0, (resumed.err, resumed.error)
    assert made.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)


def test_a_section_may_be_a_file(cli: Extended, tmp_path: Path) -> None:
    (tmp_path / "trainer.yaml").write_text("max_epochs: 3\nlog_every_n_steps: 2\n")
    (tmp_path / "model.yaml").write_text("class_path: team.Wide\ninit_args:\n  width: 8\n")
    file = tmp_path / "all.yaml"
    file.write_text("trainer: trainer.yaml\nmodel: model.yaml\n")
    flags = SHORT.replace("--trainer.max_epochs 1 ", "")
    line = f"fit --config {file} --data team.Data {flags} --trainer.logger false"
    outcome, made = cli(line)
    works(outcome)
    assert (made.trainer.max_epochs, made.model.width) == (3, 8)
    assert made.trainer.log_every_n_steps == 2
    shown, _ = cli(f"{line} --print_config=origins")
    assert re.search(r"trainer.max_epochs: 3  # .*all.yaml", shown.out), shown.out


def test_a_file_may_name_the_checkpoint_and_null_names_none(cli: Extended, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("ckpt_path: null\nresume: null\n")
    outcome, _ = cli(f"{FIT} --config {first}")
    assert works(outcome).run is not None
    first.write_text("ckpt_path: nowhere\n")
    second.write_text(f"ckpt_path: {outcome.run}\n")
    tested, made = cli(f"test --config {first} --config {second} --trainer.logger false")
    works(tested)
    assert made.metrics == {"test/width": 7.0}
    assert "ckpt_path" not in config(tested)


def test_jsonnet_is_evaluated(cli: Extended, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonnet"
    (tmp_path / "sizes.libsonnet").write_text("{ width: 9 }")
    file.write_text(
        'local sizes = import "sizes.libsonnet"; '
        '{ model: { class_path: "team.Wide", init_args: { width: sizes.width + 1 } } }'
    )
    outcome, made = cli(f"fit --config {file} --data team.Data {OFF}")
    works(outcome)
    assert made.model.width == 10
    file.write_text("{ model: ")
    broken, _ = cli(f"fit --config {file} --data team.Data {OFF}")
    assert broken.code == 2
    assert re.fullmatch(r"error: \S*x.jsonnet: [^\n]+\n", broken.err), broken.err


def test_omegaconf_resolves_its_own_references_beside_ours(cli: Extended, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("fold: 2\nmodel:\n  class_path: team.Wide\n  init_args:\n    width: ${fold}\n")
    line = f"fit --config {file} --data team.Data {OFF} --trainer.check_val_every_n_epoch 1"
    options = {"parser_kwargs": {"parser_mode": "omegaconf"}}
    outcome, made = cli(f"fit --config {file} --data team.Data {OFF}", **options)
    assert outcome.code == 0, (outcome.err, outcome.error, line)
    assert made.model.width == 2
    assert Path(made.trainer.default_root_dir) == outcome.run


def test_variables_of_the_environment_lie_above_the_defaults_and_below_files(
    cli: Extended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_FIT__SEED_EVERYTHING", "7")
    monkeypatch.setenv("PL_FIT__FOLD", "1")
    file = tmp_path / "x.yaml"
    file.write_text("fold: 2\n")
    options = {"parser_kwargs": {"default_env": True}}
    outcome, _ = cli(f"{FIT} --config {file}", **options)
    assert outcome.code == 0, (outcome.err, outcome.error)
    assert (config(outcome)["seed_everything"], config(outcome)["fold"]) == (7, 2)


def test_trainer_defaults_hold_unless_something_is_given(cli: Extended, team: Any) -> None:
    defaults = {"max_epochs": 3, "callbacks": [team.Marks()]}
    outcome, made = cli(FIT, trainer_defaults=defaults)
    works(outcome)
    assert made.trainer.max_epochs == 1
    kinds = [type(callback).__name__ for callback in made.trainer.callbacks]
    assert "Marks" in kinds
    assert kinds.index("GracefulShutdown") > kinds.index("TrainState")


@pytest.mark.filterwarnings("ignore")
def test_a_configuration_may_be_given_as_a_dict(command: Commands, team: Any) -> None:
    flags = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "logger": False}
    flags["log_every_n_steps"] = 1
    args = {
        "fit": {
            "model": {"class_path": "team.Wide", "init_args": {"width": 2}},
            "data": {"class_path": "team.Data"},
            "trainer": flags,
        }
    }
    with contextlib.redirect_stdout(io.StringIO()):
        made = team.CLI(args=args)
    assert made.model.width == 2
    assert made.trainer.current_epoch == 1


def test_a_dict_with_what_no_file_can_hold_is_one_line(
    team: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        team.CLI(args={"fit": {"trainer": {"callbacks": [team.Marks()]}}})
    assert ended.value.code == 2
    assert "error: args: expected values that JSON can hold" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_without_running_a_subcommand_all_is_made_and_the_caller_trains(
    command: Commands, team: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["--model", "team.Wide", "--data", "team.Data", *OFF.split()]
    with contextlib.redirect_stdout(io.StringIO()):
        made = team.CLI(args=words, run=False)
        made.trainer.fit(made.model, made.datamodule)
    assert made.trainer.current_epoch == 1
    assert (made.run.folder / "checkpoints" / "last.ckpt").exists()
    assert made.metrics["val/acc"] == 0.5


@pytest.mark.filterwarnings("ignore")
def test_from_python_a_command_gives_what_came_out_twice_in_one_process(
    command: Commands, team: Any
) -> None:
    words = ["fit", "--model", "team.Wide", "--data", "team.Data", *OFF.split()]
    with contextlib.redirect_stdout(io.StringIO()):
        first, second = command.main(words), command.main(words)
    assert first.run.folder != second.run.folder
    for made in (first, second):
        assert made.metrics["val/acc"] == 0.5
        assert made.best_checkpoint.parent == made.run.checkpoints
        assert made.trainer.global_step == 2
        assert type(made.model).__name__ == "Wide"
    assert command.main(["--version"]) is None


SCRIPT = """
    from my_project.cli import CLI as Base
    from my_project.engine import command

    class CLI(Base):
        def add_arguments_to_parser(self, parser):
            super().add_arguments_to_parser(parser)
            parser.add_argument("--fold", type=int, default=0)
            parser.link_arguments("fold", "data.init_args.split_seed")

    def main(args=None):
        if command(args):
            return CLI(args=args)

    if __name__ == "__main__":
        print("metrics", sorted(main().metrics))
    """


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_a_script_of_any_name_runs_on_two_ranks_and_names_itself(
    bake: Bake, run: Run, tmp_path: Path, launcher: str
) -> None:
    project = bake(tmp_path)
    (project / "train_folds.py").write_text(textwrap.dedent(SCRIPT))
    words = "fit --config configs/digits.yaml --config configs/debug.yaml --fold 3"
    devices = "--trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp"
    start = [sys.executable]
    if launcher == "torchrun":
        start += ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    out = run(*start, "train_folds.py", *words.split(), *devices.split(), cwd=project)
    (folder,) = (project / "runs").iterdir()
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert recorded["fold"] == 3
    assert "split_seed" not in recorded["data"]["init_args"]
    assert f"test     python train_folds.py test --ckpt_path {folder.name}" in out
    assert out.count("'train/loss', 'val/acc', 'val/loss']") == 2
    assert "engine_version" not in json.dumps(recorded)


@pytest.fixture
def by_the_page(bake: Bake, tmp_path: Path) -> Path:
    """A project whose command line was extended with what its docs/cli.md has, and no more."""
    project = bake(tmp_path)
    page = (project / "docs" / "cli.md").read_text(encoding="utf-8")
    files = [text for kind, text in blocks(page) if kind == "python"]
    (package_file,) = [text for text in files if text.startswith("# my_project/cli.py\n")]
    (in_main,) = [text for text in files if text.startswith("# main.py, within main()\n")]
    (project / "my_project" / "cli.py").write_text(package_file)
    main = (project / "main.py").read_text()
    before = main[: main.index("    if not command(args):")]
    after = main[main.index("\n\nif __name__") :]
    (project / "main.py").write_text(before + in_main.partition("\n")[2] + after)
    return project


@pytest.mark.slow
def test_the_page_alone_is_enough_to_extend_the_command_line(by_the_page: Path, run: Run) -> None:
    def main(words: str) -> str:
        return run(sys.executable, "main.py", *words.split(), cwd=by_the_page)

    runs, flags = by_the_page / "runs", "--trainer.logger false --trainer.log_every_n_steps 5"
    averages = "--callbacks.averages.decay 0.8"
    for devices in ("", " --trainer.devices 2 --trainer.accelerator cpu --trainer.strategy ddp"):
        main(
            f"fit --config configs/digits.yaml --trainer.max_epochs 1 {flags} --fold 3"
            f" --run_id extended{len(devices)} --callbacks.averages EMAWeightAveraging {averages}"
            f"{devices}"
        )
        folder = runs / f"extended{len(devices)}"
        recorded = yaml.safe_load((folder / "config.yaml").read_text())
        assert recorded["fold"] == 3
        assert recorded["callbacks"]["averages"]["init_args"]["decay"] == 0.8
        assert "test/acc" in main(f"test --ckpt_path {folder.name} {flags}")
        assert "epoch 1 " in main(f"fit --resume {folder.name} --trainer.max_epochs 2 {flags}")
        main(f"fit --config {folder}/config.yaml --trainer.max_epochs 1 --run_id {folder.name}-b")
        again = yaml.safe_load((runs / f"{folder.name}-b" / "config.yaml").read_text())
        assert again == recorded | {"trainer": again["trainer"]}
    main("export --ckpt_path extended0 --file model.pt2 --trainer.logger false")
    assert (by_the_page / "model.pt2").stat().st_size > 0
    run(sys.executable, "-m", "ruff", "check", ".", cwd=by_the_page)


def test_a_model_with_a_function_among_its_options_can_be_copied(command: Commands) -> None:
    outcome = command(
        "fit --config @digits --trainer.max_epochs 1 --trainer.limit_train_batches 2"
        " --trainer.log_every_n_steps 1 --trainer.logger false"
        " --model.lr_scheduler StepLR --model.lr_scheduler.step_size 1"
        " --trainer.callbacks EMAWeightAveraging"
    )
    assert (outcome.code, outcome.err) == (0, ""), outcome.error or outcome.err


@pytest.mark.slow
def test_such_a_model_is_copied_on_two_ranks_too(bake: Bake, tmp_path: Path, run: Run) -> None:
    project = bake(tmp_path)
    line = (
        "main.py fit --config configs/digits.yaml --trainer.max_epochs 1"
        " --trainer.limit_train_batches 2 --trainer.log_every_n_steps 1 --trainer.logger false"
        " --model.lr_scheduler StepLR --model.lr_scheduler.step_size 1"
        " --trainer.callbacks EMAWeightAveraging --trainer.accelerator cpu --trainer.devices 2"
    )
    run(sys.executable, *line.split(), cwd=project)
