"""Functions on several ranks: results, lines, progress, and what is left when ranks fail in every way they can."""

import functools
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver, shared_memory
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import GPUS, LIMIT, needs_gpu, needs_no_gpu, needs_two_gpus
from nbclient import NotebookClient
from rank_server import PYTHONPATH
from shared_launch import SharedLaunches
from transformers import TrainingArguments

from helpers.errors import UserError
from helpers.launch import RankError, device, launcher, processes, report_progress, worker
from helpers.launch import run as run_ranks
from helpers.launch.failure import timeout_error
from helpers.launch.shared_memory import SEGMENTS, find_segments
from helpers.launch.worker import locate
from helpers.libraries.deepspeed import skip_cpu_collectives
from helpers.memory.nvml import open_nvml
from helpers.memory.phases import phase

pytestmark = pytest.mark.slow
run = functools.partial(run_ranks, timeout=LIMIT)
# It also makes ranks get the functions of this file with their code, as in a notebook: importing it takes a second.
shared = SharedLaunches(__name__)
MORE_THAN_GPUS = max(2, GPUS + 1)  # so many ranks use gloo, on every machine: a rank notices when another one dies


@pytest.fixture
def patient(monkeypatch):
    """Let the launcher wait for all that ranks have to say, however busy the machine is."""
    monkeypatch.setattr(processes, "CAUSE_SECONDS", LIMIT)
    monkeypatch.setattr(processes, "LOCATION_SECONDS", LIMIT)


def ranks_alive() -> list[psutil.Process]:
    """Processes forked from this process's rank server, and what they started."""
    return psutil.Process(forkserver._forkserver._forkserver_pid).children(recursive=True)


