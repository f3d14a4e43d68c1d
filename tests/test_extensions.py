"""Extensions that DeepSpeed compiles: said beforehand, and a lock that was left over is named."""

import pytest

from helpers.errors import UserError
from helpers.finetune.extensions import check_extensions, needed_extensions

OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (None, []),
        ({}, []),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}}, []),
        (OFFLOAD, ["cpu_adam"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ["cpu_adam", "async_io"]),
    ],
)
def test_what_will_be_compiled(config, names):
    assert needed_extensions(config) == names


def test_a_lock_that_was_left_over_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert ["compiling DeepSpeed's cpu_adam" in note for note in check_extensions(OFFLOAD)] == [True]
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    (folder / "lock").touch()
    with pytest.raises(UserError, match=r"cpu_adam/lock is left over .*delete it"):
        check_extensions(OFFLOAD, patience=0.01)
    assert check_extensions({}) == []
    (folder / "lock").unlink()
    (folder / "cpu_adam.so").touch()
    assert check_extensions(OFFLOAD) == []
