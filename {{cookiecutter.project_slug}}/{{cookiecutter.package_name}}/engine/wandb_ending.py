"""The end of a W&B run: nothing that is asked of W&B's client can hold up the process."""

from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from .files import sync_command
from .screen import say

if TYPE_CHECKING:
    from .wandb_uploads import Uploads

PREEMPTED = 138  # exit code of a run that SIGUSR1 has ended
SIGINT_CODES = {130: 255}  # 255 is W&B's exit code for Ctrl-C
SILENT_SECONDS = 3  # that the end waits without a word


class Ending:
    """The end of a W&B run, in a thread, so that no call of W&B's client can hold up the process.

    Args:
        run: The W&B run.
        folder: The run's folder.
        uploads: Its checkpoints, if they are uploaded.
        exit_code: That of the command.
        joined: Whether another one has begun the run, and will end it.
    """

    def __init__(
        self, run: Any, folder: Path, uploads: "Uploads | None", exit_code: int, joined: bool
    ) -> None:
        self.run, self.folder, self.uploads = run, folder, uploads
        self.exit_code, self.joined = exit_code, joined
        self.missing = "W&B does not answer"
        self.thread = Thread(target=self._end, daemon=True)
        self.thread.start()

    def wait(self, seconds: float | None) -> str:
        """Wait for the end; return what W&B lacks of the run then, in words.

        Args:
            seconds: How long to wait at most; None for ever.
        """
        try:
            self.thread.join(min(SILENT_SECONDS, seconds or SILENT_SECONDS))
            if self.thread.is_alive():
                most = "" if seconds is None else f"at most {seconds:.0f} s "
                say(f"W&B      waits {most}for {self._awaited()}; Ctrl-C leaves it to:")
                say(f"send     {sync_command(self.folder)}")
                self.thread.join(seconds and seconds - SILENT_SECONDS)
        except BaseException:  # a signal
            if self.uploads is not None:
                self.uploads.abandon()
            raise
        waiting = len(list(self.folder.glob("uploads/*.ckpt")))
        if self.thread.is_alive() and waiting:
            return f"{self.missing}; {waiting} checkpoints wait"
        return self.missing

    def _awaited(self) -> str:
        left = len(list(self.folder.glob("uploads/*.ckpt")))
        if left:
            return f"{left} checkpoint{'s' * (left > 1)} to be sent"
        return "what is logged to be sent"

    def _end(self) -> None:
        try:
            if self.uploads is not None:
                self.uploads.close(self.exit_code)
            self.missing = self._finish_run()
        except TimeoutError:
            self.missing = self._lacks()
        except Exception as error:  # W&B raises many kinds; the record lies in the run's folder
            self.missing = str(error)

    def _finish_run(self) -> str:
        """Finish the W&B run, and return what W&B lacks of it, in words."""
        run = self.run
        if self.exit_code == PREEMPTED:
            run.mark_preempting()
        if not self.joined:
            run.finish(SIGINT_CODES.get(self.exit_code, self.exit_code))
        return "" if self.joined or run.offline or run.disabled else self._lacks()

    def _lacks(self) -> str:
        from .wandb_sync import sync_run

        return sync_run(self.folder, tries=0, run_id=self.run.id)
