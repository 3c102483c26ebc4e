"""A project of the release before the engine was rebuilt updates, and reads its old runs."""

import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from bakery import TEMPLATE
from conftest import Run, copy_template
from test_project import OWN_TESTS

BEFORE = "f6ad7eeb87a5a4e1726a355d97f6b34a017ccffe"  # the last commit with the earlier engine
CRUFT = (sys.executable, "-m", "cruft")
TRAIN = "--trainer.max_epochs 1 --trainer.limit_train_batches 4 --trainer.log_every_n_steps 1"


def earlier_template(folder: Path) -> None:
    """Write the template as it was before, from this repository's history."""
    command = ("git", "archive", "--format=tar", BEFORE)
    done = subprocess.run(command, cwd=TEMPLATE, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a shallow clone without {BEFORE[:7]}: git fetch --unshallow")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")


@pytest.fixture
def updated(run: Run, git: Run, tmp_path: Path) -> Path:
    """A project with a run of the earlier engine, updated to the template of today."""
    template = tmp_path / "template"
    git("init", "--quiet", template, cwd=tmp_path)
    for release in ("v1", "v2"):
        git("rm", "-r", "-q", "--ignore-unmatch", ".", cwd=template)
        earlier_template(template) if release == "v1" else copy_template(template)
        for words in ("add --all", f"commit --quiet --message {release}", f"tag {release}"):
            git(*words.split(), cwd=template)
    run(*CRUFT, "create", "--no-input", "--checkout", "v1", template, cwd=tmp_path)
    project = tmp_path / "my-project"
    overlay = project / "configs" / "ours.yaml"
    overlay.write_text(
        "callbacks:\n  backup:\n    init_args:\n      every_n_train_steps: 3\n"
        "trainer:\n  logger:\n    class_path: my_project.engine.wandb.Wandb\n"
        "    init_args:\n      save_dir: ${run}\n      job_type: old-${verb}\n"
    )
    words = f"fit --config configs/digits.yaml --config configs/ours.yaml {TRAIN}"
    run(sys.executable, "main.py", *words.split(), cwd=project, WANDB_MODE="offline")
    for command in ("init --quiet", "add --all", "commit --quiet --message baked"):
        git(*command.split(), cwd=project)
    run(*CRUFT, "update", "--skip-apply-ask", "--checkout", "v2", cwd=project)
    assert not [*project.rglob("*.rej"), *project.rglob("*.orig")]
    assert not git("diff", "--name-only", "--diff-filter=U", cwd=project)
    return project


@pytest.mark.slow
def test_a_project_of_before_updates_and_reads_its_old_runs(updated: Path, run: Run) -> None:
    assert (updated / "my_project" / "cli.py").exists()
    assert not (updated / "my_project" / "engine" / "endings.py").exists()
    (old,) = (updated / "runs").iterdir()

    def main(words: str) -> str:
        return run(sys.executable, "main.py", *words.split(), cwd=updated, WANDB_MODE="offline")

    tested = main(f"test --ckpt_path {old.name} --trainer.logger false")
    assert "callbacks.backup is now callbacks.last_checkpoint" in tested
    assert re.search(r"renamed  my_project.engine.wandb.Wandb is now \S+RunWandbLogger", tested)
    resumed = main(f"fit --resume {old.name} --trainer.max_epochs 2 --trainer.logger.job_type x")
    assert "Traceback" not in resumed
    steps = [line.split(",")[0] for line in (old / "metrics.csv").read_text().splitlines()[1:]]
    assert sorted({int(step) for step in steps}) == list(range(8))
    recorded = yaml.safe_load((old / "config.yaml").read_text())
    assert recorded["callbacks"]["last_checkpoint"]["init_args"]["every_n_train_steps"] == 3
    assert "backup" not in recorded["callbacks"]
    assert recorded["trainer"]["logger"]["init_args"]["save_dir"] == "$run"
    for words in (
        f"fit --config runs/{old.name}/config.yaml --trainer.max_epochs 1",
        f"fit --init_from {old.name} --trainer.max_epochs 1 --trainer.logger false",
        f"fit --ckpt_path {old.name} --trainer.max_epochs 3 --trainer.logger false",
        f"predict --ckpt_path {old.name}:last --trainer.logger false",
    ):
        assert "Traceback" not in main(words)
    overlay = f"fit --config configs/digits.yaml --config configs/ours.yaml {TRAIN}"
    printed = main(f"{overlay} --callbacks.backup.save_on_exception false")
    assert printed.count("callbacks.backup is now callbacks.last_checkpoint") == 1
    assert "${run} is now $run" in printed
    code = "from my_project.engine.references import load\n"
    code += f"print(load({old.name!r}).training)"
    warned = run(sys.executable, "-c", code, cwd=updated)
    assert "my_project.engine.references is now my_project.engine" in warned
    assert warned.splitlines()[-1] == "False"


@pytest.mark.slow
def test_a_project_of_before_passes_its_own_tests_after_the_update(updated: Path, run: Run) -> None:
    assert " passed" in run(*OWN_TESTS, cwd=updated)
