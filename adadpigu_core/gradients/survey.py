"""What an engine has to know of a model before it runs on records: what has no rule, how much memory a record takes.

The model runs on made-up records, two and then three of them. A layer that is applied to something else than one row a
record shows itself, since no other dimension can have both sizes; without this, a batch that happens to have as many
records as a sentence has words would be clipped wrongly. Then the outputs of the first record alone are differentiated:
a gradient that arrives in another record's place belongs to a model that mixes or moves records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from adadpigu_core.buffers import Buffers
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients.backward import differentiate, has_foreign_functions
from adadpigu_core.gradients.blocks import made_whole
from adadpigu_core.gradients.clipping import Augmentation
from adadpigu_core.gradients.generic import Copies, RowArguments, owner, row_arguments
from adadpigu_core.gradients.recorder import Recorder, Tracked, UnsupportedUseError
from adadpigu_core.gradients.uses import Use
from adadpigu_core.models import check_private
from adadpigu_core.parameters import ParameterLayout

_BYTES = 4
_COPIES_OF_ACTIVATIONS = 2  # inputs and outputs of layers, and as much again for gradients
_COPIES_OF_GRADIENTS = 3  # of single records where they are made as a whole: what is added up, kept, standardised
_COPIES_OF_LARGEST = 3  # beside what a graph holds, while it is differentiated


@dataclass(frozen=True)
class Survey:
    """What was found.

    Args:
        without_rule: Modules that are called with copies of their parameters.
        bytes_per_record: Estimate of what one record takes in a physical batch.
        channels_last: Whether images may be laid out with their channels last, which filters like, where there are any.
        foreign: Whether the model brings autograd functions of its own.
    """

    without_rule: RowArguments
    bytes_per_record: int
    channels_last: bool
    foreign: bool


_known: "WeakKeyDictionary[nn.Module, dict[Any, Survey]]" = WeakKeyDictionary()


def survey(model: nn.Module, records: Records, augmentation: Augmentation | None = None) -> Survey:
    """Look at a model once; what was found is remembered.

    Args:
        model: Any model.
        records: For the shape of their features only.
        augmentation: For the number of views.

    Raises:
        ModelError: The model mixes records, or one of its modules cannot be differentiated by record.
    """
    layout = ParameterLayout.of(model)
    shape = tuple(records.features.shape[1:])
    training = tuple(module.training for module in model.modules())
    key = (layout, shape, training, augmentation)
    known = _known.setdefault(model, {})
    if key not in known:
        check_private(model)
        buffers = Buffers(model)
        try:
            known[key] = _look(model, layout, shape, augmentation)
        finally:
            buffers.restore()
    return known[key]


def _look(
    model: nn.Module, layout: ParameterLayout, shape: tuple[int, ...], augmentation: Augmentation | None
) -> Survey:
    made_up = [
        torch.rand(count, *shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0)) for count in (2, 3)
    ]
    modules: frozenset[str] = frozenset()
    channels_last = len(shape) == 3 and any(parameter.dim() == 4 for parameter in model.parameters())
    while True:
        try:
            without_rule = _rows_of(model, modules, made_up, augmentation)
            trial = _Trial(model, layout, augmentation, without_rule, channels_last)
            trial.run(made_up[0], len(made_up[0]) - 1)
            held = trial.run(made_up[1], 0)
            break
        except UnsupportedUseError as error:
            modules = _with(model, modules, error)
        except (RuntimeError, ModelError):
            if not channels_last:
                raise
            channels_last = False  # it may view its images as vectors, which only works in the ordinary layout
    of_layers = _BYTES * _COPIES_OF_ACTIVATIONS * held.activations
    of_graph = held.saved + _COPIES_OF_LARGEST * held.largest
    of_gradients = _BYTES * _COPIES_OF_GRADIENTS * held.gradients
    bytes_per_record = max(1, max(of_layers, of_graph) // len(made_up[-1]) + of_gradients)
    return Survey(without_rule, bytes_per_record, channels_last, held.foreign)


def laid_out(rows: Tensor, *, channels_last: bool) -> Tensor:
    """Lay out rows [n K, ...] as a model is called with them."""
    return rows.contiguous(memory_format=torch.channels_last) if channels_last else rows


def _views(features: Tensor, augmentation: Augmentation | None, device: torch.device) -> Tensor:
    features = features.to(device)
    return features.unsqueeze(1) if augmentation is None else augmentation(features)


def _rows_of(
    model: nn.Module, modules: frozenset[str], made_up: Sequence[Tensor], augmentation: Augmentation | None
) -> RowArguments:
    """Find what modules are called with that has one row a record and view."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        batches = [_views(features, augmentation, device).flatten(0, 1) for features in made_up]
        return row_arguments(model, modules, batches)


