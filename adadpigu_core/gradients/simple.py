"""The plain way to a sum of clipped gradients: one gradient per record, a few records at a time.

``torch.func`` differentiates the model for every record of a chunk; the chunk's gradients are standardised, clipped and
added up, and then forgotten. This is exact for every model that torch can vectorise, and slower than it could be.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.datasets import Records
from adadpigu_core.parameters import ParameterLayout

Loss = Callable[[Tensor, Tensor], Tensor]

# Rounding must not let a record contribute more than the clipping norm: norms are computed in float64 from the very
# float32 values that are summed, and enlarged by this much before they decide.
_MARGIN = 1e-6
_CHUNK_COORDINATES = 4_000_000


@dataclass(frozen=True)
class ClippedSum:
    """Sum over records of clipped standardised gradients: private, to be noised before anyone sees it.

    Args:
        total: Float64 [d], exactly zero where the mask is False.
        norms: Standardised norm of each record before clipping, float64 [n]; diagnostics, never released.
    """

    total: Tensor
    norms: Tensor


def clipped_sum(
    model: nn.Module, loss: Loss, records: Records, standardisation: Standardisation, clipping_norm: float
) -> ClippedSum:
    """Sum min(1, C / ||u_i||) u_i over records, with u_i = m (g_i - a) / b.

    Privacy:
        Adding or removing one record changes ``total`` by a vector of norm at most ``clipping_norm``. A record whose
        gradient is not finite contributes zero. The result itself is not private.

    Args:
        model: Any model without a layer that mixes records.
        loss: Loss of one record from its outputs [1, classes] and labels [1].
        records: Any number of records, also none.
        standardisation: Mask, mean and scale, each [d].
        clipping_norm: Largest norm C of a contribution; may be infinite.
    """
    d = ParameterLayout.of(model).num_parameters
    gradients_of = record_gradients(model, loss)
    total = torch.zeros(d, dtype=torch.float64)
    norms = []
    chunk = max(1, min(64, _CHUNK_COORDINATES // d))
    for start in range(0, len(records), chunk):
        piece = records.select(torch.arange(start, min(start + chunk, len(records))))
        contribution, chunk_norms = _clip(gradients_of(piece), standardisation, clipping_norm)
        total += contribution
        norms.append(chunk_norms)
    return ClippedSum(total, torch.cat(norms) if norms else torch.zeros(0, dtype=torch.float64))


def record_gradients(model: nn.Module, loss: Loss) -> Callable[[Records], Tensor]:
    """Make a function from records [n] to their gradients, float32 [n, d], each as if it were alone."""
    layout = ParameterLayout.of(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    constants = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    constants.update(model.named_buffers())

    def record_loss(trained: dict[str, Tensor], features: Tensor, label: Tensor) -> Tensor:
        outputs = functional_call(model, {**trained, **constants}, (features.unsqueeze(0),))
        return loss(outputs, label.unsqueeze(0))

    gradients_of = vmap(grad(record_loss), in_dims=(None, 0, 0), randomness="different")

    def gradients(records: Records) -> Tensor:
        named = gradients_of(parameters, records.features, records.labels)
        return torch.cat([named[name].flatten(1) for name in layout.names], dim=1)

    return gradients


def standardise(gradients: Tensor, standardisation: Standardisation) -> Tensor:
    """Give m (g - a) / b of every gradient, float32 [n, d]."""
    return torch.where(
        standardisation.mask, (gradients - standardisation.mean) / standardisation.scale, torch.zeros(())
    )


def _clip(gradients: Tensor, standardisation: Standardisation, clipping_norm: float) -> tuple[Tensor, Tensor]:
    """Standardise, clip and add up the gradients of a chunk, [chunk, d]."""
    standardised = standardise(gradients, standardisation)
    norms = torch.linalg.vector_norm(standardised, dim=1, dtype=torch.float64)
    finite = torch.isfinite(norms)
    factors = torch.where(finite, (clipping_norm / (norms * (1 + _MARGIN))).clamp(max=1.0), 0.0)
    standardised = torch.where(finite.unsqueeze(1), standardised, 0.0)
    return factors @ standardised.double(), norms
