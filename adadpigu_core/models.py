"""The networks of the experiments, and what a model must be for per-record privacy.

Clipping bounds the influence of a record only if the record enters the sum through its own gradient alone. A layer
that mixes the records of a batch, such as batch normalisation, breaks that silently: the clipped norms look right and
the guarantee is gone. ``check_private`` knows such layers by name, ``check_isolation`` finds the others by experiment.

A network is a function of ``ModelSpec`` and a seed, so that server and clients build the same one without sending
code. Convolutional networks fit one image size; ``mlp`` and ``linear`` take any shape; ``package.module:factory`` is
the user's own, see ``factories``. Left out: weights that are there already, for which see ``model_file``, and mixing
that is weaker than float32 rounding.
"""

import copy
import hashlib
import json
import math
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from adadpigu_core import factories, front_ends
from adadpigu_core.buffers import Buffers
from adadpigu_core.exceptions import ConfigurationError, ModelError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
GROUP_AND_WEIGHTS = "group-and-weights"
NORMALISATIONS = ("none", "group", GROUP_AND_WEIGHTS)


@dataclass(frozen=True)
class _Block:
    """Convolution, normalisation, activation, and pooling by windows of 2 if there is a pool stride."""

    channels: int
    kernel: int
    stride: int
    padding: int
    groups: int
    pool_stride: int | None


@dataclass(frozen=True)
class _Convolutional:
    """Blocks for images of one size, then an optional hidden layer."""

    image: tuple[int, int]
    features: int
    hidden: int | None
    blocks: tuple[_Block, ...]


_CONVOLUTIONAL = {
    # The networks of the literature on private learning (Tramer and Boneh 2021).
    "mnist-cnn": _Convolutional((28, 28), 512, 32, (_Block(16, 8, 2, 2, 4, 1), _Block(32, 4, 2, 0, 8, 1))),
    "cifar-cnn": _Convolutional(
        (32, 32),
        2048,
        128,
        tuple(_Block(width, 3, 1, 1, 8, pool) for width in (32, 64, 128) for pool in (None, 2)),
    ),
    # Narrow, because noise grows with the number of parameters and a client of the demo has 143 records.
    "digits-cnn": _Convolutional((8, 8), 128, None, (_Block(8, 3, 1, 1, 4, None), _Block(8, 3, 1, 1, 4, 2))),
}
_MLP_HIDDEN = 128
_ALL_OF = 8  # records of a batch whose isolation is checked one by one
# What outputs may differ by, as a share of the largest: kernels depend on the size of a batch, and on nothing else.
_SAME_SIZE, _OTHER_SIZE = 1e-6, 1e-4
NAMES = (*_CONVOLUTIONAL, "mlp", "linear")
_DEFAULTS = {
    "digits": "digits-cnn",
    "mnist": "mnist-cnn",
    "fashion-mnist": "mnist-cnn",
    "cifar-10": "cifar-cnn",
    "wide-table": "linear",
    "mnist-background": "linear",
}


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and norm 1: weight standardisation (Qiao et al. 2019, arXiv 1903.10520).

    A function of the weights and of no record. The engine has no rule for it, so that it takes the generic way.
    """

    _LEAST = 1e-4  # added to the squared norm of a filter

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the standardised filters."""
        centred = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        norm = (centred.square().sum(dim=(1, 2, 3), keepdim=True) + self._LEAST).sqrt()
        return F.conv2d(input, centred / norm, self.bias, self.stride, self.padding, self.dilation, self.groups)


