"""Score the base model and the tuned one on the same rows, or a whole model by itself, and keep every answer.

    python -m helpers.finetune.evaluate OUTPUT/checkpoint-N DATA_FILE [--max-rows N]

Answers are greedy. Under torchrun or another launcher, each rank answers its share of the prompts on its own GPU.
"""

import argparse
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from helpers.finetune.dataset import Limits, decode_text, evaluation_features, read_split, truncation_notes
from helpers.finetune.launchers import add_local_rank
from helpers.finetune.metrics import Evaluation, compare
from helpers.finetune.ranks import Ranks
from helpers.finetune.recorder import format_time_left
from helpers.finetune.rows import find_split

SECONDS_BETWEEN_LINES = 10.0


def evaluate(
    model: PreTrainedModel | PeftModel,
    tokenizer: ChatGLMTokenizer,
    features: Dataset,
    *,
    max_new_tokens: int,
    batch_size: int,
    output_file: Path,
) -> Evaluation | None:
    """Answer every prompt with and without the adapter, score the answers, and write all of them to a file.

    Every rank has to call it.

    Args:
        model: The adapter on its base; or a whole model, whose base is not here to be compared with.
        tokenizer: The model's.
        features: As :func:`helpers.finetune.dataset.evaluation_features` makes them.
        max_new_tokens: Tokens of an answer, at most.
        batch_size: Prompts per rank that are answered at a time.
        output_file: Gets one line of JSON per prompt.

    Returns:
        The mean scores on rank 0, None on the other ranks.

    Raises:
        UserError: A single prompt does not fit into GPU memory, or the file cannot be written.
    """

    def answers(label: str) -> list[str] | None:
        return generate_answers(
            model,
            tokenizer,
            features["prompt_ids"][:],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            label=label,
        )

    found = {"tuned": answers("tuned model")}
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            found["base"] = answers("base model")
    on_rank_0 = {name: texts for name, texts in sorted(found.items()) if texts is not None}
    return compare(features, on_rank_0, output_file) if on_rank_0 else None


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: ChatGLMTokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str,
) -> list[str] | None:
    """Answer prompts greedily, each rank its share.

    Every rank has to call it, with the same arguments. The prompts are sorted by length: batches then need little
    padding, and the first batch is the one that needs most memory. All ranks generate equally often; one that has fewer
    prompts repeats some.

    Args:
        model: With or without an adapter.
        tokenizer: The model's.
        prompts: Token ids of each prompt.
        max_new_tokens: Tokens of an answer, at most.
        batch_size: Prompts per rank that are answered at a time; halved when GPU memory runs out.
        label: Begins the lines that report progress.

    Returns:
        The answers on rank 0, in the order of the prompts; None on the other ranks.

    Raises:
        UserError: A single prompt does not fit into GPU memory.
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
                batch_size = _halve(len(batch), len(prompts[batch[0]]), max_new_tokens)
                continue
            assert generated is not None  # else it would have been None on any rank
            answers.update(zip(batch, generated, strict=True))
            done += len(batch)
            progress.report(min(done * world_size, len(prompts)))
    return _gathered(answers, len(prompts))


def _generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: ChatGLMTokenizer,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
) -> list[str] | None:
    """Answer one batch; return None if GPU memory ran out."""
    columns = {"input_ids": [list(prompt) for prompt in prompts]}
    batch = tokenizer.pad(columns, padding_side="left", return_tensors="pt").to(model.device)
    network: Any = model  # only the base declares that it can generate; a PeftModel passes the call on
    try:
        ids = network.generate(**batch, generation_config=config, synced_gpus=_must_stay_in_step())
    except torch.OutOfMemoryError as error:
        if _must_stay_in_step():
            # The other ranks wait for this one in a collective, and only the end of the job frees them.
            raise UserError(
                f"rank {_rank()} ran out of GPU memory while it answered {len(prompts)} rows under ZeRO-3; "
                "lower per_device_eval_batch_size"
            ) from error
        ids = None
    if ids is None:
        # The batch's tensors are free only now, after the exception with its frames is gone.
        gc.collect()
        torch.cuda.empty_cache()
        return None
    stops = set(config.eos_token_id)
    return [decode_text(tokenizer, _until_stop(row, stops)) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]


def _halve(batch_size: int, prompt_length: int, max_new_tokens: int) -> int:
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
    """Turn off dropout, and gradient checkpointing, which only acts in training mode and would forbid a KV cache."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Progress:
    """Print a line on rank 0 every few seconds and at the end, readable in terminals, notebooks and log files."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total = label, total
        self._start = self._last = time.monotonic()

    def report(self, done: int) -> None:
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
    """Tell whether every forward pass is a collective: under ZeRO-3, the ranks gather each layer's weights together."""
    return is_deepspeed_zero3_enabled() and _world_size() > 1


def _on_any_rank(happened: bool, device: torch.device) -> bool:
    if _world_size() == 1:
        return happened
    flag = torch.tensor(int(happened), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _gathered(answers: dict[int, str], count: int) -> list[str] | None:
    """Merge the answers of all ranks, keyed by the prompt's index, into one list on rank 0."""
    parts: list[dict[int, str]] = [answers]
    if _world_size() > 1:
        parts = [{} for _ in range(_world_size())]
        dist.gather_object(answers, parts if _rank() == 0 else None)
    if _rank() != 0:
        return None
    merged = {index: answer for part in parts for index, answer in part.items()}
    return [merged[index] for index in range(count)]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m helpers.finetune.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="what the fine-tune wrote, OUTPUT/checkpoint-N")
    parser.add_argument("data_file", type=Path, help="rows as the fine-tune takes them")
    parser.add_argument("--max-rows", type=positive_int, help="only the first rows")
    parser.add_argument("--batch-size", type=positive_int, default=16)
    parser.add_argument("--max-input-length", type=positive_int, default=256, help="tokens of a prompt (default 256)")
    parser.add_argument("--max-output-length", type=positive_int, default=512, help="tokens of an answer (default 512)")
    add_local_rank(parser)
    arguments = parser.parse_args()
    ranks = Ranks.from_environment(init_single_rank_group=False, local_rank=arguments.local_rank)
    try:
        _run(arguments, ranks)
    except UserError as error:
        if ranks.store is None:
            raise
        ranks.exit_with_error(error)  # the others may be in a collective
    if dist.is_initialized():
        dist.barrier()  # rank 0 holds the store that the others need until their end
        dist.destroy_process_group()


def _run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    from helpers.finetune.loading import find_scored, load_for_inference

    data_file = find_split(arguments.data_file.parent, arguments.data_file.name)
    checkpoint = find_scored(arguments.checkpoint)
    model, tokenizer = load_for_inference(checkpoint, device=ranks.join_group())
    limits = Limits(arguments.max_input_length, arguments.max_output_length)
    split = read_split(data_file, tokenizer, limits, training=False)
    if arguments.max_rows:
        split = replace(split, rows=split.rows.select(range(min(arguments.max_rows, len(split.rows)))))
    prompts = evaluation_features(split, tokenizer, limits)
    for line in (str(split.report), *split.report.notes, *truncation_notes(prompts, data_file, limits)):
        ranks.print_once(line)
    output_file = arguments.checkpoint / f"predictions-{data_file.stem}.jsonl"
    evaluation = evaluate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=limits.max_output_length,
        batch_size=arguments.batch_size,
        output_file=output_file,
    )
    ranks.print_once(f"{evaluation}\nevery answer is in {output_file}")


if __name__ == "__main__":
    exit_with_one_line(main)
