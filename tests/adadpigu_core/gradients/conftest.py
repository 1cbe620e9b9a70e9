"""A slow and independent oracle for clipped sums, and how far a float32 engine may be from it.

The oracle differentiates a float64 copy of the model for one view of one record at a time, by ordinary autograd: no
vmap, no hooks, and no formula of the engine's.

Tolerance: a norm may be wrong by 1e-5 of the size of what it is computed from, a sum by 1e-5 of the sizes of what is
added up, and both by what float32 costs anybody.

* Size is the norm of m (|g| + |a|) / b. Without a mean it is the norm of u itself. Where the mean takes nearly all of a
  gradient away, it is larger: (g - a)^2 may be computed as g^2 - 2 g a + a^2, which has an error relative to g^2 + a^2.
  Nothing is lost by it: such a record is small beside others, and the bound on what it contributes is held elsewhere,
  without any tolerance.
* What float32 costs is measured, not chosen: `Reference.rounding` is how far ordinary float32 autograd is from the
  oracle for that record, the largest error within a parameter for each of its coordinates, since a single coordinate
  can be right by luck. It is standardised like the gradient, with the rounding of the mean, and a few times its norm
  is allowed. Mostly it is a tenth of the first part. It matters where a coordinate that is tiny by cancellation has a
  scale of 1e-6: nobody can do better in float32. A tolerance relative to the largest gradient would be simpler, and
  would let gross errors in layers with small gradients pass.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients import ClippedSum, check_model, clipped_sum

CLASSES = 3
LAST_BIT = 2.0**-23
RELATIVE = 1e-5
FLOAT32_ERRORS = 6  # how many times worse than float32 autograd, beyond the relative part

REMEDY = re.compile(r"\b(replace|use|set|pass|give|return|call|write|make|move|wrap|rewrite|freeze|leave|must)\b", re.I)

_SCATTERED = ("empty", "one", "tenth", "most", "without a layer", "only a layer", "full")
MASKS = (*_SCATTERED, "rows", "columns", "rows and columns", "third of the rows")
MEANS = ("zero", "random", "near", "far")
SCALES = ("unit", "coordinate", "layer", "tiny", "huge")
NORMS = ("small", "typical", "infinite")

# Mask, mean, scale and clipping norm that every layer is tested with.
USUAL = (
    ("full", "zero", "unit", "typical"),
    ("most", "random", "coordinate", "small"),
    ("without a layer", "near", "layer", "typical"),
    ("only a layer", "zero", "layer", "small"),
    ("tenth", "far", "unit", "infinite"),
    ("rows", "random", "layer", "small"),
    ("columns", "zero", "coordinate", "typical"),
    ("rows and columns", "near", "unit", "small"),
)

Loss = Callable[[Tensor, Tensor], Tensor]
Augmentation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """Gradients and the float32 rounding in them, float64 [n, d], and the shapes of the parameters they consist of."""

    gradients: Tensor
    rounding: Tensor
    shapes: tuple[torch.Size, ...]


@dataclass(frozen=True)
class Expected:
    """Norms [n], contributions [n, d], tolerances of norms in two parts [n] (1e-5, float32), factors [n]; float64."""

    norms: Tensor
    contributions: Tensor
    relative: Tensor
    rounding: Tensor
    factors: Tensor

    @property
    def tolerances(self) -> Tensor:
        return self.relative + self.rounding

    @property
    def total(self) -> Tensor:
        return self.contributions.sum(0)

    @property
    def total_tolerance(self) -> float:
        """For the distance of the sums: 1e-5 of what is added up, and what float32 costs a gradient and its factor."""
        usable = torch.isfinite(self.norms)
        return float((self.factors * (self.relative + 2 * self.rounding))[usable].sum())


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return -F.log_softmax(outputs, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _per_token(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of outputs [n, T, classes] over tokens; the wanted class goes round with the position."""
    positions = torch.arange(outputs.shape[1])
    targets = (labels.unsqueeze(1) + positions) % outputs.shape[2]
    return _cross_entropy(outputs, targets).mean(1)


