"""The server as the unmodified client finds it, each client in a separate process."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from bakery import FOREIGN
from wandb_server import WandbServer, draws

TRAINING = """
import wandb
settings = wandb.Settings(save_code=True)
options = {"name": "first", "group": "g", "job_type": "train", "tags": ["a", "b"], "notes": "n",
           "config": {"lr": 0.1, "net": {"depth": 2}}, "settings": settings}
with wandb.init(project="p", id="r1", **options) as run:
    run.define_metric("epoch", hidden=True)
    run.define_metric("val/*", step_metric="epoch")
    run.define_metric("acc", summary="max", step_metric="epoch")
    for step, acc in enumerate([0.1, 0.5, 0.9, 0.3, 0.2]):
        run.log({"loss": 1 / (step + 1), "acc": acc, "epoch": step, "val/loss": 2.0})
    print("hello from the run")
    run.config["late"] = True
    run.summary["answer"] = 42
    weights = open("weights.bin", "wb")
    weights.write(b"w" * 1000)
    weights.flush()
    model = wandb.Artifact("model", type="model", description="the first", metadata={"score": 1})
    model.add_file("weights.bin")
    run.log_artifact(model, aliases=["best"]).wait()
    assert model.version == "v0" and set(model.aliases) == {"best", "latest"}
    same = wandb.Artifact("model", type="model")
    same.add_file("weights.bin")
    run.log_artifact(same, aliases=["again"]).wait()
    assert same.version == "v0"
    weights.write(b"x")
    weights.flush()
    other = wandb.Artifact("model", type="model", metadata={"score": 2})
    other.add_file("weights.bin", "nested/weights.bin")
    other.add_reference("https://example.com/data", checksum=False)
    run.log_artifact(other, aliases=["best"])
    run.link_artifact(other, "portfolio", aliases=["linked"])
    run.link_artifact(other, "wandb-registry-model/Collection", aliases=["production"])
    data = wandb.Artifact("data", type="dataset")
    with data.new_file("rows.txt") as file:
        file.write("1\\n2\\n")
    data.add_file("weights.bin")
    run.log_artifact(data)
"""

READING = """
import wandb
from pathlib import Path
from lightning.pytorch.loggers import WandbLogger
api = wandb.Api()
filters = {"config.lr": 0.1, "state": "finished"}
(run,) = api.runs("team/p", filters=filters, order="-summary_metrics.loss")
none = {"$or": [{"state": "failed"}, {"summary_metrics.loss": {"$gt": 1}}]}
assert not list(api.runs("team/p", filters=none))
assert run.id == "r1" and run.config == {"lr": 0.1, "net": {"depth": 2}, "late": True}
run = api.run("team/p/r1")
assert run.summary["answer"] == 42 and run.summary["acc"]["max"] == 0.9 and run.lastHistoryStep == 4
assert [row["epoch"] for row in run.history(pandas=False)] == [0, 1, 2, 3, 4]
assert run.history(keys=["acc"], pandas=False)[2] == {"_step": 2, "acc": 0.9}
assert [row["loss"] for row in run.scan_history()][0] == 1
assert list(run.scan_history(keys=["acc"], min_step=4)) == [{"_step": 4, "acc": 0.2}]
assert {file.name for file in run.files()} >= {"config.yaml", "wandb-metadata.json"}
assert run.metadata["python"]
assert {one.name for one in run.logged_artifacts()} == {"model:v0", "model:v1", "data:v0"}
assert [one.name for one in api.artifacts("model", "team/p/model")] == ["model:v1", "model:v0"]
collections = api.artifact_type("model", "team/p").collections()
assert [one.name for one in collections] == ["model", "portfolio"]
assert {one.name for one in api.artifact_types("team/p")} == {"dataset", "model"}
assert [one.name for one in api.projects("team")] == ["p"]
assert set(api.artifact_collection("model", "team/p/model").aliases) == {"again", "best", "latest"}
assert api.artifact("team/p/model:v0").description == "the first"
assert api.artifact_exists("team/p/model:best") and not api.artifact_exists("team/p/model:v7")
(weights,) = Path(api.artifact("team/p/model:again").download()).iterdir()
assert weights.read_bytes() == b"w" * 1000
downloaded = api.artifact("team/p/data:v0").get_entry("rows.txt").download()
assert Path(downloaded).read_text() == "1\\n2\\n"
registered = api.artifact("wandb-registry-model/Collection:production")
assert registered.is_link and registered.source_name == "model:v1"
assert api.artifact("team/p/portfolio:linked").logged_by().id == "r1"
run.notes = "changed"
run.update()
run.stop()
with wandb.init(project="p", id="r2", job_type="test") as second:
    used = second.use_artifact("model:best")
    assert used.version == "v1" and used.metadata == {"score": 2}
    assert [str(path.relative_to(used.download())) for path in Path(used.download()).rglob("*.bin")]
    second.use_artifact(api.artifact("team/p/data:latest"))
    downloaded = WandbLogger.download_artifact("team/p/data:v0")
    assert Path(downloaded, "rows.txt").read_text() == "1\\n2\\n"
    assert [one.id for one in used.used_by()] == ["r2"]
    used.aliases.append("tested")
    used.tags.append("checked")
    used.metadata["tested"] = True
    used.save()
