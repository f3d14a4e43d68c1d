"""The configurations that validate_prediction.py measures: drawn by seed, before anything was measured.

    python tests/benchmarks/prediction_cases.py      writes notebooks/results/prediction_configs.json

Half of them use two GPUs. No constant may be fitted to those held out. The layers have the 6B model's width; most
models have few of them.
"""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.files import atomic_write
from helpers.memory.predict import Configuration, Lora, ModelShape, Strategy

CONFIGS = Path(__file__).resolve().parents[2] / "notebooks" / "results" / "prediction_configs.json"
SEED, COUNT, HELD_OUT, FULL_SIZE = 2026, 64, 20, 6
LENGTHS, ROWS, LAYERS = (256, 512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16), (2, 4, 6, 8)
MOST_TOKENS = 16384
# By hand, so that a change of the formulas does not change the list: bytes of an H100 to stay below, and the most bytes
# per token and layer, and per logit.
MOST_BYTES, LAYER_BYTES, LOGIT_BYTES = 60e9, 330_000, 14
# A GPU's memory as a share of what the case needed without a limit. One case each.
CAPACITIES = (0.97, 0.98, 0.99, 1.01, 1.02, 1.03)
SMALL_BUCKET = 4_000_000


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration to measure.

    Attributes:
        configuration: The job.
        held_out: Whether no constant may be fitted to it.
        capacity: Also run it with this share of the allocator's memory that it needed; None if not.
    """

    configuration: Configuration
    held_out: bool
    capacity: float | None


def cases() -> dict[str, Case]:
    """Draw the cases, always the same ones, by name."""
    drawn: dict[str, Configuration] = {}
    generator = random.Random(SEED)
    while len(drawn) < COUNT:
        gpus, layers = 1 + len(drawn) % 2, 28 if len(drawn) < FULL_SIZE else generator.choice(LAYERS)
        configuration = _draw(generator, gpus, layers)
        if _fits(configuration):
            drawn.setdefault(name(configuration), configuration)
    held_out = set(random.Random(SEED + 1).sample(sorted(drawn), HELD_OUT))
    limited = random.Random(SEED + 2).sample([n for n, c in drawn.items() if c.expandable_segments], len(CAPACITIES))
    capacity = dict(zip(limited, CAPACITIES, strict=True))
    return {n: Case(c, n in held_out, capacity.get(n)) for n, c in drawn.items()}


def _draw(generator: random.Random, gpus: int, layers: int) -> Configuration:
    kinds = (
        ("single", "single", "single", "zero-1", "zero-2", "zero-3")
        if gpus == 1
        else ("ddp", "zero-1", "zero-2", "zero-3")
    )
    kind = generator.choice(kinds)
    stage = int(kind[-1]) if kind.startswith("zero") else 0
    lora = layers == 28 or generator.random() < 0.6
    bucket, overlap, offload = generator.random(), generator.random(), generator.random()
    strategy = Strategy(
        kind,
        gpus,
        reduce_bucket_size=SMALL_BUCKET if bucket < 0.7 else 500_000_000,
        overlap_comm=stage in (1, 2) and overlap < 0.3,
        max_live_parameters=210_000_000 if bucket < 0.7 else 1_000_000_000,
        offload_optimizer=stage > 1 and not lora and offload < 0.4,
    )
    adapters = (
        Lora(),
        Lora(r=16, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"), dropout=0.0),
        Lora(r=64, dropout=0.0),
    )
    adapter = generator.choice(adapters) if lora else None
    rows = generator.choice(ROWS)
    as_the_job = lora and generator.random() < 0.6
    padded = generator.random() < 0.5 and rows > 1
    return Configuration(
        shape=ModelShape(layers=layers),
        lora=adapter,
        precision="bf16" if stage else "autocast" if lora or generator.random() < 0.7 else "bf16",
        strategy=strategy,
        micro_batch_size=rows,
        sequence_length=generator.choice(LENGTHS),
        padded=padded,
        padding_mask=not as_the_job,
        checkpointing=generator.random() < 0.4,
        expandable_segments=as_the_job or generator.random() < 0.7,
        loss_chunk=generator.choice((256, 1024, None)) if as_the_job else None,
        lean=as_the_job,
        compiled=as_the_job and not padded and stage != 3 and generator.random() < 0.4,
    )


def _fits(c: Configuration) -> bool:
    """Whether a rough upper bound of the memory is below an H100's, and the batch is not too large."""
    if c.tokens > MOST_TOKENS or (c.masked and c.micro_batch_size * c.sequence_length**2 > 2**28):
        return False
    states = c.shape.parameters * (2 if c.lora else 20)
    layers = 2 if c.checkpointing else c.shape.layers
    logits = min(c.tokens, c.loss_chunk or c.tokens) * c.shape.vocab * LOGIT_BYTES
    return states + c.tokens * layers * LAYER_BYTES + logits < MOST_BYTES


def name(c: Configuration) -> str:
    """Name a configuration by what it is made of."""
    return ", ".join(_parts(c))


def _parts(c: Configuration) -> Iterator[str]:
    yield f"{c.strategy.world_size} x {c.strategy.kind}"
    if c.strategy.offload_optimizer:
        yield "offload"
    if c.strategy.zero_stage and c.strategy.reduce_bucket_size != SMALL_BUCKET:
        yield "5e8"
    if c.strategy.overlap_comm:
        yield "overlap"
    yield f"{c.shape.layers} layers"
    yield f"LoRA r {c.lora.r}" if c.lora else f"full {c.precision}"
    yield f"{c.micro_batch_size} x {c.sequence_length}" + (" padded" if c.padded else " packed" if c.packed else "")
    if c.checkpointing:
        yield "checkpointing"
    if c.lean:
        yield "job" + (", compiled" if c.compiled else "") + (f", chunk {c.loss_chunk}" if c.loss_chunk else "")
    if not c.expandable_segments:
        yield "default allocator"


def as_json(chosen: dict[str, Case]) -> list[dict[str, Any]]:
    """Return the cases as the committed file has them."""
    entries = [json.loads(json.dumps({"name": n} | dataclasses.asdict(case))) for n, case in chosen.items()]
    for entry in entries:
        del entry["configuration"]["machine"]  # its constants are no part of the job
    return entries


if __name__ == "__main__":
    with atomic_write(CONFIGS) as temporary:
        temporary.write_text(json.dumps(as_json(cases()), indent=1) + "\n", encoding="utf-8")
