import pytest
import torch

from adadpigu_core import front_ends, strokes
from adadpigu_core.augmentation import Views
from adadpigu_core.exceptions import ConfigurationError
from adadpigu_core.front_ends import STROKES, feature_shape, features


def raw(count, *shape):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (12, 32)])
def test_drawings_are_strokes_on_black_and_always_the_same(height, width):
    drawn = strokes.drawings(height, width)
    assert drawn.shape == (1000, 1, height, width)
    assert drawn.dtype == torch.float64
    assert float(drawn.min()) == 0
    assert float(drawn.max()) <= 1
    inked = (drawn > 0.5).double().mean((1, 2, 3))
    assert float(inked.min()) > 0.01
    assert float(inked.max()) < 0.6
    assert len({picture.numpy().tobytes() for picture in drawn}) == 1000
    assert torch.equal(drawn, strokes.drawings(height, width))


def test_features_of_drawings_are_centred_and_of_mean_square_one():
    found = features(STROKES, strokes.drawings(28, 28).float())
    assert found.shape == (1000, 384)
    assert float(found.mean(0).abs().max()) < 1e-4
    assert float(found.square().mean()) == pytest.approx(1, rel=0.01)
    covariance = found.T.cov()
    variances = covariance.diagonal()
    assert float((covariance - variances.diag()).abs().max()) < 1e-3 * float(variances.max())
    assert bool((variances[1:] <= variances[:-1] * 1.001).all()), "the axes come in order"


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_and_records_stand_for_themselves(channels):
    images = raw(front_ends._PIECE + 3, channels, 8, 8)
    together = features(STROKES, images)
    assert together.shape[1:] == feature_shape(STROKES, (channels, 8, 8)) == (81 * channels,)
    for index in (0, len(images) - 1):
        alone = features(STROKES, images[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-3, atol=1e-3)


def test_no_more_axes_than_the_features_bear():
    assert feature_shape(STROKES, (1, 28, 28)) == (384,)
    assert feature_shape(STROKES, (1, 16, 16)) == (324,)


def test_a_blank_image_has_finite_features():
    assert bool(torch.isfinite(features(STROKES, torch.zeros(2, 1, 28, 28))).all())


def test_records_without_two_dimensions_are_refused():
    with pytest.raises(ConfigurationError, match="scattering-strokes takes images"):
        feature_shape(STROKES, (64,))


def test_features_along_axes_cannot_be_shifted():
    with pytest.raises(ConfigurationError, match="shifts"):
        Views(4, "shifts").check(feature_shape(STROKES, (1, 28, 28)))


def blob(size, row, column, lean=0.0):
    """A soft stroke through a place, which moves ``lean`` columns a row."""
    rows, columns = torch.meshgrid(torch.arange(size).double(), torch.arange(size).double(), indexing="ij")
    axis = column + lean * (rows - row)
    return torch.exp(-((columns - axis) ** 2) / 4 - (rows - row) ** 2 / 20)[None, None]


def moments(picture):
    """Centre of the ink, and columns that it drifts a row."""
    share = picture[0].sum(0) / picture.sum()
    places = torch.arange(len(share)).double()
    row, column = (share.sum(1) * places).sum(), (share.sum(0) * places).sum()
    rows, columns = places[:, None] - row, places[None, :] - column
    return float(row), float(column), float((share * rows * columns).sum() / (share * rows**2).sum())


@pytest.mark.parametrize("lean", [-0.8, 0.0, 0.5])
@pytest.mark.parametrize(("row", "column"), [(13.5, 13.5), (11.0, 16.25)])
def test_pictures_are_centred_and_put_upright(lean, row, column):
    before = blob(28, row, column, lean)
    assert moments(before)[2] == pytest.approx(lean, abs=0.02)
    found = moments(strokes.upright(before))
    assert found == pytest.approx((13.5, 13.5, 0.0), abs=0.03)


def test_an_upright_picture_in_the_middle_stays_as_it_is():
    picture = blob(28, 13.5, 13.5)
    torch.testing.assert_close(strokes.upright(picture), picture - picture.min(), rtol=0, atol=1e-6)


def test_what_lies_around_counts_as_no_ink():
    picture = blob(28, 12, 15, 0.4)
    torch.testing.assert_close(strokes.upright(3 * picture - 1), 3 * strokes.upright(picture), rtol=1e-6, atol=1e-6)


def test_channels_move_together():
    picture = blob(28, 12, 15, 0.4)
    both = strokes.upright(torch.cat([picture, 0.5 * picture], 1))
    torch.testing.assert_close(both[:, :1], strokes.upright(picture), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(both[:, 1], 0.5 * both[:, 0], rtol=1e-6, atol=1e-6)


def test_features_forget_where_and_how_slanted_a_drawing_is():
    one = features(STROKES, blob(28, 13.5, 13.5).float())
    other = features(STROKES, blob(28, 12, 15.5, 0.5).float())
    apart = features(STROKES, blob(28, 13.5, 13.5).float().transpose(2, 3))
    assert float((one - other).norm()) < 0.3 * float((one - apart).norm())
