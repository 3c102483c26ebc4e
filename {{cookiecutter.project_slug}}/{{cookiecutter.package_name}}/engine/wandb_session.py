"""W&B's session: a separate one for each command, and whether W&B takes anything now."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Thread
from typing import Any

from .wandb_internals import (
    credentials,
    kill_client,
    set_credentials,
    set_wandb_session,
    variables_of,
    wandb_session,
)

SERVICE = "WANDB_SERVICE"  # names the process of W&B's client, for child processes
HTTP_TIMEOUT = "WANDB_HTTP_TIMEOUT"  # seconds, a variable of W&B's client
PREFLIGHT_SECONDS = "5"
TEARDOWN_SECONDS = 5
# What `wandb` has for the run that is open; `wandb.init` replaces it.
OF_THE_OPEN_RUN = (
    *("run", "config", "summary", "log", "save", "alert", "define_metric", "mark_preempting"),
    *("watch", "unwatch", "use_artifact", "log_artifact", "use_model", "log_model", "link_model"),
)


# Within a command, what `wandb` had for its caller's open run, by name.
CALLS: ContextVar[dict[str, Any] | None] = ContextVar("CALLS", default=None)


@contextmanager
def own_session() -> Iterator[None]:
    """Give a command a separate W&B session, and put back the one that was there.

    W&B has one session for a process, with variables that it reads once, and ends it as a whole.
    So what a caller has open stays usable, and W&B's variables count for each command.
    """
    wandb = sys.modules.get("wandb")
    service = os.environ.pop(SERVICE, None)
    before, kept = wandb_session(wandb), credentials(wandb)
    calls = {name: getattr(wandb, name, None) for name in OF_THE_OPEN_RUN if wandb}
    if wandb is not None:
        set_wandb_session(wandb, None)
        take_over_settings(wandb, before)
        wandb.sdk.lib.module.unset_globals()
    token = CALLS.set(calls)
    is_left = False
    try:
        try:
            yield
        finally:
            CALLS.reset(token)
            is_left = end_session()
    finally:  # also where a signal ends the waiting
        if before is not None or not is_left:
            os.environ.pop(SERVICE, None)
        if service:
            os.environ[SERVICE] = service
        if wandb is not None:
            put_back(wandb, before, kept, calls)
        elif not is_left and (imported := sys.modules.get("wandb")):
            imported.sdk.lib.module.unset_globals()  # of a run that did not end in time


def put_back(wandb: Any, session: Any, kept: Any, calls: dict[str, Any]) -> None:
    """Put a caller's session, credentials and calls back."""
    if session is not None:
        set_wandb_session(wandb, session)
    set_credentials(wandb, kept)
    for name, call in calls.items():
        setattr(wandb, name, call)


def open_run(wandb: Any, run_id: str | None) -> Any:
    """Return the run that the caller has open, if it has this id; W&B's calls then act on it."""
    calls = CALLS.get()
    run = wandb.run if calls is None else calls.get("run")
    if run is None or run.id != run_id:
        return None
    for name, call in (calls or {}).items():
        setattr(wandb, name, call)
    return run


@contextmanager
def restored_environment() -> Iterator[None]:
    """Put environment variables back at the end, one by one: other threads read them."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for added in os.environ.keys() - before.keys() - {SERVICE}:
            os.environ.pop(added)
        changed = {name: value for name, value in before.items() if os.environ.get(name) != value}
        changed.pop(SERVICE, None)
        os.environ.update(changed)


def take_over_settings(wandb: Any, before: Any) -> None:
    """Give the session that begins what somebody has set in the one before, in Python."""
    given = before.settings_if_loaded if before is not None else None
    if given is None:
        return
    with suppress(Exception):  # a variable is wrong: the logger says which
        read = wandb.Settings()
        read.settings_system = given.settings_system
        read.update_from_system_settings()
        read.update_from_env_vars(variables_of(before))
        read.update_from_system_environment()
        begun = wandb.sdk.wandb_setup.singleton().settings
        for name in given.model_fields_set:
            if getattr(given, name) != getattr(read, name):
                setattr(begun, name, getattr(given, name))


def end_session() -> bool:
    """End W&B's session, if there is one; return True if it is left because a run is open in it.

    Waits for seconds at most: W&B's client never answers if a request was given up just before. Its
    process is ended then.
    """
    wandb = sys.modules.get("wandb")
    session = wandb_session(wandb)
    if wandb is None or session is None:
        return False
    if session.most_recent_active_run is not None:  # which a model has begun
        return True
    try:
        call_in_time(wandb.teardown, TEARDOWN_SECONDS)
    except Exception:  # W&B raises many kinds: it has ended already, or never will
        kill_client(session)
    set_wandb_session(wandb, None)
    return False


def forget_run(run: Any) -> None:
    """Have the session be ended although a run is open in it, which has ended or never will."""
    wandb: Any = sys.modules.get("wandb")
    if session := wandb_session(wandb):
        session.remove_active_run(run)
    if wandb is not None and wandb.run is run:
        wandb.sdk.lib.module.unset_globals()


def calls_are_ours() -> bool:
    """Return True within a command, whose end puts back what `wandb` has for the open run.

    A process that a launcher has spawned is a command's as a whole.
    """
    return CALLS.get() is not None or multiprocessing.parent_process() is not None


def session_is_ours() -> bool:
    """Return True if the engine may end W&B's session: a command's, or one not yet begun."""
    return CALLS.get() is not None or SERVICE not in os.environ


def unavailable_reason() -> str:
    """Return why W&B takes nothing from us now, or "" if it does.

    The answer comes within seconds, where W&B's client would try for minutes.
    """
    import wandb

    wandb.setup()  # before the variable below, which would hold for all that comes after
    given = os.environ.get(HTTP_TIMEOUT)
    os.environ[HTTP_TIMEOUT] = given or PREFLIGHT_SECONDS
    opened, wandb.run = wandb.run, None  # a run of the caller's, with which `login` does nothing
    kept = credentials(wandb)
    try:
        logged_in = wandb.login(prompt=False, verify=True)
        if logged_in and kept is not None:  # which `login` has not tried again
            kept.verify()
    except wandb.errors.CommError as error:
        if "did not respond in time" in str(error):
            return "W&B does not answer"
        return f"{str(error).rstrip('.')}; to log in: wandb login"
    finally:
        wandb.run = opened
        del os.environ[HTTP_TIMEOUT]
        if given:
            os.environ[HTTP_TIMEOUT] = given
    return "" if logged_in else "no key; to log in: wandb login"


def call_in_time(act: Callable[[], Any], seconds: float) -> None:
    """Call what asks W&B's client, and wait for it for a bounded time.

    Raises:
        TimeoutError: If it takes longer; it then continues in a thread. What it raises is raised.
    """
    raised: list[BaseException] = []

    def call() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if thread.is_alive():
        raise TimeoutError
