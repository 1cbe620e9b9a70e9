import numpy as np
import pytest
import torch

from adadpigu_core import leaves, patches
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.front_ends import PATCHES, feature_shape, features


def raw(count, *shape):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def fitted():
    return patches._fitted(3, 12, 12)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 12, 12), (3, 12, 16)])
def test_pictures_are_the_same_each_time_and_differ(channels, height, width):
    made = leaves.pictures(channels, height, width)
    assert made.shape == (4000, channels, height, width)
    assert made.dtype == torch.float64
    assert torch.equal(made, leaves.pictures(channels, height, width))
    assert len({picture.numpy().tobytes() for picture in made[:500]}) == 500
    assert bool(torch.isfinite(made).all())


def test_pictures_have_the_statistics_of_photographs():
    """Neighbours are alike, the less the farther; most differences are small and some large; colours go along."""
    made = leaves.pictures(3, 24, 24)
    near, middle, far = ((made[..., k:] - made[..., :-k]) for k in (1, 4, 16))
    assert float(near.var()) < 0.7 * float(middle.var()) < 0.7 * 0.8 * float(far.var())
    assert float((near**4).mean() / near.var() ** 2) > 6, "a normal distribution has 3"
    red, green = made[:, 0].flatten(), made[:, 1].flatten()
    assert 0.7 < float(torch.corrcoef(torch.stack([red, green]))[0, 1]) < 0.95


def test_features_are_those_of_the_definition(fitted):
    """Against loops over patches in float64 with numpy."""
    filters, axes = fitted
    weight, offset = filters.weight.numpy(), filters.offset.numpy()
    image = raw(1, 3, 12, 12)
    x = image[0].double().numpy()
    x = (x - x.mean()) / x.std()
    products = np.zeros((800, 7, 7))
    for row in range(7):
        for column in range(7):
            patch = x[:, row : row + 6, column : column + 6]
            patch = (patch - patch.mean()) / np.sqrt(patch.var() + 0.16**2)
            products[:, row, column] = weight @ patch.ravel() - offset
    found = []
    for sign in (1, -1):
        active = np.maximum(sign * products - 0.5, 0)
        quarters = np.array([[active[:, r : r + 4, c : c + 4].mean((1, 2)) for c in (0, 3)] for r in (0, 3)])
        own, mirrored = quarters[..., :400], quarters[..., 400:]
        found.append((own + mirrored[:, ::-1]).transpose(2, 0, 1) / 2)
    expected = np.sqrt(np.stack(found)).ravel()
    wanted = axes.project(torch.from_numpy(expected).float())
    torch.testing.assert_close(patches.features(image)[0], wanted, rtol=1e-3, atol=2e-2)


def test_mirrored_filters_answer_mirrored_patches(fitted):
    filters, _ = fitted
    patch = raw(1, 3, 6, 6).double()
    one, other = (filters.weight @ each.flatten() - filters.offset for each in (patch, patch.flip(3)))
    torch.testing.assert_close(one, torch.cat([other[400:], other[:400]]), rtol=1e-6, atol=1e-6)


def test_mirror_images_have_the_same_features():
    image = raw(2, 3, 12, 12)
    torch.testing.assert_close(patches.features(image.flip(3)), patches.features(image), rtol=1e-3, atol=1e-3)
    assert float((patches.features(image.flip(2)) - patches.features(image)).abs().max()) > 0.1


def test_features_of_made_up_pictures_are_centred_and_of_mean_square_one():
    found = patches.features(leaves.pictures(3, 12, 12).float())
    assert found.shape == (4000, 2000)
    assert float(found.mean(0).abs().max()) < 1e-3
    assert float(found.square().mean()) == pytest.approx(1, rel=0.01)


def test_brightness_and_contrast_do_not_matter():
    image = raw(2, 3, 12, 12)
    torch.testing.assert_close(patches.features(4 * image - 2), patches.features(image), rtol=1e-3, atol=2e-2)


def test_records_stand_for_themselves():
    images = raw(7, 3, 12, 12)
    together = features(PATCHES, images)
    assert together.shape[1:] == feature_shape(PATCHES, (3, 12, 12)) == (2000,)
    for index in (0, 6):
        alone = features(PATCHES, images[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-3, atol=1e-3)


def test_blank_images_and_no_images_are_no_error():
    assert bool(torch.isfinite(features(PATCHES, torch.full((2, 3, 12, 12), 0.3))).all())
    assert features(PATCHES, torch.zeros(0, 3, 12, 12)).shape == (0, 2000)


@pytest.mark.parametrize("shape", [(64,), (3, 11, 32), (28, 28)])
def test_what_is_no_image_or_too_small_is_refused(shape):
    with pytest.raises(ConfigurationError, match="patches takes images whose sides are at least 12"):
        feature_shape(PATCHES, shape)
