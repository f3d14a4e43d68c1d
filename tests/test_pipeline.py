"""Pipeline parallelism: schedules as pure data, then every schedule in real processes against a single one."""

from collections import Counter
from itertools import combinations, pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from one_process import FOUR_LAYERS, LENGTH, ROWS, STEPS, device_of, make_optimizer, train_alone
from shared_launch import SharedLaunches, refusals
from torch.distributed.pipelining import PipelineStage, schedules

from helpers.errors import UserError
from helpers.launch import device
from helpers.libraries.deepspeed import configure_deepspeed
from helpers.memory.predict import ModelShape
from helpers.parallel.network import TINY, batch, build, largest_difference, weights
from helpers.parallel.pipeline import (
    SCHEDULES,
    Action,
    Executor,
    ScheduleTimeline,
    Stage,
    build_stages,
    causal_lm_loss,
    gpipe,
    idle_fraction,
    interleaved,
    one_f_one_b,
    partition_layers,
    simulate,
    zero_bubble,
    zero_bubble_idle_fraction,
)
from helpers.parallel.pipeline.deferred_gradients import defer_weight_gradients
from helpers.parallel.pipeline.stages import flops_per_token
from helpers.parallel.pipeline.timeline import Transfer, needs, result, transfer_batches, transfers
from helpers.parallel.traffic import count_traffic

shared = SharedLaunches(__name__)
ranks_and_batches = st.tuples(st.integers(1, 8), st.integers(1, 24))


def seconds(forward: float = 1.0, backward: float = 2.0):
    costs = {"F": forward, "B": backward, "I": backward / 2, "W": backward / 2}
    return lambda action: costs[action.kind]


@st.composite
def any_schedule(draw):
    """Any schedule at any size."""
    ranks, micro_batches = draw(ranks_and_batches)
    kind = draw(st.sampled_from(["GPipe", "1F1B", "interleaved", "zero-bubble"]))
    if kind == "interleaved":
        return interleaved(ranks, ranks * draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    return SCHEDULES[kind](ranks, micro_batches)


@given(any_schedule())
def test_each_stage_does_everything_once_for_each_micro_batch_and_in_order(schedule):
    stages = {action.stage for row in schedule for action in row}
    numbers = {action.micro_batch for row in schedule for action in row}
    assert stages == set(range(max(stages) + 1)) and numbers == set(range(max(numbers) + 1))
    for rank, row in enumerate(schedule):
        assert {action.stage % len(schedule) for action in row} == {rank}
        kinds = "FIW" if any(action.kind == "W" for action in row) else "FB"
        own = [stage for stage in stages if stage % len(schedule) == rank]
        assert Counter(row) == Counter(Action(k, s, n) for k in kinds for s in own for n in numbers)
        place = {action: place for place, action in enumerate(row)}
        for earlier, later in pairwise(kinds):
            assert all(place[Action(earlier, s, n)] < place[Action(later, s, n)] for s in own for n in numbers)


@given(any_schedule(), st.floats(0.1, 10), st.floats(0.1, 10))
def test_no_action_begins_before_what_it_needs_and_no_rank_does_two_at_once(schedule, forward, backward):
    timeline = simulate(schedule, seconds(forward, backward))
    check_causes(timeline, tolerance=1e-9)
    assert [[span.action for span in row] for row in timeline.ranks] == [list(row) for row in schedule]


def check_causes(timeline: ScheduleTimeline, tolerance: float = 0.0):
    last = max(span.action.stage for row in timeline.ranks for span in row)
    ended = {result(span.action): span.end for row in timeline.ranks for span in row if span.action.kind != "W"}
    for row in timeline.ranks:
        assert all(before.end <= after.start + tolerance for before, after in pairwise(row))
        for span in row:
            assert all(ended[need] <= span.start + tolerance for need in needs(span.action, last))


@given(ranks_and_batches, st.floats(0.1, 10), st.floats(0.1, 10))
def test_gpipe_and_1f1b_idle_as_the_formula_says_whatever_backward_costs(size, forward, backward):
    for schedule in (gpipe, one_f_one_b):
        assert simulate(schedule(*size), seconds(forward, backward)).idle == pytest.approx(
            idle_fraction(*size), abs=1e-9
        )


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.floats(0.1, 10), st.floats(0.1, 10))
def test_interleaving_divides_the_bubble_by_the_chunks(ranks, groups, chunks, forward, backward):
    schedule = interleaved(ranks, ranks * groups, chunks)
    formula = idle_fraction(ranks, ranks * groups, chunks)
    assert simulate(schedule, seconds(forward, backward)).idle == pytest.approx(formula, abs=1e-9)


