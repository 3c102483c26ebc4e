"""The record in W&B: what its server received from a project's commands, and what is read back."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from bakery import TEMPLATE, environment
from command import Commands
from conftest import Bake, blocks
from lightning.pytorch import Callback, LightningModule, Trainer
from wandb_record import recorded
from wandb_server import Artifact, WandbServer
from wandb_server import Run as Sent

GUIDE = (TEMPLATE / "docs" / "wandb.md").read_text(encoding="utf-8")
BRIEF = " --trainer.max_epochs 2 --trainer.log_every_n_steps 1 --trainer.limit_train_batches 3"
LOGGER = " --trainer.logger odd_duck.engine.wandb_logger.RunWandbLogger"
SECRET = "a-secret-that-nobody-may-read"

# W&B's guide, pasted into a model.
SNIPPETS = """
import torch
import wandb
from odd_duck.model import Classifier


class Snippets(Classifier):
    def on_fit_start(self):
        self.logger.log_hyperparams({"from_the_model": 1})
        self.logger.experiment.config.update({"extra": {"fold": 3}})
        self.logger.experiment.config["single"] = "value"

    def training_step(self, batch, batch_idx):
        wandb.log({"by_wandb": 0.99, "trainer/global_step": self.trainer.global_step})
        self.logger.experiment.log({"by_experiment": float(self.trainer.global_step)})
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            shades = (0, 100 + self.global_step)
            images = [torch.full((1, 8, 8), shade, dtype=torch.uint8) for shade in shades]
            captions = ["tree", "person"]
            self.logger.log_image("samples", images, caption=captions, step=self.global_step)
            self.logger.log_text(key="texts", columns=["a"], data=[["b"]], step=self.global_step)
            self.logger.log_table(key="table", columns=["a"], data=[[1]], step=self.global_step)
"""

SECRETIVE = """
from odd_duck.data import Digits
from odd_duck.model import Classifier


class Secretive(Classifier):
    def __init__(self, num_classes: int, hub_token: str, pad_token: str, width: int = 32):
        super().__init__(num_classes, width)
        assert hub_token == "a-secret-that-nobody-may-read"


class Stored(Digits):
    def __init__(self, url: str, options: dict[str, str], batch_size: int = 64):
        super().__init__(batch_size)
        self.save_hyperparameters()
        assert options["api_key"] == "a-secret-that-nobody-may-read"
"""


@dataclass(frozen=True)
class Machine:
    """A project in a repository of git, on a machine with a key of W&B."""

    project: Path
    env: dict[str, str]
    server: WandbServer

    def __call__(self, line: str, code: int = 0) -> str:
        """Runs a command of Python and gives what it printed."""
        command = (sys.executable, *shlex.split(line))
        done = subprocess.run(
            command,
            cwd=self.project,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def git(self, *words: str) -> str:
        command = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.org", *words)
        return subprocess.run(
            command, cwd=self.project, env=self.env, check=True, capture_output=True, text=True
        ).stdout.strip()


@pytest.fixture(scope="module")
def machine(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    home = tmp_path_factory.mktemp("w")
    project = bake(home, package_name="odd_duck", project_slug="Odd.Duck")
    with WandbServer() as server:
        machine = Machine(project, environment(home) | server.env(), server)
        machine.git("init", "--quiet")
        machine.git("add", "--all")
        machine.git("commit", "--quiet", "--message", "first")
        with (project / "README.md").open("a") as readme:
            readme.write("changed since\n")
        yield machine


@dataclass(frozen=True)
class Trained:
    folder: Path
    screen: str
    sent: Sent


@pytest.fixture(scope="module")
def trained(machine: Machine) -> Trained:
    """One run of the main job, sent as it trained, with every checkpoint."""
    line = "main.py fit --config configs/digits.yaml --trainer.max_epochs 3"
    screen = machine(f"{line} --trainer.logger.log_model all")
    folder = machine.project / "runs" / re.findall(r"run +runs/(\S+)\n", screen)[0]
    return Trained(folder, screen, machine.server.runs[folder.name])


def versions(server: WandbServer, run: str) -> list[tuple[set[str], Artifact]]:
    """The versions of a run's model with their aliases, the oldest first."""
    return [
        (set(member.aliases), member.artifact)
        for member in server.collections[f"model-{run}"].members
    ]


