"""Inject faults into the fine-tune, by seed: kills, damaged checkpoints, full disks, bad values, bad rows, changes.

    python tests/benchmarks/faults.py [--faults 1000] [--first 0] [--minutes 60] [--workers 2]
        [--only KIND] [--results FILE]

Every fault must end in the result of an undisturbed run, bit for bit, or in one clear line and a status that is not 0.
A fault is repeated with ``--first SEED --faults 1``.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS), str(TESTS / "benchmarks")]

from fault_bench import HUNG, STRATEGIES, Bench  # noqa: E402
from fault_kinds import (  # noqa: E402
    FREE_CHANGES,
    GOOD,
    REFUSED_CHANGES,
    SAVE_STEPS,
    STEPS,
    break_rows,
    checkpoints_fault,
    damage,
    draw_kill,
    mutate_configuration,
    run_file_status,
    verdict_of_result,
)
from jobs_6b import commit  # noqa: E402

from helpers.files import atomic_write  # noqa: E402
from helpers.hardware import describe_machine  # noqa: E402

RESULTS = ROOT / "notebooks" / "results" / "faults.json"
COMPILE = "from deepspeed.accelerator import get_accelerator as a; a().create_op_builder('CPUAdamBuilder').load()"
NOT_RESUMED = ("mixed checkpoint", "lost checkpoint")
RUN_FILE_BYTES = 16_384  # run.json is smaller
# Twenty faults in a row: 1,000 have 200 kills.
KINDS = ("kill", "damage", "config", "rows", "config", "kill", "damage", "config", "damage", "config")
KINDS += ("kill", "damage", "config", "rows", "config", "kill", "damage", "config", "disk", "change")


# --- kinds of fault: each returns what was done, the verdict, and what the run printed ----------------------------

Outcome = tuple[str, str, str]


def kill(rng: random.Random, bench: Bench, strategy: str, folder: Path) -> Outcome:
    """Kill a rank, look at the checkpoints, resume, and compare with an undisturbed run."""
    plan = draw_kill(rng, STRATEGIES[strategy][0] or 1)
    run = bench.launch(strategy, folder, kill=plan)
    what = "SIG{signal} to rank {rank} at {during} {step} + {delay} s".format(**plan)
    soft = plan["signal"] in ("TERM", "INT", "HUP")
    if run.status == 0:
        what += " (after the end)"
    verdict = run.fault()
    if run.status == HUNG:
        verdict = "hung"
    elif not verdict and soft and run.status not in (0, 130):
        verdict = "signal not handled"
    output = folder / "output"
    # A kill while saving must leave what was finished before.
    least = (plan["step"] - 1) // SAVE_STEPS * SAVE_STEPS
    again = checkpoints_fault(output, least)
    if again:
        verdict = again
    else:
        resumed = bench.launch(strategy, folder, "--resume")
        finished = "nothing" in resumed.stdout and run.status == 0
        again = "identical" if finished else verdict_of_result(resumed, output, bench.reference(strategy))
        if again != "identical":
            return what, f"resume: {again}", resumed.stderr + resumed.stdout[-500:]
    return what, verdict or again, run.stderr


def damaged(rng: random.Random, bench: Bench, strategy: str, folder: Path) -> Outcome:
    """Damage the newest of three checkpoints, and resume."""
    reference = bench.reference(strategy)
    output = folder / "output"
    last = f"checkpoint-{STEPS}"
    shutil.copytree(reference, output, ignore=lambda _, names: [name for name in names if name == last])
    what = damage(rng, output / f"checkpoint-{STEPS - SAVE_STEPS}")
    run = bench.launch(strategy, folder, "--resume")
    return what, verdict_of_result(run, output, reference), run.stderr


def disk(rng: random.Random, bench: Bench, strategy: str, folder: Path) -> Outcome:
    """Let no file grow beyond a size, as on a full disk; then resume with space, if there is a checkpoint."""
    size = int(2 ** rng.uniform(9, 17))
    run = bench.launch(strategy, folder, file_bytes=size)
    what, output = f"files end at {size:,} bytes", folder / "output"
    if run.status == 0:
        return what, verdict_of_result(run, output, bench.reference(strategy)), run.stderr
    verdict = run.verdict_of_refusal()
    if verdict == "refused":
        verdict = checkpoints_fault(output, 0) or verdict
    # The file that says so may itself be too long.
    if verdict == "refused" and run_file_status(output) not in (None, "failed") and size > RUN_FILE_BYTES:
        verdict = f"run.json says {run_file_status(output)}"
    return what, verdict, run.stderr


def configuration(rng: random.Random, bench: Bench, strategy: str, folder: Path) -> Outcome:
    """Give a key a value that was drawn, or misspell it."""
    changes, valid = mutate_configuration(rng)
    run = bench.launch(strategy, folder, changes=changes)
    if run.status == 0:
        verdict = run.fault() or valid or verdict_of_result(run, folder / "output", bench.reference(strategy))
        if verdict not in GOOD and "ignored" in run.stdout:
            verdict = "valid"
    else:
        verdict = run.verdict_of_refusal()
    return repr(changes), verdict, run.stderr


def rows(rng: random.Random, bench: Bench, strategy: str, folder: Path) -> Outcome:
    """Replace a row by something else."""
    what = break_rows(rng, bench.data, folder / "data")
    run = bench.launch(strategy, folder, data=folder / "data")
    return what, run.verdict_of_refusal(), run.stderr


def change(rng: random.Random, bench: Bench, strategy: str, folder: Path) -> Outcome:
    """Resume with another setting: refused if the states do not fit it, or one that has no effect."""
    free = rng.random() < 0.3
    changes = rng.choice(FREE_CHANGES if free else REFUSED_CHANGES)
    output, last = folder / "output", f"checkpoint-{STEPS}"
    reference = bench.reference(strategy)
    shutil.copytree(reference, output, ignore=lambda _, names: [name for name in names if name == last])
    run = bench.launch(strategy, folder, "--resume", changes=changes)
    verdict = verdict_of_result(run, output, reference) if free else run.verdict_of_refusal()
    return repr(changes), verdict, run.stderr


FAULTS = {"kill": kill, "damage": damaged, "disk": disk, "config": configuration, "rows": rows, "change": change}


def inject(seed: int, bench: Bench, kind: str | None = None, strategy: str | None = None) -> dict[str, Any]:
    """Inject one fault.

    Args:
        seed: Decides everything that is drawn.
        bench: Where the fine-tune runs.
        kind: Of ``FAULTS``; None for the seed's.
        strategy: Of ``STRATEGIES``; None draws one.

    Returns:
        Seed, kind, strategy, what was done, the verdict, seconds; what was printed if the verdict is bad.
    """
    rng = random.Random(seed)
    kind = kind or KINDS[seed % len(KINDS)]
    # Configuration and data are checked by every rank in the same way.
    often_one = ("one process",) * 9 + ("DDP",)
    drawn = rng.choice(often_one if kind in ("config", "rows") else list(STRATEGIES))
    strategy = strategy or drawn
    start = time.perf_counter()
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    what, verdict, printed = FAULTS[kind](rng, bench, strategy, folder)
    shutil.rmtree(folder, ignore_errors=True)
    record = {"seed": seed, "kind": kind, "strategy": strategy, "what": what, "verdict": verdict}
    if verdict not in GOOD:
        record["printed"] = last_line(printed, bench.folder)
    return record | {"seconds": round(time.perf_counter() - start, 1)}


def last_line(printed: str, folder: Path) -> str:
    """The last line of what a run printed, without the places of this machine."""
    for place in (folder, ROOT, Path(sys.prefix)):
        printed = printed.replace(str(place), "…")
    return (printed.strip().splitlines() or [""])[-1][:300]


def main() -> None:
    """Run the campaign and write its table; the status is 1 if any fault was not survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first fault")
    parser.add_argument("--minutes", type=float, default=120, help="no further fault is injected after this time")
    parser.add_argument(
        "--workers", type=int, default=max(2, (os.cpu_count() or 1) // 2), help="faults at the same time"
    )
    parser.add_argument("--only", choices=FAULTS, help="of the seeds, those of this kind")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=commit(), help="of this code; needed outside of a git checkout only")
    arguments = parser.parse_args()
    start = time.perf_counter()
    # Compiled once, before a run's time limit counts.
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))

        def in_time(seed: int) -> dict[str, Any] | None:
            return inject(seed, bench) if time.perf_counter() - start < 60 * arguments.minutes else None

        records = []
        with ThreadPoolExecutor(arguments.workers) as pool:
            drawn = range(arguments.first, arguments.first + arguments.faults)
            seeds = [seed for seed in drawn if arguments.only in (None, KINDS[seed % len(KINDS)])]
            for ended in as_completed([pool.submit(in_time, seed) for seed in seeds]):
                if (record := ended.result()) is None:
                    continue
                records.append(record)
                if record["verdict"] not in GOOD:
                    print(json.dumps(record, ensure_ascii=False), flush=True)
                if len(records) % 20 == 0:
                    print(f"{len(records):,} of {len(seeds):,}, {time.perf_counter() - start:.0f} s", flush=True)
        records.sort(key=lambda record: record["seed"])
        bench.close()
    table = Counter((record["kind"], record["verdict"]) for record in records)
    kills = [record for record in records if record["kind"] == "kill" and "(after the end)" not in record["what"]]
    resumed = [record for record in kills if record["verdict"] not in NOT_RESUMED and "resume" not in record["verdict"]]
    bad = [record for record in records if record["verdict"] not in GOOD]
    content = {
        "machine": dataclasses.asdict(describe_machine()),
        "commit": arguments.commit,
        "faults": len(records),
        "first_seed": arguments.first,
        "kills": len(kills),
        "kills_resumed_bit_identically": len(resumed),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "table": [{"kind": kind, "verdict": verdict, "faults": n} for (kind, verdict), n in sorted(table.items())],
        "not_survived": bad,
    }
    with atomic_write(arguments.results) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for (kind, verdict), number in sorted(table.items()):
        print(f"{kind:8} {verdict:24} {number:5,}")
    print(f"{len(records) - len(bad):,} of {len(records):,} survived; written to {arguments.results}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
