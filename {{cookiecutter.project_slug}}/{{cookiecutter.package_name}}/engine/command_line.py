"""What a command asks for: its subcommand, layers of values, flags, and the checkpoint it takes.

Values come from, the lowest first: defaults.yaml, W&B's variables, the checkpoint's run, `--config`
files in their order, what a sweep sets, flags wherever they stand. The `model` section of a
checkpoint lies below the files for `fit`, which trains what it is asked for now, and above them for
the other subcommands, which evaluate the model as it was trained.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from .commands import SUBCOMMANDS
from .errors import UsageError, did_you_mean
from .layers import SAVED_MODEL, Layer, read_layers
from .legacy import Renames
from .provenance import SHOW_ORIGINS, display_name, given_settings
from .resume import CHECKPOINT_FLAGS, Asked, resolve_checkpoint_flags
from .run import runs_root
from .wandb_variables import (
    OF_LAUNCH,
    OF_SWEEP,
    controller_layers,
    known_part,
    variable_layers,
    without_record_flags,
)

RUN_FLAGS = ("runs_root", "run_id")
NOT_RECORDED = (*CHECKPOINT_FLAGS, *RUN_FLAGS)  # a recorded configuration begins a new run


class CommandLine:
    """A command line, read before the parser sees it.

    Args:
        args: Words, or a configuration as LightningCLI takes it; `sys.argv` if None.
        subcommands: Those of the parser; empty where it has none (`run=False`).
        default_files: Configuration files below all others.

    Raises:
        UsageError: If a file or a checkpoint is not there.
        argparse.ArgumentError: If an option lacks its value.
    """

    def __init__(self, args: Any, subcommands: Sequence[str], default_files: Sequence[str]) -> None:
        self.argv, values = split_args(args)
        has_verb = bool(subcommands)
        self.verb = self.argv[0] if has_verb and self.argv else "fit"
        self.renames = Renames()
        given, flags = known_flags(self.argv[1:] if has_verb else self.argv)
        self.flags = self.renames.in_flags(without_record_flags(flags))
        files = read_layers(given.pop("config"), self.renames)
        if values:
            files += read_layers([as_json(values)], self.renames)
        has_files = bool(files)
        files += controller_layers()
        given = {**given_in_files(files), **given}
        self.run_id: str | None = given.get("run_id")
        self.root = Path(given.get("runs_root") or runs_root()).expanduser().absolute()
        named_checkpoint = {name: given[name] for name in CHECKPOINT_FLAGS if name in given}
        settings = {one.name: one.value for one in given_settings(files, self.flags)}
        self.weights_only = settings.get("weights_only") is not False
        model_class = settings.get("model.class_path") or settings.get("model")
        asked = Asked(
            self.verb,
            self.root,
            has_files,
            model_class if isinstance(model_class, str) else "",
            self.weights_only,
        )
        self.checkpoint = resolve_checkpoint_flags(asked, named_checkpoint)
        self._refuse_another_id()
        self.default_root = self.checkpoint.root == runs_root()  # where a run's id is enough
        self._refuse_random_weights()
        marked = self.checkpoint.from_checkpoint
        self.defaults = read_layers(default_files, self.renames)
        self.defaults += variable_layers(self.defaults)
        self.under = read_layers(self.checkpoint.under, self.renames, marked)
        over = read_layers(self.checkpoint.over, self.renames, marked)
        self.files = files
        self.asked_layers = [*self.under, *files, *over]
        self.without_effect: list[str] = []  # what a sweep sets, and is no option

    @property
    def layers(self) -> list[Layer]:
        """All layers of values below the flags, the lowest first."""
        return [*self.defaults, *self.asked_layers]

    def leave_out_unknown(self, options: Collection[str]) -> None:
        """Leave out that for which this subcommand has no option.

        What the run of a checkpoint has goes without a word, what a sweep sets is noted.

        Args:
            options: The options and sections of the subcommand.
        """
        count = len(self.under)
        for index, layer in enumerate(self.under):
            known = {name: layer.values[name] for name in layer.values if name in options}
            if len(known) < len(layer.values):
                self.under[index] = replace(layer, argument=json.dumps(known), values=known)
        self.asked_layers = [*self.under, *self.asked_layers[count:]]
        for index, layer in enumerate(self.asked_layers):
            if layer.name in (OF_SWEEP, OF_LAUNCH):
                self.asked_layers[index], others = known_part(layer, options)
                self.without_effect += others

    @property
    def shows_origins(self) -> bool:
        return SHOW_ORIGINS in self.flags

    def words(self, with_defaults: bool = True, with_checkpoint: bool = True) -> list[str]:
        """Return what the parser of the subcommand reads.

        Args:
            with_defaults: Whether the default files are among them.
            with_checkpoint: Whether the layers are that a checkpoint brings below the files.
        """
        layers = self.layers if with_defaults else self.asked_layers
        if not with_checkpoint:
            layers = [layer for layer in layers if layer not in self.under]
        files = [word for layer in layers for word in ("--config", layer.argument)]
        return [*files, *(flag for flag in self.flags if flag != SHOW_ORIGINS)]

    def given_names(self) -> set[str]:
        """Return the display names of all options that are given, to which links yield.

        What a checkpoint says of its model counts for an evaluation alone: a `fit` may begin from
        it with other data.
        """
        layers = self.layers
        if self.verb == "fit":
            layers = [layer for layer in layers if layer.name != SAVED_MODEL]
        return {display_name(given.name) for given in given_settings(layers, self.flags)}

    def changed_names(self) -> set[str]:
        """Return the display names of the options that the command's files and flags give.

        What a checkpoint's run brings is not among them.
        """
        return {display_name(given.name) for given in given_settings(self.files, self.flags)}

    def new_callbacks(self, known: Collection[str]) -> list[str]:
        """Return further names under `callbacks`, each with a class that a file or a flag gives.

        Raises:
            UsageError: If a name is unknown, and nothing says its class.
        """
        sources: dict[str, str] = {}
        with_class: set[str] = set()
        for given in given_settings(self.layers, self.flags):
            section, _, rest = given.name.partition(".")
            name, _, option = rest.partition(".")
            if section != "callbacks" or not name or name in known or option == "help":
                continue
            sources[name] = f"{given.source}:" if not given.is_flag else ""
            if option == "class_path" or (not option and isinstance(given.value, str)):
                with_class.add(name)
        for name in sources.keys() - with_class:
            option = f"callbacks.{name}"
            where = f"{sources[name]} {option}" if sources[name] else f"--{option}"
            hint = did_you_mean(option, (f"callbacks.{one}" for one in known))
            needs = f"a callback of that name needs a class_path, as in --{option} CLASS"
            raise UsageError(f"{where}: no such option{hint}; {needs}")
        return list(sources)

    def _refuse_another_id(self) -> None:
        resumed = self.checkpoint.run_id
        if resumed and self.run_id not in (None, resumed):
            problem = f"--resume names {resumed}, --run_id names {self.run_id}"
            raise UsageError(f"{problem}; --ckpt_path begins a new run")

    def _refuse_random_weights(self) -> None:
        asks_for_help = bool({"-h", "--help"} & set(self.flags))
        evaluates = self.verb in SUBCOMMANDS[1:]
        if evaluates and not self.checkpoint.path and not asks_for_help:
            expected = "expected --ckpt_path RUN, or a checkpoint file"
            raise UsageError(f"{self.verb}: {expected}; random weights are no result")


def split_args(args: Any) -> tuple[list[str], dict[str, Any]]:
    """Return the words of a command, and the values that were given as a dict instead."""
    if args is None:
        return sys.argv[1:], {}
    if not isinstance(args, dict | Namespace):
        return [str(word) for word in args], {}
    values = args.as_dict() if isinstance(args, Namespace) else dict(args)
    verb = values.get("subcommand") or next(iter(values), "")
    nested = values.get(verb)
    return ([verb], dict(nested)) if isinstance(nested, dict) else ([], values)


def as_json(values: dict[str, Any]) -> str:
    """Return values that were given in Python as a layer.

    Raises:
        UsageError: If config.yaml could not hold them. Objects go into `trainer_defaults`.
    """
    try:
        return json.dumps(values)
    except TypeError as error:
        problem = f"args: expected values that JSON can hold ({error})"
        raise UsageError(f"{problem}; trainer_defaults takes callbacks") from error


def given_in_files(files: Sequence[Layer]) -> dict[str, Any]:
    """Return which run and checkpoint files name; a later file wins."""
    given = {}
    for layer in files:
        for name in NOT_RECORDED:
            if layer.values.get(name) is not None:
                given[name] = layer.values[name]
    return given


def known_flags(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the flags that name files, a checkpoint or a run, and all other words."""
    known = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    known.add_argument("-c", "--config", action="append", default=[])
    for name in NOT_RECORDED:
        known.add_argument(f"--{name}")
    found, others = known.parse_known_args(argv)
    given = {name: value for name, value in vars(found).items() if value is not None}
    return given, others
