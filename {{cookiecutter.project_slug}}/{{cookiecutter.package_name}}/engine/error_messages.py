"""One line for what jsonargparse or Lightning find wrong with a command.

The line has the option, where it stands, what was expected, what came, and the nearest right name.
jsonargparse names a nested option by its last part alone, so it is looked up in what was given.
"""

import inspect
import re
import traceback
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .errors import UsageError, did_you_mean
from .files import display_path
from .layers import Layer
from .provenance import given_settings

UNKNOWN_OPTION = re.compile(
    r"unrecognized arguments: --([^\s=]+)|(?:does not accept option|Option) '(.+?)'"
)
NESTED_KEY = re.compile(r'.*Parser key "(?P<key>.+?)":(?P<rest>.*)', re.DOTALL)  # the innermost
NESTED_VALUE = re.compile(r"""NestedArg\(key='.*?', val=['"]?(.*?)['"]?\)$""")
NO_CLASS = re.compile(
    r"(dot import path string)|module '\S+' has no attribute '\S+'|No module named '\S+'"
)
# Errors of Lightning whose message alone is enough, where no code of the user had a part in it.
CONCISE_ERRORS = (
    FileNotFoundError,
    ImportError,
    MisconfigurationException,
    RuntimeError,
    TypeError,
    ValueError,
)
BASE_CLASSES = {
    "model": LightningModule,
    "data": LightningDataModule,
    "trainer.logger": Logger,
    "optimizer": Optimizer,
}


@dataclass(frozen=True)
class Given:
    """What the user gave, in which an option's place is looked up."""

    layers: Sequence[Layer]
    flags: Sequence[str]

    def place(self, key: str) -> str:
        """Return where `key` was written: `--model.lr` or `x.yaml: model.init_args.lr`."""
        pattern = re.compile(rf"(.*?\.)?{re.escape(key)}(?=\.|$)")
        settings = list(given_settings(self.layers, self.flags, in_lists=True))
        for setting in reversed(settings):
            if found := pattern.match(setting.name):
                return f"--{found[0]}" if setting.is_flag else f"{setting.source}: {found[0]}"
        return key


def explain(error: BaseException, parser: LightningArgumentParser, given: Given) -> str:
    """Return one line for an error of jsonargparse.

    Args:
        error: The error.
        parser: The parser of the subcommand.
        given: Layers and flags.
    """
    message = str(error)
    if found := UNKNOWN_OPTION.search(message):
        return unknown_option(found[1] or found[2], option_names(error, parser), given)
    if found := NESTED_KEY.search(message):
        key = found["key"]
        return f"{given.place(key)}: {explain_type(found['rest'].strip(), key)}"
    if found := re.search(r"arguments are required: (.+)", message):
        options = ", ".join("--" + name.partition(".")[2] for name in found[1].split(", "))
        return f"{options}: missing; give a configuration, such as --config configs/digits.yaml"
    return message


def option_names(error: BaseException, parser: LightningArgumentParser) -> list[str]:
    """Return the options of the parsers that an error came through, outermost first."""
    parsers = [parser]
    cause: BaseException | None = error
    while cause:
        nested = getattr(cause, "parser", None) if isinstance(cause, ArgumentError) else None
        if nested is not None and nested not in parsers:
            parsers.append(nested)
        cause = cause.__cause__ or cause.__context__
    return [name for one in parsers for name, _ in one.get_defaults(skip_validation=True).items()]


def unknown_option(key: str, names: Sequence[str], given: Given) -> str:
    """Return the line for an option that is not there."""
    where = given.place(key)
    section, _, leaf = key.rpartition(".")
    if leaf == "class_path":
        beside = "expected nothing beside it but init_args, which holds the options"
        return f"{where}: {beside}"
    siblings = {name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == section}
    leaves = [name.rpartition(".")[2] for name in names]
    deeper = [name for name in class_options(given) if name.endswith(f".{leaf}")]
    if not section and deeper:
        return f"{where}: no such option; did you mean {' or '.join(deeper)}?"
    hint = did_you_mean(key, names) or did_you_mean(leaf, siblings) or did_you_mean(leaf, leaves)
    return f"{where}: no such option{hint}"


def class_options(given: Given) -> Iterator[str]:
    """Yield the options of the classes that are given for the model and the data."""
    settings = list(given_settings(given.layers, given.flags))
    for section in ("model", "data"):
        named = (section, f"{section}.class_path")
        paths = [one.value for one in settings if one.name in named and isinstance(one.value, str)]
        for kind in classes_of(section) if paths else ():
            if f".{kind.__module__}.{kind.__qualname__}".endswith(f".{paths[-1]}"):
                yield from (f"{section}.{name}" for name in inspect.signature(kind).parameters)


