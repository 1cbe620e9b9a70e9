"""Random views of a record: its gradient is the mean over them, and is clipped once.

Several views cost time and no privacy, since a record still enters the sum through one clipped vector, and make that
vector less accidental (De et al. 2022). What is drawn is drawn on the client with its private randomness, anew in every
step. Left out: views that need more than pixels, and other amounts of shift.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adadpigu_core.exceptions import ConfigurationError

NONE, SHIFTS, SHIFTS_AND_FLIPS = "none", "shifts", "shifts-flips"
AUGMENTATIONS = (NONE, SHIFTS, SHIFTS_AND_FLIPS)
MOST_VIEWS = 64
_REACH = 2  # pixels


@dataclass(frozen=True)
class Views:
    """Maps features [n, channels, height, width] to random views [n, count, channels, height, width].

    Every view is shifted by up to 2 pixels in each direction, and zeros move in; with flips every other is mirrored.
    Draws come from torch's default generator.

    Args:
        count: Views of a record, 1 to 64.
        kind: One of ``AUGMENTATIONS``.

    Raises:
        ConfigurationError: If a value is out of range, or there would be several views that are all the same.
    """

    count: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in AUGMENTATIONS:
            raise ConfigurationError(f"augmentation: {self.kind!r} is none of {', '.join(AUGMENTATIONS)}")
        if not 1 <= self.count <= MOST_VIEWS:
            raise ConfigurationError(f"views: must be from 1 to {MOST_VIEWS}, got {self.count}")
        if self.kind == NONE and self.count > 1:
            raise ConfigurationError(f"views: {self.count} views without an augmentation are all the same; use shifts")

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse records that cannot be shifted.

        Raises:
            ConfigurationError: If they are no images.
        """
        if self.kind != NONE and len(shape) != 3:
            raise ConfigurationError(f"augmentation: {self.kind} are for images, not for records of shape {shape}")

    @property
    def augmentation(self) -> "Views | None":
        """For the engine, which looks at records as they are if there is none."""
        return None if self.kind == NONE else self

    def __call__(self, features: Tensor) -> Tensor:
        """Draw the views."""
        n, _, height, width = features.shape
        padded = F.pad(features, (_REACH,) * 4)
        down, right = (self._shifts(n, size, features.device) for size in (height, width))
        records = torch.arange(n, device=features.device)[:, None, None, None]
        if self.kind == SHIFTS_AND_FLIPS:
            mirrored = torch.rand(n, self.count, 1, device=features.device) < 0.5
            right = torch.where(mirrored, right.flip(-1), right)
        # [n, count, h, w, channels]
        views = padded.movedim(1, -1)[records, down[..., :, None], right[..., None, :]]
        return views.movedim(-1, 2).contiguous()

    def _shifts(self, n: int, size: int, device: torch.device) -> Tensor:
        """Where in the padded image the pixels of one dimension come from, [n, count, size]."""
        start = torch.randint(2 * _REACH + 1, (n, self.count, 1), device=device)
        return start + torch.arange(size, device=device)
