"""Settings of a W&B run: the logger's options, over W&B's variables and files, over our defaults.

Everything that W&B's client would refuse is refused here, before anything is begun, in one line
that names the option or the variable.
"""

import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

import wandb

from .errors import UsageError, did_you_mean

# The setting that an argument of `wandb.init` is, where it has another name.
RENAMED = {
    "group": "run_group",
    "job_type": "run_job_type",
    "name": "run_name",
    "notes": "run_notes",
    "tags": "run_tags",
    "tensorboard": "sync_tensorboard",
}
# What the run has from elsewhere, and from where.
SET_ELSEWHERE = {
    "dir": "trainer.logger.save_dir",
    "id": "--run_id",
    "log_model": "trainer.logger.log_model",
    "offline": "trainer.logger.offline",
    "root_dir": "trainer.logger.save_dir",
    "run_id": "--run_id",
    "save_dir": "trainer.logger.save_dir",
    "version": "--run_id",
}
ANSWERED_LATER = ("WANDB_API_KEY",)  # where it is wrong, the run is offline
BRANCHES = ("fork_from", "resume_from")  # exclude `resume`


def split_init(init: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings among arguments of `wandb.init`, by option, and the other arguments.

    Raises:
        UsageError: If there is no such argument, or if the run has it from elsewhere.
    """
    known = inspect.signature(wandb.init).parameters
    settings: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in init.items():
        option = f"trainer.logger.init.{name}"
        refuse_elsewhere(option, name)
        if name not in known:
            hint = did_you_mean(name, known)
            raise UsageError(f"{option}: wandb.init has no such argument{hint}")
        is_setting = RENAMED.get(name, name) in wandb.Settings.model_fields
        (settings if is_setting else others)[name] = value
    return settings, others


def checked_settings(options: Iterable[tuple[str, str, Any]], run_id: str | None) -> wandb.Settings:
    """Return settings that hold the options alone.

    Args:
        options: Of each its name for messages, the setting or argument that it is, and its value;
            None leaves it to W&B.
        run_id: The run's id, if it is known.

    Raises:
        UsageError: If W&B's client would refuse one.
    """
    settings = wandb.Settings()
    if run_id is not None:
        settings.run_id = run_id
    for option, argument, value in options:
        name = RENAMED.get(argument, argument)
        refuse_elsewhere(option, name)
        if name not in wandb.Settings.model_fields:
            hint = did_you_mean(name, wandb.Settings.model_fields)
            raise UsageError(f"{option}: W&B has no such setting{hint}")
        if value is None:
            continue
        try:
            setattr(settings, name, tuple(value) if name == "run_tags" else value)
        except (ValueError, wandb.errors.Error) as error:
            raise UsageError(f"{option}: {reason_of(error, value)}") from error
    return settings


def refuse_elsewhere(option: str, name: str) -> None:
    """Raise a UsageError for what the run has from elsewhere."""
    if name in SET_ELSEWHERE:
        raise UsageError(f"{option}: expected {SET_ELSEWHERE[name]} in its place")


def check_variables() -> None:
    """Check W&B's variables of this process.

    Raises:
        UsageError: If W&B's client would refuse one.
    """
    for name, value in os.environ.items():
        if not name.startswith("WANDB_") or name in ANSWERED_LATER:
            continue
        try:
            wandb.Settings().update_from_env_vars({name: value})
        except (ValueError, wandb.errors.Error) as error:
            raise UsageError(f"{name}: {reason_of(error, value)}") from error


def check_together(given: wandb.Settings, run_id: str) -> None:
    """Check options and W&B's variables with each other, and with the run.

    Raises:
        UsageError: If W&B's client would refuse them.
    """
    left_out = (*ANSWERED_LATER, "WANDB_RUN_ID")  # known by now
    settings = wandb.Settings()
    try:
        settings.update_from_env_vars(
            {name: value for name, value in os.environ.items() if name not in left_out}
        )
        settings.update_from_settings(given)
    except (ValueError, wandb.errors.Error) as error:
        raise UsageError(f"W&B's variables and trainer.logger: {reason_of(error, '')}") from error
    rewound = settings.resume_from
    if rewound is not None and rewound.run != run_id:
        raise UsageError(f"resume_from rewinds the run {rewound.run}: expected --run_id with it")


def reason_of(error: Exception, value: Any) -> str:
    """Return what is wrong with a value, in a sentence."""
    details: Any = getattr(error, "errors", None)  # of pydantic, which checks W&B's settings
    if details is None:
        return str(error)
    first = details()[0]
    said = first["msg"].removeprefix("Value error, ")
    got = f", got {value or 'nothing'}" if first["loc"] else ""
    return f"{said[:1].lower()}{said[1:]}{got}"


def with_defaults(given: wandb.Settings, defaults: Mapping[str, Any], name: str) -> Any:
    """Add what neither an option nor W&B's session sets, which has read variables and files.

    Returns:
        The setting `name` that is in force then.
    """
    session = wandb.setup().settings
    known = given.model_fields_set | session.model_fields_set
    for default, value in defaults.items():
        branches = default == "resume" and not known.isdisjoint(BRANCHES)
        if default not in known and not branches:
            setattr(given, default, value)
    return getattr(given if name in given.model_fields_set else session, name)


def mode_of(given: wandb.Settings) -> str:
    """Return `online`, `offline` or `disabled`, as an option, a variable or a file of W&B says."""
    session = wandb.setup().settings
    mode = given.mode if "mode" in given.model_fields_set else session.mode
    return {"dryrun": "offline", "run": "online", "shared": "online"}.get(mode, mode)
