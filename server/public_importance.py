"""A ranking that costs no budget and no round: by gradients of made-up drawings with classes by chance.

How large the gradient of a coordinate is depends on the network and on what images have in common, strokes and dark
borders say, before it depends on any class; and that much can be seen on drawings that a formula makes. Nothing is
learnt from any record of any client.

Left out: tasks other than images, for which there is no formula here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadpigu_core import strokes
from adadpigu_core.datasets import Records
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.kept_features import public_features
from adadpigu_core.models import ModelSpec

_DRAWINGS = 200


def public_scores(model: nn.Module, spec: ModelSpec) -> Tensor:
    """Mean square of each coordinate's gradient over made-up drawings.

    Args:
        model: At its first weights, where it is left.
        spec: What it was built from.

    Returns:
        Scores, float64 [d].

    Raises:
        ConfigurationError: If records are not images.
    """
    if len(spec.input_shape) != 3:
        raise ConfigurationError(
            f"pretraining.ranking: public ranks by made-up images, and records are of shape {spec.input_shape}; "
            "use consensus"
        )
    channels, height, width = spec.input_shape
    images = strokes.drawings(height, width)[:_DRAWINGS].float().expand(-1, channels, -1, -1).contiguous()
    labels = torch.randint(spec.num_classes, (len(images),), generator=torch.Generator().manual_seed(0))
    records = public_features(spec.features, Records(images, labels))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scores = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    training = model.training
    model.eval()
    for number in range(len(images)):
        one = slice(number, number + 1)
        loss = F.cross_entropy(model(records.features[one]), records.labels[one])
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        scores += torch.cat([gradient.reshape(-1) for gradient in gradients]).double().square() / len(images)
    model.train(training)
    return scores