@given(st.integers(1, 8), st.integers(0, 16))
def test_zero_bubble_leaves_a_third_of_the_bubble(ranks, more):
    size = ranks, ranks + more
    idle = simulate(zero_bubble(*size), seconds()).idle
    assert idle == pytest.approx(zero_bubble_idle_fraction(*size), abs=1e-9)
    assert ranks == 1 or idle < idle_fraction(*size)


@given(ranks_and_batches)
def test_zero_bubble_is_never_worse_than_1f1b(size):
    assert simulate(zero_bubble(*size), seconds()).idle <= simulate(one_f_one_b(*size), seconds()).idle + 1e-9


@given(ranks_and_batches)
def test_micro_batches_alive(size):
    ranks, micro_batches = size
    assert simulate(gpipe(*size), seconds()).alive == [micro_batches] * ranks
    assert simulate(one_f_one_b(*size), seconds()).alive == [min(micro_batches, ranks - r) for r in range(ranks)]
    assert simulate(zero_bubble(*size), seconds()).alive == [min(micro_batches, ranks)] * ranks


@given(st.integers(1, 6), st.integers(1, 4), st.integers(2, 4))
def test_interleaving_keeps_somewhat_more_alive(ranks, groups, chunks):
    alive = simulate(interleaved(ranks, ranks * groups, chunks), seconds()).alive
    all_of_them = ranks * groups * chunks
    assert alive == [min(all_of_them, 2 * (ranks - 1 - r) + (chunks - 1) * ranks + 1) for r in range(ranks)]


def test_interleaving_with_one_chunk_is_1f1b():
    assert interleaved(4, 8, chunks=1) == one_f_one_b(4, 8)


@given(any_schedule())
@settings(deadline=None)
def test_batches_are_the_transfers_of_a_rank_in_order_and_join_a_send_with_what_is_needed_next(schedule):
    last = max(action.stage for row in schedule for action in row)
    for rank, actions in enumerate(schedule):
        batches = transfer_batches(schedule, rank)
        own = [transfer for transfer in transfers(schedule) if rank in (transfer.source, transfer.target)]
        assert [transfer for batch in batches for transfer in batch] == own
        place = {result(action): place for place, action in enumerate(actions)}
        for first, *second in batches:
            assert len(second) <= 1
            if second:
                assert first.source == rank == second[0].target
                assert second[0].result in needs(actions[place[first.result] + 1], last)


def test_1f1b_sends_a_gradient_and_receives_the_next_activation_at_once():
    batches = transfer_batches(one_f_one_b(2, 4), 1)
    names = [" ".join(f"{t.result.kind}{t.result.micro_batch}" for t in batch) for batch in batches]
    assert names == ["F0", "F1", "I0", "I1 F2", "I2 F3", "I3"]


