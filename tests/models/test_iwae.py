"""The IWAE: its objective is its K-sample bound, and what it encodes is the law of that bound."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyroboost import Cascade
from pyroboost.evaluation import decompose, elbo, importance_bound, log_likelihood
from pyroboost.evaluation.weights import bound_draw, log_weights
from pyroboost.infer import fit, greedy, stage_gain
from pyroboost.infer.importance_weighted import ImportanceWeightedELBO
from pyroboost.models import GMM, IWAE, VAE


class Affine(nn.Module):
    """A linear location and a constant raw scale."""

    def __init__(self, slope, raw):
        super().__init__()
        self.slope, self.raw = nn.Parameter(torch.tensor(slope)), nn.Parameter(torch.tensor(raw))

    def forward(self, value):
        return self.slope * value, self.raw.expand_as(value)


def linear(num_samples, raw=-1.0, **settings):
    """z ~ N(0, 1), x ~ N(0.9 z, s) and a guide that is too narrow where left alone."""
    return IWAE(
        1,
        1,
        num_samples,
        likelihood="gaussian",
        decoder=Affine(0.9, -0.4),
        encoder=Affine(0.5, raw),
        **settings,
    )


def parts(iwae):
    """Location and scale of x given z, and of z given x, as plain numbers."""
    softplus = nn.functional.softplus
    m, q = iwae.model.fn.net.net, iwae.guide.fn.net.net
    values = m.slope, softplus(m.raw) + 1e-4, q.slope, softplus(q.raw) + 1e-4
    return [float(v.detach()) for v in values]


@pytest.mark.parametrize("gradient", ["standard", "doubly-reparameterised"])
def test_objective_is_the_weighted_bound(gradient):
    """The loss of a fit and its held-out bound are the K-sample bound, by quadrature."""
    iwae, x = linear(2, gradient=gradient), torch.full((20_000, 1), 1.1)
    a, s, c, e = parts(iwae)
    grid = torch.linspace(-8.0, 8.0, 801, dtype=torch.float64)
    z = c * 1.1 + e * grid
    log_w = dist.Normal(a * z, s).log_prob(torch.tensor(1.1)) + dist.Normal(0.0, 1.0).log_prob(z)
    log_w = log_w - dist.Normal(c * 1.1, e).log_prob(z)
    mass = dist.Normal(0.0, 1.0).log_prob(grid).softmax(0)
    two = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
    exact = (mass[:, None] * mass * two).sum()
    row = fit(iwae, x, epochs=1, batch_size=20_000, lr=0.0, validation=x, seed=1).history[0]
    assert abs(row["loss"] + exact) < 0.02
    assert abs(row["validation_bound"] - exact) < 0.02
    assert abs(exact - (mass * log_w).sum()) > 0.05  # the ELBO lies elsewhere


def test_encodes_the_self_normalised_law():
    """Moments under encode are those of one of K draws kept by weight, by quadrature; not q's."""
    iwae = linear(3)
    a, s, c, e = parts(iwae)
    x, count = 1.1, 60_000
    points = torch.linspace(-5.0, 5.0, 121, dtype=torch.float64)
    z = c * x + e * points
    mass = dist.Normal(0.0, 1.0).log_prob(points).softmax(0)
    w = dist.Normal(a * z, s).log_prob(torch.tensor(x)) + dist.Normal(0.0, 1.0).log_prob(z)
    w = (w - dist.Normal(c * x, e).log_prob(z)).exp()
    ratio = w[:, None, None] / (w[:, None, None] + w[:, None] + w)
    law = 3 * mass * (ratio * mass[:, None] * mass).sum((1, 2))
    assert law.sum() == pytest.approx(1.0)
    drawn = iwae.encode(torch.full((count, 1), x))[:, 0].double()
    for moment in (lambda v: v, lambda v: v**2, torch.cos):
        mean = (law * moment(z)).sum()
        found = moment(drawn)
        assert abs(found.mean() - mean) < 4.5 * found.std() / count**0.5
    plain = (mass * z).sum()
    assert abs(drawn.mean() - plain) > 4.5 * drawn.std() / count**0.5


