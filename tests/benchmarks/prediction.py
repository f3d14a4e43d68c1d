"""Compare predicted and measured GPU memory for many configurations, on every GPU of this machine.

    python tests/benchmarks/prediction.py [--results notebooks/results/prediction.json] [--only TEXT]
    python tests/benchmarks/prediction.py --again      predict the recorded runs with the current formulas; needs no GPU

Each configuration trains a few steps in fresh processes: models of 0.7 to 1.4 billion parameters, and ChatGLM3-6B's
full size with LoRA, all with random weights made on the GPU. Once with expandable segments, and once with the
allocator's default, whose fragmentation can be predicted only in part. About four minutes on an H100; needs 40 GiB.
"""

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from helpers.errors import UserError, exit_with_one_line
from helpers.files import atomic_write
from helpers.hardware import describe_machine
from helpers.launch import RankError, environment, run
from helpers.memory.predict import Configuration, Lora, ModelShape, Strategy, predict
from helpers.memory.units import GIB

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "notebooks" / "results" / "prediction.json"
TIMEOUT_SECONDS = 60
# Adam creates its states in the first step, so only later steps show the peak.
STEPS = 3
# Under DDP a peak depends on when NCCL's watchdog looks (helpers/memory/predict/states.py): the largest of these runs.
RUNS_UNDER_DDP = 3
# Longest row of each batch where rows differ, as a share of the length: what the collator of the real job does.
VARYING = (0.75, 1.0, 0.6, 0.9, 1.0, 0.8)
# The name since torch 2.9, and the one before.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

MEDIUM = ModelShape(hidden=2048, layers=8, heads=16, kv_groups=2, head_dim=128, intermediate=6848)
# The layers of the 6B model, few of them.
WIDE = ModelShape(layers=4)
SMALL_BUCKET = 4_000_000


def configurations(world_size: int) -> dict[str, Configuration]:
    """Name the configurations to measure; on one GPU, DDP and ZeRO run with one rank."""

    def medium(
        lora: bool = False,
        kind: str = "single",
        micro_batch_size: int = 4,
        sequence_length: int = 512,
        shape: ModelShape = MEDIUM,
        **changes: Any,
    ) -> Configuration:
        strategy = {key: changes.pop(key) for key in ("reduce_bucket_size", "overlap_comm") if key in changes}
        precision = changes.pop("precision", "bf16" if kind.startswith("zero") else "autocast")
        return Configuration(
            shape=shape,
            lora=Lora() if lora else None,
            precision=precision,
            strategy=Strategy(kind, 1 if kind == "single" else world_size, **strategy),
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            **changes,
        )

    small, large = {"reduce_bucket_size": SMALL_BUCKET}, {"overlap_comm": True}
    return {
        "full, fp32": medium(precision="fp32"),
        "full, autocast": medium(),
        "full, autocast, checkpointing": medium(checkpointing=True),
        "full, autocast, one long row": medium(micro_batch_size=1, sequence_length=4096),
        "full, 16-bit weights": medium(precision="bf16"),
        "full, autocast, DDP": medium(kind="ddp", micro_batch_size=8, sequence_length=256),
        "full, ZeRO-1, small buckets": medium(kind="zero-1", **small),
        "full, ZeRO-2, small buckets": medium(kind="zero-2", **small),
        "full, ZeRO-2, published buckets": medium(kind="zero-2", **large),
        "full, ZeRO-3": medium(kind="zero-3", **small),
        "full, ZeRO-3, checkpointing": medium(
            kind="zero-3", micro_batch_size=8, sequence_length=1024, checkpointing=True, **small
        ),
        "LoRA, autocast": medium(lora=True),
        "LoRA, autocast, rows differ": medium(lora=True, micro_batch_size=16, sequence_length=384, padded=True),
        "LoRA, autocast, checkpointing": medium(
            lora=True, micro_batch_size=8, sequence_length=1024, checkpointing=True
        ),
        "LoRA, ZeRO-2, published buckets": medium(lora=True, kind="zero-2", **large),
        "LoRA, ZeRO-3": medium(lora=True, kind="zero-3", **small),
        "LoRA, 16-bit weights, one long row": medium(
            lora=True, precision="bf16", micro_batch_size=1, sequence_length=4096
        ),
        "wide, full, ZeRO-2, checkpointing": medium(
            shape=WIDE, kind="zero-2", micro_batch_size=2, sequence_length=1024, checkpointing=True, **small
        ),
        "6B LoRA, DDP, rows differ": Configuration(
            strategy=Strategy("ddp", world_size), micro_batch_size=4, sequence_length=183, padded=True
        ),
        "6B LoRA, DDP, checkpointing": Configuration(strategy=Strategy("ddp", world_size), checkpointing=True),
        "6B LoRA, ZeRO-2, published buckets": Configuration(
            precision="bf16", strategy=Strategy("zero-2", world_size, overlap_comm=True), sequence_length=512
        ),
    }


