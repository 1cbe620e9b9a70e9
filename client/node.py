"""What a client does with a message: check, charge, train, store, answer.

The order is the guarantee. Everything that can be wrong with a request is found before the ledger is charged; the
charge is durable before noise is drawn; the release is durable before it is sent. Whatever the server asks, the noise,
the sampling probability and the budget are the client's own.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adadpigu_core import archive, masking
from adadpigu_core.accounting import PRETRAINING, Event, Plan, PlanShape, calibrate
from adadpigu_core.adaptive_clipping import (
    FixedStatistics,
    RunningStatistics,
    Standardisation,
    Statistics,
    expand,
)
from adadpigu_core.augmentation import Views
from adadpigu_core.datasets import Records, check_records
from adadpigu_core.exceptions import AdaDPIGUError, BudgetError, ConfigurationError, MessageError
from adadpigu_core.gradients import check_model, check_outputs, check_precision, check_rounding, cross_entropy
from adadpigu_core.grouping import shared
from adadpigu_core.importance import MEASURES
from adadpigu_core.ledger import Ledger, Round, RoundCharge, Target
from adadpigu_core.local_training import LocalUpdate, train_round
from adadpigu_core.messages import (
    AnyMessage,
    DescribeRequest,
    Description,
    Refusal,
    TrainReply,
    TrainRequest,
    Wire,
    decode,
    encode,
    require,
)
from adadpigu_core.models import ModelSpec, build, check_private, fingerprint
from adadpigu_core.parameters import ParameterLayout, assign, assign_fixed
from adadpigu_core.private_step import Mechanism
from adadpigu_core.provenance import code_fingerprint
from adadpigu_core.reconciliation import check_complete
from client.site import Site

log = logging.getLogger("adadpigu.client")

# Calibration uses a budget up to about a thousandth. Less than this share of it is a rest and not a budget: noise in
# the hundreds would fit into it, and a run that nobody wants.
_LEAST_SHARE = 0.01


def answer(wire: Wire, site: Site, kind: type[DescribeRequest] | type[TrainRequest]) -> Wire:
    """Answer one message of the server.

    Returns:
        A Description, a TrainReply, or a Refusal that holds public facts only; never an exception, because Flower would
        send its text.
    """
    ledger: Ledger | None = None
    try:
        ledger = Ledger(site.ledger, site.data_set, site.content)
        request = decode(wire, kind)
        reply: AnyMessage
        if isinstance(request, DescribeRequest):
            reply = describe(request, site, ledger)
        else:
            return train(request, site, ledger)
        return encode(reply)
    except Exception as error:  # whatever it is, its text may describe records and stays here
        return encode(refusal(error, ledger))
    finally:
        if ledger is not None:
            ledger.close()


def refusal(error: Exception, ledger: Ledger | None = None) -> Refusal:
    """Log an error here, and say as much of it as is public."""
    known = isinstance(error, AdaDPIGUError)
    log.error("%srefused: %s", f"{ledger.data_set}: " if ledger else "", error, exc_info=None if known else error)
    code = error.code if isinstance(error, AdaDPIGUError) else "internal"
    message = error.public_message if isinstance(error, AdaDPIGUError) else ""
    try:
        identity, spent = (ledger.id, ledger.events()) if ledger is not None else ("", ())
    except AdaDPIGUError:
        identity, spent = "", ()
    return Refusal(code, message, identity, spent)


def describe(request: DescribeRequest, site: Site, ledger: Ledger) -> Description:
    """Fix this client's plan for a run and say what is public about it.

    Raises:
        BudgetError: If nothing is left of the budget.
        AdaDPIGUError: For whatever else makes taking part impossible.
    """
    _check_code(request.code, site)
    model, _ = _model(request.model, request.layout, site)
    spec = request.model
    _check_once(spec, fingerprint(spec), site.device)
    check_precision(model, cross_entropy, spec.feature_shape, spec.num_classes, site.options)
    if ledger.plan(request.run) is None:
        with _named_by_the_server():
            asked = _smaller(Target(request.target_epsilon, request.target_delta), site.target)
            _require_budget(ledger.epsilon(asked.delta), asked)
            shape = PlanShape(
                request.sampling_probability,
                request.pretraining_steps,
                request.training_steps,
                request.pretraining_share,
                request.noise_schedule,
                request.steps_per_round,
            )
            plan = calibrate(shape, asked.epsilon, asked.delta, ledger.events())
        site.limits.check_sampling(request.sampling_probability)
        ledger.record_plan(request.run, site.limits.quieten(plan), asked)
    plan, target = _recorded(request.run, site, ledger)
    return Description(
        name=site.name,
        device=site.device,
        data_set=ledger.id,
        num_records=site.num_records,
        target_epsilon=target.epsilon,
        target_delta=target.delta,
        pretraining_noise_multiplier=plan.pretraining.noise_multiplier,
        training_noise_multiplier=plan.training.noise_multiplier,
        spent=ledger.events(),
    )


@lru_cache(maxsize=16)
def _check_once(spec: ModelSpec, _source: str, device: str) -> None:
    """Look at a network, which is the same for all clients of a process."""
    check_model(build(spec, seed=0).to(device), cross_entropy, spec.feature_shape, spec.num_classes)


def train(request: TrainRequest, site: Site, ledger: Ledger) -> Wire:
    """Release one round, or the very same release again if it was asked for before.

    Raises:
        AdaDPIGUError: Before anything is charged, if the request cannot be met.
    """
    _check_code(request.code, site)
    round_ = Round(request.run, request.round, request.code)
    stored = ledger.stored_release(round_)
    if stored is not None:
        return _unpack(stored)
    check_complete(ledger, request.spent)
    work = _prepare(request, site, ledger)
    charge = ledger.charge(round_, _round_event(work.mechanism, request.steps), work.target)
    try:
        reply: AnyMessage
        reply, memory = _release(request, site, ledger, work, charge)
    except Exception as error:
        # Noise may have been drawn, and even that it went wrong may depend on it: this is the round's release now, so
        # that no one can ask for another draw under the same charge.
        reply, memory = refusal(error, ledger), work.memory
    wire = encode(reply)
    return _unpack(ledger.store_release(charge, archive.pack(wire.arrays, wire.values), memory))


def _release(
    request: TrainRequest, site: Site, ledger: Ledger, work: "_Work", charge: RoundCharge
) -> tuple[TrainReply, bytes]:
    update = train_round(
        work.model,
        cross_entropy,
        work.records,
        work.mechanism,
        work.mask,
        work.statistics,
        site.randomness(charge.charge_id),
        charge,
        steps=request.steps,
        learning_rate=request.learning_rate,
        importance_measure=request.importance_measure or None,
        guard=work.guard if request.steps > 1 else None,
        options=site.options,
        augmentation=work.views.augmentation,
        failed=partial(_report, ledger),
    )
    reply = TrainReply(
        run=request.run,
        round=request.round,
        phase=request.phase,
        update=update.update[work.mask].numpy(),
        importance=None if update.importance is None else update.importance.numpy(),
        data_set=ledger.id,
        spent=ledger.events(),
    )
    return reply, _remember(request, work, update)


def _report(ledger: Ledger, error: BaseException) -> None:
    log.error("%s: no gradient of a record, which counts as zero: %s", ledger.data_set, error, exc_info=error)


@dataclass(frozen=True)
class _Work:
    """A request that has passed every check."""

    model: nn.Module
    records: Records
    mechanism: Mechanism
    mask: Tensor
    statistics: Statistics
    target: Target
    memory: bytes
    views: Views
    guard: Callable[[Standardisation], None]


def _prepare(request: TrainRequest, site: Site, ledger: Ledger) -> _Work:
    plan, target = _recorded(request.run, site, ledger)
    measure = request.importance_measure
    require(measure in ("", *MEASURES), "importance-measure", f"unknown value {measure!r}")
    model, layout = _model(request.model, "", site)
    _check_once(request.model, fingerprint(request.model), site.device)
    require(
        len(request.weights) == layout.num_parameters,
        "weights",
        f"the model has {layout.num_parameters} parameters, got {len(request.weights)}",
    )
    assign(model, torch.from_numpy(request.weights.copy()))
    _assign_fixed(model, request.fixed)
    if request.fixed is not None and len(request.fixed):  # they may open what was shut when the model was looked at
        check_outputs(model, request.model.feature_shape, request.model.num_classes)
    stored = ledger.memory(request.run) or archive.pack({}, {})
    memory: Memory = archive.unpack(stored)[0]
    mask = _mask(request, memory, layout)
    with _named_by_the_server():
        event = plan.round_event(request.round)
        mechanism = Mechanism(
            event.phase,
            request.clipping_norm,
            event.noise_multiplier,
            event.sampling_probability,
            site.num_records,
        )
        views = Views(request.views, request.augmentation)
        views.check(request.model.feature_shape)
    # the plan's cost is that of its rounds in their order, and not of one that follows from what was released
    require(request.phase == event.phase, "phase", f"the plan of this run has {event.phase} in round {request.round}")
    require(request.steps == event.count, "steps", f"a round of this run's plan has {event.count}, not {request.steps}")
    site.limits.check_round(event)
    statistics = _statistics(request, memory, layout)
    spec = request.model
    shape = (spec.feature_shape, spec.num_classes)
    check_precision(model, cross_entropy, *shape, site.options)  # again: this node may have another device now
    guard = partial(check_rounding, model, cross_entropy, *shape, mechanism.clipping_norm, mechanism.num_records)
    guard(statistics.standardisation(mask))
    records = site.under(spec.features)
    return _Work(model, records, mechanism, mask, statistics, target, stored, views, guard)


def _assign_fixed(model: nn.Module, fixed: NDArray[np.float32] | None) -> None:
    """Take what is not trained from the server, too: drawn anew here, it would be another network's."""
    count, given = ParameterLayout.of_fixed(model).num_parameters, 0 if fixed is None else len(fixed)
    require(given == count, "fixed", f"the model has {count} values beside its trainable parameters, got {given}")
    if fixed is not None:
        assign_fixed(model, torch.from_numpy(fixed.copy()))