def test_the_configuration_is_whole_nested_and_there_once(
    trained: Trained, machine: Machine
) -> None:
    saved = yaml.safe_load((trained.folder / "config.yaml").read_text())
    config = dict(trained.sent.config)
    about = config.pop("run")
    assert config == saved
    assert set(saved) == {
        *(
            "seed_everything",
            "trainer",
            "model",
            "data",
            "callbacks",
            "test_after_fit",
            "weights_only",
        ),
        *(
            "predictions",
            "compile",
            "matmul_precision",
            "monitor",
            "mode",
            "optimizer",
            "lr_scheduler",
        ),
    }
    assert about["command"].startswith(
        "main.py fit --config configs/digits.yaml --trainer.max_epochs 3"
    )
    assert about["commit"] == machine.git("rev-parse", "HEAD")
    assert Path(about["folder"]) == trained.folder
    assert "_instantiator" not in json.dumps(config)


def test_every_row_has_its_step_and_every_metric_its_axis(trained: Trained) -> None:
    assert len(trained.sent.history) > 3
    assert all("trainer/global_step" in row for row in trained.sent.history)
    for name, rules in {"val/acc": ["max"], "val/loss": ["min"], "*": []}.items():
        metric = trained.sent.metrics[name]
        assert (metric.step, metric.step_sync, metric.summary) == (
            "trainer/global_step",
            True,
            rules,
        )


def test_the_summary_has_the_best_values_and_those_of_the_best_epoch(trained: Trained) -> None:
    rows = [row for row in trained.sent.history if "val/acc" in row]
    best = max(rows, key=lambda row: row["val/acc"])
    summary = trained.sent.summary
    assert summary["val/acc"] == {"max": best["val/acc"]}
    assert summary["val/loss"] == {"min": min(row["val/loss"] for row in rows)}
    assert [summary[f"best/{name}"] for name in ("val/acc", "val/loss", "epoch")] == [
        best[name] for name in ("val/acc", "val/loss", "epoch")
    ]


def test_what_wandb_records_by_itself_is_there(trained: Trained, machine: Machine) -> None:
    sent = trained.sent
    assert (sent.state, sent.exit_code, sent.job_type, sent.project) == (
        "finished",
        0,
        "fit",
        "Odd.Duck",
    )
    assert sent.commit == machine.git("rev-parse", "HEAD")
    assert b"+changed since" in sent.files["diff.patch"]
    assert b"torch==" in sent.files["requirements.txt"]
    assert json.loads(sent.files["wandb-metadata.json"])["python"]
    assert any("system.memory_percent" in row for row in sent.events)
    assert re.search(r"epoch 2 +step 57 ", sent.output)
    assert trained.screen.count("wandb:") == 0


def test_each_checkpoint_is_a_version_with_its_aliases_and_none_is_sent_twice(
    trained: Trained, machine: Machine
) -> None:
    found = versions(machine.server, trained.folder.name)
    assert machine.server.collections[f"model-{trained.folder.name}"].type == "model"
    accuracies = [row["val/acc"] for row in trained.sent.history if "val/acc" in row]
    steps = [artifact.metadata["step"] for _, artifact in found]
    assert steps == [19, 38, 57]
    best = accuracies.index(max(accuracies))
    assert "latest" in found[-1][0]
    assert [n for n, (aliases, _) in enumerate(found) if "best" in aliases] == [best]
    (file,) = trained.folder.glob("checkpoints/epoch*.ckpt")
    _, artifact = found[best]
    assert artifact.files == {"model.ckpt": file.read_bytes()}
    assert artifact.metadata == {
        "score": pytest.approx(accuracies[best]),
        "monitor": "val/acc",
        "epoch": best,
        "step": 19 * (best + 1),
        "commit": machine.git("rev-parse", "HEAD"),
        "class_path": "odd_duck.model.Classifier",
        "engine_version": "0.9.0",
    }
    assert not list((trained.folder / "uploads").iterdir())
    stored = [
        request.path
        for request in machine.server.requests
        if request.path.startswith("/storage/blob/")
    ]
    assert len(stored) == len(set(stored)) == 3