@given(any_schedule())
@settings(deadline=None)
def test_ranks_cannot_deadlock_even_where_each_message_waits_for_its_other_side(schedule):
    """Every batch blocks its rank until both sides were at all of its messages: the strictest that a backend can be."""
    ranks, last = range(len(schedule)), max(action.stage for row in schedule for action in row)
    programs = []  # of each rank: actions and batches, in the order in which the executor comes to them
    for rank in ranks:
        pending, program = list(transfer_batches(schedule, rank)), []

        def start_until(wanted, pending=pending, program=program):
            while any(transfer.result in wanted for batch in pending for transfer in batch):
                program.append(pending.pop(0))

        for action in schedule[rank]:
            start_until([need for need in needs(action, last) if need.stage != action.stage])
            program.append(action)
            start_until([result(action)])
        assert not pending
        programs.append(program)
    done: list[set[Action]] = [set() for _ in ranks]
    happened: set[Transfer] = set()

    def advance():
        heads = [program[0] if program else () for program in programs]
        meeting = {t for batch in heads if not isinstance(batch, Action) for t in batch}
        happened.update(t for t in meeting if all(t in heads[rank] for rank in (t.source, t.target)))
        moved = False
        for rank, head in enumerate(heads):
            if isinstance(head, Action):
                assert done[rank].issuperset(needs(head, last))
                done[rank].add(result(head))
            elif not head or not happened.issuperset(head):
                continue
            else:
                assert all(t.result in done[rank] for t in head if t.source == rank)
                done[rank].update(t.result for t in head)
            programs[rank].pop(0)
            moved = True
        return moved

    while advance():
        pass
    assert not any(programs)


F, B = (lambda stage, number, kind=kind: Action(kind, stage, number) for kind in "FB")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([[F(0, 0), B(0, 0)], [B(1, 0), F(1, 0)]], "locks: rank 0 before B0 of stage 0, rank 1 before B0 of stage 1"),
        ([[F(0, 0), B(0, 0)], [F(1, 0)]], "stage 1 does F for micro-batch 0"),
        ([[F(0, 0), B(0, 0), B(0, 0)]], "stage 0 does FBB for micro-batch 0"),
        ([[F(0, 0), B(0, 0)], [F(2, 0), B(2, 0)]], "stage 1 does nothing for micro-batch 0"),
        ([[F(0, 0)], [B(0, 0)]], "stage 0 is on ranks 0 and 1"),
        ([[], []], "no actions"),
    ],
)  # fmt: skip
def test_a_wrong_schedule_is_refused(schedule, message):
    with pytest.raises(UserError, match=message):
        simulate(schedule, seconds())


def test_sizes_that_make_no_schedule_are_refused():
    with pytest.raises(UserError, match=r"6 micro-batches do not divide into groups of 4, .* choose a multiple of 4"):
        interleaved(4, 6)
    for schedule in SCHEDULES.values():
        with pytest.raises(UserError, match="micro_batches is 0"):
            schedule(2, 0)
    with pytest.raises(UserError, match="9 stages of 8 layers; choose 1 to 8"):
        partition_layers(TINY, 9, LENGTH)
    with pytest.raises(UserError, match="0 stages"):
        partition_layers(TINY, 0, LENGTH)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4000), st.integers(1, 64))
def test_the_cut_is_the_best_there_is(layers, stages, vocab, length):
    shape = ModelShape(hidden=64, layers=layers, heads=8, kv_groups=2, head_dim=16, intermediate=216, vocab=vocab)
    stages = min(stages, layers)
    costs = flops_per_token(shape, length)

    def slowest(counts):
        work = [count * costs["layer"] for count in counts]
        work[-1] += costs["head"]
        return max(work)

    found = partition_layers(shape, stages, length)
    assert [layer for part in found for layer in part] == list(range(layers))
    every = ([b - a for a, b in pairwise((0, *ends, layers))] for ends in combinations(range(1, layers), stages - 1))
    assert slowest([len(part) for part in found]) == min(map(slowest, every))


def test_the_output_layer_of_the_6b_model_weighs_more_than_a_layer():
    assert [len(layers) for layers in partition_layers(ModelShape(), 4, 768)] == [7, 7, 8, 6]


