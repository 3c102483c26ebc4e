"""Handwritten digits: 1,797 grey images of 8 x 8 pixels in ten classes, from scikit-learn's wheel.

Put your own data here: any LightningDataModule will do, `num_classes` only if the model wants it.
"""

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

Batch = tuple[Tensor, ...]  # images (B, 1, 8, 8) in [0, 1], labels (B,)


class Images(TensorDataset):
    """Images and labels in memory, from which a whole batch is taken by one indexing operation."""

    def __getitems__(self, indices: list[int]) -> Batch:
        return self[indices]


class Digits(LightningDataModule):
    """Splits the digits into 1,257 to train on, 180 to validate and 360 to test.

    Args:
        batch_size: Images per step and per device.
        num_workers: Processes that load data. 0 is fastest for data in memory.
        split_seed: Seed of the split. All runs share it: none trains on another's test images.
    """

    num_classes = 10

    def __init__(self, batch_size: int = 64, num_workers: int = 0, split_seed: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.split_seed = split_seed

    def setup(self, stage: str) -> None:
        # Imported here, because it costs half a second that `--help` can do without.
        from sklearn.datasets import load_digits

        pixels, classes = load_digits(return_X_y=True)
        # Grey levels are 0 to 16.
        images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        labels = torch.as_tensor(classes, dtype=torch.long)
        generator = torch.Generator().manual_seed(self.split_seed)
        parts = torch.randperm(len(labels), generator=generator).split([1257, 180, 360])
        self.train, self.val, self.test = (Images(images[part], labels[part]) for part in parts)

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.val)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.test)

    predict_dataloader = test_dataloader

    def _loader(
        self, images: Images, shuffle: bool = False, drop_last: bool = False
    ) -> DataLoader[Batch]:
        return DataLoader(
            images,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),  # a GPU fetches such a batch while it computes
            collate_fn=tuple,  # `__getitems__` has already made the batch
        )
