"""The command line: LightningCLI with defaults.yaml under every run, named callbacks, and a folder for each run."""

import importlib
import importlib.util
import json
import logging
import os
import sys
import traceback
import warnings
from argparse import ArgumentError, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from . import Mistake
from .callbacks import Callbacks, EpochLines, NameCheck, Record
from .run import PROJECT, MetricsFile, Run, runs_root, shown
from .wandb import Wandb, finish

BAREBONES = (  # what `trainer.barebones` wants left to itself
    "logger",
    "log_every_n_steps",
    "num_sanity_val_steps",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
)


def execute(words: Sequence[str]) -> None:
    """Runs a command, ends its W&B run, and leaves environment and warnings as they were.

    Args:
        words: The command line, from the verb on.

    Raises:
        Mistake: If something in it is wrong.
    """
    for room in ("data", "model"):  # so that their classes go by their names alone
        name = f"{__package__.split('.')[0]}.{room}"
        if importlib.util.find_spec(name):
            importlib.import_module(name)
    environment, exit_code = dict(os.environ), 1
    with warnings.catch_warnings():
        silence()
        try:
            CLI(args=list(words))
            exit_code = 0
        except MisconfigurationException as error:  # Lightning's word for a setting that cannot be
            raise Mistake(str(error)) from error
        finally:
            finish(exit_code)
            os.environ.clear()
            os.environ.update(environment)


