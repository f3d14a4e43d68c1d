"""What each rank of a divided model holds: predicted, and counted in a process that plays rank 0 of two."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from helpers.errors import UserError
from helpers.memory.ledger import count_bytes
from helpers.memory.predict import Configuration, ModelShape, Strategy
from helpers.memory.predict.build import build_without_adapter
from helpers.memory.predict.model_parallel import fsdp_rank, pipeline_ranks, tensor_rank
from helpers.memory.saved_tensors import SavedTensors
from helpers.parallel.pipeline import Stage
from helpers.parallel.tensor import parallelize

SHAPE = ModelShape(hidden=128, layers=4, heads=4, kv_groups=2, head_dim=32, intermediate=224, vocab=512)
# In 16 bit without a mask the CPU keeps what a GPU keeps.
JOB = Configuration(SHAPE, lora=None, precision="bf16", micro_batch_size=2, sequence_length=64)
IDS = torch.ones(JOB.micro_batch_size, JOB.sequence_length, dtype=torch.long)


@pytest.fixture
def two_ranks():
    """Collectives do nothing; sizes do not depend on the numbers."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def counted(model):
    """The ledger at the end of forward, once Adam's states exist; without the buffers that every model has."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    with SavedTensors(model) as kept:
        loss = model(input_ids=IDS, labels=IDS).loss
    held = dict(count_bytes(model, optimizer, kept).categories)
    assert loss.requires_grad
    del held["buffers"]
    return held


def same(held, predicted):
    """Each item within 1 %. The ledger finds the logits that the loss keeps among the activations."""
    predicted = dict(predicted)
    predicted["activations"] += predicted.pop("logits and loss")
    for item, size in predicted.items():
        assert held.get(item, 0) == pytest.approx(size, rel=0.01), item


@pytest.mark.parametrize(("sequence_parallel", "gathered_again"), [(False, False), (True, False), (True, True)])
def test_tensor_parallelism(two_ranks, sequence_parallel, gathered_again):
    model = build_without_adapter(JOB, "cpu")
    parallelize(model, sequence_parallel=sequence_parallel, recompute_all_gather=gathered_again)
    options = {"sequence_parallel": sequence_parallel, "recompute_all_gather": gathered_again}
    same(counted(model), tensor_rank(JOB, 2, **options))


def test_fsdp(two_ranks):
    model = build_without_adapter(JOB, "cpu")
    mesh = init_device_mesh("cpu", (2,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    same(counted(model), fsdp_rank(JOB, 2))


def test_pipeline_stages_differ():
    stages = [range(0, 2), range(2, 4)]
    hidden = torch.zeros(*IDS.shape, SHAPE.hidden, dtype=torch.bfloat16, requires_grad=True)
    predicted = pipeline_ranks(JOB, stages, micro_batches=8)
    for number, layers in enumerate(stages):
        stage = Stage(build_without_adapter(JOB, "cpu"), layers)
        with SavedTensors(stage) as kept:
            output = stage(hidden if number else IDS)
        held = predicted[number]
        assert output.requires_grad
        assert held["parameters"] == sum(p.nbytes for p in stage.parameters()) == held["gradients"]
        alive = 2 - number
        assert held["activations"] == pytest.approx(alive * sum(kept.by_module.values()), rel=0.01)
    assert predicted[1]["logits and loss"] > predicted[0]["logits and loss"] == 0


def test_a_single_rank_is_the_whole_model():
    whole = tensor_rank(JOB, 1)
    (stage,) = pipeline_ranks(JOB, [range(4)], micro_batches=1)
    assert whole["parameters"] == stage["parameters"] == 2 * SHAPE.parameters
    assert whole["activations"] - stage["activations"] == 2 * 8 * JOB.tokens  # ids and labels, which no stage keeps


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tensor_rank(Configuration(), 2), "lora=None"),
        (lambda: fsdp_rank(dataclasses.replace(JOB, strategy=Strategy("ddp", 2)), 2), "strategy single"),
        (lambda: fsdp_rank(JOB, 0), "0 ranks"),
        (lambda: pipeline_ranks(JOB, [range(2), range(3, 4)], 1), "not the 4 layers"),
    ],
)
def test_what_is_not_predicted_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
