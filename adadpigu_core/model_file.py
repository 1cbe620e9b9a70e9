"""The parameters of a model in one file, by name, from which a later run may start.

NumPy's ``npz``: one float32 array for each name in ``model.state_dict()``, so that other programs can write one, too:

    numpy.savez("start.npz", **{name: tensor.numpy() for name, tensor in model.state_dict().items()})

A file may come from anywhere. Names, types and shapes are looked at before any array is read, nothing is unpickled, and
a model takes either everything in a file or nothing.

Privacy: weights that were trained on private records without noise tell of these records, and a run that starts from
them hands them to every client and to whoever sees the model. No epsilon covers that: what is in a file must be public,
or released under differential privacy before.
"""

import io
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.printable import printable

_SUFFIX = ".npy"
_MOST_LETTERS = 100  # of a name in a message
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def pack(model: nn.Module) -> bytes:
    """Pack all parameters of a model, and its buffers that runs carry; the same weights give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # numpy.savez would take some names for its own arguments
        for name, tensor in _entries(model).items():
            with archive.open(name + _SUFFIX, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, tensor.cpu().numpy(), allow_pickle=False)
    return buffer.getvalue()


def load(path: Path, model: nn.Module) -> tuple[str, ...]:
    """Write what a file holds into a model.

    Returns:
        Names that the file lacks, which are left as they were.

    Raises:
        ConfigurationError: If the file cannot be used; the model is then as it was.
    """
    wanted = _entries(model)
    found = _read(path, wanted)
    with torch.no_grad():
        for name, array in found.items():
            wanted[name].copy_(torch.from_numpy(array))
    written = {id(tensor) for name, tensor in _tensors(model).items() if name in found}
    return tuple(name for name, tensor in _tensors(model).items() if id(tensor) not in written)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model themselves; one that has several names is there several times."""
    saved = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in saved.items() if tensor.dtype == torch.float32}


def _entries(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in _tensors(model).items()}


def _read(path: Path, wanted: dict[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(_SUFFIX) for name in archive.namelist()]
            _check_names(path, names, wanted)
            for name in names:
                with archive.open(name + _SUFFIX) as member:
                    _check_header(path, name, member, wanted[name])
            return {name: _values(path, name, archive) for name in names}
    except ConfigurationError:
        raise
    except FileNotFoundError as error:
        raise _refusal(path, "there is no such file", "correct the path, or leave the setting empty") from error
    except Exception as error:  # zipfile, zlib and numpy raise a dozen types on damaged files
        reason = f"cannot be read ({type(error).__name__}: {printable(str(error), _MOST_LETTERS)})"
        raise _refusal(path, reason, "give the model.npz of a run, or write a file with numpy.savez") from error


def _check_names(path: Path, names: list[str], wanted: dict[str, Tensor]) -> None:
    if not names:
        raise _refusal(path, "holds no parameters", "give the model.npz of a run")
    for name in names:
        if name not in wanted:
            known = printable(", ".join(wanted), 5 * _MOST_LETTERS)
            raise _refusal(path, f"{printable(name, _MOST_LETTERS)!r} is no parameter of the model", f"it has {known}")
        if names.count(name) > 1:
            raise _refusal(path, f"{name} is there several times", "write it once")


def _check_header(path: Path, name: str, member: IO[bytes], wanted: Tensor) -> None:
    """Compare type and shape before room is made for what a file says that it holds."""
    version = np.lib.format.read_magic(member)
    if version not in _HEADERS:
        raise _refusal(path, f"{name} is of an unknown format {version}", "write numbers with numpy.savez")
    shape, _, dtype = _HEADERS[version](member)
    if dtype != np.float32:
        raise _refusal(path, f"{name} holds {dtype} values", "store float32")
    if shape != tuple(wanted.shape):
        remedy = "leave it out of the file to start it at random, or choose the model that the file is of"
        raise _refusal(path, f"{name} has shape {shape}, and the model's has {tuple(wanted.shape)}", remedy)


def _values(path: Path, name: str, archive: zipfile.ZipFile) -> NDArray[np.float32]:
    with archive.open(name + _SUFFIX) as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):
            raise _refusal(path, f"{name} is longer than its shape says", "write it anew")
    if not np.isfinite(array).all():
        raise _refusal(path, f"{name} is not finite everywhere", "give weights of a training that has not diverged")
    return np.array(array, order="C")


def _refusal(path: Path, problem: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(f"task.weights: {path}: {problem}; {remedy}")
