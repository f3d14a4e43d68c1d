"""One launch of ranks for many tests: starting ranks takes longer than what most tests compute in them."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import torch
from conftest import LIMIT

from helpers.launch import RankError, run

# Ranks get the functions of this file, and of test files, with their code: importing them would import pytest as well.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Case:
    """A function that ranks execute, together with the other cases of its launch."""

    def __init__(self, cases: list["Case"], nprocs: int, fn: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self._cases, self._nprocs, self._fn, self._arguments = cases, nprocs, fn, arguments
        self._results: list[Any] | None = None
        self._error: RankError | None = None

    @property
    def results(self) -> list[Any]:
        """What the function returned, by rank. The first case that is asked for launches all of them.

        If one of them fails there are no results of any, and every test that asks gets the error, which names the line.
        """
        if self._results is None and self._error is None:
            self._launch_all()
        if self._error is not None:
            raise self._error
        return self._results

    def _launch_all(self) -> None:
        calls = [(case._fn, case._arguments) for case in self._cases]
        try:
            by_rank = run(_call_each, self._nprocs, timeout=LIMIT, calls=calls).results
        except RankError as error:
            for case in self._cases:
                case._error = error
            return
        for number, case in enumerate(self._cases):
            case._results = [results[number] for results in by_rank]


def _call_each(calls: Sequence[tuple[Callable[..., Any], dict[str, Any]]]) -> list[Any]:
    torch.set_num_threads(1)
    return [fn(**arguments) for fn, arguments in calls]


class SharedLaunches:
    """The cases of one test file: one launch for each number of ranks, when the first result is asked for.

    A case is planned when the file is imported, and read in its test::

        shared = SharedLaunches(__name__)

        @shared.on(2)
        def rank_and_size():
            return dist.get_rank(), dist.get_world_size()

        def test_ranks_know_their_number():
            assert rank_and_size.results == [(0, 2), (1, 2)]
    """

    def __init__(self, module: str) -> None:
        cloudpickle.register_pickle_by_value(sys.modules[module])
        self._cases: dict[object, list[Case]] = {}

    def case(self, nprocs: int, fn: Callable[..., Any], *, launch: str = "", **arguments: Any) -> Case:
        """Plan ``fn(**arguments)`` on ``nprocs`` ranks; cases with another ``launch`` get other processes."""
        cases = self._cases.setdefault((nprocs, launch), [])
        cases.append(Case(cases, nprocs, fn, arguments))
        return cases[-1]

    def on(self, nprocs: int, *, launch: str = "", **arguments: Any) -> Callable[[Callable[..., Any]], Case]:
        """Plan the decorated function."""
        return lambda fn: self.case(nprocs, fn, launch=launch, **arguments)


def refusals(*attempts: Callable[[], object]) -> list[tuple[str, str]]:
    """In a rank: type and message of what each of ``attempts`` raises; ("", "") if it raises nothing."""
    found = []
    for attempt in attempts:
        try:
            attempt()
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        else:
            found.append(("", ""))
    return found


def backward_that_breaks_off(model: torch.nn.Module, inputs: dict[str, Any]) -> None:
    """In a rank: backward that has made some gradients when it raises."""

    def fail(gradient: torch.Tensor) -> None:
        raise RuntimeError("out of memory, say")

    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)
    loss = model(**inputs).loss
    hook.remove()
    loss.backward()
