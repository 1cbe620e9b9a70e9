"""The axes on which features of made-up pictures differ, for features of everybody's pictures.

Features share a large mean, and most of their directions hardly vary, but a private step puts the same noise on every
weight. So they are centred and turned to the principal axes of the features of made-up pictures, of which the leading
ones are kept; and axis j is divided by the cube root of its variance, between leaving it as it is and whitening it, so
that weak axes are learnt before the noise of many steps has added up.

Nothing is learnt from records. Computed in float64, so that all machines find the same axes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Axes:
    """How features are centred and projected: (x - mean) @ projection.

    Args:
        mean: Of the features of made-up pictures, float32 [P].
        projection: Axes divided by the cube roots of their variances, float32 [P, k]; the squared norm of the projected
            features of a made-up picture is k on average.
    """

    mean: Tensor
    projection: Tensor

    def project(self, features: Tensor) -> Tensor:
        """Project features, [..., P] to [..., k]."""
        return (features - self.mean.to(features.device)) @ self.projection.to(features.device)


def axes(features: NDArray[np.float64], count: int) -> Axes:
    """Find so many axes of the features of made-up pictures, float64 [n, P]."""
    from sklearn.decomposition import PCA  # noqa: PLC0415 - takes two seconds

    # The covariance is the faster way where it is no larger than the features.
    solver = "covariance_eigh" if len(features) > features.shape[1] else "full"
    found = PCA(count, svd_solver=solver).fit(features)
    scale = found.explained_variance_ ** (-1 / 3)
    projection = found.components_ * scale[:, None]
    projection *= np.sqrt(len(scale) / (found.explained_variance_ * scale**2).sum())
    return Axes(torch.from_numpy(found.mean_).float(), torch.from_numpy(projection.T).float().contiguous())
