"""Judge what chapter 10 does with records in a file: read, write back, and read ahead with two buffers or more."""

import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from helpers.exercises.answers import Function, alone, exercise
from helpers.exercises.inputs import random

LENGTHS = (5, 2000, 1024, 3001)  # of records, in elements; a page has 1024
NO_RECORD = "record {} is read, and the {} records are numbered from 0"
LONG, SHORT = 2.0, 0.05  # seconds to wait for what should happen, and for what should not


def _records(fetch: Function, store: Function, make: Function) -> str | None:
    with TemporaryDirectory() as folder:
        make.__init__.__globals__["NVME"] = Path(folder)  # where the notebook's class puts its files
        disk = make("records", list(LENGTHS))
        values = [random(i, n) for i, n in enumerate(LENGTHS)]
        for i, value in enumerate(values):
            disk.buffers[i % 2].view(torch.float32)[: len(value)].copy_(value)
            before = dict(disk.moved)
            store(disk, i)
            if fault := _fault_of_bytes(disk, "written", i, before):
                return fault
        for i in (2, 0, 3, 1, 3, 0):
            for buffer in disk.buffers:
                buffer.fill_(77)
            before, found = dict(disk.moved), fetch(disk, i)
            if fault := _fault_of_bytes(disk, "read", i, before):
                return fault
            if fault := _fault_of_fetch(disk, i, found, values[i]):
                return fault
            found.add_(1)  # a step changes the record in place
            values[i] = values[i] + 1
            store(disk, i)
    return None


def _fault_of_bytes(disk: Any, way: str, i: int, before: dict[str, int]) -> str | None:
    size = disk.places[i + 1] - disk.places[i]
    if disk.moved == before | {way: before[way] + size}:
        return None
    grown = {name: disk.moved[name] - before[name] for name in before}
    return f"record {i} takes {size} bytes of the file, its pages; disk.moved has grown by {grown}"


def _fault_of_fetch(disk: Any, i: int, found: Any, value: torch.Tensor) -> str | None:
    if not isinstance(found, torch.Tensor) or found.dtype != torch.float32 or found.shape != value.shape:
        shape = list(getattr(found, "shape", []))
        return f"fetch(disk, {i}) should return the record's {len(value)} numbers in fp32, not the shape {shape}"
    if found.data_ptr() != disk.buffers[i % 2].data_ptr():
        return "fetch should return a view of the buffer: only what is changed there will be stored"
    if not torch.equal(found, value):
        return f"fetch(disk, {i}) does not return the numbers that were last stored as record {i}"
    return None


@exercise
def fetch_and_store(fetch: Function, store: Function, make: Function) -> None:
    """Judge how a record is read from its place in a file, and written back.

    Args:
        fetch: Gets a disk and a record's number, and returns its numbers.
        store: Gets the same.
        make: The class of disks.
    """
    alone(_records, fetch=fetch, store=store, make=make)


class _Drive:
    """A drive that looks at what happens at the same time, and two buffers."""

    def __init__(self, count: int) -> None:
        self.count, self.faults, self.updated = count, list[str](), list[int]()
        self.reading, self.written = ([threading.Event() for _ in range(count)] for _ in range(2))
        self.owner: list[int | None] = [None, None]
        self.disk, self.step = object(), 7
        self.lock = threading.Lock()

    def fetch(self, disk: object, i: int) -> torch.Tensor:
        """Read record i into its buffer."""
        self._expect("disk", disk, self.disk)
        if i >= self.count:  # an error in a thread that nobody asks for its result would not be seen
            self.faults.append(NO_RECORD.format(i, self.count))
            return torch.tensor([i])
        with self.lock:
            if (other := self.owner[i % 2]) is not None:
                self.faults.append(f"record {i} is read into the buffer of record {other}, which is not written yet")
            self.owner[i % 2] = i
        self.reading[i].set()
        return torch.tensor([i])

    def update(self, parameter: int, states: torch.Tensor, step: int) -> None:
        """Compute with record i: the next one should be on its way, and this one not be written meanwhile."""
        i = int(states)
        self._expect("step", step, self.step)
        if i != parameter:
            self.faults.append(f"parameter {parameter} is updated with the states of record {i}")
        if i + 1 < self.count and not self.reading[i + 1].wait(LONG / 2):
            self.faults.append(f"while record {i} is updated, no thread reads record {i + 1}")
        if self.written[i].wait(SHORT):
            self.faults.append(f"record {i} is written before its update has ended")
        self.updated.append(i)

    def store(self, disk: object, i: int) -> None:
        """Write record i back from its buffer."""
        self._expect("disk", disk, self.disk)
        if i not in self.updated:
            self.faults.append(f"record {i} is written before its update has ended")
        if self.reading[min(i + 2, self.count - 1)].wait(SHORT) and i + 2 < self.count:
            self.faults.append(f"record {i + 2} is read into the buffer of record {i} while that is being written")
        self.owner[i % 2] = None
        self.written[i].set()

    def _expect(self, name: str, given: object, own: object) -> None:
        if given is not own:
            self.faults.append(f"a {name} is used that is not the one that the function was given")


