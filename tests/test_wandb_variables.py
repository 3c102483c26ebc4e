"""W&B's variables, settings and refusals: each counts as W&B documents it, or one line says why."""

import importlib
import json
import os
import re
import threading
import urllib.request
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from bakery import TEMPLATE
from command import Commands, Outcome
from wandb_record import records
from wandb_server import WandbServer

FIT = (
    "fit --config @digits --trainer.max_epochs 1 --trainer.limit_train_batches 1"
    " --trainer.limit_val_batches 1"
)


def record(outcome: Outcome) -> Any:
    """What W&B's client recorded of a run's begin."""
    assert (outcome.code, outcome.err) == (0, ""), outcome
    assert outcome.run is not None
    (log,) = (outcome.run / "wandb").glob("*run-*/run-*.wandb")
    return next(one.run for one in records(log) if one.WhichOneof("record_type") == "run")


def main(command: Commands, line: str) -> Any:
    """Run a command, and return its CLI."""
    words = line.replace("@", f"{command.project}/configs/").split()
    words = [f"{word}.yaml" if "/configs/" in word else word for word in words]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return command.main(words)


# Variables that are options: over defaults.yaml, under files and flags.


@pytest.mark.parametrize(
    ("variable", "option", "recorded"),
    [
        ("WANDB_PROJECT", "project", "project"),
        ("WANDB_ENTITY", "entity", "entity"),
        ("WANDB_NAME", "name", "display_name"),
        ("WANDB_RUN_GROUP", "group", "run_group"),
        ("WANDB_NOTES", "notes", "notes"),
        ("WANDB_JOB_TYPE", "job_type", "job_type"),
        ("WANDB_TAGS", "tags", "tags"),
    ],
)
def test_a_variable_counts_over_the_defaults_and_under_files_and_flags(
    variable: str,
    option: str,
    recorded: str,
    command: Commands,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def value(outcome: Outcome) -> str:
        got = getattr(record(outcome), recorded)
        return got if isinstance(got, str) else ",".join(got)

    monkeypatch.setenv(variable, "by-variable")
    by_variable = command(FIT)
    assert value(by_variable) == "by-variable"
    config = yaml.safe_load(((by_variable.run or Path()) / "config.yaml").read_text())
    given = config["trainer"]["logger"]["init_args"][option]
    assert given in ("by-variable", ["by-variable"])
    as_given = "[by-flag]" if option == "tags" else "by-flag"
    assert value(command(f"{FIT} --trainer.logger.{option} {as_given}")) == "by-flag"
    file = tmp_path / "own.yaml"
    in_file = ["by-file"] if option == "tags" else "by-file"
    file.write_text(yaml.safe_dump({"trainer": {"logger": {"init_args": {option: in_file}}}}))
    assert value(command(f"{FIT} --config {file}")) == "by-file"
    origins = command(f"{FIT} --print_config=origins").out
    assert re.search(rf"logger.*\.{option}: .*by-variable.* # {variable}\n", origins), origins


def test_a_variable_leaves_another_logger_alone(
    command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "by-variable")
    for logger in ("false", "CSVLogger --trainer.logger.save_dir $run"):
        outcome = command(f"{FIT} --trainer.logger {logger}")
        assert (outcome.code, outcome.err) == (0, ""), outcome


def test_a_variable_counts_for_a_teams_subclass_of_the_logger_and_below_a_second_default_file(
    command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "team_logger.py").write_text(
        "from odd_duck.engine import RunWandbLogger\nclass TeamLogger(RunWandbLogger):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("WANDB_PROJECT", "by-variable")
    (tmp_path / "team.yaml").write_text("trainer: {max_epochs: 1}\n")
    logger = {"class_path": "team_logger.TeamLogger", "init_args": {"project": "by-default"}}
    (tmp_path / "logger.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    cli = importlib.import_module("odd_duck.cli").CLI
    files = [*cli.default_config_files, str(tmp_path / "logger.yaml"), str(tmp_path / "team.yaml")]
    monkeypatch.setattr(cli, "default_config_files", files)
    assert record(command(FIT)).project == "by-variable"


# Variables that are settings: over ours, under `settings` and `init`.


@pytest.mark.parametrize(
    ("variables", "flags", "expected"),
    [
        ({}, "", {"init_timeout": 8, "finish_timeout": 27.5, "save_code": True, "resume": "allow"}),
        ({"WANDB_INIT_TIMEOUT": "31"}, "", {"init_timeout": 31}),
        ({"WANDB_FINISH_TIMEOUT": "25"}, "", {"finish_timeout": 10}),
        ({"WANDB_FINISH_TIMEOUT": "0"}, "", {"finish_timeout": 0}),
        (
            {"WANDB_FINISH_TIMEOUT": "25"},
            "--trainer.logger.finish_timeout 15",
            {"finish_timeout": 5},
        ),
        ({"WANDB_SAVE_CODE": "false"}, "", {"save_code": False}),
        ({"WANDB_DISABLE_CODE": "true"}, "", {"save_code": False}),
        ({"WANDB_RESUME": "never"}, "", {"resume": "never"}),
        ({"WANDB_CONSOLE": "off"}, "", {"console": "off"}),
        ({"WANDB_DISABLE_GIT": "true"}, "", {"disable_git": True}),
        ({"WANDB__STATS_SAMPLING_INTERVAL": "7"}, "", {"x_stats_sampling_interval": 7}),
        ({}, "--trainer.logger.settings.init_timeout 9", {"init_timeout": 9}),
        (
            {"WANDB_INIT_TIMEOUT": "31"},
            "--trainer.logger.settings.init_timeout 9",
            {"init_timeout": 9},
        ),
        ({}, '--trainer.logger.init.settings {"show_emoji":false}', {"show_emoji": False}),
        (
            {},
            '--trainer.logger.init {"save_code":false,"reinit":"create_new"}',
            {"save_code": False},
        ),
        ({}, "--trainer.logger.init.sync_tensorboard true", {"sync_tensorboard": True}),
        ({"WANDB_MODE": "dryrun"}, "", {"mode": "dryrun"}),
    ],
    ids=str,
)
def test_a_setting_is_as_wandb_documents_it(
    variables: dict[str, str],
    flags: str,
    expected: dict[str, Any],
    command: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = main(command, f"{FIT} {flags}").trainer.logger.experiment.settings
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize("mode", ["offline", "disabled"])
@pytest.mark.parametrize("way", ["variable", "command", "settings"])
def test_offline_and_disabled_are_what_they_say_without_a_reason(
    mode: str, way: str, online: WandbServer, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = FIT
    if way == "variable":
        monkeypatch.setenv("WANDB_MODE", mode)
    elif way == "settings":
        line += f" --trainer.logger.settings.mode {mode}"
    else:  # `wandb offline` writes it there
        file = Path(os.environ["WANDB_CONFIG_DIR"]) / "settings"
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(file.parent))
        file.write_text(f"[default]\nmode = {mode}\n")
    try:
        outcome = command(line)
    finally:
        (Path(os.environ["WANDB_CONFIG_DIR"]) / "settings").unlink(missing_ok=True)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    (first, *_) = [said for said in outcome.out.splitlines() if said.startswith("W&B ")]
    assert first in ("W&B      disabled", "W&B      offline")
    assert ("disabled" in first) == (mode == "disabled")
    assert not online.runs
    assert not online.requests


def test_a_folder_that_a_variable_names_is_not_used_and_a_line_says_so(
    command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "W&B      WANDB_DIR is not used: "
    assert line not in command(FIT).out
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    outcome = command(FIT)
    assert record(outcome).project
    assert outcome.out.count(line) == 1
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")  # its agent sets the variable
    assert line not in command(FIT).out


def test_prefix_and_checkpoint_name_are_those_of_lightnings_logger(
    online: WandbServer, command: Commands
) -> None:
    line = f"{FIT} --trainer.logger.prefix a --trainer.logger.checkpoint_name digits"
    outcome = command(f"{line} --trainer.logger.log_model true --trainer.log_every_n_steps 1")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    (run,) = online.runs.values()
    names = {name for row in run.history for name in row}
    assert {"a-train/loss", "a-val/acc", "trainer/global_step"} <= names
    assert "train/loss" not in names
    assert run.metrics["a-val/acc"].summary == ["max"]
    assert run.summary["a-val/acc"]["max"] == run.summary["best/val/acc"]
    assert list(online.collections) == ["digits"]
    offline = command(f"{line} --trainer.logger.log_model true --trainer.logger.offline true")
    assert command(f"sync {offline.run}").code == 0
    assert list(online.collections) == ["digits"]


def test_a_fork_and_a_rewind_are_recorded_or_one_line(command: Commands) -> None:
    begun = record(command(f"{FIT} --trainer.logger.init.fork_from r1?_step=3"))
    assert (begun.branch_point.run, begun.branch_point.value) == ("r1", 3)
    assert begun.run_id != "r1"
    rewound = command(f"{FIT} --trainer.logger.init.resume_from r1?_step=3")
    assert (rewound.code, rewound.run) == (2, None), rewound
    expected = "error: trainer.logger.init.resume_from: both `run_id` and `resume_from` have been"
    assert rewound.err.startswith(expected)
    named = record(command(f"{FIT} --trainer.logger.init.resume_from r1?_step=3 --run_id r1"))
    assert (named.branch_point.run, named.run_id) == ("r1", "r1")


# What only W&B's client checks.


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("--trainer.logger.project a/b", "trainer.logger.project: Invalid project name 'a/b'"),
        (f"--trainer.logger.project {'a' * 129}", "trainer.logger.project: Invalid project name"),
        (f"--trainer.logger.tags [{'a' * 65}]", "trainer.logger.tags: tag 'aaa"),
        ("--trainer.logger.tags [a,a]", ""),
        ("--trainer.logger.config '{1: 2}'", ""),
        ("--trainer.logger.settings.base_url not-a-url", "trainer.logger.settings.base_url: input"),
        (
            "--trainer.logger.settings.init_timout 3",
            "trainer.logger.settings.init_timout: W&B has no",
        ),
        ("--trainer.logger.settings.run_id x", "trainer.logger.settings.run_id: expected --run_id"),
        ("--trainer.logger.settings.root_dir x", "trainer.logger.settings.root_dir: expected"),
        ("--trainer.logger.init.offline true", "trainer.logger.init.offline: expected"),
        ("--trainer.logger.init.add_file_policy mutable", ""),
        ("--trainer.logger.init.version x", "trainer.logger.init.version: expected --run_id"),
        ("--trainer.logger.init.mode on", "trainer.logger.init.mode: input should be 'online'"),
        ("--trainer.logger.init.resume x", "trainer.logger.init.resume: input should be 'allow'"),
        ("--trainer.logger.init.fork_from x", "trainer.logger.init.fork_from: "),
        (
            "--trainer.logger.settings.finish_timeout 3 --trainer.logger.finish_timeout 4",
            "trainer.logger.settings.finish_timeout: is given as trainer.logger.finish_timeout too",
        ),
        ("WANDB_MODE=", "WANDB_MODE: input should be 'online', 'offline'"),
        ("WANDB_MODE=on", "WANDB_MODE: input should be 'online', 'offline'"),
        ("WANDB_PROJECT=a/b", "WANDB_PROJECT: Invalid project name 'a/b'"),
        ("WANDB_PROJECT=", ""),
        ("WANDB_ENTITY=", ""),
        ("WANDB_TAGS=", "WANDB_TAGS: tag at index 0 is empty"),
        ("WANDB_BASE_URL=", "WANDB_BASE_URL: input should be a valid URL"),
        ("WANDB_BASE_URL=nowhere", "WANDB_BASE_URL: input should be a valid URL"),
        ("WANDB_INIT_TIMEOUT=soon", "WANDB_INIT_TIMEOUT: input should be a valid number"),
        ("WANDB_RESUME=perhaps", "WANDB_RESUME: input should be 'allow'"),
        ("WANDB_RUN_ID=a/b", "run id: expected letters, digits"),
        ("WANDB_SILENT=", "WANDB_SILENT: input should be a valid boolean"),
        ("WANDB_SAVE_CODE=perhaps", "WANDB_SAVE_CODE: input should be a valid boolean"),
    ],
)
def test_what_wandbs_client_refuses_is_one_line_before_the_training_and_no_folder(
    given: str, problem: str, command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, equals, value = given.partition("=")
    by_variable = bool(equals) and not given.startswith("--")
    if by_variable:
        monkeypatch.setenv(name, value)
    outcome = command(FIT if by_variable else f"{FIT} {given}")
    if not problem:
        assert (outcome.code, outcome.err) == (0, ""), outcome
        return
    assert (outcome.code, outcome.run) == (2, None), outcome
    assert outcome.err.startswith(f"error: {problem}"), outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--trainer.logger.entity nobody", "entity nobody or its project Odd.Duck not found"),
        ("--trainer.logger.project secret", "permission denied"),
    ],
)
def test_what_wandbs_server_refuses_is_offline_with_its_reason(
    flags: str, reason: str, online: WandbServer, command: Commands
) -> None:
    online.denied.add("secret")
    outcome = command(f"{FIT} {flags}")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    (first, *_) = [line for line in outcome.out.splitlines() if line.startswith("W&B ")]
    assert first.startswith("W&B      offline ("), first
    assert reason in first
    synced = command(f"sync {outcome.run}")
    assert synced.code == 1
    assert reason in synced.out, synced.out
    there = command(f"sync {outcome.run} --entity other-team --project open")
    assert (there.code, there.err) == (0, ""), there
    (run,) = online.runs.values()
    assert (run.entity, run.project, run.id) == ("other-team", "open", (outcome.run or Path()).name)


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on, and counts them."""

    passed = 0

    def do_POST(self) -> None:
        Proxy.passed += 1
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        names = ("Authorization", "Content-Type", "Content-Encoding")
        headers = {name: self.headers[name] for name in names if name in self.headers}
        asked = urllib.request.Request(self.path, content or None, headers, method=self.command)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(asked) as answer:
            body = answer.read()
            self.send_response(answer.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: Any) -> None:
        pass


def test_a_proxy_that_a_setting_names_is_used(online: WandbServer, command: Commands) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{proxy.server_port}"
        outcome = command(f"{FIT} --trainer.logger.settings.http_proxy {url}")
        proxy.shutdown()
    assert (outcome.code, outcome.err) == (0, ""), outcome
    (run,) = online.runs.values()
    assert run.state == "finished"
    assert Proxy.passed > 3


def test_slow_answers_delay_and_lose_nothing(online: WandbServer, command: Commands) -> None:
    online.fail("slow")
    outcome = command(f"{FIT} --trainer.log_every_n_steps 1")
    assert (outcome.code, outcome.err) == (0, ""), outcome
    (run,) = online.runs.values()
    assert run.state == "finished"
    assert {"train/loss", "val/loss"} <= {name for row in run.history for name in row}


# The record is the truth.


def swept(values: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what an agent of a sweep sets for a trial."""
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump({key: {"value": value} for key, value in values.items()}))
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(file))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_PROJECT", "swept")
    monkeypatch.setenv("WANDB_RUN_ID", f"trial-{folder.name}")


