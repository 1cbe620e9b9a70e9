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

from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients.blocks import made_whole
from adadpigu_core.gradients.clipping import Augmentation
from adadpigu_core.gradients.generic import Copies, RowArguments, owner, row_arguments
from adadpigu_core.gradients.recorder import Recorder, Tracked, UnsupportedUseError, differentiate
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
    """

    without_rule: RowArguments
    bytes_per_record: int


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
        known[key] = _look(model, layout, shape, augmentation)
    return known[key]


def _look(
    model: nn.Module, layout: ParameterLayout, shape: tuple[int, ...], augmentation: Augmentation | None
) -> Survey:
    made_up = [
        torch.rand(count, *shape, dtype=torch.float32, generator=torch.Generator().manual_seed(0)) for count in (2, 3)
    ]
    modules: frozenset[str] = frozenset()
    while True:
        without_rule = _rows_of(model, modules, made_up, augmentation)
        try:
            held = [_try(model, layout, features, augmentation, without_rule) for features in made_up][-1]
            break
        except UnsupportedUseError as error:
            modules = _with(model, modules, error)
    of_layers = _BYTES * _COPIES_OF_ACTIVATIONS * held.activations
    of_graph = held.saved + _COPIES_OF_LARGEST * held.largest
    of_gradients = _BYTES * _COPIES_OF_GRADIENTS * held.gradients
    return Survey(without_rule, max(1, max(of_layers, of_graph) // len(made_up[-1]) + of_gradients))


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


def _try(
    model: nn.Module,
    layout: ParameterLayout,
    features: Tensor,
    augmentation: Augmentation | None,
    without_rule: RowArguments,
) -> _Held:
    """Run a model on made-up records; give what it holds of them."""
    named = dict(model.named_parameters())
    parameters, start = {}, 0
    for name, size in zip(layout.names, layout.sizes, strict=True):
        parameters[name] = (named[name], start)
        start += size
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    kept = [(parameter, parameter.grad) for parameter, _ in parameters.values()]
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        views = _views(features, augmentation, device)
        held = _Held(model)

        def finished(tracked: Tracked, uses: list[Use]) -> None:
            held.gradients += tracked.value.numel() * made_whole(uses)
            _require_isolation(tracked, uses)

        recorder = Recorder(parameters, len(features), views.shape[1], finished)
        copies = Copies(model, without_rule, recorder)
        with copies.in_place(), recorder, saved_tensors_hooks(held.count, lambda tensor: tensor):
            outputs = model(views.flatten(0, 1))
        held.activations = recorder.activations
        try:
            _differentiate_first(model, outputs, views.shape[1])
            copies.collect()
            for tracked, uses in recorder.rest():
                finished(tracked, uses)
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient
    return held


def _differentiate_first(model: nn.Module, outputs: Any, views: int) -> None:
    """Differentiate something that depends on the outputs of the first record only."""
    tensors = [value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor) and value.requires_grad]
    if tensors:
        firsts = [value[:views].float() for value in tensors]
        differentiate(torch.stack([first.square().sum() + first.sum() for first in firsts]).sum(), model)


def _require_isolation(tracked: Tracked, uses: list[Use]) -> None:
    """Require that no record but the first has a gradient."""
    for use, record in product(uses, range(1, uses[0].num_records)):
        low, high = torch.aminmax(use.gradients(record, record + 1))
        if bool(low < 0) or bool(high > 0):  # broken weights make everything NaN, and show nothing
            text = (
                f"the gradients of records mix or change places before they reach parameter {tracked.name}; "
                "leave out what does that to a batch, or make the records come first in every layer"
            )
            raise ModelError(text, text)


def _with(model: nn.Module, without_rule: frozenset[str], error: UnsupportedUseError) -> frozenset[str]:
    """Add the owner of a parameter to the modules without rule, or a larger module if that was not enough."""
    path = owner(model, error.parameter)
    while path in without_rule:
        if not path:
            text = f"parameter {error.parameter} {error.reason}"
            raise ModelError(text, text) from error
        path = path.rpartition(".")[0]
    inside = f"{path}." if path else ""
    return frozenset(other for other in without_rule if not other.startswith(inside)) | {path}
