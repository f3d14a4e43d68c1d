"""Predict how long a step takes on a mesh, and which mesh is the fastest that fits.

Every link has a latency and a bandwidth; communication does not overlap with computation. So a prediction is an upper
bound for libraries that overlap, and it is meant for comparing meshes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from helpers.errors import UserError
from helpers.memory.predict import Configuration, ModelShape
from helpers.memory.predict.saved_tensors import saved_by_layer, total_bytes
from helpers.parallel.mesh import Layout
from helpers.parallel.pipeline import partition_layers
from helpers.parallel.pipeline.stages import flops_per_token

HALF_BYTES = 2  # bytes of a 16-bit number


@dataclass(frozen=True)
class Link:
    """A link between two ranks.

    Attributes:
        latency: Seconds per message.
        bandwidth: Bytes per second that each rank can send, one way.
    """

    latency: float
    bandwidth: float

    def send(self, nbytes: float) -> float:
        """Predict the time of one message.

        Args:
            nbytes: Bytes of the message.

        Returns:
            Seconds.
        """
        return self.latency + nbytes / self.bandwidth

    def all_reduce(self, nbytes: float, world_size: int) -> float:
        """Predict the time of a ring all-reduce: 2(n - 1) messages of 1/n of the tensor (Thakur et al. 2005).

        Args:
            nbytes: Bytes of the full tensor.
            world_size: Ranks in the ring.

        Returns:
            Seconds; 0 for a single rank.
        """
        return 2 * (world_size - 1) * self.send(nbytes / world_size)


@dataclass(frozen=True)
class Cluster:
    """The GPUs and links that a job runs on.

    Attributes:
        world_size: Number of GPUs, one per rank.
        gpus_per_node: Ranks that share a node: 0 to gpus_per_node - 1, and so on.
        flops: FLOP per second that a GPU sustains.
        memory: Bytes per GPU.
        intra_node: Link between GPUs of one node.
        inter_node: Link between nodes.
    """

    world_size: int
    gpus_per_node: int
    flops: float
    memory: float
    intra_node: Link
    inter_node: Link

    def link(self, layout: Layout, axis: str) -> Link:
        """Find the link that an axis runs over: the fast one only if each of its groups is within one node.

        Args:
            layout: Size of each axis.
            axis: "data", "pipeline" or "tensor".

        Returns:
            ``intra_node`` or ``inter_node``.
        """
        nodes = [{rank // self.gpus_per_node for rank in group} for group in layout.groups(axis)]
        return self.intra_node if all(len(nodes_of_group) == 1 for nodes_of_group in nodes) else self.inter_node


@dataclass(frozen=True)
class TrainingJob:
    """A step that trains all parameters in mixed precision.

    Attributes:
        shape: Of the model.
        batch_size: Rows per step on all ranks together.
        sequence_length: Tokens per row.
        micro_batch_size: Rows that run at once on a data parallel rank.
        element_bytes: Bytes per activation and per gradient element.
        checkpointing: Whether backward recomputes each layer's forward.
        zero_1: Whether data parallel ranks shard the optimizer states (ZeRO-1).
    """

    shape: ModelShape
    batch_size: int
    sequence_length: int
    micro_batch_size: int = 1
    element_bytes: int = HALF_BYTES
    checkpointing: bool = False
    zero_1: bool = False


@dataclass(frozen=True)
class Estimate:
    """A predicted step: seconds by cause, and the memory of the fullest rank.

    Attributes:
        layout: Size of each axis.
        compute: Seconds of forward and backward.
        tensor: Seconds of tensor parallelism's all-reduces.
        pipeline: Seconds of messages between stages.
        data: Seconds of the gradients' all-reduce.
        bubble: Seconds that a stage waits for its neighbours.
        memory: Bytes of model states and activations.
    """

    layout: Layout
    compute: float
    tensor: float
    pipeline: float
    data: float
    bubble: float
    memory: float

    @property
    def seconds(self) -> float:
        """Seconds of the full step."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by cause."""
        return {name: getattr(self, name) for name in ("compute", "tensor", "pipeline", "data", "bubble")}


