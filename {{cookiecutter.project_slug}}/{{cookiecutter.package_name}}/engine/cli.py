"""The command line: LightningCLI with defaults.yaml under every run, named callbacks, and a folder for each run."""

import importlib
import importlib.util
import json
import logging
import os
import sys
import warnings
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric

from .callbacks import Callbacks, EpochLines, MetricsFile, NameCheck, Record
from .endings import Endings
from .resume import Bookmark, Checkpoints
from .run import LOCKS, PROJECT, REDACTED, SECTIONS, VERBS, Mistake, Run, command, redacted, runs_root, shown
from .wandb import Wandb

# What `trainer.barebones` wants left to itself.
BAREBONES = ("logger", "log_every_n_steps", "num_sanity_val_steps", "enable_progress_bar", "enable_model_summary")
STEP_HOOKS = [name for name in vars(Callback) if "_batch_" in name or name.startswith(("on_before", "on_after"))]
ORIGINS = "--print_config=origins"
WAYS_ON = ("ckpt_path", "init_from", "resume")


def execute(words: Sequence[str], cli: Callable[[list[str], Endings], LightningCLI]) -> None:
    """Runs a command, ends its W&B run, and leaves environment and warnings as they were."""
    for room in ("data", "model"):  # so that their classes go by their names alone
        if importlib.util.find_spec(f"..{room}", __package__):
            importlib.import_module(f"..{room}", __package__)
    environment = dict(os.environ)
    os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}  # the lines on the screen are ours
    raised: Exception | None = None
    try:
        with warnings.catch_warnings(), LOCKS, Endings() as endings:
            silence()
            cli(list(words), endings)
    except Exception as error:
        raised = error
    finally:
        os.environ.clear()
        os.environ.update(environment)
    if raised:  # outside of `except`, so that a traceback does not show what was there first
        from .mistakes import cause_of

        raise cause_of(raised)


def silence() -> None:
    """Leaves out what nobody who reads it could act on. A test of the template says when an entry can go."""
    # Tips, what a run's first lines say, and that Lightning would requeue a job of SLURM.
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities", "pytorch.trainer.connectors.signal_connector"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    for message in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
        r"You are trying to `self.log\(\)` but `Trainer\(barebones=True\)`",  # that is what barebones is for
        r"Be aware that when using `ckpt_path`, callbacks used",  # evaluating needs none of them
        r"The `srun` command is available",  # on a login node, or on a machine of one's own
        r"Checkpoint directory .* exists and is not empty",  # of a run that goes on
        r"The dirpath has changed",  # a new run that begins at another's checkpoint has a best of its own
        r".*does not have many workers",  # data in memory needs none
        r"You're resuming from a checkpoint that ended before the epoch ended",  # ours tells where it ended
        r"`\.\w+\(ckpt_path=\"best\"\)` is called with Trainer configured with multiple",  # one of which has a best
    ):
        warnings.filterwarnings("ignore", message)


def lighten(callbacks: Sequence[Callback]) -> None:
    """Takes out of each step what Lightning does in it for nothing, until LOCKS is closed."""
    for callback, hook in product(callbacks, STEP_HOOKS):
        if getattr(getattr(callback, hook), "__func__", None) is getattr(Callback, hook):
            setattr(callback, hook, None)  # it calls an empty hook, within a context, but none that is no function
    kind: Any = _ResultMetric  # Lightning's #20388: each `self.log` copies all that a value consists of to where it is
    move = kind.to
    kind.to = lambda it, device: it if not it.is_tensor or it.value.device == device else move(it, device)
    LOCKS.callback(setattr, kind, "to", move)


