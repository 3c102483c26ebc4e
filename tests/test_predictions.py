"""What `predict` leaves: what the model returns for each sample, once and in order."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Commands, Outcome

OWN = """
from typing import NamedTuple

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

class Returns(Classifier):
    # Returns what `kind` says of the images (B, 1, 8, 8).

    def __init__(self, kind: str, num_classes: int = 10):
        super().__init__(num_classes=num_classes)
        self.kind = kind
        self.reused = torch.empty(64, 1, 8, 8)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        images = batch[0] if isinstance(batch, list | tuple) else batch["image"]
        first = images[:, 0, 2, 3]
        if self.kind == "fails" and batch_idx == 3:
            raise ValueError("of the user")
        return {
            "column": lambda: first[:, None],
            "values": lambda: first.double(),
            "regression": lambda: images[:, 0, 2, :3],
            "texts": lambda: [f"sample {value}" for value in first.tolist()],
            "maps": lambda: images,
            "boxes": lambda: [{"boxes": one[0, :n % 3], "n": n} for n, one in enumerate(images)],
            "pair": lambda: (images, first),
            "nested": lambda: {"map": images, "more": {"first": first, "both": [first, images]}},
            "named": lambda: Named(images, first),
            "short": lambda: images[:-1, 0, 0],
            "rows": lambda: images.flatten(0, 2),
            "object": lambda: [Box(float(value)) for value in first],
            "sum": lambda: images.sum(),
            "reused": lambda: self.reused[: len(images)].copy_(images),
            "none": lambda: None,
            "fails": lambda: images,
        }[self.kind]()

class Named(NamedTuple):
    images: torch.Tensor
    first: torch.Tensor

class Box:
    def __init__(self, value):
        self.value = value

class Boxes(Half):
    def predict_step(self, batch, batch_idx):
        return [{"box": 1}]

def rows(images):
    return [(images[k][0], images[k][1]) for k in range(len(images))]

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
        if self.kind == "ids":
            images = [image for image, _ in rows(self.test)]
            images = [{"image": one, "id": f"file-{k}.png"} for k, one in enumerate(images)]
            return DataLoader(images, batch_size=64)
        if self.kind == "by name":
            images = {f"x{k}": one for k, one in enumerate(rows(self.test))}
            return DataLoader(images, batch_size=64, sampler=[*reversed(images)])
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


@pytest.mark.parametrize(("kind", "count"), [("shuffled", 360), ("stream", 360), ("drawn", 400)])
def test_each_sample_is_there_as_often_as_it_is_read_whatever_the_loader_is(
    command: Commands, trained: str, kind: str, count: int
) -> None:
    plain = {row["index"]: row for row in table(predict(command, trained))}
    outcome = predict(command, trained, f"--data predicting.Kinds --data.kind {kind}")
    assert outcome.code == 0, outcome.err
    assert (kind == "shuffled") == bool(outcome.err)  # Lightning's advice, which is right
    rows = table(outcome)
    assert len(rows) == count
    assert (len({row["index"] for row in rows}) < count) == (kind == "drawn")
    for row in rows:
        assert float(row["p3"]) == pytest.approx(float(plain[row["index"]]["p3"]), abs=1e-6)


def returned(
    command: Commands, trained: str, kind: str, data: str = "plain", more: str = ""
) -> Outcome:
    options = f"--model predicting.Returns --model.kind {kind} --data predicting.Kinds"
    outcome = predict(command, trained, f'{options} --data.kind "{data}" {more}')
    assert (outcome.code, outcome.err) == (0, "")
    return outcome


def samples(outcome: Outcome) -> list[dict[str, Any]]:
    assert outcome.run is not None
    assert {file.name for file in outcome.run.glob("pred*")} == {"predictions.pt"}
    assert 'read     torch.load("predictions.pt", mmap=True, weights_only=True)\n' in outcome.out
    file = outcome.run / "predictions.pt"
    return list(torch.load(file, mmap=True, weights_only=True))


def images_of_test() -> torch.Tensor:
    from odd_duck.data import Digits

    data = Digits()
    data.setup("predict")
    images: torch.Tensor = data.test.tensors[0]
    return images


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("column", ["index", "prediction"]),
        ("values", ["index", "prediction"]),
        ("regression", ["index", "prediction0", "prediction1", "prediction2"]),
        ("texts", ["index", "prediction"]),
    ],
)
def test_values_of_each_sample_are_columns(
    command: Commands, trained: str, kind: str, columns: list[str]
) -> None:
    rows = table(returned(command, trained, kind))
    assert [*rows[0]] == columns
    first = images_of_test()[:, 0, 2, 3].tolist()
    name = columns[1] if kind != "regression" else ""
    expected = [f"sample {value}" if kind == "texts" else value for value in first]
    if name:
        assert [row[name] if kind == "texts" else float(row[name]) for row in rows] == expected


