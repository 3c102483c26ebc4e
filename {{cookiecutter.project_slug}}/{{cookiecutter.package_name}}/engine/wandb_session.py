"""W&B's client process: whether W&B takes anything now, and ending the session."""

import os
from contextlib import suppress
from threading import Thread

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

    def end() -> None:
        with suppress(ConnectionError):  # it has ended already
            wandb.teardown()

    thread = Thread(target=end, daemon=True)
    thread.start()
    thread.join(TEARDOWN_SECONDS)
