"""Words for what jsonargparse finds wrong: which option, where it stands, what was expected, the nearest right name.

Imported only when something is wrong. jsonargparse names a nested option by its last part alone and says the rest in
many lines, so the option is looked up in what the user gave.
"""

import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .origins import given, place_of
from .run import PROJECT, SECTIONS, Mistake, nearest, shown

UNKNOWN = r"unrecognized arguments: --([^\s=]+)|(?:does not accept option|Option) '(.+?)'"
WORDED = (FileNotFoundError, ImportError, MisconfigurationException, RuntimeError, TypeError, ValueError)


def explain(error: BaseException, parser: LightningArgumentParser, layers: Sequence[str], flags: Sequence[str]) -> str:
    """Rewrites what jsonargparse raised; the parsers that it came through know the options of nested classes."""
    for file in (Path(layer) for layer in layers if not layer.startswith("{")):
        if problem := broken(file):
            return problem
    message, parsers = str(error), [parser]
    cause: BaseException | None = error
    while cause:
        selves = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(cause.__traceback__)]
        parsers += [other for other in selves if isinstance(other, LightningArgumentParser)]
        cause = cause.__cause__ or cause.__context__
    names = [name for one in dict.fromkeys(parsers) for name, _ in one.get_defaults(skip_validation=True).items()]
    if found := re.search(UNKNOWN, message):
        key = found[1] or found[2]
        leaf = key.rpartition(".")[2]
        if leaf == "class_path":
            return f"{place(key, layers, flags)}: expected nothing beside it but init_args, which holds the options"
        siblings = {name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == key.rpartition(".")[0]}
        hint = nearest(key, names) or nearest(leaf, siblings) or nearest(leaf, (n.rpartition(".")[2] for n in names))
        return f"{place(key, layers, flags)}: no such option{hint}"
    if found := re.search(r'.*Parser key "(?P<key>.+?)":(?P<rest>.*)', message, re.DOTALL):  # the last, innermost one
        return f"{place(found['key'], layers, flags)}: {expectation(found['rest'].strip(), found['key'])}"
    if found := re.search(r"arguments are required: (.+)", message):
        options = ", ".join("--" + name.partition(".")[2] for name in found[1].split(", "))
        return f"{options}: missing; give a configuration, such as --config configs/digits.yaml"
    return message


def broken(file: Path) -> str:
    """What is wrong with a configuration file as a whole, if anything is."""
    if not file.is_file():
        near = nearest(file.name, (other.name for other in (*file.parent.glob("*"), *(PROJECT / "configs").glob("*"))))
        return f"{shown(file)}: {'expected a file, got a folder' if file.is_dir() else f'no such file{near}'}"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        return f"{shown(file)}: {error}"
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        return f"{shown(file)}{line}: {error.problem}"
    if not isinstance(content, dict):
        return f"{shown(file)}: expected sections such as `model:`, got {content!r:.60}"
    sections = [name for name in SECTIONS if not isinstance(content.get(name, {}), dict)]
    return f"{shown(file)}: {sections[0]}: expected options, got {content[sections[0]]!r:.60}" if sections else ""


def expectation(text: str, option: str) -> str:
    """Says what was expected and what came instead, given the many lines of a failed type."""
    if found := re.search(r"arguments are required: (.+)", text):
        return f"missing: {found[1]}"
    came = re.search(r"(?:Got value|Given value): ?(.*)", text)
    value = came[1] if came else ""
    if bad := re.search(r"(dot import path string)|module '\S+' has no attribute '\S+'|No module named '\S+'", text):
        if found := re.search(r"class_path'?[:=] ?'(\S+?)'", value):
            value = found[1]
        reason = "" if bad[1] else f" ({bad[0]})"
        return f"no class {value}{reason}{nearest(value.rpartition('.')[2], classes(option))}"
    kinds = re.search(r"Subtypes: [\[(](.*)[\])]\n", text) or re.match(r"Expected an? (.*?)\. Got value", text)
    if kinds is None:
        return text
    names = re.sub(r"(?:\w+\.)+(?=\w)", "", re.sub(r"<class '(.*?)'>", r"\1", kinds[1])).replace("NoneType", "null")
    value = re.sub(r"NestedArg\(key='(.*?)'.*", r"its option \1", value)
    return f"expected {names if '[' in names else names.replace(', ', ' or ')}, got {value or 'nothing'}"


def classes(option: str) -> Iterator[str]:
    """The names of all classes that an option's `class_path` could mean."""
    bases = {"model": LightningModule, "data": LightningDataModule, "trainer.logger": Logger, "optimizer": Optimizer}
    todo: list[type] = [bases[option]] if option in bases else [*bases.values(), Callback, LRScheduler]
    while todo:
        todo += todo[0].__subclasses__()
        yield todo.pop(0).__name__


def place(key: str, layers: Sequence[str], flags: Sequence[str]) -> str:
    """Where the user wrote `key`, of which only the end may be known: `--model.lr` or `x.yaml: model.init_args.lr`."""
    for source, name, _ in reversed([*given(layers, flags, in_lists=True)]):
        if found := re.match(rf"(.*?\.)?{re.escape(key)}(?=\.|$)", name):
            return f"--{found[0]}" if source.startswith("--") else f"{place_of(source)}: {found[0]}"
    return key


def modules_of(error: BaseException) -> list[str]:
    """The modules that an exception came through, outermost first."""
    return [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]


def cause_of(error: BaseException) -> BaseException:
    """What to raise for an error: a Mistake for settings that cannot be, in Lightning's words, or the user's own error.

    It is the user's if their code had a part in it. What a constructor raised is wrapped by jsonargparse.
    """
    while (cause := error.__cause__) and cause.__traceback__ and modules_of(error)[-1].startswith("jsonargparse"):
        error = cause
    libraries = rf"({re.escape(str(__package__))}|lightning|jsonargparse|torch|fsspec|contextlib)(\.|$)"
    modules, (message, *lines) = modules_of(error), [line.strip() for line in str(error).splitlines()] or [""]
    if lines and message.startswith("Error(s) in loading state_dict for "):
        kind, more = message.split()[-1].rstrip(":"), f" (and {len(lines) - 1} more)" if lines[1:] else ""
        message = f"the checkpoint does not fit {kind}: {lines[0]}{more}"
    else:
        message = str(error) if modules[-1].startswith(("lightning.", "fsspec.")) else ""
    if not message or not isinstance(error, WORDED) or not all(re.match(libraries, module) for module in modules):
        return error
    mistake = Mistake(message)
    mistake.__cause__ = error
    return mistake
