"""The environment that torchrun or srun sets: whether there are other processes, and which of them this one is."""

import os
import re


def launched() -> bool:
    """Return whether a launcher has started more than one process for this run."""
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", 1))) > 1


def rank() -> int:
    """Return this process's number, from 0; 0 where no launcher sets one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def local_rank() -> int:
    """Return this process's number on its machine, from 0; 0 where no launcher sets one."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def local_size() -> int:
    """Return the number of the run's processes on this machine; 1 where no launcher sets it."""
    said = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return max(1, int(re.match(r"\d*", said)[0] or 1))  # type: ignore[index]  # SLURM's "2(x3),1" is of the first nodes


def set_up_from_slurm() -> None:
    """Set what torchrun sets and srun does not: rank, size, and where to meet."""
    if "WORLD_SIZE" in os.environ:
        return
    asked = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    os.environ.update({name: os.environ[slurm] for name, slurm in asked.items()})
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))


def first_host(nodes: str) -> str:
    """Return the first host of a list as SLURM writes it.

    Example:
        >>> first_host("node[07-09,12],login1"), first_host("a,b")
        ('node07', 'a')
    """
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return nodes if found is None else found[1] + (found[2] or "")