def _built(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model with no weight at a special value: biases that start at 0 and gains that start at 1 could hide errors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _records(shape: tuple[int, ...], count: int = 3, *, seed: int = 0, tokens: int | None = None) -> Records:
    """Normal features, or whole numbers below ``tokens``."""
    generator = torch.Generator().manual_seed(seed)
    if tokens is None:
        features = torch.randn(count, *shape, generator=generator)
    else:
        features = torch.randint(0, tokens, (count, *shape), generator=generator).float()
    return Records(features, torch.randint(0, CLASSES, (count,), generator=generator))


def _gradients(model: nn.Module, loss: Loss, records: Records, augmentation: Augmentation | None) -> Tensor:
    """Gradient of each record as if it were alone, [n, d]; the mean over its views, one forward for each of them."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    dtype = parameters[0].dtype
    rows = []
    for number in range(len(records)):
        alone = records.select([number])
        views = alone.features if augmentation is None else augmentation(alone.features).squeeze(0)
        row = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype)
        for view in views:
            value = loss(model(view.unsqueeze(0).to(dtype)), alone.labels).sum()
            found = torch.autograd.grad(value, parameters, allow_unused=True) if value.requires_grad else ()
            pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
            row += torch.cat([piece.reshape(-1) for piece in pieces]) / len(views)
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros(0, sum(p.numel() for p in parameters), dtype=dtype)


def _reference(
    model: nn.Module, records: Records, loss: Loss = _cross_entropy, augmentation: Augmentation | None = None
) -> Reference:
    copied = copy.deepcopy(model)
    with torch.enable_grad():
        single = _gradients(copied, loss, records, augmentation).double()
        double = _gradients(copied.double(), loss, records, augmentation)
    shapes = tuple(p.shape for p in model.parameters() if p.requires_grad)
    sizes = tuple(shape.numel() for shape in shapes)
    errors = []
    for exact, rounded in zip(double.split(list(sizes), 1), single.split(list(sizes), 1), strict=True):
        error = (exact - rounded).abs().amax(1) + LAST_BIT * exact.abs().amax(1)
        errors.append(error.unsqueeze(1).expand_as(exact))
    return Reference(double, torch.cat(errors, 1), shapes)


def _norms(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=1)


def _expected(reference: Reference, given: Standardisation, clipping_norm: float) -> Expected:
    mask, mean, scale = given.mask, given.mean.double(), given.scale.double()
    u = torch.where(mask, (reference.gradients - mean) / scale, 0.0)
    norms = _norms(u)
    sizes = torch.where(mask, (reference.gradients.abs() + mean.abs()) / scale, 0.0)
    errors = torch.where(mask, (reference.rounding + LAST_BIT * mean.abs()) / scale, 0.0)
    relative, rounding = RELATIVE * _norms(sizes), FLOAT32_ERRORS * _norms(errors)
    factors = torch.where(norms > clipping_norm, clipping_norm / norms, 1.0)
    contributions = torch.where(torch.isfinite(norms).unsqueeze(1), factors.unsqueeze(1) * u, 0.0)
    return Expected(norms, contributions, relative, rounding, factors)


def _standardisation(reference: Reference, mask: str, mean: str, scale: str, seed: int = 0) -> Standardisation:
    """A named mask, mean and scale, in proportion to the gradients of these records."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([shape.numel() for shape in reference.shapes])
    d, layers = int(sizes.sum()), len(sizes)
    layer = torch.repeat_interleave(torch.arange(layers), sizes)
    chosen = int(torch.randint(layers, (), generator=generator))
    uniform = torch.rand(d, generator=generator)
    masks = {
        "empty": torch.zeros(d, dtype=torch.bool),
        "one": torch.arange(d) == int(torch.randint(d, (), generator=generator)),
        "tenth": uniform < 0.1,
        "most": uniform < 0.6,
        "without a layer": layer != chosen,
        "only a layer": layer == chosen,
        "full": torch.ones(d, dtype=torch.bool),
        "rows": _structured(reference.shapes, (0,), seed),
        "columns": _structured(reference.shapes, (1,), seed),
        "rows and columns": _structured(reference.shapes, (0, 1), seed) & (uniform < 0.8),
        "third of the rows": _third(reference.shapes, seed % 3),
    }
    gradients = reference.gradients if len(reference.gradients) else torch.ones(1, d, dtype=torch.float64)
    typical = gradients.square().mean().sqrt()
    means = {
        "zero": torch.zeros(d),
        "random": typical * torch.randn(d, generator=generator),
        "near": 1.01 * gradients[0],
        "far": 100 * typical * torch.randn(d, generator=generator),
    }
    exponents = 12 * torch.rand(d, generator=generator) - 6
    scales = {
        "unit": torch.ones(d),
        "coordinate": 10**exponents,
        "layer": 10 ** exponents[layer],
        "tiny": torch.full((d,), 1e-6),
        "huge": torch.full((d,), 1e6),
    }
    return Standardisation(masks[mask], means[mean].float(), scales[scale].float())


def _structured(shapes: tuple[torch.Size, ...], dimensions: tuple[int, ...], seed: int) -> Tensor:
    """Half of the slices of each parameter along some dimensions; a vector has the first dimension only."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for shape in shapes:
        piece = torch.ones(shape, dtype=torch.bool)
        for dimension in dimensions:
            if dimension < len(shape):
                chosen = torch.rand(shape[dimension], generator=generator) < 0.5
                piece &= chosen.view([-1 if axis == dimension else 1 for axis in range(len(shape))])
        pieces.append(piece.flatten())
    return torch.cat(pieces)


def _third(shapes: tuple[torch.Size, ...], number: int) -> Tensor:
    """One third of the rows of each parameter, such as the queries of attention."""
    pieces = []
    for shape in shapes:
        count = shape[0] if shape else 1
        chosen = 3 * torch.arange(count) // count == number
        pieces.append(chosen.repeat_interleave(shape.numel() // count))
    return torch.cat(pieces)


def _clipping_norm(reference: Reference, given: Standardisation, kind: str) -> float:
    """Infinite, the median norm, so that about half of the records are clipped, or a hundredth of it."""
    norms = _expected(reference, given, math.inf).norms
    median = float(norms.median()) if len(norms) and float(norms.median()) > 0 else 1.0
    return {"small": 0.01 * median, "typical": median, "infinite": math.inf}[kind]


def _exact_norm(total: Tensor) -> float:
    """Norm of a vector, its squares added up without rounding."""
    return math.sqrt(math.fsum(total.double().square().tolist()))


def _compare(result: ClippedSum, expected: Expected, given: Standardisation, what: object = "") -> None:
    """Fail unless a result is the oracle's up to rounding."""
    assert result.total.dtype == torch.float32
    assert result.norms.dtype == torch.float64
    assert result.total.shape == given.mask.shape
    assert result.norms.shape == expected.norms.shape
    assert not result.total.requires_grad
    assert not result.norms.requires_grad
    assert not result.total[~given.mask].any(), f"{what}: not zero where the mask is False"
    wrong = (result.norms - expected.norms).abs() / expected.tolerances.clamp(min=1e-300)
    assert bool((wrong <= 1).all()), f"{what}: norms {result.norms} are not {expected.norms}, {wrong} times too far"
    distance, allowed = float((result.total.double() - expected.total).norm()), expected.total_tolerance
    assert distance <= allowed, f"{what}: sum is {distance / max(allowed, 1e-300)} times too far away"


def _agree(
    model: nn.Module,
    records: Records,
    loss: Loss = _cross_entropy,
    *,
    settings: tuple[tuple[str, str, str, str], ...] = USUAL,
    seed: int = 0,
    **arguments: Any,
) -> None:
    """Compare engine and oracle under several standardisations, and hold the bound of every record alone."""
    reference = _reference(model, records, loss, arguments.get("augmentation"))
    for number, (mask, mean, scale, norm) in enumerate(settings):
        given = _standardisation(reference, mask, mean, scale, seed + number)
        clipping_norm = _clipping_norm(reference, given, norm)
        expected = _expected(reference, given, clipping_norm)
        result = clipped_sum(model, loss, records, given, clipping_norm, **arguments)
        _compare(result, expected, given, (mask, mean, scale, norm))
        if len(records):
            bound = clipping_norm if math.isfinite(clipping_norm) else _clipping_norm(reference, given, "small")
            alone = records.select([number % len(records)])
            total = clipped_sum(model, loss, alone, given, bound, **arguments).total
            assert _exact_norm(total) <= bound, f"{mask, mean, scale, norm}: a record contributes more than C"


def _agree_or_refuse(model: nn.Module, records: Records, *names: str, **arguments: Any) -> None:
    """For what need not be supported, but must never be silently wrong: a refusal has one of ``names`` and a remedy."""
    try:
        shape = tuple(records.features.shape[1:])
        check_model(model, arguments.get("loss", _cross_entropy), shape, CLASSES)  # as a client does before a run
        _agree(model, records, **arguments)
    except ModelError as error:
        refusal = str(error)
    else:
        return
    assert any(name in refusal for name in names), refusal
    assert REMEDY.search(refusal), refusal


@pytest.fixture(scope="session")
def agree_or_refuse() -> Callable[..., None]:
    return _agree_or_refuse


@pytest.fixture(scope="session")
def remedy() -> re.Pattern[str]:
    return REMEDY


@pytest.fixture(scope="session")
def cross_entropy() -> Loss:
    return _cross_entropy


@pytest.fixture(scope="session")
def per_token() -> Loss:
    return _per_token


@pytest.fixture(scope="session")
def built() -> Callable[..., nn.Module]:
    return _built


@pytest.fixture(scope="session")
def records_of() -> Callable[..., Records]:
    return _records


@pytest.fixture(scope="session")
def reference_of() -> Callable[..., Reference]:
    return _reference


@pytest.fixture(scope="session")
def standardisation_of() -> Callable[..., Standardisation]:
    return _standardisation


@pytest.fixture(scope="session")
def clipping_norm_of() -> Callable[..., float]:
    return _clipping_norm


@pytest.fixture(scope="session")
def expected_of() -> Callable[..., Expected]:
    return _expected


@pytest.fixture(scope="session")
def compare() -> Callable[..., None]:
    return _compare


@pytest.fixture(scope="session")
def exact_norm() -> Callable[[Tensor], float]:
    return _exact_norm


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    return _agree


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that ask for ``every_mask`` with each of them."""
    if "every_mask" in metafunc.fixturenames:
        metafunc.parametrize("every_mask", MASKS)


@pytest.fixture(scope="session")
def setting_names() -> tuple[tuple[str, ...], ...]:
    """Names of masks, means, scales and clipping norms."""
    return MASKS, MEANS, SCALES, NORMS


@pytest.fixture(scope="session")
def all_settings() -> Iterator[Any]:
    """Every mask with every mean and scale; the clipping norms take turns."""
    names = itertools.product(MASKS, MEANS, SCALES)
    return tuple((*chosen, NORMS[number % len(NORMS)]) for number, chosen in enumerate(names))