def _ahead(answer: Function, counts: tuple[int, ...]) -> str | None:
    for count in counts:
        drive, log = _Drive(count), list[Any]()
        answer.__globals__.update(fetch=drive.fetch, update=drive.update, store=drive.store)
        answer(range(count), drive.disk, drive.step, log)
        late = [i for i in range(count) if not drive.written[i].is_set()]
        if drive.faults:
            return drive.faults[0]
        if late:
            return f"when the step returns, the records {late} have not been written back"
        if len(log) != 3 * count:
            return f"{count} records are read, updated and written, but the log has {len(log)} entries"
    return None


@exercise
def reading_ahead(answer: Function) -> None:
    """Judge a step that reads and writes while it updates, with two buffers.

    Args:
        answer: Takes parameters, a disk, the step's number and a log. Calls fetch, update and store.
    """
    alone(_ahead, answer=answer, counts=(1, 2, 5))


class _Reader:
    """Reads that last until somebody works, or that are complete at once."""

    def __init__(self, n: int, count: int, lasting: bool) -> None:
        self.n, self.count, self.lasting = n, count, lasting
        self.faults, self.done = list[str](), list[tuple[int, int]]()
        self.begun, self.released = ([threading.Event() for _ in range(count)] for _ in range(2))
        self.released[0].set()
        self.thread = threading.current_thread()

    def read(self, i: int) -> int:
        """Return what work expects for record i."""
        if i >= self.count:
            self._fail(NO_RECORD.format(i, self.count))
            return 0
        self.begun[i].set()
        if self.lasting and not self.released[i].wait(LONG):
            self._fail(f"the read of record {i} lasts, and meanwhile no work is done on record {i - 1}")
        return 7 * i + 1

    def work(self, i: int, value: int) -> None:
        """Look at the reads that are under way."""
        self.done.append((i, value))
        if threading.current_thread() is not self.thread:
            self._fail("work is called in another thread than the function itself")
        for coming in range(i + 1, min(i + self.n + 1, self.count)):
            if not self.faults and not self.begun[coming].wait(LONG / 2):
                self._fail(f"while record {i} is worked on, the read of record {coming} has not begun")
        later = i + self.n + 1
        if not self.faults and not self.lasting and later < self.count and self.begun[later].wait(SHORT):
            self._fail(f"while record {i} is worked on, record {later} is read already, for which there is no buffer")
        if i + 1 < self.count:
            self.released[i + 1].set()

    def _fail(self, fault: str) -> None:
        self.faults.append(fault)
        for event in self.released:
            event.set()


def _ahead_by(answer: Function, cases: tuple[tuple[int, int], ...]) -> str | None:
    for n, count in cases:
        for lasting in (True, False):
            reader = _Reader(n, count, lasting)
            answer(n, count, reader.read, reader.work)
            if reader.faults:
                return f"with n = {n}, {reader.faults[0]}"
            if reader.done != [(i, 7 * i + 1) for i in range(count)]:
                return f"with n = {n}, work should be called once per record, in order, with what read returned"
    return None


@exercise
def ahead_by(answer: Function) -> None:
    """Judge the reading of n records ahead in threads.

    Args:
        answer: Takes n, the number of records, and two functions: read, and work.
    """
    alone(_ahead_by, answer=answer, cases=((1, 4), (2, 5), (3, 6), (4, 3)))
