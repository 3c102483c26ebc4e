"""Names of earlier releases of the engine in configurations, and what they are called now.

Runs keep their config.yaml for years, so an old name still works; one line says what to type.
"""

import re
from collections.abc import Iterator
from typing import Any

ENGINE = __package__
PACKAGE = ENGINE.rpartition(".")[0]
CLASSES = {
    f"{ENGINE}.wandb.Wandb": f"{ENGINE}.wandb_logger.RunWandbLogger",
    f"{ENGINE}.callbacks.Summaries": f"{ENGINE}.metrics.Summaries",
    f"{ENGINE}.callbacks.Divergence": f"{ENGINE}.metrics.Divergence",
    f"{ENGINE}.resume.Backup": f"{ENGINE}.checkpoints.LastCheckpoint",
    f"{ENGINE}.media.Samples": f"{PACKAGE}.callbacks.Samples",
    f"{ENGINE}.media.Watch": f"{PACKAGE}.watch.Watch",
}
OLD_CLASS = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, CLASSES))})(?!\w)")
OLD_PLACEHOLDER = re.compile(r"\$\{(run|verb)\}")
CALLBACKS = {"backup": "last_checkpoint"}
# What a config.yaml of an earlier release has although nobody asked for it: left out where it is
# null or false. What somebody did ask for is refused by the parser, as any unknown option.
REMOVED = (
    "callbacks.samples",
    "callbacks.watch",
    "predictions_table",
    "trainer.logger.init_args.registry",
)


class Renames:
    """Replaces old names in values and flags; `notices` has a line for each that was found."""

    def __init__(self) -> None:
        self._notices: dict[str, None] = {}

    @property
    def notices(self) -> list[str]:
        return list(self._notices)

    def in_values(self, value: Any, path: str = "") -> Any:
        """Return a configuration with today's names; `path` is the full name of this part."""
        if isinstance(value, dict):
            return dict(self._items(value, path))
        if isinstance(value, list):
            return [self.in_values(item, path) for item in value]
        return self._in_text(value) if isinstance(value, str) else value

    def in_flags(self, flags: list[str]) -> list[str]:
        """Return flags with today's names."""
        return [self._in_flag(flag) for flag in flags]

    def _items(self, values: dict[Any, Any], path: str) -> Iterator[tuple[Any, Any]]:
        prefix = f"{path}." if path else ""
        for key, item in values.items():
            name = f"{prefix}{key}"
            if name in REMOVED and not item:
                continue
            current = self._in_name(name)
            new_key = key if current == name else current.removeprefix(prefix)
            yield new_key, self.in_values(item, current)

    def _in_flag(self, flag: str) -> str:
        if not flag.startswith("--"):
            return self._in_text(flag)
        name, equals, value = flag.partition("=")
        return f"--{self._in_name(name[2:])}{equals}{self._in_text(value)}"

    def _in_name(self, name: str) -> str:
        section, _, rest = name.partition(".")
        callback, dot, option = rest.partition(".")
        if section != "callbacks" or callback not in CALLBACKS:
            return name
        current = CALLBACKS[callback]
        self._note(f"callbacks.{callback}", f"callbacks.{current}")
        return f"callbacks.{current}{dot}{option}"

    def _in_text(self, text: str) -> str:
        for old in OLD_CLASS.findall(text):
            self._note(old, CLASSES[old])
        for old in OLD_PLACEHOLDER.findall(text):
            self._note("${" + old + "}", f"${old}")
        text = OLD_CLASS.sub(lambda found: CLASSES[found[0]], text)
        return OLD_PLACEHOLDER.sub(r"$\1", text)

    def _note(self, old: str, new: str) -> None:
        self._notices[f"{old} is now {new}"] = None
