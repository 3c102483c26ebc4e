"""A GPT on random tokens, trained in several ways, each in a separate process; see `gpu.py`.

    python gpt.py KIND SIZE ACCELERATOR COMPILED RESULT [WORDS ...], in a baked project's folder

KIND is `raw`, a loop of PyTorch alone; `barebones`, Lightning's Trainer without anything; `plain`,
a LightningCLI with W&B offline and the usual callbacks; `shipped`, the project's command line, to
which the words are appended. COMPILED is `compiled` or `eager`. RESULT is given, as JSON, the
milliseconds of a step and, of `shipped` at the end, the pause for a checkpoint (ms) and how many
calls in 50 steps wait for the GPU.

All have the same batches, AdamW in one kernel and, on a GPU, bfloat16 by autocast.
"""

import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Size(NamedTuple):
    """Of a network, its batches, and how many steps are taken before the clock, and by it."""

    layers: int
    width: int
    heads: int
    words: int  # in the vocabulary
    batch: int
    length: int  # tokens of a sample
    warm: int
    steps: int


SIZES = {
    "tiny": Size(2, 32, 2, 64, 2, 16, 3, 20),  # to try the script on a CPU
    "small": Size(4, 256, 4, 256, 32, 128, 50, 500),
    "large": Size(12, 768, 12, 50_304, 16, 1_024, 10, 60),  # GPT-2's 124 million parameters
}
COUNTED = 50  # steps in which calls are counted that wait for the GPU, as many as to a logged one


class Block(nn.Module):
    """Attention to what came before, and two layers: (B, T, width) to the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attend(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(-2))
        return x + self.layers(self.norm2(x))


class Network(nn.Module):
    """Tokens (B, T) to the loss of the next one."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.words = nn.Embedding(size.words, size.width)
        self.places = nn.Parameter(torch.zeros(size.length, size.width))
        self.blocks = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.words(tokens) + self.places))
        logits = F.linear(x[:, :-1], self.words.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), 3e-4, fused=True)


class Batches(TensorDataset):
    """Takes a batch by one indexing operation."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self[indices]


def batches_of(size: Size) -> Batches:
    """Return a data set of one epoch for the clock and what comes after it."""
    samples = size.batch * (size.warm + size.steps + COUNTED + 40)
    generator = torch.Generator().manual_seed(0)
    return Batches(torch.randint(size.words, (samples, size.length), generator=generator))


class GPT(pl.LightningModule):
    def __init__(self, size: str = "small", compiled: bool = False) -> None:
        super().__init__()
        self.net: Any = Network(SIZES[size])
        if compiled:
            self.net.compile()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch[0])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self)


class Tokens(pl.LightningDataModule):
    def __init__(self, size: str = "small") -> None:
        super().__init__()
        self.size = SIZES[size]

    def train_dataloader(self) -> DataLoader[Any]:
        pinned = torch.cuda.is_available()
        options: dict[str, Any] = {"collate_fn": list, "pin_memory": pinned}
        return DataLoader(batches_of(self.size), self.size.batch, shuffle=True, **options)


def now() -> float:
    """Return the time in seconds, once the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(pl.Callback):
    """Measures the steps, then what they wait for, and then a checkpoint."""

    newest: "Clock"

    def __init__(self, size: str = "small", more: bool = True) -> None:
        self.size, self.more = SIZES[size], more
        self.step, self.begin = 0, 0.0
        self.times: dict[str, float] = {}
        self.waits: list[str] = []
        Clock.newest = self

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int
    ) -> None:
        first, last = self.size.warm, self.size.warm + self.size.steps
        if self.step == first:
            self.begin = now()
        elif self.step == last:
            self.times["ms"] = (now() - self.begin) / self.size.steps * 1e3
            if self.more and torch.cuda.is_available():
                self.count_waits()
        elif self.step == last + COUNTED:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
            self.times["waits"] = sum("called a synchronizing" in text for text in self.waits)
        if self.step in (last + COUNTED, last + COUNTED + 2) and self.more:
            self.save(trainer, "later pause" if "first pause" in self.times else "first pause")
        trainer.should_stop = self.step == last + COUNTED + 2
        self.step += 1

    def count_waits(self) -> None:
        """Note from now on each call that waits for the GPU."""
        warnings.simplefilter("always")
        vars(warnings)["showwarning"] = lambda message, *_: self.waits.append(str(message))
        torch.cuda.set_sync_debug_mode("warn")

    def save(self, trainer: pl.Trainer, name: str) -> None:
        """Measure how long the training waits for last.ckpt, and how long that takes to be there.

        The first one allocates memory on the host, which later ones use again.
        """
        saving: Any = trainer.checkpoint_callbacks[-1]
        begin = now()
        saving._save_checkpoint(trainer, str(Path(saving.dirpath) / "last.ckpt"))
        self.times[name] = (now() - begin) * 1e3
        begin = now()
        writing: Any = trainer.strategy.checkpoint_io
        writing.finish_writing()
        self.times["writing"] = (time.perf_counter() - begin) * 1e3


