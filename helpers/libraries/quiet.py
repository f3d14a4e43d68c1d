"""Leave the lines of our own commands and notebooks readable."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """No progress bars of libraries, and no warnings that only library authors can act on."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")
    # One process drives one GPU here, so the current device is the right one.
    warnings.filterwarnings("ignore", message=r"barrier\(\)", category=UserWarning)

    import datasets  # here, after the filters: some warn while they are imported
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed otherwise warns that it had to guess
    transformers.utils.logging.disable_progress_bar()
    # It tells in which type a model was dequantised, which the caller has just asked for.
    logging.getLogger("transformers.integrations.bitsandbytes").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