assert {one.name for one in api.run("team/p/r2").used_artifacts()} == {"model:v1", "data:v0"}
first = api.artifact("team/p/model:v0")
first.aliases.append("old")
first.aliases.remove("again")
first.save()
try:
    first.delete()
except wandb.errors.CommError as error:
    assert "aliases" in str(error)
else:
    raise AssertionError
first.delete(delete_aliases=True)
assert not api.artifact_exists("team/p/model:v0")
api.artifact("team/p/portfolio:linked").unlink()
"""

RESUMING = """
import wandb
with wandb.init(project="p", id="again", config={"seed": 1}) as run:
    run.log({"loss": 3.0})
with wandb.init(project="p", id="again", resume="must") as run:
    assert run.resumed and run.config["seed"] == 1
    run.log({"loss": 2.0})
with wandb.init(project="p", id="new", resume="allow") as run:
    run.log({"loss": 1.0})
    run.log({"loss": 0.5})
with wandb.init(project="p", id="new") as run:
    run.log({"loss": 4.0})
for id, resume in ("again", "never"), ("absent", "must"):
    try:
        wandb.init(project="p", id=id, resume=resume)
    except wandb.errors.UsageError:
        pass
    else:
        raise AssertionError(resume)
try:
    wandb.init(entity="nobody", project="p")
except wandb.errors.CommError as error:
    assert "404" in str(error) or "not found" in str(error), error
else:
    raise AssertionError
with wandb.init(project="p", id="early") as run:
    run.mark_preempting()
    run.finish(exit_code=1)
wandb.init(project="p", id="failing", resume="never")
raise SystemError("no more")
"""

OFFLINE = """
import wandb
with wandb.init(project="p", id="away", mode="offline") as run:
    run.log({"loss": 1.0})
    data = wandb.Artifact("kept", type="dataset")
    with data.new_file("rows.txt") as file:
        file.write("1")
    run.log_artifact(data)
"""

STREAMING = """
import wandb
fast = {"x_file_stream_transmit_interval": 1, "x_file_stream_retry_wait_min_seconds": 1,
        "x_file_stream_retry_wait_max_seconds": 1, "x_file_stream_timeout_seconds": 1,
        "x_stats_sampling_interval": 0.5}
with wandb.init(project="p", id="streaming", settings=wandb.Settings(**fast)) as run:
    for value in map(float, iter(input, "end")):
        run.log({"value": value})
"""

SWEEP = """
method: grid
program: program.py
command: ["${interpreter}", "${program}", "${args}"]
parameters:
  lr: {values: [0.1, 0.2]}
  seed: {value: 1}
"""

SWEPT = """
import sys, wandb
with wandb.init() as run:
    run.log({"loss": run.config["lr"] * 2})
    assert "--seed=1" in sys.argv
    assert wandb.Api().sweep(f"team/p/{run.sweep_id}").config["method"] == "grid"
"""

LIGHTNING = """
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.save_hyperparameters({"width": 1})

    def training_step(self, batch):
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("acc", float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

loader = torch.utils.data.DataLoader(torch.ones(4, 1))
logger = WandbLogger(project="p", id="lightning", log_model="all")
checkpoints = ModelCheckpoint(monitor="acc", mode="max", save_top_k=-1)
trainer = Trainer(max_epochs=2, logger=logger, callbacks=[checkpoints], accelerator="cpu",
                  log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Model(), loader, loader)
"""


class Client:
    """A machine with wandb: the place where a server's clients run."""

    def __init__(self, place: Path, server: WandbServer, temporary: str) -> None:
        self.place, self.server = place, server
        kept = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
        for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
            kept[name] = str(place / name)
            Path(kept[name]).mkdir(exist_ok=True)
        # Short: where a socket's name in TMPDIR gets too long, the client sends no system metrics.
        kept["TMPDIR"] = temporary
        self.env = (
            kept
            | server.env()
            | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}
        )

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            (sys.executable, *command),
            cwd=self.place,
            env=self.env | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def git(self, *command: str) -> str:
        return subprocess.check_output(
            ("git", *command), cwd=self.place, env=self.env, text=True
        ).strip()

    def run(self, *command: str, code: int = 0, **environment: str) -> str:
        with self.start(*command, **environment) as process:
            try:
                output, _ = process.communicate(timeout=60)
            finally:
                process.kill()
        assert process.returncode == code, f"ended with {process.returncode}:\n{output}"
        return output


