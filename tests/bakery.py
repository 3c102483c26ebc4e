"""Bake the template, and make environments in which a process touches nothing else.

For the fixtures of all tests, for `chaos.py` and for the scripts in benchmarks/.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cookiecutter.main import cookiecutter

TEMPLATE = Path(__file__).parents[1]
# What would reach a process from its surroundings: accounts, other tests, make, and jobs that this
# one may be part of.
FOREIGN = re.compile(
    "WANDB_|PYTEST_|COVERAGE_|MAKE|MFLAGS|RUNS_|MASTER_|TORCHELASTIC_"
    "|WORLD_SIZE|RANK|LOCAL_|GROUP_|ROLE_|SLURM_|SRUN_|SBATCH_"
)
FOLDERS = ("HOME", "TMPDIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR")


def bake(output_dir: Path, settings: Path, accept_hooks: bool = True, **answers: str) -> Path:
    """Bake into a folder with these answers.

    Cookiecutter keeps its files in the folder `settings`.
    """
    config = settings / "config.yaml"
    config.write_text(
        f"cookiecutters_dir: {settings / 'templates'}\nreplay_dir: {settings / 'replay'}\n"
    )
    project = cookiecutter(
        str(TEMPLATE),
        no_input=True,
        extra_context=answers,
        output_dir=str(output_dir),
        config_file=str(config),
        accept_hooks=accept_hooks,
    )
    return Path(project)


def environment(home: Path) -> dict[str, str]:
    """Return an environment whose process touches no home, account, job or test but these."""
    kept = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
    for name in FOLDERS:
        # Short, since W&B puts a socket in TMPDIR, whose name may not be long.
        kept[name] = str(home / name.removeprefix("WANDB_")[:4])
        Path(kept[name]).mkdir(parents=True, exist_ok=True)
    # Nothing listens there: nothing is sent, even by mistake.
    return kept | {"WANDB_BASE_URL": "http://127.0.0.1:9"}


def in_terminal(
    words: Sequence[str | Path],
    folder: Path,
    env: dict[str, str],
    columns: int = 0,
    typed: Sequence[str] = (),
    code: int = 0,
) -> str:
    """Run a command of Python in a new terminal, and return what it showed.

    Each prompt, which ends in ": ", gets the next line of `typed`. Exit if the command ends with
    another code.
    """
    import pty  # Windows has neither, and bakes all the same
    import termios

    child, terminal = pty.fork()
    if not child:
        termios.tcsetwinsize(0, (40, columns))
        os.chdir(folder)
        os.execve(sys.executable, [sys.executable, *map(str, words)], env)
    screen, lines = bytearray(), iter(typed)
    try:
        while piece := os.read(terminal, 65536):
            screen += piece
            if screen.endswith(b": ") and (line := next(lines, None)) is not None:
                os.write(terminal, f"{line}\n".encode())
    except OSError:  # on Linux, its end
        pass
    os.close(terminal)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != code:
        raise SystemExit(f"{words} failed:\n{screen.decode(errors='replace')}")
    return screen.decode(errors="replace")
