"""How the course's techniques and the 6B job scale over the GPUs of this machine: 1, 2, 4 and 8 of them.

    python tests/benchmarks/scaling.py --part course [--resume] [--seconds 540] [--only TEXT ...]
    python tests/benchmarks/scaling.py --part job CHECKPOINT [--resume] [--seconds 540] [--only TEXT ...]

Both parts write into one results file, after each run; each takes about ten minutes on eight GPUs with 80 GiB. Runs of
the job that fit next to each other are made at once. If CHECKPOINT does not exist, one with random weights is written
there. ``--resume`` keeps the runs that are in the file. ``--dry`` shows without a GPU that everything is correct: tiny
models on eight CPU ranks (``--dry 2``: on two), compared with one process. The job then runs on one rank and on two.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import scaling_job
import scaling_mesh
import scaling_zero
from jobs_6b import commit, ensure_checkpoint, side_by_side
from speed_6b import matmul_tflops

from helpers.assets import TINY_MODEL
from helpers.chatglm3.tokenizer import is_published_tokenizer
from helpers.errors import UserError, exit_with_one_line
from helpers.files import atomic_write
from helpers.finetune.scaling import SCALING_RESULTS
from helpers.hardware import describe_machine
from helpers.launch import RankError

COUNTS = (1, 2, 4, 8)
DRY_RESULTS = Path("output") / "scaling_dry.json"
# The ranks import none of the benchmarks.
for module in (scaling_mesh, scaling_zero):
    cloudpickle.register_pickle_by_value(module)


def course_cases(counts: list[int]) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name the measurements of the course's techniques, the largest number of ranks first."""
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    for ranks in reversed(counts):
        if ranks > 1:
            cases[f"meshes, N = {ranks}"] = partial(scaling_mesh.measure_meshes, ranks)
            cases[f"pipelines, N = {ranks}"] = partial(scaling_mesh.measure_pipelines, ranks)
        for name in scaling_zero.ZERO:
            cases[f"{name}, N = {ranks}"] = partial(scaling_zero.measure_zero, name, ranks)
    return cases


