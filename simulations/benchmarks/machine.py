"""What a measurement was taken on, without which its figures mean little."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from adadpigu_core.exceptions import ConfigurationError

_ALLOCATOR = ("MALLOC_", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_CPUINFO = Path("/proc/cpuinfo")


def check_device(device: str) -> None:
    """Refuse a device that this machine lacks.

    Raises:
        ConfigurationError: With what there is.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigurationError(f"--device: {device!r} is none of cpu, cuda, cuda:0 ...") from error
    if kind not in {"cpu", "cuda"}:
        raise ConfigurationError(f"--device: {device!r} is not measured; use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device: torch sees no CUDA device here; use cpu")


def facts(device: str) -> dict[str, str | int | dict[str, str] | None]:
    """Give processor, versions, what steers the allocator, and the commit."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "torch": torch.__version__,
        "opacus": _version("opacus"),
        "python": platform.python_version(),
        "allocator": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_ALLOCATOR)},
        "commit": _commit(),
    }


def _cpu() -> str:
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Short hash of the checkout that this code lies in, if it lies in one; marked if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