def test_the_guides_way_to_a_model_works_in_a_fresh_interpreter(
    trained: Trained, machine: Machine
) -> None:
    script = (
        "from pathlib import Path; from lightning.pytorch.loggers import WandbLogger;"
        "from odd_duck.model import Classifier;"
        f"reference = 'team/Odd.Duck/model-{trained.folder.name}:best';"
        "folder = WandbLogger.download_artifact(reference, artifact_type='model');"
        "model = Classifier.load_from_checkpoint(Path(folder) / 'model.ckpt');"
        "print(type(model).__name__)"
    )
    assert machine(f"-c {shlex.quote(script)}").endswith("Classifier\n")
    script = "from odd_duck.engine import load; import sys; print(type(load(sys.argv[1])).__name__)"
    reference = f"wandb:team/Odd.Duck/model-{trained.folder.name}:latest"
    assert machine(f"-c {shlex.quote(script)} {reference}").endswith("Classifier\n")


def test_a_reference_to_wandb_is_fetched_once_and_recorded_as_used(
    trained: Trained, machine: Machine
) -> None:
    def downloads() -> int:
        requests = machine.server.requests
        return sum(
            request.method == "GET" and request.path.startswith("/storage/blob/")
            for request in requests
        )

    reference = f"wandb:team/Odd.Duck/model-{trained.folder.name}:best"
    shutil.rmtree(machine.project / "runs" / ".artifacts", ignore_errors=True)  # of other tests
    before = downloads()
    screen = machine(f"main.py test --ckpt_path {reference} --config configs/digits.yaml")
    again = machine(
        f"main.py fit --init_from {reference} --trainer.max_steps 1 --config configs/digits.yaml"
    )
    assert downloads() == before + 1
    runs = [
        machine.server.runs[re.findall(r"run +runs/(\S+)\n", text)[0]] for text in (screen, again)
    ]
    assert [run.job_type for run in runs] == ["test", "fit"]
    for run in runs:
        (used,) = run.used
        assert [used] == [
            one
            for aliases, one in versions(machine.server, trained.folder.name)
            if "best" in aliases
        ]
        assert run.config["ckpt_path"].endswith("model.ckpt")


def test_a_reference_that_leads_nowhere_is_one_line_and_leaves_nothing(
    trained: Trained, machine: Machine
) -> None:
    script = "import wandb; run = wandb.init(project='Odd.Duck', id='data');"
    script += "a = wandb.Artifact('rows', 'dataset');"
    script += "a.add_file('README.md'); run.log_artifact(a).wait(); run.finish()"
    machine(f"-c {shlex.quote(script)}")
    model = f"team/Odd.Duck/model-{trained.folder.name}"
    shutil.rmtree(machine.project / "runs" / ".artifacts", ignore_errors=True)
    kept = sorted(machine.project.glob("runs/.artifacts/**/*.ckpt"))
    for reference, said in {
        f"{model}:worst": "worst",
        "team/Odd.Duck/model-none:best": "model-none",
        "nobody/Odd.Duck/model-none:best": "nobody",
        "team/Odd.Duck/rows:latest": "expected a model with a file model.ckpt, got a dataset",
    }.items():
        screen = machine(
            f"main.py test --config configs/digits.yaml --ckpt_path wandb:{reference}", code=2
        )
        assert re.fullmatch(rf"error: --ckpt_path: wandb:{reference}: .*{said}.*\n", screen), screen
    number = next(
        n
        for n in range(3)
        if not (machine.project / f"runs/.artifacts/{model}/v{n}/model.ckpt").exists()
    )
    line = f"main.py test --config configs/digits.yaml --ckpt_path wandb:{model}:v{number}"
    with machine.server.failing("cut"):
        screen = machine(line, code=2)
    assert re.fullmatch(rf"error: --ckpt_path: wandb:{model}:v{number}: .*\n", screen), screen
    machine.server.denied.add(f"model-{trained.folder.name}")
    try:
        screen = machine(line, code=2)
    finally:
        machine.server.denied.clear()
    assert re.fullmatch(r"error: --ckpt_path: wandb:.*permission denied.*\n", screen), screen
    assert sorted(machine.project.glob("runs/.artifacts/**/*.ckpt")) == kept
    assert "test/acc" in machine(line + " --trainer.logger false")


