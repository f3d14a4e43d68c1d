"""What a training job will need of each GPU's memory, by formula, before anything is loaded.

    from helpers.memory.predict import Configuration, predict
    print(predict(Configuration(rows=4, length=768)).items)

configuration.py says what is predicted for, states.py and saved_tensors.py hold the formulas, constants.py what had to
be measured, step.py what is alive at each moment, prediction.py the largest of them, planner.py which strategy fits,
jobs.py reads a job's own files, build.py makes the real model that a configuration describes.
"""

from helpers.memory.predict.configuration import Configuration, Lora, ModelShape, Strategy, read_shape
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
