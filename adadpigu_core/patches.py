"""Features of photographs from how their patches resemble patches of made-up photographs.

One layer of a convolutional network with nothing to learn (Coates, Lee and Ng 2011, whose filters came from the data):

    1. An image is put to mean 0 and mean square 1, and so is, nearly, every patch of 6 x 6 pixels of it.
    2. Patches are whitened with the covariance of patches of made-up photographs (`leaves`), and multiplied by 400
       whitened patches of these, and by their mirror images.
    3. Of every product a, max(a - 1/2, 0) and max(-a - 1/2, 0) are averaged over each quarter of the image. Those of
       mirrored filters in the mirrored image are the same feature, so that mirror images have the same features; their
       square roots are taken.

That is 3,200 features of one image alone, turned to 2,000 axes of those of made-up photographs (`principal_axes`).

Left out: a second layer of the same kind, which lost three points on CIFAR-10, and filters of other sizes, which
neither lost nor won.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from adadpigu_core import leaves, principal_axes

NUM_AXES = 2000
LEAST_SIZE = 12  # pixels
_SIZE = 6  # pixels of a patch
_FILTERS = 400  # and as many mirrored
_THRESHOLD = 0.5
_QUARTERS = 2  # by 2
_FLATTEST = 0.16  # standard deviation of a patch that counts as flat, relative to its image's
_LEAST_CONTRAST = 1e-6  # of an image that is not blank
_RIDGE = 0.1  # of the mean variance, added to each
_SAMPLES = 50  # patches from a made-up photograph
_PIECE = 2  # images; more at a time leave the cache


@dataclass(frozen=True, eq=False)
class Filters:
    """What patches are multiplied by.

    Args:
        weight: Whitened filters, then their mirror images, [2 filters, channels * 6 * 6].
        offset: What the mean patch gives, [2 filters].
    """

    weight: Tensor
    offset: Tensor

    def to(self, like: Tensor) -> "Filters":
        """The same of another type or device."""
        return Filters(self.weight.to(like), self.offset.to(like))


def features(images: Tensor) -> Tensor:
    """Features of images, each a function of that image alone.

    Args:
        images: Floating-point [n, channels, height, width], sides at least 12.

    Returns:
        float32 [n, 2000]; of made-up photographs they have mean 0 and mean square 1.
    """
    filters, axes = _fitted(*images.shape[1:])
    return axes.project(_responses(images, filters.to(images)))


@lru_cache(maxsize=4)
def _fitted(channels: int, height: int, width: int) -> tuple[Filters, principal_axes.Axes]:
    pictures = leaves.pictures(channels, height, width)
    filters = _filters(pictures)
    return filters, principal_axes.axes(_responses(pictures, filters).numpy(), NUM_AXES)


def _filters(pictures: Tensor) -> Filters:
    """Make filters from patches of made-up photographs, float64."""
    generator = torch.Generator().manual_seed(0)
    patches = _patches(_normalised(pictures), generator)
    patches = torch.cat([patches, _mirrored(patches)])  # mirror images whiten alike
    patches = patches - patches.mean(1, keepdim=True)
    patches = patches / (patches.square().mean(1, keepdim=True) + _FLATTEST**2).sqrt()
    mean = patches.mean(0)
    variances, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    whitening = directions / (variances + _RIDGE * variances.mean()).sqrt() @ directions.T
    chosen = torch.randperm(len(patches), generator=generator)[:_FILTERS]
    found = F.normalize((patches[chosen] - mean) @ whitening)
    found = torch.cat([found, _mirrored(found)]) @ whitening
    return Filters(found - found.mean(1, keepdim=True), found @ mean)  # the former takes a patch's mean away


def _patches(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Patches from all over the pictures, [n, channels * 6 * 6]."""
    windows = pictures.unfold(2, _SIZE, 1).unfold(3, _SIZE, 1)  # [n, channels, rows, columns, 6, 6]
    picture = torch.arange(len(pictures)).repeat_interleave(_SAMPLES)
    row, column = (torch.randint(size, picture.shape, generator=generator) for size in windows.shape[2:4])
    return windows[picture, :, row, column].flatten(1)


def _mirrored(patches: Tensor) -> Tensor:
    return patches.reshape(len(patches), -1, _SIZE, _SIZE).flip(3).flatten(1)


def _normalised(images: Tensor) -> Tensor:
    centred = images - images.mean((1, 2, 3), keepdim=True)
    return centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=_LEAST_CONTRAST)


def _responses(images: Tensor, filters: Filters) -> Tensor:
    """Averages of thresholded products, [n, 2 signs * filters * 2 * 2]."""
    # Room for all comes first: small results among large intermediate ones would keep the room of these from use.
    found = images.new_empty(len(images), len(filters.weight) * _QUARTERS**2)
    for start in range(0, len(images), _PIECE):
        piece = slice(start, start + _PIECE)
        found[piece] = _pooled(_products(_normalised(images[piece]), filters))
    return found.sqrt_()


def _products(images: Tensor, filters: Filters) -> Tensor:
    """Products of all normalised patches with filters, [n, 2 filters, rows, columns]."""
    mean, square = (F.avg_pool2d(each.mean(1, keepdim=True), _SIZE, 1) for each in (images, images.square()))
    spread = ((square - mean.square()).clamp(min=0) + _FLATTEST**2).sqrt()
    # A convolution, as a product: as fast as one in float32, and much faster in float64.
    products = (filters.weight @ F.unfold(images, _SIZE)).reshape(len(images), -1, *spread.shape[2:])
    return products.div_(spread).sub_(filters.offset[:, None, None])


def _pooled(products: Tensor) -> Tensor:
    signs = (F.adaptive_avg_pool2d(F.relu_(sign * products - _THRESHOLD), _QUARTERS) for sign in (1, -1))
    own, mirrored = torch.stack(list(signs), 1).chunk(2, dim=2)
    return ((own + mirrored.flip(-1)) / 2).flatten(1)