@pytest.mark.parametrize("devices", [1, 2])
def test_the_guides_snippets_work_in_a_model(devices: int, machine: Machine) -> None:
    (machine.project / "snippets.py").write_text(SNIPPETS)
    name = f"snippets-{devices}"
    overlay = machine.project / "overlay.yaml"
    overlay.write_text("trainer: {logger: {init_args: {config: {dataset: {version: 3}}}}}\n")
    line = (
        "main.py fit --config configs/digits.yaml --config overlay.yaml --model snippets.Snippets"
    )
    flags = f"--trainer.accelerator cpu --trainer.devices {devices} --trainer.logger.name {name}"
    machine(f"{line}{BRIEF} {flags}")
    run = next(run for run in machine.server.runs.values() if run.name == name)
    assert (run.state, run.exit_code) == ("finished", 0)
    assert (run.config["from_the_model"], run.config["extra"], run.config["single"]) == (
        1,
        {"fold": 3},
        "value",
    )
    assert run.config["dataset"] == {"version": 3}
    assert all("trainer/global_step" in row for row in run.history)
    steps = [
        (row["trainer/global_step"], row["by_experiment"])
        for row in run.history
        if "by_experiment" in row
    ]
    assert steps == [(step, step) for step in range(6)]
    assert [row["trainer/global_step"] for row in run.history if "by_wandb" in row] == list(
        range(6)
    )
    images = [row["samples"] for row in run.history if "samples" in row]
    assert [(image["count"], image["captions"]) for image in images] == [
        (2, ["tree", "person"])
    ] * 2
    assert [row["trainer/global_step"] for row in run.history if "table" in row] == [3, 6]
    assert sum(name.startswith("media/images/samples") for name in run.files) == 4


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("init.id x", "init.id: expected --run_id in its place"),
        ("init.group x --trainer.logger.group y", "init.group: is given as trainer.logger.group"),
        (
            "init.save_cod true",
            "init.save_cod: wandb.init has no such argument; did you mean save_code?",
        ),
    ],
)
def test_an_argument_of_wandb_init_that_cannot_be_is_one_line(
    flag: str, line: str, command: Commands
) -> None:
    outcome = command(f"fit --config @digits --config @debug{LOGGER} --trainer.logger.{flag}")
    assert (outcome.code, outcome.run) == (2, None)
    assert outcome.err.startswith(f"error: trainer.logger.{line}"), outcome.err


def test_any_other_argument_of_wandb_init_arrives(command: Commands) -> None:
    flags = "--trainer.logger.init.save_code false --trainer.logger.init.job_type mine"
    outcome = command(
        f"fit --config @digits --config @debug{LOGGER} --trainer.logger.job_type null {flags}"
    )
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    assert outcome.run is not None
    assert recorded(outcome.run).job_type == "mine"


