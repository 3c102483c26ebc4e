"""Checkpoints, run folders and files that a stranger planted: none calls, writes or removes.

Also what Windows asks for where Linux does not: files that are closed before they are replaced.
"""

import fcntl
import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import Commands


@pytest.fixture
def engine(command: Commands) -> Any:
    """What imports a file of the engine."""
    return lambda name: importlib.import_module(f"odd_duck.engine.{name}")


@pytest.mark.parametrize(
    ("function", "option"), [("os.system", "command"), ("subprocess.getoutput", "cmd")]
)
def test_a_checkpoint_calls_no_function(
    function: str, option: str, engine: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof, file = tmp_path / "proof", tmp_path / "theirs.ckpt"
    hyper_parameters = {"_class_path": function, option: f"touch {proof}"}
    torch.save({"state_dict": {}, "hyper_parameters": hyper_parameters}, file)
    with pytest.raises(SystemExit):
        engine("checkpoints").load(str(file))
    assert "which is no LightningModule" in capsys.readouterr().err
    assert not proof.exists()


def test_a_model_may_be_made_by_a_function_that_says_so(engine: Any) -> None:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.demos.boring_classes import BoringModel

    def plain() -> LightningModule:
        return BoringModel()

    def as_text() -> "BoringModel":
        return BoringModel()

    def other() -> int:
        return 0

    makes = engine("checkpoints").makes_module
    for function in (plain, BoringModel, LightningModule):
        assert makes(function)
    for target in (other, print, int, 3, lambda: None):
        assert not makes(target)
    as_text.__globals__["BoringModel"] = BoringModel
    try:
        assert makes(as_text)
    finally:
        del as_text.__globals__["BoringModel"]


def test_a_link_in_the_place_of_a_part_leads_nowhere(engine: Any, tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    folder.mkdir()
    row = {"_row": 0, "_stage": "fit", "_step": 0, "a": "theirs"}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "metrics.csv.part").symlink_to(precious)
    engine("metrics_log").update_table(folder)
    assert precious.read_text() == "mine"
    assert "theirs" in (folder / "metrics.csv").read_text()
    assert not (folder / "metrics.csv").is_symlink()


def test_a_link_in_the_place_of_a_log_to_send_leads_nowhere(engine: Any, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "run-a.wandb").write_bytes(b":W&B\xbe\xef\x00")
    (tmp_path / "missing.wandb").symlink_to(precious)
    log = SimpleNamespace(file=tmp_path / "run-a.wandb")
    engine("wandb_sync").write_copy(log, iter(()))
    assert precious.read_text() == "mine"


def test_a_checkpoint_names_no_file_outside_of_its_folder(engine: Any, tmp_path: Path) -> None:
    before, now = Path("/x/checkpoints"), tmp_path / "run" / "checkpoints"
    outside = "/x/checkpoints/../../.."
    state: dict[str, Any] = {
        "dirpath": str(before),
        "best_model_path": outside,
        "kth_best_model_path": outside,
        "last_model_path": str(before / "last.ckpt"),
        "best_k_models": {outside: 1, str(before / "a.ckpt"): 2},
    }
    engine("restore").relocate_paths(state, before, now)
    assert state["best_k_models"] == {str(now / "a.ckpt"): 2}
    assert (state["best_model_path"], state["kth_best_model_path"]) == ("", "")
    assert state["last_model_path"] == str(now / "last.ckpt")


KEYED = """
from odd_duck.model import Classifier


class Keyed(Classifier):
    def __init__(self, num_classes: int, api_key: str = "") -> None:
        super().__init__(num_classes)
"""


def test_a_secret_that_is_given_again_is_not_shown(
    command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keyed.py").write_text(KEYED)
    monkeypatch.syspath_prepend(tmp_path)
    words = "--trainer.max_epochs 1 --trainer.log_every_n_steps 1 --trainer.logger false"
    keyed = "--model keyed.Keyed --data Digits --model.api_key"
    first = command(f"fit {keyed} sk-first {words}")
    assert (first.code, first.err) == (0, ""), first.err
    assert first.run
    given = "--model.api_key sk-again --trainer.max_epochs 2"
    again = command(f"fit --resume {first.run.name} {given}")
    assert (again.code, again.err) == (0, ""), again.err
    assert "sk-" not in first.out + again.out
    for name in ("config.yaml", "run.json"):
        assert "sk-" not in (first.run / name).read_text()


def test_files_are_synced_while_open_for_writing_and_replaced_when_closed(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses to sync what is open for reading, and to replace what is open."""
    sync, replace = os.fsync, Path.replace
    modes: list[int] = []

    def fsync(number: int) -> None:
        modes.append(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE)
        sync(number)

    def replaced(self: Path, target: Any) -> Path:
        opened = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
        assert not {os.path.realpath(self), os.path.realpath(target)} & opened
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replaced)
    log = engine("metrics_log").MetricsLog(tmp_path)
    for step in range(4):
        log.append({"step": step, "loss µ→": 1.0}, "fit", step)
    log.keep(lambda row: row["step"] < 2)
    log.close()
    engine("checkpoint_writer").write_file(tmp_path / "a.ckpt", {"a": 1}, {})
    assert set(modes) == {os.O_RDWR}
    assert (tmp_path / "metrics.csv").read_bytes().decode("utf-8").startswith("step,epoch,loss µ→")
