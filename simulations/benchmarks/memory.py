"""How much memory a step takes, at most, beyond network and records.

Counted is what torch's allocators hand out, on a CPU as on CUDA: every tensor, and nothing else. The resident memory of
a process would count what an allocator holds back, and the pages of libraries, which for a small network is more than
the step itself takes.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

_MEMORY = Path("/proc/meminfo")
T = TypeVar("T")


def peak_of(work: Callable[[], T], device: str) -> tuple[T, float]:
    """Do something, and measure the most memory that it had at any time, in MB.

    Args:
        work: What to do. What it returns is kept alive, and counts.
        device: Where its tensors are.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return result, (torch.cuda.max_memory_allocated(device) - before) / 1e6
    peak = _in_a_copy(work) / 1e6
    return work(), peak


def _in_a_copy(work: Callable[[], object]) -> float:
    """Do something in a copy of this process, since torch is slower once it has recorded; gives the peak in bytes.

    Raises:
        RuntimeError: The copy has died of it.
    """
    reading, writing = os.pipe()
    copy = os.fork()
    if copy == 0:
        torch.set_num_threads(1)  # others have not been copied: work that is shared among them would never end
        with suppress(BaseException), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            kept = work()
        with suppress(BaseException):
            os.write(writing, str(_highest(recorded)).encode())
            del kept
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(copy, 0)
    if not text:
        raise RuntimeError("memory could not be measured; there may not be enough of it")
    return float(text)


def _highest(recorded: profile) -> int:
    """Highest sum of allocations so far, less what was freed, in bytes."""
    recording = recorded.profiler
    results = None if recording is None else recording.kineto_results
    events = [] if results is None else [event for event in results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # type: ignore[attr-defined]  # of memory events only
        highest = max(highest, held)
    return highest


def available_gb() -> float:
    """Give the memory that this machine has left, in GB; infinite if it does not say."""
    found = re.search(
        r"^MemAvailable:\s+(\d+) kB", _MEMORY.read_text(encoding="ascii") if _MEMORY.exists() else "", re.M
    )
    return int(found[1]) * 1.024e-6 if found else float("inf")  # its kB are of 1,024 bytes