def test_no_secret_is_written_down(machine: Machine) -> None:
    (machine.project / "secretive.py").write_text(SECRETIVE)
    model = {
        "class_path": "secretive.Secretive",
        "init_args": {"hub_token": SECRET, "pad_token": "<pad>"},
    }
    data = {
        "class_path": "secretive.Stored",
        "init_args": {
            "url": f"s3://me:{SECRET}@host/path",
            "options": {"api_key": SECRET, "region": "here"},
        },
    }
    overlay = machine.project / "secrets.yaml"
    overlay.write_text(yaml.safe_dump({"model": model, "data": data}))
    line = "main.py fit --config secrets.yaml --trainer.logger.name secretive"
    line += f" --trainer.logger.log_model true{BRIEF}"
    machine(line)
    run = next(run for run in machine.server.runs.values() if run.name == "secretive")
    hidden = run.config["data"]["init_args"]
    assert hidden == {
        "url": "s3://me:***@host/path",
        "options": {"api_key": "***", "region": "here"},
        "batch_size": 64,
    }
    assert run.config["model"]["init_args"] == {
        "hub_token": "***",
        "pad_token": "<pad>",
        "width": 32,
    }
    folder = machine.project / "runs" / run.id
    for file in folder.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    (_, artifact), *_ = versions(machine.server, run.id)
    assert SECRET.encode() not in artifact.files["model.ckpt"]
    refused = machine(f"main.py fit --config runs/{run.id}/config.yaml", code=2)
    assert re.fullmatch(
        r"error: (model.hub_token|data.options.api_key): expected the secret, .*\n", refused
    )
    flags = f"--model.hub_token={SECRET} --model.hub_token {SECRET}{BRIEF}"
    machine(f"main.py fit --config secrets.yaml {flags} --trainer.logger.name again")
    again = next(run for run in machine.server.runs.values() if run.name == "again")
    assert "--model.hub_token *** --model.hub_token *** " in again.config["run"]["command"].replace(
        "'", ""
    )


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("x" * 40, "user is not logged in"),
        ("short", "has 5"),
        ("white space and more than forty characters", "only"),
    ],
)
def test_a_key_that_wandb_refuses_is_one_line_and_the_run_goes_on(
    key: str, said: str, online: WandbServer, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    outcome = command("fit --config @digits" + BRIEF)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("W&B      offline (")]
    assert said in line
    assert not online.runs
    monkeypatch.setenv("WANDB_MODE", "online")
    outcome = command("fit --config @digits" + BRIEF)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome
    assert re.search(f"error: W&B: .*{said}", outcome.err)


