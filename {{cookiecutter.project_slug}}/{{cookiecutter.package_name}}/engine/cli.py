"""A LightningCLI with defaults.yaml below each run, callbacks by name, and a folder for each run.

A project's own CLI is a subclass of `CLI`, in cli.py beside data.py.
"""

import json
import os
import sys
from argparse import ArgumentError
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    Checkpoint,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .background_saves import BackgroundSaves
from .checkpoint_io import BackgroundCheckpointIO
from .checkpoints import REFERENCE, LastCheckpoint, decide_the_best
from .command_line import NOT_RECORDED, CommandLine
from .distributed import broadcast_run_id
from .error_messages import Given, explain
from .errors import UsageError, print_usage_errors
from .files import (
    PROJECT,
    display_path,
    entry_script,
    python_command,
    redact,
    redact_command,
)
from .lightning_internals import strip_noop_hooks, strip_noop_profiler
from .metrics import Divergence, MetricNameCheck, MetricsFile, Summaries
from .parser import Parser
from .placeholders import fill_placeholders, without_unmonitored
from .progress import progress_callbacks
from .provenance import (
    differences,
    display_name,
    iter_settings,
    print_origins,
    refuse_redacted,
)
from .recorder import RunProgress, RunRecorder, best_or_last, is_of_this_run, print_outcome
from .restore import RestoreRun
from .resume import (
    OF_THE_RUN,
    CheckpointLayers,
    find_restart_checkpoint,
    is_restarted,
    load_initial_weights,
)
from .run import Run
from .run_record import RunRecord, read_record
from .screen import clear_loading, is_terminal, say
from .session import session
from .shutdown import GracefulShutdown
from .train_state import TrainState
from .wandb_logger import DryRunLogger, RunWandbLogger
from .wandb_variables import unused_folder

# What `trainer.barebones` wants left to itself.
BAREBONES = (
    "logger",
    "log_every_n_steps",
    "num_sanity_val_steps",
    "enable_progress_bar",
    "enable_model_summary",
)


