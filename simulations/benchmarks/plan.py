"""What the step benchmark measures, and the figures that it is held to.

Nothing here needs torch, so that mistakes show at once.
"""

import importlib.util
from dataclasses import dataclass

from adadpigu_core.exceptions import ConfigurationError

MODELS = ("mnist-cnn", "cifar-cnn", "mlp", "transformer", "wrn-16-4")
IMAGE_MODELS = ("mnist-cnn", "cifar-cnn", "wrn-16-4")

PLAIN = "plain"
ADADPIGU = "adadpigu"
SYSTEM_NOISE = "adadpigu-system-noise"
HOOKS, GHOST, STANDARDISED = "opacus-hooks", "opacus-ghost", "opacus-hooks-standardised"
NAIVE = "naive"
OPACUS = (HOOKS, GHOST, STANDARDISED, NAIVE)
METHODS = (PLAIN, ADADPIGU, SYSTEM_NOISE, *OPACUS)

HOW_TO_GET_OPACUS = "Opacus is not installed; it is in the extra 'benchmark': pip install -e '.[benchmark]'"


@dataclass(frozen=True)
class Bounds:
    """What a step of AdaDPIGU may cost, with 256 records on one thread.

    Args:
        time: Largest ratio of its time to a plain step's in its best layout.
        time_aim: The ratio to aim at.
        memory: Largest ratio of its peak memory to a plain step's in the default layout.
        speedup: How many times faster it has to be than Opacus' hooks followed by the same standardising.
    """

    time: float
    time_aim: float
    memory: float
    speedup: float


BOUNDS = {
    "mnist-cnn": Bounds(2.0, 1.1, 3.0, 2.5),
    "cifar-cnn": Bounds(2.0, 1.1, 3.0, 3.0),
    "mlp": Bounds(2.0, 1.4, 3.0, 80.0),
    "transformer": Bounds(1.6, 1.0, 2.5, 4.0),
    "wrn-16-4": Bounds(2.0, 1.3, 3.0, 2.0),
}
PRECISIONS = ("float32", "bfloat16")  # the engine's, without importing it
BOUNDS_BATCH, BOUNDS_THREADS = 256, 1


@dataclass(frozen=True)
class Layout:
    """How a plain step lays out its images and its batch.

    Args:
        channels_last: Whether images and convolutions are stored with channels last.
        physical_batch: Records that are computed at once; None = all.
    """

    channels_last: bool = False
    physical_batch: int | None = None

    @property
    def name(self) -> str:
        """As it is reported: ``default``, ``channels-last``, ``batch-32``, ``channels-last-batch-32`` ..."""
        parts = ["channels-last"] * self.channels_last
        parts += [f"batch-{self.physical_batch}"] * (self.physical_batch is not None)
        return "-".join(parts) or "default"


@dataclass(frozen=True)
class Task:
    """One method on one network.

    Args:
        model: One of ``MODELS``.
        method: One of ``METHODS``.
        layout: Of a plain step; every other method lays its data out by itself.
        batch: Records a step.
        retention: Share of the coordinates that the mask retains.
        device: ``cpu`` or a CUDA device.
        threads: Of torch.
        limit_gb: Most memory that per-record gradients may take, in GB.
        views: Rows that are computed for each record; a private step averages their gradients before it clips.
        precision: ``float32``, or ``bfloat16`` for the layers' products.
    """

    model: str
    method: str
    layout: Layout
    batch: int
    retention: float
    device: str
    threads: int
    limit_gb: float
    views: int = 1
    precision: str = PRECISIONS[0]

    @property
    def name(self) -> str:
        """The method, and for plain steps in another layout than the default the layout."""
        return self.method if self.layout == Layout() else f"{self.method}-{self.layout.name}"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        models: Some of ``MODELS``.
        methods: Some of ``METHODS``; plain steps are always measured.
        batch: Records a step, at least 1.
        repetitions: Timed steps of each method, at least 1.
        least_s: Go on with further steps until a network has taken this long, in seconds.
        retention: Share of the coordinates that the mask retains, in (0, 1].
        device: ``cpu`` or a CUDA device.
        threads: Of torch, at least 1.
        limit_s: A method is left out once a step takes longer, in seconds.
        limit_gb: A method is left out if the gradients that it keeps would take more memory, in GB.
        views: Views of each record, at least 1. Opacus has none: with several its methods are left out.
        precision: ``float32``, or ``bfloat16`` for the layers' products of plain steps and AdaDPIGU's; Opacus is left
            out.

    Raises:
        ConfigurationError: A value is unknown or out of range.
    """

    models: tuple[str, ...] = MODELS
    methods: tuple[str, ...] = METHODS
    batch: int = 256
    repetitions: int = 5
    retention: float = 0.6
    device: str = "cpu"
    threads: int = 1
    limit_s: float = 120.0
    limit_gb: float = 10.0
    least_s: float = 30.0
    views: int = 1
    precision: str = PRECISIONS[0]

    def __post_init__(self) -> None:
        _check_names("--models", self.models, MODELS)
        _check_names("--precision", (self.precision,), PRECISIONS)
        _check_names("--methods", self.methods, METHODS)
        for key in ("batch", "repetitions", "threads", "views"):
            if getattr(self, key) < 1:
                raise ConfigurationError(f"--{key}: must be at least 1, got {getattr(self, key)}")
        if not 0 < self.retention <= 1:
            raise ConfigurationError(f"--retention: must be in (0, 1], got {self.retention:g}")
        if not self.least_s >= 0:
            raise ConfigurationError(f"--least-s: must be at least 0, got {self.least_s:g}")
        if not (self.limit_s > 0 and self.limit_gb > 0):
            raise ConfigurationError(
                f"--limit-s, --limit-gb: must be positive, got {self.limit_s:g} and {self.limit_gb:g}"
            )

    def tasks(self, model: str) -> list[Task]:
        """Give what is measured on a network, plain steps first, the default layout before the others."""
        methods = [(PLAIN, layout) for layout in _layouts(model, self.batch)]
        left_out = {PLAIN, *(() if self._usual else OPACUS)}
        methods += [(method, Layout()) for method in METHODS if method in self.methods and method not in left_out]
        same = self.batch, self.retention, self.device, self.threads, self.limit_gb, self.views, self.precision
        return [Task(model, method, layout, *same) for method, layout in methods]

    @property
    def _usual(self) -> bool:
        return self.views == 1 and self.precision == PRECISIONS[0]

    @property
    def bounds_apply(self) -> bool:
        """Whether this is the batch and the number of threads that ``BOUNDS`` are for."""
        return self.batch == BOUNDS_BATCH and self.threads == BOUNDS_THREADS and self._usual


def has_opacus() -> bool:
    """Say whether Opacus is installed, without importing it."""
    return importlib.util.find_spec("opacus") is not None


def _layouts(model: str, batch: int) -> list[Layout]:
    sizes = (None, *(size for size in (32, 64) if size < batch))
    formats = (False, True) if model in IMAGE_MODELS else (False,)
    return [Layout(channels_last, size) for channels_last in formats for size in sizes]


def _check_names(key: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigurationError(f"{key}: {', '.join(unknown) or 'nothing'} is none of {', '.join(known)}")