class _Held:
    """What a forward pass leaves behind for the backward pass.

    Args:
        model: Its parameters and buffers do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        self.activations = 0
        """Floats in the inputs and outputs of layers with parameters."""
        self.gradients = 0
        """Floats of a record's gradients that are made as a whole."""
        self.foreign = False
        """Whether autograd functions of the model's own take part."""
        self._lasting = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._sizes: dict[int, int] = {}

    @property
    def saved(self) -> int:
        """Bytes that the graph holds."""
        return sum(self._sizes.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor among these."""
        return max(self._sizes.values(), default=0)

    def count(self, tensor: Tensor) -> Tensor:
        """Count what is saved, each storage once."""
        if _storage(tensor) not in self._lasting:
            self._sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class _Trial:
    """What the passes over made-up records have in common."""

    model: nn.Module
    layout: ParameterLayout
    augmentation: Augmentation | None
    without_rule: RowArguments
    channels_last: bool

    def run(self, features: Tensor, index: int) -> _Held:
        """Differentiate the outputs of one record beside others; give what the model holds of them."""
        model = self.model
        named = dict(model.named_parameters())
        parameters, start = {}, 0
        for name, size in zip(self.layout.names, self.layout.sizes, strict=True):
            parameters[name] = (named[name], start)
            start += size
        device = next(model.parameters()).device
        devices = [device] if device.type == "cuda" else []
        kept = [(parameter, parameter.grad) for parameter, _ in parameters.values()]
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            views = _views(features, self.augmentation, device)
            held = _Held(model)

            def finished(tracked: Tracked, uses: list[Use]) -> None:
                held.gradients += tracked.value.numel() * made_whole(uses)
                _require_isolation(tracked, uses, index)

            recorder = Recorder(parameters, len(features), views.shape[1], finished, channels_last=self.channels_last)
            copies = Copies(model, self.without_rule, recorder)
            rows = laid_out(views.flatten(0, 1), channels_last=self.channels_last)
            with copies.in_place(), recorder, saved_tensors_hooks(held.count, lambda tensor: tensor):
                outputs = model(rows)
            held.activations = recorder.activations
            tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
            held.foreign = has_foreign_functions(tensors)
            try:
                _differentiate_one(model, tensors, index * views.shape[1], views.shape[1])
                copies.collect()
                for tracked, uses in recorder.rest():
                    finished(tracked, uses)
            finally:
                for parameter, gradient in kept:
                    parameter.grad = gradient
        return held


def _differentiate_one(model: nn.Module, outputs: list[Tensor], first: int, views: int) -> None:
    """Differentiate something that depends on the outputs of one record only, whose rows begin at ``first``."""
    if outputs:
        chosen = [value[first : first + views].float() for value in outputs]
        differentiate(torch.stack([part.square().sum() + part.sum() for part in chosen]).sum(), model)


def _require_isolation(tracked: Tracked, uses: list[Use], index: int) -> None:
    """Require that no record but one has a gradient."""
    for use, record in product(uses, range(uses[0].num_records)):
        if record == index:
            continue
        low, high = torch.aminmax(use.gradients(record, record + 1))
        if bool(low < 0) or bool(high > 0):  # broken weights make everything NaN, and show nothing
            text = (
                f"the gradients of records mix or change places before they reach parameter {tracked.name}; "
                "leave out what does that to a batch, or make the records come first in every layer"
            )
            raise ModelError(text, text)


def _with(model: nn.Module, without_rule: frozenset[str], error: UnsupportedUseError) -> frozenset[str]:
    """Add the owner of a parameter to the modules without rule, or a larger module if that was not enough."""
    path = owner(model, error.parameter) if error.module is None else error.module
    while path in without_rule:
        if not path:
            raise ModelError(str(error), str(error)) from error
        path = path.rpartition(".")[0]
    inside = f"{path}." if path else ""
    return frozenset(other for other in without_rule if not other.startswith(inside)) | {path}
