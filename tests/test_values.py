"""Which value wins, and that each is said to come from where it came from."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command import Commands

FILES = {
    "a.yaml": """
        model: {class_path: Classifier, init_args: {lr: 0.01, dropout: 0.1}}
        data: {class_path: Digits, init_args: {batch_size: 16}}
        callbacks: {early_stopping: null}
    """,
    "b.yaml": """
        model: {class_path: Classifier, init_args: {lr: 0.5}}
        callbacks: {checkpoint: {init_args: {save_top_k: 3}}}
    """,
}
JSON = '\'{"model": {"class_path": "Classifier", "init_args": {"lr": 0.7}}}\''
# The verb, the files, the flags; then an option, its value, and what gave it that value. The
# checkpoint has model.lr 0.003 and model.dropout 0.3; the run that it lies in has
# data.batch_size 32 as well.
ROWS = [
    ("fit", "a.yaml", "", "seed_everything", 42, "defaults.yaml"),
    ("fit", "a.yaml", "--seed_everything 7", "seed_everything", 7, "--seed_everything"),
    ("fit", "a.yaml", "", "model.width", 32, "default"),
    ("fit", "a.yaml", "", "model.lr", 0.01, "a.yaml"),
    ("fit", "a.yaml b.yaml", "", "model.lr", 0.5, "b.yaml"),
    ("fit", "b.yaml a.yaml", "", "model.lr", 0.01, "a.yaml"),
    ("fit", f"a.yaml {JSON}", "", "model.lr", 0.7, "JSON"),
    ("fit", f"{JSON} a.yaml", "", "model.lr", 0.01, "a.yaml"),
    ("fit", "a.yaml b.yaml", "", "model.dropout", 0.1, "a.yaml"),
    ("fit", "a.yaml b.yaml", "--model.lr 0.3", "model.lr", 0.3, "--model.lr"),
    ("fit", "a.yaml b.yaml", "--model.init_args.lr=0.3", "model.lr", 0.3, "--model.init_args.lr"),
    ("fit", "a.yaml b.yaml", "--model.lr 0.3 --model.lr 1e-3", "model.lr", 0.001, "--model.lr"),
    (
        "fit",
        "a.yaml b.yaml",
        "--model Classifier",
        "model.class_path",
        "odd_duck.model.Classifier",
        "--model",
    ),
    ("fit", "a.yaml b.yaml", "--model Classifier", "model.lr", 0.5, "b.yaml"),
    ("fit", "a.yaml b.yaml", "", "callbacks.checkpoint.save_top_k", 3, "b.yaml"),
    ("fit", "a.yaml b.yaml", "", "callbacks.checkpoint.monitor", "$monitor", "defaults.yaml"),
    (
        "fit",
        "a.yaml",
        "--callbacks.checkpoint.save_top_k 2",
        "callbacks.checkpoint.save_top_k",
        2,
        "--callbacks.che",
    ),
    ("fit", "a.yaml", "", "callbacks.early_stopping", None, "a.yaml"),
    (
        "fit",
        "a.yaml",
        "--trainer.logger.tags [x,y]",
        "trainer.logger.tags",
        ["x", "y"],
        "--trainer.logger.tags",
    ),
    (
        "fit",
        "a.yaml",
        "--trainer.logger.tags+ z",
        "trainer.logger.tags",
        ["z"],
        "--trainer.logger.tags",
    ),
    *[
        ("fit", *rest)
        for way in ("--init_from RUN", "--init_from RUN:last", "--ckpt_path RUN", "--resume RUN")
        for rest in (
            ("", way, "model.lr", 0.003, "the checkpoint"),
            ("a.yaml", way, "model.lr", 0.01, "a.yaml"),
            ("b.yaml", way, "model.dropout", 0.3, "the checkpoint"),
            ("b.yaml", f"{way} --model.lr 0.3", "model.lr", 0.3, "--model.lr"),
            ("", way, "data.batch_size", 32, "RUN/config.yaml"),
            ("a.yaml", way, "data.batch_size", 16, "a.yaml"),
        )
    ],
    ("fit", "b.yaml", "--init_from FILE --data Digits", "model.dropout", 0.3, "the checkpoint"),
    ("fit", "b.yaml", "--init_from FILE --data Digits", "data.batch_size", 64, "default"),
    *[
        (verb, *rest)
        for verb in ("validate", "test", "predict")
        for rest in (
            ("", "--ckpt_path RUN", "model.lr", 0.003, "the checkpoint"),
            ("a.yaml b.yaml", "--ckpt_path RUN:last", "model.lr", 0.003, "the checkpoint"),
            ("a.yaml", "--ckpt_path RUN --model.dropout 0", "model.dropout", 0, "--model.dropout"),
            ("", "--ckpt_path RUN", "data.batch_size", 32, "RUN/config.yaml"),
            ("a.yaml", "--ckpt_path RUN", "data.batch_size", 16, "a.yaml"),
            (
                "a.yaml",
                "--ckpt_path RUN --data.batch_size 8",
                "data.batch_size",
                8,
                "--data.batch_size",
            ),
            ("a.yaml", "--ckpt_path FILE", "model.lr", 0.003, "the checkpoint"),
            ("a.yaml", "--ckpt_path FILE", "data.batch_size", 16, "a.yaml"),
        )
    ],
]


@pytest.fixture(scope="module")
def trained(command: Commands) -> Path:
    brief = "--trainer.logger false --trainer.max_epochs 1 --trainer.limit_train_batches 2"
    brief += " --trainer.log_every_n_steps 1"
    run = command(
        f"fit --config @digits {brief} --model.lr 0.003 --model.dropout 0.3 --data.batch_size 32"
    ).run
    assert run is not None
    return run


@pytest.fixture
def line(trained: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Where the files of a row are, and what stands for what in it."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(yaml.safe_dump(yaml.safe_load(text)))
    file = shutil.copy(trained / "checkpoints" / "last.ckpt", tmp_path)
    return tmp_path, {"RUN": trained.name, "FILE": str(file)}


def value_and_origin(text: str, option: str) -> tuple[object, str]:
    """An option's value in what was printed, and the comment behind it."""
    for name, value in yaml.safe_load(text).items():
        if option in (name.replace(".init_args", ""), name):
            return value, re.findall(rf"^{re.escape(name)}: .*  # (.*)$", text, re.MULTILINE)[0]
    raise AssertionError(f"{option} is not shown")


