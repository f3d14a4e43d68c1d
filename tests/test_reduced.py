"""What ZeRO-1 and ZeRO-2 hold of gradients while they reduce them: predicted, and watched in DeepSpeed itself."""

import pytest
import torch
import torch.distributed as dist
from live_tensors import Live
from load_benchmark import load_benchmark
from torch.testing._internal.distributed.fake_pg import FakeStore

from helpers.memory.predict import Configuration, ModelShape, Strategy, predict
from helpers.memory.predict.states import largest_trained, states
from helpers.memory.predict.step import LOSS, STEP, Step

# Activations are small beside the embedding, whose 1,024,000 elements are the most of a matrix.
SHAPE = ModelShape(hidden=256, layers=4, heads=4, kv_groups=2, head_dim=64, intermediate=512, vocab=4000)
BELOW, ABOVE = 20_000, 2_000_000


def job(stage, ranks, bucket, overlap=False, offload=False):
    strategy = Strategy(
        f"zero-{stage}", ranks, reduce_bucket_size=bucket, overlap_comm=overlap, offload_optimizer=offload
    )
    return Configuration(SHAPE, None, "bf16", strategy, micro_batch_size=1, sequence_length=64)


@pytest.fixture(scope="module")
def script():
    return load_benchmark("prediction")


@pytest.fixture
def as_rank(monkeypatch, deepspeed_on_the_cpu):
    """This process as a rank of two or as the only one; collectives do nothing."""
    import deepspeed.comm.comm

    def start(rank, ranks):
        monkeypatch.setattr(deepspeed.comm.comm, "cdb", None)  # its backend would be kept for the next test
        for name, value in {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": ranks}.items():
            monkeypatch.setenv(name, str(value))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)

    yield start
    dist.destroy_process_group()


class LiveAndDouble(Live):
    """Also the most bytes of one tensor in fp64."""

    double = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            self.double = max(self.double, out.nbytes)
        return out


def watch(script, c):
    """Train two steps; the peaks of the second above its beginning, the largest fp64 tensor, and the engine."""
    script.prepare_deepspeed(lean=True)
    live = LiveAndDouble()
    with live:
        model = script.build(c, torch.device("cpu"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        engine = script._deepspeed(c, model, optimizer)
        for step in range(2):
            live.peak.clear()
            start, live.phase = live.now, "forward"
            loss = engine(**script.batch(c, step, torch.device("cpu"))).loss
            live.phase = "backward"
            engine.backward(loss)
            live.phase = "step"
            engine.step()
            del loss
    return {phase: peak - start for phase, peak in live.peak.items()}, live.double, engine


@pytest.mark.parametrize(
    ("rank", "c"),
    [
        (0, job(1, 2, BELOW)),
        (0, job(1, 2, BELOW, overlap=True)),
        (1, job(1, 2, ABOVE, overlap=True)),
        (0, job(2, 1, BELOW)),
        (1, job(2, 2, ABOVE)),
    ],
    ids=("1", "1, overlap", "1, overlap, large bucket", "2, alone", "2, large bucket"),
)
def test_the_peak_of_backward_is_that_of_deepspeed(rank, c, script, as_rank):
    as_rank(rank, c.strategy.world_size)
    peaks, _, engine = watch(script, c)
    engine.destroy()
    begun = sum(states(c).resident.values())
    held = {name: sum(items.values()) - items["buffers"] - begun for name, items in Step(c).phases().items()}
    step = held.pop(STEP)
    assert held.pop(LOSS) == pytest.approx(peaks["forward"], rel=0.01)
    assert max(held.values()) == pytest.approx(peaks["backward"], rel=0.02)
    assert step == pytest.approx(peaks["step"], rel=0.01)


def test_an_offloaded_optimizer_leaves_a_buffer_and_a_norm_in_fp64(script, as_rank):
    c = job(2, 2, BELOW, offload=True)
    as_rank(0, 2)
    _, double, engine = watch(script, c)
    buffer = engine.optimizer.temp_grad_buffer_for_gpu_offload
    assert buffer.nbytes == states(c).resident["communication buffers"] == 2 * largest_trained(c)
    assert double == 8 * SHAPE.embedding  # all of it is in the first rank's half
    engine.destroy()
    # The gradient itself is whole beside both.
    assert predict(c).allocated > states(c).resident["parameters"] + buffer.nbytes + (8 + 2) * SHAPE.embedding