@pytest.mark.parametrize("data", ["plain", "stream"])
def test_what_is_no_table_is_a_file_sample_by_sample(
    command: Commands, trained: str, data: str
) -> None:
    images = images_of_test()
    outcome = returned(command, trained, "maps", data)
    found = samples(outcome)
    assert "predictions.pt, 360 samples\n" in outcome.out
    assert [one["index"] for one in found] == list(range(360))
    assert torch.equal(torch.stack([one["prediction"] for one in found]), images)
    assert outcome.run is not None
    assert len((outcome.run / "predictions.pt").read_bytes()) < 3 * images.nbytes


def test_a_tensor_that_the_model_fills_again_is_kept_as_it_was(
    command: Commands, trained: str
) -> None:
    found = samples(returned(command, trained, "reused"))
    assert torch.equal(torch.stack([one["prediction"] for one in found]), images_of_test())


def test_nested_and_unequal_things_keep_their_form(command: Commands, trained: str) -> None:
    images = images_of_test()
    boxes = samples(returned(command, trained, "boxes"))
    assert [one["n"] for one in boxes] == [k % 64 for k in range(360)]
    assert torch.equal(boxes[65]["boxes"], images[65, 0, :1])
    pair = samples(returned(command, trained, "pair"))
    assert torch.equal(pair[7]["prediction"][0], images[7])
    assert pair[7]["prediction"][1] == images[7, 0, 2, 3]
    nested = samples(returned(command, trained, "nested"))
    assert [*nested[0]] == ["index", "map", "more"]
    assert torch.equal(nested[359]["more"]["both"][1], images[359])
    named = samples(returned(command, trained, "named"))
    assert torch.equal(named[9]["images"], images[9])


def test_a_batch_that_cannot_be_taken_apart_stays_whole(command: Commands, trained: str) -> None:
    images = images_of_test()
    outcome = returned(command, trained, "short")
    assert "predictions.pt, 6 batches\n" in outcome.out
    found = samples(outcome)
    assert [one["index"] for one in found][5] == list(range(320, 360))
    assert torch.equal(found[0]["prediction"], images[:63, 0, 0])
    one = "--data.batch_size 1"
    of_one = samples(returned(command, trained, "rows", more=one))  # a sample of many rows
    assert len(of_one) == 360
    assert of_one[3]["index"] == 3
    assert torch.equal(of_one[3]["prediction"], images[3, 0])
    assert [one["prediction"].ndim for one in samples(returned(command, trained, "sum"))] == [0] * 6


def test_what_only_trust_reads_is_there_and_the_line_says_how(
    command: Commands, trained: str
) -> None:
    outcome = returned(command, trained, "object")
    assert "weights_only=False)  # it holds predicting.Box\n" in outcome.out
    assert outcome.run is not None
    found = torch.load(outcome.run / "predictions.pt", weights_only=False)
    assert found[5]["prediction"].value == images_of_test()[5, 0, 2, 3]


def test_an_error_leaves_no_parts(
    command: Commands, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from odd_duck.engine import prediction_parts

    monkeypatch.setattr(prediction_parts, "PART_BYTES", 1000)  # a part for each batch
    options = "--model predicting.Returns --model.kind fails --data predicting.Kinds"
    outcome = predict(command, trained, f"{options} --data.kind plain")
    assert (outcome.code, str(outcome.error)) == (1, "of the user")
    assert outcome.run is None  # the folder is removed, since there was nothing else in it


def test_a_column_says_what_the_batch_carries_under_id(command: Commands, trained: str) -> None:
    rows = table(returned(command, trained, "column", "ids"))
    assert [row["id"] for row in rows] == [f"file-{k}.png" for k in range(360)]
    assert [*rows[0]] == ["index", "id", "prediction"]
    assert samples(returned(command, trained, "maps", "ids"))[8]["id"] == "file-8.png"


def test_an_index_may_be_anything(command: Commands, trained: str) -> None:
    rows = table(returned(command, trained, "values", "by name"))
    assert [row["index"] for row in rows] == [f"x{k}" for k in reversed(range(360))]
    assert float(rows[0]["prediction"]) == images_of_test()[359, 0, 2, 3]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--data predicting.Kinds --data.kind none", "no data"),
        ("--model predicting.Returns --model.kind none", "predict_step returned nothing"),
    ],
)
def test_where_nothing_is_predicted_a_line_says_so(
    command: Commands, trained: str, options: str, line: str
) -> None:
    outcome = predict(command, trained, options)
    assert outcome.code == 0
    assert f"predict  {line}; nothing is written\n" in outcome.out
    assert outcome.run is not None
    assert not [*outcome.run.glob("pred*")]


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


