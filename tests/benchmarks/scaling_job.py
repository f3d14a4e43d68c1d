"""The 6B job at a fixed number of tokens per step on 1, 2, 4 and 8 GPUs: what ``scaling.py --part job`` runs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs_6b import PLAIN, ROOT, Run, execute, summary, write_rows
from speed_6b import share_of

from helpers.errors import UserError
from helpers.memory.predict import ModelShape

FULL_ZERO_3 = ROOT / "configs" / "ds_zero_3_full.json"
PARTS = 8  # of a step: as many micro-batches on one GPU, one micro-batch on each of eight
FEW_STEPS = {"max_steps": 6, "logging_steps": 1, "save_strategy": "no"}
LORA_STEPS = {"max_steps": 24, "logging_steps": 4, "save_strategy": "no"}
# Weights, gradients and Adam's states, and some room: fewer bytes per parameter cannot hold full fine-tuning.
LEAST_BYTES_PER_PARAMETER = 18
REPEATED = 8  # the rows, for all steps on several GPUs to have enough
# Operations per parameter and token in a matmul, recomputing not counted; see speed_6b.share_of for LoRA's 4.
LORA_OPERATIONS, FULL_OPERATIONS = 4, 6


def planned_runs(counts: Sequence[int], gpu_bytes: int) -> list[Run]:
    """List each way on each number of GPUs, with 32,768 tokens per step, and the published recipe on four.

    Args:
        counts: Numbers of GPUs, each a divisor of :data:`PARTS`.
        gpu_bytes: Memory of a GPU. Full fine-tuning is left out on fewer GPUs than hold its states.

    Returns:
        The runs.
    """
    runs = []
    least = LEAST_BYTES_PER_PARAMETER * ModelShape().parameters
    for count in counts:
        lora = LORA_STEPS | {"gradient_accumulation_steps": PARTS // count}
        runs.append(Run("LoRA, bf16", "lora_fast.yaml", training=lora, ranks=count))
        runs.append(Run("LoRA, fp8", "lora_fp8.yaml", training=lora, ranks=count))
        if count * gpu_bytes >= least:
            packs = {"per_device_train_batch_size": 2, "gradient_checkpointing": True}
            training = FEW_STEPS | packs | {"gradient_accumulation_steps": PARTS // count}
            speed = {"packing": 2048, "loss_chunk": 1024}
            runs.append(Run("full fine-tuning", "sft.yaml", FULL_ZERO_3, speed, training, count))
    if 4 in counts and 4 * gpu_bytes >= least:
        published = FEW_STEPS | {"gradient_checkpointing": True}
        runs.append(Run("full fine-tuning, published recipe", "sft.yaml", FULL_ZERO_3, PLAIN, published, 4))
    return runs


def dry_runs(most: int) -> list[Run]:
    """List the same ways for the embedded model on one CPU rank and on ``most``, 1 or 2."""
    runs = []
    for count in range(1, most + 1):
        training = FEW_STEPS | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": PARTS // count}
        runs.append(Run("LoRA, bf16", "lora_tiny.yaml", training=training, ranks=count))
        runs.append(Run("LoRA, fp8", "lora_tiny.yaml", speed={"fp8": True}, training=training, ranks=count))
        runs.append(Run("full fine-tuning", "sft.yaml", FULL_ZERO_3, training=training, ranks=count))
    return runs


def label_of(run: Run) -> str:
    """Return the run's key in the results file."""
    return f"{run.name}, N = {run.ranks}"


def measure(
    groups: Sequence[Sequence[Run]], checkpoint: Path, folder: Path, left: Callable[[], float], rate: float | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make the runs, a group at a time.

    Args:
        groups: From ``jobs_6b.side_by_side``; one run each on the CPU.
        checkpoint: Of the model.
        folder: For rows, configurations and outputs.
        left: Seconds until no group may start.
        rate: TFLOP/s of a bf16 matmul; None without GPUs.

    Returns:
        An iterator of label and entry as each group ends. A run that failed has the key ``failed``.
    """
    write_rows(folder)
    rows = (folder / "train.json").read_text(encoding="utf-8")
    (folder / "train.json").write_text(REPEATED * rows, encoding="utf-8")
    made = execute(groups, folder, checkpoint, folder)
    for group in groups:
        if left() <= 0:
            return
        for run, outcome in zip(group, next(made), strict=True):
            failed = isinstance(outcome, str)
            yield label_of(run), {"failed": outcome} if failed else _entry(run, outcome, len(group), rate)


def _entry(run: Run, output: Path, together: int, rate: float | None) -> dict[str, Any]:
    found = summary(output)
    entry = {"name": run.name, "config": run.config, "side_by_side": together, **found}
    entry["tokens_per_step"] = found["tokens_per_second_per_gpu"] * found["ranks"] * found["step_seconds"]
    if rate:
        operations = FULL_OPERATIONS if run.deepspeed else LORA_OPERATIONS
        entry["share_of_product_rate"] = share_of(rate, found) * operations / LORA_OPERATIONS
    return entry


def check_equality(entries: dict[str, dict[str, Any]]) -> None:
    """Compare the first losses of a way's runs: the same rows and weights, on however many ranks.

    Raises:
        UserError: Names two that differ by more than 1 %.
    """
    first: dict[str, tuple[str, float]] = {}
    for label, entry in entries.items():
        if "failed" in entry:
            continue
        other, loss = first.setdefault(entry["name"], (label, entry["loss"][0]))
        if abs(entry["loss"][0] - loss) > 0.01 * loss:
            raise UserError(f"{label}: first loss {entry['loss'][0]:.4f}, {other}: {loss:.4f}; they must be the same")
