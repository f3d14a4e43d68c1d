"""Judge a training program that torchrun starts: who trains on which rows, what is sent, and who writes.

The program runs as it is in its file, on ranks of the CPU with the environment that torchrun gives them. Forked ranks
take a fraction of torchrun's time to start.
"""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.machinery import FileFinder, SourceFileLoader
from itertools import chain
from pathlib import Path
from types import CodeType
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from helpers.exercises.answers import NotYet, exercise, on_ranks
from helpers.parallel.traffic import count_traffic

EPOCHS, FEATURES = 3, 5
# Ranks, and rows of the data. A sampler repeats the first rows until all ranks have the same number; two steps each.
CASES = ((2, 31), (3, 46))
CLOSE = 1e-5  # of weights
# Kept until the rank ends: freed after gloo's process group, a DDP model often hangs if its messages are watched.
_MODELS: list[torch.nn.Module] = []


@dataclass
class _Seen:
    """What one rank did.

    Attributes:
        start: The model's weights in its first forward, by name.
        batches: The rows of each micro-batch, as numbers in the data.
        reduced: Bytes that were handed to all-reduces.
        joined: Whether it was still in a process group at its end.
        sizes: The program's ROWS, MICRO_BATCHES and RATE.
    """

    start: dict[str, torch.Tensor] = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)
    reduced: int = 0
    joined: bool = False
    sizes: tuple[int, int, float] = (0, 0, 0.0)


class _FromSource(SourceFileLoader):
    """Import the modules next to the program. An error names its line, as in the program itself.

    Bytecode is left alone: a file that is written twice within a second looks unchanged.
    """

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.get_data(self.path), f"<{Path(self.path).name}>", "exec")


def _leave_for_torchrun(script: str, data: str, checkpoint: str) -> dist.TCPStore | None:
    """In a rank: give this process what torchrun gives it, and no process group. The store must outlive the program."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if dist.get_rank() == 0 else None
    port = [store.port if store else 0]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port[0])}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    sys.argv = [script, data, checkpoint, str(EPOCHS)]
    folder = str(Path(script).parent)
    sys.path.insert(0, folder)
    sys.path_importer_cache[folder] = FileFinder(folder, (_FromSource, [".py"]))
    return store


def _watched(code: str, script: str, folder: str) -> _Seen:
    """In a rank: run the program, and note what it does."""
    rank, seen, own = os.environ["RANK"], _Seen(), Path(folder)
    inputs, _ = torch.load(own / "data.pt")
    numbers = {tuple(row.tolist()): number for number, row in enumerate(inputs)}

    def note(module: torch.nn.Module, arguments: Sequence[Any]) -> None:
        if isinstance(module, DistributedDataParallel):
            _MODELS.append(module)
        if not isinstance(module, torch.nn.Linear) or not torch.is_grad_enabled():
            return
        if not seen.start:
            seen.start = {name: weight.detach().clone() for name, weight in module.state_dict().items()}
        seen.batches.append([numbers.get(tuple(row), -1) for row in arguments[0].tolist()])

    # Each rank gets a path of its own: so the files show which ranks wrote.
    store = _leave_for_torchrun(script, str(own / "data.pt"), str(own / f"checkpoint-{rank}.pt"))
    register_module_forward_pre_hook(note)
    namespace = {"__name__": "__main__", "__file__": script}
    with count_traffic() as traffic, contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "<train_ddp.py>", "exec"), namespace)
    seen.joined = dist.is_initialized()
    seen.reduced = sum(sent.nbytes for sent in traffic.collectives if sent.operation == "all-reduce")
    seen.sizes = namespace["ROWS"], namespace["MICRO_BATCHES"], namespace["RATE"]  # type: ignore[assignment]
    del store
    return seen


def _check_rows(ranks: Sequence[_Seen], rows: int) -> None:
    share = -(-rows // len(ranks))
    for rank, seen in enumerate(ranks):
        order = list(chain(*seen.batches))
        if -1 in order:
            raise NotYet(f"rank {rank} trained on rows that are not in the data")
        if len(order) != EPOCHS * share:
            each = f"{len(order) / EPOCHS:g} rows per epoch"
            raise NotYet(f"with {len(ranks)} ranks, rank {rank} trained on {each}: its share of {rows} is {share}")
        if order[:share] == order[share : 2 * share]:
            raise NotYet(f"rank {rank} sees its rows in the same order in every epoch")
    missing = set(range(rows)).difference(*(list(chain(*seen.batches))[:share] for seen in ranks))
    if missing:
        raise NotYet(f"with {len(ranks)} ranks, no rank trained on {len(missing)} of {rows} rows in the first epoch")


def _check_traffic(ranks: Sequence[_Seen]) -> None:
    for rank, seen in enumerate(ranks):
        steps = len(seen.batches) // seen.sizes[1]
        times = seen.reduced / (4 * (FEATURES + 1) * steps)
        if times == 0:
            raise NotYet(f"rank {rank} never averaged its gradients with the others")
        if times > 1:
            raise NotYet(f"rank {rank} sent its gradients {times:g} times per step: once is enough")


def _alone(ranks: Sequence[_Seen], inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Train one process on the rows of all ranks, from the weights that they started with."""
    model = torch.nn.utils.skip_init(torch.nn.Linear, FEATURES, 1)
    model.load_state_dict(ranks[0].start)
    _, micro_batches, rate = ranks[0].sizes
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for first in range(0, len(ranks[0].batches), micro_batches):
        step = [row for seen in ranks for batch in seen.batches[first : first + micro_batches] for row in batch]
        optimizer.zero_grad()
        mse_loss(model(inputs[step]), targets[step]).backward()
        optimizer.step()
    return model.state_dict()


