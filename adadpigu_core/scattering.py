"""Wavelet scattering of images: features that are known before anyone has seen a record.

A scattering transform (Bruna and Mallat 2013) is a convolutional network of two layers whose filters are wavelets. It
keeps what distinguishes images of simple objects, forgets small shifts, and has nothing to learn, so that a linear
layer on top of it is what is trained: few parameters, and little noise for them (Tramer and Boneh 2021).

    S0   = x * phi
    S1_a = |x * psi_a| * phi                   for every wavelet a = (scale j, angle)
    S2   = ||x * psi_a| * psi_b| * phi         for a finer than b

``phi`` is a Gaussian over 2^J pixels, ``psi`` are Morlet wavelets, and everything is sampled every 2^J pixels. With
J = 2 and 8 angles an image of 28 x 28 becomes 81 maps of 7 x 7.

Convolutions are products of discrete Fourier transforms of the mirrored image. What a wavelet of scale 2^j lets through
is nothing above a frequency of about 1 / 2^j, so that it is sampled every 2^j pixels from there on; that is exact but
for the tails of the wavelet.

Afterwards each record's features are normalised by themselves, in groups of channels: a function of one record alone,
like everything here. Left out: other scales than J = 2 and colour as anything but separate channels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES, ANGLES = 2, 8
CHANNELS = 1 + SCALES * ANGLES + SCALES * (SCALES - 1) // 2 * ANGLES**2
STRIDE = 2**SCALES
_FREQUENCY = 3 * math.pi / 4  # of the finest wavelet
_WIDTH = 0.8  # of a filter of scale 2^j, relative to it
_SLANT = 4 / ANGLES  # height over width of a wavelet
_BATCH = 16  # images; more at a time leave the cache


@dataclass(frozen=True)
class Filters:
    """Fourier transforms of the filters for one size of image.

    Args:
        wavelets: For each scale j, float32 [angles, height, width].
        low_pass: float32 [height, width].
    """

    wavelets: tuple[Tensor, ...]
    low_pass: Tensor


@lru_cache(maxsize=8)
def filters(height: int, width: int) -> Filters:
    """Make the filters; their Fourier transforms are real, because the filters are symmetric."""
    wavelets = tuple(
        torch.stack([_morlet(height, width, scale, math.pi * angle / ANGLES) for angle in range(ANGLES)])
        for scale in range(SCALES)
    )
    stddev = _WIDTH * 2.0 ** (SCALES - 1)
    return Filters(wavelets, _transformed(_gaussian(height, width, stddev, 1.0, 0.0)).float())


def _morlet(height: int, width: int, scale: int, angle: float) -> Tensor:
    """Transform of exp(i w x') - k under a Gaussian window, with k such that the mean is 0."""
    stddev, frequency = _WIDTH * 2.0**scale, _FREQUENCY / 2.0**scale
    window = _gaussian(height, width, stddev, _SLANT, angle)
    along = _gaussian(height, width, stddev, _SLANT, angle, frequency)
    return _transformed(along - window * (along.sum() / window.sum())).float()


def _gaussian(height: int, width: int, stddev: float, slant: float, angle: float, frequency: float = 0.0) -> Tensor:
    """A wave of some frequency under a Gaussian of sum 1, repeated with the image's period, complex128 [h, w]."""
    total = torch.zeros(height, width, dtype=torch.complex128)
    for rows in range(-2, 3):
        for columns in range(-2, 3):
            y = torch.arange(height, dtype=torch.float64)[:, None] + rows * height
            x = torch.arange(width, dtype=torch.float64)[None, :] + columns * width
            along = x * math.cos(angle) + y * math.sin(angle)
            across = y * math.cos(angle) - x * math.sin(angle)
            size = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * stddev**2))
            total += torch.polar(size, frequency * along)
    return total * slant / (2 * math.pi * stddev**2)


def _transformed(kernel: Tensor) -> Tensor:
    return torch.fft.fft2(kernel).real  # type: ignore[no-any-return]  # torch.fft is not typed


def scatter(images: Tensor) -> Tensor:
    """Scatter images.

    Args:
        images: float32 or float64 [n, channels, height, width], height and width multiples of 4 and at least 8.

    Returns:
        The same type, [n, channels * 81, height / 4, width / 4].
    """
    n, channels, height, width = images.shape
    flat = images.reshape(n * channels, height, width)
    pieces = [_scatter(piece) for piece in torch.split(flat, _BATCH)]
    scattered = torch.cat(pieces) if pieces else flat.new_zeros(0, CHANNELS, height // STRIDE, width // STRIDE)
    return scattered.reshape(n, channels * CHANNELS, height // STRIDE, width // STRIDE)


def _scatter(images: Tensor) -> Tensor:
    """Scatter some images [n, h, w] to [n, 81, h / 4, w / 4]."""
    padded = F.pad(images[:, None], (STRIDE,) * 4, mode="reflect")[:, 0]
    fine, coarse = (each.to(images) for each in filters(*padded.shape[1:]).wavelets)
    spectrum = torch.fft.fft2(padded)[:, None]
    first = torch.fft.ifft2(spectrum * fine).abs()
    second = _every_other(spectrum * coarse).abs()
    both = _every_other(torch.fft.fft2(first)[:, :, None] * coarse).abs().flatten(1, 2)
    return torch.cat([_smooth(padded[:, None], 1), _smooth(first, 1), _smooth(second, 2), _smooth(both, 2)], dim=1)


def _every_other(spectrum: Tensor) -> Tensor:
    """Inverse transform of [..., h, w], sampled every 2 pixels, [..., h / 2, w / 2]: frequencies fold."""
    height, width = spectrum.shape[-2] // 2, spectrum.shape[-1] // 2
    rows = spectrum[..., :height, :] + spectrum[..., height:, :]
    return torch.fft.ifft2((rows[..., :width] + rows[..., width:]) / 4)  # type: ignore[no-any-return]  # torch.fft is not typed


def _smooth(maps: Tensor, sampled: int) -> Tensor:
    """Convolve [n, c, h, w], sampled every so many pixels, with the low pass; cut the padding off, sample at 2^J."""
    stddev = _WIDTH * 2.0 ** (SCALES - 1)
    rows, columns = (_low_pass_matrix(size, sampled, stddev) for size in maps.shape[-2:])
    return rows.to(maps) @ maps @ columns.T.to(maps)


@lru_cache(maxsize=32)
def _low_pass_matrix(size: int, sampled: int, stddev: float) -> Tensor:
    """One dimension of the low pass, which is a product, with periodic ends: float32 [kept samples, size]."""
    step = STRIDE // sampled
    kept = torch.arange(step, size - step, step)[:, None]
    distance = (torch.arange(size)[None, :] - kept).double()
    turns = torch.arange(-2, 3)[:, None, None] * size
    weights = torch.exp(-(((distance + turns) * sampled / stddev) ** 2) / 2).sum(0)
    return (weights * sampled / (stddev * math.sqrt(2 * math.pi))).float()
