"""Models of the user's own, named by an import path: ``package.module:factory``.

A factory is called as ``factory(input_shape=(1, 28, 28), num_classes=10)`` and returns a module that maps features
[n, *input_shape] to logits [n, num_classes]. The server sends the name alone; the code is what is installed on each
machine. Importing runs code, so whether a name may be imported is to be decided first, by ``source_fingerprint``, which
reads files and imports nothing.

A factory may freeze parameters, by ``requires_grad_(False)``. They are public and stay as they are: no gradient, no
noise, no coordinate of a mask. What they are is for the server to say, which sends them with every round, since a
client that draws its own would train another network; so it is with float32 buffers that are saved with the model.

A fingerprint covers every Python file of the top-level package, or the one file of a top-level module. Left out: what
that code imports from elsewhere, and compiled code.
"""

import hashlib
import importlib
import importlib.util
import re
from pathlib import Path

from torch import nn

from adadpigu_core.exceptions import ConfigurationError, ModelError

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_LONGEST = 200


def is_factory(name: str) -> bool:
    """Whether a model's name is an import path.

    >>> is_factory("hospital.networks:wide"), is_factory("mlp"), is_factory("os.path:join(1)")
    (True, False, False)
    """
    return len(name) <= _LONGEST and _PATH.fullmatch(name) is not None


def source_fingerprint(name: str) -> str:
    """Hash the installed source that an import path names, without importing it.

    Returns:
        64 hex digits, the same on every machine with the same source.

    Raises:
        ConfigurationError: If it is not installed here, or not as Python files. The text is public.
    """
    top = name.partition(":")[0].partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise _refusal(f"model {name}: the package {top} is not installed on this machine")
    if spec.submodule_search_locations is not None:
        files = [
            (file.relative_to(folder).as_posix(), file)
            for folder in map(Path, spec.submodule_search_locations)
            for file in folder.rglob("*.py")
        ]
    else:
        files = [(f"{top}.py", Path(spec.origin))] if spec.origin and spec.origin.endswith(".py") else []
    if not files:
        raise _refusal(f"model {name}: {top} is not made of Python files, so that it has no fingerprint")
    digest = hashlib.sha256()
    for relative, file in sorted(files):
        source = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{relative}\0{len(source)}\0".encode())
        digest.update(source)
    return digest.hexdigest()


def build(name: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Import a factory and call it.

    Raises:
        ConfigurationError: If there is no such factory. The text is public.
        ModelError: If it fails, or makes something else than a module.
    """
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise _refusal(f"model {name}: cannot be imported on this machine ({type(error).__name__})") from error
    try:
        model = factory(input_shape=input_shape, num_classes=num_classes)
    except Exception as error:  # it is the user's own code
        public = f"model {name}: its factory fails"
        raise ModelError(f"{public} for shape {[*input_shape]} and {num_classes} classes: {error!r}", public) from error
    if not isinstance(model, nn.Module):
        text = f"model {name}: its factory made a {type(model).__name__}, not a torch module"
        raise ModelError(text, text)
    return model


def _refusal(text: str) -> ConfigurationError:
    return ConfigurationError(text, text)
