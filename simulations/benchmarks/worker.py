"""Steps of one method in a process of its own.

Methods take turns, so that all of them see the same disturbances of the machine; and each has its own process, so that
none of them inherits another's memory, and one that takes too long or too much can be ended without the others.
"""

import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from simulations.benchmarks.plan import Task

_START_S = 120.0  # to import torch on a busy machine
_FAREWELL_S = 5.0


class Sample(NamedTuple):
    """What one step took.

    Args:
        elapsed_ms: Milliseconds by the clock; on CUDA the device's.
        cpu_ms: Milliseconds of all processors together.
        peak_mb: Most memory beyond network and records, of the first step.
    """

    elapsed_ms: float
    cpu_ms: float
    peak_mb: float


# The profiler by which memory is measured would report that there is no GPU, and what it did not see, in every process.
_QUIET = {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR"}


class LeftOutError(Exception):
    """A method cannot be measured; the text says why."""


class Worker:
    """A process that makes steps of a task when it is told to.

    Args:
        task: What to measure.
        limit_s: Longest time of a step.

    Raises:
        LeftOutError: It does not get through its first steps.
    """

    def __init__(self, task: Task, limit_s: float) -> None:
        self.task, self._limit_s = task, limit_s
        for key, level in _QUIET.items():
            os.environ.setdefault(key, level)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(task, theirs))
        self._process.start()
        theirs.close()
        try:
            self._receive(_START_S + 2 * limit_s)
            self.step()  # a first one that nobody counts
        except BaseException:
            self.close()
            raise

    def step(self) -> Sample:
        """Make a step and measure it.

        Raises:
            LeftOutError: It takes too long, or fails.
        """
        self._pipe.send(None)
        return Sample(*self._receive(self._limit_s))

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.terminate()
        self._process.join(_FAREWELL_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self, limit_s: float) -> Any:
        if not self._pipe.poll(limit_s):
            raise LeftOutError(f"a step takes more than {limit_s:g} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(_FAREWELL_S)
            raise LeftOutError(f"its process ended with {self._process.exitcode}; memory may have run out") from None
        if isinstance(answer, str):
            raise LeftOutError(answer)
        return answer


def serve(task: Task, pipe: "Connection[Any, Any]") -> None:
    """Make a step for whatever is sent, until the other side closes the pipe.

    Args:
        task: What to measure.
        pipe: Given None once the first step can be asked for, then a `Sample` a step; a text if something fails.
    """
    try:
        step = _prepare(task)
        pipe.send(None)
        while True:
            pipe.recv()
            pipe.send(step())
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return
    except LeftOutError as error:
        pipe.send(str(error))
    except Exception as error:  # whatever happens in a method is a result, and not the end of the others
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}"[:300])


def _prepare(task: Task) -> Callable[[], Sample]:
    """Make a function that makes a step and measures it."""
    import torch  # noqa: PLC0415 - the parent needs none of these

    from simulations.benchmarks import memory  # noqa: PLC0415 - the same
    from simulations.benchmarks.methods import Trained, kept_gb, load, make_step  # noqa: PLC0415 - the same

    warnings.simplefilter("ignore")  # what libraries say is about their own use
    torch.set_num_threads(task.threads)
    needed = kept_gb(task)
    limit = min(task.limit_gb, memory.available_gb())
    if needed > limit:
        raise LeftOutError(f"the gradients that it keeps would take {needed:.3g} GB, more than {limit:.3g}")
    load(task)
    trained = Trained.of(task, batch=task.batch)
    step, peak_mb = memory.peak_of(lambda: _started(make_step(task, trained)), task.device)
    elapsed_of = _on_cuda if torch.device(task.device).type == "cuda" else _by_clock

    def measured() -> Sample:
        begun = time.process_time()
        elapsed = elapsed_of(step)
        cpu = 1e3 * (time.process_time() - begun)
        return Sample(elapsed, cpu, peak_mb)

    return measured


def _started(step: Callable[[], None]) -> Callable[[], None]:
    """Make the first step, for which everything that later ones use again is allocated."""
    step()
    return step


def _by_clock(step: Callable[[], None]) -> float:
    begun = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begun)


def _on_cuda(step: Callable[[], None]) -> float:
    import torch  # noqa: PLC0415 - the parent needs none of it

    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # of torch
    torch.cuda.synchronize()
    begun.record()
    step()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended))
