"""Ways to train one network on data of MNIST's shape, each in a separate process; see `bench.py`.

    python contenders.py KIND SIZE RESULT [WORDS ...], in the folder of a baked project

writes to the file RESULT the milliseconds of a step with a network of that size. The words are
appended to the command line of those that have one. All have the same data, batches, optimizer and
one thread. The data are random, since only their shape costs time.
"""

import cProfile
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

TRAINED, BATCH = 55_000, 64  # images, as MNIST's usual split, and in a batch
# By name: width and number of the hidden layers, steps before the clock starts, timed steps.
SIZES = {"small": (24, 1, 60, 790), "medium": (512, 2, 30, 400), "large": (512, 17, 5, 100)}
# Of the timed steps, written to the file that the environment variable PROFILE names.
PROFILE = cProfile.Profile(builtins=False)
KINDS: dict[str, Callable[[str], float]] = {}  # by name: milliseconds of a step at a size


def network(size: str) -> nn.Sequential:
    """Linear layers: images (B, 1, 28, 28) in, logits (B, 10) out."""
    width, depth, *_ = SIZES[size]
    hidden = (layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU()))
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, width), nn.ReLU(), *hidden, nn.Linear(width, 10)
    )


def batches(size: str) -> int:
    """How many there are in an epoch."""
    return sum(SIZES[size][2:]) + 1


def images(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(number, 1, 28, 28, generator=generator)
    return pixels, torch.randint(10, (number,), generator=generator)


def kind(function: Callable[[str], float]) -> Callable[[str], float]:
    KINDS[function.__name__] = function
    return function


def timed(batches: Iterator[Any], size: str) -> float:
    """A plain loop over batches."""
    net = network(size)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    *_, warm, steps = SIZES[size]
    begin = 0.0
    for number in range(warm + steps):
        if number == warm:
            begin = time.perf_counter()
        pixels, labels = next(batches)
        loss = F.cross_entropy(net(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - begin) / steps * 1e3


@kind
def raw(size: str) -> float:
    """A loop of PyTorch alone over tensors in memory: the limit."""
    pixels, labels = images(TRAINED)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.randperm(TRAINED).split(BATCH):
            yield pixels[indices], labels[indices]

    return timed(batches(), size)


@kind
def loader(size: str) -> float:
    """The same with PyTorch's DataLoader, which takes samples one by one."""
    return timed(iter(DataLoader(TensorDataset(*images(TRAINED)), BATCH, shuffle=True)), size)


MORE: list[str] = []  # words of a command line


@kind
def barebones(size: str) -> float:
    """Lightning's Trainer with all switched off that can be."""
    from contenders_lightning import Clock, Shaped, Sized
    from lightning.pytorch import Trainer

    limits = {"max_epochs": 1, "limit_train_batches": batches(size)}
    options = {"barebones": True, "accelerator": "cpu", "devices": 1, "callbacks": [Clock(size)]}
    Trainer(**options, **limits).fit(Sized(size=size), Shaped())
    return Clock.result


def common(size: str) -> str:
    line = "fit --trainer.accelerator cpu --trainer.devices 1 --trainer.max_epochs 1"
    line += f" --trainer.limit_train_batches {batches(size)}"
    return f"{line} --trainer.callbacks+ contenders_lightning.Clock --trainer.callbacks.size {size}"


def project_classes(size: str) -> str:
    """Return the flags of the project's model and data at this size."""
    model = f"--model contenders_lightning.Sized --model.size {size}"
    return f"{model} --data contenders_lightning.Shaped"


KEEPERS = (
    " --trainer.callbacks+ ModelCheckpoint --trainer.callbacks.monitor val/acc"
    " --trainer.callbacks.mode max --trainer.callbacks.save_last true"
    " --trainer.callbacks+ EarlyStopping --trainer.callbacks.monitor val/acc"
    " --trainer.callbacks.mode max --trainer.callbacks+ LearningRateMonitor"
)
WANDB = " --trainer.logger WandbLogger --trainer.logger.offline true --trainer.logger.save_dir logs"


def with_cli(words: str) -> float:
    from contenders_lightning import Clock
    from lightning.pytorch.cli import LightningCLI

    LightningCLI(
        args=[*words.split(), *MORE],
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
    )
    import wandb

    wandb.finish()
    return Clock.result


@kind
def usual(size: str) -> float:
    """A plain LightningCLI with W&B offline; model and data as tutorials write them."""
    model = f"--model contenders_lightning.Tutorial --model.size {size}"
    line = f"{common(size)}{KEEPERS}{WANDB}"
    return with_cli(f"{line} {model} --data contenders_lightning.Usual")


@kind
def plain(size: str) -> float:
    """A plain LightningCLI with W&B offline, the callbacks, and the project's model and data."""
    return with_cli(f"{common(size)}{KEEPERS}{WANDB} {project_classes(size)}")


@kind
def shipped(size: str) -> float:
    """The generated project with W&B offline."""
    from contenders_lightning import Clock
    from main import main

    line = f"{common(size)} --trainer.logger.offline true {project_classes(size)}"
    main([*line.split(), *MORE])
    return Clock.result


def measure(name: str, size: str) -> dict[str, float]:
    """Train in one way; return milliseconds of a step and, with Lightning, other times (s)."""
    if name in ("raw", "loader"):
        return {"ms": KINDS[name](size)}
    from contenders_lightning import Clock

    milliseconds = KINDS[name](size)
    return {"ms": milliseconds, "first": Clock.first, "saving": Clock.saving}


if __name__ == "__main__":
    sys.modules["contenders"] = sys.modules[__name__]  # which contenders_lightning imports
    _, name, size, result, *MORE = sys.argv
    sys.argv = ["main.py"]
    torch.set_num_threads(1)
    taken = measure(name, size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB, on Linux
    Path(result).write_text(json.dumps(taken | {"peak": peak}))
