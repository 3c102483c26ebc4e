"""The data, the network and the model of the example, by themselves and trained."""

import csv
import math
from pathlib import Path

import torch
from conftest import Command
from torch.nn import functional as F

from {{ cookiecutter.package_name }}.data import Digits
from {{ cookiecutter.package_name }}.model import Classifier


def digits(stage: str, **options: int) -> Digits:
    data = Digits(**options)
    data.setup(stage)
    return data


def pixels(data: Digits) -> list[set[bytes]]:
    parts = (data.train, data.val, data.test)
    return [{image.numpy().tobytes() for image in part.tensors[0]} for part in parts]


def test_no_image_is_in_two_parts_of_the_split() -> None:
    data = digits("fit")
    train, val, test = (part.tensors[0].flatten(1) for part in (data.train, data.val, data.test))
    assert len(train) + len(val) + len(test) == 1797
    for images, others in ((train, val), (train, test), (val, test)):
        assert torch.cdist(images, others).min() > 0


def test_fit_and_test_see_the_same_split_whatever_the_global_seed() -> None:
    torch.manual_seed(1)
    fit = digits("fit")
    torch.manual_seed(2)
    test = digits("test")
    assert pixels(fit) == pixels(test)


def test_a_batch_has_the_shapes_that_the_network_expects() -> None:
    images, labels = next(iter(digits("fit", batch_size=5).train_dataloader()))
    assert images.shape == (5, 1, 8, 8)
    assert labels.shape == (5,)
    assert 0 <= images.min() < images.max() == 1
    assert Classifier(num_classes=10)(images).shape == (5, 10)


def test_a_fresh_model_knows_nothing() -> None:
    torch.manual_seed(0)
    images, labels = next(iter(digits("fit", batch_size=512).train_dataloader()))
    loss = F.cross_entropy(Classifier(num_classes=10).eval()(images), labels)
    assert abs(loss.item() - math.log(10)) < 0.1


def test_one_batch_can_be_learned_by_heart() -> None:
    torch.manual_seed(0)
    batch = next(iter(digits("fit", batch_size=32).train_dataloader()))
    model = Classifier(num_classes=10, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


def test_the_example_reaches_the_accuracy_that_its_header_promises(
    trained: Path, command: Command
) -> None:
    with (command("test", "--ckpt_path", trained.name) / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["test/acc"]) >= 0.97
