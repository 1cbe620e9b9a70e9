"""Steps of one method in a process of its own.

Methods take turns, so that all of them see the same disturbances of the machine; and each has its own process, so that
none of them inherits another's memory, and one that takes too long or too much can be ended without the others.
"""

import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from simulations.benchmarks.plan import Task

_START_S = 120.0  # to import torch on a busy machine
_FAREWELL_S = 5.0


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
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(task, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive(_START_S + 2 * limit_s)
            self.step()  # a first one that nobody counts
        except BaseException:
            self.close()
            raise

    def step(self) -> float:
        """Make a step and give its milliseconds.

        Raises:
            LeftOutError: It takes too long, or fails.
        """
        return self._ask("step", self._limit_s)

    def peak_mb(self) -> float:
        """Give the most memory that its steps took so far, beyond network and records, in MB."""
        return self._ask("peak", _START_S)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.terminate()
        self._process.join(_FAREWELL_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, request: str, limit_s: float) -> float:
        self._pipe.send(request)
        return self._receive(limit_s)

    def _receive(self, limit_s: float) -> float:
        if not self._pipe.poll(limit_s):
            raise LeftOutError(f"a step takes more than {limit_s:g} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(_FAREWELL_S)
            raise LeftOutError(f"its process ended with {self._process.exitcode}; memory may have run out") from None
        if isinstance(answer, str):
            raise LeftOutError(answer)
        return float(answer)


def _serve(task: Task, pipe: "Connection[Any, Any]") -> None:
    """Answer requests until the other side closes the pipe; a text in place of a number is a failure."""
    warnings.simplefilter("ignore")
    try:
        step, peak = _prepare(task)
        pipe.send(0.0)
        while True:
            pipe.send(step() if pipe.recv() == "step" else peak())
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return
    except LeftOutError as error:
        pipe.send(str(error))
    except Exception as error:  # whatever happens in a method is a result, and not the end of the others
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}"[:300])


def _prepare(task: Task) -> tuple[Callable[[], float], Callable[[], float]]:
    """Make a function that times a step, in ms, and one that gives the peak growth of memory, in MB."""
    import torch  # noqa: PLC0415 - the parent needs none of these

    from simulations.benchmarks import memory  # noqa: PLC0415
    from simulations.benchmarks.methods import Trained, kept_gb, make_step  # noqa: PLC0415

    torch.set_num_threads(task.threads)
    needed = kept_gb(task)
    if needed > task.limit_gb:
        raise LeftOutError(f"the gradients that it keeps would take {needed:.1f} GB, more than {task.limit_gb:g}")
    # libraries load their code with the first step, which is not the memory of a method
    make_step(task, Trained.of(task, batch=2))()
    trained = Trained.of(task, batch=task.batch)
    before = memory.mark(task.device)
    step = make_step(task, trained)
    timed = _timed_on_cuda(step) if torch.device(task.device).type == "cuda" else _timed(step)
    return timed, lambda: memory.peak(task.device) - before


def _timed(step: Callable[[], None]) -> Callable[[], float]:
    def timed() -> float:
        begun = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begun)

    return timed


def _timed_on_cuda(step: Callable[[], None]) -> Callable[[], float]:
    import torch  # noqa: PLC0415

    def timed() -> float:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begun.record()
        step()
        ended.record()
        ended.synchronize()
        return float(begun.elapsed_time(ended))

    return timed