def whole_config(outcome: Outcome) -> dict[str, Any]:
    assert outcome.run is not None
    config: dict[str, Any] = {}
    for log in sorted(outcome.run.glob("wandb/*run-*/run-*.wandb")):
        for one in records(log):
            kind = one.WhichOneof("record_type")
            updates = {"run": [one.run.config], "config": [one.config]}.get(str(kind), [])
            for update in updates:
                for item in update.update:
                    config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return config


@pytest.mark.parametrize("way", ["sweep", "launch", "launch in pieces"])
@pytest.mark.parametrize("nested", [True, False])
def test_what_a_sweep_or_a_launch_sets_acts_and_stands_in_the_whole_configuration(
    way: str, nested: bool, command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"model.lr": 0.5, "data.batch_size": 16, "unknown": 1}
    if nested:
        values = {"model": {"init_args": {"lr": 0.5}}, "data": {"batch_size": 16}, "unknown": 1}
    if way == "sweep":
        swept(values, tmp_path, monkeypatch)
    else:
        text = json.dumps({key: {"value": value} for key, value in values.items()})
        monkeypatch.setenv("WANDB_LAUNCH", "true")
        pieces = {"WANDB_CONFIG": text}
        if way != "launch":
            pieces = {"WANDB_CONFIG_0": text[:9], "WANDB_CONFIG_1": text[9:]}
        for name, value in pieces.items():
            monkeypatch.setenv(name, value)
    outcome = command(FIT)
    assert (outcome.code, outcome.err) == (0, ""), outcome
    source = "the sweep" if way == "sweep" else "the launch"
    assert f"no option, and without effect: unknown of {source}\n" in outcome.out
    config = whole_config(outcome)
    assert config["model"]["init_args"]["lr"] == 0.5
    assert "class_path" in config["model"]
    assert config["data"]["init_args"]["batch_size"] == 16
    assert "callbacks" in config
    written = yaml.safe_load(((outcome.run or Path()) / "config.yaml").read_text())
    assert written["model"]["init_args"]["lr"] == 0.5
    assert written["data"]["init_args"]["batch_size"] == 16


