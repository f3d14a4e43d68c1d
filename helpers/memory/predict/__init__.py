"""Predict what a training job needs of each GPU's memory, by formula, before anything is loaded.

    from helpers.memory.predict import Configuration, predict
    print(predict(Configuration(micro_batch_size=4, sequence_length=768)).items)

model_shape.py and configuration.py describe the job. states.py, saved_tensors.py and gathered.py hold the formulas,
constants.py what had to be measured. step.py sums what is alive at each phase, prediction.py finds the largest phase,
and allocator_allowance.py adds what the allocator may waste. planner.py finds a strategy that fits, jobs.py reads a
job's own files, validation.py reads the errors of the committed runs. divided.py lays out the ranks of a divided model
(model_parallel.py).

build.py makes the real model. traced.py runs it on fake tensors (fake_job.py, cuda_operators.py), under the real
DeepSpeed if the job uses ZeRO (traced_zero.py), and simulates the allocator on its allocations (allocations.py). Only
these import torch.
"""

from helpers.memory.predict.configuration import Configuration, Lora, Strategy
from helpers.memory.predict.model_shape import ModelShape, read_shape
from helpers.memory.predict.prediction import Prediction, predict
from helpers.memory.predict.states import published_states

__all__ = [
    "Configuration",
    "Lora",
    "ModelShape",
    "Prediction",
    "Strategy",
    "predict",
    "published_states",
    "read_shape",
]
