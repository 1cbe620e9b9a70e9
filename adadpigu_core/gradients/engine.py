"""Sums of clipped standardised gradients, without the gradients of single records.

With u_i = m (g_i - a) / b, the sum of u_i min(1, C / ||u_i||) needs one squared norm ||u_i||^2 a record and one
weighted sum. One forward and one backward pass over a physical batch give, layer by layer, inputs and output gradients
(`recorder`); from these follow the norms and then the sum (`blocks`). Ordinary weight gradients are never computed, and
parameters without retained coordinates cost nothing.

Physical batches bound memory. A record's factor depends on that record alone, so that how a batch is divided makes no
difference but in rounding.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.buffers import Buffers
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ModelError
from adadpigu_core.gradients import layers as _rules  # noqa: F401  # registers them
from adadpigu_core.gradients.backward import differentiate
from adadpigu_core.gradients.blocks import Finished, Workspace, finish
from adadpigu_core.gradients.clipping import (
    DEFAULTS,
    Augmentation,
    ClippedSum,
    GradientOptions,
    Loss,
    clipping_factors,
    losses_of,
)
from adadpigu_core.gradients.generic import Copies
from adadpigu_core.gradients.recorder import Recorder, Tracked, UnsupportedUseError
from adadpigu_core.gradients.survey import Survey, laid_out, survey
from adadpigu_core.gradients.transform import Transform
from adadpigu_core.gradients.uses import Factors, Use
from adadpigu_core.parameters import ParameterLayout

# A sum may be made by another kernel than its norm: the rounding errors of the two differ by this much of the gradient,
# which is the standardised gradient and the mean, at most.
_KERNELS = 1e-6
# What caches like. But every physical batch lays out the weights anew and goes through the sum once, so that large
# records may take more, for some of them to share that.
_CPU_MEMORY, _MOST_CPU_MEMORY = 128 * 2**20, 512 * 2**20
_ENOUGH_RECORDS = 16
# Kernels for one, two or three rows round differently from those for more, by which weights that leave nothing but last
# bits would tell how many records were drawn. So smaller batches are filled up, with copies that do not count.
_FEWEST = 8


def clipped_sum(
    model: nn.Module,
    loss: Loss,
    records: Records,
    standardisation: Standardisation,
    clipping_norm: float,
    *,
    options: GradientOptions = DEFAULTS,
    augmentation: Augmentation | None = None,
) -> ClippedSum:
    """Sum min(1, C / ||u_i||) u_i over records, with u_i = m (g_i - a) / b.

    Privacy:
        Adding or removing one record changes ``total`` by a vector of norm at most ``clipping_norm``. A record whose
        gradient is not finite, or so large that its square is not, contributes zero. The result itself is not private.

    Args:
        model: Any model without a layer that mixes records. It is left as it is.
        loss: Losses of records.
        records: Any number of records, also none.
        standardisation: Mask, mean and scale, each [d].
        clipping_norm: Largest norm C of a contribution; may be infinite.
        options: How it is computed.
        augmentation: Random views of a record; its gradient is the mean over them.

    Raises:
        ModelError: The model or the loss has a part whose records cannot be told apart; the text names it.
        MessageError: Mean or scale is out of range where the mask is True.
    """
    layout = ParameterLayout.of(model)
    device = next(model.parameters()).device
    transform = Transform.of(standardisation, device)
    found = survey(model, records, augmentation)
    batches = _physical_batches(len(records), found, options, device)
    total: Tensor | None = None  # made when there is something to put in, and most else is gone
    norms = [torch.zeros(0, dtype=torch.float64, device=device)]
    with _exact(model, layout, transform) as active:
        fewest = min(_FEWEST, _most_records(found, options, device))
        largest = max((fewest, *(stop - start for start, stop in batches)))
        workspace = Workspace(_memory(found, options, device) // 2 // 4, largest, device)
        task = _Task(model, loss, active, transform, clipping_norm, found, options, augmentation, workspace, fewest)
        buffers = Buffers(model)
        for start, stop in batches:
            features, labels = (
                values[start:stop].detach().to(device, non_blocking=True)
                for values in (records.features, records.labels)
            )
            try:
                found_norms, total = _Pass(task).run(features, labels, total)
            finally:
                buffers.restore()
            norms.append(found_norms)
    if total is None:
        total = torch.zeros(layout.num_parameters, dtype=torch.float32, device=device)
    # plus zero, since minus zero would tell the sign of a sum where the mask is False
    torch.addcmul(total.new_zeros(1), total, transform.inverse_scale, out=total)
    if not _finite(total):  # where the mask is False, sums of huge gradients may have left the range of float32
        total.masked_fill_(transform.inverse_scale == 0, 0.0)
    return ClippedSum(total.cpu(), torch.cat(norms).cpu())


def _finite(values: Tensor) -> bool:
    return values.device.type == "cpu" and all(bool(torch.isfinite(bound)) for bound in torch.aminmax(values))


def _physical_batches(
    count: int, found: Survey, options: GradientOptions, device: torch.device
) -> list[tuple[int, int]]:
    """Divide records into batches of nearly equal size; activations take half of the memory, kept gradients half."""
    number = math.ceil(count / _most_records(found, options, device))
    bounds = [i * count // number for i in range(number + 1)] if count else []
    return list(pairwise(bounds))


def _most_records(found: Survey, options: GradientOptions, device: torch.device) -> int:
    return max(1, _memory(found, options, device) // 2 // found.bytes_per_record)


def _memory(found: Survey, options: GradientOptions, device: torch.device) -> int:
    """Bytes for one physical batch: by default what suits caches and weights, or a share of what an accelerator has."""
    if options.memory_limit is not None:
        return options.memory_limit
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    return min(max(_CPU_MEMORY, 2 * _ENOUGH_RECORDS * found.bytes_per_record), _MOST_CPU_MEMORY)


Active = dict[str, tuple[Tensor, int]]


@contextmanager
def _exact(model: nn.Module, layout: ParameterLayout, transform: Transform) -> Iterator[Active]:
    """Switch off what would blur norms, and the gradients of parameters without retained coordinates."""
    named = dict(model.named_parameters())
    active: Active = {}
    start = 0
    frozen, gradients = [], []
    for name, size in zip(layout.names, layout.sizes, strict=True):
        if transform.retains(start, size):
            active[name] = (named[name], start)
            gradients.append((named[name], named[name].grad))
        else:
            frozen.append(named[name])
        start += size
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn
    try:
        torch.set_float32_matmul_precision("highest")
        for parameter in frozen:
            parameter.requires_grad_(False)
        for parameter, _ in gradients:
            parameter.grad = None
        with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
            yield active
    finally:
        torch.set_float32_matmul_precision(precision)
        for parameter in frozen:
            parameter.requires_grad_(True)
        for parameter, gradient in gradients:
            parameter.grad = gradient


@dataclass(frozen=True)
class _Task:
    """What all physical batches have in common."""

    model: nn.Module
    loss: Loss
    active: Active
    transform: Transform
    clipping_norm: float
    found: Survey
    options: GradientOptions
    augmentation: Augmentation | None
    workspace: Workspace
    fewest: int


class _Pass:
    """One forward and one backward pass over a physical batch."""

    def __init__(self, task: _Task) -> None:
        self._task = task
        self._done: list[Finished] = []  # in the order of their coordinates

    def run(self, features: Tensor, labels: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor]:
        """Give the norms of some records, float64 [n], and ``total`` with the sum of c_i (g_i - a) added."""
        task, count = self._task, len(labels)
        if count < task.fewest:
            features = features[torch.arange(task.fewest, device=features.device) % count]
        views = features.unsqueeze(1) if task.augmentation is None else task.augmentation(features)
        found = task.found
        recorder = Recorder(
            task.active,
            len(features),
            views.shape[1],
            self._finish,
            foreign=found.foreign,
            channels_last=found.channels_last,
        )
        copies = Copies(task.model, task.found.without_rule, recorder)
        with torch.enable_grad():
            losses = self._losses(views, labels, recorder, copies)
            if losses.requires_grad:
                differentiate(losses.sum(), task.model)
        with torch.no_grad():
            copies.collect()
            for tracked, uses in recorder.rest():
                self._finish(tracked, uses)
            self._check_strays()
            norms, factors = self._factors(len(features))
            factors.values[count:] = 0.0
            return norms[:count], self._add(factors, total)

    def _losses(self, views: Tensor, labels: Tensor, recorder: Recorder, copies: Copies) -> Tensor:
        """Mean loss over the views of each record that has a label, [n]."""
        count, per_record = len(labels), views.shape[1]
        rows = laid_out(views.flatten(0, 1), channels_last=self._task.found.channels_last)
        with copies.in_place(), recorder:
            try:
                outputs = self._outputs(rows)
            except UnsupportedUseError as error:
                text = f"{error}; write the model so that records do not decide that"
                raise ModelError(text, text) from error
        losses = losses_of(self._task.loss, outputs[: count * per_record], labels.repeat_interleave(per_record))
        return losses.view(count, per_record).mean(1)

    def _outputs(self, rows: Tensor) -> Tensor:
        model = self._task.model
        if self._task.options.precision == "float32":
            return model(rows)  # type: ignore[no-any-return]  # modules are not typed
        with torch.autocast(rows.device.type, torch.bfloat16):
            return model(rows).float()  # type: ignore[no-any-return]  # modules are not typed

    def _finish(self, tracked: Tracked, uses: list[Use]) -> None:
        if not self._task.transform.retains(*tracked.run):  # some rows of a parameter, of which others are retained
            return
        at = bisect_left(self._done, tracked.start, key=lambda finished: finished.start)
        if any(
            other.start < sum(tracked.run) and tracked.start < other.stop
            for other in self._done[max(0, at - 1) : at + 1]
        ):
            # squared twice and not added up before, it would make norms too small
            text = f"a part of parameter {tracked.name} is counted twice; replace the module that uses it"
            raise ModelError(text, text)
        block = self._task.transform.block(tracked.start, tuple(tracked.value.shape))
        self._done.insert(at, finish(tracked.start, block, uses, self._task.workspace))

    def _check_strays(self) -> None:
        """A parameter with an ordinary gradient was used where the recorder cannot see it."""
        for name, (parameter, _) in self._task.active.items():
            if parameter.grad is not None:
                text = f"parameter {name} is used in code that torch does not show, such as torch.jit; rewrite it"
                raise ModelError(text, text)

    def _factors(self, count: int) -> tuple[Tensor, Factors]:
        """Norms, float64 [n], and what follows from them."""
        transform = self._task.transform
        squares = torch.zeros(count, dtype=torch.float64, device=transform.inverse_scale.device)
        doubt = torch.zeros_like(squares)
        for finished in self._done:
            squares += finished.squared_norms.values
            doubt += finished.squared_norms.doubt
        mean_norm: Tensor | float = 0.0
        if transform.standardised_mean is not None:
            for start, stop in self._untouched():
                squares += transform.standardised_mean[start:stop].double().square().sum()
            mean_norm = torch.linalg.vector_norm(transform.standardised_mean, dtype=torch.float64)
        norms = squares.sqrt()
        slack = (squares + doubt).sqrt() - norms + _KERNELS * mean_norm
        values = clipping_factors(norms, self._task.clipping_norm, slack)
        broken = ~torch.isfinite(norms)
        if broken.device.type == "cpu" and not bool(broken.any()):
            return norms, Factors(values, None)
        return norms, Factors(values, broken)

    def _add(self, factors: Factors, total: Tensor | None) -> Tensor:
        first, mean = total is None, self._task.transform.mean
        if total is None:
            total = torch.empty_like(self._task.transform.inverse_scale)
        for finished in self._done:
            finished.add(factors, total, first=first)
        for start, stop in self._untouched():
            if first:
                total[start:stop] = 0.0
            if mean is not None:
                total[start:stop] -= factors.values.sum() * mean[start:stop]
        return total

    def _untouched(self) -> Iterator[tuple[int, int]]:
        """Runs of coordinates without gradient, whose standardised value is -a / b for every record."""
        end = 0
        for finished in self._done:
            if finished.start > end:
                yield end, finished.start
            end = finished.stop
        if end < len(self._task.transform.inverse_scale):
            yield end, len(self._task.transform.inverse_scale)