def open_results(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Read what the other part measured and, with ``--resume``, this one; start a new file if there is none.

    Raises:
        UserError: The file is of another commit or machine.
    """
    content: dict[str, Any] = {"commit": arguments.commit, "machine": dataclasses.asdict(describe_machine())}
    content |= {"course": {}, "job": {}}
    if not path.exists():
        return content
    kept = json.loads(path.read_text(encoding="utf-8"))
    for what, old, new in (
        ("commit", kept["commit"], content["commit"]),
        ("GPUs", *([gpu["name"] for gpu in one["machine"]["gpus"]] for one in (kept, content))),
    ):
        if old != new:
            raise UserError(f"{path} is of {what} {old}, this is {new}; move the file away or name another: --results")
    return kept if arguments.resume else kept | {arguments.part: {}}


def save(path: Path, content: dict[str, Any]) -> None:
    """Write the results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def measure_course(counts: list[int], wanted: Callable[[str], bool], left: Callable[[], float]) -> Any:
    """Yield label and entry of each measurement; one that failed has the key ``failed``."""
    for label, measure in course_cases(counts).items():
        if not wanted(label):
            continue
        if left() <= 0:
            return
        begin = time.monotonic()
        try:
            entry = measure()
        except (RankError, UserError) as error:
            print(error, file=sys.stderr, flush=True)
            entry = {"failed": str(error).strip().splitlines()[-1]}
        yield label, entry | {"seconds": time.monotonic() - begin}


def measure_job(
    counts: list[int],
    wanted: Callable[[str], bool],
    left: Callable[[], float],
    arguments: argparse.Namespace,
    content: dict[str, Any],
) -> Any:
    """Yield label and entry of each run of the job; on GPUs, first measure the matmul's rate."""
    gpus = describe_machine().gpus
    if arguments.dry:
        groups = [[run] for run in scaling_job.dry_runs(min(arguments.dry, 2)) if wanted(scaling_job.label_of(run))]
        checkpoint, rate = TINY_MODEL, None
    else:
        checkpoint = arguments.checkpoint
        runs = scaling_job.planned_runs(counts, min(gpu.total_bytes or 0 for gpu in gpus))
        groups = side_by_side([run for run in runs if wanted(scaling_job.label_of(run))], len(gpus))
        ensure_checkpoint(checkpoint)
        rate = content["product_tflops"] = matmul_tflops()
        content["random_weights"] = not is_published_tokenizer(checkpoint / "tokenizer.model")
    with tempfile.TemporaryDirectory() as name:
        yield from scaling_job.measure(groups, checkpoint, Path(name), left, rate)


def line_of(label: str, entry: dict[str, Any]) -> str:
    """Format what a run found."""
    if "failed" in entry:
        return f"{label}: failed: {entry['failed']}"
    parts = []
    if "tokens_per_second_per_gpu" in entry:
        parts.append(f"{entry['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU")
    if "share_of_product_rate" in entry:
        parts.append(f"{entry['share_of_product_rate']:.0%} of the matmul's rate")
    if nvml := entry.get("nvml_peak_gib"):  # empty without a GPU
        parts.append(f"NVML {max(nvml):.2f} GiB")
    if "states_formula" in entry:
        parts.append(f"model states of {max(entry['states_counted']):,} bytes, formula {entry['states_formula']:,}")
    if "meshes" in entry:
        parts.append(
            f"{len(entry['meshes'])} meshes, predicted and measured order: rho {entry['rank_correlation']:.2f}"
        )
    for name, schedule in entry.get("schedules", {}).items():
        parts.append(f"{name} idle {schedule['idle_measured']:.1%}, formula {schedule['idle_formula']:.1%}")
    return f"{label}: {'; '.join(parts)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("course", "job"), required=True)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="of the 6B model, for the job")
    parser.add_argument("--dry", type=int, nargs="?", const=8, help="tiny models on so many CPU ranks (8)")
    parser.add_argument("--only", nargs="+", help="texts in the names of the runs to make")
    parser.add_argument("--resume", action="store_true", help="keep the runs in the results file, make the others")
    parser.add_argument("--seconds", type=float, default=540, help="start no run after so many (540)")
    parser.add_argument("--results", type=Path, help=f"file to write ({SCALING_RESULTS.name}; dry: {DRY_RESULTS})")
    parser.add_argument("--commit", default=commit(), help="of this code; needed outside of a git checkout only")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + arguments.seconds
    gpus = len(describe_machine().gpus)
    if not arguments.dry and not gpus:
        raise UserError("no GPU here; add --dry to check everything with tiny models on the CPU")
    if arguments.dry is not None and arguments.dry not in COUNTS:
        raise UserError(f"--dry {arguments.dry}: choose 1, 2, 4 or 8 ranks")
    if arguments.part == "job" and not arguments.dry and arguments.checkpoint is None:
        raise UserError("--part job needs the folder of a checkpoint, or where to write one with random weights")
    path = arguments.results or (DRY_RESULTS if arguments.dry else SCALING_RESULTS)
    content = open_results(path, arguments)
    runs = content[arguments.part]
    counts = [count for count in COUNTS if count in (1, arguments.dry) or (count <= gpus and not arguments.dry)]

    def wanted(label: str) -> bool:
        done = label in runs and "failed" not in runs[label]
        return not done and (not arguments.only or any(text in label for text in arguments.only))

    def left() -> float:
        return end - time.monotonic()

    if arguments.part == "course":
        found = measure_course(counts, wanted, left)
    else:
        found = measure_job(counts, wanted, left, arguments, content)
    for label, entry in found:
        runs[label] = entry
        save(path, content)
        print(line_of(label, entry), flush=True)
    if arguments.dry and arguments.part == "job":
        scaling_job.check_equality(runs)
    if left() <= 0:
        print("The time is up: go on with --resume.", flush=True)
    if failed := [label for label, entry in runs.items() if "failed" in entry]:
        raise UserError(f"failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    exit_with_one_line(main)