def _recorded(run: str, site: Site, ledger: Ledger) -> tuple[Plan, Target]:
    """The plan of a run, and its target as far as this node still allows it: its owner may have lowered the budget."""
    plan, target = ledger.plan(run), ledger.target(run)
    if plan is None or target is None:
        text = "run: this client has no plan for it; describe first"
        raise MessageError(text, text)
    return plan, _smaller(target, site.target)


def _smaller(one: Target, other: Target) -> Target:
    return Target(min(one.epsilon, other.epsilon), min(one.delta, other.delta))


def _require_budget(spent: float, target: Target) -> None:
    if target.epsilon - spent < _LEAST_SHARE * target.epsilon:
        text = (
            f"the privacy budget of this data set is spent: epsilon {spent:.4f} of {target.epsilon:g} at delta "
            f"{target.delta:g}; nothing is left to train with"
        )
        raise BudgetError(text, text)


@contextmanager
def _named_by_the_server() -> Iterator[None]:
    """Say that numbers of a request are out of range: they are the server's own, so the text may travel."""
    try:
        yield
    except ConfigurationError as error:
        raise MessageError(str(error), str(error)) from error


def _check_code(code: str, site: Site) -> None:
    own = code_fingerprint()
    site.limits.check_code(own)
    require(code == own, "code", f"the server runs {code}, this client {own}; install the same release on both")


