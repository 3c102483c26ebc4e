"""What W&B's server has of a training besides numbers: samples, a confusion matrix, gradients, weights, the graph."""

import io
import json
import subprocess
import sys
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

# Weights stay as they are drawn, so that the same samples are the worst ones on any number of ranks.
LINE = (
    "main.py fit --config configs/digits.yaml --config configs/media.yaml --trainer.max_epochs 3 --model.lr 0 "
    "--data.batch_size 50 --callbacks.samples.every_n_epochs 2 --callbacks.samples.worst 5 --callbacks.watch.log all "
    "--callbacks.watch.log_freq 5 --callbacks.watch.log_graph true --trainer.accelerator cpu --trainer.devices"
)


@dataclass(frozen=True)
class Shown:
    """A run on so many ranks, and W&B's server after it."""

    project: Path
    sent: Sent
    server: WandbServer
    screen: str

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.sent.history if name in row]

    def table(self, name: str) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        """The one version of a table, rows by column, and its files: the weights stay, so another would be the same."""
        (artifact,) = [one for one in self.sent.logged if f"{name}.table.json" in one.files]
        table = json.loads(artifact.files[f"{name}.table.json"])
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]], artifact.files


@pytest.fixture(scope="module", params=[1, 2])
def shown(request: pytest.FixtureRequest, bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp("m")
    project = bake(home)
    with WandbServer() as server:
        words = [sys.executable, *LINE.split(), str(request.param)]
        env = environment(home / "e") | server.env()
        done = subprocess.run(words, cwd=project, env=env, stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=300)
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
    words = [sys.executable, *(str(path) for path in (tmp_path / "expected.py", last, tmp_path / "expected.pt"))]
    subprocess.run(words, env=environment(tmp_path) | {"PYTHONPATH": str(shown.project)}, check=True)
    images, labels, logits = torch.load(tmp_path / "expected.pt")
    confidences, classes = logits.softmax(dim=1).max(dim=1)
    columns = {"truth": labels, "prediction": classes, "confidence": confidences}
    columns["loss"] = F.cross_entropy(logits, labels, reduction="none")
    columns["index"] = torch.arange(len(labels))
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [{"image": image} | dict(zip(columns, row, strict=True)) for image, row in zip(images, rows, strict=True)]


def test_the_first_and_the_worst_samples_are_tables_with_images(shown: Shown, expected: list[dict[str, Any]]) -> None:
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


def test_the_confusion_matrix_is_a_picture(shown: Shown) -> None:
    pictures = [row["samples/confusion"] for row in shown.rows("samples/confusion")]
    assert [(picture["count"], picture["format"]) for picture in pictures] == [(1, "png")] * 2
    files = [shown.sent.files[picture["filenames"][0]] for picture in pictures]
    assert files[0].startswith(b"\x89PNG")
    assert files[0] == files[1]  # of the same weights


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # matplotlib's and torch's own affair
def test_the_confusion_matrix_counts_what_was_taken_for_what(command: Commands) -> None:
    from odd_duck.engine.media import confusion

    assert command.project
    pairs = [(2, 2)] * 3 + [(2, 10)] * 4 + [(10, 1)]
    for name in (lambda value: value, {1: "a cat", 2: "dog", 10: "eel"}.get):
        (axes,) = confusion([(name(truth), name(other)) for truth, other in pairs]).axes
        assert [text.get_text() for text in axes.texts] == ["0", "0", "0", "0", "3", "4", "1", "0", "0"]
        assert [label.get_text() for label in axes.get_yticklabels()] == [str(name(value)) for value in (1, 2, 10)]


def test_gradients_weights_and_the_graph_are_drawn_and_every_row_has_its_step(shown: Shown) -> None:
    parts = {f"network.{layer}.{part}" for layer in (0, 3, 8) for part in ("weight", "bias")}
    names = {f"{kind}/{part}" for kind in ("gradients", "parameters") for part in parts}
    rows = [row for row in shown.sent.history if names & row.keys()]
    assert set().union(*rows) >= names
    assert sum(rows[0]["parameters/network.0.bias"]["values"]) == 32
    graph = json.loads(shown.sent.files[shown.sent.summary["graph_0"]["path"]])
    assert [node["class_name"].partition("(")[0] for node in graph["nodes"]] == [
        *["Conv2d", "ReLU", "MaxPool2d"] * 2,
        *("Flatten", "Dropout", "Linear"),
    ]
    assert all("trainer/global_step" in row for row in shown.sent.history)
    assert "arn" not in shown.screen


OWN = """
import torch
from lightning.pytorch import Callback
from odd_duck.model import Classifier

class Texts(Classifier):
    def samples(self, batch, logits):
        losses = torch.arange(float(len(logits)))
        losses[5] = torch.nan
        return {"text": [f"number {label}" for label in batch[1].tolist()], "loss": losses}

class Uneven(Classifier):
    def samples(self, batch, logits):
        return {"truth": batch[1], "text": ["one"]}

class Silent(Classifier):
    samples = None

class Hooks(Callback):
    def teardown(self, trainer, module, stage):
        print("hooks", sum(len(part._forward_hooks) + len(part._backward_hooks) for part in module.modules()),
              sum(len(weight._backward_hooks or ()) for weight in module.parameters()))
"""
BRIEF = "fit --config @digits --config @debug --config @media --trainer.max_epochs 1 "
LOGGER = "--trainer.logger odd_duck.engine.wandb.Wandb "


@pytest.fixture
def own(command: Commands) -> Commands:
    (command.project / "showing.py").write_text(OWN)
    return command


def test_texts_are_shown_without_images_or_classes(own: Commands, online: WandbServer) -> None:
    outcome = own(BRIEF + LOGGER + "--model showing.Texts")
    assert (outcome.code, outcome.err) == (0, "")
    (run,) = online.runs.values()
    (row,) = [row for row in run.history if "samples/worst" in row]
    table = json.loads(run.files[row["samples/worst"]["path"]])
    assert table["columns"] == ["text", "loss", "index"]
    # Of two batches of 64; a loss that is no number is the worst.
    assert [row[2] for row in table["data"]][:6] == [5, 69, 63, 127, 62, 126]
    assert not any("samples/confusion" in row for row in run.history)


def test_nothing_is_left_on_the_model_and_another_logger_shows_nothing(own: Commands, online: WandbServer) -> None:
    watch = "--callbacks.watch.log all --callbacks.watch.log_graph true --trainer.callbacks showing.Hooks "
    assert "hooks 0 0" in own(BRIEF + LOGGER + watch).out
    failing = own(BRIEF + LOGGER + watch + "--model.lr 1e30 --trainer.max_epochs 2")
    assert failing.code == 1
    for logger in ("false", "CSVLogger", "TensorBoardLogger"):
        outcome = own(f"{BRIEF} --trainer.logger {logger}" + " --trainer.logger.save_dir ${run}" * (logger != "false"))
        assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            "--model showing.Silent",
            "callbacks.samples: expected Silent to have a method samples(batch, outputs), got none",
        ),
        ("--model showing.Uneven", "Uneven.samples: expected columns of one length, got truth 64, text 1"),
    ],
)
def test_a_model_that_shows_nothing_is_one_line(own: Commands, options: str, line: str, online: WandbServer) -> None:
    outcome = own(BRIEF + LOGGER + options)
    assert (outcome.code, outcome.err) == (2, f"error: {line}\n")