def build(configuration: Configuration, device: torch.device) -> torch.nn.Module:
    """Build the model on ``device`` with random weights, and its adapter."""
    from helpers.memory.predict.build import (  # with transformers and peft: in the ranks
        add_adapter,
        build_without_adapter,
    )

    sharded = configuration.strategy.zero_stage == 3 and configuration.strategy.world_size > 1
    model = zero_weights(configuration, device) if sharded else build_without_adapter(configuration, device)
    if configuration.lean:
        from helpers.finetune.model import TrainedChatGLM3ForCausalLM

        model.__class__ = TrainedChatGLM3ForCausalLM  # the same network, with the loss of the job's batches
    if configuration.strategy.zero_stage == 3:
        # Partitioned before it gets its adapter, as by from_pretrained: the adapter then stays in fp32.
        import deepspeed  # looks for its accelerator when it is imported

        deepspeed.zero.Init(module=model, config_dict_or_path=deepspeed_config(configuration))
    model = add_adapter(configuration, model)
    if configuration.lean:
        from helpers.config.finetune import SpeedOptions
        from helpers.finetune.speed import apply_speed_options

        c = configuration
        speed = SpeedOptions(
            packing=c.sequence_length if c.packed else None,
            compile_layers=c.compiled,
            loss_chunk=c.loss_chunk,
            padding_mask=c.padding_mask,
        )
        apply_speed_options(model, speed)
    return model


def zero_weights(configuration: Configuration, device: torch.device) -> torch.nn.Module:
    """Build the network with weights of 0 in host memory, from where ZeRO-3 partitions them: whole, on the GPU, they
    could be its peak.
    """
    from helpers.memory.predict.build import build_without_adapter

    model = build_without_adapter(configuration, "meta").to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(rotary.config).to(device)
    return model


