"""Judge what chapter 09 does at the same time: gradients that leave in backward, and Adam a step late."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from helpers.exercises.answers import Function, alone, exercise
from helpers.exercises.layers import SIZES, Sizes, chain, gradients_of, rows
from helpers.exercises.offload import STEPS, Reference, host_gradients, host_parameters, off_by


class _Log:
    """A log that runs what it notes, and knows whether that was on the side stream."""

    def __init__(self) -> None:
        self.inside, self.streams, self.noted = False, list[Any](), list[bool]()

    def note(self, lane: str, kind: str, text: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """Run the action."""
        self.noted.append(self.inside)
        return action(*arguments)

    @contextmanager
    def side_stream(self, stream: Any) -> Iterator[None]:
        """Take the place of the notebook's function."""
        self.streams.append(stream)
        self.inside = True
        yield
        self.inside = False


def _sent_in_backward(answer: Function, make: Function, sizes: Sizes) -> str | None:
    for stream in (None, object()):
        layers, reference, log, recorded = chain(sizes), chain(sizes), _Log(), list[tuple[int, Any]]()
        parameters, made = list(layers.parameters()), list[int]()
        answer.__globals__["side_stream"] = log.side_stream
        torch.Tensor.record_stream = _into(recorded)  # type: ignore[assignment,method-assign]  # in a rank of its own
        host = make(parameters)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda p, made=made: made.append(p.grad.data_ptr()))
        handles = answer(host, stream, log)
        if not isinstance(handles, list) or len(handles) != len(parameters):
            return "it should return a list with the handle of each hook"
        left: list[int] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda _, left=left, all=layers: left.append(_there(all)))
        for module in (layers, reference):
            module(rows(0, sizes)).square().mean().backward()
        if fault := _fault_of_sending(host, list(gradients_of(reference).values()), left):
            return fault
        if len(log.noted) != len(parameters):
            return f"{len(parameters)} gradients were made, but the log has {len(log.noted)} entries"
        if not all(log.noted) or any(given is not stream for given in log.streams):
            return "a copy is queued outside of side_stream(stream): compute would wait for it"
        if recorded != ([] if stream is None else [(pointer, stream) for pointer in made]):
            return (
                "every gradient, and nothing else, must be recorded on the stream that still reads it, if there is one"
            )
        for handle in handles:
            handle.remove()
        layers(rows(0, sizes)).square().mean().backward()
        if _there(layers) != len(parameters):
            return "after the handles are removed, backward still takes gradients away"
    return None


def _into(recorded: list[tuple[int, Any]]) -> Callable[[torch.Tensor, Any], None]:
    return lambda self, stream: recorded.append((self.data_ptr(), stream))


def _there(layers: torch.nn.Module) -> int:
    return len(gradients_of(layers))


def _fault_of_sending(host: Any, gradients: list[torch.Tensor], left: list[int]) -> str | None:
    if any(left):
        return f"in backward up to {max(left)} gradients are on the device after their hooks: each should leave at once"
    for i, gradient in enumerate(gradients):
        if not off_by(host.staging[i], gradient) < 1e-6:
            return f"after backward, host.staging[{i}] does not have the gradient of parameter {i}"
    return None


@exercise
def send_in_backward(answer: Function, make: Function) -> None:
    """Judge the hooks that send each gradient down while backward goes on.

    Args:
        answer: Takes a host, a stream or None, and a log. Calls side_stream; returns handles.
        make: The class of hosts.
    """
    for sizes in SIZES[:2]:
        alone(_sent_in_backward, answer=answer, make=make, sizes=sizes)


class _Job:
    """A future whose function runs at once or only when somebody waits for it: a thread may do either."""

    def __init__(self, function: Function, arguments: tuple[Any, ...], named: dict[str, Any], at_once: bool) -> None:
        self.run, self.done, self.value = lambda: function(*arguments, **named), False, None
        if at_once:
            self.result()

    def result(self, timeout: float | None = None) -> Any:
        """Run the function, once."""
        if not self.done:
            self.done, self.value = True, self.run()
        return self.value