def test_a_checkpoint_that_a_sweep_draws_is_begun_from(
    command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = command(FIT)
    assert first.run is not None
    swept({"init_from": first.run.name}, tmp_path, monkeypatch)
    trial = command(FIT)
    assert (trial.code, trial.err) == (0, ""), trial
    assert "from     " in trial.out


@pytest.mark.parametrize(
    ("variables", "flags", "problem"),
    [
        (
            {"WANDB_FORK_FROM": "r1?_step=3", "WANDB_RESUME": "allow"},
            "",
            "W&B's variables and trainer.logger: `fork_from`, `resume`",
        ),
        (
            {"WANDB_RESUME": "allow"},
            "--trainer.logger.init.fork_from r1?_step=3",
            "W&B's variables and trainer.logger: `fork_from`, `resume`",
        ),
        ({"WANDB_RESUME_FROM": "r1?_step=3"}, "", "resume_from rewinds the run r1: expected"),
    ],
)
def test_variables_that_exclude_each_other_or_the_run_are_one_line(
    variables: dict[str, str],
    flags: str,
    problem: str,
    command: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    outcome = command(f"{FIT} {flags}")
    assert (outcome.code, outcome.run) == (2, None), outcome
    assert outcome.err.startswith(f"error: {problem}"), outcome.err
    assert outcome.err.count("\n") == 1


def test_sync_says_in_one_line_which_variable_is_wrong(
    command: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "nowhere")
    outcome = command("sync")
    assert outcome.code == 2
    assert outcome.err.startswith("error: WANDB_BASE_URL: input should be a valid URL")


def test_where_a_flag_wins_over_a_sweep_the_record_says_so(
    command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept({"model.lr": 0.5}, tmp_path, monkeypatch)
    config = whole_config(command(f"{FIT} --model.lr 0.25"))
    assert (config["model"]["init_args"]["lr"], config["model.lr"]) == (0.25, 0.25)


def test_a_configuration_that_wandb_hands_back_is_accepted(
    command: Commands, tmp_path: Path
) -> None:
    first = command(f"{FIT} --model.lr 0.5")
    config = whole_config(first)
    assert {"run", "_wandb", "model"} <= config.keys()
    file = tmp_path / "handed-back.json"
    file.write_text(json.dumps(config))
    again = command(f"fit --config {file}")
    assert (again.code, again.err) == (0, ""), again
    assert whole_config(again)["model"] == config["model"]
    flags = [f"--{key}={json.dumps(config[key])}" for key in ("run", "_wandb")]
    by_flags = command([*FIT.split(), *flags])
    assert (by_flags.code, by_flags.err) == (0, ""), by_flags


# The table in the docs.


def test_every_variable_of_wandbs_client_is_in_the_table() -> None:
    table = (TEMPLATE / "docs" / "wandb-variables.md").read_text(encoding="utf-8")
    listed = {
        name for row in re.findall(r"^\| (`WANDB.*?) \|", table, re.M) for name in row.split("`")
    }
    known = {
        value
        for name, value in vars(wandb.env).items()
        if name.strip("_").isupper() and isinstance(value, str) and value.startswith("WANDB_")
    }
    settings = {f"WANDB_{name.upper()}" for name in ("fork_from", "resume_from", "finish_timeout")}
    assert known | settings <= listed, sorted((known | settings) - listed)
