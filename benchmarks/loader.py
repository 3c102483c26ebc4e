"""Samples a second of a DataLoader, for data in memory and for files on disk: in Markdown.

    python benchmarks/loader.py

In memory there are images of 28 x 28; on disk pictures of 128 x 128 pixels as PNG, which are
decoded one by one. Workers are processes; each takes another core as long as there are any.
"""

import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

BATCH, PICTURES = 64, 2_000


class Batches(TensorDataset):
    """Takes a whole batch by one indexing operation, as the project's data.py does."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self[indices]


class Files(Dataset[Tensor]):
    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.asarray(Image.open(self.files[index])).copy())


def rate(data: Any, workers: int, **options: Any) -> float:
    """Samples a second, of the second and third pass: workers that stay have started by then."""
    loader = DataLoader(
        data, BATCH, True, num_workers=workers, persistent_workers=workers > 0, **options
    )
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in loader:
            pass
        times.append(time.perf_counter() - begin)
    return len(data) / median(times[1:])


def main() -> None:
    torch.set_num_threads(1)
    memory = torch.rand(20_000, 1, 28, 28), torch.randint(10, (20_000,))
    counts = (0, 1, 2)
    print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}\n")
    print(f"| samples a second | {' | '.join(f'{count} workers' for count in counts)} |")
    print(f"|{' --- |' * (len(counts) + 1)}")
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        for number in range(PICTURES):
            pixels = generator.integers(256, size=(128, 128, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder) / f"{number}.png")
        rows = {
            "in memory, batch by batch": (Batches(*memory), {"collate_fn": tuple}),
            "in memory, one by one": (TensorDataset(*memory), {}),
            "files, one by one": (Files(Path(folder)), {}),
        }
        for name, (data, options) in rows.items():
            rates = [rate(data, count, **options) for count in counts]
            print(f"| {name} | {' | '.join(f'{one:,.0f}' for one in rates)} |", flush=True)


if __name__ == "__main__":
    main()
