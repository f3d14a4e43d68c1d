"""Write what a run leaves besides checkpoints and metrics: ``run.json`` and the figures."""

import dataclasses
import json
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from helpers.config.secrets import without_secrets
from helpers.files import atomic_write
from helpers.finetune.job import Job
from helpers.finetune.output_disk import check_still_there
from helpers.finetune.ranks import Ranks
from helpers.finetune.recorder import read_metrics
from helpers.finetune.stop import StoppedBySignal
from helpers.memory.phases import across_ranks, read_phases
from helpers.memory.timeline import Timeline
from helpers.memory.units import GIB
from helpers.plots import loss_and_memory, memory_timeline, save_figure

TIME = "%Y-%m-%dT%H:%M:%S%z"


class RunFile:
    """Keep ``run.json`` up to date: what ran, on which machine, with which configuration, and how it ended."""

    def __init__(self, path: Path, ranks: Ranks, content: dict[str, Any]) -> None:
        self.path, self.ranks, self.content = path, ranks, content

    def update(self, **changes: Any) -> None:
        """Change or add keys; rank 0 writes the file."""
        self.content |= changes
        if self.ranks.is_first:
            self._write()

    def fail(self, error: BaseException) -> None:
        """Write down that the run has failed, and why; or that a signal has ended it.

        Any rank does: if another one fails, rank 0 waits in a collective until it is killed. The first error stays,
        because those of other ranks follow from it.

        Args:
            error: What ends this rank.
        """
        with suppress(OSError, ValueError):
            if json.loads(self.path.read_text(encoding="utf-8")).get("status") == "failed":
                return
        if isinstance(error, StoppedBySignal):
            self.content |= {"status": "interrupted"}
        else:
            self.content |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        self._write()

    def _write(self) -> None:
        check_still_there(self.path.parent, self.path)
        with atomic_write(self.path) as temporary:
            text = json.dumps(without_secrets(self.content), indent=2, ensure_ascii=False, default=str)
            # A path whose bytes are not UTF-8 holds half surrogates. They are escaped, so that the run goes on.
            temporary.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")


def start_run_file(job: Job, ranks: Ranks) -> RunFile:
    """Write ``run.json`` with what is known before training.

    Args:
        job: The checked job.
        ranks: This process's place.

    Returns:
        The file, to be kept up to date.
    """
    content = {
        "status": "running",
        "started": time.strftime(TIME),
        "command": shlex.join(["python", "-m", "helpers.finetune.train", *sys.argv[1:]]),
        "world_size": ranks.world_size,
        "precision": job.precision,
        "machine": dataclasses.asdict(job.machine),
        "config": dataclasses.asdict(job.config),
        "deepspeed": job.deepspeed,
    }
    run_file = RunFile(job.output_dir / "run.json", ranks, content)
    run_file.update()
    return run_file


def draw_figures(output_dir: Path, timeline: Timeline) -> None:
    """Draw the loss curve and the memory curve of the run in ``output_dir``; write the latter's numbers too."""
    records = read_metrics(output_dir / "metrics.jsonl")
    if records:
        save_figure(loss_and_memory(records, "Fine-tune"), output_dir / "loss_and_memory.png")
    timeline.save(output_dir / "memory_timeline.json")
    if timeline.gpus:
        phases = across_ranks(read_phases(sorted(output_dir.glob("phases-*.jsonl"))))
        save_figure(memory_timeline(timeline, phases, "GPU memory"), output_dir / "memory_timeline.png")


def peaks_and_phase(output_dir: Path, timeline: Timeline) -> tuple[list[float], str | None]:
    """Find the peak of each GPU, and in which phase the fullest one had it.

    Args:
        output_dir: The run's folder, with the phases of its ranks.
        timeline: The memory of the GPUs, one per rank.

    Returns:
        GiB above what was in use before, per GPU; and the innermost phase of that GPU's rank, None outside of all.
    """
    fullest = max(timeline.gpus, key=lambda gpu: gpu.delta)
    moment = timeline.start + fullest.peak_seconds
    phases = read_phases(sorted(output_dir.glob("phases-*.jsonl")))
    around = [
        phase
        for phase in phases
        if phase.rank == fullest.index and phase.start <= moment <= (moment if phase.end is None else phase.end)
    ]
    return [gpu.delta / GIB for gpu in timeline.gpus], around[-1].name if around else None
