"""The command's table of a divided model."""

import pytest

from helpers.errors import UserError
from helpers.memory.predict.__main__ import main
from helpers.memory.predict.configuration import Configuration
from helpers.memory.predict.divided import divided_ranks

FULL = Configuration(lora=None, precision="bf16", micro_batch_size=1)


def column(lines, name):
    """The numbers of a row."""
    (line,) = [line for line in lines if line.startswith(f"  {name} ")]
    return [float(text) for text in line.split()[len(name.split()) :]]


@pytest.mark.parametrize(("kind", "columns"), [("fsdp2", 1), ("tp", 1), ("pp", 4)])
def test_the_command_prints_each_rank(kind, columns, capsys):
    main(["--full", "--gpus", "4", "--strategy", kind, "--micro-batch-size", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert "on 4 GPUs, bf16, 1 sequences x 768 tokens" in lines[0]
    parameters, states = column(lines, "parameters"), column(lines, "optimizer states")
    assert len(parameters) == columns
    assert sum(parameters) * 4 / columns == pytest.approx(11.63, rel=0.01)  # 6,243,584,000 of 2 bytes
    assert states == pytest.approx([2 * size for size in parameters], abs=0.02)
    gradients = column(lines, "gradients") if kind == "pp" else parameters
    kept = [a + b + c for a, b, c in zip(parameters, states, gradients, strict=True)]
    outside = column(lines, "CUDA context")[0] + column(lines, "NCCL")[0]
    assert column(lines, "end of backward, GiB") == pytest.approx([size + outside for size in kept], abs=0.03)


def test_of_many_stages_the_fullest_and_the_emptiest_are_shown(capsys):
    main(["--full", "--gpus", "14", "--strategy", "pp"])
    lines = capsys.readouterr().out.splitlines()
    most, least = column(lines, "total")
    assert lines[1].split()[-4:-2] == ["rank", "0"] and most > least


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--full"], "divides the model; name the number of GPUs"),
        (["--gpus", "2"], "add --full"),
        (["--gpus", "2", "--full", "--precision", "autocast"], "--precision bf16 or fp32"),
        (["--gpus", "2", "--full", "--checkpointing"], "--checkpointing does not go with --strategy tp"),
        (["--gpus", "2", "--full", "--gpu-memory", "24"], "--gpu-memory does not go with --strategy tp"),
    ],
)
def test_what_it_does_not_predict_is_refused_in_one_line(options, message):
    with pytest.raises(UserError, match=message):
        main([*options, "--strategy", "tp"])


def test_a_stage_keeps_no_more_micro_batches_than_stages_follow():
    def halves(configuration, stages):
        return [range(0, 14), range(14, 28)]

    first, last = divided_ranks(FULL, "pp", 2, halves)
    assert first["activations"] > 1.9 * last["activations"] and last["logits and loss"] > 0