@pytest.fixture
def client(tmp_path: Path, wandb_server: WandbServer) -> Iterator[Client]:
    with TemporaryDirectory(prefix="w") as temporary:
        yield Client(tmp_path, wandb_server, temporary)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client, and its server, after one run that logged three versions of artifacts."""
    with TemporaryDirectory(prefix="w") as temporary, WandbServer() as server:
        client = Client(tmp_path_factory.mktemp("trained"), server, temporary)
        (client.place / "tracked.txt").write_text("before")
        for command in (
            "init",
            "add tracked.txt",
            "remote add origin https://example.com/owner/name.git",
        ):
            client.git(*command.split())
        client.git(
            "-c",
            "user.name=Test",
            "-c",
            "user.email=test@example.com",
            "commit",
            "--message",
            "first",
        )
        (client.place / "tracked.txt").write_text("after")
        client.run("-c", TRAINING)
        yield client


def post(server: WandbServer, query: str, key: str | None = None) -> tuple[int, str]:
    """The status of the answer to a query, and its text."""
    headers = {"Authorization": f"Bearer {key}"} if key else {"Authorization": server.authorization}
    request = urllib.request.Request(
        f"{server.url}/graphql", json.dumps({"query": query}).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=1) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_run(trained: Client) -> None:
    run = trained.server.runs["r1"]
    assert (run.entity, run.project, run.name, run.group, run.job_type) == (
        "team",
        "p",
        "first",
        "g",
        "train",
    )
    assert (run.tags, run.notes, run.state, run.exit_code) == (["a", "b"], "n", "finished", 0)
    assert run.config == {"lr": 0.1, "net": {"depth": 2}, "late": True}
    assert run.host
    assert run.program
    assert run.commit == trained.git("rev-parse", "HEAD")
    assert run.remote == "https://example.com/owner/name.git"
    assert b"+after" in run.files["diff.patch"]


def test_its_metrics(trained: Client) -> None:
    metrics = trained.server.runs["r1"].metrics
    assert metrics.keys() == {"epoch", "val/*", "acc"}
    assert metrics["epoch"].hidden
    assert (metrics["val/*"].glob, metrics["val/*"].step, metrics["val/*"].step_sync) == (
        True,
        "epoch",
        True,
    )
    assert (metrics["acc"].glob, metrics["acc"].step, metrics["acc"].summary) == (
        False,
        "epoch",
        ["max"],
    )


def test_its_rows(trained: Client) -> None:
    run = trained.server.runs["r1"]
    assert [row["_step"] for row in run.history] == [0, 1, 2, 3, 4]
    assert [row["loss"] for row in run.history] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert run.summary["answer"] == 42
    assert run.summary["acc"] == {"max": 0.9}


def test_its_output_and_files(trained: Client) -> None:
    run = trained.server.runs["r1"]
    assert "hello from the run" in run.output.splitlines()
    assert run.files.keys() >= {
        "wandb-metadata.json",
        "config.yaml",
        "requirements.txt",
        "wandb-summary.json",
    }
    assert b"lr:" in run.files["config.yaml"]


def test_its_versions(trained: Client) -> None:
    model = trained.server.collections["model"]
    assert [(member.index, sorted(member.aliases)) for member in model.members] == [
        (0, ["again"]),
        (1, ["best", "latest"]),
    ]
    first, second = (member.artifact for member in model.members)
    assert (model.type, first.state, first.description, first.metadata) == (
        "model",
        "COMMITTED",
        "the first",
        {"score": 1},
    )
    assert first.files == {"weights.bin": b"w" * 1000}
    assert first.size == 1000
    assert second.files == {"nested/weights.bin": b"w" * 1000 + b"x"}
    assert second.entries["data"]["ref"] == "https://example.com/data"
    logged = trained.server.runs["r1"].logged
    assert [(one.collection.name, one.index) for one in logged] == [
        ("model", 0),
        ("model", 1),
        ("data", 0),
    ]


def test_its_links(trained: Client) -> None:
    collections = trained.server.collections
    model, portfolio, registered = (
        collections[name] for name in ("model", "portfolio", "Collection")
    )
    assert (
        portfolio.members[0].artifact is registered.members[0].artifact is model.members[1].artifact
    )
    assert sorted(portfolio.members[0].aliases) == ["latest", "linked"]
    assert (registered.entity, registered.project) == (
        "organization-entity",
        "wandb-registry-model",
    )
    assert sorted(registered.members[0].aliases) == ["latest", "production"]


def test_the_dump(trained: Client) -> None:
    dump = json.loads(json.dumps(trained.server.dump()))
    assert dump["runs"]["r1"]["logged"] == ["model:v0", "model:v1", "data:v0"]
    assert dump["artifacts"]["model"]["versions"][0]["entries"]["weights.bin"]["size"] == 1000
    assert dump["unknown"] == []


def test_cut_and_denied(trained: Client) -> None:
    program = """
