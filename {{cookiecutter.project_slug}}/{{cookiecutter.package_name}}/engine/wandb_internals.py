"""Every use of a private name of W&B's client. Imports no library.

If a private name is gone in a newer release, a command shares the W&B session of its caller, as
Lightning's logger does.
"""

from typing import Any


def wandb_session(wandb: Any) -> Any:
    """Return the session that W&B's client has in this process; None if it has none.

    Args:
        wandb: The module; None if it is not imported.
    """
    setup = getattr(getattr(wandb, "sdk", None), "wandb_setup", None)
    return getattr(setup, "_singleton", None)


def set_wandb_session(wandb: Any, session: Any) -> None:
    """Have W&B's client use another session of this process; None has the next call begin one.

    It has no call that begins a second one. Without it a command would use, and end, the session
    of its caller.
    """
    setup = getattr(getattr(wandb, "sdk", None), "wandb_setup", None)
    if hasattr(setup, "_singleton"):
        setup._singleton = session  # type: ignore[union-attr]


def kill_client(session: Any) -> None:
    """End the process of W&B's client at once. What it was given is in the run's log.

    It has no call for that. Without it one that does not answer tries for days to send.
    """
    connection = getattr(session, "_connection", None)
    process = getattr(getattr(connection, "_proc", None), "_process", None)
    if process is not None:
        process.kill()
        process.wait()


def variables_of(session: Any) -> dict[str, str]:
    """Return the environment that a session has read its settings from.

    Without it, what a variable said then counts as if somebody had set it in Python.
    """
    return dict(getattr(session, "_settings_environ", None) or {})


def credentials(wandb: Any) -> Any:
    """Return the credentials that W&B's client keeps in this process; None without any."""
    return getattr(keeper_of_credentials(wandb), "_session_auth", None)


def set_credentials(wandb: Any, kept: Any) -> None:
    """Put credentials back, which the end of a session forgets.

    Without it an explicit `wandb.login(key=...)` of the caller's is lost after a command.
    """
    keeper = keeper_of_credentials(wandb)
    if hasattr(keeper, "_session_auth"):
        keeper._session_auth = kept


def keeper_of_credentials(wandb: Any) -> Any:
    library = getattr(getattr(wandb, "sdk", None), "lib", None)
    return getattr(getattr(library, "wbauth", None), "authenticate", None)