def test_the_name_of_another_kind_of_file_is_one_line(command: Commands, trained: str) -> None:
    outcome = predict(command, trained, "--predictions scores.txt")
    problem = "expected a name that ends in .csv or .pt, got scores.txt"
    assert (outcome.code, outcome.err) == (2, f"error: predictions: {problem}\n")
    assert outcome.run is None or not [*outcome.run.glob("scores*")]


def test_a_file_of_samples_may_be_asked_for(command: Commands, trained: str) -> None:
    outcome = predict(command, trained, "--predictions scores.pt")
    assert outcome.run is not None
    found = torch.load(outcome.run / "scores.pt", weights_only=True)
    assert found[359]["prediction"].shape == (10,)


RANKS = '''
"""Loaders that ranks share in each way."""

import torch
from odd_duck.data import Digits, Images
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, WeightedRandomSampler


class Stream(IterableDataset):
    """Each rank reads its own part."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        several = torch.distributed.is_initialized()
        rank, ranks = (torch.distributed.get_rank(), 2) if several else (0, 1)
        places = range(rank, len(self.images), ranks)
        return ((self.images[k][0], self.images[k][1]) for k in places)


class Kinds(Digits):
    def __init__(self, kind: str = "plain", batch_size: int = 8):
        super().__init__(batch_size)
        self.kind = kind

    def images(self, count):
        return Images(*self.test[:count])

    def predict_dataloader(self):
        options = {"batch_size": 8, "collate_fn": tuple}
        images = self.images(101)
        several = torch.distributed.is_initialized()
        if self.kind == "distributed":
            sampler = DistributedSampler(images, shuffle=False) if several else None
            return DataLoader(images, sampler=sampler, **options)
        if self.kind == "drawn":
            generator = torch.Generator().manual_seed(1)
            sampler = WeightedRandomSampler([1.0] * 101, 150, generator=generator)
            return DataLoader(images, sampler=sampler, **options)
        if self.kind == "stream":
            return DataLoader(Stream(images), batch_size=8)
        if self.kind == "one sample":
            return DataLoader(self.images(1), **options)
        if self.kind == "two":
            return [DataLoader(images, **options), DataLoader(self.images(5), **options)]
        return DataLoader(images, **options)
'''


def predicted(run: Path) -> list[dict[str, Any]]:
    if (run / "predictions.csv").exists():
        with (run / "predictions.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))
    found = torch.load(run / "predictions.pt", weights_only=True)
    return [{name: torch.as_tensor(one).tolist() for name, one in row.items()} for row in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "returns", "options"),
    [
        ("plain", "regression", ""),
        ("plain", "maps", ""),
        ("plain", "regression", "--trainer.use_distributed_sampler false"),
        ("distributed", "regression", ""),
        ("drawn", "regression", ""),
        ("stream", "maps", ""),
        ("one sample", "maps", ""),
        ("two", "regression", ""),
    ],
)
def test_two_ranks_leave_what_one_leaves(
    kind: str, returns: str, options: str, trained: str, command: Commands
) -> None:
    (command.project / "predicting_ranks.py").write_text(RANKS.lstrip())
    line = f"predict --ckpt_path {trained} --trainer.logger false --trainer.accelerator cpu".split()
    line += f"--model predicting.Returns --model.kind {returns} {options}".split()
    line += ["--data", "predicting_ranks.Kinds", "--data.kind", kind]
    alone = command([*line, "--trainer.devices", "1"])
    assert alone.code == 0, alone
    assert alone.run is not None
    name = f"ranks-{kind}-{returns}-{len(options)}".replace(" ", "-")
    env = {**os.environ, "RUNS_ROOT": str(command.runs), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "main.py", *line, "--trainer.devices", "2", "--run_id", name],
        cwd=command.project,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done
    ours, expected = predicted(command.runs / name), predicted(alone.run)
    if kind == "stream":  # each rank's own part, one after the other in each batch
        for rows in (ours, expected):
            for row in rows:
                del row["index"]
            rows.sort(key=str)
    assert ours == expected
    assert {file.name for file in (command.runs / name).iterdir()} <= {
        *(".lock", "config.yaml", "run.json", "predictions.csv", "predictions.pt")
    }
