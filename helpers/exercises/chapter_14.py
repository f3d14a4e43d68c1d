"""Chapter 14: which tokens are learned, an adapter next to a matrix, packs, and the exercises."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoTokenizer

from helpers.activations.flops import count_flops
from helpers.assets import TINY_MODEL
from helpers.chatglm3.chat import encode_conversation
from helpers.errors import UserError
from helpers.exercises.answers import Function, NotYet, attempt, call, exercise
from helpers.exercises.inputs import random
from helpers.memory.predict import Configuration, Lora, ModelShape, predict
from helpers.memory.predict.jobs import read_job
from helpers.memory.units import GIB

CONFIGS = Path(__file__).parents[2] / "configs"
IGNORED = -100

# --- the chapter's own functions ---


@cache
def _tokenizer() -> Any:
    import helpers.chatglm3  # noqa: F401  # registers the published layout

    return AutoTokenizer.from_pretrained(TINY_MODEL)


CONVERSATIONS = (
    [("user", "裙"), ("assistant", "红色")],
    [("system", "short answers"), ("user", "裤"), ("assistant", "蓝色。"), ("user", "裙"), ("assistant", "")],
    [("user", "裤"), ("assistant", "很美"), ("observation", "42"), ("assistant", "四十二"), ("user", "裙")],
)


@exercise
def encode(answer: Function) -> None:
    """Judge the ids of a conversation, and which of them are learned.

    Args:
        answer: Takes a tokenizer and (role, text) pairs.
    """
    tokenizer = _tokenizer()
    for turns in CONVERSATIONS:
        expected = encode_conversation(tokenizer, [{"role": role, "content": text} for role, text in turns])
        found = call(answer, tokenizer, list(turns))
        where = f"for turns of {', '.join(role for role, _ in turns)}"
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise NotYet("it must return two lists: ids and labels")
        ids, labels = (list(part) for part in found)
        if ids != expected.input_ids:
            pairs = zip(ids, expected.input_ids, strict=False)
            place = next((i for i, (mine, right) in enumerate(pairs) if mine != right), None)
            differs = f"id {place} differs" if place is not None else f"there are {len(ids)} ids"
            raise NotYet(f"{where}, the {len(expected.input_ids)} ids are not right: {differs}")
        if len(labels) != len(ids):
            raise NotYet(f"{where}, there are {len(labels)} labels for {len(ids)} ids")
        for place, (mine, right) in enumerate(zip(labels, expected.labels, strict=True)):
            if mine != right:
                token = tokenizer.convert_ids_to_tokens(ids[place])
                state = "should not be learned" if right == IGNORED else "should be learned, as itself"
                raise NotYet(f"{where}, id {place} ({token}) {state}")


def _adapted(answer: Any, sizes: tuple[int, int, int], shape: Sequence[int]) -> tuple[Any, ...]:
    """Use a layer: the adapter's operations, its output, the gradients, and the merged layer's output."""
    (columns, rows, r), alpha = sizes, 3.0 + sizes[2]
    linear = nn.Linear(columns, rows, bias=r % 2 == 0)
    weight = (random(1, rows, columns) / 50).clone()
    linear.weight.data.copy_(weight)
    place = linear.weight.data_ptr()
    layer = answer(linear, r, alpha)
    layer.A.data.copy_(random(2, r, columns) / 50)
    layer.B.data.copy_(random(3, rows, r) / 50)
    x = random(4, *shape, columns) / 50
    with count_flops() as counter:
        output = layer(x)
    output.backward(random(5, *output.shape) / 50)
    gradients = layer.A.grad, layer.B.grad, linear.weight.grad
    expected = x @ (weight + alpha / r * layer.B.detach() @ layer.A.detach()).T
    expected = expected if linear.bias is None else expected + linear.bias.detach()
    merged = layer.merge()
    in_place = isinstance(merged, nn.Linear) and merged.weight.data_ptr() == place
    return counter.get_total_flops(), output.detach(), expected, gradients, merged, in_place, x


@exercise
def lora_layer(answer: type[nn.Module]) -> None:
    """Judge a frozen linear layer with an adapter, and the merged layer.

    Args:
        answer: Takes a linear layer, r and alpha. Its attributes A and B are the adapter's matrices.
    """
    for sizes, shape in (((6, 5, 2), (3,)), ((40, 30, 1), (2, 4)), ((8, 64, 3), (5,))):
        columns, rows, r = sizes
        flops, output, expected, (a, b, weight), merged, in_place, x = attempt(answer, _adapted, answer, sizes, shape)
        where = f"for a matrix of {rows} x {columns} and r = {r}"
        if output.shape != expected.shape or not torch.allclose(output, expected, atol=1e-4):
            raise NotYet(f"{where}, forward does not return x times the transposed sum of W and alpha / r times B A")
        if a is None or b is None or weight is not None:
            raise NotYet(f"{where}, A and B should get gradients, and the frozen matrix none")
        most = 2 * x.numel() // columns * (rows * columns + r * (rows + columns))
        if flops > most:
            raise NotYet(f"{where}, forward takes {flops:,} operations; {most:,} are enough without a matrix B A")
        if not isinstance(merged, nn.Linear):
            raise NotYet(f"merge returns {type(merged).__name__}, not the linear layer")
        with torch.no_grad():
            if not torch.allclose(merged(x), expected, atol=1e-4):
                raise NotYet(f"{where}, the merged layer does not return what the adapted one did")
        if not in_place:
            raise NotYet(
                "the merged layer is right, but its weight is a second matrix: add to the frozen one, in place"
            )


def _fault_of_pack(
    found: Any, examples: Sequence[tuple[torch.Tensor, torch.Tensor]], capacity: int, pad: int
) -> str | None:
    if not isinstance(found, tuple | list) or len(found) != 4:
        return "it must return four tensors: ids, labels, positions, sees"
    names = ("ids", "labels", "positions", "sees")
    for name, tensor, shape in zip(names, found, 3 * [(capacity,)] + [(capacity, capacity)], strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.shape != shape:
            return f"{name} should be a tensor of shape {list(shape)}"
    ids, labels, positions, sees = found
    lengths = [len(part) for part, _ in examples]
    tokens = sum(lengths)
    if not torch.equal(ids[:tokens], torch.cat([part for part, _ in examples])) or (ids[tokens:] != pad).any():
        return "ids should be those of the examples, in order, and then padding"
    starts = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    owner = torch.tensor([number for number, length in enumerate([*lengths, capacity - tokens]) for _ in range(length)])
    if wrong := (positions != torch.arange(capacity) - torch.tensor(starts)[owner]).nonzero().flatten().tolist():
        return (
            f"token {wrong[0]} has position {positions[wrong[0]]}, but is number {wrong[0] - starts[owner[wrong[0]]]}"
        )
    expected = torch.cat([part for _, part in examples] + [torch.full((capacity - tokens,), IGNORED)])
    first = [start for start in starts if start < capacity]
    if any(labels[start] != IGNORED for start in first):
        return "the first token of an example, or of the padding, is a label: another example would have to predict it"
    expected[first] = IGNORED
    if not torch.equal(labels, expected):
        return "labels should be those of the examples, but for each first token"
    allowed = (owner[:, None] == owner) & torch.ones(capacity, capacity).tril().bool()
    for row, column in (sees.bool() != allowed).nonzero().tolist()[:1]:
        whose = "its own" if owner[row] == owner[column] else "another"
        does = "sees" if sees[row, column] else "does not see"
        return f"token {row} {does} token {column}, of {whose} example"
    return None


@exercise
def pack(answer: Function) -> None:
    """Judge a pack of examples: ids, labels, positions, and which token sees which.

    Args:
        answer: Takes pairs of ids and labels, the tokens per pack, and the id of padding.
    """
    for seed, (lengths, capacity) in enumerate((((3, 4), 9), ((1, 5, 2), 8), ((6,), 7), ((2, 1, 1, 3), 12))):
        examples = [
            (10 + torch.arange(length), 10 + torch.arange(length).roll(seed)) for length in lengths
        ]  # labels that differ from the ids, none of them ignored
        given = [(ids.clone(), labels.clone()) for ids, labels in examples]
        fault = _fault_of_pack(call(answer, given, capacity, 3 + seed), examples, capacity, 3 + seed)
        if fault:
            raise NotYet(f"for examples of {list(lengths)} tokens in a pack of {capacity}, {fault}")
        if not all(torch.equal(mine[1], labels) for mine, (_, labels) in zip(given, examples, strict=True)):
            raise NotYet("it changes the labels of the examples that it gets")


# --- exercises ---


@exercise
def trained_with_o_proj(number: int) -> None:
    """Judge the trained parameters with an adapter of r = 8 on o_proj as well.

    Args:
        number: Trained parameters.
    """
    off = number - Lora(targets=("q_proj", "k_proj", "v_proj", "o_proj")).parameters(ModelShape())
    if off:
        raise NotYet(f"{abs(off):,} too {'many' if off > 0 else 'few'}: in every layer, r (in + out) more")


@exercise
def passes(answer: Callable[[int], float]) -> None:
    """Judge the passes over 114,599 examples in 3,000 steps of 4 examples per GPU.

    Args:
        answer: Takes the number of GPUs.
    """
    for gpus in (1, 2, 8, 5):
        found = call(answer, gpus)
        if found is None:
            raise NotYet(f"for {gpus} GPUs it returns nothing")
        ratio = found / (3000 * 4 * gpus / 114_599)
        if not abs(ratio - 1) < 0.06:
            raise NotYet(f"for {gpus} GPUs, {found:.3g} passes are {ratio:.2f} times the right number")


@exercise
def second_answer(conversation: Sequence[dict[str, Any]]) -> None:
    """Judge a conversation of which only the second answer is learned.

    Args:
        conversation: The messages.
    """
    said = [(message.get("role"), message.get("content")) for message in conversation]
    if said != [("user", "裙"), ("assistant", "红色"), ("user", "裤"), ("assistant", "蓝色")]:
        raise NotYet("the four messages must stay as they are: the model should read them all")
    marks = encode_conversation(_tokenizer(), conversation)
    learned = _tokenizer().decode([i for i, trained in zip(marks.input_ids, marks.trained, strict=True) if trained])
    for text, wanted in (("红色", False), ("蓝色", True)):
        if (text in learned) != wanted:
            raise NotYet(f"{text} is {'not' if wanted else 'still'} learned")


def _predicted(line: Mapping[str, Any], deepspeed: str | None, gpus: int) -> float:
    """Predict lora.yaml with one more line, in GiB on each GPU."""
    content = yaml.safe_load((CONFIGS / "lora.yaml").read_text(encoding="utf-8"))
    before = _job(content, None, gpus)
    top = {name: value for name, value in line.items() if name in {*content, "quantization_bit", "speed"}}
    content |= top
    content["training_args"] |= {name: value for name, value in line.items() if name not in top}
    job = _job(content, deepspeed, gpus)
    if (job.micro_batch_size, job.sequence_length) != (before.micro_batch_size, before.sequence_length):
        raise NotYet("the batch and the length of the examples must stay as they are")
    return predict(job).total / GIB


def _job(content: Mapping[str, Any], deepspeed: str | None, gpus: int) -> Configuration:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        file = CONFIGS / Path(deepspeed).name if deepspeed else None
        return read_job(path, file, shape=ModelShape(), world_size=gpus, sequence_length=None)


@exercise
def fit_it(line: str, deepspeed: str) -> None:
    """Judge the line that makes lora.yaml fit a small GPU, and the file that makes it fit two smaller ones.

    Args:
        line: The line of the YAML file.
        deepspeed: Name of a file in configs.
    """
    settings = yaml.safe_load(line)
    if not isinstance(settings, dict) or len(settings) != 1:
        raise NotYet(f"{line!r} is not one line with a key and a value")
    try:
        for file, gpus, most in ((None, 1, 15), (deepspeed, 2, 11)):
            if (size := _predicted(settings, file, gpus)) > most:
                where = f"{gpus} GPUs with {deepspeed}" if file else "one GPU"
                raise NotYet(f"on {where} the job needs {size:.1f} GiB of {most}, by the prediction")
    except UserError as error:
        raise NotYet(str(error)) from None
