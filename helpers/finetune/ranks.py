"""Find this process's place among the ranks that a launcher started, and stop all ranks together."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from helpers.errors import UserError
from helpers.finetune.launchers import LOOPBACK, NAMES, rank_variables

REPORTED, STOP_AT, ARRIVED, ALL_ARRIVED = "error_reported", "stop_at_step", "arrived", "all_arrived"
FAILED = "error_of_a_rank"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # by which people and launchers end a job
POLL_SECONDS = 0.1


def _rendezvous(timeout: float | None) -> tuple[dist.Store, int, int]:
    """Meet the other ranks at a store. torchrun keeps it; under other launchers, rank 0 does and waits for all."""
    limit = default_pg_timeout if timeout is None else timedelta(seconds=timeout)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        who = "not all ranks have" if os.environ["RANK"] == "0" else f"rank 0, at {address}, has not"
        raise UserError(
            f"{who} arrived within {limit.total_seconds():.0f} s; start all {os.environ['WORLD_SIZE']} ranks, and look "
            "into the output of those that have ended"
        ) from error
    store.set_timeout(default_pg_timeout)
    return store, rank, world_size


def _free_port() -> str:
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        return str(free.getsockname()[1])


@dataclass(frozen=True)
class Ranks:
    """Rank and world size, over all nodes and on this node.

    Attributes:
        rank: This process's rank.
        local_rank: Its rank on this node.
        world_size: Number of ranks.
        local_world_size: Number of ranks on this node.
        store: Key-value store shared by all ranks; None for a single process.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    store: dist.Store | None

    @classmethod
    def from_environment(
        cls, *, init_single_rank_group: bool, local_rank: int | None = None, timeout: float | None = None
    ) -> "Ranks":
        """Read rank and world size from the launcher's environment; a process started without one is rank 0 of 1.

        Libraries read torchrun's names: they are set if the launcher has others.

        Args:
            init_single_rank_group: Have torchrun's variables even for a single rank. DeepSpeed needs a process group;
                without DeepSpeed it would cost half a GiB of GPU memory for nothing, and libraries create one as soon
                as they see these variables.
            local_rank: The value of ``--local_rank``; None without it.
            timeout: Seconds to wait for the other ranks; None for torch's own limit.

        Returns:
            This process's place.

        Raises:
            UserError: The launcher's variables are incomplete or contradict each other, or ranks do not arrive.
        """
        variables = rank_variables(os.environ, local_rank)
        if variables.get("WORLD_SIZE", "1") == "1" and not init_single_rank_group:
            for name in NAMES:
                os.environ.pop(name, None)
            return cls(0, 0, 1, 1, None)
        if not variables:  # no launcher, and DeepSpeed would look for one of MPI
            variables = rank_variables({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": _free_port()})
        os.environ.update(variables)
        store, rank, world_size = _rendezvous(timeout)
        local_rank, local_world_size = int(variables["LOCAL_RANK"]), int(variables["LOCAL_WORLD_SIZE"])
        return cls(rank, local_rank, world_size, local_world_size, dist.PrefixStore("finetune", store))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def check_gpus(self) -> None:
        """Raise UserError if this node has GPUs, but fewer than ranks."""
        gpus = torch.cuda.device_count()
        if 0 < gpus < self.local_world_size:
            raise UserError(
                f"{self.local_world_size} ranks were started, but only {gpus} GPU(s) are visible here: start torchrun "
                f"with --nproc_per_node={gpus} (srun: with --gpus-per-node, not --gpus-per-task)"
            )

    def join_group(self) -> torch.device | None:
        """Form the ranks' process group, each rank on a GPU of its own or all on the CPU.

        Returns:
            This rank's device; None for a single process, which needs no group.
        """
        self.check_gpus()
        if self.world_size == 1:
            return None
        if not torch.cuda.is_available():
            dist.init_process_group("gloo")
            return torch.device("cpu")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return device

    def barrier(self) -> None:
        """Wait until every rank is here. Needs no process group, so it works before a device is touched."""
        if self.store is not None:
            if self.store.add(ARRIVED, 1) == self.world_size:
                self.store.set(ALL_ARRIVED, "1")
            self._wait_for(ALL_ARRIVED)

    def share(self, key: str, value: str) -> str:
        """Return rank 0's value on every rank; needs no process group.

        Args:
            key: A name that no other value has.
            value: This rank's own.

        Returns:
            What rank 0 gave.

        Raises:
            UserError: Another rank has met an error meanwhile.
        """
        if self.store is None:
            return value
        if self.is_first:
            self.store.set(key, value)
            return value
        self._wait_for(key)
        return self.store.get(key).decode()

    def _wait_for(self, key: str) -> None:
        """Wait until a rank sets ``key``, but not beyond an error that a rank has reported."""
        assert self.store is not None
        try:
            while not self.store.check([key]):
                if self.store.check([FAILED]):
                    raise UserError(self.store.get(FAILED).decode())
                time.sleep(POLL_SECONDS)
        except dist.DistNetworkError as error:
            raise UserError("the host of rank 0 has left the job; its own output says why") from error

    def reported_error(self) -> str | None:
        """Return the error that a rank has met and reported. None without one, or if the store is gone."""
        with contextlib.suppress(dist.DistError):
            if self.store is not None and self.store.check([FAILED]):
                return self.store.get(FAILED).decode()
        return None

    def print_once(self, text: str) -> None:
        """Print a line on rank 0 only."""
        if self.is_first:
            print(text, flush=True)

    def exit_with_error(self, error: UserError) -> NoReturn:
        """End this rank with exit status 2 and one line on stderr, printed once per host even if every rank meets it.

        torchrun ends all ranks as soon as one exits, so the others wait until rank 0 has printed the line. Ranks that
        wait for another learn of the error, and end as well.
        """
        # The first rank that ends makes torchrun signal the others, which are about to end for the same reason.
        if threading.current_thread() is threading.main_thread():  # the watchdog's thread may not
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        reported = False
        if self.store is not None:
            with contextlib.suppress(dist.DistError):
                self.store.compare_set(FAILED, "", f"rank {self.rank} on {socket.gethostname()}: {error}")
        if self.store is not None and not self.is_first:
            try:
                self.store.wait([REPORTED], timedelta(seconds=20))
                reported = True
            except dist.DistNetworkError:
                reported = True  # without torchrun rank 0 keeps the store, and has ended
            except dist.DistError:
                pass  # rank 0 did not meet this error
        if not reported or self.local_rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        if self.store is not None:
            with contextlib.suppress(dist.DistError):
                self.store.set(REPORTED, "1")
        sys.stdout.flush()
        # Not sys.exit: the interpreter would wait for a collective that other ranks may still be in.
        os._exit(2)
