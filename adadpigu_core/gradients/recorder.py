"""Watching a model run: which parameters are used, by which function, with which inputs and output gradients.

While a ``Recorder`` is active, torch hands it every function call. A call with a trainable parameter among its
arguments is replaced, by the rule for that function, by a ``Layer``: the same output, and a backward pass that computes
the gradient of the input only and hands input and output gradient over as a ``Use``. Calls are watched and not modules,
so that shared weights, functional calls and modules of any class are seen alike.

A call without a rule raises `UnsupportedUseError`; see `generic` for what becomes of it. A parameter that is used where
torch cannot see it, in compiled code for example, receives an ordinary gradient, which the engine looks for.
"""

import inspect
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients.uses import Dense, Use


class UnsupportedUseError(Exception):
    """A parameter, or those of a module that is called with copies of them, are used in a way that has no rule."""

    def __init__(self, parameter: str, reason: str, module: str | None = None) -> None:
        super().__init__(f"parameter {parameter} {reason}" if module is None else reason)
        self.parameter = parameter
        self.reason = reason
        self.module = module


@dataclass(frozen=True)
class Tracked:
    """A trainable parameter, or some rows of one.

    Args:
        name: Of the parameter.
        start: Its first coordinate in the flat order.
        value: Detached.
    """

    name: str
    start: int
    value: Tensor

    @property
    def run(self) -> "Run":
        """First coordinate, and number of coordinates."""
        return self.start, self.value.numel()


@dataclass(frozen=True)
class Argument:
    """A parameter as a layer uses it: ``tracked`` is None if it is a constant."""

    value: Tensor
    tracked: Tracked | None


class Layer(ABC):
    """One call of a function with parameters."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Compute the output."""

    @abstractmethod
    def input_gradient(self, x: Tensor, e: Tensor) -> Tensor:
        """Gradient of the input, from that of the output."""

    @abstractmethod
    def uses(self, recorder: "Recorder", x: Tensor, e: Tensor) -> Iterable[tuple[Argument, Use]]:
        """What the gradients of the parameters follow from. Only those that are tracked are asked for."""

    @property
    @abstractmethod
    def arguments(self) -> tuple[Argument, ...]:
        """The parameters."""