@dataclass(frozen=True)
class ModelSpec:
    """What a network is built from. Public.

    Args:
        name: One of ``NAMES``, or the import path of a factory.
        activation: "relu" or "tanh"; "linear" and factories take none.
        normalisation: "none", "group": group normalisation without parameters after each convolution, or
            "group-and-weights": the weights of each filter are standardised as well.
        input_shape: Shape of one record; [channels, height, width] for the convolutional networks.
        num_classes: Number of outputs, at least 2.
        features: Front end between record and network, one of ``front_ends.FEATURES``.

    Raises:
        ConfigurationError: A value is unknown or out of range, or the network does not take this shape.
    """

    name: str
    activation: str
    normalisation: str
    input_shape: tuple[int, ...]
    num_classes: int
    features: str = front_ends.RAW

    def __post_init__(self) -> None:
        for key, value, choices in (
            ("model", self.name, (self.name,) if factories.is_factory(self.name) else NAMES),
            ("activation", self.activation, tuple(ACTIVATIONS)),
            ("normalisation", self.normalisation, NORMALISATIONS),
            ("features", self.features, front_ends.FEATURES),
        ):
            if value not in choices:
                more = " or package.module:factory" if key == "model" else ""
                raise ConfigurationError(f"unknown {key} {value!r}: choose {', '.join(choices)}{more}")
        if self.num_classes < 2:
            raise ConfigurationError(f"num_classes is {self.num_classes}; a classifier needs 2 at least")
        self._check_shape()

    def _check_shape(self) -> None:
        if not self.input_shape or any(size < 1 for size in self.input_shape):
            raise ConfigurationError(f"input_shape {self.input_shape} is not a shape")
        shape = self.feature_shape
        plan = _CONVOLUTIONAL.get(self.name)
        if plan is None:
            if self.normalisation != "none":
                raise ConfigurationError(f"{self.name} has no convolution: set normalisation to 'none'")
        elif len(shape) != 3 or shape[1:] != plan.image:
            raise ConfigurationError(
                f"{self.name} takes images of shape (channels, {plan.image[0]}, {plan.image[1]}), not "
                f"{shape}: {_that_fit(shape)} fit"
            )

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of what the network takes for one record."""
        return front_ends.feature_shape(self.features, self.input_shape)


def _that_fit(input_shape: tuple[int, ...]) -> str:
    images = (name for name, plan in _CONVOLUTIONAL.items() if input_shape[1:] == plan.image)
    return ", ".join((*images, "mlp", "linear"))


def default_model(dataset_name: str) -> str:
    """Name the network that ``auto`` stands for.

    Raises:
        ConfigurationError: There is no data set of that name.

    >>> default_model("mnist"), default_model("npz:mine.npz")
    ('mnist-cnn', 'mlp')
    """
    if dataset_name.startswith(("npz:", "csv:", "images:")):
        return "mlp"
    if dataset_name.startswith("text:"):
        return "linear"
    if dataset_name not in _DEFAULTS:
        known = ", ".join(_DEFAULTS)
        raise ConfigurationError(
            f"no default model for data set {dataset_name!r}: known are {known}, npz:PATH, csv:PATH, images:PATH, "
            "text:PATH"
        )
    return _DEFAULTS[dataset_name]


def build(spec: ModelSpec, *, seed: int) -> nn.Module:
    """Build a network with torch's default initialisation.

    The same spec and seed give the same weights. The global random generator is left as it was, but it is borrowed
    meanwhile: do not build in two threads at once.

    Args:
        spec: Which network.
        seed: Seed of the initial weights. Public.

    Returns:
        A network that maps features [n, *spec.feature_shape] to logits [n, num_classes].
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reset the generators of the accelerators, which are not restored.
        torch.default_generator.manual_seed(seed)
        if factories.is_factory(spec.name):
            return factories.build(spec.name, spec.feature_shape, spec.num_classes)
        plan = _CONVOLUTIONAL.get(spec.name)
        return _convolutional(plan, spec) if plan else _fully_connected(spec)


def normalisation_of(name: str, asked: str) -> str:
    """What of a wish for normalisation applies to a model: it stands behind convolutions of this package's networks."""
    return asked if name.endswith("-cnn") else "none"


