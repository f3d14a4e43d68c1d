"""How long a step takes on a mesh, by formula, and which mesh is the fastest that fits.

Every link has a latency and a bandwidth; what ranks send does not overlap with what they compute. So a prediction is an
upper bound where a library overlaps, and it is meant for comparing meshes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from helpers.errors import UserError
from helpers.memory.predict import Configuration, ModelShape
from helpers.memory.predict.saved_tensors import layer, total
from helpers.parallel.mesh import Layout
from helpers.parallel.pipeline import cut
from helpers.parallel.pipeline.stages import part_costs

HALF = 2  # bytes of a 16-bit number


@dataclass(frozen=True)
class Link:
    """Between two ranks: ``latency`` in seconds a message, ``bandwidth`` in bytes a second, one way, for each rank."""

    latency: float
    bandwidth: float

    def send(self, nbytes: float) -> float:
        """Seconds of one message."""
        return self.latency + nbytes / self.bandwidth

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Seconds of a ring (Thakur et al. 2005): 2(n - 1) messages of a part each."""
        return 2 * (ranks - 1) * self.send(nbytes / ranks)


@dataclass(frozen=True)
class Cluster:
    """``ranks`` cards, ``per_node`` to a node; ``flops`` that a card sustains, ``memory`` in bytes that it has."""

    ranks: int
    per_node: int
    flops: float
    memory: float
    inside: Link
    across: Link

    def link(self, layout: Layout, axis: str) -> Link:
        """What an axis of the layout runs over: the fast link only where each of its groups lies in one node."""
        nodes = [{rank // self.per_node for rank in group} for group in layout.groups(axis)]
        return self.inside if all(len(of_group) == 1 for of_group in nodes) else self.across


@dataclass(frozen=True)
class Job:
    """A step of ``rows`` x ``length`` tokens, ``micro_rows`` at once, all parameters trained in mixed precision.

    ``element`` is the bytes of an activation and of a gradient. ``checkpointing`` computes each layer's forward twice.
    ``zero_1`` divides the optimizer's states among the data parallel ranks.
    """

    shape: ModelShape
    rows: int
    length: int
    micro_rows: int = 1
    element: int = HALF
    checkpointing: bool = False
    zero_1: bool = False


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step of ``layout`` by cause, and bytes that the fullest rank needs."""

    layout: Layout
    compute: float
    tensor: float
    pipeline: float
    data: float
    bubble: float
    memory: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.tensor + self.pipeline + self.data + self.bubble

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by cause."""
        return {name: getattr(self, name) for name in ("compute", "tensor", "pipeline", "data", "bubble")}


def estimate(job: Job, cluster: Cluster, layout: Layout) -> Estimate:
    """A step under 1F1B, by the slowest stage.

    A micro-batch costs its FLOP (3 times forward's, 4 with checkpointing), in each layer 4 all-reduces of tensor
    parallelism (6), and one message each way between stages. The bubble is p - 1 micro-batches (Narayanan et al. 2021,
    section 2.2). At the end gradients are all-reduced.

    Raises :class:`UserError` where layers, heads, groups or rows do not divide by the layout.
    """
    shape, t, p, d = job.shape, layout.tensor, layout.pipeline, layout.data
    problem = _problem(job, cluster, layout)
    if problem:
        raise UserError(f"{layout}: {problem}")
    micro_batches = job.rows // (d * job.micro_rows)
    tokens = job.micro_rows * job.length
    message = tokens * shape.hidden * job.element
    stages, costs = cut(shape, p, job.length), part_costs(shape, job.length)
    work = [len(stage) * costs["layer"] for stage in stages]
    work[-1] += costs["head"]
    layers = max(len(stage) for stage in stages)
    compute = (4 if job.checkpointing else 3) * max(work) * tokens / t / cluster.flops
    tensor = (6 if job.checkpointing else 4) * layers * cluster.link(layout, "tensor").all_reduce(message, t)
    pipeline = 2 * cluster.link(layout, "pipeline").send(message) if p > 1 else 0.0
    held = [len(stage) * shape.layer_parameters for stage in stages]
    held[0] += shape.embedding
    held[-1] += (0 if shape.tied and p == 1 else shape.embedding) + shape.hidden
    gradients = max(held) / t * job.element
    return Estimate(
        layout,
        compute=micro_batches * compute,
        tensor=micro_batches * tensor,
        pipeline=micro_batches * pipeline,
        data=cluster.link(layout, "data").all_reduce(gradients, d),
        bubble=(p - 1) * (compute + tensor + pipeline),
        memory=max(held) / t * (2 + 2 + 12 / (d if job.zero_1 else 1))
        + _activations(job, layers, min(p, micro_batches), t),
    )


def rank_layouts(job: Job, cluster: Cluster) -> list[Estimate]:
    """Every layout that divides the job, those that fit the cards first, of these the fastest first."""
    found = [estimate(job, cluster, layout) for layout in layouts(cluster.ranks) if not _problem(job, cluster, layout)]
    return sorted(found, key=lambda e: (e.memory > cluster.memory, e.seconds))


def layouts(ranks: int) -> Iterator[Layout]:
    """All ways to write ``ranks`` as data x pipeline x tensor."""
    for tensor in _divisors(ranks):
        for pipeline in _divisors(ranks // tensor):
            yield Layout(ranks // tensor // pipeline, pipeline, tensor)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _problem(job: Job, cluster: Cluster, layout: Layout) -> str | None:
    shape, t = job.shape, layout.tensor
    if layout.ranks != cluster.ranks:
        return f"needs {layout.ranks} ranks, the cluster has {cluster.ranks}"
    if layout.pipeline > shape.layers:
        return f"more stages than the {shape.layers} layers"
    if shape.heads % t or (shape.kv_groups % t and t % shape.kv_groups):
        return f"{shape.heads} heads or {shape.kv_groups} groups of keys do not divide by {t}"
    if job.rows % (layout.data * job.micro_rows):
        return f"{job.rows} rows do not divide by {layout.data} data ranks times {job.micro_rows} rows"
    return None


def _activations(job: Job, layers: int, alive: int, tensor: int) -> float:
    """Bytes kept by a stage of ``layers`` for ``alive`` micro-batches, with sequence parallelism (all of it / tensor).

    With checkpointing each layer keeps its input, and one layer at a time all the rest.
    """
    kept = total(layer(Configuration(job.shape, lora=None, rows=job.micro_rows, length=job.length))) / tensor
    if not job.checkpointing:
        return alive * layers * kept
    return alive * layers * job.micro_rows * job.length * job.shape.hidden * job.element / tensor + kept
