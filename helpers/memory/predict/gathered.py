"""Follow which matrices ZeRO-3 holds whole during a step, as DeepSpeed gathers, prefetches and frees them.

Read off DeepSpeed 0.19's runtime/zero/partitioned_param_coordinator.py and partition_parameters.py; test_gathered.py
watches DeepSpeed do it. Biases, norms and adapters are left out: most are so small that ZeRO-3 never shards them. So
are modules without a matrix. DeepSpeed prefetches there as well, so it may be some modules further ahead than this.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from helpers.memory.predict.configuration import Configuration

# Parts of a step. The last layer is the one that backward reaches first.
FORWARD, OUTPUT, OUTPUT_BACKWARD, EMBEDDING_BACKWARD = "forward", "output", "output backward", "embedding backward"
LAST, MIDDLE, FIRST = "last layer", "layers between", "first layer"
RECOMPUTED, MLP, ATTENTION = "recomputed", "MLP", "attention"


@dataclass(frozen=True)
class _Use:
    """One module's turn: the part of the step, its matrices, and what may be freed afterwards.

    ``in_any_case`` frees it even if it is used again soon: what checkpointing recomputed with.
    """

    part: str
    matrices: tuple[str, ...]
    freed: tuple[str, ...]
    in_any_case: bool = False


def most_gathered(configuration: Configuration) -> dict[str, int]:
    """Find the most elements that ZeRO-3 holds whole in each part of a step.

    Args:
        configuration: A job under ZeRO-3.

    Returns:
        Elements by part, flat buffers included. Parts of a layer are named "last layer, MLP".
    """
    c = configuration
    sizes = {name: c.shape.embedding for name in ("embedding", "output")}
    for name, (rows, columns) in c.shape.linears.items():
        sizes |= {f"{layer} {name}": rows * columns for layer in range(c.shape.layers)}
    return _Coordinator(c, sizes, list(_uses(c))).run()


def _uses(c: Configuration) -> Iterator[_Use]:
    """Yield the modules of a step in the order of their turns."""

    def use(part: str, *matrices: str) -> _Use:
        return _Use(part, matrices, matrices)

    # A compiled layer is gathered as one (helpers/libraries/deepspeed.py).
    modules: list[list[tuple[str, ...]]] = []
    for number in range(c.shape.layers):
        names = [f"{number} {name}" for name in c.shape.linears]
        modules.append([tuple(names)] if c.compiled else [(name,) for name in names])
    yield use(FORWARD, "embedding")
    for layer in modules:
        yield from (use(FORWARD, *matrices) for matrices in layer)
    yield use(OUTPUT, "output")
    yield use(OUTPUT_BACKWARD, "output")
    for number, layer in reversed(list(enumerate(modules))):
        place = LAST if number == len(modules) - 1 else MIDDLE if number else FIRST
        down, *others = reversed(layer)
        if c.checkpointing:
            yield from _recomputing(f"{place}, {RECOMPUTED}", layer, frozen=c.lora is not None)
        else:
            yield use(f"{place}, {MLP}", *down)
        if c.lora and not c.checkpointing and not number:
            others = others[:2]  # the embedding is frozen, so the first layer's input needs no gradient
        for position, matrices in enumerate(others):
            yield use(f"{place}, {ATTENTION if position else MLP}", *matrices)
    if c.lora is None or c.checkpointing:  # checkpointing makes the embedding's output require a gradient
        yield use(EMBEDDING_BACKWARD, "embedding")


def _recomputing(part: str, layer: list[tuple[str, ...]], *, frozen: bool) -> Iterator[_Use]:
    """Yield the backward of a layer's last module, which recomputes the layer.

    Frozen matrices stay until that backward ends (``update_recompute_parameters``).
    """
    *others, down = layer
    yield _Use(part, down, ())
    for matrices in others:
        yield _Use(part, matrices, () if frozen else matrices)
    everything = tuple(name for matrices in layer for name in matrices)
    yield _Use(part, down, everything if frozen else down, in_any_case=frozen)


class _Coordinator:
    """DeepSpeed's PartitionedParameterCoordinator, once it knows the order of the modules."""

    def __init__(self, c: Configuration, sizes: Mapping[str, int], uses: list[_Use]) -> None:
        self._strategy = c.strategy
        self._sizes, self._uses = sizes, uses
        self._queue = deque((name, place) for place, use in enumerate(uses) for name in use.matrices)
        self._expected: dict[str, int] = {}  # the use up to which a prefetch has looked at a matrix
        self._whole: set[str] = set()
        # Matrices gathered at once share a flat buffer. The first of them to be used copies all of them out of it, and
        # the buffer stays until the last of them has been used (AllGatherCoalescedHandle).
        self._in_flight: list[tuple[set[str], set[str]]] = []
        self._most: dict[str, int] = defaultdict(int)

    def run(self) -> dict[str, int]:
        """Run a step and return the most elements of each part."""
        for place, use in enumerate(self._uses):
            self._gather([name for name in use.matrices if name not in self._available()])
            for name in use.matrices:
                self._wait(name)
                if len(use.matrices) > 1:  # both the flat buffer and the copies exist
                    self._note(use.part)
            self._in_flight = [handle for handle in self._in_flight if handle[1]]
            self._prefetch(place, use)
            self._note(use.part)
            self._free(place + 1, use)
        return dict(self._most)

    def _elements(self, names: Iterable[str]) -> int:
        return sum(self._sizes[name] for name in names)

    def _available(self) -> set[str]:
        return self._whole.union(*(together for together, _ in self._in_flight))

    def _note(self, part: str) -> None:
        held = self._elements(self._whole) + sum(self._elements(together) for together, _ in self._in_flight)
        self._most[part] = max(self._most[part], held)

    def _gather(self, names: list[str]) -> None:
        if len(names) > 1:
            self._in_flight.append((set(names), set(names)))
        else:
            self._whole.update(names)

    def _wait(self, name: str) -> None:
        for together, unused in self._in_flight:
            if name in unused:
                if together == unused:
                    self._whole |= together
                unused.discard(name)

    def _prefetch(self, place: int, use: _Use) -> None:
        new = {name for name in use.matrices if self._expected.get(name, -1) < place}
        seen: set[str] = set()
        while self._queue and len(seen) < len(new):
            seen.add(self._look_ahead())
        available = self._available()
        room = min(self._strategy.max_live_parameters - self._elements(available), self._strategy.prefetch_bucket_size)
        chosen: list[str] = []
        while self._queue and self._elements(chosen) < room:
            name = self._look_ahead()
            if name not in available and name not in chosen:
                chosen.append(name)
        self._gather(chosen)

    def _look_ahead(self) -> str:
        name, place = self._queue.popleft()
        self._expected[name] = max(self._expected.get(name, -1), place)
        return name

    def _free(self, next_place: int, use: _Use) -> None:
        freed = set(use.freed)
        if not use.in_any_case:
            freed -= {name for name in freed if self._expected.get(name, -1) > next_place}
            passed = 0
            for later in self._uses[next_place:]:
                if passed >= self._strategy.max_reuse_distance:
                    break
                freed.difference_update(later.matrices)
                passed += self._elements(later.matrices)
        self._whole -= freed
