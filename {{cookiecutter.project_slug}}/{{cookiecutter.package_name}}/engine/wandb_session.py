"""W&B's client process: whether W&B takes anything now, and ending the session."""

import os
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any

HTTP_TIMEOUT = "WANDB_HTTP_TIMEOUT"  # seconds, a variable of W&B's client
PREFLIGHT_SECONDS = "5"
TEARDOWN_SECONDS = 5


def unavailable_reason() -> str:
    """Return why W&B takes nothing from us now, or "" if it does.

    The answer comes within seconds, where W&B's client would try for minutes.
    """
    import wandb

    wandb.setup()  # before the variable below, which would hold for all that comes after
    given = os.environ.get(HTTP_TIMEOUT)
    os.environ[HTTP_TIMEOUT] = given or PREFLIGHT_SECONDS
    try:
        logged_in = wandb.login(prompt=False, verify=True)
    except wandb.errors.CommError as error:
        if "did not respond in time" in str(error):
            return "W&B does not answer"
        return f"{str(error).rstrip('.')}; to log in: wandb login"
    finally:
        del os.environ[HTTP_TIMEOUT]
        if given:
            os.environ[HTTP_TIMEOUT] = given
    return "" if logged_in else "no key; to log in: wandb login"


def teardown_wandb() -> None:
    """End W&B's client, waiting for seconds at most.

    It never answers if a request was given up just before; it then ends with this process.
    """
    import wandb

    with suppress(ConnectionError, TimeoutError):  # it has ended already, or never will
        call_in_time(wandb.teardown, TEARDOWN_SECONDS)


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