class CLI(LightningCLI):
    """Runs one subcommand with any LightningModule and LightningDataModule.

    Takes the arguments of LightningCLI. Afterwards `trainer`, `model`, `datamodule`, `run`,
    `metrics` and `best_checkpoint` tell what came out.

    Raises:
        UsageError: If the command is wrong. What the model or the data raise is passed through.
    """

    callbacks: ClassVar[dict[str, Any]] = {
        "checkpoint": ModelCheckpoint,
        "last_checkpoint": LastCheckpoint,
        "early_stopping": EarlyStopping,
        "lr_monitor": LearningRateMonitor,
        "summaries": Summaries,
        "divergence": Divergence,
    }
    default_config_files: ClassVar[list[str]] = [str(PROJECT / "configs" / "defaults.yaml")]
    run: Run

    def __init__(self, *classes: Any, **options: Any) -> None:
        clear_loading()
        self.parsers: list[Any] = []  # one for each subcommand, in their order
        self.shutdown = GracefulShutdown()
        self.resources = ExitStack()
        options = {"save_config_callback": None, "parser_class": Parser, **options}
        runs = options.get("run", True)
        with print_usage_errors(), session(self.shutdown, self.resources, runs):
            super().__init__(*classes, **options)

    def __deepcopy__(self, memo: Any) -> "CLI":
        """Return this one: a copy of a command would be none.

        A model with a function among its options refers to the parser, and so to the CLI; a
        callback such as EMAWeightAveraging copies the model.
        """
        return self

    @property
    def metrics(self) -> dict[str, float]:
        """The values that were logged last, by name."""
        return {name: value.item() for name, value in self.trainer.callback_metrics.items()}

    @property
    def best_checkpoint(self) -> Path | None:
        """The best checkpoint that this run has saved, or else its last one."""
        file = best_or_last(self.trainer)
        return Path(file) if file else None

    # The parser.

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], *others: Any
    ) -> None:
        epilog = "Besides: `runs` lists runs, `sync` sends to W&B what it lacks; see their --help."
        super().setup_parser(add_subcommands, {"epilog": epilog, **main_kwargs}, *others)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_default_arguments_to_parser(parser)
        self.parsers.append(parser)
        self.add_run_arguments(parser)
        self.add_trainer_arguments(parser)
        for name, kind in self.callbacks.items():
            parser.add_argument(f"--callbacks.{name}", type=kind | None, default=None)

    @staticmethod
    def add_run_arguments(parser: LightningArgumentParser) -> None:
        """Add the options that this CLI has beside LightningCLI's."""
        monitor = "Metric that checkpoints, early stopping and summaries go by; null for none."
        parser.add_argument("--monitor", type=str | None, help=monitor)
        mode = "Whether the monitor is better when it is smaller or larger."
        parser.add_argument("--mode", type=Literal["min", "max"], default="min", help=mode)
        parser.add_argument("--run_id", type=str | None, help="Id of the run; drawn if null.")
        parser.add_argument("--runs_root", type=str | None, help="Folder of all runs.")
        init_from = "Checkpoint whose weights `fit` begins with."
        parser.add_argument("--init_from", type=str | None, help=init_from)
        parser.add_argument("--resume", type=str | None, help="Run that `fit` resumes.")
        compiled = "torch.compile each submodule of the model."
        parser.add_argument("--compile", type=bool, default=False, help=compiled)
        precision = Literal["highest", "high", "medium"] | None
        torch_call = "torch.set_float32_matmul_precision; torch's default if null."
        parser.add_argument("--matmul_precision", type=precision, help=torch_call)

    @staticmethod
    def add_trainer_arguments(parser: LightningArgumentParser) -> None:
        """Add the options that only a Trainer can follow."""
        tested = "Test the best checkpoint after `fit`."
        parser.add_argument("--test_after_fit", type=bool, default=False, help=tested)
        table = "CSV file that `predict` writes into the run's folder; none if null."
        parser.add_argument("--predictions", type=str | None, default="predictions.csv", help=table)

    @property
    def options_parser(self) -> Any:
        """The parser that has the options of the chosen subcommand."""
        verbs = list(self.subcommands())
        chosen = self.command_line.verb if self.has_verbs else ""
        return self.parsers[verbs.index(chosen)] if chosen in verbs else self.parsers[0]

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse layers and flags; command_line.py says which wins."""
        self.has_verbs = parser is not self.parsers[0]
        verbs = list(self.subcommands()) if self.has_verbs else []
        try:
            self.command_line = CommandLine(args, verbs, self.default_config_files)
        except ArgumentError as error:
            raise UsageError(str(error)) from error
        line, options = self.command_line, self.options_parser
        names = options.get_defaults(skip_validation=True).keys()
        line.leave_out_unknown({name.partition(".")[0] for name in names} - {"weights_only"})
        registered = [key.removeprefix("callbacks.") for key in options.callback_keys]
        for name in line.new_callbacks([*self.callbacks, *registered]):
            options.add_argument(f"--callbacks.{name}", type=Callback | None, default=None)
        options.given = line.given_names()
        if parser.default_env:  # variables lie above the defaults, below all else
            options.default_config_files = list(self.default_config_files)
        words = line.words(with_defaults=not parser.default_env)
        try:
            self.config = self._parse(parser, words)
        except ArgumentError as error:
            text = explain(error, options, Given(line.layers, line.flags))
            raise UsageError(text) from error

    def _parse(self, parser: LightningArgumentParser, words: list[str]) -> Namespace:
        return parser.parse_args([self.command_line.verb, *words] if self.has_verbs else words)

    # From the configuration to a run.

    def before_instantiate_classes(self) -> None:
        """Give the run its id and folder before anything is made that could need them."""
        record, self.notes = self._resolved_config()
        self.run = self._start_run()
        self.checkpoint = self._checkpoint()
        path = self.checkpoint.path
        command = redact_command([entry_script().name, *self.command_line.argv])
        recorded = redact(record)
        options = {display_name(name): value for name, value in iter_settings(recorded)}
        given = sorted(options.keys() & self.command_line.changed_names())
        state = RunRecord(self.command_line.verb, command=command, options=options, given=given)
        options = {**options, **dict(iter_settings(recorded))}
        self.recorder = RunRecorder(self.run, recorded, path, state, self.notes, options)
        self.shutdown.recorder = self.recorder
        self.restore = RestoreRun(self.run, path)
        options = self._of_subcommand(self.config)
        self.monitor = options.monitor
        placeholders = {
            "run": str(self.run.folder),
            "verb": self.command_line.verb,
            "monitor": options.monitor,
            "mode": options.mode,
        }
        options = fill_placeholders(options, placeholders)
        options.callbacks = without_unmonitored(options.callbacks)
        if "return_predictions" in options and options.return_predictions is None:
            options.return_predictions = False  # they would fill the memory
        if "ckpt_path" in options:
            options.ckpt_path = None if self.checkpoint.mode == "init_from" else path
        if self.subcommand is None:
            self.config = options
        else:
            self.config[self.subcommand] = options

    def _of_subcommand(self, config: Any) -> Any:
        """Return the part of a configuration that belongs to the subcommand."""
        return config.get(str(self.subcommand), config)

    def _resolved_config(self) -> tuple[dict[str, Any], list[str]]:
        """Return the configuration to record, and lines on what is renamed or differs."""
        line = self.command_line
        record = self._as_values(self.config)
        for name in NOT_RECORDED:
            record.pop(name, None)
        if "weights_only" in record:
            record["weights_only"] = None  # trust in one file is not for others
        if line.shows_origins:
            print_origins(record, line.layers, line.flags)
            raise SystemExit(0)
        refuse_redacted(record)
        notes = [f"renamed  {notice}" for notice in line.renames.notices]
        if line.without_effect:
            names = ", ".join(line.without_effect)
            notes.append(f"W&B      no option, and without effect: {names}")
        if line.checkpoint.from_checkpoint:
            differing = differences(record, line.asked_layers, line.flags)
            notes += [f"differs  {difference}" for difference in differing]
        if line.verb == "fit" and line.checkpoint.mode in ("init_from", "ckpt_path"):
            notes += self._taken_over(record)
        self.options_parser.without_link_targets(record)
        for name in record["callbacks"].keys() - self.callbacks.keys():
            if record["callbacks"][name] is None:  # a name that nothing would then give a class
                del record["callbacks"][name]
        return record, notes

    def _as_values(self, config: Namespace) -> dict[str, Any]:
        everything = {"skip_unset": False, "skip_link_targets": False}
        values = json.loads(self.parser.dump(config, format="json", **everything))
        return dict(self._of_subcommand(values))

    def _taken_over(self, record: dict[str, Any]) -> list[str]:
        """Return a line on what a new run takes from the run of its checkpoint."""
        line = self.command_line
        words = line.words(not self.options_parser.default_env, with_checkpoint=False)
        try:
            without = dict(iter_settings(self._as_values(self._parse(self.parser, words))))
        except ArgumentError:
            return ["taken    from that run: all that no file and no flag gives"]
        taken = [
            f"{display_name(name)} {value}"
            for name, value in iter_settings(record)
            if without.get(name) != value and name not in self.options_parser.link_targets
        ]
        return [f"taken    from that run: {', '.join(taken)}"] if taken else []

    def _start_run(self) -> Run:
        """Agree with all ranks on the run's id."""
        line = self.command_line
        given = line.checkpoint.run_id or line.run_id or os.environ.get("WANDB_RUN_ID")
        run_id, self.shutdown.repeatable = broadcast_run_id(given, self.resources)
        run = Run(run_id, line.checkpoint.root)
        self.notes += unused_folder(run.folder)
        run.export()
        self.shutdown.run = run
        return run

    def _checkpoint(self) -> CheckpointLayers:
        """Return what to begin from; a job that is started again resumes its run."""
        checkpoint = self.command_line.checkpoint
        begins = self.command_line.verb == "fit" and checkpoint.mode != "resume"
        if not begins or not list(self.run.checkpoints.glob("*.ckpt")):
            if checkpoint.path in OF_THE_RUN:
                problem = f"run {self.run.id} is new and has no checkpoint"
                raise UsageError(f"--ckpt_path {checkpoint.path}: {problem}; expected {REFERENCE}")
            if begins and not is_restarted():
                self._refuse_taken_id()
            return checkpoint
        path = str(find_restart_checkpoint(self.run))
        return CheckpointLayers("resume", self.run.root, self.run.id, path)

    def _refuse_taken_id(self) -> None:
        """Refuse the name of a run that has ended well, without a checkpoint to resume."""
        record = read_record(self.run.folder)
        if self.command_line.run_id and record is not None and record.state == "finished":
            remove = python_command("runs", "rm", display_path(self.run.folder))
            problem = f"run {self.run.id} is there already, a {record.verb} without checkpoints"
            raise UsageError(f"{problem}; expected another --run_id, or before this: {remove}")

    # The trainer.

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add our callbacks and metrics.csv, and drop what other settings rule out."""
        settings = self._of_subcommand(self.config_init).trainer
        callbacks = self._trainer_callbacks(settings)
        barebones = settings.get("barebones")
        if barebones:
            kwargs.update(dict.fromkeys(BAREBONES))
        elif wants_progress(settings, callbacks):
            kwargs["enable_progress_bar"] = is_terminal(sys.stdout)
            callbacks += progress_callbacks()
        if self.subcommand is not None and not barebones:
            callbacks.append(self.shutdown)  # last: it sees what the others made of a batch
        if settings.get("enable_checkpointing") is False:
            callbacks = [one for one in callbacks if not isinstance(one, Checkpoint)]
        # Without any, Lightning would add a ModelCheckpoint.
        saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
        kwargs["enable_checkpointing"] = saves
        if shares_data(settings):
            kwargs["use_distributed_sampler"] = False  # TrainState does it
        accepted = {name: value for name, value in kwargs.items() if name in settings}
        trainer = super().instantiate_trainer(callbacks=callbacks, **accepted)
        self._prepare(trainer)
        return trainer

    def _trainer_callbacks(self, settings: Namespace) -> list[Callback]:
        """Return the callbacks in the order in which they are called."""
        own = settings.get("callbacks") or []
        own = list(own) if isinstance(own, list) else [own]
        if settings.get("barebones"):
            return own
        state = TrainState(shares_data(settings))
        saves = BackgroundSaves((ModelCheckpoint, LastCheckpoint))
        # Before those of the team: what theirs log counts for ours.
        first = [state, saves, self.restore, self.recorder, *own]
        if self.command_line.verb == "fit":
            named = self.named_callbacks
            best = named.get("checkpoint")
            if isinstance(best, ModelCheckpoint):
                decide_the_best(best)
            check = MetricNameCheck(named, self.monitor)
            return [*first, check, *named.values()]
        file = self._of_subcommand(self.config_init).get("predictions")
        writes = any(isinstance(callback, BasePredictionWriter) for callback in own)
        if self.command_line.verb == "predict" and file and not writes:
            from .predictions import PredictionWriter

            first.append(PredictionWriter(self.run.folder / file))
        return first

    @property
    def named_callbacks(self) -> dict[str, Callback]:
        """The callbacks of the configuration's section `callbacks` that are not switched off.

        Those that a subclass added by `add_lightning_class_args` are LightningCLI's to add.
        """
        named = vars(self._of_subcommand(self.config_init).callbacks)
        registered = self.options_parser.callback_keys
        return {
            name: callback
            for name, callback in named.items()
            if callback is not None and f"callbacks.{name}" not in registered
        }

    def _prepare(self, trainer: Trainer) -> None:
        """Lock the run's folder, and add what the trainer takes after it is made."""
        dry_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                logger.use_run(self.run)
        self.shutdown.trainer = trainer  # an error before `setup` must end W&B's run too
        if self.recorder in callbacks and not dry_run:
            callbacks.append(RunProgress(self.recorder, self.subcommand is not None))
            if trainer.is_global_zero:
                self.shutdown.made_folder = self.run.lock(self.resources)
        strip_noop_hooks(callbacks)
        strip_noop_profiler(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = BackgroundCheckpointIO()
        for callback in trainer.checkpoint_callbacks if dry_run else ():
            vars(callback)["save_last"] = False  # Lightning writes it even then
        if not trainer.barebones:
            others = trainer.loggers
            if dry_run:  # Lightning's stand-in does not take every call
                others = [DryRunLogger() if type(one) is DummyLogger else one for one in others]
            is_only_one = not trainer.loggers
            file = MetricsFile(self.run.folder, trainer, not dry_run, is_only_one)
            trainer.loggers = [*others, file]
            self.resources.callback(file.finalize, "failed")  # if the trainer does not

    # Around `fit`.

    def before_fit(self) -> None:
        """Begin with the weights of another run if asked to, and compile the model."""
        if self.checkpoint.mode == "init_from":
            file = Path(str(self.checkpoint.path))
            load_initial_weights(self.model, file, self.command_line.weights_only)
        options = self._of_subcommand(self.config_init)
        if options.matmul_precision:
            torch.set_float32_matmul_precision(options.matmul_precision)
        for module in self.model.children() if options.compile else ():
            has_parameters = next(module.parameters(), None) is not None
            if has_parameters:  # a metric has none
                module.compile()  # in place: names in a checkpoint stay as they are

    def after_fit(self) -> None:
        """Test the best checkpoint if asked to, and say what the run left."""
        trainer = self.trainer
        options = self._of_subcommand(self.config_init)
        if options.get("test_after_fit"):
            best = best_or_last(trainer)
            path = best if is_of_this_run(trainer, best) else None
            trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.global_step == self.restore.restored_step:
            say(f"done     nothing was left to train after step {trainer.global_step}")
        default_root = self.command_line.default_root
        print_outcome(trainer, self.run, self.named_callbacks, default_root)


def wants_progress(settings: Namespace, callbacks: list[Callback]) -> bool:
    """Return True unless a setting, or a bar among the callbacks, says otherwise."""
    has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    return settings.get("enable_progress_bar") is not False and not has_bar


def shares_data(settings: Namespace) -> bool:
    """Return True if loaders are to be shared among ranks and to be resumed."""
    return bool(settings.get("use_distributed_sampler")) and not settings.get("barebones")