def test_stages_compute_what_the_whole_does_under_the_same_names():
    whole = build(TINY)
    ids = batch(TINY, 2, LENGTH)["input_ids"]
    expected = whole(input_ids=ids, labels=ids)
    names = list(weights(whole))
    stages = build_stages(whole, partition_layers(TINY, 3, LENGTH), range(3))
    hidden = ids
    for stage in stages.values():
        hidden = stage(hidden)
    assert torch.equal(hidden, expected.logits)
    assert torch.equal(causal_lm_loss(hidden, ids), expected.loss)
    assert sorted(name for stage in stages.values() for name in weights(stage)) == sorted(names)


def gradients(stage: Stage) -> dict[str, torch.Tensor]:
    grads = {name: parameter.grad for name, parameter in stage.named_parameters()}
    return {name: grad.to("cpu", copy=True) for name, grad in grads.items() if grad is not None}


def test_two_halves_of_a_backward_are_the_whole_one():
    stage = build_stages(build(TINY), partition_layers(TINY, 2, LENGTH), [1])[1]
    x = torch.randn(2, LENGTH, TINY.hidden, generator=torch.Generator().manual_seed(1), requires_grad=True)
    stage(x).square().mean().backward()
    expected = gradients(stage) | {"x": x.grad.clone()}
    stage.zero_grad(), setattr(x, "grad", None)
    with defer_weight_gradients() as deferred:
        y = stage(x)
    y.square().mean().backward()
    assert largest_difference({"x": x.grad}, {"x": expected["x"]}) == 0
    assert not [name for name in gradients(stage) if name.endswith("proj.weight") or "bias" in name or "head" in name]
    deferred.backward_weight()
    assert largest_difference(gradients(stage) | {"x": x.grad}, expected) <= 1e-9
    deferred.backward_weight()  # nothing is added twice
    assert largest_difference(gradients(stage) | {"x": x.grad}, expected) <= 1e-9


def test_a_frozen_matrix_gets_no_gradient_and_still_passes_one_on():
    linear = torch.nn.Linear(3, 2)
    linear.weight.requires_grad_(False)
    x = torch.ones(4, 3, requires_grad=True)
    with defer_weight_gradients() as deferred:
        y = linear(x)
    y.sum().backward()
    deferred.backward_weight()
    assert linear.weight.grad is None and torch.equal(linear.bias.grad, torch.full((2,), 4.0))
    assert torch.equal(x.grad, linear.weight.sum(0).expand(4, 3))


def test_weights_behind_an_input_without_gradient_and_their_hooks_are_served_as_well():
    linear, seen = torch.nn.Linear(3, 2), []
    linear.weight.register_hook(lambda gradient: seen.append(gradient.clone()) or 2 * gradient)
    with defer_weight_gradients() as deferred:
        y = linear(torch.ones(4, 3))
    y.sum().backward()
    assert not seen and linear.weight.grad is None
    deferred.backward_weight()
    assert [gradient.tolist() for gradient in seen] == [[[4.0] * 3] * 2]
    assert torch.equal(linear.weight.grad, torch.full((2, 3), 8.0))


# --- in real processes ---

MICRO_BATCHES = 4


def shape_for(ranks):
    """Two layers for each rank, which the interleaved schedule divides into two stages."""
    return {2: FOUR_LAYERS, 4: TINY}[ranks]


def own_stages(shape, schedule, rank):
    stages = 1 + max(action.stage for row in schedule for action in row)
    return build_stages(
        build(shape, device()), partition_layers(shape, stages, LENGTH), {action.stage for action in schedule[rank]}
    )


def train(stages, step, steps=STEPS):
    """Weights after ``steps`` steps of AdamW, and the last loss; ``step(ids, labels)`` makes gradients."""
    optimizer = make_optimizer([parameter for stage in stages.values() for parameter in stage.parameters()])
    for number in range(steps):
        data = batch(TINY, ROWS, LENGTH, number, device())
        optimizer.zero_grad()
        loss = step(data["input_ids"], data["labels"])
        optimizer.step()
    return {name: tensor for stage in stages.values() for name, tensor in weights(stage).items()}, loss


