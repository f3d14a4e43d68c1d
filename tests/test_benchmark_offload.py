"""The benchmark of offload, on two CPU ranks with a small network: it runs, records, and survives a failure."""

import dataclasses
import json

import pytest
import torch
from load_benchmark import load_benchmark


@pytest.fixture(scope="module")
def script():
    return load_benchmark("offload_6b")


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_the_chunked_loss_is_cross_entropy(script, chunk):
    torch.manual_seed(0)
    hidden = torch.randn(2, 11, 8, requires_grad=True)  # [sequences, tokens, width]
    weight = torch.nn.Parameter(torch.randn(30, 8))
    ids = torch.randint(0, 30, (2, 11))
    expected = torch.nn.functional.cross_entropy((hidden[:, :-1] @ weight.T).flatten(0, 1), ids[:, 1:].flatten())
    (3 * expected).backward()
    gradients = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    found = script.Head(weight, chunk)(hidden, ids)
    (3 * found).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close((hidden.grad, weight.grad), gradients)


@pytest.mark.slow
def test_it_runs_on_a_cpu_and_a_failure_does_not_lose_the_other_settings(script, monkeypatch, tmp_path, capsys):
    path = tmp_path / "offload.json"
    broken = dataclasses.replace(script.SETTINGS["24 GiB budget"], deepspeed="no_such_file.json")
    monkeypatch.setitem(script.SETTINGS, "24 GiB budget", broken)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("sys.argv", ["offload_6b.py", "--tiny", "--adam", "torch", "--results", str(path)])
    with pytest.raises(SystemExit, match="1"):
        script.main()
    entries = json.loads(path.read_text(encoding="utf-8"))["settings"]
    assert [name for name, entry in entries.items() if "failed" in entry] == ["24 GiB budget"]
    for name in ("least memory", "24 GiB budget, by hand"):
        entry = entries[name]
        assert entry["tokens_per_gpu_and_step"] == 2 * 32 * 2 and entry["tokens_per_second_per_gpu"] > 0
        assert all(5 < loss < 8 for rank in entry["ranks"] for loss in rank["losses"])
        assert entry["nvml_peak"] == [None, None]
    assert "no_such_file.json" in capsys.readouterr().out
