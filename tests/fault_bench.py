"""Where faults are injected: a small model and its data, undisturbed runs, and launches that leave nothing behind."""

import copy
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from fault_kinds import SAVE_STEPS, STEPS, Run
from rank_server import RankServer
from small_chatglm import random_model, small_config, small_tokenizer
from small_finetune import CONFIG, ROOT, merged, write_rows

LIMIT = 120 * float(os.environ.get("TEST_TIME_FACTOR", 1))
HUNG = -999  # status
SECONDS_TO_END = 5.0  # for processes of a run that has ended
QUICK = {
    "training_args": {
        **{"max_steps": STEPS, "save_steps": SAVE_STEPS, "eval_strategy": "no", "predict_with_generate": False},
        **{"use_cpu": True, "per_device_train_batch_size": 2},
    },
    "peft_config": {"lora_dropout": 0.1},
}
# Name: ranks (None: no launcher), DeepSpeed file.
STRATEGIES: dict[str, tuple[int | None, dict[str, Any] | None]] = {
    "one process": (None, None),
    "DDP": (2, None),
    "ZeRO-2": (2, {"stage": 2}),
    "ZeRO-2, CPU Adam": (2, {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    "ZeRO-3": (2, {"stage": 3}),
}


class Bench:
    """The model, the data, an undisturbed run of each strategy, and a server of ranks for each thread.

    Args:
        folder: For everything that is written.
        server: Where ranks are forked, if there is one thread only; None starts a server for each thread.
    """

    def __init__(self, folder: Path, server: RankServer | None = None) -> None:
        self.folder = folder
        self.model, self.data = folder / "model", folder / "data"
        self.data.mkdir()
        write_rows(self.data, train=40, dev=1)
        self.model.mkdir()
        tokenizer = small_tokenizer(self.model)
        random_model(small_config(eos_token_id=tokenizer.stop_token_ids)).save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)
        self._local = threading.local()
        self._local.server = server
        self._servers: list[RankServer] = []
        self._references: dict[str, Path] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the servers."""
        for server in self._servers:
            server.__exit__()

    def _server(self) -> RankServer:
        if getattr(self._local, "server", None) is None:
            with self._lock:
                self._local.server = RankServer(LIMIT).__enter__()
                self._servers.append(self._local.server)
        return self._local.server

    def reference(self, strategy: str) -> Path:
        """The output folder of an undisturbed run."""
        with self._lock:
            known = self._references.get(strategy)
        if known is None:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            run = self.launch(strategy, folder)
            assert run.status == 0 and not run.left, f"{strategy}: {run.stderr}"
            known = folder / "output"
            with self._lock:
                self._references[strategy] = known
        return known

    def launch(
        self,
        strategy: str,
        folder: Path,
        *flags: str,
        changes: dict[str, Any] | None = None,
        kill: dict[str, Any] | None = None,
        data: Path | None = None,
        file_bytes: int | None = None,
    ) -> Run:
        """Run the fine-tune in ``folder``; every process that it starts is looked for afterwards."""
        nprocs, zero = STRATEGIES[strategy]
        config = copy.deepcopy(merged(CONFIG, QUICK))
        for block, value in (changes or {}).items():
            config[block] = config.get(block, {}) | value if isinstance(value, dict) else value
        config["data_config"].pop("val_file")
        (folder / "lora.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        arguments: list[object] = [data or self.data, self.model, folder / "lora.yaml"]
        if zero:
            content = json.loads((ROOT / "configs" / "ds_zero_2.json").read_text())
            content["zero_optimization"] = zero
            (folder / "deepspeed.json").write_text(json.dumps(content))
            arguments.append(folder / "deepspeed.json")
        groups = Path(tempfile.mkdtemp(dir=folder))
        plan = json.dumps({"groups": str(groups), "kill": kill})
        arguments += ["--output-dir", folder / "output", *flags]
        try:
            ended = self._server().run(
                ROOT / "tests" / "faulty_train.py", plan, *arguments, nprocs=nprocs, file_bytes=file_bytes
            )
            status, printed = ended.returncode, (ended.stdout, ended.stderr)
        except subprocess.TimeoutExpired:
            self._servers.remove(self._local.server)  # it has ended
            self._local.server = None
            status, printed = HUNG, ("", f"still running after {LIMIT:.0f} s")
        return Run(status, *printed, _left([int(path.name) for path in groups.iterdir()]))


def _members(groups: list[int]) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(group) in groups and state != "Z":
            found.append(int(path.parent.name))
    return found


def _left(groups: list[int]) -> list[int]:
    """Processes of these groups that do not end by themselves; they are ended here."""
    until = time.monotonic() + SECONDS_TO_END
    while (left := _members(groups)) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left
