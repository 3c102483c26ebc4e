"""What only a run in a job of SLURM needs: which of its tasks belong together, and to begin once more."""

import os
import subprocess
import sys

from lightning.fabric.plugins.environments import SLURMEnvironment

from .run import DRAWN, Mistake


def step_of_several() -> str:
    """Names the step of srun whose tasks are the ranks of this run; nothing where ranks are started by others.

    Lightning leaves a job of salloc alone, asks for an option of srun that it could do without, and gives all steps of
    a job one port. The environment is changed to what is meant.
    """
    tasks, step, shell = (os.environ.get(f"SLURM_{name}") for name in ("NTASKS", "STEP_ID", "PTY_PORT"))
    alone = SLURMEnvironment.job_id() is None and (step is None or shell is not None)  # what is typed into a shell
    if tasks == "1" or alone or "TORCHELASTIC_RUN_ID" in os.environ:
        return ""
    if step is None:
        raise Mistake(f"SLURM: {tasks} tasks are asked for, of which this is none; begin the command with srun")
    job = os.environ["SLURM_JOB_ID"]
    os.environ["SLURM_JOB_NAME"] = "srun"
    os.environ["SLURM_NTASKS_PER_NODE"] = os.environ["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0]
    os.environ.setdefault("MASTER_PORT", str(15000 + (31 * int(job) + int(step)) % 10000))
    return f"{os.environ['SLURM_CLUSTER_NAME']}-{job}-{step}"


def requeue() -> None:
    """Has the job started once more, which ends it here, if it will then go on with this run."""
    if not SLURMEnvironment.detect():
        return
    if os.environ.get("WANDB_RUN_ID") in DRAWN:
        print("warning: not requeued, for the job would begin a new run; WANDB_RUN_ID can name one", file=sys.stderr)
        return
    array, job = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK")), os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", "_".join(filter(None, array)) or job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"warning: {error}", file=sys.stderr)