def _model(spec: ModelSpec, layout_fingerprint: str, site: Site) -> tuple[nn.Module, ParameterLayout]:
    """Build the model and check that it, its layout and the records fit together."""
    site.limits.check_model(spec.name, partial(fingerprint, spec))  # before anything of it is imported
    declared = site.num_classes
    # by the declared number, so that whether labels fit does not depend on what the server asks
    check_records(site.records, input_shape=spec.input_shape, num_classes=declared or spec.num_classes)
    require(
        declared is None or declared <= spec.num_classes,
        "model.num-classes",
        f"this client declares {declared} classes, the task has {spec.num_classes}",
    )
    model = build(spec, seed=0).to(site.device)
    check_private(model)
    layout = ParameterLayout.of(model)
    require(
        layout_fingerprint in ("", layout.fingerprint),
        "layout",
        f"the server's parameters are laid out as {layout_fingerprint}, this client's as {layout.fingerprint}",
    )
    return model, layout


def _round_event(mechanism: Mechanism, steps: int) -> Event:
    one = mechanism.event
    return Event(one.phase, one.noise_multiplier, one.sampling_probability, steps)


Memory = dict[str, NDArray[np.generic]]


def _remember(request: TrainRequest, work: _Work, update: LocalUpdate) -> bytes:
    """What the next round needs: the mask, and the client's statistics if it keeps any. Released values only."""
    arrays: Memory = {}
    if request.mask_id:
        arrays[f"mask-{request.mask_id}"] = masking.pack(work.mask)
    if isinstance(update.statistics, RunningStatistics):
        arrays |= {name: tensor.numpy() for name, tensor in update.statistics.state().items()}
    return archive.pack(arrays, {})


