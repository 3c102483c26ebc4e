"""All use of W&B."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from .run import shown

if TYPE_CHECKING:
    from wandb import Run


class Wandb(WandbLogger):
    """Lightning's WandbLogger with typed options, which never asks for a key: without one the run is offline.

    Args:
        project: Project of the run.
        entity: User or team that owns it; W&B's default one if null.
        name: Display name of the run.
        group: Name that ties runs together.
        tags: Labels of the run.
        notes: Description of the run.
        job_type: Kind of the run.
        log_model: Whether checkpoints become artifacts: `false`, `true` (at the end), `all` (as they are saved).
        save_dir: Folder in which W&B makes its own, `wandb/`; that of WANDB_DIR, the run's folder, if null.
        offline: Whether to send nothing; `wandb sync` can send it later.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        job_type: str | None = None,
        log_model: Literal["all"] | bool = False,
        save_dir: str | None = None,
        offline: bool = False,
    ) -> None:
        save_dir = save_dir or os.environ.get("WANDB_DIR", ".")
        super().__init__(name=name, save_dir=save_dir, project=project, log_model=log_model)
        self._options: dict[str, Any] = {"project": project, "entity": entity, "name": name, "group": group}
        self._options |= {"tags": tags, "notes": notes, "job_type": job_type, "dir": save_dir}
        self._send = not offline
        self._reason = ""

    @property
    @rank_zero_experiment
    def experiment(self) -> "Run":
        """The W&B run, begun when it is first asked for; on other ranks a stand-in that ignores all calls."""
        if self._experiment is None:
            import wandb

            if self._send and not os.environ.get("WANDB_MODE") and not wandb.login(prompt=False, verify=False):
                self._send, self._reason = False, " (no key; to log in: wandb login)"
            Path(self._options["dir"]).mkdir(parents=True, exist_ok=True)  # else W&B takes a temporary folder
            self._experiment = run = wandb.init(
                **self._options,
                id=os.environ.get("WANDB_RUN_ID"),
                resume="allow",
                mode=None if self._send else "offline",
                settings=wandb.Settings(silent=True),  # the lines on the screen are ours
            )
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return self._experiment  # type: ignore[return-value]

    @property
    def place(self) -> str:
        """Where to look at the run: its page, or its folder if it is offline."""
        return shown(Path(self.experiment.dir).parent) if self.experiment.offline else self.experiment.url or "disabled"

    @property
    def state(self) -> str:
        """Where to look at the run and, if it is offline, why, and how to see and send it."""
        if not self.experiment.offline:
            return self.place
        folder = shown(Path(self.experiment.dir).parents[1])
        return f"offline{self._reason}; to see this run: wandb leet {folder}; to send it: wandb sync {self.place}"


@rank_zero_only
def define_summaries(logger: Logger, metrics: Mapping[str, str]) -> None:
    """Has W&B's summary show the best value of each metric, if the logger is a WandbLogger.

    A name with a rule of its own is no longer under the rule for all names, `*`: hence its x axis once more.
    """
    if isinstance(logger, WandbLogger):
        for name, summary in metrics.items():
            logger.experiment.define_metric(name, summary=summary, step_metric="trainer/global_step", step_sync=True)


@rank_zero_only
def summarize(logger: Logger, values: Mapping[str, float]) -> None:
    """Writes values into W&B's summary, if the logger is a WandbLogger."""
    if isinstance(logger, WandbLogger):
        logger.experiment.summary.update(values)


def finish(exit_code: int) -> None:
    """Ends the W&B run of this process, if it has one, and W&B's session, so that a next run starts afresh."""
    if "wandb" in sys.modules:
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=exit_code)
            wandb.teardown()
