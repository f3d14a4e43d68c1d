"""Score the base model and the tuned one on the same rows, and keep every answer.

    python -m helpers.finetune.evaluate OUTPUT/checkpoint-N DATA_FILE [--max-rows N]

Answers are greedy. Under torchrun each rank answers its share of the prompts.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from helpers.chatglm3.tokenizer import ChatGLMTokenizer
from helpers.errors import UserError, exit_with_one_line, positive_int
from helpers.files import atomic_write
from helpers.finetune.dataset import Limits, decode_text, evaluation_features, read_split
from helpers.finetune.metrics import METRICS, mean_scores, score
from helpers.finetune.recorder import format_time_left
from helpers.finetune.rows import find_split

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Evaluation:
    """Mean scores (0-100) of the base model and of the tuned one on the same ``rows`` answers."""

    rows: int
    base: dict[str, float]
    tuned: dict[str, float]

    def __str__(self) -> str:
        lines = [f"{self.rows:,} answers" + "".join(f"{name:>10}" for name in METRICS)]
        for name, means in (("base", self.base), ("tuned", self.tuned)):
            lines.append(name.ljust(len(lines[0]) - 10 * len(METRICS)) + "".join(f"{means[m]:10.2f}" for m in METRICS))
        return "\n".join(lines)


def evaluate(
    model: PeftModel,
    tokenizer: ChatGLMTokenizer,
    features: Dataset,
    *,
    max_new_tokens: int,
    batch_size: int,
    output_file: Path,
) -> Evaluation | None:
    """Answer ``features`` (of ``evaluation_features``) with and without the adapter, score both, write ``output_file``.

    Every rank has to call it; the result is on rank 0, None elsewhere.
    """
    settings = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    tuned = generate_answers(model, tokenizer, features["prompt_ids"][:], label="tuned model", **settings)
    with model.disable_adapter():
        base = generate_answers(model, tokenizer, features["prompt_ids"][:], label="base model", **settings)
    if tuned is None or base is None:
        return None
    return compare(features, base, tuned, output_file)


def compare(features: Dataset, base: Sequence[str], tuned: Sequence[str], output_file: Path) -> Evaluation:
    """Score two lists of answers to ``features`` and write them, a JSON line each, to ``output_file``."""
    rows = []
    for entry, base_answer, tuned_answer in zip(features, base, tuned, strict=True):
        reference = entry["reference"]
        rows.append(
            {
                "row": entry["number"],
                "prompt": entry["prompt"],
                "reference": reference,
                "base": base_answer,
                "tuned": tuned_answer,
                "base_scores": score(base_answer, reference),
                "tuned_scores": score(tuned_answer, reference),
            }
        )
    write_json_lines(output_file, rows)
    return Evaluation(
        rows=len(rows),
        base=mean_scores([row["base_scores"] for row in rows]),
        tuned=mean_scores([row["tuned_scores"] for row in rows]),
    )


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: ChatGLMTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str,
) -> list[str] | None:
    """Greedy answers to ``prompts`` (token ids), in their order, on rank 0; None on the other ranks.

    Every rank has to call it, with the same arguments. The prompts are sorted by length, so that batches need little
    padding and the first batch is the one that needs most memory, and dealt out to the ranks. Every rank generates
    equally often: one that has fewer prompts repeats some. ``batch_size`` (rows a rank) is halved when the GPU's memory
    runs out. ``label`` begins the lines that tell of the progress.

    Raises UserError if one row alone does not fit.
    """
    if not prompts:
        return [] if _rank() == 0 else None
    world_size = _world_size()
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    padded = list(islice(cycle(longest_first), -(-len(prompts) // world_size) * world_size))
    share = padded[_rank() :: world_size]
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    answers: dict[int, str] = {}
    progress = _Progress(label, len(prompts))
    with _in_evaluation_mode(model):
        done = 0
        while done < len(share):
            batch = share[done : done + batch_size]
            generated = _generate(model, tokenizer, [prompts[i] for i in batch], config)
            if _on_any_rank(generated is None, model.device):
                batch_size = _smaller(len(batch), len(prompts[batch[0]]), max_new_tokens)
                continue
            answers.update(zip(batch, generated, strict=True))
            done += len(batch)
            progress.tell(min(done * world_size, len(prompts)))
    return _gathered(answers, len(prompts))


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``rows``, all of them or none. Raises UserError where they cannot be written."""
    try:
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; make room or choose another folder") from error