def _check_checkpoint(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    wrote = sorted(int(path.stem.partition("-")[2]) for path in folder.glob("checkpoint-*.pt"))
    if 0 not in wrote:
        raise NotYet("rank 0 wrote no checkpoint to the path that it was given")
    if len(wrote) > 1:
        raise NotYet(f"rank {wrote[1]} wrote the checkpoint as well: with one path they would spoil each other's file")
    found = torch.load(folder / "checkpoint-0.pt")
    if found.keys() != expected.keys():
        name = next(iter(found.keys() - expected.keys()), "nothing")
        raise NotYet(f"the checkpoint has {name!r} in it, which a model without DDP does not know")
    off = max(float((found[name] - weight).abs().max()) for name, weight in expected.items())
    if not off < CLOSE:
        raise NotYet(f"the weights are off by {off:.2g} from those of one process with the rows of all ranks")


@exercise
def program(path: str | Path) -> None:
    """Judge a program that trains with DDP, as ``torchrun program.py DATA CHECKPOINT EPOCHS`` starts it.

    Args:
        path: Its file. DATA holds inputs [rows, features] and targets [rows, 1]. The program has ROWS (of a
            micro-batch), MICRO_BATCHES (of a step) and RATE, trains a linear layer by SGD and the mean squared error,
            and writes its ``state_dict`` to CHECKPOINT.
    """
    script = Path(path)
    if not script.is_file():
        raise NotYet(f"there is no file {script}: run the cell above, which writes it")
    code = script.read_text(encoding="utf-8")
    try:
        compile(code, script.name, "exec")
    except SyntaxError as error:
        raise NotYet(f"line {error.lineno} of {script.name} is not Python: {error.msg}") from None
    for n, rows in CASES:
        generator = torch.Generator().manual_seed(rows)
        inputs, noise = torch.randn(rows, FEATURES, generator=generator), torch.randn(rows, 1, generator=generator)
        targets = inputs.sum(dim=1, keepdim=True) + noise
        with tempfile.TemporaryDirectory(prefix="program-") as folder:
            torch.save((inputs, targets), Path(folder) / "data.pt")
            ranks = on_ranks(_watched, n, code=code, script=str(script.resolve()), folder=folder)
            _check_rows(ranks, rows)
            _check_traffic(ranks)
            _check_checkpoint(Path(folder), _alone(ranks, inputs, targets))
        for rank, seen in enumerate(ranks):
            if seen.joined:
                raise NotYet(f"the checkpoint is right, but rank {rank} ends without leaving the process group")
