"""The table of what fewer bits cost has every format, and speeds only if there are some."""

import copy

from helpers.finetune.fewer_bits import fewer_bits_table, means, measured_runs, spread
from helpers.finetune.results import FEWER_BITS, SPEED_RESULTS, read_results


def run(name, seed, loss, rouge):
    return {"format": name, "seed": seed, "dev_loss": [9.0, loss], "scores": {"rouge-l": rouge}} | {
        "base_scores": {"rouge-l": 1.0}
    }


RESULTS = {
    "runs": {
        f"{name}, seed {seed}": run(name, seed, loss + seed, 50.0 + seed)
        for name, loss in (("not rounded", 1.0), ("fp8", 1.1), ("4 bits", 2.0))
        for seed in (0, 1)
    }
}


def test_seeds_are_averaged_and_losses_compared_with_the_first_format():
    assert means(RESULTS)["fp8"] == {"dev_loss": 1.6, "rouge-l": 50.5, "base rouge-l": 1.0}
    assert spread(RESULTS) == 1 / 1.5
    speed = {"runs": {}}
    table = fewer_bits_table(RESULTS, speed)
    assert [row[0] for row in table.rows] == ["not rounded", "fp8", "4 bits"]
    assert [row[2] for row in table.rows] == ["+0.00%", "+6.67%", "+66.67%"] and len(table.header) == 5


def test_speeds_are_those_of_runs_that_differ_in_the_format_only():
    speed = copy.deepcopy(read_results(SPEED_RESULTS))
    fast = speed["runs"]["lora_fast.yaml: packing, compiled layers"]
    rounded = fast | {"config": "lora_fp8.yaml", "tokens_per_second_per_gpu": 30000.0}
    speed["runs"] = {label: run for label, run in speed["runs"].items() if run["config"] != "lora_fp8.yaml"}
    assert measured_runs(speed) == {"not rounded": fast}
    speed["runs"] |= {
        "two packs": rounded | {"training": {"per_device_train_batch_size": 2}},
        "two GPUs": rounded | {"ranks": 2},
        "fp8": rounded,
    }
    assert measured_runs(speed) == {"not rounded": fast, "fp8": rounded}
    table = fewer_bits_table(RESULTS, speed)
    assert "30,000 (" in table.rows[1][5] and table.rows[2][5:] == ["not measured", ""]


def test_the_committed_runs_say_what_chapters_12_and_14_read_from_them():
    results = read_results(FEWER_BITS)
    found = means(results)
    first = found["not rounded"]["dev_loss"]
    changes = {name: abs(mean["dev_loss"] / first - 1) for name, mean in found.items()}
    assert max(changes["fp8"], changes["8 bits"]) < spread(results) < changes["4 bits"] / 2
    scores = [mean["rouge-l"] for mean in found.values()]
    assert max(scores) - min(scores) < 2
    assert {run["answers"] for run in results["runs"].values()} == {240}