def raw(size: Size, accelerator: str, compiled: bool) -> dict[str, float]:
    """A loop of PyTorch alone."""
    device = "cuda" if accelerator == "gpu" else "cpu"
    net = Network(size).to(device)
    if compiled:
        net.compile()
    optimizer = optimizer_of(net)

    def batches() -> Iterator[Tensor]:
        loader = DataLoader(
            batches_of(size), size.batch, shuffle=True, collate_fn=list, pin_memory=device == "cuda"
        )
        for (tokens,) in loader:
            yield tokens.to(device, non_blocking=True)

    begin = 0.0
    for step, tokens in enumerate(batches()):
        if step == size.warm:
            begin = now()
        if step == size.warm + size.steps:
            break
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = net(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"ms": (now() - begin) / size.steps * 1e3}


def barebones(size: str, accelerator: str, compiled: bool) -> dict[str, float]:
    """Lightning's Trainer with all switched off that can be."""
    precision: Any = "bf16-mixed" if accelerator == "gpu" else "32-true"
    options: dict[str, Any] = {"barebones": True, "max_epochs": 1, "devices": 1}
    options |= {"accelerator": accelerator, "precision": precision}
    clock = Clock(size, more=False)
    pl.Trainer(**options, callbacks=[clock]).fit(GPT(size, compiled), Tokens(size))
    return clock.times


def command(kind: str, size: str, accelerator: str, compiled: bool, more: list[str]) -> Any:
    """A plain LightningCLI, or the project's command line."""
    precision = "bf16-mixed" if accelerator == "gpu" else "32-true"
    line = f"fit --model gpt.GPT --model.size {size} --data gpt.Tokens --data.size {size}"
    line += f" --trainer.accelerator {accelerator} --trainer.devices 1 --trainer.max_epochs 1"
    line += f" --trainer.precision {precision}"
    line += f" --trainer.callbacks+ gpt.Clock --trainer.callbacks.size {size}"
    if kind == "shipped":
        from main import main

        words = f"{line} --trainer.logger.offline true --monitor null --callbacks.summaries null"
        main([*words.split(), "--compile", str(compiled).lower(), *more])
        return Clock.newest.times
    from lightning.pytorch.cli import LightningCLI

    line += " --trainer.callbacks.more false --trainer.callbacks+ LearningRateMonitor"
    line += " --trainer.logger WandbLogger --trainer.logger.offline true"
    line += f" --model.compiled {str(compiled).lower()}"
    LightningCLI(
        args=[*line.split(), *more],
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
    )
    return Clock.newest.times


def measure(kind: str, size: str, accelerator: str, compiled: bool, more: list[str]) -> Any:
    """Train in one way; return its times."""
    if kind == "raw":
        return raw(SIZES[size], accelerator, compiled)
    if kind == "barebones":
        return barebones(size, accelerator, compiled)
    return command(kind, size, accelerator, compiled, more)


if __name__ == "__main__":
    sys.modules["gpt"] = sys.modules[__name__]
    _, kind, size, accelerator, how, result, *more = sys.argv
    sys.argv = ["main.py"]
    Path(result).write_text(json.dumps(measure(kind, size, accelerator, how == "compiled", more)))
