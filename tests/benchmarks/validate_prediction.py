"""Measure the drawn configurations (prediction_cases.py) on GPUs, and compare their memory with its prediction.

    python tests/benchmarks/validate_prediction.py [--resume] [--seconds 540] [--only TEXT]
    python tests/benchmarks/validate_prediction.py --again     predict the recorded runs once more
    python tests/benchmarks/validate_prediction.py --trace     simulate the allocator for all cases; takes ten minutes
    python tests/benchmarks/validate_prediction.py --dry       tiny models on the CPU: does every case run?

Each case trains a few steps in fresh processes, forked from a server that has imported the libraries. Cases of one GPU
run side by side, one on each, for at most half of the time; held-out cases come first, compiled ones last among them.
The results file is written after every case; ``--resume`` measures those it lacks. A case that has begun may last a
minute longer.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle

sys.path.insert(0, str(Path(__file__).parent))
import prediction as benchmark
from finetune_6b import commit
from prediction_cases import Case, cases

from helpers.errors import UserError, exit_with_one_line
from helpers.hardware import describe_machine
from helpers.launch import RankError, environment, run
from helpers.launch.server import start_server
from helpers.memory.predict import Configuration, ModelShape
from helpers.memory.predict.validation import TRACES, item_errors
from helpers.memory.units import GIB

RESULTS = benchmark.RESULTS.with_name("prediction_validation.json")
TIMEOUT_SECONDS = 100
TINY = ModelShape(hidden=64, layers=2, heads=4, kv_groups=2, head_dim=16, intermediate=96, vocab=512)
# Ranks import this folder by name only where it is on their path.
cloudpickle.register_pickle_by_value(benchmark)


def tiny(configuration: Configuration) -> Configuration:
    """Shrink a configuration until a CPU trains it in a second."""
    c = configuration
    rows, tokens = min(2, c.micro_batch_size), min(32, c.sequence_length)
    return dataclasses.replace(c, shape=TINY, micro_batch_size=rows, sequence_length=tokens, compiled=False)


def measure(case: Case) -> dict[str, Any]:
    """Run a case, and once more with limited memory if it is one of those; failures are in the entry."""
    try:
        entry = _measure_once(case.configuration, None)
    except Exception as error:  # one case must not cost the others their time on the GPUs
        entry = {"failed": f"{type(error).__name__}: {error}"}
    entry |= {"held_out": case.held_out}
    reserved = [rank["reserved"] for rank in entry.get("measured", []) if rank["reserved"] is not None]
    if case.capacity is not None and reserved:
        limit = int(case.capacity * max(reserved))
        failed = _measure_once(case.configuration, limit).get("failed", "")
        entry["limited"] = {
            "capacity": case.capacity,
            "limit": limit,
            "fitted": not failed,
            "error": failed[-300:],
        }
    return entry


def _measure_once(configuration: Configuration, limit: int | None) -> dict[str, Any]:
    try:
        with benchmark.allocator(configuration.expandable_segments):
            found = run(
                benchmark.train,
                configuration.strategy.world_size,
                configuration=configuration,
                limit=limit,
                timeout=TIMEOUT_SECONDS,
            )
    except RankError as error:
        return {"failed": str(error)}
    measured = [
        {
            "allocated": rank.allocated,
            "reserved": rank.reserved,
            "nvml": rank.nvml,
            "parameters": result["parameter_bytes"],
            "optimizer states": result["optimizer_bytes"],
        }
        for rank, result in zip(found.memory.ranks, found.results, strict=True)
    ]
    return benchmark.record(configuration, measured, found.results[0]) | {
        "seconds": found.start_seconds + found.seconds
    }


def again(entry: dict[str, Any], configuration: Configuration) -> dict[str, Any]:
    """Return an entry with the same measurements and the current prediction."""
    if "failed" in entry:
        return entry
    outcome = {key: entry[key] for key in ("losses", "expandable")}
    outcome["trained_parameters"] = configuration.trainable_parameters
    made = benchmark.record(configuration, entry["measured"], outcome)
    # What the formulas said before anybody saw the measurement stays on record.
    first = entry.get("first_error_percent", entry.get("error_percent"))
    return entry | made | {"first_error_percent": first}


def write_traces(chosen: dict[str, Case], path: Path) -> None:
    """Simulate the allocator for every case that can be traced; that needs no measurement and no GPU."""
    from helpers.memory.predict.traced import trace  # imports transformers, which takes seconds

    traces = {}
    for name, case in chosen.items():
        with contextlib.suppress(UserError):  # it cannot be traced
            traces[name] = dataclasses.asdict(trace(case.configuration))
            print(f"{traces[name]['reserved'] / GIB:6.2f} GiB {name}", flush=True)
    benchmark.write(path, {"configurations": traces})


def summary(entries: dict[str, dict[str, Any]]) -> list[str]:
    """Summarise the errors against NVML, of all cases and of those held out, and the verdicts near the capacity."""
    lines = []
    good = {name: e for name, e in entries.items() if e.get("error_percent") is not None}
    for label, chosen in (("all", good), ("held out", {n: e for n, e in good.items() if e["held_out"]})):
        errors = [e["error_percent"] for e in chosen.values()]
        if errors:
            lines.append(
                f"{label}: {len(errors)} cases, median error {statistics.median(map(abs, errors)):.2f} %, "
                f"from {min(errors):+.2f} to {max(errors):+.2f} %"
            )
    limited = [e for e in good.values() if "limited" in e]
    right = sum((e["predicted_reserved"] <= e["limited"]["limit"]) == e["limited"]["fitted"] for e in limited)
    lines.append(f"near the capacity: {right} of {len(limited)} verdicts right")
    for name, entry in sorted(good.items(), key=lambda item: -abs(item[1]["error_percent"]))[:10]:
        items = item_errors(entry)
        worst = max(items, key=lambda item: abs(items[item]))
        lines.append(f"  {entry['error_percent']:+6.2f} % {name}: {worst} {items[worst] / GIB:+.2f} GiB")
    lines += [f"  failed: {n}: {e['failed'].strip().splitlines()[-1]}" for n, e in entries.items() if "failed" in e]
    return lines


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Read the entries of a results file; none if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8"))["configurations"] if path.is_file() else {}


def work_through(chosen: dict[str, Case], path: Path, end: float, commit: str | None) -> None:
    """Measure cases until ``end`` (time.monotonic) and write the file after each.

    Each entry names the ``commit`` that measured it, because a file may hold runs of several.
    """
    entries = read(path)
    machine = dataclasses.asdict(describe_machine())
    for name, case in chosen.items():
        if name in measured_in(entries):
            continue
        start = time.monotonic()
        if start > end:
            return
        entries[name] = measure(case) | {"commit": commit}
        benchmark.write(path, {"machine": machine, "configurations": entries})
        error = entries[name].get("error_percent")
        result = "failed" if "failed" in entries[name] else "" if error is None else f"{error:+.2f} %"
        print(f"{result:>9} {time.monotonic() - start:4.0f} s {name}", flush=True)


def measured_in(entries: dict[str, dict[str, Any]]) -> set[str]:
    """Return the names of the entries that did not fail."""
    return {name for name, entry in entries.items() if "failed" not in entry}


def side_by_side(chosen: dict[str, Case], gpus: int, path: Path, seconds: float, commit: str | None) -> None:
    """Let one process per GPU work through a share of the cases, each in a file of its own; then join the files.

    A GPU for which no case is left gets no process.
    """
    start_server()  # this process's own, which imports the libraries meanwhile
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    parts = parts_of(path, gpus)
    names = list(chosen)
    known = [] if commit is None else ["--commit", commit]
    jobs = [
        subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--results",
                part,
                "--seconds",
                str(seconds),
                "--resume",
                *known,
                "--cases",
                *names[gpu::gpus],
            ],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": visible[gpu]},
        )
        for gpu, part in enumerate(parts[: len(names)])
    ]
    try:
        statuses = [job.wait() for job in jobs]
    except BaseException:
        for job in jobs:
            job.terminate()
        raise
    join(path, parts)
    if any(statuses):
        print(f"a process that measures one GPU ended with status {max(statuses, key=abs)}; see above", flush=True)


def held_out_first(drawn: dict[str, Case]) -> dict[str, Case]:
    """Sort the cases so that the time, if it is short, suffices for those that count; compiling takes longest."""
    return dict(sorted(drawn.items(), key=lambda item: (not item[1].held_out, item[1].configuration.compiled)))


def parts_of(path: Path, gpus: int) -> list[Path]:
    """Return the files that the processes of :func:`side_by_side` write."""
    return [path.with_suffix(f".gpu{gpu}.json") for gpu in range(gpus)]


def join(path: Path, parts: list[Path]) -> None:
    """Move the entries of ``parts`` into ``path``."""
    entries, machine = read(path), dataclasses.asdict(describe_machine())
    for part in parts:
        entries |= read(part)
    benchmark.write(path, {"machine": machine, "configurations": entries})
    for part in parts:
        part.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--cases", nargs="+", help="exactly these cases, in this process")
    parser.add_argument("--resume", action="store_true", help="keep the cases in the results file")
    parser.add_argument("--seconds", type=float, default=540, help="start no case after so many (540)")
    parser.add_argument("--again", action="store_true", help="predict the recorded runs again, measure nothing")
    parser.add_argument("--trace", action="store_true", help="simulate the allocator for all cases, measure nothing")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--commit", default=commit(), help="of this code; needed outside of a git checkout only")
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    end = start + arguments.seconds
    chosen = {n: case for n, case in held_out_first(cases()).items() if arguments.only in n}
    if arguments.trace:
        write_traces(chosen, arguments.results.with_name(TRACES))
        return
    if arguments.again:
        content = json.loads(arguments.results.read_text(encoding="utf-8"))
        content["configurations"] = {
            n: again(e, cases()[n].configuration) for n, e in content["configurations"].items()
        }
        benchmark.write(arguments.results, content)
        print("\n".join(summary(content["configurations"])))
        return
    if arguments.dry:
        chosen = {n: dataclasses.replace(case, configuration=tiny(case.configuration)) for n, case in chosen.items()}
    elif not describe_machine().gpus:
        raise UserError("no GPU here; this measures GPU memory (--dry trains tiny models on the CPU)")
    gpus = len(describe_machine().gpus)
    for path in () if arguments.resume else (arguments.results, *parts_of(arguments.results, gpus)):
        path.unlink(missing_ok=True)
    if arguments.cases or arguments.dry:
        wanted = {n: case for n, case in chosen.items() if not arguments.cases or n in arguments.cases}
        if not arguments.dry:
            run(benchmark.warm_up, 1, timeout=TIMEOUT_SECONDS)
        work_through(wanted, arguments.results, end, arguments.commit)
        return
    if any(part.is_file() for part in parts_of(arguments.results, gpus)):  # of a run that was interrupted
        join(arguments.results, parts_of(arguments.results, gpus))
    before = read(arguments.results)
    # Cases that failed come last: they may fail again.
    missing = dict(
        sorted(((n, c) for n, c in chosen.items() if n not in measured_in(before)), key=lambda item: item[0] in before)
    )
    alone = {n: case for n, case in missing.items() if case.configuration.strategy.world_size == 1}
    together = {n: case for n, case in missing.items() if case.configuration.strategy.world_size == 2 and gpus > 1}
    # Offloaded optimizers step on the host, where a shell's single thread would take most of the time.
    with environment({"OMP_NUM_THREADS": str(max(1, describe_machine().cpu_cores // gpus))}):
        if alone:
            side_by_side(alone, gpus, arguments.results, arguments.seconds / 2, arguments.commit)
        work_through(together, arguments.results, end, arguments.commit)
    entries = read(arguments.results)
    print("\n".join(summary(entries)))
    done = len(measured_in(entries)) - len(measured_in(before))
    left = len(set(chosen) - measured_in(entries))
    print(f"{done} cases measured in {time.monotonic() - start:.0f} s", end="")
    print(f"; {left} are left, the same command with --resume measures them" if left else "")


if __name__ == "__main__":
    exit_with_one_line(main)