def fingerprint(spec: ModelSpec) -> str:
    """Name a model for a policy: 16 hex digits over the spec and, if it is the user's own, over its installed source.

    Nothing is imported or built.

    Raises:
        ConfigurationError: If the source of a factory is not installed here.
    """
    source = factories.source_fingerprint(spec.name) if factories.is_factory(spec.name) else ""
    # what has no front end is named as it was before there were any
    parts = {key: value for key, value in asdict(spec).items() if (key, value) != ("features", front_ends.RAW)}
    text = json.dumps([parts, source], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _convolutional(plan: _Convolutional, spec: ModelSpec) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = spec.feature_shape[0]
    for number, block in enumerate(plan.blocks, start=1):
        convolution = StandardisedConv2d if spec.normalisation == GROUP_AND_WEIGHTS else nn.Conv2d
        layers[f"convolution{number}"] = convolution(
            channels, block.channels, block.kernel, block.stride, block.padding
        )
        channels = block.channels
        if spec.normalisation != "none":
            layers[f"normalisation{number}"] = nn.GroupNorm(block.groups, channels, affine=False)
        layers[f"activation{number}"] = ACTIVATIONS[spec.activation]()
        if block.pool_stride is not None:
            layers[f"pool{number}"] = nn.MaxPool2d(2, block.pool_stride)
    layers["flatten"] = nn.Flatten()
    return _with_head(layers, plan.features, plan.hidden, spec)


def _fully_connected(spec: ModelSpec) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    return _with_head(layers, math.prod(spec.feature_shape), _MLP_HIDDEN if spec.name == "mlp" else None, spec)


def _with_head(layers: "OrderedDict[str, nn.Module]", features: int, hidden: int | None, spec: ModelSpec) -> nn.Module:
    if hidden is not None:
        layers["hidden"] = nn.Linear(features, hidden)
        layers["activation"] = ACTIVATIONS[spec.activation]()
        features = hidden
    layers["output"] = nn.Linear(features, spec.num_classes)
    return nn.Sequential(layers)


def check_private(model: nn.Module) -> None:
    """Check what can be seen without running a model.

    Privacy: needed, not sufficient: see `check_isolation` for layers that mix records under another name.

    Raises:
        ModelError: A layer mixes records, no parameter is trainable, or a parameter is not float32. The text is
            public, as the model is.
    """
    for path, module in model.named_modules():
        fault = _mixing_fault(module)
        if fault:
            _refuse(f"layer {path or '(the model itself)'} is a {type(module).__name__}: {fault}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        _refuse(f"{type(model).__name__} has no trainable parameter: set requires_grad on what is to be trained")
    for path, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            _refuse(f"parameter {path} is {parameter.dtype}: convert the model with model.float()")
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            _refuse(f"parameter {path} has hooks on its gradient, which see the sum over all records: leave them out")


def _mixing_fault(module: nn.Module) -> str | None:
    if isinstance(module, _BatchNorm):
        groups = math.gcd(module.num_features, 8)
        return (
            "its statistics mix the records of a batch; "
            f"replace it with nn.GroupNorm({groups}, {module.num_features or 'channels'})"
        )
    if module._backward_hooks or module._backward_pre_hooks:
        return "its backward hooks see the gradients of all records at once; leave them out"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return "its running statistics are computed from records without noise; set track_running_stats=False"
    return None


def _refuse(message: str) -> NoReturn:
    raise ModelError(message, public_message=message)


def check_isolation(model: nn.Module, features: Tensor, *, seeds: int = 1) -> None:
    """Check by experiment that the output for a record does not depend on the other records.

    Two experiments on a copy of the model. In training mode every other record is replaced, with the same random
    draws for dropout; in evaluation mode every record is also sent alone, because the number of records is private
    too.

    Args:
        model: Any model whose first output dimension counts the records.
        features: [n, *input_shape], made-up ones; of more than 8 only the first and the last are looked at.
        seeds: How many random draws to look at in training mode, for what is mixed now and then.

    Raises:
        ModelError: The model does not run, or some output depends on other records.
        ValueError: Fewer than two records, which show nothing.
    """
    if len(features) < 2:
        raise ValueError(f"features has {len(features)} records; two at least are needed")
    copied = copy.deepcopy(model).cpu()
    features = features.cpu()
    indices = range(len(features)) if len(features) <= _ALL_OF else (0, len(features) - 1)
    copied.train()
    together = _seeded_forward(copied, features)
    for index in indices:
        alike = features[index : index + 1].expand_as(features).contiguous()
        _compare(together[index], _seeded_forward(copied, alike)[index], model, index, "are replaced", _SAME_SIZE)
    for seed in range(1, seeds):
        alike = features[:1].expand_as(features).contiguous()
        expected, found = (_seeded_forward(copied, batch, seed) for batch in (features, alike))
        _compare(expected[0], found[0], model, 0, "are replaced", _SAME_SIZE)
    _compare(together[0], _seeded_forward(copied, features)[0], model, 0, "have been seen before", _SAME_SIZE)
    copied.eval()
    together = _seeded_forward(copied, features)
    for index in indices:
        alone = _seeded_forward(copied, features[index : index + 1])
        _compare(together[index], alone[0], model, index, "are left out", _OTHER_SIZE)


def _seeded_forward(model: nn.Module, features: Tensor, seed: int = 0) -> Tensor:
    buffers, versions = Buffers(model), [parameter._version for parameter in model.parameters()]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            output = model(features)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ModelError(f"{type(model).__name__} cannot take features {[*features.shape]}: {error}") from error
    buffers.restore()
    if versions != [parameter._version for parameter in model.parameters()]:
        _refuse(f"{type(model).__name__} writes into its parameters when it is called: set them beforehand")
    if not isinstance(output, Tensor) or output.shape[:1] != features.shape[:1]:
        _refuse(f"{type(model).__name__} does not give one output per record")
    return output


def _compare(expected: Tensor, found: Tensor, model: nn.Module, index: int, change: str, allowed: float) -> None:
    """Compare up to float32 rounding, relative to the largest output."""
    if expected.shape != found.shape:
        _refuse(f"{type(model).__name__} gives outputs of another shape when the other records {change}")
    tolerance = allowed * (float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) + 1e-2)
    if not torch.allclose(expected, found, rtol=0.0, atol=tolerance, equal_nan=True):
        name = type(model).__name__
        raise ModelError(
            f"the output of {name} for record {index} changes when the other records {change}: "
            "it mixes records; leave out what does that to a batch",
            public_message=f"{name} mixes the records of a batch",
        )
