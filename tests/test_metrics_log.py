"""The rows that a run has logged: appended one by one, whole after a kill, and a table of them."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def metrics_log(command: Any) -> Any:
    from odd_duck.engine import metrics_log

    return metrics_log


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_new_names_are_new_columns_and_values_stay_what_they_are(
    metrics_log: Any, tmp_path: Path
) -> None:
    log = metrics_log.MetricsLog(tmp_path)
    log.append({"step": 0, "b": 0.1 + 0.2, "a, quoted": 1}, "fit", 0)
    log.append({"step": 1, "epoch": 0, "tensor": torch.tensor(0.5), "text": "x\ny"}, "fit", 1)
    log.append({"step": 2, "nan": math.nan, "many": torch.ones(2)}, "test", 2)
    log.close()
    rows = table(tmp_path)
    assert [*rows[0]] == ["step", "epoch", "b", "a, quoted", "tensor", "text", "nan", "many"]
    assert float(rows[0]["b"]) == 0.1 + 0.2
    assert (rows[1]["tensor"], rows[1]["text"], rows[2]["nan"]) == ("0.5", "x\ny", "nan")
    assert rows[2]["many"] == "tensor([1., 1.])"


def test_a_row_that_a_kill_has_cut_is_not_there(metrics_log: Any, tmp_path: Path) -> None:
    log = metrics_log.MetricsLog(tmp_path)
    for step in range(3):
        log.append({"step": step, "wide": "x" * 100_000}, "fit", step)
    log.close()
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    for cut in (1, 50_000, 100_030):
        file.write_bytes(whole[:-cut])
        (tmp_path / "metrics.csv").unlink(missing_ok=True)
        metrics_log.update_table(tmp_path)
        assert [row["step"] for row in table(tmp_path)] == ["0", "1"]
        again = metrics_log.MetricsLog(tmp_path)
        again.append({"step": 7}, "fit", 7)
        again.close()
        assert [row["step"] for row in table(tmp_path)] == ["0", "1", "7"]
        numbers = [json.loads(line)["_row"] for line in file.read_text().splitlines()]
        assert numbers == [0, 1, 2]


def test_dropping_rows_keeps_the_others_to_the_byte(metrics_log: Any, tmp_path: Path) -> None:
    log = metrics_log.MetricsLog(tmp_path)
    for step in range(6):
        log.append({"step": step}, "test" if step == 4 else "fit", step)
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    log.keep(lambda row: row["_step"] < 2 or row["_stage"] == "test")
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == [*lines[:2], lines[4]]
    log.append({"step": 2}, "fit", 2)
    log.close()
    assert [row["step"] for row in table(tmp_path)] == ["0", "1", "4", "2"]
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["_row"] == 5  # as if the dropped rows had not been


def test_a_table_of_an_earlier_release_is_continued(metrics_log: Any, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "step,epoch,train/loss,test/acc\n0,0,1.5,\n1,0,0.25,\n2,,,0.9\n"
    )
    log = metrics_log.MetricsLog(tmp_path)
    log.append({"step": 2, "train/loss": 0.125}, "fit", 2)
    log.keep(lambda row: row["_step"] < 1 or row["_stage"] != "fit" or row["_row"] == 3)
    log.close()
    rows = table(tmp_path)
    assert [row["train/loss"] for row in rows] == ["1.5", "", "0.125"]
    assert [row["test/acc"] for row in rows] == ["", "0.9", ""]


def test_a_table_of_a_run_that_is_only_read_is_made_without_harm(
    metrics_log: Any, tmp_path: Path
) -> None:
    metrics_log.update_table(tmp_path)  # nothing was logged
    assert not (tmp_path / "metrics.csv").exists()
    log = metrics_log.MetricsLog(tmp_path)
    log.append({"step": 0, "loss": 1}, "fit", 0)
    metrics_log.update_table(tmp_path)  # while it runs
    log.append({"step": 1, "other": 1}, "fit", 1)
    log.close()
    assert [row["other"] for row in table(tmp_path)] == ["", "1"]
    before = (tmp_path / "metrics.csv").stat().st_mtime_ns
    metrics_log.update_table(tmp_path)
    assert (tmp_path / "metrics.csv").stat().st_mtime_ns == before
