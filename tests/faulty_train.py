"""The fine-tune's command with a fault inside: ``faulty_train.py PLAN DATA_DIR MODEL_DIR ...``, on each rank.

PLAN is JSON: a folder where each rank leaves its process group, and, for a kill, who kills which rank how and when.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from helpers.finetune import train
from helpers.finetune.trainer import LoraTrainer


def _kill(how: str) -> None:
    pid = os.getpid()
    if how == "STOP+KILL":  # a process that is stopped cannot end itself
        killer = ["sh", "-c", f"sleep 0.5; kill -KILL {pid}"]
        subprocess.Popen(killer, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        how = "STOP"
    os.kill(pid, signal.Signals[f"SIG{how}"])


def _arm(kill: dict) -> None:
    """Kill this rank ``delay`` seconds after it begins a step, or a checkpoint, but before the job's end."""
    name = {"step": "training_step", "save": "_save_checkpoint"}[kill["during"]]
    original = getattr(LoraTrainer, name)
    timer = threading.Timer(kill["delay"], _kill, [kill["signal"]])
    timer.daemon = True
    begun = []

    def armed(self, *args, **kwargs):
        if self.state.global_step == kill["step"] and not begun:
            begun.append(True)
            timer.start()
        return original(self, *args, **kwargs)

    setattr(LoraTrainer, name, armed)
    training_step = LoraTrainer.training_step

    def waiting(self, *args, **kwargs):
        loss = training_step(self, *args, **kwargs)
        # These steps take milliseconds: a signal that comes after the job's end would test nothing.
        if begun and self.state.global_step >= kill["latest"]:
            timer.join()
        return loss

    LoraTrainer.training_step = waiting


def main() -> None:
    plan = json.loads(sys.argv[1])
    os.setpgid(0, 0)  # what this rank starts stays in the group, and can be found
    Path(plan["groups"], str(os.getpid())).touch()
    kill = plan.get("kill")
    if kill and kill["rank"] == int(os.environ.get("RANK", 0)):
        _arm(kill)
    train.draw_figures = lambda *_: None
    sys.argv = [train.__file__, *sys.argv[2:]]
    train.main()


if __name__ == "__main__":
    main()
