"""Find this process's rank in the variables that launchers set, and complete them to those that torchrun sets.

torchrun, ``accelerate launch`` and PyTorchJob set ``RANK`` and ``WORLD_SIZE``; so does ``deepspeed``, which writes
``LOCAL_SIZE`` for ``LOCAL_WORLD_SIZE``. ``srun`` and ``mpirun`` have names of their own.
"""

import argparse
import re
from collections.abc import Mapping

from helpers.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Names of rank, world size, local rank, local world size. Open MPI; then MPICH and Intel MPI.
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
LOOPBACK = "127.0.0.1"
DEFAULT_PORT = "29500"  # torchrun's


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Accept ``--local_rank``, which ``deepspeed`` and older launchers add to the command."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def rank_variables(environ: Mapping[str, str], local_rank: int | None = None) -> dict[str, str]:
    """Find rank, world size, their values on this node, and the address of rank 0.

    Args:
        environ: The environment of this process.
        local_rank: The value of ``--local_rank``, which some launchers add to the command; None without it.

    Returns:
        The six variables that torchrun would set; none for a single process without a launcher.

    Raises:
        UserError: A variable is missing, or is not a number that fits the others.
    """
    found = _own_names(environ, local_rank) or _slurm(environ) or _mpi(environ)
    if not found:
        return {}
    found.setdefault("MASTER_PORT", environ.get("MASTER_PORT", DEFAULT_PORT))
    if "MASTER_ADDR" not in found:
        raise _missing("MASTER_ADDR", f"the address of the node with rank 0, for {found['WORLD_SIZE']} ranks")
    rank, world_size, local, local_world_size = (_number(name, found[name]) for name in NAMES)
    _number("MASTER_PORT", found["MASTER_PORT"])
    if not (0 <= rank < world_size and 0 <= local < local_world_size <= world_size):
        values = ", ".join(f"{name}={found[name]}" for name in NAMES)
        raise UserError(f"the launcher's variables contradict each other: {values}; start the ranks with torchrun")
    return found


def _own_names(environ: Mapping[str, str], local_rank: int | None) -> dict[str, str]:
    """Read torchrun's names; complete the local ones if they are missing."""
    if "RANK" not in environ:
        if environ.get("WORLD_SIZE", "1") != "1":
            raise _missing("RANK", f"WORLD_SIZE is {environ['WORLD_SIZE']}")
        return {}
    for name in ("WORLD_SIZE", *(("MASTER_ADDR", "MASTER_PORT") if environ.get("WORLD_SIZE") != "1" else ())):
        if name not in environ:
            raise _missing(name, f"RANK is {environ['RANK']}")
    address = environ.get("MASTER_ADDR", LOOPBACK)
    # Without local names: PyTorchJob starts one rank per pod, and calls its first pod "localhost".
    on_this_node = address in (LOOPBACK, "localhost", "::1") and "KUBERNETES_SERVICE_HOST" not in environ
    local = environ.get("LOCAL_RANK") or (environ["RANK"] if on_this_node else "0")
    if "LOCAL_RANK" not in environ and local_rank is not None:
        local = str(local_rank)
    local_size = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")
    if local_size is None:
        if not on_this_node and local != "0":
            raise _missing("LOCAL_WORLD_SIZE", f"LOCAL_RANK is {local}")
        local_size = environ["WORLD_SIZE"] if on_this_node else "1"
    return dict(zip(NAMES, (environ["RANK"], environ["WORLD_SIZE"], local, local_size), strict=True)) | {
        "MASTER_ADDR": address
    }


def _slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """Read what ``srun`` sets. A batch script has such variables too, but it is one process."""
    in_step = any(name.startswith("SLURM_STEP_") for name in environ) or environ.get("ENVIRONMENT") != "BATCH"
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or environ.get("SLURM_NPROCS") or "1"
    if "SLURM_PROCID" not in environ or not in_step or tasks == "1":
        return {}
    world_size = _number("SLURM_NTASKS", tasks)
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        if name not in environ:
            raise _missing(name, f"SLURM_NTASKS is {tasks}")
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    counts = _tasks_per_node(per_node) if per_node else [world_size]
    node = _number("SLURM_NODEID", environ.get("SLURM_NODEID", "0"))
    if sum(counts) != world_size or node >= len(counts):
        raise UserError(
            f"SLURM_TASKS_PER_NODE is {per_node!r}, which does not fit {world_size} tasks and SLURM_NODEID {node}; "
            "start the ranks with srun, or with torchrun on each node"
        )
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    found = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[node]),
    }
    if "MASTER_ADDR" in environ:
        found["MASTER_ADDR"] = environ["MASTER_ADDR"]
    elif len(counts) == 1:
        found["MASTER_ADDR"] = LOOPBACK
    elif nodes:
        found["MASTER_ADDR"] = first_host(nodes)
    # Jobs and steps that share a node must not meet at one port.
    job, step = (environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if job.isdecimal() and step.isdecimal():
        found["MASTER_PORT"] = environ.get("MASTER_PORT", str(15000 + (int(job) * 10 + int(step)) % 15000))
    return found


def _mpi(environ: Mapping[str, str]) -> dict[str, str]:
    for names in MPI:
        if names[0] in environ and environ.get(names[1], "1") != "1":
            for name in names:
                if name not in environ:
                    raise _missing(name, f"{names[1]} is {environ[names[1]]}")
            found = {name: environ[theirs] for name, theirs in zip(NAMES, names, strict=True)}
            address = environ.get("MASTER_ADDR")
            if address is None and found["WORLD_SIZE"] == found["LOCAL_WORLD_SIZE"]:
                address = LOOPBACK
            return found | ({"MASTER_ADDR": address} if address else {})
    return {}


def _tasks_per_node(text: str) -> list[int]:
    """Expand SLURM's short form: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", entry)
        if not match:
            raise UserError(f"SLURM_TASKS_PER_NODE is {text!r}, where numbers such as 4(x2) belong; start with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """Return the first host of a node list of SLURM: ``gpu-03`` for ``gpu-[03-07,9],login``."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]*)\])?([^,\[]*)", nodes)
    if not match:
        raise UserError(f"SLURM_NODELIST is {nodes!r}, which names no host; set MASTER_ADDR")
    return match[1] + re.split("[-,]", match[2] or "")[0] + match[3]


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name} is {text!r} in the environment, where a number belongs; start the ranks with torchrun")
    return int(text)


def _missing(name: str, context: str) -> UserError:
    return UserError(f"{name} is not set in the environment ({context}); set it, or start the ranks with torchrun")