import wandb
for name in "model", "data":
    try:
        wandb.Api().artifact(f"team/p/{name}:latest").download(skip_cache=True)
    except Exception as error:
        print(name, type(error).__name__, error)
"""
    trained.server.denied.add("model")
    with trained.server.failing("cut", only="storage"):
        output = trained.run("-c", program)
    trained.server.denied.clear()
    assert "model CommError permission denied" in output
    assert "data ChunkedEncodingError" in output


def test_reading_and_changing(trained: Client) -> None:
    trained.run("-c", READING)
    server = trained.server
    (member,) = server.collections["model"].members
    assert (member.index, sorted(member.aliases)) == (1, ["best", "latest", "tested"])
    assert member.artifact.metadata == {"score": 2, "tested": True}
    assert member.artifact.tags == ["checked"]
    assert [one.collection.name for one in server.runs["r2"].used] == ["model", "data"]
    assert (server.runs["r1"].notes, server.runs["r1"].stopping) == ("changed", True)
    assert not server.collections["portfolio"].members


def test_resuming(client: Client, wandb_server: WandbServer) -> None:
    assert "SystemError" in client.run("-c", RESUMING, code=1)
    runs = wandb_server.runs
    assert [(row["_step"], row["loss"]) for row in runs["again"].history] == [(0, 3.0), (1, 2.0)]
    assert [row["loss"] for row in runs["new"].history] == [4.0]
    states = {name: (run.state, run.exit_code) for name, run in runs.items()}
    assert states == {
        "again": ("finished", 0),
        "new": ("finished", 0),
        "early": ("preempted", 1),
        "failing": ("failed", 1),
    }


def test_offline_and_sync(client: Client, wandb_server: WandbServer) -> None:
    client.run("-c", OFFLINE)
    assert not wandb_server.runs
    (folder,) = client.place.glob("wandb/offline-run-*")
    client.run("-m", "wandb", "sync", str(folder))
    run = wandb_server.runs["away"]
    assert (run.state, run.exit_code, run.summary["loss"]) == ("finished", 0, 1.0)
    assert [one.files for one in run.logged] == [{"rows.txt": b"1"}]


def test_a_sweep(client: Client, wandb_server: WandbServer) -> None:
    (client.place / "sweep.yaml").write_text(SWEEP)
    (client.place / "program.py").write_text(SWEPT)
    output = client.run("-m", "wandb", "sweep", "--project", "p", "sweep.yaml")
    (sweep,) = wandb_server.sweeps.values()
    assert f"team/p/{sweep.id}" in output
    client.run("-m", "wandb", "agent", "--count", "2", f"team/p/{sweep.id}")
    runs = [wandb_server.runs[id] for id in sweep.runs]
    assert [(run.sweep, run.state, run.config["lr"]) for run in runs] == [
        (sweep.id, "finished", 0.1),
        (sweep.id, "finished", 0.2),
    ]
    assert [run.summary["loss"] for run in runs] == [0.2, 0.4]
    client.run("-m", "wandb", "sweep", "--stop", f"team/p/{sweep.id}")
    assert sweep.state == "FINISHED"


def test_lightning(client: Client, wandb_server: WandbServer) -> None:
    client.run("-c", LIGHTNING)
    run = wandb_server.runs["lightning"]
    assert run.config == {"width": 1}
    assert run.metrics["*"].step == "trainer/global_step"
    assert [row["acc"] for row in run.history if "acc" in row] == [0.0, 1.0]
    versions = wandb_server.collections["model-lightning"].members
    assert [sorted(member.aliases) for member in versions] == [[], ["best", "latest"]]
    assert all(member.artifact.files["model.ckpt"] for member in versions)


def test_login(client: Client, wandb_server: WandbServer) -> None:
    command = ("-m", "wandb", "login", "--verify", "--relogin", "--host", wandb_server.url)
    assert "tester" in client.run(*command, wandb_server.key, WANDB_API_KEY="")
    client.run(*command, "f" * 40, code=1, WANDB_API_KEY="")
    assert 401 in [request.status for request in wandb_server.requests]


def test_faults_of_the_stream(client: Client, wandb_server: WandbServer) -> None:
    def rows(count: int) -> None:
        wandb_server.wait(
            lambda server: (
                "streaming" in server.runs and len(server.runs["streaming"].history) == count
            )
        )

    def seen(status: int) -> None:
        wandb_server.wait(lambda server: status in {request.status for request in server.requests})

    with client.start("-c", STREAMING) as process:
        assert process.stdin
        try:
            wandb_server.wait(
                lambda server: any(
                    "system.memory_percent" in row
                    for run in server.runs.values()
                    for row in run.events
                )
            )
            for count, (fault, status) in enumerate({"503": 503, "hang": 0}.items(), 1):
                with wandb_server.failing(fault, only="file_stream"):
                    print(count, file=process.stdin, flush=True)
                    seen(status)
                rows(count)
            with wandb_server.failing("refuse"):
                print(3, file=process.stdin, flush=True)
            rows(3)
            output, _ = process.communicate("end\n", timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0, output
    run = wandb_server.runs["streaming"]
    assert ([row["value"] for row in run.history], run.state) == ([1, 2, 3], "finished")


def test_faults(wandb_server: WandbServer) -> None:
    query = "query Viewer { viewer { entity } }"
    assert post(wandb_server, query) == (200, '{"data": {"viewer": {"entity": "team"}}}')
    assert post(wandb_server, query, key="another")[0] == 401
    for status in (401, 403, 404, 503):
        with wandb_server.failing(str(status), only="graphql"):
            assert post(wandb_server, query)[0] == status
    with wandb_server.failing("503", only="storage"):
        assert post(wandb_server, query)[0] == 200
    with wandb_server.failing("refuse"), pytest.raises(urllib.error.URLError, match="refused"):
        post(wandb_server, query)
    with wandb_server.failing("hang"), pytest.raises(TimeoutError):
        post(wandb_server, query)
    assert post(wandb_server, query)[0] == 200
    assert wandb_server.count("Viewer") == 3
    with pytest.raises(ValueError, match="refuse of storage"):
        wandb_server.fail("refuse", only="storage")


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("query Fortune { fortune }", "Fortune: Query.fortune"),
        ("query { viewer { entity ...Of } } fragment Of on User { fortune }", "User.fortune"),
        (
            'mutation M { createAgent(input: {host: "h", sweep: "s", fortune: 1})'
            " { agent { id } } }",
            "fortune",
        ),
        ("{ viewer }", "no fields"),
        ("{ viewer { entity { id } } }", "fields of a scalar"),
        ("subscription S { viewer { entity } }", "subscription"),
    ],
)
def test_what_is_unknown_fails(query: str, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem), WandbServer() as server:
        assert post(server, query)[0] == 400


def test_an_unknown_path_fails() -> None:
    server = WandbServer()
    with pytest.raises(urllib.error.HTTPError, match="400") as raised:
        urllib.request.urlopen(f"{server.url}/elsewhere", timeout=1)
    raised.value.close()
    server.close()
    with pytest.raises(AssertionError, match="/elsewhere: GET"):
        server.check()


def test_random_draws() -> None:
    parameters = {
        "lr": {"distribution": "log_uniform_values", "min": 0.001, "max": 0.1},
        "depth": {"distribution": "int_uniform", "min": 1, "max": 3},
        "act": {"values": ["relu", "tanh"]},
    }
    drawn = list(draws({"method": "random", "run_cap": 20, "parameters": parameters}))
    assert len(drawn) == 20
    assert all(0.001 <= one["lr"] <= 0.1 and one["depth"] in (1, 2, 3) for one in drawn)
    assert {one["act"] for one in drawn} <= {"relu", "tanh"}


def test_what_is_left_out_is_not_asked_for(wandb_server: WandbServer) -> None:
    query = "query Q($no: Boolean = false)"
    query += " { viewer { entity fortune @include(if: $no) ... on Team { fortune } } }"
    assert post(wandb_server, query)[0] == 200
