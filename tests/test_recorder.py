"""What a fine-tune prints while it runs."""

from helpers.finetune.recorder import progress_line


def test_the_progress_line_tells_loss_speed_memory_and_time_left():
    record = {"step": 10, "loss": 3.4212, "learning_rate": 5e-5, "grad_norm": 0.5, "tokens_per_second": 12345.6}
    record |= {"nvml_used_gib": [17.23, 16.9], "resident_gib": [3.0, 3.0]}
    line = progress_line(record, max_steps=3000, seconds_left=3725)
    for part in ("step 10/3000", "loss 3.421", "12,346 tokens/s", "NVML 17.2 / 16.9 GiB", "1:02:05 left"):
        assert part in line
    on_cpu = progress_line(record | {"nvml_used_gib": [None, None]}, 3000, None)
    assert "resident 3.0 / 3.0 GiB" in on_cpu and "NVML" not in on_cpu
