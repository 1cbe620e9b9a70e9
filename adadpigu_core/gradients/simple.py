"""The plain way to a sum of clipped gradients: one gradient per record, a few records at a time.

``torch.func`` differentiates the model for every record of a chunk; the chunk's gradients are standardised, clipped and
added up, and then forgotten. This is exact for every model that torch can vectorise, and slower than it could be.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from adadpigu_core.adaptive_clipping import Standardisation
from adadpigu_core.datasets import Records
from adadpigu_core.gradients.clipping import Augmentation, ClippedSum, Loss, clipping_factors, losses_of
from adadpigu_core.parameters import ParameterLayout

_CHUNK_COORDINATES = 4_000_000


def clipped_sum(
    model: nn.Module,
    loss: Loss,
    records: Records,
    standardisation: Standardisation,
    clipping_norm: float,
    *,
    augmentation: Augmentation | None = None,
) -> ClippedSum:
    """Sum min(1, C / ||u_i||) u_i over records, with u_i = m (g_i - a) / b.

    Arguments, result and guarantee are those of `adadpigu_core.gradients.clipped_sum`.
    """
    d = ParameterLayout.of(model).num_parameters
    gradients_of = record_gradients(model, loss, augmentation)
    total = torch.zeros(d, dtype=torch.float64)
    norms = []
    chunk = max(1, min(64, _CHUNK_COORDINATES // d))
    for start in range(0, len(records), chunk):
        piece = records.select(torch.arange(start, min(start + chunk, len(records))))
        contribution, chunk_norms = _clip(gradients_of(piece), standardisation, clipping_norm)
        total += contribution
        norms.append(chunk_norms)
    return ClippedSum(total.float(), torch.cat(norms) if norms else torch.zeros(0, dtype=torch.float64))


def record_gradients(
    model: nn.Module, loss: Loss, augmentation: Augmentation | None = None
) -> Callable[[Records], Tensor]:
    """Make a function from records [n] to their gradients, float32 [n, d], each as if it were alone."""
    layout = ParameterLayout.of(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    constants = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    constants.update(model.named_buffers())

    def record_loss(trained: dict[str, Tensor], views: Tensor, label: Tensor) -> Tensor:
        outputs = functional_call(model, {**trained, **constants}, (views,))
        return losses_of(loss, outputs, label.expand(len(views))).mean()

    gradients_of = vmap(grad(record_loss), in_dims=(None, 0, 0), randomness="different")

    def gradients(records: Records) -> Tensor:
        views = records.features.unsqueeze(1) if augmentation is None else augmentation(records.features)
        named = gradients_of(parameters, views, records.labels)
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
    factors = clipping_factors(norms, clipping_norm)
    standardised = torch.where(torch.isfinite(norms).unsqueeze(1), standardised, 0.0)
    return factors @ standardised.double(), norms
