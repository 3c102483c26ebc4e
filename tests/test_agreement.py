"""How ranks agree on a signal: all on the same one at the same step, without waiting in fast ones.

Two real processes, which talk by gloo.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bakery import environment
from conftest import Bake
from test_launchers import TORCHRUN

SCRIPT = """
import json, os, sys, time
from pathlib import Path

import torch
from my_project.engine.distributed import SLOW_STEP, Agreement

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
found = {}


def steps(name, numbers, pauses=(0, 0), at_once=()):
    one = Agreement(torch.device("cpu"))
    reached, waited = [], []
    for step, number in enumerate(numbers[rank]):
        time.sleep(pauses[rank])
        begin = time.monotonic()
        reached.append(one.reached(number, at_once=step in at_once))
        waited.append(time.monotonic() - begin)
    one.settle()
    found[name] = {"reached": reached, "waited": waited, "left": one.answer is None}


steps("fast", [[0, 0, 0, 0, 0], [0, 0, 15, 15, 15]])
steps("the larger one", [[0, 2, 2, 2], [0, 15, 15, 15]])
steps("at once", [[0, 0, 0, 0], [0, 0, 15, 15]], at_once={2})
steps("not forgotten", [[0, 0, 0, 0], [0, 15, 0, 0]], at_once={1})
steps("at once, and before", [[0, 15, 15], [0, 0, 0]], at_once={2})
steps("slow", [[0, 0, 0, 0, 0], [0, 0, 0, 15, 15]], pauses=(SLOW_STEP + 0.1, 0))
steps("one behind", [[0] * 4, [0] * 4], pauses=(0, 0.3))
Path(f"rank-{rank}.json").write_text(json.dumps(found))
torch.distributed.barrier()
os._exit(0)
"""


@pytest.fixture(scope="module")
def ranks(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has reached, by case."""
    home = tmp_path_factory.mktemp("agreement")
    project = bake(home)
    (project / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [*TORCHRUN, "2", "--standalone", "script.py"],
        cwd=project,
        env=environment(home) | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    return [json.loads(Path(project, f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("fast", [0, 0, 0, 15, 15]),  # one step late
        ("the larger one", [0, 0, 15, 15]),
        ("at once", [0, 0, 15, 15]),
        ("not forgotten", [0, 15, 15, 15]),
        ("at once, and before", [0, 0, 15]),
        # The second step was slow, which all know by the third; from then on without delay.
        ("slow", [0, 0, 0, 15, 15]),
    ],
)
def test_all_ranks_reach_the_same_number_at_the_same_step(
    ranks: list[dict[str, Any]], case: str, expected: list[int]
) -> None:
    assert [rank[case]["reached"] for rank in ranks] == [expected, expected]


def test_nothing_is_left_unanswered_at_the_end(ranks: list[dict[str, Any]]) -> None:
    assert all(case["left"] for rank in ranks for case in rank.values())


def test_a_rank_does_not_wait_for_one_that_is_a_step_behind(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]["one behind"]["waited"]
    assert first[0] < 0.15  # while the other one is 0.3 s behind
