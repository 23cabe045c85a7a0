"""The discretised likelihood: 256 probabilities that sum to one, against scipy's logistic law."""

import numpy as np
import pytest
import scipy.stats
import torch

from pyroboost.evaluation import log_likelihood
from pyroboost.infer import fit
from pyroboost.models import IWAE, VAE, ConvVAE
from pyroboost.models._levels import DiscretizedLogistic

LEVELS = torch.arange(256, dtype=torch.float64) / 255


def law(loc, scale, levels=256):
    return DiscretizedLogistic(
        torch.as_tensor(loc, dtype=torch.float64),
        torch.as_tensor(scale, dtype=torch.float64),
        levels,
    )


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_probabilities_sum_to_one_at_every_pixel(levels):
    torch.manual_seed(0)
    loc, scale = torch.rand(3, 4) * 2 - 0.5, 10 ** (torch.rand(3, 4) * 4 - 3)
    grid = (torch.arange(levels) / (levels - 1)).view(-1, 1, 1).double()
    total = law(loc, scale, levels).log_prob(grid).exp().sum(0)
    assert torch.allclose(total, torch.ones(3, 4, dtype=total.dtype), atol=1e-12)


@pytest.mark.parametrize(("loc", "scale"), [(0.4, 0.1), (0.9, 0.02), (-0.3, 0.5), (0.5, 0.005)])
def test_probabilities_are_differences_of_scipys_distribution_function(loc, scale):
    edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 255, [np.inf]])
    expected = np.diff(scipy.stats.logistic.cdf(edges, loc, scale))
    upper = -np.diff(scipy.stats.logistic.sf(edges, loc, scale))
    found = law(loc, scale).log_prob(LEVELS).exp().numpy()
    best = np.where(edges[:-1] > loc, upper, expected)  # each tail where it does not cancel
    assert np.allclose(found, best, rtol=1e-8, atol=0)


def test_far_tails_are_finite_and_have_gradients():
    """Where the probability underflows its logarithm is -|distance| / scale, and pulls back."""
    loc = torch.tensor([30.0, -30.0, 0.5], requires_grad=True)
    raw = torch.tensor([1e-3, 1e-3, 1e-4], requires_grad=True)
    x = torch.tensor([100.0, 100.0, 255.0]) / 255
    value = DiscretizedLogistic(loc, raw).log_prob(x)
    found = value.tolist()
    exact = scipy.stats.logistic.logcdf(((255 - 0.5) / 255 - 0.5) / -1e-4)
    assert value.isfinite().all()
    assert abs(found[2] / exact - 1) < 1e-4
    assert abs(found[0] / (-(30 - 100.5 / 255) / 1e-3) - 1) < 1e-4
    gradients = torch.autograd.grad(value.sum(), (loc, raw))
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0][0] < 0 < gradients[0][1]


def test_gradients_are_those_of_differences():
    loc, scale = torch.rand(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) * 0.1 + 0.01
    x = torch.tensor([0.0, 1.0, 50 / 255, 200 / 255, 128 / 255], dtype=torch.float64)
    inputs = (loc.requires_grad_(), scale.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: DiscretizedLogistic(a, b).log_prob(x), inputs)


def test_draws_follow_the_probabilities():
    torch.manual_seed(1)
    few = law(0.3, 0.2, 8)
    drawn = (few.sample((20_000,)) * 7).round().long()
    counts = torch.bincount(drawn, minlength=8).double()
    expected = 20_000 * few.log_prob(torch.arange(8) / 7).exp()
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert scipy.stats.chi2.sf(float(statistic), 7) > 1e-3
    wrong = 20_000 * law(0.32, 0.2, 8).log_prob(torch.arange(8) / 7).exp()
    assert scipy.stats.chi2.sf(float(((counts - wrong) ** 2 / wrong).sum()), 7) < 1e-3


def test_the_mean_is_that_of_the_levels():
    wide = law([0.1, 0.5, 1.2], [0.3, 0.01, 0.2])
    by_hand = (wide.log_prob(LEVELS[:, None]).exp() * LEVELS[:, None]).sum(0)
    assert torch.allclose(wide.mean, by_hand, atol=1e-12)
    assert torch.allclose(wide.expand((2, 3)).mean[1], by_hand, atol=1e-12)


def grey(rows=40, dim=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, dim), generator=generator).float() / 255


@pytest.mark.parametrize("shape", [6, (1, 2, 3)])
def test_a_vae_of_grey_levels(shape):
    """Its parts are those of the law, its data are levels, and it learns."""
    vae = VAE(shape, 2, units=16, likelihood="discretized").eval()
    x = grey().reshape(40, *vae.visible_shape)
    z = vae.encode(x)
    loc, raw = vae.decoder(z)
    by_hand = law(loc.detach(), torch.nn.functional.softplus(raw.detach()) + 1e-4).log_prob(x)
    found = vae.model.fn.law(z).log_prob(x)
    assert torch.allclose(found.double(), by_hand.flatten(1).sum(1), atol=1e-3)
    drawn = vae.sample(5)
    assert drawn.shape == (5, *vae.visible_shape)
    assert torch.equal((drawn * 255).round() / 255, drawn)
    history = fit(vae, x, epochs=40, lr=1e-2, seed=0).history
    assert history[-1]["loss"] < history[0]["loss"]
    assert log_likelihood(vae, x, num_samples=20).mean < 0


def test_all_data_sets_of_a_tiny_vae_sum_to_one():
    """Four levels, two pixels: importance-sampled likelihoods of the 16 pictures sum to one."""
    vae = VAE(2, 1, units=8, likelihood="discretized", levels=4).eval()
    axis = torch.arange(4) / 3
    likelihood = log_likelihood(vae, torch.cartesian_prod(axis, axis), num_samples=20_000)
    total = likelihood.value.exp().sum()
    error = (likelihood.value.exp() * likelihood.std_error).square().sum().sqrt()
    assert abs(total - 1) < 5 * error
    assert error < 0.02


def test_other_vaes_take_it():
    assert IWAE(6, 2, units=8, likelihood="discretized").encode(grey()).shape == (40, 2)
    conv = ConvVAE((4, 4), 2, channels=(4,), units=8, likelihood="discretized")
    assert conv.sample(3).shape == (3, 4, 4)
    assert fit(conv, grey(20, 16).reshape(20, 4, 4), epochs=1).epochs_run == 1


def test_refusals():
    vae = VAE(6, 2, units=8, likelihood="discretized")
    for wrong in (grey() + 1, grey() + 0.5 / 255, -grey() - 1 / 255):
        with pytest.raises(ValueError, match="values other than the 256 levels 0, 1/255"):
            fit(vae, wrong, epochs=1)
    with pytest.raises(ValueError, match="levels is 1"):
        VAE(6, 2, likelihood="discretized", levels=1)
    with pytest.raises(ValueError, match="levels is 1"):
        law(0.0, 1.0, 1)