def lines() -> list[tuple[str, str, str, str]]:
    """Each command line of ROWS once, with flags behind, before or on both sides of the files.

    One whose flags name a checkpoint and more stands in every order.
    """
    orders = ("files", "flags", "mixed")
    cases = []
    for number, line in enumerate(dict.fromkeys(row[:3] for row in ROWS)):
        several = line[1] and line[2].count("--") > 1
        chosen = orders if several else (orders[number % len(orders)],)
        cases += [(*line, order) for order in chosen]
    return cases


def words_of(files: str, flags: str, order: str, folder: Path) -> str:
    configs = []
    for file in [JSON if word == "J" else word for word in files.replace(JSON, "J").split()]:
        configs.append(f"--config {file if file == JSON else folder / file}")
    parts = [word if word.startswith("--") else f"--{word}" for word in flags.split(" --") if word]
    before = {"files": 0, "flags": len(parts), "mixed": 1}[order]
    return " ".join([*parts[:before], *configs, *parts[before:]])


@pytest.mark.parametrize(("verb", "files", "flags", "order"), lines())
def test_the_value_that_counts_comes_from_where_it_should_wherever_flags_stand(
    verb: str,
    files: str,
    flags: str,
    order: str,
    line: tuple[Path, dict[str, str]],
    command: Commands,
) -> None:
    folder, names = line

    def named(text: str) -> str:
        for name, path in names.items():
            text = text.replace(name, path)
        return text

    words = words_of(files, named(flags), order, folder)
    outcome = command(f"{verb} {words} --print_config=origins")
    assert (outcome.code, outcome.err, outcome.run) == (0, "", None), outcome
    for *asked, option, value, origin in ROWS:
        if tuple(asked) != (verb, files, flags):
            continue
        seen, where = value_and_origin(outcome.out, option)
        expected = named(origin)
        assert seen == value
        found = expected in where if origin.startswith("--") else where.endswith(expected)
        assert found, where


