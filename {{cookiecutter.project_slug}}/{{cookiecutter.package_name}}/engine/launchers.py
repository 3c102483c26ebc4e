"""What a run has to know of torchrun and SLURM where they start its ranks: which belong together, and at which port."""

import os
import socket
import subprocess
import sys
import time
from contextlib import nullcontext, suppress

from lightning.fabric.plugins.environments import SLURMEnvironment
from torch.distributed import TCPStore

from .run import LOCKS, Mistake

FRESH = set[str]()  # ids of runs with which another start of their job would not go on, for it would draw another


def agreed(run_id: str) -> str:
    """The id of this run on all of its ranks, given one that this rank has drawn."""
    step = step_of_slurm()
    given = os.environ.get("WANDB_RUN_ID") or step
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        run_id = meet(run_id)
    if not given:
        FRESH.add(run_id)
    return given or run_id


def meet(run_id: str) -> str:
    """Takes what the first rank drew from the store that torchrun keeps.

    Ranks that may be started again get a store for each start, for in torch's own they may find addresses of the one
    before. They know it by its answering: torchrun counts starts for each machine by itself.
    """
    host = os.environ["MASTER_ADDR"]
    store = TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False)
    run_id = store.compare_set("run_id", "", run_id).decode()
    if os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        if os.environ["RANK"] == "0":
            own = TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
            LOCKS.enter_context(nullcontext(own))  # torch joins it by its port, as long as it is there
            store.set("port", str(own.port))
        while os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
            time.sleep(0.1)
            with suppress(OSError), socket.create_connection((host, int(store.get("port"))), 1) as there:
                port = str(there.getpeername()[1])
                os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return run_id


def step_of_slurm() -> str:
    """Names the step of srun whose tasks are the ranks of this run; nothing where ranks are started by others.

    Lightning leaves a job of salloc alone, asks for an option of srun that it could do without, and gives all steps of
    a job one port. The environment is changed to what is meant.
    """
    tasks, step, shell = (os.environ.get(f"SLURM_{name}") for name in ("NTASKS", "STEP_ID", "PTY_PORT"))
    alone = SLURMEnvironment.job_id() is None and (step is None or shell is not None)  # what is typed into a shell
    if tasks in (None, "1") or alone or "TORCHELASTIC_RUN_ID" in os.environ:
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
    if os.environ.get("WANDB_RUN_ID") in FRESH:
        print("warning: not requeued, for the job would begin a new run; WANDB_RUN_ID can name one", file=sys.stderr)
        return
    array, job = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK")), os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", "_".join(filter(None, array)) or job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"warning: {error}", file=sys.stderr)