class CLI(LightningCLI):
    """Runs one verb with any LightningModule and LightningDataModule."""

    program = "main.py"
    lowest = [str(PROJECT / "configs" / "defaults.yaml")]  # noqa: RUF012

    def __init__(self, words: list[str], endings: Endings, **options: Any) -> None:
        self.endings = endings
        super().__init__(args=words, save_config_callback=None, auto_configure_optimizers=False, **options)

    def setup_parser(self, add_subcommands: bool, main_kwargs: dict[str, Any], *others: Any) -> None:
        epilog = "`sync [RUN ...]` sends to W&B what it does not have of runs; see `sync --help`."
        super().setup_parser(add_subcommands, {**main_kwargs, "epilog": epilog}, *others)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(allow_abbrev=False, exit_on_error=False, **kwargs)

    def add_run_arguments(self, parser: LightningArgumentParser, callbacks: type) -> None:
        self.verb_parser = parser  # any verb's, for all have these options
        parser.add_class_arguments(callbacks, "callbacks")
        parser.add_argument("--runs_root", type=str | None, help=f"Folder of all runs, {runs_root()} if null.")
        parser.add_argument("--init_from", type=str | None, help="Checkpoint whose weights `fit` begins with.")
        parser.add_argument("--resume", type=str | None, help="Run that `fit` goes on with.")
        parser.add_argument("--compile", type=bool, default=False, help="Compile what the model is made of.")
        precision = "Of products in 32 bits on GPUs; torch's own if null."
        parser.add_argument("--matmul_precision", type=Literal["highest", "high", "medium"] | None, help=precision)
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.add_run_arguments(parser, Callbacks)
        parser.add_argument("--test_after_fit", type=bool, default=False, help="Test the best checkpoint after `fit`.")
        table = "Table that `predict` writes, in the run's folder: .csv or .parquet; none if null."
        parser.add_argument("--predictions", type=str | None, default="predictions.csv", help=table)
        parser.add_argument("--predictions_table", type=bool, default=False, help="Whether W&B gets it as well.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, lowest first: defaults.yaml, the checkpoint's run, files in their order, flags wherever they stand.

        The `model` section in a checkpoint lies under the files for `fit`, which trains what it is now asked for, and
        over them for the other verbs, which evaluate the model as it was trained.
        """
        self.words = args
        verb, *rest = args
        known = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        known.add_argument("-c", "--config", action="append", default=[])
        for way in WAYS_ON:
            known.add_argument(f"--{way}")
        known.add_argument("--runs_root", type=Path, default=runs_root())
        self.checkpoint: str | None = None
        self.way = ""
        self.theirs: list[str] = []  # among the layers, what the checkpoint brought
        self.layers, self.flags = list(self.lowest), rest
        try:
            given, self.flags = known.parse_known_args(rest)
            self.root = given.runs_root.expanduser().absolute()
            self.usual_root = self.root == runs_root()
            self.layers += given.config
            for file in (layer for layer in self.layers if not layer.startswith("{")):
                parts = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
                if not isinstance(parts, dict) or not all(isinstance(parts.get(name, {}), dict) for name in SECTIONS):
                    raise ArgumentError(None, "")  # an empty section would drop all that lies under it
            ways = [way for way in WAYS_ON if getattr(given, way) is not None]
            if ways:
                from .references import way_on

                self.way = ways[-1]
                self.root, self.checkpoint, self.theirs = way_on(verb, ways, given, self.root, self.layers)
            if verb in VERBS[1:] and not self.checkpoint and not {"-h", "--help"} & set(self.flags):
                raise Mistake(f"{verb}: expected --ckpt_path RUN, or a checkpoint file; random weights are no result")
            words = [verb, *(part for layer in self.layers for part in ("--config", layer)), *self.flags]
            self.config = parser.parse_args([word for word in words if word != ORIGINS])
        except (ArgumentError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            from .mistakes import explain

            raise Mistake(explain(error, self.verb_parser, self.layers, self.flags)) from error

    def before_instantiate_classes(self) -> None:
        """Gives the run its id and folder before anything is made that could need them."""
        verb = str(self.subcommand)
        text = self.parser.dump(self.config, format="json", skip_unset=False, skip_link_targets=False)
        recipe = json.loads(text)[verb]
        for name in {*WAYS_ON, "runs_root"} & recipe.keys():
            if recipe.pop(name) is not None:
                raise Mistake(f"{name}: only as a flag, --{name}")
        differs: list[str] = []
        if self.theirs or ORIGINS in self.flags or f'"{REDACTED}"' in text:
            from .origins import examined

            differs = examined(recipe, self.layers, self.flags, self.theirs, ORIGINS in self.flags)
        self.run = Run.start(self.root)
        if verb == "fit" and self.way != "resume" and list(self.run.folder.glob("checkpoints/*.ckpt")):
            from .references import restarted

            self.way, self.checkpoint = "resume", str(restarted(self.run))
        self.record = Record(self.run, redacted(recipe), self.checkpoint)
        self.record.differs, self.record.command = differs, command([self.program, *self.words])
        self.config[verb] = fill(self.config[verb], run=str(self.run.folder), verb=verb)
        if verb == "predict":
            self.config[verb].return_predictions = False  # nobody would take them, and they fill the memory
        self.config[verb].ckpt_path = None if self.way == "init_from" else self.checkpoint

    def drop_linked(self) -> None:
        """Leaves out of the configuration what the data determines, so that a run's own can be given again."""
        options = self.record.config["model"].get("init_args", {})
        if "num_classes" in options and hasattr(self.datamodule, "num_classes"):
            given, expected = options.pop("num_classes"), self.datamodule.num_classes
            if given not in (None, expected) and not self.theirs:
                raise Mistake(f"model.num_classes: expected {expected}, which the data has, got {given}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds our callbacks and metrics.csv to what is asked for, and drops what other settings rule out."""
        self.drop_linked()
        config = self.config_init[self.subcommand]
        settings, named = config.trainer, config.callbacks
        theirs = settings.callbacks if isinstance(settings.callbacks, list) else [*filter(None, [settings.callbacks])]
        ours = [NameCheck(named), *filter(None, vars(named).values())] if self.subcommand == "fit" else []
        written = any(isinstance(callback, BasePredictionWriter) for callback in theirs)
        if self.subcommand == "predict" and config.predictions and not written:
            from .predictions import Predictions

            ours = [Predictions(self.run.folder / config.predictions, config.predictions_table)]
        bookmark = Bookmark()
        callbacks = [self.record, *theirs, *ours, bookmark]  # theirs first: what they log can be monitored
        if settings.barebones:
            callbacks = theirs
            kwargs.update(dict.fromkeys(BAREBONES))
        elif settings.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in theirs):
            kwargs["enable_progress_bar"] = sys.stdout.isatty()
            if sys.stdout.isatty():
                from .bar import Bar
            callbacks.append(Bar() if sys.stdout.isatty() else EpochLines())
        if not settings.barebones:
            callbacks.append(self.endings)  # last, so that it saves what the others have made of a batch
        if settings.enable_checkpointing is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        # Without any, Lightning would add a ModelCheckpoint of its own.
        kwargs["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
        shares = settings.use_distributed_sampler and bookmark in callbacks
        if shares:
            kwargs["use_distributed_sampler"] = False
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        lighten(trainer.callbacks)  # type: ignore[attr-defined]
        self.endings.error_file = self.run.folder / "error.txt"
        if shares:
            strategy: Any = trainer.strategy
            process = strategy.process_dataloader
            strategy.process_dataloader = lambda loader: process(bookmark.order(loader, trainer))
        if trainer.is_global_zero and self.record in callbacks and not settings.fast_dev_run:
            self.run.lock()
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = Checkpoints()
        for callback in trainer.checkpoint_callbacks if settings.fast_dev_run else ():
            vars(callback)["save_last"] = False  # Lightning writes it even then
        if not trainer.barebones:
            table = MetricsFile(self.run.folder / "metrics.csv", write=not settings.fast_dev_run)
            trainer.loggers = [*trainer.loggers, table]
        return trainer

    def before_fit(self) -> None:
        """Begins with the weights of another run if asked to, and says what did not fit; has the model compiled."""
        if self.checkpoint and self.way == "init_from":
            from .references import init_weights

            init_weights(self.model, Path(self.checkpoint))
        config = self.config_init[self.subcommand]
        if config.matmul_precision:
            torch.set_float32_matmul_precision(config.matmul_precision)
        for part in self.model.children() if config.compile else ():
            if next(part.parameters(), None) is not None:  # a metric has none
                part.compile()  # in its place: a checkpoint has the names that it has without

    def after_fit(self) -> None:
        """Tests the best checkpoint if asked to, and says what the run left and how to go on."""
        trainer, named = self.trainer, self.config_init[self.subcommand].callbacks
        saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        files = [*(c.best_model_path for c in saved), *(c.last_model_path for c in saved), ""]
        best = Path(next(filter(None, files), ""))
        ours = best.is_relative_to(self.run.folder)  # not the checkpoint of another run, with which this one began
        if self.config_init[self.subcommand].get("test_after_fit"):
            trainer.test(self.model, datamodule=self.datamodule, ckpt_path=str(best) if ours else None)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.global_step == self.record.restored_step:
            print(f"done     nothing was left to train after step {trainer.global_step}")
        if epoch := getattr(vars(named).get("early_stopping"), "stopped_epoch", 0):
            print(f"stopped  after epoch {epoch}: {named.early_stopping.monitor} no longer gets better")
        if values := getattr(named.summaries, "best", None):
            parts = [f"{name.removeprefix('best/')} {value:.4g}" for name, value in values.items()]
            print("best     " + "  ".join(parts))
        for logger in trainer.loggers:
            if isinstance(logger, Wandb):
                print(f"W&B      {logger.place}")
        if ours:
            by_name = self.usual_root and (self.run.folder / "checkpoints" / "last.ckpt").exists()
            reference = self.run.id if by_name else shown(best)
            print(f"saved    {shown(best)}")
            print(f"test     python {shown(PROJECT / 'main.py')} test --ckpt_path {reference}")


def fill(value: Any, run: str, verb: str) -> Any:
    """Replaces `${run}` and `${verb}` in all texts within `value`."""
    if isinstance(value, str):
        return value.replace("${run}", run).replace("${verb}", verb)
    if isinstance(value, list):
        return [fill(item, run, verb) for item in value]
    if isinstance(value, dict):
        return {key: fill(item, run, verb) for key, item in value.items()}
    return Namespace(fill(vars(value), run, verb)) if isinstance(value, Namespace) else value