def _mask(request: TrainRequest, memory: Memory, layout: ParameterLayout) -> Tensor:
    if not request.mask_id:
        require(request.mask is None, "mask", "was sent without a mask-id")
        return torch.ones(layout.num_parameters, dtype=torch.bool)
    if request.phase == PRETRAINING:
        raise MessageError("mask: pretraining retains everything", "mask: pretraining retains everything")
    if request.mask is not None:
        group = shared(layout, request.mask_granularity)
        count = layout.num_parameters if group is None else int(group.max()) + 1
        mask = masking.unpack(cast(NDArray[np.uint8], request.mask), count, group)  # it checks the type
    elif f"mask-{request.mask_id}" in memory:
        known = memory[f"mask-{request.mask_id}"]
        mask = masking.unpack(cast(NDArray[np.uint8], known), layout.num_parameters)
    else:
        raise UnknownMaskError("mask: this client does not have it", "mask: this client does not have it; send it")
    require(masking.fingerprint(mask) == request.mask_id, "mask-id", "is not the fingerprint of the mask")
    return mask


class UnknownMaskError(MessageError):
    """The server refers to a mask that this client has not, or no longer: it will send it."""

    code = "unknown-mask"


def _statistics(request: TrainRequest, memory: Memory, layout: ParameterLayout) -> Statistics:
    d = layout.num_parameters
    if request.phase == PRETRAINING:
        return FixedStatistics.neutral(d)
    if not request.client_statistics:
        neutral = FixedStatistics.neutral(d)
        mean, scale = request.gradient_mean, request.gradient_scale
        if mean is not None:
            require(len(mean) == d, "gradient-mean", f"must have {d} entries, got {len(mean)}")
        granularity = "coordinate" if request.clipping.rule == "paper" else request.clipping.granularity
        return FixedStatistics(
            neutral.mean if mean is None else torch.from_numpy(mean.copy()),
            neutral.scale if scale is None else expand(torch.from_numpy(scale.copy()), layout, granularity),
        )
    statistics = RunningStatistics.neutral(request.clipping, layout)
    if "moment" not in memory:
        return statistics
    return statistics.restored(
        {name: torch.from_numpy(array.copy()) for name, array in memory.items() if not name.startswith("mask-")}
    )


def _unpack(payload: bytes) -> Wire:
    arrays, values = archive.unpack(payload)
    return Wire(arrays, values)
