import numpy as np
import pytest
import torch

from adadpigu_core import front_ends, principal_axes, strokes


@pytest.mark.parametrize("count", [500, 40], ids=["by covariance", "fewer pictures than features"])
def test_axes_are_principal_and_divided_by_the_cube_roots_of_their_variances(count):
    """Against the covariance matrix and its eigenvectors."""
    generator = np.random.default_rng(0)
    spread = np.linspace(3, 0.5, 48)
    samples = generator.standard_normal((count, 48)) * spread + generator.standard_normal(48)
    found = principal_axes.axes(samples, 12)
    assert found.projection.shape == (48, 12)
    variances, vectors = np.linalg.eigh(np.cov(samples.T))
    variances, vectors = variances[::-1][:12], vectors[:, ::-1][:, :12]
    wanted = vectors * variances ** (-1 / 3)
    wanted *= np.sqrt(12 / np.square((samples - samples.mean(0)) @ wanted).sum(1).mean())
    ours = found.projection.double().numpy()
    wanted *= np.sign((ours * wanted).sum(0))
    np.testing.assert_allclose(ours, wanted, rtol=1e-2, atol=2e-2 if count < 48 else 2e-3)
    projected = found.project(torch.from_numpy(samples).float())
    assert float(projected.mean(0).abs().max()) < 1e-5
    assert float(projected.square().sum(1).mean()) == pytest.approx(12, rel=0.03)


def test_all_machines_find_the_same_axes():
    """What rounding does to features of drawings moves an image's features by no more than rounding does."""
    exact = front_ends._scattered(strokes.upright(strokes.drawings(8, 8))).flatten(1).numpy()
    noise = np.random.default_rng(0).standard_normal(exact.shape)
    pictures = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    images = front_ends._scattered(pictures).flatten(1)
    one, other = (principal_axes.axes(values, 81).project(images) for values in (exact, exact * (1 + 1e-12 * noise)))
    assert float((one - other).abs().max()) < 1e-4