def _generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: ChatGLMTokenizer,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
) -> list[str] | None:
    """The answers to one batch, or None if the GPU's memory ran out."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    try:
        ids = model.generate(**batch, generation_config=config, synced_gpus=_must_stay_in_step())
    except torch.OutOfMemoryError as error:
        if _must_stay_in_step():
            # The other ranks wait for this one inside a collective: nothing but the end of the job frees them.
            raise UserError(
                f"rank {_rank()} ran out of GPU memory while it answered {len(prompts)} rows under ZeRO-3; "
                "lower per_device_eval_batch_size"
            ) from error
        ids = None
    if ids is None:
        # Only here, after the exception with its frames is gone, are the batch's tensors free.
        gc.collect()
        torch.cuda.empty_cache()
        return None
    stops = set(config.eos_token_id)
    return [decode_text(tokenizer, _until_stop(row, stops)) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]


def _smaller(batch_size: int, prompt_length: int, max_new_tokens: int) -> int:
    if batch_size == 1:
        raise UserError(
            f"the GPU's memory does not hold one row of {prompt_length} + {max_new_tokens} tokens; "
            "lower max_input_length or generation_config's max_new_tokens"
        )
    if _rank() == 0:
        print(f"evaluation: GPU memory ran out with {batch_size} rows, going on with {batch_size // 2}", flush=True)
    return batch_size // 2


@contextmanager
def _in_evaluation_mode(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Dropout off; gradient checkpointing too, which acts in training mode only and would forbid the KV cache."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Progress:
    """A printed line on rank 0 every few seconds and at the end: readable in terminals, notebooks and log files."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total = label, total
        self._start = self._last = time.monotonic()

    def tell(self, done: int) -> None:
        now = time.monotonic()
        if _rank() != 0 or (now - self._last < SECONDS_BETWEEN_LINES and done < self._total):
            return
        self._last = now
        spent = now - self._start
        left = f", {format_time_left(spent * (self._total - done) / done)}" if done < self._total else ""
        print(f"{self._label}: {done:,} of {self._total:,} answers in {spent:.0f} s{left}", flush=True)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _must_stay_in_step() -> bool:
    """Whether every forward pass is a collective: under ZeRO-3 the ranks gather each layer's weights together."""
    return is_deepspeed_zero3_enabled() and _world_size() > 1


def _on_any_rank(happened: bool, device: torch.device) -> bool:
    if _world_size() == 1:
        return happened
    flag = torch.tensor(int(happened), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _gathered(answers: dict[int, str], count: int) -> list[str] | None:
    """The answers of all ranks, keyed by the prompt's place, as one list on rank 0."""
    parts: list[dict[int, str]] = [answers]
    if _world_size() > 1:
        parts = [{} for _ in range(_world_size())]
        dist.gather_object(answers, parts if _rank() == 0 else None)
    if _rank() != 0:
        return None
    merged = {place: answer for part in parts for place, answer in part.items()}
    return [merged[place] for place in range(count)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m helpers.finetune.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="an adapter that the fine-tune wrote, OUTPUT/checkpoint-N")
    parser.add_argument("data_file", type=Path, help="rows as the fine-tune takes them")
    parser.add_argument("--max-rows", type=positive_int, help="only the first rows")
    parser.add_argument("--batch-size", type=positive_int, default=16)
    parser.add_argument("--max-input-length", type=positive_int, default=256, help="tokens of a prompt (default 256)")
    parser.add_argument("--max-output-length", type=positive_int, default=512, help="tokens of an answer (default 512)")
    arguments = parser.parse_args()

    from helpers.finetune.loading import load_for_inference

    data_file = find_split(arguments.data_file.parent, arguments.data_file.name)
    model, tokenizer = load_for_inference(arguments.checkpoint)
    if not isinstance(model, PeftModel):
        raise UserError(f"{arguments.checkpoint} holds no adapter, so there is no base model to compare with")
    limits = Limits(arguments.max_input_length, arguments.max_output_length)
    split = read_split(data_file, tokenizer, limits, training=False)
    if arguments.max_rows:
        split = replace(split, rows=split.rows.select(range(min(arguments.max_rows, len(split.rows)))))
    output_file = arguments.checkpoint / f"predictions-{data_file.stem}.jsonl"
    evaluation = evaluate(
        model,
        tokenizer,
        evaluation_features(split, tokenizer, limits),
        max_new_tokens=limits.max_output_length,
        batch_size=arguments.batch_size,
        output_file=output_file,
    )
    print(evaluation)
    print(f"every answer is in {output_file}")


if __name__ == "__main__":
    exit_with_one_line(main)
