"""What `--ckpt_path` can name: a checkpoint file, a run (its best checkpoint), or `RUN:last`."""

from pathlib import Path
from typing import Any

import torch

from . import Mistake, nearest
from .run import shown


def find_checkpoint(reference: str, root: Path) -> Path:
    """Finds a checkpoint.

    Args:
        reference: A file, or the id or the folder of a run, with `:last` for its last checkpoint instead of its best.
        root: Where runs are kept.

    Raises:
        Mistake: If there is no such file, no such run, or no checkpoint in the run.
    """
    if Path(reference).is_file():
        return Path(reference).absolute()
    name, _, which = reference.partition(":")
    folder = next((folder for folder in (Path(name), root / name) if name and folder.is_dir()), None)
    if folder is None or which not in ("", "last"):
        hint = nearest(name, (folder.name for folder in root.glob("*/")))
        raise Mistake(f"--ckpt_path: expected a checkpoint file, RUN or RUN:last, got {reference}{hint}")
    last = folder.absolute() / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise Mistake(f"--ckpt_path: {folder.name} has no checkpoint; expected {shown(last)}")
    if which == "last":
        return last
    states = read_checkpoint(last)["callbacks"].values()
    best = next((state["best_model_path"] for state in states if state.get("best_model_path")), last)
    return last.parent / Path(best).name  # by its name alone: the folder may have been moved


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Reads a checkpoint, without running any code that it may hold.

    Raises:
        Mistake: If it cannot be read.
    """
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise Mistake(f"{shown(file)}: not a checkpoint that can be read ({str(error).splitlines()[0]})") from error
    return content


def layers_of(checkpoint: Path) -> tuple[list[str], dict[str, Any]]:
    """The configuration that a checkpoint brings with it.

    Returns:
        The configuration file of its run, if it lies in one, and the `model` section that the checkpoint itself holds.
    """
    recipe = checkpoint.parent.parent / "config.yaml"
    settings = read_checkpoint(checkpoint).get("hyper_parameters", {})
    model = {
        "class_path": settings.pop("_class_path", None),
        "init_args": {key: value for key, value in settings.items() if key != "_instantiator"},
    }
    return [str(recipe)] * recipe.is_file(), {"model": model} if model["class_path"] else {}