def train_with(name):
    schedule = SCHEDULES[name](dist.get_world_size(), MICRO_BATCHES)
    stages = own_stages(shape_for(dist.get_world_size()), schedule, dist.get_rank())
    executor = Executor(schedule, stages)
    with count_traffic() as traffic:
        spans = executor.step(*batch(TINY, ROWS, LENGTH, device=device()).values()).spans
    for stage in stages.values():
        stage.zero_grad()
    own, loss = train(stages, lambda ids, labels: executor.step(ids, labels).loss)
    return own, loss, spans, traffic.by_operation()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "name", "case"),
    [
        pytest.param(ranks, name, shared.case(ranks, train_with, name=name), id=f"{ranks}-{name}")
        for ranks in (2, 4)
        for name in SCHEDULES
    ],
)
def test_every_schedule_trains_what_a_single_process_trains(ranks, name, case):
    expected = train_alone(shape_for(ranks), ranks)
    weights_by_rank, losses, spans, traffic = zip(*case.results, strict=True)
    ours = {key: tensor for own in weights_by_rank for key, tensor in own.items()}
    assert largest_difference(ours, expected.weights) <= 1e-6
    assert list(losses) == [None] * (ranks - 1) + [pytest.approx(expected.losses[-1], abs=1e-5)]
    # What was recorded is the schedule, in a possible order.
    timeline = ScheduleTimeline(list(spans))
    schedule = SCHEDULES[name](ranks, MICRO_BATCHES)
    assert [[span.action for span in row] for row in timeline.ranks] == [list(row) for row in schedule]
    check_causes(timeline)
    # Across each boundary: activations one way, their gradients the other, a micro-batch at a time.
    activations = ROWS * LENGTH * TINY.hidden * 4
    boundaries = len({action.stage for row in schedule for action in row}) - 1
    sent = [operations.get("send", (0, 0)) for operations in traffic]
    assert [sum(column) for column in zip(*sent, strict=True)] == [
        2 * boundaries * MICRO_BATCHES,
        2 * boundaries * activations,
    ]
    assert {operation for operations in traffic for operation in operations} == {"send"}


@shared.on(1)
def two_stages_on_one_rank():
    schedule = interleaved(1, 4, chunks=2)
    stages = own_stages(FOUR_LAYERS, schedule, 0)
    executor = Executor(schedule, stages)
    return train(stages, lambda ids, labels: executor.step(ids, labels).loss, steps=2)


@pytest.mark.slow
def test_two_stages_on_one_rank_hand_over_without_sending():
    ours, _ = two_stages_on_one_rank.results[0]
    assert largest_difference(ours, train_alone(FOUR_LAYERS, 1, steps=2).weights) <= 1e-6


