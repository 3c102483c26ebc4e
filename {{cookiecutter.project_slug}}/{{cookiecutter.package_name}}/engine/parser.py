"""The parser of the command line, Lightning's, and of each class that is named on it.

jsonargparse makes the parser of a nested class with the class of the outer parser, so the
overrides hold at any depth.
"""

import inspect
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Collection
from pkgutil import resolve_name
from typing import Any

import torch
from jsonargparse import Namespace
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser

from .errors import UsageError
from .provenance import display_name

PLAIN_TYPES = (bool, int, float, str, list, tuple, dict, set, type(None))
register_type(torch.device)  # text for people: cuda:0


class Parser(LightningArgumentParser):
    """A LightningArgumentParser whose links yield to values that are given.

    Defaults that YAML cannot hold stay defaults instead of ending the command, and an error knows
    the parser in which it arose.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.link_targets: dict[str, str] = {}  # and when each is applied
        self.given: Collection[str] = ()  # display names of options that files or flags give
        self._instantiating: Namespace | None = None
        super().__init__(*args, **{"exit_on_error": False, "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise an ArgumentError that names this parser, in its attribute `parser`."""
        try:
            super().error(message, ex)
        except ArgumentError as error:
            error.parser = self  # type: ignore[attr-defined]
            raise

    def add_function_arguments(
        self, *args: Any, linked_targets: Any = None, **kwargs: Any
    ) -> list[str]:
        """As jsonargparse's, which is called with `linked_targets` for a function as class path.

        jsonargparse 4.53 does not accept that argument of its caller, and so refuses each function
        where there is a link.
        """
        return super().add_function_arguments(*args, **kwargs)

    def link_arguments(
        self,
        source: Any,
        target: str,
        compute_fn: Callable[..., Any] | None = None,
        apply_on: str = "parse",
    ) -> Any:
        """As jsonargparse's, but a link from an attribute of an object yields to what is given.

        It also leaves the default of the target where the object has no such attribute, for which
        jsonargparse would raise an error with the object's text in it: that of a data module calls
        all of its loaders.

        Raises:
            UsageError: If there is no such argument to link.
        """
        if apply_on == "instantiate" and compute_fn is None and isinstance(source, str):
            source, compute_fn = self._attribute_link(source, target)
        try:
            linked = super().link_arguments(source, target, compute_fn, apply_on)
        except ValueError as error:
            raise UsageError(f"link from {source} to {target}: {error}") from error
        self.link_targets[target] = apply_on
        return linked

    def _attribute_link(self, source: str, target: str) -> tuple[str, Callable[..., Any] | None]:
        """Return the object to link from, and the function that takes the attribute from it."""
        owner_name, _, attribute = source.rpartition(".")
        if not owner_name:
            return source, None
        option = display_name(target)

        def compute_fn(owner: Any) -> Any:
            if option not in self.given and hasattr(owner, attribute):
                return getattr(owner, attribute)
            current = self._instantiating.get(target) if self._instantiating else None
            missing = current is None and option not in self.given
            if missing and self._is_required(target):
                kind = type(owner).__name__
                raise UsageError(f"{option}: missing; {kind} has no {attribute} to take it from")
            return current

        compute_fn.__name__ = f"{attribute}, unless it is given, of"  # in `--help`
        return owner_name, compute_fn

    def _is_required(self, target: str) -> bool:
        owner, _, argument = target.partition(".init_args.")
        config = self._instantiating
        if config is None or not argument:
            return False
        return is_required(config[owner].class_path, argument)

    def instantiate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> Namespace:
        """As jsonargparse's; links look up what is given in the configuration meanwhile."""
        self._instantiating = namespace
        return super().instantiate(namespace, *args, **kwargs)

    def without_link_targets(self, config: dict[str, Any]) -> None:
        """Remove what links determine from a configuration, so that they do so again."""
        for target, apply_on in self.link_targets.items():
            yields = apply_on == "instantiate" and display_name(target) in self.given
            if yields:
                continue
            *path, name = target.split(".")
            part: Any = config
            for key in path:
                part = part.get(key) if isinstance(part, dict) else None
            if isinstance(part, dict):
                part.pop(name, None)

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """As jsonargparse's, without those defaults of which no text could be read again."""
        namespace = namespace.clone()
        for name, default in self.get_defaults(skip_validation=True).items():
            is_default = namespace.get(name) is default and type(default) not in PLAIN_TYPES
            if is_default and not self._can_dump(name, default, kwargs):
                namespace.pop(name)
        return super().dump(namespace, *args, **kwargs)

    def _can_dump(self, name: str, value: Any, options: dict[str, Any]) -> bool:
        single = Namespace()
        single[name] = value
        with warnings.catch_warnings(action="error"):
            try:
                return bool(super().dump(single, **{**options, "skip_validation": True}))
            except Exception:  # of any class's own serializer
                return False


def is_required(class_path: str, argument: str) -> bool:
    """Return True if a class, or function, cannot be called without this argument."""
    parameters = inspect.signature(resolve_name(class_path)).parameters
    return argument in parameters and parameters[argument].default is inspect.Parameter.empty