def explain_type(text: str, option: str) -> str:
    """Return what was expected and what came, given the many lines of a failed type."""
    if found := re.search(r"arguments are required: (.+)", text):
        return f"missing: {found[1]}"
    came = re.search(r"(?:Got value|Given value): ?(.*)", text)
    value = re.sub(
        r"NestedArg\(key='.*?', val=['\"]?(.*?)['\"]?\)$", r"\1", came[1] if came else ""
    )
    if found := NO_CLASS.search(text):
        return no_class(value, option, "" if found[1] else f" ({found[0]})")
    if problem := import_problem(value):
        return problem
    if found := re.search(r"does not correspond to a subclass of (\S+)", text):
        return f"expected {found[1]}, got {value}"
    subtypes = re.search(r"Subtypes: [\[(](.*)[\])]\n", text)
    kinds = subtypes or re.match(r"Expected an? (.*?)\. Got value", text)
    if kinds is None:
        return text
    return f"expected {type_names(kinds[1])}, got {value or 'nothing'}"


def no_class(value: str, option: str, reason: str) -> str:
    """Return the line for a class that cannot be imported, with the nearest known one."""
    if found := re.search(r"class_path'?[:=] ?'(\S+?)'", value):
        value = found[1]
    name = value.rpartition(".")[2]
    known = {one for one in class_names(option) if one != name}
    hint = did_you_mean(name, known)
    if not hint and name == value:
        hint = "; a class that is not in the project's package, Lightning or torch needs its path"
    return f"no class {value}{reason}{hint}"


def import_problem(path: str) -> str:
    """Return why a class path is of no use although its file is there; "" if it is not that."""
    module = path.rpartition(".")[0]
    if not re.fullmatch(r"\w+(\.\w+)*", module):
        return ""
    try:
        found = resolve_name(path)
    except (ImportError, AttributeError):
        return ""
    except SyntaxError as error:
        where = f"{display_path(Path(error.filename or module))}, line {error.lineno}"
        return f"{path} cannot be imported: {where}: {error.msg}"
    except Exception as error:  # whatever the module raises
        return f"{path} cannot be imported: {type(error).__name__}: {error}"
    bases = [base.__module__ for base in getattr(found, "__mro__", ())]
    if any(re.match(r"pytorch_lightning(\.|$)", base) for base in bases):
        return f"expected a class of lightning.pytorch, got {path} of pytorch_lightning"
    return ""


def type_names(kinds: str) -> str:
    """Return types as one says them: `int or null` for `<class 'int'>, NoneType`."""
    bare = re.sub(r"<class '(.*?)'>", r"\1", kinds)
    names = re.sub(r"(?:\w+\.)+(?=\w)", "", bare).replace("NoneType", "null")
    return names if "[" in names else names.replace(", ", " or ")


def class_names(option: str) -> Iterator[str]:
    """Yield the names of all classes that an option's `class_path` could mean."""
    for kind in classes_of(option):
        yield kind.__name__


def classes_of(option: str) -> Iterator[type]:
    """Yield all classes that an option's `class_path` could mean."""
    every: list[type] = [*BASE_CLASSES.values(), Callback, LRScheduler]
    pending = [BASE_CLASSES[option]] if option in BASE_CLASSES else every
    while pending:
        kind = pending.pop(0)
        pending += kind.__subclasses__()
        yield kind


def modules_of(error: BaseException) -> list[str]:
    """Return the modules that an exception came through, outermost first."""
    frames = traceback.walk_tb(error.__traceback__)
    return [frame.f_globals.get("__name__", "") for frame, _ in frames]


def cause_of(error: BaseException) -> BaseException:
    """Return what to raise for an error.

    That is a UsageError in Lightning's words for settings that do not go together, or else the
    error itself: it is the user's if their code had a part in it. jsonargparse wraps what a
    constructor raised.
    """
    while is_wrapped(error):
        error = error.__cause__ or error
    modules = modules_of(error)
    message = library_message(error, modules)
    package = re.escape(str(__package__))
    libraries = rf"({package}|lightning|jsonargparse|torch|fsspec|contextlib)(\.|$)"
    own_code = not all(re.match(libraries, module) for module in modules)
    if not message or own_code or not isinstance(error, CONCISE_ERRORS):
        return error
    usage_error = UsageError(message)
    usage_error.__cause__ = error
    return usage_error


def is_wrapped(error: BaseException) -> bool:
    """Return True for an error that jsonargparse raised because of another."""
    cause = error.__cause__
    if cause is None or not cause.__traceback__:
        return False
    return modules_of(error)[-1].startswith("jsonargparse")


def library_message(error: BaseException, modules: Sequence[str]) -> str:
    """Return the message if a library raised the error about a user's settings, or else ""."""
    lines: list[Any] = [line.strip() for line in str(error).splitlines()] or [""]
    if lines[1:] and lines[0].startswith("Error(s) in loading state_dict for "):
        kind = lines[0].split()[-1].rstrip(":")
        more = f" (and {len(lines) - 2} more)" if lines[2:] else ""
        return f"the checkpoint does not fit {kind}: {lines[1]}{more}"
    if lines[0].startswith("loaded state dict ") and modules[-1].startswith("torch.optim"):
        return f"the optimizer's state does not fit: {lines[0]}; see --init_from"
    if lines[0].startswith("zip() argument"):
        return "the checkpoint has another number of optimizers or schedules; see --init_from"
    from_library = bool(modules) and modules[-1].startswith(("lightning.", "fsspec."))
    return str(error) if from_library else ""
