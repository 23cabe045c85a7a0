"""The VAE against linear-Gaussian algebra and hand-written sums."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyroboost.evaluation import log_likelihood, log_weights
from pyroboost.models import VAE


class Affine(nn.Module):
    """A decoder or encoder with a linear location and a constant raw scale."""

    def __init__(self, weight, bias, raw):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.raw = nn.Parameter(torch.tensor(raw))

    def forward(self, value):
        loc = value @ self.weight.T + self.bias
        return loc, self.raw.expand_as(loc)


def test_linear_gaussian_vae_has_the_closed_form_likelihood():
    """x = W z + b + s e: log p(x) is a normal's, and importance sampling finds it."""
    weight, bias, raw = torch.randn(3, 2), torch.randn(3), 0.3
    scale = nn.functional.softplus(torch.tensor(raw)) + 1e-4
    covariance = weight @ weight.T + scale**2 * torch.eye(3)
    x = torch.randn(6, 3)
    exact = dist.MultivariateNormal(bias, covariance).log_prob(x)
    gain = weight.T @ covariance.inverse()
    vae = VAE(
        3,
        2,
        likelihood="gaussian",
        decoder=Affine(weight, bias, raw),
        encoder=Affine(gain, -gain @ bias, 0.5),
    )
    found = log_likelihood(vae, x, num_samples=20_000)
    assert ((found.value - exact).abs() < 4 * found.std_error).all()
    assert found.std_error.max() < 0.05


def test_bernoulli_weights_are_the_hand_written_ones():
    """log m(x, z) - log q(z | x) with cross-entropies from logits."""
    vae = VAE(5, 2, units=7).eval()
    x = (torch.rand(4, 5) < 0.5).float()
    pyro.set_rng_seed(1)
    z = vae.encode(x)
    values = {"z": z}
    with torch.no_grad():
        logits = vae.model.fn.net(z)
        loc, raw = vae.guide.fn.net(x).chunk(2, -1)
    scale = nn.functional.softplus(raw) + 1e-4
    by_hand = (
        -nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
        + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        - dist.Normal(loc, scale).log_prob(z).sum(-1)
    )
    trace = pyro.poutine.trace(pyro.poutine.condition(vae.model, values)).get_trace(x)
    guide = pyro.poutine.trace(pyro.poutine.condition(vae.guide, values)).get_trace(x)
    trace.compute_log_prob()
    guide.compute_log_prob()
    found = sum(trace.nodes[n]["log_prob"] for n in "xz") - guide.nodes["z"]["log_prob"]
    torch.testing.assert_close(found.detach(), by_hand, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(vae.log_prior(z).value, dist.Normal(0.0, 1.0).log_prob(z).sum(-1))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("shape", [6, (6,), (1, 2, 3)])
def test_shapes(likelihood, shape):
    vae = VAE(shape, 2, units=8, likelihood=likelihood)
    full = (6,) if shape == 6 else shape
    x = torch.zeros(5, *full)
    assert vae.encode(x).shape == (5, 2)
    assert vae.decode(torch.zeros(5, 2)).shape == x.shape
    assert vae.sample(3).shape == (3, *full)
    assert log_weights(vae, x, num_samples=2).shape == (2, 5)


def test_leading_dimensions_are_folded():
    """A stack of data gives the numbers of its parts, also where N equals D and in training."""
    vae = VAE(4, 2, units=8).eval()
    stack = (torch.rand(3, 4, 4) < 0.5).float()
    together = vae.guide.fn.net(stack)
    for part, whole in zip(stack, together, strict=True):
        torch.testing.assert_close(vae.guide.fn.net(part), whole)
    vae.train()
    flat = copy.deepcopy(vae)
    torch.testing.assert_close(
        vae.guide.fn.net(stack).reshape(12, 4), flat.guide.fn.net(stack.reshape(12, 4))
    )


def test_trains_by_plain_svi_and_by_torch():
    x = (torch.rand(64, 6) < 0.2).float()
    by_svi, by_torch = VAE(6, 2, units=16), VAE(6, 2, units=16)
    svi = SVI(by_svi.model, by_svi.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = {n: p.clone() for n, p in by_svi.named_parameters()}
    losses = [svi.step(x) for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert all(not torch.equal(p, before[n]) for n, p in by_svi.named_parameters())
    loss = Trace_ELBO()(by_torch.model, by_torch.guide)
    assert len(list(loss.parameters())) == len(list(by_torch.parameters()))
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    values = []
    for _ in range(200):
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert sum(values[-20:]) < sum(values[:20])


def test_refusals():
    vae = VAE(6, 2, units=8)
    with pytest.raises(ValueError, match="holds values other than 0 and 1"):
        vae.model(torch.full((3, 6), 0.5))
    with pytest.raises(ValueError, match="holds values other than 0 and 1"):
        vae.model(torch.full((3, 6), torch.nan))
    with pytest.raises(ValueError, match=r"data of shape \(3, 5\) came for 'x'; it takes \(N, 6\)"):
        vae.model(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="must be 'bernoulli' or 'gaussian'"):
        VAE(6, 2, likelihood="poisson")


def test_copy_and_dtype_keep_the_density():
    vae = VAE(6, 2, units=8).eval()
    x = (torch.rand(5, 6) < 0.5).float()
    other = copy.deepcopy(vae)
    for model, data in ((other, x), (copy.deepcopy(vae).double(), x.double())):
        pyro.set_rng_seed(2)
        z = torch.randn(5, 2).to(data)
        with torch.no_grad():
            torch.testing.assert_close(
                model.model.fn.net(z).float(), vae.model.fn.net(z.float()), atol=1e-5, rtol=1e-5
            )
        assert log_weights(model, data).dtype == data.dtype