def silence() -> None:
    """Leaves out what nobody who reads it could act on. A test of the template says when an entry can go."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
        r"You are trying to `self.log\(\)` but `Trainer\(barebones=True\)`",  # that is what barebones is for
        r"Be aware that when using `ckpt_path`, callbacks used",  # evaluating needs none of them
        r".*does not have many workers",  # data in memory needs none
    ):
        warnings.filterwarnings("ignore", message)


class Parser(LightningArgumentParser):
    """Takes no abbreviated option, and raises where LightningCLI's parser prints its usage and exits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ArgumentError(None, message) from ex

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Notes on what it raises which options there are, for a hint at the right one."""
        try:
            super().validate(*args, **kwargs)
        except (KeyError, TypeError) as error:
            error.add_note(" ".join(self.get_defaults(skip_validation=True).keys()))
            raise


class CLI(LightningCLI):
    """Runs one verb with any LightningModule and LightningDataModule."""

    def __init__(self, args: list[str]) -> None:
        self.verb_parsers: list[LightningArgumentParser] = []
        super().__init__(args=args, parser_class=Parser, save_config_callback=None, auto_configure_optimizers=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.verb_parsers.append(parser)
        parser.add_class_arguments(Callbacks, "callbacks")
        parser.add_argument("--runs_root", type=str, default=str(runs_root()), help="Folder of all runs.")
        parser.add_argument("--test_after_fit", type=bool, default=False, help="Test the best checkpoint after `fit`.")
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, lowest first: defaults.yaml, the checkpoint's run, files in their order, flags wherever they stand.

        The `model` section in a checkpoint lies under the files for `fit`, which trains what it is now asked for, and
        over them for the other verbs, which evaluate the model as it was trained.
        """
        verb, *rest = args
        known = ArgumentParser(add_help=False, allow_abbrev=False)
        known.add_argument("-c", "--config", action="append", default=[])
        known.add_argument("--ckpt_path")
        known.add_argument("--runs_root", type=Path, default=runs_root())
        given, flags = known.parse_known_args(rest)
        self.root, self.checkpoint = given.runs_root.absolute(), None
        layers = [str(PROJECT / "configs" / "defaults.yaml"), *given.config]
        if given.ckpt_path:
            from .references import find_checkpoint, layers_of

            self.checkpoint = find_checkpoint(given.ckpt_path, self.root)
            recipe, model = layers_of(self.checkpoint)
            layers.insert(1 if verb == "fit" else len(layers), json.dumps(model))
            layers[1:1] = recipe
        elif verb in ("validate", "test", "predict") and not {"-h", "--help"} & set(flags):
            raise Mistake(f"{verb}: expected --ckpt_path RUN (or a checkpoint file); random weights are not evaluated")
        try:
            self.config = parser.parse_args([verb, *(part for layer in layers for part in ("--config", layer)), *flags])
            if not all(isinstance(self.config[verb][name], Namespace) for name in ("trainer", "callbacks")):
                raise ArgumentError(None, "a section of the configuration is not one")
        except (ArgumentError, UnicodeDecodeError) as error:
            from .mistakes import explain

            raise Mistake(explain(error, self.verb_parsers[0], layers, flags)) from error

    def before_instantiate_classes(self) -> None:
        """Gives the run its id and folder before anything is made that could need them."""
        verb = str(self.subcommand)
        parser = dict(zip(self.subcommands(), self.verb_parsers, strict=True))[verb]
        recipe = yaml.safe_load(parser.dump(self.config[verb], skip_unset=False))
        del recipe["runs_root"], recipe["ckpt_path"]
        self.run = Run.start(self.root)
        if verb == "fit" and list(self.run.folder.glob("checkpoints/*.ckpt")):
            raise Mistake(f"WANDB_RUN_ID: run {self.run.id} has checkpoints already; unset it to start another run")
        self.record = Record(self.run, recipe)
        self.config[verb] = fill(self.config[verb], {"${run}": str(self.run.folder), "${verb}": verb})
        self.config[verb].ckpt_path = self.checkpoint and str(self.checkpoint)

    def instantiate_classes(self) -> None:
        """Raises what a constructor raised, which jsonargparse wraps into errors of its own about types."""
        error: BaseException | None = None
        try:
            super().instantiate_classes()
        except Exception as wrapped:
            error = wrapped
        while error is not None:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if error.__cause__ is None or not frame.f_globals["__name__"].startswith("jsonargparse"):
                raise error
            error = error.__cause__

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds our callbacks and metrics.csv to what is asked for, and drops what other settings rule out."""
        config = self.config_init[self.subcommand]
        settings, named = config.trainer, config.callbacks
        ours = [NameCheck(named), *filter(None, vars(named).values())] if self.subcommand == "fit" else []
        callbacks = [self.record, *ours, *(settings.callbacks or [])]
        bar = any(isinstance(callback, ProgressBar) for callback in callbacks) or sys.stdout.isatty()
        if settings.barebones:
            callbacks = list(settings.callbacks or [])
            kwargs.update(dict.fromkeys(BAREBONES))
        elif not bar and settings.enable_progress_bar is not False:
            callbacks.append(EpochLines())
        if settings.enable_checkpointing is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        elif not any(isinstance(callback, Checkpoint) for callback in callbacks):
            kwargs["enable_checkpointing"] = False  # else Lightning adds a ModelCheckpoint of its own
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (TypeError, ValueError) as error:
            raise Mistake(f"trainer: {error}") from error
        for callback in (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)):
            callback.save_last = callback.save_last and not settings.fast_dev_run  # Lightning writes it even then
            callback.save_on_exception &= trainer.world_size == 1  # a rank that fails alone would wait for ever
        if not trainer.barebones:
            file = None if trainer.fast_dev_run else self.run.folder / "metrics.csv"  # type: ignore[attr-defined]
            trainer.loggers = [*trainer.loggers, MetricsFile(file)]
        return trainer

    def after_fit(self) -> None:
        """Tests the best checkpoint if asked to, and says what the run left and how to go on."""
        trainer, config = self.trainer, self.config_init[self.subcommand]
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if config.test_after_fit:
            trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None)
        if not trainer.is_global_zero:
            return
        if values := getattr(config.callbacks.summaries, "best", None):
            print("best    ", *(f"{name.removeprefix('best/')} {value:.4g} " for name, value in values.items()))
        for logger in trainer.loggers:
            if isinstance(logger, Wandb):
                print(f"W&B      {logger.place}")
        if best:
            print(f"saved    {shown(Path(best))}")
            print(f"test     python main.py test --ckpt_path {self.run.id}")


def fill(value: Any, names: dict[str, str]) -> Any:
    """Replaces each of `names` in all texts within `value`."""
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace(name, text)
    elif isinstance(value, Namespace):
        value = Namespace(fill(vars(value), names))
    elif isinstance(value, dict):
        value = {key: fill(item, names) for key, item in value.items()}
    elif isinstance(value, list):
        value = [fill(item, names) for item in value]
    return value