class _Pool:
    """A pool of one thread at its fastest, or at its slowest."""

    def __init__(self, at_once: bool) -> None:
        self.at_once, self.jobs = at_once, list[_Job]()

    def submit(self, function: Function, /, *arguments: Any, **named: Any) -> _Job:
        """Take a job."""
        self.jobs.append(_Job(function, arguments, named, self.at_once))
        return self.jobs[-1]


class _Bus:
    """The notebook's copies, which happen only when somebody waits for them: a GPU's may last as long."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.early, self.coming, self.copies = False, 0, list[Callable[[], None]]()
        self.down, self.up = names["copy_to_host"], names["copy_to_device"]
        names.update(copy_to_host=self.copy_to_host, copy_to_device=self.copy_to_device, wait=self.wait)

    def copy_to_host(self, host: Any, i: int) -> None:
        """Begin to bring a gradient down."""
        self.coming += 1
        self.copies.append(lambda: self.down(host, i))

    def copy_to_device(self, host: Any, i: int) -> None:
        """Begin to bring a value up, from a tensor into which no gradient may be on its way."""
        self.early |= self.coming > 0
        self.copies.append(lambda: self.up(host, i))

    def wait(self) -> None:
        """Do what has begun."""
        for copy in self.copies:
            copy()
        self.coming, self.copies = 0, []


def _late(answer: Function, make: Function) -> str | None:
    bus = _Bus(answer.__globals__)
    for at_once in (False, True):
        parameters = host_parameters(torch.float32)
        host, pool, running = make(parameters), _Pool(at_once), None
        reference = Reference(host, parameters)
        newest = [p.detach().clone() for p in parameters]
        for step in range(STEPS):
            older = [value.clone() for value in newest]
            gradients = host_gradients(step, torch.float32)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            running = answer(host, pool, running)
            bus.wait()  # the next forward is queued behind the copies
            if bus.early:
                return "host.staging[i] is used for a new value before the copy is complete that brings the gradient"
            if fault := _fault_of_jobs(pool, running, step):
                return fault
            if any(parameter.grad is not None for parameter in parameters):
                return "after the step the device still has a gradient"
            newest = [reference.update(i, gradient).clone() for i, gradient in enumerate(gradients)]
            for i, (parameter, value) in enumerate(zip(parameters, older, strict=True)):
                if not (off := off_by(parameter, value)) < 1e-6:
                    thread = "fast" if at_once else "slow"
                    return (
                        f"with a {thread} thread, after step {step + 1} parameter {i} is off by {off:.2g} from the "
                        "value of one step before"
                    )
        running.result()  # type: ignore[union-attr]  # there was a step
        for i, (master, value) in enumerate(zip(host.masters, newest, strict=True)):
            if not (off := off_by(master, value)) < 1e-6:
                return f"when the last Adam has ended, master {i} is off by {off:.2g}"
    return None


def _fault_of_jobs(pool: _Pool, running: Any, step: int) -> str | None:
    if len(pool.jobs) != step + 1:
        return f"after step {step + 1} the pool has got {len(pool.jobs)} jobs: Adam on all masters is one job per step"
    if running is not pool.jobs[-1]:
        return "it should return what pool.submit returned, for the next step to wait for"
    if not all(job.done for job in pool.jobs[:-1]):
        return "Adam of the step before may still be running while its values are handed out: wait for it"
    if running.done and not pool.at_once:
        return "it waits for the Adam that it has just begun: that one should run during the next forward"
    return None


@exercise
def late_step(answer: Function, make: Function) -> None:
    """Judge a step of the delayed update.

    Args:
        answer: Takes a host whose parameters have gradients, a pool, and the future of the Adam before, or None.
        make: The class of hosts.
    """
    alone(_late, answer=answer, make=make)
