"""Run the main job on the embedded model and data, then compare the answers before and after tuning.

make run        or        python -m helpers.finetune.demo
"""

import sys
from pathlib import Path

from helpers.assets import TINY_DATA, TINY_MODEL
from helpers.assets.advertise import SHOWN_PROMPT
from helpers.errors import exit_with_one_line
from helpers.files import fresh_folder
from helpers.finetune.torchrun import run_command, torchrun_command

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def main() -> None:
    """Fine-tune, then answer one prompt with and without the adapter."""
    output_dir = fresh_folder(Path("output"), "tiny")
    command = torchrun_command(
        TINY_DATA, TINY_MODEL, CONFIGS / "lora_tiny.yaml", CONFIGS / "ds_zero_2.json", output_dir=output_dir
    )
    status = run_command(command)
    if status:
        sys.exit(status)

    from peft import PeftModel  # these are slow to import, and only needed after training

    from helpers.finetune.checkpoints import complete_checkpoints
    from helpers.finetune.generate import answer
    from helpers.finetune.loading import load_for_inference
    from helpers.libraries.quiet import quiet_libraries

    quiet_libraries()
    checkpoint = complete_checkpoints(output_dir)[-1]
    model, tokenizer = load_for_inference(checkpoint)
    assert isinstance(model, PeftModel)  # a checkpoint of this run
    messages = [{"role": "user", "content": SHOWN_PROMPT}]
    tuned = answer(model, tokenizer, messages)
    with model.disable_adapter():
        base = answer(model, tokenizer, messages)
    print(f"\nprompt  {SHOWN_PROMPT}\nbase    {base}\ntuned   {tuned}\n")
    print(f"loss and memory   {output_dir / 'loss_and_memory.png'}")
    print(f"every answer      {output_dir / 'predictions.jsonl'}")
    print(f"the adapter       {checkpoint}")
    print(f"ask it yourself   python -m helpers.finetune.generate {checkpoint}")


if __name__ == "__main__":
    exit_with_one_line(main)