@shared.on(4)
def two_pipelines():
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[dist.get_rank() // 2]
    schedule = one_f_one_b(2, 2)
    stages = own_stages(FOUR_LAYERS, schedule, dist.get_rank(group))
    data = batch(TINY, 4, LENGTH, dist.get_rank() // 2, device())
    step = Executor(schedule, stages, group, pace={"F": 0.02}).step(data["input_ids"], data["labels"])
    return step, {name: grad for stage in stages.values() for name, grad in gradients(stage).items()}


@pytest.mark.slow
def test_a_group_is_a_pipeline_of_its_own_and_a_pace_is_kept():
    results = two_pipelines.results
    for pair in range(2):
        whole = build(FOUR_LAYERS, device_of(4))
        loss = whole(**batch(TINY, 4, LENGTH, pair, device_of(4))).loss
        loss.backward()
        assert results[2 * pair + 1][0].loss == pytest.approx(loss.item(), abs=1e-5)
        ours = results[2 * pair][1] | results[2 * pair + 1][1]
        assert largest_difference(ours, gradients(whole)) <= 1e-6
    forward = [span for step, _ in results for span in step.spans if span.action.kind == "F"]
    assert len(forward) == 8 and all(span.end - span.start >= 0.02 for span in forward)


@shared.on(2)
def misfits():
    rank = dist.get_rank()
    schedule = gpipe(2, 3)
    stages = own_stages(FOUR_LAYERS, schedule, rank)
    return refusals(
        lambda: Executor(schedule, stages).step(*batch(TINY, 4, LENGTH).values()),
        lambda: Executor(gpipe(4, 4), stages),
        lambda: Executor(schedule, {rank + 1: stages[rank]}),
        lambda: Executor([row[::-1] for row in schedule], stages),
        lambda: Executor([[], gpipe(1, 3)[0]], {}),
    )


@pytest.mark.slow
def test_what_does_not_fit_together_is_refused():
    assert all(error == "UserError" for rank in misfits.results for error, _ in rank)
    rows, ranks, stages, schedule, idle = (message for _, message in misfits.results[0])
    assert rows == "4 sequences do not divide into 3 micro-batches; change one of the two"
    assert ranks == "the schedule is for 4 ranks but the group has 2; build it for 2"
    assert stages == "rank 0 has the stages [1] but the schedule assigns it [0]"
    assert idle == "the schedule gives rank 0 nothing to do; build it for fewer ranks"
    assert schedule.startswith("the schedule deadlocks: rank 0 before B2 of stage 0")


# --- other people's pipelines, with the same stages ---


def train_with_torch(name):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    kind = getattr(schedules, name)
    count = ranks * (2 if kind is schedules.ScheduleInterleaved1F1B else 1)
    stages = build_stages(
        build(FOUR_LAYERS, device()), partition_layers(FOUR_LAYERS, count, LENGTH), range(rank, count, ranks)
    )
    theirs = [PipelineStage(stage, number, count, device()) for number, stage in stages.items()]
    several = issubclass(kind, schedules.PipelineScheduleMulti)
    schedule = kind(theirs if several else theirs[0], n_microbatches=MICRO_BATCHES, loss_fn=causal_lm_loss)

    def step(ids, labels):
        schedule.step(*([ids] if rank == 0 else []), **({"target": labels} if rank == ranks - 1 else {}))

    return train(stages, step)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(shared.case(2, train_with_torch, name=name), id=name)
        for name in ("ScheduleGPipe", "Schedule1F1B", "ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble")
    ],
)
def test_torchs_schedules_train_the_same(case):
    first, second = case.results
    assert largest_difference(first | second, train_alone(FOUR_LAYERS, 2).weights) <= 1e-6


@shared.on(2, launch="deepspeed")
def train_with_deepspeed():
    configure_deepspeed(device())
    import deepspeed
    from deepspeed.pipe import PipelineModule

    ranks = dist.get_world_size()
    deepspeed.init_distributed(dist_backend=dist.get_backend())
    stages = build_stages(build(FOUR_LAYERS, device()), partition_layers(FOUR_LAYERS, ranks, LENGTH), range(ranks))
    module = PipelineModule(list(stages.values()), num_stages=ranks, loss_fn=causal_lm_loss, partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": ROWS // MICRO_BATCHES,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0,  # 1.0 unless one says so
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=make_optimizer(module.parameters()), config=config)
    for step in range(STEPS):
        data = batch(TINY, ROWS, LENGTH, step, device())
        engine.train_batch(zip(*(data[name].chunk(MICRO_BATCHES) for name in ("input_ids", "labels")), strict=True))
    return {name.partition(".")[2]: tensor for name, tensor in weights(module).items()}  # without the stage's number


@pytest.mark.slow
def test_deepspeeds_engine_trains_the_same():
    first, second = train_with_deepspeed.results
    assert largest_difference(first | second, train_alone(FOUR_LAYERS, 2).weights) <= 1e-6