def test_one_sample_is_a_vae():
    torch.manual_seed(1)
    iwae, vae = IWAE(6, 2, 1, units=8), VAE(6, 2, units=8)
    vae.load_state_dict(iwae.state_dict())
    x = (torch.rand(9, 6) < 0.4).float()
    for call in (lambda m: m.encode(x), lambda m: bound_draw(m, x).log_weight):
        pyro.set_rng_seed(3)
        one = call(iwae)
        pyro.set_rng_seed(3)
        torch.testing.assert_close(call(vae), one)


def test_bounds_with_a_mixture_on_top():
    """Terms <= the composed pair's K-sample bound <= log p, all three known here.

    x | z, z | component are normal, so that log p(x) of the composed pair is a mixture's.
    """
    iwae, gmm = linear(4, raw=0.5), GMM(2, 1)
    a, s, _, _ = parts(iwae)
    x = torch.cat([torch.randn(1500, 1) - 1.5, torch.randn(1500, 1) + 1.5])
    cascade = Cascade(iwae, gmm)
    gmm.own_fit(iwae.encode(x))
    found = decompose(cascade, x, num_importance=4)
    composed = importance_bound(cascade, x, num_samples=4)
    exact = mixture_density(gmm, a, s, x)
    estimate = log_likelihood(cascade, x, num_samples=100)
    assert abs(estimate.mean - exact.mean()) < 0.03
    assert found.elbo < composed.mean + 3 * found.elbo_error
    assert composed.mean < exact.mean() + 0.01
    assert found.elbo > elbo(cascade, x).mean  # here the resampled climb is the better one
    for term, gain in zip(found.terms, (stage_gain(cascade, i, x) for i in (0, 1)), strict=True):
        assert abs(term.value - gain.value) < 4 * math.hypot(term.std_error, gain.std_error)


def mixture_density(gmm, a, s, x):
    """log p(x) with z from the mixture and x ~ N(a z, s)."""
    z = torch.linspace(-10.0, 10.0, 4001)
    with torch.no_grad():
        known = gmm.log_marginal(z[:, None])
    assert known.kind == "exact"
    logs = dist.Normal(a * z, s).log_prob(x) + known.value
    return logs.logsumexp(-1) + math.log(z[1] - z[0])


def test_the_stage_above_trains_on_that_law():
    """A greedy round hands the stage above draws of encode, not of the guide."""
    iwae = linear(5)
    x = torch.full((4000, 1), 1.1)
    top = list(Cascade(iwae, GMM(1, 1)).rounds(x))[1]
    (h,) = top.transform(x)
    plain = pyro.poutine.trace(iwae.guide).get_trace(x).nodes["z"]["value"]
    error = h.std() / 4000**0.5
    assert abs(h.mean() - iwae.encode(x).mean()) < 6 * error
    assert abs(h.mean() - plain.mean()) > 6 * error
    boosted = greedy(Cascade(iwae, GMM(1, 1)), x, epochs=1, seed=0)
    assert boosted.stages[0].train.value > -10


def test_trains_copies_and_keeps(tmp_path):
    x = torch.cat([torch.zeros(50, 6), torch.ones(50, 6)])
    iwae = IWAE(6, 2, 4, units=16, gradient="doubly-reparameterised")
    start = importance_bound(iwae, x, num_samples=50).mean
    fit(iwae, x, epochs=20, lr=0.01, batch_size=25, annealing=3, seed=0)
    assert importance_bound(iwae, x, num_samples=50).mean > start + 2
    svi = SVI(iwae.model, iwae.guide, pyro.optim.Adam({"lr": 0.01}), ImportanceWeightedELBO(4))
    svi.step(x)
    iwae.save(tmp_path / "iwae.pt")
    loaded = IWAE(6, 2, 4, units=16).load(tmp_path / "iwae.pt")
    for other in (copy.deepcopy(iwae), loaded):
        pyro.set_rng_seed(1)
        one = log_weights(iwae, x)
        pyro.set_rng_seed(1)
        torch.testing.assert_close(log_weights(other, x), one)
        assert other.num_particles == 4
    assert "num_samples=4" in repr(iwae)


def test_refusals():
    with pytest.raises(ValueError, match="IWAE: num_samples is 0"):
        IWAE(6, 2, 0)
    with pytest.raises(ValueError, match="gradient is 'dreg'"):
        IWAE(6, 2, gradient="dreg")
