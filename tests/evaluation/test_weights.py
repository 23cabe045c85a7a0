"""Importance weights against enumeration."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumerated import BitPair, all_bits, cascade_exact

from pyroboost import Cascade, MetaModel
from pyroboost.evaluation import draw, elbo, importance_bound, log_likelihood, log_weights
from pyroboost.models import VAE


@pytest.fixture
def pairs():
    return [BitPair(4, 3), BitPair(3, 2), BitPair(2, 2)]


def test_weights_average_to_the_probability(pairs):
    """E_q[w] = p(x) for each datum, on the natural scale and within three standard errors."""
    x = all_bits(4)[::3]
    weights = log_weights(Cascade(*pairs), x, num_samples=40_000).double().exp()
    error = weights.std(0) / 200
    exact = cascade_exact(pairs, x).double().exp()
    assert ((weights.mean(0) - exact).abs() < 3.5 * error).all()
    # The check is sharp enough to see a weight that is wrong by a tenth of a nat.
    assert ((weights.mean(0) * 0.9 - exact).abs() > 3.5 * error).any()


def test_weight_of_a_draw_is_its_own_densities(pairs):
    """One weight is log m(x, h) - log q(h | x) at the h that was drawn."""
    pair, x = pairs[0], all_bits(4)
    found = draw(pair, x)
    by_hand = torch.stack(
        [
            pair.m.log_joint(x[i : i + 1], h[None]) - pair.q.log_q(x[i : i + 1], h[None])
            for i, h in enumerate(found.hidden)
        ]
    ).flatten()
    torch.testing.assert_close(found.log_weight, by_hand.detach(), atol=1e-5, rtol=1e-5)
    prior = torch.stack(
        [dist.Bernoulli(logits=pair.m.prior).log_prob(h).sum() for h in found.hidden]
    )
    torch.testing.assert_close(found.log_prior, prior.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("memory", [0.01, 0.05, 256.0])
def test_blocks_cover_every_datum_once(pairs, memory):
    """Whatever the memory, the table has one column per datum, in order."""
    x = all_bits(4)
    pair = pairs[0]
    table = log_weights(pair, x, num_samples=200, memory=memory)
    assert table.shape == (200, 16)
    exact = pair.exact(x).exp()
    error = table.exp().std(0) / 200**0.5
    assert ((table.exp().mean(0) - exact).abs() < 5 * error + 1e-6).all()


def test_sequential_and_vectorised_agree(pairs):
    """Both layouts estimate one quantity."""
    x = all_bits(4)[:3]
    together = log_weights(pairs[0], x, num_samples=4000).exp()
    apart = log_weights(pairs[0], x, num_samples=1000, vectorized=False).exp()
    error = (together.var(0) / 4000 + apart.var(0) / 1000).sqrt()
    assert ((together.mean(0) - apart.mean(0)).abs() < 4 * error).all()


def test_scales_and_annealing_do_not_enter():
    """A likelihood is that of the data, whatever a training loop scales."""

    def model(x):
        with pyro.plate("data", 100, subsample=x), pyro.poutine.scale(scale=0.3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 100, subsample=x):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(7)
    found = log_weights(MetaModel(model, guide, visible="x", hidden="z"), x, num_samples=3)
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(x)
    torch.testing.assert_close(found, exact.expand(3, 7), atol=1e-5, rtol=1e-5)


def test_private_sites_from_the_prior_drop_out():
    """A latent that the guide does not draw comes from its prior: the weights stay unbiased."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z + 2 * c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.tensor([0.5, -1.0, 2.0])
    weights = log_weights(
        MetaModel(model, guide, visible="x", hidden="z"), x, num_samples=40_000
    ).exp()
    normal = [dist.Normal(m, 2.0**0.5).log_prob(x).exp() for m in (0.0, 2.0)]
    exact = 0.7 * normal[0] + 0.3 * normal[1]
    assert ((weights.mean(0) - exact).abs() < 3.5 * weights.std(0) / 200).all()


def test_refusals():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    pair = MetaModel(model, guide, visible="x", hidden="z")
    with pytest.raises(ValueError, match=r"site 'w' .* without a dimension of the \d+ data"):
        log_weights(pair, torch.zeros(5))
    with pytest.raises(ValueError, match="ask for at least one of each"):
        log_weights(pair, torch.zeros(5), num_samples=0)

    def stray(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("extra", dist.Normal(x, 1.0))

    def plain(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    with pytest.raises(ValueError, match="draws 'extra', which the model does not have"):
        log_weights(MetaModel(plain, stray, visible="x", hidden="z"), torch.zeros(5))


def test_evaluation_leaves_training_alone():
    """Batch-norm statistics, modes and the param store are as they were."""
    from pyroboost.models import VAE

    vae = VAE(6, 2, units=4)
    before = {n: t.clone() for n, t in vae.state_dict().items() if isinstance(t, torch.Tensor)}
    log_weights(vae, torch.zeros(8, 6), num_samples=3)
    for name, tensor in vae.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, before[name]), name
    assert vae.training
    assert not list(pyro.get_param_store().keys())


def test_the_error_of_each_datum_holds_what_all_data_share(monkeypatch):
    torch.manual_seed(0)
    vae = VAE(6, 2, units=8)
    x = torch.zeros(4, 6)
    for measure in (elbo, importance_bound, log_likelihood):
        torch.manual_seed(1)
        plain = measure(vae, x, num_samples=5)
        with monkeypatch.context() as patch:
            patch.setattr(VAE, "normalisation", lambda self: ("estimate", 0.3))
            torch.manual_seed(1)
            found = measure(vae, x, num_samples=5)
            patch.setattr(VAE, "normalisation", lambda self: ("estimate", float("inf")))
            doubted = measure(vae, x, num_samples=5)
        torch.testing.assert_close(found.std_error, (plain.std_error**2 + 0.09).sqrt())
        assert found.doubt is None
        assert doubted.doubt is not None
        assert "error unknown" in doubted.describe()
