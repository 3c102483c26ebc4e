"""Every test has its own home and folder of runs; the experiment is trained once for all."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from main import main

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENT = ["--config", str(CONFIGS / "digits.yaml")]

Command = Callable[..., Path]


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Run `main.py` with the given words, and return the folder of the run that it made."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as environment:
        for name in ("HOME", "RUNS_ROOT", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            environment.setenv(name, str(home / name))
        for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_MODE", "NETRC"):
            environment.delenv(name, raising=False)

        def run(*words: str, entry: Callable[[Sequence[str]], None] = main) -> Path:
            before = set(home.glob("RUNS_ROOT/*"))
            entry(words)
            if dist.is_initialized():  # by an overlay for several devices
                dist.destroy_process_group()
            (made,) = set(home.glob("RUNS_ROOT/*")) - before or {home}
            return made

        yield run


@pytest.fixture(scope="session")
def trained(command: Command) -> Path:
    """The folder of a run of the experiment, as the README starts it."""
    return command("fit", *EXPERIMENT)
