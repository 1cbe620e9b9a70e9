"""Scattering against its definition in space, and what is known of it."""

import math

import pytest
import torch
import torch.nn.functional as F

from adadpigu_core import front_ends, scattering
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.scattering import ANGLES, CHANNELS, filters, scatter


def images(count=2, size=12, seed=0):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


def convolved(image, transform):
    """Circular convolution by its sum, float64; the filter is given by its Fourier transform."""
    height, width = image.shape
    kernel = torch.fft.ifft2(transform.double())
    total = torch.zeros(height, width, dtype=torch.complex128)
    for y in range(height):
        for x in range(width):
            total += kernel[y, x] * torch.roll(image.double(), (y, x), (0, 1))
    return total


def defined(image):
    """S0, S1 and S2 as the definition has them, every wavelet at full resolution."""
    padded = F.pad(image[None], (4,) * 4, mode="reflect")[0]
    known = filters(*padded.shape)
    fine, coarse = ([convolved(padded, one).abs() for one in scale] for scale in known.wavelets)
    both = [convolved(first, one).abs() for first in fine for one in known.wavelets[1]]
    smooth = [convolved(each, known.low_pass).real for each in (padded.double(), *fine, *coarse, *both)]
    return torch.stack([each[4:-4:4, 4:-4:4] for each in smooth]).float()


def test_it_is_what_the_definition_says():
    image = images(1)
    found, expected = scatter(image)[0], defined(image[0, 0])
    assert found.shape == expected.shape == (CHANNELS, 3, 3)
    exact = slice(0, 1 + ANGLES)  # nothing is sampled before the low pass
    torch.testing.assert_close(found[exact], expected[exact], rtol=1e-4, atol=1e-5)
    assert float((found - expected).norm() / expected.norm()) < 5e-3  # maps are sampled every 2 pixels before it


def test_wavelets_have_mean_zero_and_the_low_pass_one():
    known = filters(36, 36)
    assert max(float(scale[:, 0, 0].abs().max()) for scale in known.wavelets) < 1e-6
    assert float(known.low_pass[0, 0]) == pytest.approx(1, abs=1e-6)


def test_no_frequency_is_amplified_and_none_that_images_are_made_of_is_lost():
    known = filters(36, 36)
    power = sum((scale**2).sum(0) for scale in known.wavelets)
    mirrored = power.flip(0, 1).roll((1, 1), (0, 1))  # for real images a wavelet and its mirror are one
    covered = known.low_pass**2 + (power + mirrored) / 2
    assert float(covered.max()) <= 1 + 1e-5
    frequency = torch.fft.fftfreq(36)
    assert float(covered[frequency[:, None] ** 2 + frequency**2 < 0.4**2].min()) > 0.3


def test_small_shifts_change_little_and_less_than_the_image():
    image = F.interpolate(images(1, 8), size=(28, 28), mode="bilinear")
    shifted = image.roll(1, 3)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    here, there = scatter(image)[inner], scatter(shifted)[inner]
    assert float((here - there).norm() / here.norm()) < 0.15
    edges = image[..., 1:] - image[..., :-1], shifted[..., 1:] - shifted[..., :-1]
    assert float((here - there).norm() / here.norm()) < 0.3 * float((edges[0] - edges[1]).norm() / edges[0].norm())


def test_another_image_is_told_apart():
    one, other = scatter(images(2)).unbind(0)
    assert float((one - other).norm() / one.norm()) > 0.05


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_and_records_stand_for_themselves(channels):
    raw = torch.rand(scattering._BATCH + 3, channels, 8, 8)
    together = front_ends.features("scattering", raw)
    assert together.shape[1:] == front_ends.feature_shape("scattering", (channels, 8, 8))
    for index in (0, len(raw) - 1):
        alone = front_ends.features("scattering", raw[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-3, atol=1e-4)
    if channels == 3:
        torch.testing.assert_close(scatter(raw)[:, :CHANNELS], scatter(raw[:, :1]))


def test_features_have_mean_square_one_whatever_the_contrast():
    raw = images(3, 28)
    found = front_ends.features("scattering", raw)
    torch.testing.assert_close(found.square().flatten(1).mean(1), torch.ones(3), rtol=1e-3, atol=0)
    torch.testing.assert_close(front_ends.features("scattering", raw * 0.1), found, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_blank_image_has_finite_features(value):
    blank = torch.full((1, 1, 28, 28), value)
    assert bool(torch.isfinite(front_ends.features("scattering", blank)).all())
    assert math.isclose(float(scatter(blank)[0, 0].mean()), value, abs_tol=1e-5)


@pytest.mark.parametrize("shape", [(64,), (1, 4, 4), (1, 10, 12)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ConfigurationError, match="multiples of 4"):
        front_ends.feature_shape("scattering", shape)
