"""How much memory this process takes, at most, between two moments.

On a CPU that is the peak of the resident set, which includes what the allocator holds back; Linux lets a process start
its peak anew. On CUDA it is what torch's allocator had handed out.
"""

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"


def mark(device: str) -> float:
    """Start a new peak and give the memory in use, in MB."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e6
    if not _STATUS.exists():
        return peak(device)
    _give_back()
    try:
        _CLEAR.write_text(_CLEAR_PEAK)
    except OSError:  # some containers forbid it; then earlier peaks may hide a small one
        return peak(device)
    return _resident("VmRSS")


def peak(device: str) -> float:
    """Give the largest memory in use since the mark, in MB."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if _STATUS.exists():
        return _resident("VmHWM")
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 1e6 if sys.platform == "darwin" else size * 1024 / 1e6


def _resident(key: str) -> float:
    found = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else float("nan")


def _give_back() -> None:
    """Have the C library return free memory, or a method could start from what another step has left behind."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