Rule = Callable[..., Any]
AnyRule = TypeVar("AnyRule", bound=Rule)
RULES: dict[Callable[..., Any], Rule] = {}
DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""What stands in for functions that torch.func cannot run for many records at once."""

# What can be asked of a parameter without a gradient being lost.
_HARMLESS = {
    "size",
    "dim",
    "numel",
    "__len__",
    "is_floating_point",
    "is_complex",
    "stride",
    "is_contiguous",
    "ndimension",
}


_GRADIENT_HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}


@cache
def _signature(rule: Rule) -> inspect.Signature:
    return inspect.signature(rule)


def _takes(rule: Rule, *args: Any, **kwargs: Any) -> bool:
    """Whether a rule knows a way of calling its function."""
    try:
        _signature(rule).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


Run = tuple[int, int]
"""First coordinate, and number of coordinates."""


def _groups(runs: Iterable[Run]) -> list[list[Run]]:
    """Divide runs into groups; runs of two groups have no coordinate in common."""
    groups: list[list[Run]] = []
    end = -1
    for run in sorted(runs):
        if run[0] >= end:
            groups.append([])
        groups[-1].append(run)
        end = max(end, sum(run))
    return groups


def register_rule(*functions: Callable[..., Any]) -> Callable[[AnyRule], AnyRule]:
    """Register how calls of torch functions with parameters are recorded.

    The rule is called with the recorder and then as the function was. It returns the output, made by
    `Recorder.apply`, or raises `UnsupportedUseError`.
    """

    def register(rule: AnyRule) -> AnyRule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


class Recorder(TorchFunctionMode):
    """Records the uses of parameters by n records of K rows each.

    Args:
        parameters: Those to watch, with name and first coordinate.
        num_records: n.
        views: K.
        finished: Called with a parameter, or rows of one, and all its uses, as soon as the backward pass has met the
            last one.
        foreign: Whether the model brings autograd functions of its own, which may change gradients in place that other
            layers hold on to.
        channels_last: Whether filters lay out images with their channels last, which is faster.
    """

    def __init__(
        self,
        parameters: Mapping[str, tuple[Tensor, int]],
        num_records: int,
        views: int,
        finished: Callable[[Tracked, list[Use]], None],
        *,
        foreign: bool = False,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.num_records = num_records
        self.views = views
        self.foreign = foreign
        self.channels_last = channels_last
        self.paused = False
        self.activations = 0  # floats that layers hold, inputs and outputs
        self._finished = finished
        self._parameters = {name: Tracked(name, start, tensor.detach()) for name, (tensor, start) in parameters.items()}
        self._tracked = {id(tensor): (tensor, self._parameters[name]) for name, (tensor, _) in parameters.items()}
        device = next(iter(parameters.values()))[0].device if parameters else None
        self._anchor = torch.zeros((), dtype=torch.float32, device=device, requires_grad=True)
        self._expected: Counter[Run] = Counter()
        self._overlapping: set[Run] | None = None  # not known before all layers have run
        self._held: set[Run] = set()
        self._pending: dict[Run, list[Use]] = defaultdict(list)
        self._owners: dict[Run, Tracked] = {}

    @property
    def rows(self) -> int:
        """Rows of every activation."""
        return self.num_records * self.views

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at one call of torch."""
        kwargs = kwargs or {}
        if func in _GRADIENT_HOOKS and not str(getattr(args[1], "__module__", "")).startswith("torch."):
            text = (
                "the model hooks on gradients, which shows it those of all records at once; leave that out, or write a "
                "torch.autograd.Function that treats each record by itself"
            )
            raise ModelError(text, text)
        if self.paused:
            return DECOMPOSITIONS.get(func, func)(*args, **kwargs)
        touched = self._first_tracked((*args, *kwargs.values()))
        if touched is None:
            return func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is not None and _takes(rule, self, *args, **kwargs):
            return rule(self, *args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in _HARMLESS:
            return func(*args, **kwargs)
        if name == "__get__":  # an attribute, such as a shape
            value = func(*args, **kwargs)
            if not isinstance(value, Tensor):
                return value
            name = "an attribute that is a tensor"
        raise UnsupportedUseError(
            touched.name, f"is used by {name}, for which there is no rule, or none for such a call"
        )

    def _first_tracked(self, values: Iterable[Any]) -> Tracked | None:
        for value in values:
            if isinstance(value, Tensor):
                found = self._tracked.get(id(value))
                if found is not None:
                    return found[1]
            elif isinstance(value, list | tuple):
                inner = self._first_tracked(value)
                if inner is not None:
                    return inner
        return None

    def tracked(self, value: object) -> Tracked | None:
        """The parameter that a value is, if it is one."""
        found = self._tracked.get(id(value))
        return found[1] if found is not None else None

    def argument(self, value: Tensor) -> Argument:
        """Take a parameter, or a constant in its place.

        Raises:
            UnsupportedUseError: It is neither: gradients would have to flow through it.
        """
        tracked = self.tracked(value)
        if tracked is not None:
            return Argument(tracked.value, tracked)
        if value.requires_grad:
            raise UnsupportedUseError(self._any_name(), "is used together with computed weights")
        return Argument(value, None)

    def rows_of(self, parameter: Tensor, start: int, stop: int) -> Tensor:
        """Some rows of a parameter, watched like a parameter."""
        whole = self.tracked(parameter)
        part = parameter.detach()[start:stop]
        if whole is not None:
            first = whole.start + start * parameter[0].numel() if parameter.dim() > 1 else whole.start + start
            self._tracked[id(part)] = (part, Tracked(whole.name, first, part))
        return part

    def data(self, value: object, parameter: Tracked | None = None) -> Tensor:
        """Take what has one row a record and view.

        Raises:
            UnsupportedUseError: The value does not have, or is a parameter itself.
        """
        name = parameter.name if parameter else self._any_name()
        if not isinstance(value, Tensor) or self.tracked(value) is not None:
            raise UnsupportedUseError(name, "is not applied to the data of records")
        if value.dim() == 0 or value.shape[0] != self.rows:
            raise UnsupportedUseError(
                name, f"is applied to a tensor of shape {[*value.shape]}, whose first dimension does not count records"
            )
        return value

    def unsupported(self, reason: str, *values: Any) -> UnsupportedUseError:
        """The error for a use of the first parameter among some values."""
        found = self._first_tracked(values)
        return UnsupportedUseError(found.name if found is not None else self._any_name(), reason)

    def _any_name(self) -> str:
        return next(iter(self._tracked.values()))[1].name

    def apply(self, layer: Layer, x: Tensor | None) -> Tensor:
        """Run a layer, and arrange that its uses arrive during the backward pass.

        Args:
            layer: The layer.
            x: Its input; None for a layer that has none.
        """
        for argument in layer.arguments:
            if argument.tracked is not None:
                run = argument.tracked.run
                self._expected[run] += 1
                self._overlapping = None
                self._owners[run] = argument.tracked
        output = cast(Tensor, _Record.apply(self._anchor, x, layer, self))
        self.activations += output.numel() + (0 if x is None else x.numel())
        return output

    def receive(self, layer: Layer, x: Tensor, e: Tensor) -> None:
        """Take the uses of a layer, and finish the parameters that have been met for the last time."""
        for argument, use in layer.uses(self, x, e):
            if argument.tracked is None:
                continue
            run = argument.tracked.run
            self._pending[run].append(use)
            if len(self._pending[run]) == self._expected[run] and run not in self._held and not self._overlaps(run):
                self._finished(argument.tracked, self._pending.pop(run))

    def hold(self, tracked: Tracked) -> None:
        """Do not finish a parameter during the backward pass: `add` brings more uses of it."""
        self._held.add(tracked.run)
        self._overlapping = None

    def add(self, tracked: Tracked, use: Use) -> None:
        """Take a use that was found otherwise, after the backward pass."""
        self._owners[tracked.run] = tracked
        self._pending[tracked.run].append(use)

    def _overlaps(self, run: Run) -> bool:
        """Whether a parameter is used as a whole and in part."""
        if self._overlapping is None:
            groups = _groups({*self._expected, *self._held})
            self._overlapping = {run for group in groups if len(group) > 1 for run in group}
        return run in self._overlapping

    def rest(self) -> list[tuple[Tracked, list[Use]]]:
        """Parameters that could not be finished during the backward pass, with all their uses.

        Of a parameter that is used as a whole and in part, the gradients have to be added up before they are squared.
        """
        return [self._together(group) for group in _groups(self._pending)]

    def _together(self, runs: list[Run]) -> tuple[Tracked, list[Use]]:
        """Runs of one parameter that overlap, as one."""
        first = self._owners[runs[0]]
        if len(runs) == 1:
            return first, self._pending[runs[0]]
        whole = self._parameters[first.name]
        start, stop = first.start, max(map(sum, runs))
        row = whole.value[0].numel()
        value = whole.value[(start - whole.start) // row : (stop - whole.start) // row]
        gradients = torch.zeros(self.num_records, stop - start, dtype=torch.float32, device=value.device)
        for run in runs:
            shape = tuple(self._owners[run].value.shape)
            for use in self._pending[run]:
                found = use.restored(use.gradients(0, self.num_records), shape)
                gradients[:, run[0] - start : sum(run) - start] += found.flatten(1)
        return Tracked(first.name, start, value), [Dense(gradients.view(len(gradients), *value.shape))]

    def by_record(self, values: Tensor) -> Tensor:
        """View [n K, ..., F] as [n, T, F]: views and all inner dimensions are positions."""
        return values.reshape(self.num_records, -1, values.shape[-1])


class _Record(torch.autograd.Function):
    """A layer as a node of the graph. The anchor makes torch call its backward pass even if no input needs one."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor | None, layer: Layer, recorder: Recorder) -> Tensor:
        ctx.layer, ctx.recorder = layer, recorder
        ctx.save_for_backward(x)
        return layer.forward(cast(Tensor, x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        (e,) = gradients
        x = None if x is None else x.detach()  # a use that held the graph would keep it, and itself, alive
        with torch.no_grad():
            ctx.recorder.receive(ctx.layer, x, e.clone() if ctx.recorder.foreign else e.detach())
            wanted = ctx.layer.input_gradient(x, e) if ctx.needs_input_grad[1] else None
        ctx.layer = ctx.recorder = None
        return None, wanted, None, None


NODE = _Record._backward_cls
"""What a layer is in the graph of autograd."""
