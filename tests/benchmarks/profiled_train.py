"""The ordinary fine-tune, with torch.profiler around three of its steps.

    python tests/benchmarks/profiled_train.py DATA_DIR MODEL_DIR CONFIG --output-dir DIR

The arguments are those of ``python -m helpers.finetune.train``. On rank 0, ``DIR/profile.json`` gets the GPU's seconds
per step by operation and by the shapes of its inputs. Profiling takes time and memory of its own: measure speed and
peaks in another run.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from helpers.finetune import train
from helpers.finetune.trainer import LoraTrainer

FIRST, STEPS = 9, 3  # the steps before compile, and fill caches
LEAST_SHARE = 5e-4  # of all kernels; smaller entries are summed up


class ProfiledSteps:
    """Count training steps, and profile ``STEPS`` of them beginning with the one of number ``FIRST``.

    Args:
        training_step: The Trainer's own, forward and backward. The profile ends where the next one begins, so that it
            has whole steps with the optimizer's part.
    """

    def __init__(self, training_step: Callable[..., torch.Tensor]) -> None:
        self.training_step = training_step
        self.step = 0
        self.profiler: Any = None

    def __call__(self, trainer: LoraTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.step += 1
        if self.step in (FIRST, FIRST + STEPS) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.step == FIRST:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self.profiler = profile(activities=activities, record_shapes=True)
            self.profiler.start()
        elif self.step == FIRST + STEPS:
            self.profiler.stop()
            if trainer.is_world_process_zero():
                path = Path(trainer.args.output_dir) / "profile.json"
                path.write_text(json.dumps(operations(self.profiler)), encoding="utf-8")
            self.profiler = None
        return self.training_step(trainer, *args, **kwargs)


def operations(profiler: Any) -> list[list[Any]]:
    """List name, shapes of the inputs, seconds and calls per step; the longest first, the smallest as one entry.

    A kernel's time belongs to the operation that launched it. On a CPU, it is the operation's own time.
    """
    on_gpu = torch.cuda.is_available()
    found, all_kernels = [], 0.0
    for entry in profiler.key_averages(group_by_input_shape=True):
        if entry.device_type == DeviceType.CPU:
            seconds = (entry.self_device_time_total if on_gpu else entry.self_cpu_time_total) / 1e6 / STEPS
            found.append([entry.key, entry.input_shapes, seconds, entry.count / STEPS])
        elif not getattr(entry, "is_user_annotation", False):
            all_kernels += entry.self_device_time_total / 1e6 / STEPS
    found.sort(key=lambda entry: -entry[2])
    attributed = sum(seconds for _, _, seconds, _ in found)
    large = [entry for entry in found if entry[2] > LEAST_SHARE * attributed]
    rest = max(attributed, all_kernels) - sum(seconds for _, _, seconds, _ in large)
    return [*large, ["rest", [], rest, 0]]


if __name__ == "__main__":
    profiled = ProfiledSteps(LoraTrainer.training_step)
    LoraTrainer.training_step = lambda *args, **kwargs: profiled(*args, **kwargs)
    train.main(sys.argv[1:])