def job_batch(configuration: Configuration, step: int, device: torch.device) -> dict[str, Any]:
    """Random tokens as the job's own collators batch them: packs of rows of 100 to 200 tokens, or padded rows."""
    from helpers.finetune.collators import TrainingCollator
    from helpers.finetune.packing import PackCollator

    c = configuration
    generator = random.Random(step)

    def feature(lengths: list[int]) -> dict[str, list[int]]:
        ids = [generator.randrange(1, c.shape.vocab) for _ in range(sum(lengths))]
        return {"input_ids": ids, "labels": ids, "lengths": lengths}

    if c.packed:
        features = []
        for _ in range(c.micro_batch_size):
            lengths, room = [], c.sequence_length
            while room >= 1:
                lengths.append(min(room, generator.randrange(100, 200)))
                room -= lengths[-1]
            features.append(feature(lengths))
        collate: Any = PackCollator(0, c.sequence_length, -(-c.sequence_length // 100), 200)
    else:
        longest = max(2, round(c.sequence_length * VARYING[step % len(VARYING)]))
        features = [
            feature([longest - row * (longest // (2 * c.micro_batch_size))]) for row in range(c.micro_batch_size)
        ]
        collate = TrainingCollator(0)
    made = collate(features)
    unused = ("tokens", "rows", "lengths")
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in made.items() if k not in unused}


def batch(configuration: Configuration, step: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens; where rows differ, each is shorter than the one before, padded on the left."""
    c = configuration
    if c.lean:
        return job_batch(c, step, device)
    if not c.padded:
        ids = torch.randint(1, c.shape.vocab, (c.micro_batch_size, c.sequence_length), device=device)
        return {"input_ids": ids, "labels": ids}
    longest = max(2, round(c.sequence_length * VARYING[step % len(VARYING)]))
    ids = torch.randint(1, c.shape.vocab, (c.micro_batch_size, longest), device=device)
    padding = torch.arange(c.micro_batch_size, device=device)[:, None] * (longest // (2 * c.micro_batch_size))
    mask = torch.arange(longest, device=device)[None, :] >= padding
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def train(configuration: Configuration, limit: int | None = None) -> dict[str, Any]:
    """Train a few steps on this rank, in its process group; the losses, the number of trained parameters, the bytes of
    parameters and optimizer states on the device, and whether torch's allocator used expandable segments.

    ``limit`` is the number of bytes that the allocator may hold on a GPU.
    """
    c = configuration
    device = torch.device("cpu")
    if dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory)
    torch.manual_seed(0)
    if c.strategy.zero_stage:
        prepare_deepspeed(lean=c.lean)
    model = build(c, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)  # ZeRO-3 leaves a part of each
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    engine = None
    if c.strategy.zero_stage:
        engine = model = _deepspeed(c, model, optimizer)
    elif c.strategy.kind == "ddp":
        ids = [device] if device.type == "cuda" else None
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
    autocast = torch.autocast(device.type, torch.bfloat16) if c.precision == "autocast" else nullcontext()
    losses = []
    for step in range(len(VARYING) if c.padded else STEPS):
        inputs = batch(c, step, device)
        with autocast:
            loss = model(**inputs).loss
        losses.append(loss.item())
        if engine is not None:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        del loss
    segments = torch.cuda.memory_snapshot() if device.type == "cuda" else []
    expandable = any(segment["is_expandable"] for segment in segments)
    return {
        "losses": losses,
        "trained_parameters": trained,
        "expandable": expandable,
        "parameter_bytes": bytes_on(device, [getattr(p, "ds_tensor", p) for p in model.parameters()]),
        "optimizer_bytes": bytes_on(device, [v for s in optimizer.state.values() for v in s.values()]),
    }


def bytes_on(device: torch.device, values: Iterable[Any]) -> int:
    """Count the bytes of the storages of tensors on ``device``, each once."""
    storages = {}
    for value in values:
        if torch.is_tensor(value) and value.device.type == device.type:
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


def deepspeed_config(c: Configuration) -> dict[str, Any]:
    """Return the DeepSpeed settings of a configuration."""
    return {
        "train_micro_batch_size_per_gpu": c.micro_batch_size,
        "bf16": {"enabled": c.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": c.strategy.zero_optimization(),
        # torch's Adam on the CPU, which need not be compiled first.
        "zero_force_ds_cpu_optimizer": False,
    }


def prepare_deepspeed(*, lean: bool) -> None:
    """Configure DeepSpeed; if not ``lean``, ZeRO-3's frozen matrices keep their inputs, as DeepSpeed ships them."""
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3 as Linear

    from helpers.launch import device
    from helpers.libraries.deepspeed import configure_deepspeed

    published = Linear.setup_context
    configure_deepspeed(device())
    if not lean:
        Linear.setup_context = staticmethod(published)


def _deepspeed(c: Configuration, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    import deepspeed  # looks for its accelerator when it is imported

    return deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(c), dist_init_required=False)[
        0
    ]


def without_machine(configuration: dict[str, Any]) -> dict[str, Any]:
    """Leave out the machine's constants, which are no part of a job."""
    return {key: value for key, value in configuration.items() if key != "machine"}


def record(
    configuration: Configuration,
    measured: list[dict[str, int | None]],
    outcome: dict[str, Any],
) -> dict:
    """Return one configuration's entry: its prediction, each rank's measured bytes, the errors in percent."""
    prediction = predict(configuration)
    assert outcome["trained_parameters"] == configuration.trainable_parameters, (
        outcome,
        configuration.trainable_parameters,
    )

    def error(predicted: int, name: str) -> float | None:
        peaks = [rank[name] for rank in measured if rank[name] is not None]
        return 100 * (predicted / max(peaks) - 1) if peaks else None

    return {
        "configuration": without_machine(dataclasses.asdict(configuration)),
        "peak": prediction.peak_phase,
        "predicted": dict(prediction.items),
        "predicted_moments": dict(prediction.phases),
        "predicted_allocated": prediction.allocated,
        "predicted_reserved": prediction.reserved,
        "predicted_total": prediction.total,
        "measured": measured,
        "error_percent": error(prediction.total, "nvml"),
        "allocated_error_percent": error(prediction.allocated, "allocated"),
        "reserved_error_percent": error(prediction.reserved, "reserved"),
        "losses": outcome["losses"],
        "expandable": outcome["expandable"],
    }


def predicted_again(content: dict[str, Any]) -> dict[str, Any]:
    """Return a results file's ``content`` with the same measurements and the current predictions."""
    configurations_then = configurations(len(content["machine"]["gpus"]))

    def again(entry: dict[str, Any], configuration: Configuration) -> dict[str, Any]:
        if "failed" in entry:
            return entry
        outcome = {key: entry[key] for key in ("losses", "expandable")} | {
            "trained_parameters": configuration.trainable_parameters
        }
        return entry | record(configuration, entry["measured"], outcome)

    entries = {}
    for name, entry in content["configurations"].items():
        configuration = configurations_then[name]
        entries[name] = again(entry, dataclasses.replace(configuration, expandable_segments=True))
        entries[name]["default_allocator"] = again(entry["default_allocator"], configuration)
    return content | {"configurations": entries}


def write(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def allocator(expandable: bool) -> Iterator[None]:
    """What ranks that start inside inherit: expandable segments, or the allocator's default. Restores what was set."""
    value = "expandable_segments:True" if expandable else None
    with environment(dict.fromkeys(ALLOCATOR_VARIABLES, value)):
        yield


def measure(configuration: Configuration) -> dict[str, Any]:
    """Measure one configuration; if a rank fails, the entry has its error under "failed"."""
    strategy = configuration.strategy
    results = []
    for _ in range(RUNS_UNDER_DDP if strategy.kind == "ddp" else 1):
        try:
            with allocator(configuration.expandable_segments):
                results.append(run(train, strategy.world_size, configuration=configuration, timeout=TIMEOUT_SECONDS))
        except RankError as error:
            return {"failed": str(error)}
    runs = [
        [{"allocated": rank.allocated, "reserved": rank.reserved, "nvml": rank.nvml} for rank in result.memory.ranks]
        for result in results
    ]
    largest = max(runs, key=lambda ranks: max(rank["nvml"] or 0 for rank in ranks))
    return record(configuration, largest, results[0].results[0]) | {"runs": runs}


def warm_up() -> None:
    """Use the device once, so that the first configuration is not measured on a cold machine."""
    torch.ones(1, device="cuda").item()


def line(name: str, entry: dict[str, Any]) -> str:
    """Format one configuration for the terminal, in GiB; or the last line of its failure."""
    parts = [f"{name:34}"]
    if "failed" in entry:
        return f"{parts[0]}failed: {entry['failed'].strip().splitlines()[-1]}"
    for label, predicted, measured in (
        ("allocated", entry["predicted_allocated"], "allocated"),
        ("reserved", entry["predicted_reserved"], "reserved"),
        ("NVML", entry["predicted_total"], "nvml"),
    ):
        peak = max(rank[measured] for rank in entry["measured"])
        parts.append(f"{label} {predicted / GIB:6.2f} | {peak / GIB:6.2f} ({100 * (predicted / peak - 1):+5.1f} %)")
    return "  ".join([*parts, entry["peak"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--again", action="store_true", help="predict the recorded runs again, measure nothing")
    arguments = parser.parse_args()
    if arguments.again:
        content = predicted_again(json.loads(arguments.results.read_text(encoding="utf-8")))
        write(arguments.results, content)
        for name, entry in content["configurations"].items():
            print(line(name, entry), line("  default allocator", entry["default_allocator"]), sep="\n")
        return
    machine = describe_machine()
    if not machine.gpus:
        raise UserError("no GPU here; this measures GPU memory")
    ranks = len(machine.gpus)
    chosen = {name: c for name, c in configurations(ranks).items() if arguments.only in name}
    if not chosen:
        raise UserError(f"--only {arguments.only}: no such configuration; there are {', '.join(configurations(ranks))}")
    run(warm_up, ranks, timeout=TIMEOUT_SECONDS)
    entries: dict[str, Any] = {}
    for name, configuration in chosen.items():
        default = measure(configuration)
        entries[name] = measure(dataclasses.replace(configuration, expandable_segments=True))
        entries[name]["default_allocator"] = default
        print(line(name, entries[name]))
        print(line("  default allocator", default), flush=True)
        write(arguments.results, {"machine": dataclasses.asdict(machine), "configurations": entries})
    failed = [name for name, e in entries.items() if "failed" in e or "failed" in e["default_allocator"]]
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    exit_with_one_line(main)
