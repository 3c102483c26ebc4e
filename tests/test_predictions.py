"""The table that `predict` leaves: what the model returns for each sample, once and in order."""

import csv

import pytest
import torch
from command import Commands, Outcome

OWN = """
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from odd_duck.data import Digits, Images
from odd_duck.model import Classifier
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

class Half(Classifier):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        names = [f"a {label}, {batch_idx}" for label in batch[1].tolist()]
        sums = batch[0].sum(dim=(1, 2, 3)).bfloat16()
        return {"name": names, "sum": sums, "label": batch[1], "at": batch[0][:, 0, 2, :2]}

class Boxes(Half):
    def predict_step(self, batch, batch_idx):
        return [{"box": 1}]

class Deep(Half):
    def predict_step(self, batch, batch_idx):
        return {"map": batch[0]}

class Short(Half):
    def predict_step(self, batch, batch_idx):
        return batch[0][:-1, 0, 0]

class Stream(IterableDataset):
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return ((self.images[k][0], self.images[k][1]) for k in range(len(self.images)))

class Kinds(Digits):
    def __init__(self, kind: str = "plain", batch_size: int = 64):
        super().__init__(batch_size)
        self.kind = kind

    def predict_dataloader(self):
        if self.kind == "stream":
            return DataLoader(Stream(self.test), 50)
        if self.kind == "two":
            stream = Stream(Images(*self.test[:6]))
            return [self._loader(Images(*self.val[:70])), DataLoader(stream, 64)]
        if self.kind == "none":
            return self._loader(Images(*self.test[:0]))
        if self.kind == "drawn":
            sampler = WeightedRandomSampler([1.0] * 360, 400)
            return DataLoader(self.test, batch_size=64, sampler=sampler, collate_fn=tuple)
        return self._loader(self.test, shuffle=self.kind == "shuffled", drop_last=True)

class Writer(BasePredictionWriter):
    def write_on_batch_end(self, trainer, module, prediction, *others):
        print("batch of", len(prediction))
"""


def table(outcome: Outcome, name: str = "predictions.csv") -> list[dict[str, str]]:
    assert outcome.run is not None
    with (outcome.run / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def trained(command: Commands) -> str:
    (command.project / "predicting.py").write_text(OWN)
    run = command("fit --config @digits --config @debug --trainer.max_epochs 1").run
    assert run is not None
    return run.name


def predict(command: Commands, trained: str, options: str = "") -> Outcome:
    return command(f"predict --ckpt_path {trained} --trainer.logger false {options}")


def test_the_table_has_what_the_model_says_of_each_sample_in_the_order_of_the_data(
    command: Commands, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from odd_duck.data import Digits
    from odd_duck.engine import load

    outcome = predict(command, trained)
    assert (outcome.code, outcome.err) == (0, "")
    assert "predictions.csv, 360 rows\n" in outcome.out
    rows = table(outcome)
    data, model = Digits(), load(trained)
    data.setup("predict")
    with torch.no_grad():
        expected = model(data.test.tensors[0]).softmax(dim=1)
    assert [*rows[0]] == ["index", "class", *(f"p{k}" for k in range(10))]
    assert [int(row["index"]) for row in rows] == list(range(360))
    assert [int(row["class"]) for row in rows] == expected.argmax(dim=1).tolist()
    found = torch.tensor([[float(row[f"p{k}"]) for k in range(10)] for row in rows])
    assert (found - expected).abs().max() < 1e-6


def test_a_table_tells_numbers_apart_as_the_model_does(command: Commands, trained: str) -> None:
    from odd_duck.data import Digits
    from odd_duck.engine import load

    outcome = predict(command, trained, "--predictions deep/scores.csv")
    assert (outcome.code, outcome.err) == (0, "")
    data, model = Digits(), load(trained)
    data.setup("predict")
    with torch.no_grad():
        batches = [model(images).softmax(dim=1) for images in data.test.tensors[0].split(64)]
    rows = table(outcome, "deep/scores.csv")
    texts = torch.tensor([[float(row[f"p{k}"]) for k in range(10)] for row in rows])
    assert torch.equal(texts, torch.cat(batches))  # bit-for-bit


@pytest.mark.parametrize(("kind", "count"), [("shuffled", 360), ("stream", 360), ("drawn", None)])
def test_each_sample_is_there_once_whatever_the_loader_is(
    command: Commands, trained: str, kind: str, count: int | None
) -> None:
    plain = {row["index"]: row for row in table(predict(command, trained))}
    outcome = predict(command, trained, f"--data predicting.Kinds --data.kind {kind}")
    assert outcome.code == 0, outcome.err
    assert (kind == "shuffled") == bool(outcome.err)  # Lightning's advice, which is right
    rows = table(outcome)
    indices = [int(row["index"]) for row in rows]
    assert indices == sorted(set(indices))
    assert len(rows) == (count or len(rows)) > 200
    for row in rows:
        assert float(row["p3"]) == pytest.approx(float(plain[row["index"]]["p3"]), abs=1e-6)


def test_columns_of_ones_own_and_several_loaders(command: Commands, trained: str) -> None:
    outcome = predict(
        command, trained, "--model predicting.Half --data predicting.Kinds --data.kind two"
    )
    assert (outcome.code, outcome.err) == (0, "")
    rows = table(outcome)
    assert [*rows[0]] == ["dataloader", "index", "name", "sum", "label", "at0", "at1"]
    assert [(row["dataloader"], row["index"]) for row in rows] == [
        *(("0", str(k)) for k in range(70)),
        *(("1", str(k)) for k in range(6)),  # not those of the batch before, which has as many
    ]
    assert rows[65]["name"] == f"a {rows[65]['label']}, 1"


def test_a_writer_of_ones_own_or_null_writes_no_table(command: Commands, trained: str) -> None:
    own = predict(
        command, trained, "--model predicting.Boxes --trainer.callbacks predicting.Writer"
    )
    assert (own.code, own.err) == (0, "")
    assert "batch of" in own.out
    for outcome in (own, predict(command, trained, "--predictions null")):
        assert outcome.run is not None
        assert not [*outcome.run.glob("pred*")]


EXPECTED = "predict_step: expected a tensor (B, C) or (B,), or a dict of them by column, got"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--model predicting.Boxes", f"{EXPECTED} list; --predictions null writes nothing"),
        (
            "--model predicting.Deep",
            "predict_step: expected map of one or two dimensions, got (64, 1, 8, 8)",
        ),
        (
            "--model predicting.Short",
            "predictions: expected 64 values a column, got 63; --predictions null writes nothing",
        ),
        (
            "--data predicting.Kinds --data.kind none",
            "predict: expected data, got none; nothing is written",
        ),
        (
            "--predictions scores.txt",
            "predictions: expected a name that ends in .csv, got scores.txt",
        ),
    ],
)
def test_what_makes_no_table_is_one_line_and_no_file(
    command: Commands, trained: str, options: str, line: str
) -> None:
    outcome = predict(command, trained, options)
    assert (outcome.code, outcome.err) == (2, f"error: {line}\n")
    assert outcome.run is None or {path.name for path in outcome.run.iterdir()} <= {
        "config.yaml",
        ".lock",
    }
