"""Modules that use a parameter in a way without a rule: one copy of their parameters for every record.

``torch.func.vmap`` calls the module once for all records, each with a copy of the parameters; the ordinary backward
pass then leaves every record's gradient in its copy. This is right for whatever vmap can run, and as slow and large as
gradients of single records are. It is done for the innermost module that owns the parameter, and the rest of the model
is recorded as usual.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils import _pytree as pytree

from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients.recorder import Recorder, Tracked
from adadpigu_core.gradients.uses import Dense

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, ParametrizationList)


def owner(model: nn.Module, parameter: str) -> str:
    """Path of the innermost module that can be called and owns a parameter; "" is the model itself."""
    path = parameter.rpartition(".")[0]
    while path and isinstance(model.get_submodule(path), _CONTAINERS):
        path = path.rpartition(".")[0]
    return path


class Copies:
    """Copies of the parameters of some modules, one a record.

    Args:
        model: The model.
        modules: Paths of the modules.
        recorder: That watches the rest.
    """

    def __init__(self, model: nn.Module, modules: frozenset[str], recorder: Recorder) -> None:
        self._recorder = recorder
        self._copies: list[tuple[Tracked, Tensor]] = []
        self._modules = {path: model.get_submodule(path) for path in sorted(modules)}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the modules call themselves with copies, inside this block only."""
        try:
            for path, module in self._modules.items():
                module.forward = partial(self._call, path, module)
            yield
        finally:
            for module in self._modules.values():
                module.__dict__.pop("forward", None)

    def collect(self) -> None:
        """After the backward pass, hand over the gradients of the copies."""
        for tracked, copy in self._copies:
            if copy.grad is not None:
                self._recorder.add(tracked, Dense(copy.grad.detach()))

    def _call(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recorder = self._recorder
        original = module.__dict__.pop("forward")
        recorder.paused = True
        try:
            with warnings.catch_warnings():
                # where torch has no rule for many records at once it takes one after the other: slow, but right
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                return self._vectorised(module, args, kwargs)
        except (RuntimeError, ValueError) as error:
            text = (
                f"module {path or '(the model itself)'} is a {type(module).__name__}, whose gradients of single "
                f"records can be computed neither by a rule nor by torch.func; replace it, or register a rule"
            )
            raise ModelError(f"{text} ({error})", text) from error
        finally:
            recorder.paused = False
            module.forward = original

    def _vectorised(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorder = self._recorder
        names, copies = self._copied(module)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        batched = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == recorder.rows for leaf in leaves]
        grouped = [
            leaf.unflatten(0, (recorder.num_records, recorder.views)) if is_batched else leaf
            for leaf, is_batched in zip(leaves, batched, strict=True)
        ]
        if not any(batched):
            raise ValueError("it is not called with the data of records")

        outside: list[tuple[list[Any], pytree.TreeSpec]] = []  # what vmap does not return: None, and how it is nested

        def one(own: tuple[Tensor, ...], *inputs: Any) -> tuple[Tensor, ...]:
            given, keywords = pytree.tree_unflatten(list(inputs), structure)
            output = torch.func.functional_call(module, dict(zip(names, own, strict=True)), given, keywords)
            values, spec = pytree.tree_flatten(output)
            outside.append(([None if isinstance(value, Tensor) else value for value in values], spec))
            return tuple(value if isinstance(value, Tensor) else torch.zeros(()) for value in values)

        dims = (0, *[0 if is_batched else None for is_batched in batched])
        found = torch.func.vmap(one, in_dims=dims, randomness="different")(tuple(copies), *grouped)
        others, spec = outside[0]
        values = [
            value.flatten(0, 1) if other is None and value.dim() > 1 else other
            for value, other in zip(found, others, strict=True)
        ]
        return pytree.tree_unflatten(values, spec)

    def _copied(self, module: nn.Module) -> tuple[list[str], list[Tensor]]:
        names, copies = [], []
        for name, parameter in module.named_parameters():
            tracked = self._recorder.tracked(parameter)
            if tracked is not None:
                shape = (self._recorder.num_records, *parameter.shape)
                copy = tracked.value.unsqueeze(0).expand(shape).requires_grad_()
                self._copies.append((tracked, copy))
                self._recorder.hold(tracked)
                names.append(name)
                copies.append(copy)
        return names, copies
