"""Modules that use a parameter in a way without a rule: one copy of their parameters for every record.

``torch.func.vmap`` calls the module once for all records, each with a copy of the parameters; the ordinary backward
pass then leaves every record's gradient in its copy. This is right for whatever vmap can run, and as slow and large as
gradients of single records are. It is done for the innermost module that owns the parameter, and the rest of the model
is recorded as usual.

What such a module is called with is data of records or the same for all of them, and only its length tells. A table
for 32 positions is as long as a batch of 32 records now and then, and would then be dealt out to them; so it is settled
beforehand, by the lengths under two sizes of a batch, see `row_arguments`.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils import _pytree as pytree

from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients.recorder import Recorder, Tracked, UnsupportedUseError
from adadpigu_core.gradients.uses import Dense

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, ParametrizationList)


def owner(model: nn.Module, parameter: str) -> str:
    """Path of the innermost module that can be called and owns a parameter; "" is the model itself."""
    path = parameter.rpartition(".")[0]
    while path and isinstance(model.get_submodule(path), _CONTAINERS):
        path = path.rpartition(".")[0]
    return path


Shape = tuple[int, ...]
RowArguments = Mapping[str, Sequence[Sequence[bool]]]
"""By path of a module, for each of its calls in a forward pass: whether an argument has as many rows as the batch.

Arguments are counted as torch's pytrees count leaves."""


def row_arguments(model: nn.Module, modules: Iterable[str], batches: Sequence[Tensor]) -> RowArguments:
    """Find what follows the size of a batch in the calls of some modules.

    Args:
        model: The model.
        modules: Paths of modules.
        batches: Batches of different sizes, [n, ...] each, made-up ones.

    Raises:
        ModelError: A module is called in another way for another batch.
        UnsupportedUseError: What a module is called with has its records elsewhere.
    """
    paths = sorted(modules)
    shapes = {path: [_shapes(model, path, batch) for batch in batches] for path in paths}
    found = {}
    for path, seen in shapes.items():
        if len({tuple(len(call) for call in calls) for calls in seen}) > 1:
            text = f"module {_shown(path)} is called in another way for another batch; make its calls independent of it"
            raise ModelError(text, text)
        found[path] = [
            [_follows(path, leaf, batches) for leaf in zip(*call, strict=True)] for call in zip(*seen, strict=True)
        ]
    return found


def _follows(path: str, shapes: Sequence[Shape], batches: Sequence[Tensor]) -> bool:
    """Whether an argument has one row a record and view; what follows the batch otherwise belongs to no record."""
    if all(shape[:1] == batch.shape[:1] for shape, batch in zip(shapes, batches, strict=True)):
        shapes = [shape[1:] for shape in shapes]
        if len(set(shapes)) == 1:
            return True
    if len(set(shapes)) > 1:
        text = (
            f"module {_shown(path)} is called with a tensor that follows the size of the batch, but not in its first "
            "dimension; make the records come first"
        )
        raise UnsupportedUseError("", text, path)
    return False


def _shapes(model: nn.Module, path: str, batch: Tensor) -> list[list[Shape]]:
    """Shapes of what a module is called with, by call; empty for what has none."""
    calls: list[list[Shape]] = []

    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves = pytree.tree_leaves((args, kwargs))
        calls.append([tuple(leaf.shape) if isinstance(leaf, Tensor) else () for leaf in leaves])

    hook = model.get_submodule(path).register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with torch.no_grad():
            model(batch)
    finally:
        hook.remove()
    return calls


def _shown(path: str) -> str:
    return path or "(the model itself)"


def _require_no_hooks(path: str, module: nn.Module) -> None:
    """Refuse what would run twice, once with copies and once around them; torch's own hooks make weights of weights."""
    before = [hook for hook in module._forward_pre_hooks.values() if not _is_of_torch(hook)]
    if module._forward_hooks or before:
        text = (
            f"module {_shown(path)} has forward hooks and needs copies of its parameters; move the hooks' work into it"
        )
        raise ModelError(text, text)


def _is_of_torch(hook: object) -> bool:
    return type(hook).__module__.startswith("torch.")


class Copies:
    """Copies of the parameters of some modules, one a record.

    Args:
        model: The model.
        modules: Paths of the modules, and what they are called with.
        recorder: That watches the rest.
    """

    def __init__(self, model: nn.Module, modules: RowArguments, recorder: Recorder) -> None:
        self._recorder = recorder
        self._copies: list[tuple[Tracked, Tensor]] = []
        self._modules = {path: (model.get_submodule(path), iter(calls)) for path, calls in modules.items()}
        self._forwards = {path: module.__dict__.get("forward") for path, (module, _) in self._modules.items()}
        for path, (module, _) in self._modules.items():
            _require_no_hooks(path, module)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the modules call themselves with copies, inside this block only."""
        try:
            for path, (module, calls) in self._modules.items():
                module.forward = partial(self._call, path, module, calls)
            yield
        finally:
            for path, (module, _) in self._modules.items():
                self._put_back(path, module)

    def collect(self) -> None:
        """After the backward pass, hand over the gradients of the copies."""
        for tracked, copy in self._copies:
            if copy.grad is not None:
                self._recorder.add(tracked, Dense(copy.grad.detach()))

    def _call(self, path: str, module: nn.Module, calls: Iterator[Sequence[bool]], *args: Any, **kwargs: Any) -> Any:
        recorder = self._recorder
        copying = module.forward
        of_rows = next(calls, ())
        if not any(of_rows):
            text = f"module {_shown(path)} is not called with the data of records"
            raise UnsupportedUseError("", text, path)
        self._put_back(path, module)
        recorder.paused = True
        try:
            with warnings.catch_warnings():
                # where torch has no rule for many records at once it takes one after the other: slow, but right
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                return self._vectorised(module, of_rows, args, kwargs)
        except (RuntimeError, ValueError) as error:
            text = (
                f"module {_shown(path)} is a {type(module).__name__}, whose gradients of single "
                f"records can be computed neither by a rule nor by torch.func; replace it, or register a rule"
            )
            raise ModelError(f"{text} ({error})", text) from error
        finally:
            recorder.paused = False
            module.forward = copying

    def _put_back(self, path: str, module: nn.Module) -> None:
        """Let a module call itself as it did."""
        module.__dict__.pop("forward", None)
        own = self._forwards[path]
        if own is not None:
            module.forward = own

    def _vectorised(
        self, module: nn.Module, of_rows: Sequence[bool], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        recorder = self._recorder
        names, copies = self._copied(module)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        grouped = [
            leaf.unflatten(0, (recorder.num_records, recorder.views)) if is_batched else leaf
            for leaf, is_batched in zip(leaves, of_rows, strict=True)
        ]

        outside: list[tuple[list[Any], pytree.TreeSpec]] = []  # what vmap does not return: None, and how it is nested

        def one(own: tuple[Tensor, ...], *inputs: Any) -> tuple[Tensor, ...]:
            given, keywords = pytree.tree_unflatten(list(inputs), structure)
            output = torch.func.functional_call(module, dict(zip(names, own, strict=True)), given, keywords)
            values, spec = pytree.tree_flatten(output)
            outside.append(([None if isinstance(value, Tensor) else value for value in values], spec))
            return tuple(value if isinstance(value, Tensor) else torch.zeros(()) for value in values)

        dims = (0, *[0 if is_batched else None for is_batched in of_rows])
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
