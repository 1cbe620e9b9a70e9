"""How much memory this process takes, at most, during a step.

On a CPU that is anonymous memory that is resident, which includes what the allocator holds back. Linux keeps a peak of
all resident memory and lets a process start it anew; the pages of files, libraries for instance, are taken off, since
the system drops and reads them as it likes. On CUDA it is what torch's allocator had handed out.
"""

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")
_CLEAR = Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"


def settle(device: str) -> float:
    """Give back what is free, which a method could start from otherwise, and give the memory in use, in MB."""
    gc.collect()
    if _is_cuda(device):
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(device) / 1e6
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _kilobytes(_STATUS, "RssAnon") / 1e3 if _STATUS.exists() else peak(device)


def start(device: str) -> None:
    """Start a new peak."""
    if _is_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        try:
            _CLEAR.write_text(_CLEAR_PEAK)
        except OSError:  # some containers forbid it; then the peak is that of all steps
            return


def peak(device: str) -> float:
    """Give the most memory in use since the start, in MB."""
    if _is_cuda(device):
        return torch.cuda.max_memory_allocated(device) / 1e6
    if _STATUS.exists():
        return (_kilobytes(_STATUS, "VmHWM") - _kilobytes(_STATUS, "RssFile")) / 1e3
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 1e6 if sys.platform == "darwin" else size * 1.024 / 1e3


def available_gb() -> float:
    """Give the memory that this machine has left, in GB; infinite if it does not say."""
    return _kilobytes(_MEMORY, "MemAvailable") / 1e6 if _MEMORY.exists() else float("inf")


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _kilobytes(path: Path, key: str) -> float:
    """Read a size from a file of the kernel; its kB are of 1,024 bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", path.read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1.024 if found else float("nan")
