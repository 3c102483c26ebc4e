"""Tasks that a team puts in place of the example: which files it writes, and its monitor."""

DATA_HEAD = '''"""Data of {what}, drawn with a seed."""

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

'''
LOADERS = """
    def _loader(self, part: int, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            dataset=self.parts[part],
            batch_size=self.batch_size,
            shuffle=shuffle,
            collate_fn=COLLATE,
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader(0, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(1)

    def test_dataloader(self) -> DataLoader:
        return self._loader(2)

    def predict_dataloader(self) -> DataLoader:
        return self._loader(2)
"""
SCENES = (
    DATA_HEAD.format(what="images with a class for each pixel")
    + '''
class SceneImages(Dataset):
    """Squares of another brightness on noise: 1 where a square is, else 0."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        self.images = torch.rand(count, 1, size, size, generator=drawn) / 2
        self.masks = torch.zeros(count, size, size, dtype=torch.long)
        for image, mask in zip(self.images, self.masks, strict=True):
            top, left = torch.randint(size // 2, (2,), generator=drawn).tolist()
            mask[top : top + size // 2, left : left + size // 2] = 1
            image += 0.6 * mask

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"id": f"scene-{index}", "image": self.images[index], "mask": self.masks[index]}


class Scenes(LightningDataModule):
    """96 images for training, 32 each for validation and test."""

    def __init__(self, batch_size: int = 16, size: int = 16) -> None:
        super().__init__()
        self.batch_size, self.size = batch_size, size

    def setup(self, stage: str) -> None:
        counts = (96, 32, 32)
        self.parts = [SceneImages(count, self.size, part) for part, count in enumerate(counts)]
'''
    + LOADERS.replace("            collate_fn=COLLATE,\n", "")
)
SEGMENTER = '''"""A network that gives each pixel a class."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.segmentation import MeanIoU


class Segmenter(LightningModule):
    """Two convolutions; logits (B, C, H, W)."""

    def __init__(self, width: int = 8, lr: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2, 3, padding=1)
        )
        self.val_iou = MeanIoU(num_classes=2, input_format="index")
        self.test_iou = MeanIoU(num_classes=2, input_format="index")

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch["image"]), batch["mask"])
        self.log("train/loss", loss, on_step=True, on_epoch=False)
        return loss

    def evaluate(self, batch: dict, stage: str) -> None:
        logits = self(batch["image"])
        iou = getattr(self, f"{stage}_iou")
        iou(logits.argmax(1), batch["mask"])
        self.log(f"{stage}/iou", iou)
        loss = nn.functional.cross_entropy(logits, batch["mask"])
        self.log(f"{stage}/loss", loss, batch_size=len(logits))

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: dict, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: dict, batch_idx: int) -> Tensor:
        return self(batch["image"]).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
'''
REVIEWS = (
    DATA_HEAD.format(what="sentences of different lengths, with a class")
    + '''WORDS = 15  # 1 to 4 are bad, 5 to 8 good


class Sentences(Dataset):
    """Words as numbers from 1 on; class 1 where more words are good than bad."""

    def __init__(self, count: int, seed: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 12, (count,), generator=drawn).tolist()
        self.texts = [torch.randint(1, WORDS + 1, (n,), generator=drawn) for n in lengths]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple:
        text = self.texts[index]
        good = ((text > 4) & (text <= 8)).sum()
        return text, (good > (text <= 4).sum()).long()


def collate(samples: list) -> tuple:
    """Return words (B, T), 0 behind a text's end, and classes (B,)."""
    texts, classes = zip(*samples, strict=True)
    return torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True), torch.stack(classes)


class Reviews(LightningDataModule):
    """512 texts for training, 128 each for validation and test."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.parts = [Sentences(count, seed) for seed, count in enumerate((512, 128, 128))]
'''
    + LOADERS.replace("COLLATE", "collate")
)
READER = '''"""A bag of words."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class Reader(LightningModule):
    """The mean of the words' vectors, and a linear layer; logits (B, 2)."""

    def __init__(self, width: int = 16, lr: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.words = nn.EmbeddingBag(16, width, padding_idx=0)
        self.head = nn.Linear(width, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.words(words))

    def step(self, batch: tuple, stage: str) -> Tensor:
        words, classes = batch
        logits = self(words)
        loss = nn.functional.cross_entropy(logits, classes)
        right = (logits.argmax(1) == classes).float().mean()
        self.log_dict({f"{stage}_loss": loss, f"{stage}_accuracy": right}, on_epoch=True)
        return loss

    def training_step(self, batch: tuple, batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: tuple, batch_idx: int) -> None:
        self.step(batch, "val")

    def test_step(self, batch: tuple, batch_idx: int) -> None:
        self.step(batch, "test")

    def predict_step(self, batch: tuple, batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
'''
EXPERIMENT = """trainer:
  max_epochs: 6
  log_every_n_steps: 2
data: {class_path: DATA}
model: {class_path: MODEL}
"""


def files(data: str, model: str, names: tuple[str, str]) -> dict[str, str]:
    """Return what a team writes, by the name of the file."""
    experiment = EXPERIMENT.replace("DATA", names[0]).replace("MODEL", names[1])
    return {
        "my_project/data.py": data,
        "my_project/model.py": model,
        "configs/ours.yaml": experiment,
    }


# By the task: its files, and the metric that decides.
TASKS = {
    "segmentation": (files(SCENES, SEGMENTER, ("Scenes", "Segmenter")), "val/iou"),
    "text": (files(REVIEWS, READER, ("Reviews", "Reader")), "val_accuracy"),
}