def test_what_is_shown_is_what_trains(line: tuple[Path, dict[str, str]], command: Commands) -> None:
    folder, names = line
    brief = "--trainer.logger false --trainer.max_epochs 1 --trainer.limit_train_batches 1"
    rate = "--config @digits --model.lr 0.25"
    for words, expected in {
        f"--model.lr 0.25 --config @digits {brief}": 0.25,
        f"--config @digits {brief} --model.lr 0.25": 0.25,
        f"--config {folder / 'b.yaml'} --init_from {names['RUN']} {brief}": 0.5,
        f"--init_from {names['RUN']} {brief}": 0.003,
    }.items():
        run = command(f"fit {words}").run
        assert run is not None, rate
        content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert content["optimizer_states"][0]["param_groups"][0]["lr"] == expected


def shown(path: Path) -> str:
    return min(str(path), os.path.relpath(path), key=len)


def test_what_differs_from_the_checkpoint_is_printed_and_nothing_else(
    line: tuple[Path, dict[str, str]], command: Commands
) -> None:
    folder, names = line
    brief = "--trainer.logger false --trainer.max_steps 0"
    a = shown(folder / "a.yaml")
    for words, expected in {
        f"fit --init_from RUN {brief}": [],
        f"fit --init_from RUN {brief} --model.lr 3e-3 --model Classifier --data.batch_size 8": [],
        f"fit --init_from RUN {brief} --config {a}": [
            f"model.dropout: 0.1 of {a}, not 0.3 of the checkpoint",
            f"model.lr: 0.01 of {a}, not 0.003 of the checkpoint",
        ],
        f"test --ckpt_path RUN --trainer.logger false --config {a} --model.dropout 0": [
            "model.dropout: 0 of --model.dropout, not 0.3 of the checkpoint",
            f"model.lr: 0.003 of the checkpoint, not 0.01 of {a}",
        ],
        "fit --resume RUN --trainer.max_epochs 1 --seed_everything 8": [
            "seed_everything: 8 of --seed_everything, not 42 of RUN/config.yaml"
        ],
    }.items():
        outcome = command(words.replace("RUN", names["RUN"]))
        assert (outcome.code, outcome.err) == (0, ""), outcome.err
        printed = [
            text.removeprefix("differs  ")
            for text in outcome.out.splitlines()
            if text.startswith("differs  ")
        ]
        wanted = [
            text.replace("RUN/config.yaml", shown(command.runs / names["RUN"] / "config.yaml"))
            for text in expected
        ]
        assert [" ".join(text.split()) for text in printed] == wanted


def test_lightnings_own_references_pass_through(
    line: tuple[Path, dict[str, str]], command: Commands
) -> None:
    _, names = line
    outcome = command(
        f"test --config @digits --trainer.logger false --ckpt_path file://{names['FILE']}"
    )
    assert (outcome.code, outcome.err) == (0, ""), outcome.err
    assert f"from     file://{names['FILE']}\n" in outcome.out
    for reference in ("hpc", "best", "registry:a/b", "file:///nowhere.ckpt"):
        refused = command(f"fit --config @digits --trainer.logger false --ckpt_path {reference}")
        assert (refused.code, refused.error, refused.err.count("\n")) == (2, None, 1), refused
