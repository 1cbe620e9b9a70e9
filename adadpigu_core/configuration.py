"""Every setting of a run, in one place.

Settings are written as nested TOML tables in kebab-case and travel through Flower as flat dotted keys; here they become
frozen dataclasses, one per concern. ``parse`` reports everything that is wrong at once. Whatever bears on the guarantee
is in ``PrivacySettings``; a client obeys it only as far as its own limits allow.
"""

import difflib
import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from adadpigu_core import datasets, factories, front_ends, models, settings_file
from adadpigu_core.accounting import NoiseSchedule, PlanShape, pretraining_rounds
from adadpigu_core.adaptive_clipping import GRANULARITIES, RULES, AdaptiveClipping
from adadpigu_core.augmentation import AUGMENTATIONS, MOST_VIEWS
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.gradients import PRECISIONS, GradientOptions
from adadpigu_core.importance import DRIFT, MEASURES
from adadpigu_core.masking import RETAINED_AS, SCHEDULES
from adadpigu_core.messages import MOST_STEPS
from adadpigu_core.methods import METHODS, settings_of
from adadpigu_core.noise_schedule import LARGEST_RATIO, LEAST_RATIO, NOISE_SCHEDULES
from adadpigu_core.printable import printable
from adadpigu_core.shrinkage import SHRINKAGE_GRANULARITIES, SHRINKAGE_RULES
from adadpigu_core.weights import AGGREGATIONS

Value = settings_file.Value
OWNERS = ("server", "client")
CONSENSUS, PUBLIC, ORACLE = "consensus", "public", "oracle"
NOT_RELEASED = ("random", PUBLIC, ORACLE)  # rankings that no release goes into
PUBLIC_DIGITS = "public-digits"  # weights that are trained on them
RANKINGS = (CONSENSUS, "local", *NOT_RELEASED)
PARTITIONS = ("iid", "dirichlet")
OPTIMISERS = ("sgd", "adam")
DEVICES = ("cpu", "cuda", "auto")
_LARGEST_INTEGER = 2**63 - 1  # that Flower carries