def test_the_summary_shows_what_its_rules_say_several_at_once(
    online: WandbServer, command: Commands, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.yaml"
    rules = {"val/acc": ["max", "last"], "val/loss": ["min", "mean", "max"], "train/loss": "last"}
    overlay.write_text(
        yaml.safe_dump({"callbacks": {"summaries": {"init_args": {"metrics": rules}}}})
    )
    outcome = command(f"fit --config @digits --config {overlay} --trainer.max_epochs 3")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    (run,) = online.runs.values()
    values = {
        name: [row[name] for row in run.history if name in row]
        for name in ("val/acc", "val/loss", "train/loss")
    }
    assert run.summary["val/acc"] == {"max": max(values["val/acc"]), "last": values["val/acc"][-1]}
    losses = values["val/loss"]
    expected = {
        "min": min(losses),
        "mean": pytest.approx(sum(losses) / len(losses)),
        "max": max(losses),
    }
    assert run.summary["val/loss"] == expected
    assert run.summary["train/loss"] == {"last": values["train/loss"][-1]}
    assert run.metrics["train/loss"].step == "trainer/global_step"


def test_what_an_offline_start_left_is_delivered_when_the_run_goes_on(
    online: WandbServer, command: Commands
) -> None:
    line = (
        f"fit --config @digits{BRIEF} --trainer.logger.log_model all --trainer.logger.offline true"
    )
    run = command(line).run
    assert run is not None
    left = sorted(run.glob("uploads/*"))
    assert len(left) >= 2
    outcome = command(
        f"fit --resume {run.name} --trainer.max_epochs 3 --trainer.logger.offline false"
    )
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert not list(run.glob("uploads/*"))
    steps = [artifact.metadata["step"] for _, artifact in versions(online, run.name)]
    assert steps[:2] == [3, 6]  # the best is told once more: for W&B equal content is one version
    assert steps[-1] == 9
    assert set(steps) == {3, 6, 9}


def test_checkpoints_of_one_process_go_to_the_run_of_each_command(
    online: WandbServer, command: Commands
) -> None:
    runs = [
        command(f"fit --config @digits{BRIEF} --trainer.logger.log_model true").run
        for _ in range(2)
    ]
    for run in runs:
        assert run is not None
        (*_, (aliases, artifact)) = versions(online, run.name)
        assert "latest" in aliases
        assert artifact.files["model.ckpt"] in [
            file.read_bytes() for file in run.glob("checkpoints/*.ckpt")
        ]
        assert online.runs[run.name].state == "finished"


def test_no_step_waits_for_wandb_and_what_it_did_not_answer_arrives_later(
    online: WandbServer, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[float] = []

    class Outage(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                online.fail("hang")
                began.append(time.monotonic())

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            began.append(time.monotonic())
            online.recover()

    outages = types.ModuleType("outages")
    outages.Outage = Outage  # type: ignore[attr-defined]
    Outage.__module__ = "outages"
    sys.modules["outages"] = outages
    line = "fit --config @digits --trainer.max_epochs 4 --trainer.logger.log_model all"
    outcome = command(
        f"{line} --callbacks.checkpoint.save_top_k -1 --trainer.callbacks+ outages.Outage"
    )
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert outcome.run is not None
    # The client alone waits 19 s for an answer, for each of three checkpoints.
    assert began[1] - began[0] < 45
    assert [artifact.metadata["step"] for _, artifact in versions(online, outcome.run.name)] == [
        19,
        38,
        57,
        76,
    ]
    assert len([row for row in online.runs[outcome.run.name].history if "val/acc" in row]) == 4


def test_a_key_from_wandb_login_serves(machine: Machine) -> None:
    elsewhere = {name: value for name, value in machine.env.items() if name != "WANDB_API_KEY"}
    stranger = Machine(
        machine.project, elsewhere | {"HOME": f"{machine.env['HOME']}/stranger"}, machine.server
    )
    Path(stranger.env["HOME"]).mkdir()
    line = f"main.py fit --config configs/digits.yaml{BRIEF} --trainer.logger.name"
    assert "offline (no key; to log in: wandb login)" in stranger(f"{line} before")
    stranger(f"-m wandb login {machine.server.key}")
    stranger(f"{line} after")
    assert {run.name for run in machine.server.runs.values()} & {"before", "after"} == {"after"}


def test_the_recipe_deletes_what_is_neither_best_nor_latest(
    trained: Trained, machine: Machine
) -> None:
    script = next(block for kind, block in blocks(GUIDE) if kind == "python")
    name = f"team/Odd.Duck/model-{trained.folder.name}"
    machine(f"-c {shlex.quote(script.replace('ENTITY/PROJECT/model-RUN', name))}")
    left = [aliases for aliases, artifact in versions(machine.server, trained.folder.name)]
    assert 1 <= len(left) <= 2
    assert {alias for aliases in left for alias in aliases} == {"best", "latest"}


def test_every_row_of_the_guides_table_names_a_test_that_exists_or_is_open() -> None:
    tests = "".join(
        file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py")
    )
    rows = [line.split("|") for line in GUIDE.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row[3])
        assert names or row[2].strip() == "open", row
        assert all(f"def {name}(" in tests for name in names), row


def test_a_checkpoint_alone_is_enough_to_evaluate(
    trained: Trained, machine: Machine, tmp_path: Path
) -> None:
    (file,) = trained.folder.glob("checkpoints/epoch*.ckpt")
    alone = shutil.copy(file, tmp_path / "alone.ckpt")
    config = torch.load(alone, weights_only=True)["engine"]["config"]
    assert config == yaml.safe_load((trained.folder / "config.yaml").read_text())
    assert "test/acc" in machine(f"main.py test --ckpt_path {alone} --trainer.logger false")
