"""The example's own callback: what W&B's server has of samples, and a confusion matrix."""

import io
import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bakery import environment
from command import Commands
from conftest import Bake
from PIL import Image
from torch.nn import functional as F
from wandb_server import Run as Sent
from wandb_server import WandbServer

# The weights stay as they are drawn, so that the same samples are the worst ones on two ranks.
LINE = (
    "main.py fit --config configs/digits.yaml --config configs/media.yaml "
    "--trainer.max_epochs 3 --model.lr 0 --data.batch_size 50 "
    "--callbacks.samples.every_n_epochs 2 --callbacks.samples.worst 5 "
    "--trainer.accelerator cpu --trainer.devices "
)
STOCK = " --trainer.logger WandbLogger --trainer.logger.save_dir $run"


@dataclass(frozen=True)
class Shown:
    """A run on so many ranks or with Lightning's own logger, and W&B's server after it."""

    project: Path
    sent: Sent
    server: WandbServer
    screen: str

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.sent.history if name in row]

    def table(self, name: str) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        """The rows of a table, and its files; of one version, since the weights stay the same."""
        (artifact,) = [one for one in self.sent.logged if f"{name}.table.json" in one.files]
        table = json.loads(artifact.files[f"{name}.table.json"])
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        return rows, artifact.files


@pytest.fixture(scope="module", params=["1", "2", "1" + STOCK], ids=["1", "2", "stock"])
def shown(
    request: pytest.FixtureRequest, bake: Bake, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    home = tmp_path_factory.mktemp("m")
    project = bake(home)
    with WandbServer() as server:
        words = [sys.executable, *f"{LINE}{request.param}".split()]
        env = environment(home / "e") | server.env()
        done = subprocess.run(
            words, cwd=project, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout
        (sent,) = server.runs.values()
        yield Shown(project, sent, server, done.stdout)


EXPECTED = """
import sys
import torch
from my_project.data import Digits
from my_project.network import ConvNet

data, network = Digits(), ConvNet(10).eval()
data.setup("fit")
weights = torch.load(sys.argv[1], weights_only=True)["state_dict"]
network.load_state_dict({name.removeprefix("network."): value for name, value in weights.items()})
images, labels = data.val.tensors
with torch.no_grad():
    torch.save((images, labels, network(images)), sys.argv[2])
"""


@pytest.fixture
def expected(shown: Shown, tmp_path: Path) -> list[dict[str, Any]]:
    """What is to be shown of each validation sample, computed without the engine."""
    (tmp_path / "expected.py").write_text(EXPECTED)
    last = shown.project / "runs" / shown.sent.id / "checkpoints" / "last.ckpt"
    words = [sys.executable, *map(str, (tmp_path / "expected.py", last, tmp_path / "expected.pt"))]
    env = environment(tmp_path) | {"PYTHONPATH": str(shown.project)}
    subprocess.run(words, env=env, check=True)
    images, labels, logits = torch.load(tmp_path / "expected.pt")
    confidences, classes = logits.softmax(dim=1).max(dim=1)
    columns = {"truth": labels, "prediction": classes, "confidence": confidences}
    columns["loss"] = F.cross_entropy(logits, labels, reduction="none")
    columns["index"] = torch.arange(len(labels))
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {"image": image} | dict(zip(columns, row, strict=True))
        for image, row in zip(images, rows, strict=True)
    ]


def test_the_first_and_the_worst_samples_are_tables_with_images(
    shown: Shown, expected: list[dict[str, Any]]
) -> None:
    worst = sorted(expected, key=lambda row: -row["loss"])[:5]
    for name, rows in (("samples/first", expected[:16]), ("samples/worst", worst)):
        table, files = shown.table(name)
        for row, shows in zip(rows, table, strict=True):
            image = Image.open(io.BytesIO(files[shows.pop("image")["path"]])).convert("L")
            assert np.asarray(image) / 255 == pytest.approx(row.pop("image")[0].numpy(), abs=0.01)
            assert shows == pytest.approx(row, abs=1e-5)
        # Of the first and of the third epoch.
        steps = [row["trainer/global_step"] + 1 for row in shown.rows("val/acc")[::2]]
        assert [row["trainer/global_step"] for row in shown.rows(name)] == steps


def test_the_confusion_matrix_counts_what_was_taken_for_what(
    shown: Shown, expected: list[dict[str, Any]]
) -> None:
    counts = Counter((str(row["truth"]), str(row["prediction"])) for row in expected)
    cells, _ = shown.table("samples/confusion_table")
    for cell in cells:
        assert cell["nPredictions"] == counts.pop((cell["Actual"], cell["Predicted"]), 0)
    assert not counts
    assert len(shown.rows("samples/confusion_table")) == 2
    chart = shown.sent.raw_config["_wandb"]["value"]["visualize"]["samples/confusion"]
    assert chart["panel_config"]["panelDefId"] == "wandb/confusion_matrix/v1"


def test_every_row_has_its_step_and_nothing_warns(shown: Shown) -> None:
    assert all("trainer/global_step" in row for row in shown.sent.history)
    assert "arn" not in shown.screen


OWN = """
import torch
from odd_duck.model import Classifier

class Odd(Classifier):
    def samples(self, batch, logits):
        losses = torch.arange(float(len(logits)))
        losses[5] = torch.nan
        return {"truth": batch[1], "prediction": batch[1] % 2, "loss": losses}
"""
BRIEF = "fit --config @digits --config @debug --config @media --trainer.max_epochs 1 "
LOGGER = "--trainer.logger odd_duck.engine.wandb_logger.RunWandbLogger "


@pytest.fixture
def own(command: Commands) -> Commands:
    (command.project / "showing.py").write_text(OWN)
    return command


def test_a_loss_that_is_nan_is_the_worst_and_images_are_optional(
    own: Commands, online: WandbServer
) -> None:
    outcome = own(BRIEF + LOGGER + "--model showing.Odd")
    assert (outcome.code, outcome.err) == (0, "")
    (run,) = online.runs.values()
    (row,) = [row for row in run.history if "samples/worst" in row]
    table = json.loads(run.files[row["samples/worst"]["path"]])
    assert table["columns"] == ["truth", "prediction", "loss", "index"]
    # Of two batches of 64.
    assert [row[-1] for row in table["data"]][:6] == [5, 69, 63, 127, 62, 126]
    (row,) = [row for row in run.history if "samples/confusion_table" in row]
    cells = json.loads(run.files[row["samples/confusion_table"]["path"]])["data"]
    assert {int(predicted) for _, predicted, count in cells if count} == {0, 1}


@pytest.mark.parametrize("logger", ["false", "CSVLogger", "TensorBoardLogger"])
def test_another_logger_shows_nothing_and_is_no_mistake(logger: str, own: Commands) -> None:
    folder = "" if logger == "false" else " --trainer.logger.save_dir '$run'"
    outcome = own(f"{BRIEF}--trainer.logger {logger}{folder}")
    assert (outcome.code, outcome.err) == (0, "")