def _setting(
    default: Value,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> Any:  # dataclasses.field is typed as returning the default
    limits = {"choices": choices, "above": above, "least": least, "most": most, "below": below}
    return field(default=default, metadata={"meaning": meaning, **limits})


@dataclass(frozen=True)
class TaskSettings:
    """What is learnt."""

    dataset: str = _setting("digits", f"a name or a place: {datasets.CHOICES}")
    model: str = _setting(
        "auto", "auto (by data set), digits-cnn, mnist-cnn, cifar-cnn, mlp, linear or package.module:factory"
    )
    activation: str = _setting("relu", "activation of the networks", choices=tuple(models.ACTIVATIONS))
    normalisation: str = _setting("group", "after each convolution, and of its weights", choices=models.NORMALISATIONS)
    features: str = _setting("raw", "fixed features that the network sees", choices=front_ends.FEATURES)
    evaluate_on: str = _setting(
        "test", "validation: a tenth of the training records, which then do not train", choices=datasets.EVALUATED_ON
    )
    weights: str = _setting(
        "", f"public weights to start from: {PUBLIC_DIGITS}, or a run's model.npz; empty: random ones"
    )


@dataclass(frozen=True)
class FederationSettings:
    """Who takes part, how often, and how updates are put together."""

    num_clients: int = _setting(10, "clients to simulate, or to wait for at the start", least=1)
    num_rounds: int = _setting(100, "rounds in all, pretraining included", least=1)
    local_steps: int = _setting(1, "private steps a client takes in a round", least=1)
    clients: str = _setting(
        "", "simulation only: CSV of clients with columns id,records,target_epsilon; empty: all alike"
    )
    partition: str = _setting("iid", "how simulated clients share the records", choices=PARTITIONS)
    dirichlet_alpha: float = _setting(0.5, "skew of a dirichlet partition; smaller is more skewed", above=0)
    partition_seed: int = _setting(0, "which partition; keep it over runs that share a ledger-dir", least=0)
    aggregation: str = _setting("precision", "public weights of the updates", choices=AGGREGATIONS)
    round_timeout: float = _setting(3600.0, "seconds to wait for the updates of a round", above=0)
    start_timeout: float = _setting(30.0, "seconds to wait for num-clients clients; later ones may still join", least=0)


@dataclass(frozen=True)
class PrivacySettings:
    """What bears on the guarantee: one record of a client, add-or-remove-one, everything composed."""

    target_epsilon: float = _setting(8.0, "budget of each client over all it ever releases from its data", above=0)
    target_delta: float = _setting(1e-5, "delta of that budget", above=0, below=1)
    sampling_probability: float = _setting(0.5, "chance of a record to enter a step", above=0, most=1)
    clipping_norm: float = _setting(1.0, "largest norm of a record's standardised gradient", above=0)
    pretraining_share: float = _setting(0.1, "share of the budget for pretraining, in 1/noise^2", above=0, below=1)
    noise_schedule: str = _setting("constant", "how noise moves over the training rounds", choices=NOISE_SCHEDULES)
    final_noise_ratio: float = _setting(
        1.0, "noise of the last round over that of the first", least=LEAST_RATIO, most=LARGEST_RATIO
    )
    ledger_dir: str = _setting("", "simulation only: lasting folder of ledgers; empty: inside the run folder")


@dataclass(frozen=True)
class PretrainingSettings:
    """How coordinates are ranked."""

    round_share: float = _setting(0.1, "share of the rounds spent on pretraining; 0 leaves it out", least=0, below=1)
    measure: str = _setting(DRIFT, "score of a coordinate", choices=(*MEASURES, DRIFT))
    ranking: str = _setting(
        CONSENSUS,
        "whose importance ranks; public: made-up images; controls: random, and oracle (simulation only, not private)",
        choices=RANKINGS,
    )


@dataclass(frozen=True)
class RetentionSettings:
    """Progressive unfreezing: which share of the coordinates is trained, when."""

    schedule: str = _setting("linear", "how the share grows", choices=SCHEDULES)
    initial_ratio: float = _setting(0.9, "share retained when training starts", above=0, most=1)
    final_ratio: float = _setting(1.0, "share retained in the end (constant: without effect)", above=0, most=1)
    period: float = _setting(0.1, "part of training over which the share grows", above=0, most=1)
    granularity: str = _setting("coordinate", "what is ranked and retained as a whole", choices=RETAINED_AS)
    rerank_every: int = _setting(0, "training rounds between rankings by all releases so far; 0: ranked once", least=0)


@dataclass(frozen=True)
class AdaptiveClippingSettings:
    """Standardisation of gradients by statistics of releases."""

    rule: str = _setting("none", "none, energy (noise-corrected) or paper", choices=RULES)
    owner: str = _setting("server", "who keeps the statistics", choices=OWNERS)
    granularity: str = _setting("layer", "what shares one scale", choices=GRANULARITIES)
    decay: float = _setting(0.9, "weight of the past in running means", least=0, below=1)
    floor: float = _setting(0.05, "smallest scale, as a share of the mean scale", above=0, most=1)
    shrinkage: float = _setting(0.0, "weight of the layer in a row's or coordinate's scale", least=0, most=1)
    centre: bool = _setting(False, "subtract the running mean")

    @property
    def clipping(self) -> AdaptiveClipping:
        """The settings of the statistics themselves."""
        return AdaptiveClipping(self.rule, self.granularity, self.decay, self.floor, self.shrinkage, self.centre)


@dataclass(frozen=True)
class ShrinkageSettings:
    """Soft masks: the server moves what is signal further than what is noise."""

    rule: str = _setting("none", "how the signal is estimated", choices=SHRINKAGE_RULES)
    granularity: str = _setting("column", "what shares one factor", choices=SHRINKAGE_GRANULARITIES)


@dataclass(frozen=True)
class OptimiserSettings:
    """How released gradients move the weights; all of it is post-processing."""

    local_learning_rate: float = _setting(0.0, "rate of a client's private steps; 0: from the plan", least=0)
    server_learning_rate: float = _setting(1.0, "rate at which the mean update is applied", above=0)
    name: str = _setting("sgd", "server optimiser", choices=OPTIMISERS)
    momentum: float = _setting(
        -1.0, "server momentum (adam: first-moment decay); -1: from the rounds", least=-1, below=1
    )
    warmup_rounds: int = _setting(0, "rounds over which the server rate rises to its value", least=0)
    average_decay: float = _setting(
        0.0, "weight of the past in an average of the weights, evaluated as well; 0: none", least=0, below=1
    )


@dataclass(frozen=True)
class TrainingSettings:
    """What a client makes of a record in a private step."""

    views: int = _setting(1, "random views of a record, averaged before clipping", least=1, most=MOST_VIEWS)
    augmentation: str = _setting("none", "how they are made: by up to 2 pixels, mirrored", choices=AUGMENTATIONS)


@dataclass(frozen=True)
class RuntimeSettings:
    """How a run is carried out."""

    workers: int = _setting(0, "worker processes of a simulation; 0: one a core", least=0)
    evaluate_every: int = _setting(1, "rounds between evaluations on public test data", least=1)
    tensorboard: bool = _setting(False, "simulation only: write metrics for TensorBoard as well")
    output: str = _setting("", "run folder; empty: a new one under runs/")
    device: str = _setting(
        "cpu", "where simulated clients compute and the server evaluates; auto: cuda if there is one", choices=DEVICES
    )
    memory_limit: int = _setting(0, "MiB for one physical batch of a client; 0: automatic", least=0)
    precision: str = _setting("float32", "of the layers' products; norms and sums are float32", choices=PRECISIONS)

    @property
    def gradient_options(self) -> GradientOptions:
        """How clients compute gradients."""
        return GradientOptions(self.memory_limit * 2**20 or None, self.precision)


@dataclass(frozen=True)
class Configuration:
    """All settings of a run."""

    seed: int = _setting(0, "seed of the model, and of everything in a simulation", least=0)
    method: str = _setting("as-set", "as-set: by other settings; paper: published; dp-fedsgd", choices=METHODS)
    task: TaskSettings = TaskSettings()
    federation: FederationSettings = FederationSettings()
    privacy: PrivacySettings = PrivacySettings()
    pretraining: PretrainingSettings = PretrainingSettings()
    retention: RetentionSettings = RetentionSettings()
    adaptive_clipping: AdaptiveClippingSettings = AdaptiveClippingSettings()
    shrinkage: ShrinkageSettings = ShrinkageSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    training: TrainingSettings = TrainingSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    @property
    def pretraining_rounds(self) -> int:
        """Rounds of pretraining: at least one if any share is given, but always one is left to train."""
        return pretraining_rounds(self.federation.num_rounds, self.pretraining.round_share)

    @property
    def plan_shape(self) -> PlanShape:
        """Steps and sampling of the whole run on one client."""
        steps = self.federation.local_steps
        return PlanShape(
            self.privacy.sampling_probability,
            self.pretraining_rounds * steps,
            (self.federation.num_rounds - self.pretraining_rounds) * steps,
            self.privacy.pretraining_share,
            NoiseSchedule(self.privacy.noise_schedule, self.privacy.final_noise_ratio),
            steps,
        )


def not_private(configuration: Configuration) -> str:
    """Say why a run is a control and protects nobody, whatever epsilon its ledgers show; empty if it does protect."""
    if configuration.pretraining.ranking == ORACLE:
        return "NOT PRIVATE: coordinates are ranked by an oracle, which reads gradients without noise; a control only"
    return ""


def settings() -> Iterator[tuple[str, Value, str, str]]:
    """List every setting: dotted key, default, values that it may have if these are limited, meaning."""
    defaults = flatten(Configuration())
    for key, entry in _entries():
        yield key, defaults[key], _allowed(entry.metadata), entry.metadata["meaning"]


def _entries() -> Iterator[tuple[str, "Field[Any]"]]:
    for entry in fields(Configuration):
        if entry.metadata:
            yield entry.name, entry
        else:
            table = entry.name.replace("_", "-")
            for inner in fields(entry.default):  # type: ignore[arg-type]  # the default is a dataclass
                yield f"{table}.{inner.name.replace('_', '-')}", inner


def parse(flat: Mapping[str, object]) -> Configuration:
    """Check flat dotted settings and fill in the defaults.

    Raises:
        ConfigurationError: Naming every unknown key and every value of a wrong type or out of range.
    """
    known = dict(_entries())
    unknown = [_unknown(key, known) for key in flat if key not in known]
    problems: list[str] = []
    flat = {**flat, **settings_of(flat.get("method"))}
    values: dict[str, dict[str, Value]] = {}
    for key, entry in known.items():
        try:
            table = key.rpartition(".")[0]
            values.setdefault(table.replace("-", "_"), {})[entry.name] = _checked(
                key, flat.get(key, entry.default), entry
            )
        except ConfigurationError as error:
            problems.append(str(error))
    if not problems:
        configuration = _build(values)
        problems = list(_contradictions(configuration))
    if problems := [*unknown, *problems]:
        listed = "\n".join(f"  * {problem}" for problem in problems)
        raise ConfigurationError(f"{len(problems)} setting(s) cannot be used:\n{listed}")
    return configuration


def _build(values: dict[str, dict[str, Value]]) -> Configuration:
    defaults = Configuration()
    tables = {
        entry.name: type(getattr(defaults, entry.name))(**values[entry.name])
        for entry in fields(Configuration)
        if not entry.metadata
    }
    return replace(defaults, **values[""], **tables)  # type: ignore[arg-type]  # types were checked key by key


def _unknown(key: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "'adadpigu settings' lists all keys"
    return f"{printable(key, 100)}: there is no such setting; {hint}"


def _checked(key: str, value: object, entry: "Field[Any]") -> Value:
    wanted = type(entry.default)
    if type(value) is int and abs(value) > _LARGEST_INTEGER:
        raise ConfigurationError(f"{key}: is out of range; Flower carries 64 bits")
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise ConfigurationError(f"{key}: expected {wanted.__name__}, got {reprlib.repr(value)}")
    limits = entry.metadata
    if limits["choices"] and value not in limits["choices"]:
        raise ConfigurationError(f"{key}: {value!r} is none of {_allowed(limits)}")
    if isinstance(value, str) and not _is_text(value):
        raise ConfigurationError(f"{key}: {value!r} cannot be written as UTF-8")
    if isinstance(value, int | float) and not isinstance(value, bool):
        inside = limits["above"] < value < limits["below"] and limits["least"] <= value <= limits["most"]
        if not (math.isfinite(value) and inside):
            raise ConfigurationError(f"{key}: {value} is out of range; it must be {_allowed(limits) or 'finite'}")
    return value  # type: ignore[return-value]  # its type is that of the default


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _allowed(limits: Mapping[str, Any]) -> str:
    words = {"above": "above", "least": "at least", "below": "below", "most": "at most"}
    bounds = [f"{text} {limits[name]:g}" for name, text in words.items() if math.isfinite(limits[name])]
    return ", ".join(limits["choices"]) or " and ".join(bounds)


def _contradictions(configuration: Configuration) -> Iterator[str]:
    task, federation = configuration.task, configuration.federation
    if not datasets.is_name(task.dataset):
        yield f"task.dataset: {task.dataset!r} is none of {datasets.CHOICES}"
    if task.model not in ("auto", *models.NAMES) and not factories.is_factory(task.model):
        yield f"task.model: {task.model!r} is none of auto, {', '.join(models.NAMES)}, package.module:factory"
    if task.weights == PUBLIC_DIGITS and task.dataset == "digits":
        yield f"task.weights: {PUBLIC_DIGITS} are the clients' own records here, and would be learnt without noise"
    if federation.clients and federation.partition != "iid":
        yield "federation.partition: must be iid beside federation.clients, which says how many records each has"
    if federation.num_rounds * federation.local_steps > MOST_STEPS:
        yield f"federation.num-rounds: times federation.local-steps, these are more than {MOST_STEPS} steps"
    training = configuration.training
    if training.augmentation == "none" and training.views > 1:
        yield "training.views: without training.augmentation all views are the same; set it to shifts"
    if training.augmentation != "none" and task.features != front_ends.RAW:
        yield "training.augmentation: views are made of raw images; set task.features = raw, or augmentation = none"
    retention = configuration.retention
    if retention.schedule != "constant" and retention.final_ratio < retention.initial_ratio:
        yield "retention.final-ratio: must not be below retention.initial-ratio; the retained share never shrinks"
    pretraining = configuration.pretraining
    if retention.rerank_every and pretraining.ranking != CONSENSUS:
        yield (
            f"retention.rerank-every: needs pretraining.ranking = consensus, not {pretraining.ranking}; "
            "set that, or rerank-every = 0"
        )
    ranked = pretraining.ranking in NOT_RELEASED or 0 < retention.rerank_every < federation.num_rounds
    if pretraining.round_share == 0 and retention.initial_ratio < 1 and not ranked:
        yield (
            "pretraining.round-share: without pretraining there is no ranking to choose coordinates by; "
            "set retention.initial-ratio = 1.0, a share above 0, or retention.rerank-every below federation.num-rounds"
        )


def flatten(configuration: Configuration) -> dict[str, Value]:
    """Turn a configuration into flat dotted keys; ``parse`` gives it back."""
    flat: dict[str, Value] = {}
    for key, entry in _entries():
        table, _, _name = key.rpartition(".")
        holder = getattr(configuration, table.replace("-", "_")) if table else configuration
        flat[key] = getattr(holder, entry.name)
    return flat


def to_toml(configuration: Configuration) -> str:
    """Write a configuration as nested TOML tables."""
    lines: list[str] = []
    current = ""
    for key, value in flatten(configuration).items():
        table, _, name = key.rpartition(".")
        if table != current:
            lines += ["", f"[{table}]"]
            current = table
        # JSON's strings, numbers and booleans are TOML's, but for one letter
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        lines.append(f"{name} = {text}")
    return "\n".join(lines).lstrip() + "\n"