def listening_ports() -> set[tuple[int, int]]:
    """(pid, port) of what this process and its descendants listen on."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = set()
    for process in family:
        try:
            connections = process.net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        found |= {(process.pid, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def add_up(amount=1):
    x = torch.full((3,), float(amount * (dist.get_rank() + 1)), device=device())
    dist.all_reduce(x)
    return x


class TestResults:
    def test_they_come_by_rank_from_a_process_group_of_that_size(self):
        def fn(word):
            return dist.get_rank(), dist.get_world_size(), os.getpid(), word

        result = run(fn, 3, word="裙")
        assert [(rank, size, word) for rank, size, _, word in result.results] == [(r, 3, "裙") for r in range(3)]
        assert len({pid for *_, pid, _ in result.results} | {os.getpid()}) == 4
        assert 0 < result.seconds and 0 < result.start_seconds
        assert repr(result).startswith(f"<3 ranks over {result.backend}: ready after ") and "\n" not in repr(result)

    def test_collectives_give_tensors_on_the_cpu(self):
        first, second = run(add_up, 2, amount=2).results
        assert first.device.type == "cpu" and torch.equal(first, torch.full((3,), 6.0)) and torch.equal(first, second)

    def test_what_the_function_uses_of_its_notebook_goes_with_it(self):
        table = torch.arange(4)

        class Pair:
            def __init__(self, value):
                self.value = value

        def helper(x):
            return Pair(x + int(table[dist.get_rank()]))

        results = run(lambda: helper(10), 2).results
        assert [type(result) for result in results] == [Pair, Pair] and [r.value for r in results] == [10, 11]

    def test_every_launch_has_fresh_processes_and_this_environment(self, monkeypatch, tmp_path):
        def fn():
            torch.manual_seed(os.getpid())
            return os.environ["COLOUR"], os.getcwd(), hasattr(torch, "was_here"), setattr(torch, "was_here", True)

        monkeypatch.chdir(tmp_path)
        for colour in ("red", "blue"):
            monkeypatch.setenv("COLOUR", colour)
            assert run(fn, 1).results == [(colour, str(tmp_path), False, None)]

    def test_ranks_on_the_cpu_have_one_thread(self, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert run(torch.get_num_threads, 2, on_cpu=True).results == [1, 1]

    def test_a_number_of_threads_that_the_user_chose_is_respected(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
        assert run(torch.get_num_threads, 1).results == [3]

    def test_memory_and_phases_are_measured(self):
        def fn():
            with phase("fill"):
                block = torch.ones(2**25)  # 128 MiB
            return block.numel()

        memory = run(fn, 2).memory
        assert [(p.name, p.end >= p.start) for p in memory.phases] == [("fill", True)] * 2
        assert {p.rank for p in memory.phases} == {0, 1}
        lower = run(lambda: None, 1).memory.ranks[0].resident
        assert all(rank.resident - lower > 100 * 2**20 for rank in memory.ranks)

    @needs_no_gpu
    def test_without_a_gpu_its_numbers_are_not_made_up(self):
        memory = run(lambda: None, 1).memory
        assert (memory.ranks[0].allocated, memory.ranks[0].reserved, memory.ranks[0].nvml) == (None, None, None)
        assert memory.timeline.gpus == [] and re.search("not available|no GPU is visible", memory.timeline.note)


class TestOutput:
    def test_lines_are_whole_and_say_whose_they_are(self, capfd):
        def fn():
            for word in ("one ", "two "):
                print(word, end="", flush=True)
                dist.barrier()
            os.write(1, b"from C\n")
            print("rest", end="")
            print("a warning", file=sys.stderr)

        run(fn, 2)
        out, err = capfd.readouterr()
        lines = [line for line in out.splitlines() if line.startswith("[rank")]
        assert sorted(lines) == sorted(f"[rank {r}] {text}" for r in (0, 1) for text in ("one two from C", "rest"))
        assert sorted(err.splitlines()) == ["[rank 0] a warning", "[rank 1] a warning"]

    def test_a_flood_of_lines_arrives_whole(self, capfd):
        run(lambda: [print("x" * 99) for _ in range(20_000)] and None, 1)
        lines = capfd.readouterr().out.splitlines()
        assert lines.count("[rank 0] " + "x" * 99) == 20_000

    def test_a_warning_from_c_that_the_course_silences_is_left_out(self, capfd):
        warning = "[W] Warning: An unbatched P2P op (send/recv) was called on this ProcessGroup with size 2."
        run(lambda: os.write(2, f"{warning}\nanother line\n".encode()), 1)
        assert capfd.readouterr().err == "[rank 0] another line\n"

    def test_lines_of_a_rank_that_failed_are_shown(self, capfd):
        def fn():
            print("before")
            print("last words", end="")
            raise ValueError

        with pytest.raises(RankError):
            run(fn, 1)
        assert "[rank 0] before\n[rank 0] last words\n" in capfd.readouterr().out

    def test_they_appear_while_the_rank_works(self):
        def fn():
            print("go on")
            report_progress(1, 2)
            dist.barrier()

        shown = []

        class Screen:
            def write(self, text):
                shown.append(text)

            def flush(self):
                pass

        seen_at_progress = []
        screen, sys.stdout = sys.stdout, Screen()
        try:
            # The rank printed before it reported; here both have come while it still runs.
            run(fn, 1, on_progress=lambda progress: seen_at_progress.append(progress.done))
        finally:
            sys.stdout = screen
        assert "[rank 0] go on" in "".join(shown) and seen_at_progress == [1]

    def test_progress_reaches_the_callback(self):
        def fn():
            for step in range(3):
                report_progress(step + 1, 3, loss=0.5)

        seen = []
        run(fn, 2, on_progress=seen.append)
        assert sorted((p.rank, p.done, p.total, p.values["loss"]) for p in seen) == [
            (rank, step, 3, 0.5) for rank in (0, 1) for step in (1, 2, 3)
        ]
        assert all(p.seconds >= 0 for p in seen)

    def test_progress_outside_of_a_rank_is_refused(self):
        with pytest.raises(UserError, match="outside of a rank"):
            report_progress(1, 2)


class TestFailure:
    def test_an_exception_comes_with_the_rank_and_its_own_lines(self):
        def inner(x):
            return x / 0  # the culprit

        def fn():
            if dist.get_rank() == 1:
                inner(1)
            dist.barrier()  # rank 0 would wait here for ever

        with pytest.raises(RankError, match="rank 1 of 2 raised ZeroDivisionError") as error:
            run(fn, 2)
        assert (error.value.rank, error.value.type) == (1, "ZeroDivisionError")
        assert "return x / 0  # the culprit" in str(error.value) and "in inner" in str(error.value)
        assert "launch/worker.py" not in str(error.value) and not ranks_alive()

    def test_the_first_of_several_exceptions_is_shown(self, patient):
        def fn():
            word = torch.ones(1, device=device())
            if dist.get_rank() == 0:
                dist.broadcast(word, src=1)
                word.item()  # on a GPU: wait until it has come
                raise ValueError("second")

            def failed(error, with_time=worker._failed):
                message = with_time(error)
                dist.broadcast(word, src=1)  # rank 0 may fail now, when the time of this failure is known
                return message

            worker._failed = failed
            raise KeyError("first")

        with pytest.raises(RankError) as error:
            run(fn, 2)
        assert (error.value.rank, error.value.type) == (1, "KeyError")

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
            ("os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
            ("os._exit(7)", "ended with status 7 before its function returned"),
        ],
    )
    def test_a_rank_that_dies_is_the_cause_and_not_the_peer_that_notices(self, patient, how, message):
        def fn():
            if dist.get_rank() == 1:
                exec(how, {"os": os, "signal": signal})
            dist.all_reduce(torch.ones(1))

        with pytest.raises(RankError, match=f"rank 1 of {MORE_THAN_GPUS} {message}") as error:
            run(fn, MORE_THAN_GPUS)
        assert error.value.rank == 1 and not ranks_alive()

    def test_leaving_the_function_by_sys_exit_is_a_failure(self):
        with pytest.raises(RankError, match="raised SystemExit"):
            run(lambda: sys.exit(0), 1)

    def test_a_hang_names_the_collective_each_rank_is_in(self, patient):
        def fn():
            match dist.get_rank():
                case 0:
                    dist.all_reduce(torch.ones(1))
                case 1:
                    dist.recv(torch.ones(1), src=2)
                case 2:
                    threading.Event().wait()  # forgot to send

        expected = (
            *("no result after", "rank 0 waits in all_reduce", "dist.all_reduce(torch.ones(1))"),
            *("rank 1 waits in recv", "rank 2 is in no collective", "# forgot to send", "rank 3 had returned"),
        )
        for seconds in (1, 10, LIMIT):  # in the first second a busy machine may not have brought every rank that far
            with pytest.raises(RankError) as error:
                run(fn, max(4, MORE_THAN_GPUS), timeout=seconds)
            text = str(error.value)
            assert error.value.rank is None and f"no result after {seconds:g} s" in text and not ranks_alive()
            missing = [line for line in expected if line not in text]
            if not missing:
                break
        assert not missing, text

    def test_what_ranks_started_ends_with_them(self):
        sleeper = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]

        def fn(fail):
            child = subprocess.Popen(sleeper, stdout=subprocess.PIPE)
            child.stdout.readline()
            if fail:
                raise ValueError(child.pid)
            return child.pid

        assert not psutil.pid_exists(run(fn, 1, fail=False).results[0]) or not ranks_alive()
        with pytest.raises(RankError) as error:
            run(fn, 1, fail=True)
        pid = int(str(error.value).rsplit("ValueError: ", 1)[1])
        assert gone(pid)

    def test_shared_memory_of_ranks_that_are_ended_is_removed(self):
        def fn():
            segment = shared_memory.SharedMemory(create=True, size=4096)
            report_progress(1, 1, name=segment.name)
            dist.barrier()
            if dist.get_rank() == 1:
                raise ValueError
            dist.barrier()

        names = set()
        with pytest.raises(RankError):
            run(fn, 2, on_progress=lambda progress: names.add(progress.values["name"]))
        assert len(names) == 2 and not names & set(os.listdir(SEGMENTS))

    def test_ctrl_c_ends_all_ranks_and_is_passed_on(self):
        def fn():
            report_progress(1, 1)
            if dist.get_rank() == 0:
                dist.barrier()
            threading.Event().wait()

        with pytest.raises(KeyboardInterrupt):
            run(fn, 2, on_progress=lambda progress: signal.raise_signal(signal.SIGINT))
        assert not ranks_alive()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"nprocs": 0}, "nprocs is 0"),
            ({"timeout": 0}, "timeout is 0"),
            ({"lock": threading.Lock()}, "cannot be sent to other processes"),
        ],
    )
    def test_bad_arguments_are_one_line(self, arguments, message):
        with pytest.raises(UserError, match=message) as error:
            run(lambda lock=None: None, **arguments)
        assert "\n" not in str(error.value)

    def test_a_result_that_cannot_be_sent_is_said(self):
        with pytest.raises(RankError, match="the function's result cannot be sent to the notebook"):
            run(lambda: threading.Lock(), 1)

    def test_a_server_that_was_killed_is_started_again(self):
        run(add_up, 1)
        server = forkserver._forkserver._forkserver_pid
        os.kill(server, signal.SIGKILL)
        os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)
        assert run(add_up, 1).results[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("dump", "message"),
    [
        (lambda **_: pickle.dumps({"entries": [{"profiling_name": "nccl:all_reduce"}]}), "nccl:all_reduce"),
        (lambda **_: pickle.dumps({}), None),
        (lambda **_: b"", "unknown"),
    ],
)
def test_what_nccl_did_not_end_is_added_and_never_loses_the_place(monkeypatch, dump, message):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", dump, raising=False)
    error = timeout_error(5, {0: locate(sys._getframe())}, {0: False})
    assert "rank 0 is in no collective" in str(error) and "test_launch.py" in str(error)
    assert (f"pending on its GPU: {message}" in str(error)) if message else ("pending" not in str(error))


def gone(pid: int) -> bool:
    """Whether the process ended, or ends soon (a killed process takes a moment)."""
    try:
        process = psutil.Process(pid)
        return process.status() == psutil.STATUS_ZOMBIE or process.wait(LIMIT) is None or not process.is_running()
    except (psutil.NoSuchProcess, ProcessLookupError):
        return True
    except psutil.TimeoutExpired:
        return False


# Four things that a rank can do in the middle of its work, and one that the reader does; and the error that follows.
FAULTS = {
    "exception": (RankError, "raised ValueError"),
    "kill": (RankError, "killed by SIGKILL"),
    "interrupt": (KeyboardInterrupt, None),
    "out of memory": (RankError, "raised (RuntimeError|OutOfMemoryError)"),
    "hang": (RankError, "no result after"),
}


def strike(fault):
    match fault:
        case "exception":
            raise ValueError("injected")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "interrupt":
            report_progress(1, 1)
        case "out of memory":
            torch.empty(2**60, device=device())
    threading.Event().wait()


def faulty(fault, culprit):
    x = torch.ones(1000, device=device())
    dist.all_reduce(x)
    shared = torch.ones(1000).share_memory_()
    fill = torch.empty(2**30, device=device(), dtype=torch.uint8) if x.is_cuda else None
    if dist.get_rank() == culprit:
        strike(fault)
    dist.all_reduce(x)
    return shared, fill


def inject(fault, nprocs, culprit, hang_seconds):
    """One fault; fails if it is not raised as what it is."""
    error_type, message = FAULTS[fault]
    with pytest.raises(error_type, match=message), pytest.MonkeyPatch.context() as patch:
        if fault == "kill":  # the others fail as well, and a busy machine may report that first
            patch.setattr(processes, "CAUSE_SECONDS", LIMIT)
        run(
            faulty,
            nprocs,
            timeout=hang_seconds if fault == "hang" else LIMIT,
            on_progress=lambda progress: signal.raise_signal(signal.SIGINT),
            fault=fault,
            culprit=culprit,
        )


def segments_of_nobody(names) -> list[Path]:
    """Of these shared-memory segments those that no process has mapped: tests that run beside this one have some."""
    paths = {SEGMENTS / name for name in names if name.startswith(("torch_", "psm_", "nccl-"))}
    groups = set()
    for process in psutil.process_iter():
        try:
            groups.add(os.getpgid(process.pid))
        except ProcessLookupError:
            continue
    return [path for path in paths - find_segments(groups) if path.exists()]


@pytest.mark.parametrize("number", [10, pytest.param(300, marks=pytest.mark.campaign)])
def test_nothing_is_left_after_faults(monkeypatch, tmp_path, number):
    run(add_up, 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ports, files = listening_ports(), set(os.listdir(SEGMENTS))
    descriptors = psutil.Process().num_fds()
    for turn in range(number):
        inject(list(FAULTS)[turn % len(FAULTS)], MORE_THAN_GPUS, turn % 2, hang_seconds=0.5)
    assert not ranks_alive()
    assert listening_ports() <= ports
    assert not segments_of_nobody(set(os.listdir(SEGMENTS)) - files)
    assert not list(tmp_path.iterdir())
    assert psutil.Process().num_fds() <= descriptors
    assert run(add_up, 2).results[0].tolist() == [3, 3, 3]


@pytest.mark.parametrize(("launches", "threads"), [(10, 5), pytest.param(100, 25, marks=pytest.mark.campaign)])
def test_launches_at_the_same_time_never_meet(launches, threads):
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(lambda number: run(add_up, 2, amount=number).results, range(launches)))
    assert [[int(x[0]) for x in result] for result in results] == [[3 * number] * 2 for number in range(launches)]


def start_script(folder, text, **options):
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    environ = os.environ | {"PYTHONPATH": PYTHONPATH}
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=environ, **options)


class TestScript:
    """From a plain script, whose start takes seconds: what it printed is read by several tests."""

    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, tmp_path_factory):
        """Status and output of a script that has three launches."""
        process = start_script(
            tmp_path_factory.mktemp("script"),
            """
            print("the script begins")
            import functools, multiprocessing, os, signal
            from multiprocessing import shared_memory
            import torch.distributed as dist
            from helpers.launch import RankError, run
            size = 2
            def fn():
                return dist.get_rank() * size
            print(run(fn, size).results)
            class Thing:
                def __init__(self, x): self.x = x
            def square(thing): return Thing(thing.x ** 2)
            def in_a_pool():
                with multiprocessing.Pool(2) as pool:
                    return [thing.x for thing in pool.map(square, [Thing(2), Thing(3)])]
            print(run(functools.partial(in_a_pool), 1).results)
            def die():
                print(shared_memory.SharedMemory(create=True, size=4096).name, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                run(die, 1)
            except RankError as error:
                print(error)
            """,
            stderr=subprocess.DEVNULL,
        )
        out, _ = process.communicate(timeout=LIMIT)
        return process.returncode, out

    def test_it_needs_no_guard_and_runs_once(self, finished):
        status, out = finished
        assert status == 0 and out.count("the script begins") == 1 and "[0, 2]" in out

    def test_a_pool_in_a_rank_finds_what_the_main_module_defines(self, finished):
        assert "[[4, 9]]" in finished[1]

    def test_shared_memory_of_a_rank_that_died_goes_with_the_script_at_the_latest(self, finished):
        _, out = finished
        assert "psm_" in out and "killed by SIGKILL" in out
        limit = time.monotonic() + LIMIT  # multiprocessing's tracker ends after the script
        while [name for name in os.listdir(SEGMENTS) if name in out] and time.monotonic() < limit:
            threading.Event().wait(0.05)
        assert not [name for name in os.listdir(SEGMENTS) if name in out]

    def test_ranks_end_when_it_is_interrupted_and_when_it_is_killed(self, tmp_path):
        process = start_script(
            tmp_path,
            """
            import os, threading
            from helpers.launch import run
            def fn():
                print("pid", os.getpid(), flush=True)
                threading.Event().wait()
            try:
                run(fn, 2)
            except KeyboardInterrupt:
                print("interrupted", flush=True)
            run(fn, 2)
            """,
            stderr=subprocess.DEVNULL,
        )
        pids, interrupted = [], False
        for line in process.stdout:
            if " pid " in line:
                pids.append(int(line.split()[-1]))
                if len(pids) == 2:
                    process.send_signal(signal.SIGINT)
                if len(pids) == 4:
                    break
            elif line.strip() == "interrupted":
                interrupted = all(gone(pid) for pid in pids)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=LIMIT)
        assert interrupted and len(pids) == 4 and all(gone(pid) for pid in pids)


class TestNotebook:
    """From a Jupyter kernel: one for all cells, as its first launch takes seconds."""

    @pytest.fixture(scope="class")
    @classmethod
    def cells(cls):
        """The executed cells, and whether the interrupted one left ranks."""
        sources = (
            "import os, threading, torch, torch.distributed as dist\nfrom helpers.launch import run",
            """def fn():
    print("here", dist.get_rank())
    return torch.ones(2) * dist.get_rank()
run(fn).results""",
            """def broken():
    if dist.get_rank():
        raise ValueError("of the cell")
    dist.barrier()
run(broken)""",
            "def fn():\n    print('pid', os.getpid(), flush=True)\n    threading.Event().wait()\nrun(fn)",
            "run(lambda: 7).results",
        )
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        client = NotebookClient(notebook, timeout=LIMIT, kernel_name="python3", allow_errors=True)
        _, _, _, endless, _ = notebook.cells
        with client.setup_kernel():

            def interrupt_when_both_are_up():
                limit = time.monotonic() + LIMIT
                while len(pids_printed(endless)) < 2 and time.monotonic() < limit:
                    threading.Event().wait(0.05)
                os.kill(client.km.provisioner.pid, signal.SIGINT)

            for number, cell in enumerate(notebook.cells):
                if cell is endless:
                    watcher = threading.Thread(target=interrupt_when_both_are_up)
                    watcher.start()
                client.execute_cell(cell, number)
                if cell is endless:
                    watcher.join()
                    ended = all(gone(pid) for pid in pids_printed(cell))
        return notebook.cells, ended

    def test_a_cell_gets_results_lines_and_the_traceback_with_its_own_lines(self, cells):
        (_, good, bad, _, _), _ = cells
        text = "".join(output.text for output in good.outputs if output.output_type == "stream")
        assert "[rank 0] here 0\n" in text and "[rank 1] here 1\n" in text
        assert good.outputs[-1].data["text/plain"] == "[tensor([0., 0.]), tensor([1., 1.])]"
        error = raised_in(bad)
        shown = "\n".join(error.traceback)
        assert error.ename == "RankError" and "rank 1 of 2 raised ValueError" in shown
        assert "Cell In[3], line 3, in broken" in shown and 'raise ValueError("of the cell")' in shown
        assert "launcher.py" not in shown and "processes.py" not in shown

    def test_interrupting_the_kernel_ends_the_ranks_and_the_next_cell_works(self, cells):
        (_, _, _, endless, last), ended = cells
        assert raised_in(endless).ename == "KeyboardInterrupt"
        assert len(pids_printed(endless)) == 2 and ended
        assert last.outputs[-1].data["text/plain"] == "[7, 7]"


def pids_printed(cell) -> list[int]:
    text = "".join(output.get("text", "") for output in cell.outputs)
    return [int(line.split()[-1]) for line in text.splitlines() if " pid " in line]


def raised_in(cell):
    return next(output for output in cell.outputs if output.output_type == "error")


def train_with_ddp():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1).to(device())
    if dist.get_world_size() > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.arange(32.0).reshape(4, 8).chunk(dist.get_world_size())[dist.get_rank()].to(device()) / 32
    for _ in range(20):
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index


class TwoArguments(Exception):
    def __init__(self, first, second):
        super().__init__(first)
        self.second = second


@shared.on(1, launch="ordinary")
def workers_and_an_exception():
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=4, num_workers=2)
    method = multiprocessing.get_start_method()
    return method, [batch.tolist() for batch in loader], TwoArguments("a", 2)


@shared.on(2, launch="ends its group")
def ends_its_group():
    dist.destroy_process_group()
    sys.stdout.close()
    return os.getpid()


class TestAnOrdinaryProcess:
    """What works in a notebook's own process works in a rank."""

    def test_workers_of_a_loader_start_as_usual(self):
        method, batches, _ = workers_and_an_exception.results[0]
        assert batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert method == ("fork" if sys.platform == "linux" else "spawn")

    def test_an_exception_can_be_a_result(self):
        error = workers_and_an_exception.results[0][2]
        assert (error.args, error.second) == (("a",), 2)

    def test_a_rank_may_end_its_group_and_close_its_stdout(self):
        assert len(set(ends_its_group.results)) == 2

    def test_a_result_that_cannot_be_read_is_one_line(self):
        class Stubborn:
            def __reduce__(self):
                return int, ("no number",)

        with pytest.raises(UserError, match=r"result of rank 0 cannot be read here .ValueError.*return numbers"):
            run(Stubborn, 1)

    def test_a_deleted_working_directory_is_one_line(self, monkeypatch):
        def gone():
            raise FileNotFoundError

        monkeypatch.setattr(os, "getcwd", gone)
        with pytest.raises(UserError, match=r"working directory has been deleted; os\.chdir"):
            run(add_up, 1)


@shared.on(2)
def train_with_deepspeed():
    import deepspeed

    skip_cpu_collectives()
    model = torch.nn.Linear(8, 1).to(device())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "Adam", "params": {"lr": 0.001, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    losses = []
    for _ in range(3):
        loss = engine(torch.ones(1, 8, device=device())).pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@shared.on(2)
def ranks_of_the_trainer():
    arguments = TrainingArguments(output_dir="unused", use_cpu=device().type == "cpu", report_to=[])
    return arguments.world_size, arguments.process_index


class TestLibraries:
    """What later chapters run in ranks."""

    @pytest.mark.parametrize(("alone", "together"), [[shared.case(ranks, train_with_ddp) for ranks in (1, 2)]])
    def test_ddp_trains_as_one_process_does(self, alone, together):
        one, two = alone.results[0], together.results[0]
        assert max((a - b).abs().max() for a, b in zip(one, two, strict=True)) <= 1e-6

    def test_deepspeed_trains(self):
        losses = train_with_deepspeed.results[0]
        assert losses[-1] < losses[0]

    def test_the_hf_trainer_finds_the_process_group(self):
        assert ranks_of_the_trainer.results == [(2, 0), (2, 1)]


def test_a_case_that_fails_in_a_shared_launch_is_named_in_every_test():
    def broken():
        raise ValueError("only mine")

    launches = SharedLaunches(__name__)
    for case in [launches.case(1, fn) for fn in (add_up, broken, add_up)]:
        with pytest.raises(RankError, match="only mine"):
            case.results  # noqa: B018


def test_ranks_on_the_cpu_say_so_to_deepspeed_and_what_they_start():
    names = ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
    result = run(lambda: [os.environ[name] for name in names], MORE_THAN_GPUS)
    assert result.results == [["cpu", ""]] * MORE_THAN_GPUS


@needs_gpu
class TestGpu:
    @pytest.mark.gpu_memory
    def test_ranks_use_the_gpu_though_this_process_did(self):
        torch.ones(1, device="cuda")
        result = run(add_up, 1)
        assert result.backend == "nccl" and result.results[0].device.type == "cpu"
        rank = result.memory.ranks[0]
        assert 0 < rank.allocated <= rank.reserved < rank.nvml

    @pytest.mark.gpu_memory
    def test_memory_is_back_after_faults(self):
        run(add_up, 1)
        before = open_nvml().used_bytes(0)
        for fault in [*FAULTS] * 4:
            inject(fault, nprocs=1, culprit=0, hang_seconds=4)
            assert open_nvml().used_bytes(0) - before <= 8 * 2**20, fault

    def test_a_hang_names_what_the_gpu_did_not_end(self):
        def fn():
            ones = torch.ones(1, device="cuda")
            dist.all_reduce(ones)  # kernels are loaded at their first use, which waits for those that run
            torch.cuda._sleep(2**40)
            dist.all_reduce(ones)
            torch.cuda.synchronize()

        with pytest.raises(RankError) as error:
            run(fn, 1, timeout=20)
        assert "torch.cuda.synchronize()" in str(error.value) and "all_reduce" in str(error.value)

    @pytest.mark.parametrize("nprocs", [1, pytest.param(2, marks=needs_two_gpus)])
    def test_a_rank_starts_with_autograd_ready_and_no_tensor(self, capfd, nprocs):
        def fn():
            held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            weight = torch.ones(64, 64, device=device(), requires_grad=True)
            (weight @ weight).backward(torch.ones_like(weight))  # backward begins with cuBLAS
            return held

        assert run(fn, nprocs).results == [(0, 0)] * nprocs
        assert "[rank" not in "".join(capfd.readouterr())

    def test_a_barrier_of_one_rank_warns_of_nothing(self, capfd):
        run(dist.barrier, 1)
        assert "[rank" not in "".join(capfd.readouterr())

    @needs_two_gpus
    def test_ranks_know_their_gpu_before_the_first_collective(self, capfd):
        def fn():
            dist.barrier()
            pair = dist.new_group([0, 1])
            dist.barrier(pair)
            return dist.group.WORLD.bound_device_id.index

        assert run(fn, 2).results == [0, 1]
        assert "[rank" not in "".join(capfd.readouterr())

    def test_more_ranks_than_gpus_run_on_the_cpu(self, capsys):
        def fn():
            from deepspeed.accelerator import get_accelerator

            return str(device()), get_accelerator().device_name()

        launcher._print_once.cache_clear()  # an earlier test may have had more ranks than GPUs
        assert run(fn, MORE_THAN_GPUS).results == [("cpu", "cpu")] * MORE_THAN_GPUS
        assert "running on the CPU over gloo" in capsys.readouterr().out


def test_a_rank_that_ends_while_it_is_looked_at_is_not_waited_for(monkeypatch):
    reader, writer = os.pipe()
    os.close(writer)  # what a process's sentinel is like once it has ended
    looks = iter([True, False])  # alive when it is asked first, and ended right after
    process = SimpleNamespace(sentinel=reader, is_alive=lambda: next(looks, False))
    rank = processes.RankProcess(process, SimpleNamespace(send=lambda word: None), (), disconnected=True)
    waited_for = []

    def wait(sources, seconds):
        assert not waited_for, "waited a second time"
        waited_for.append(sources)
        return sources

    monkeypatch.setattr(processes, "wait", wait)
    monkeypatch.setattr(processes, "EXIT_SECONDS", LIMIT)
    processes.RankProcesses(1, [rank]).exit()
    os.close(reader)
    assert waited_for == [[reader]]


def test_the_context_of_multiprocessing_stays_as_it_was():
    run(add_up, 1)
    assert multiprocessing.get_start_method(allow_none=True) in (None, "fork")
    assert sys.modules["__main__"].__name__ == "__main__"
