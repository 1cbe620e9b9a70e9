"""Random views: where the pixels go, and that they are drawn anew."""

import pytest
import torch

from adadpigu_core.augmentation import Views
from adadpigu_core.exceptions import ConfigurationError


def drawn(kind, images, count=64, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Views(count, kind)(images)


def expected(image, down, right):
    """The image moved so that zeros come in, by hand."""
    moved = torch.zeros_like(image)
    height, width = image.shape[-2:]
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                moved[:, y, x] = image[:, y + down, x + right]
    return moved


def test_every_view_is_one_of_the_25_shifts_and_all_of_them_come():
    images = torch.rand(3, 2, 5, 6)
    views = drawn("shifts", images)
    assert views.shape == (3, 64, 2, 5, 6)
    for image, own in zip(images, views, strict=True):
        shifts = torch.stack([expected(image, y, x) for y in range(-2, 3) for x in range(-2, 3)])
        same = (own[:, None] == shifts).flatten(2).all(2)
        assert bool((same.sum(1) == 1).all())
        assert int(same.any(0).sum()) > 15


def test_flips_mirror_every_other_view():
    images = torch.rand(1, 1, 5, 5) + 1
    shifts = torch.stack([expected(images[0], y, x) for y in range(-2, 3) for x in range(-2, 3)])
    views = drawn("shifts-flips", images)[0]
    plain, mirrored = ((views[:, None] == known).flatten(2).all(2).any(1) for known in (shifts, shifts.flip(-1)))
    assert bool((plain ^ mirrored).all())
    assert 16 < int(mirrored.sum()) < 48


def test_views_follow_the_generator_and_differ_between_records():
    images = torch.rand(1, 1, 8, 8).expand(2, 1, 8, 8)
    assert drawn("shifts", images).equal(drawn("shifts", images))
    assert not drawn("shifts", images).equal(drawn("shifts", images, seed=1))
    views = drawn("shifts", images)
    assert not views[0].equal(views[1])


@pytest.mark.parametrize(("count", "kind"), [(0, "shifts"), (65, "shifts"), (2, "none"), (1, "rotations")])
def test_what_makes_no_sense_is_refused(count, kind):
    with pytest.raises(ConfigurationError):
        Views(count, kind)


def test_only_images_can_be_shifted():
    Views(1, "none").check((4,))
    with pytest.raises(ConfigurationError, match="images"):
        Views(2, "shifts").check((4,))
    assert Views(1, "none").augmentation is None