def estimate(job: TrainingJob, cluster: Cluster, layout: Layout) -> Estimate:
    """Predict a step under the 1F1B schedule by its slowest stage.

    A micro-batch costs its FLOP (3 times forward's, 4 with checkpointing), 4 all-reduces of tensor parallelism per
    layer (6 with checkpointing; Shoeybi et al. 2019, section 3), and one message each way between stages. The bubble is
    p - 1 micro-batches (Narayanan et al. 2021, section 2.2). At the end gradients are all-reduced.

    Args:
        job: What is trained.
        cluster: On which GPUs.
        layout: Size of each axis.

    Returns:
        Seconds by cause, and bytes of the fullest rank.

    Raises:
        UserError: If layers, heads, key groups or rows do not divide by the layout.
    """
    problem = _find_problem(job, cluster, layout)
    if problem:
        raise UserError(f"{layout}: {problem}")
    shape, t, p, d = job.shape, layout.tensor, layout.pipeline, layout.data
    micro_batches = job.batch_size // (d * job.micro_batch_size)
    tokens = job.micro_batch_size * job.sequence_length
    message = tokens * shape.hidden * job.element_bytes  # bytes of the hidden states [tokens, hidden]
    stages, costs = partition_layers(shape, p, job.sequence_length), flops_per_token(shape, job.sequence_length)

    stage_flop = [len(stage) * costs["layer"] for stage in stages]  # forward FLOP per token
    stage_flop[-1] += costs["head"]
    most_layers = max(len(stage) for stage in stages)
    compute = (4 if job.checkpointing else 3) * max(stage_flop) * tokens / t / cluster.flops
    tensor = (6 if job.checkpointing else 4) * most_layers * cluster.link(layout, "tensor").all_reduce(message, t)
    pipeline = 2 * cluster.link(layout, "pipeline").send(message) if p > 1 else 0.0

    stage_parameters = [len(stage) * shape.layer_parameters for stage in stages]
    stage_parameters[0] += shape.embedding
    # A tied head is the embedding itself if both are in one stage, a copy of it otherwise. The last norm comes on top.
    stage_parameters[-1] += (0 if shape.tied and p == 1 else shape.embedding) + shape.hidden
    rank_parameters = max(stage_parameters) / t
    # Bytes per parameter: 2 weight, 2 gradient, 12 fp32 master and Adam's moments (Rajbhandari et al. 2019, section 3).
    model_states = rank_parameters * (2 + 2 + 12 / (d if job.zero_1 else 1))
    return Estimate(
        layout,
        compute=micro_batches * compute,
        tensor=micro_batches * tensor,
        pipeline=micro_batches * pipeline,
        data=cluster.link(layout, "data").all_reduce(rank_parameters * job.element_bytes, d),
        bubble=(p - 1) * (compute + tensor + pipeline),
        # Under 1F1B the first stage keeps the activations of at most p micro-batches.
        memory=model_states + _activation_bytes(job, most_layers, min(p, micro_batches), t),
    )


def sort_layouts(job: TrainingJob, cluster: Cluster) -> list[Estimate]:
    """Predict every layout that divides the job, and sort them: those that fit the GPUs first, the fastest first.

    Args:
        job: What is trained.
        cluster: On which GPUs.

    Returns:
        One estimate per layout.
    """
    candidates = [layout for layout in layouts(cluster.world_size) if not _find_problem(job, cluster, layout)]
    estimates = [estimate(job, cluster, layout) for layout in candidates]
    return sorted(estimates, key=lambda e: (e.memory > cluster.memory, e.seconds))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Compare two orders by Spearman's rho, without ties: 1 if they agree, 0 if unrelated, -1 if reversed.

    Args:
        first: One number per candidate, at least two.
        second: The other number of the same candidates.

    Returns:
        1 - 6 sum(d^2) / (n (n^2 - 1)), where d is how many places a candidate moves.
    """
    places = [
        {index: place for place, index in enumerate(sorted(range(len(x)), key=x.__getitem__))} for x in (first, second)
    ]
    moved = sum((places[0][index] - places[1][index]) ** 2 for index in range(len(first)))
    return 1 - 6 * moved / (len(first) * (len(first) ** 2 - 1))


def layouts(world_size: int) -> Iterator[Layout]:
    """Yield all ways to write ``world_size`` as data x pipeline x tensor."""
    for tensor in _divisors(world_size):
        for pipeline in _divisors(world_size // tensor):
            yield Layout(world_size // tensor // pipeline, pipeline, tensor)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _find_problem(job: TrainingJob, cluster: Cluster, layout: Layout) -> str | None:
    shape, t = job.shape, layout.tensor
    if layout.world_size != cluster.world_size:
        return f"needs {layout.world_size} ranks, the cluster has {cluster.world_size}"
    if layout.pipeline > shape.layers:
        return f"more stages than the {shape.layers} layers"
    if shape.heads % t or (shape.kv_groups % t and t % shape.kv_groups):
        return f"{shape.heads} heads or {shape.kv_groups} groups of keys do not divide by {t}"
    if job.batch_size % (layout.data * job.micro_batch_size):
        return f"{job.batch_size} rows do not divide by {layout.data} data ranks times {job.micro_batch_size} rows"
    return None


def _activation_bytes(job: TrainingJob, layers: int, micro_batches: int, tensor: int) -> float:
    """Predict the activations of a stage of ``layers`` that holds ``micro_batches`` at once.

    Sequence parallelism is assumed, so that all of them are divided by ``tensor``. With checkpointing each layer keeps
    its input, and one layer at a time all the rest.
    """
    configuration = Configuration(
        job.shape, lora=None, micro_batch_size=job.micro_batch_size, sequence_length=job.sequence_length
    )
    per_layer = total_bytes(saved_by_layer(configuration)) / tensor
    if not job.checkpointing:
        return micro_batches * layers * per_layer
    tokens = job.micro_batch_size * job.sequence_length
    return micro_batches * layers * tokens * job.shape.hidden * job.element_bytes / tensor + per_layer
