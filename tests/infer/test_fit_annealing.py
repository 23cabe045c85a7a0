"""The gradient of the annealed bound against formulas written by hand."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyroboost.infer import fit
from pyroboost.metamodel import MetaModel

STEP = partial(torch.optim.SGD, lr=1.0)


class Values(pyro.poutine.messenger.Messenger):
    """Keep the last value of a site."""

    def _pyro_post_sample(self, msg):
        if msg["name"] == "z":
            self.value = msg["value"].detach()


def gaussian_pair():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        mu, s = pyro.param("mu", torch.tensor(0.3)), pyro.param("s", torch.tensor(0.6))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mu, s))

    return MetaModel(model, guide, visible="x", hidden="z")


@pytest.mark.parametrize("beta", [0.2, 1.0, 1.7])
def test_pathwise_gradient(beta):
    r"""With z = mu + s e the step is the mean of (x - z) - beta z, and that times e + beta / s."""
    x = torch.linspace(-1.0, 2.0, 40)
    pair = gaussian_pair()
    with Values() as last:
        fit(pair, x, epochs=1, batch_size=40, optimizer=STEP, annealing=lambda _: beta, seed=1)
    z = last.value
    # The batch is shuffled: only sums over pairs (x, e) that the order leaves alone are compared.
    slope = x.mean() - (1 + beta) * z.mean()
    assert torch.allclose(pyro.param("mu"), 0.3 + slope, atol=1e-5)


def test_pathwise_gradient_of_the_scale():
    """With all x equal the order does not matter: ds = mean((x - z) e - beta z e) + beta / s."""
    beta, x = 0.4, torch.full((60,), 1.3)
    pair = gaussian_pair()
    with Values() as last:
        fit(pair, x, epochs=1, batch_size=60, optimizer=STEP, annealing=lambda _: beta)
    z = last.value
    e = (z - 0.3) / 0.6
    slope = ((x - z) * e - beta * z * e).mean() + beta / 0.6
    assert torch.allclose(pyro.param("s"), 0.6 + slope, atol=1e-5)


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_score_function_gradient_by_enumeration(beta):
    r"""A binary z: the step is E_q[d log q (log m(x|z) + beta (log m(z) - log q(z)))]."""
    count, a0, b0 = 20_000, 0.4, -0.7
    x = torch.tensor(0.5)
    locs = torch.tensor([-1.0, 1.5])

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(a0))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=self.a.expand(len(x))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = nn.Parameter(torch.tensor(b0))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(logits=self.b.expand(len(x))))
                pyro.sample("x", dist.Normal(locs[z.long()], 1.0), obs=x)

    pair = MetaModel(Model(), Guide(), visible="x", hidden="z")
    fit(pair, x.expand(count), epochs=1, batch_size=count, optimizer=STEP, annealing=lambda _: beta)

    z = torch.tensor([0.0, 1.0])
    q = dist.Bernoulli(logits=torch.tensor(a0))
    weight = dist.Normal(locs, 1.0).log_prob(x) + beta * (
        dist.Bernoulli(logits=torch.tensor(b0)).log_prob(z) - q.log_prob(z)
    )
    score = z - q.mean
    mean = (q.log_prob(z).exp() * score * weight).sum()
    spread = (q.log_prob(z).exp() * (score * weight - mean) ** 2).sum().sqrt()
    moved = pair.guide.fn.a.detach() - a0
    assert abs(moved - mean) < 4 * spread / math.sqrt(count)
    prior = beta * (q.mean - torch.sigmoid(torch.tensor(b0)))
    error = beta * (q.mean * (1 - q.mean) / count).sqrt()
    assert abs(pair.model.fn.b.detach() - b0 - prior) < 4 * error


def test_linear_warm_up_moves_with_each_batch():
    betas = []

    def loss(model, guide, x):
        trace = pyro.poutine.trace(model).get_trace(x)
        betas.append(trace.nodes["z"]["scale"])
        return trace.log_prob_sum() * 0.0 + pyro.param("mu") * 0.0

    fit(gaussian_pair(), torch.zeros(20), epochs=3, batch_size=5, loss=loss, annealing=2)
    assert betas == pytest.approx([k / 8 for k in range(1, 9)] + [1.0] * 4)


def test_an_iterable_without_a_length_moves_once_an_epoch():
    class Unsized:
        def __iter__(self):
            return iter(torch.zeros(20).split(5))

    seen = []
    result = fit(gaussian_pair(), Unsized(), epochs=3, annealing=lambda p: seen.append(p) or p / 2)
    assert sorted(set(seen)) == [1.0, 2.0, 3.0]
    assert [row["beta"] for row in result.history] == [0.5, 1.0, 1.5]


def test_held_out_bound_is_taken_at_beta_one():
    """With lr 0 the annealed fit and the plain one have the same held-out bound."""
    x = torch.linspace(-1.0, 2.0, 40)
    frozen = partial(torch.optim.SGD, lr=0.0)
    words = {"validation": x, "epochs": 1, "optimizer": frozen}
    plain = fit(gaussian_pair(), x, **words).history[0]["validation_bound"]
    annealed = fit(gaussian_pair(), x, annealing=10, **words).history[0]["validation_bound"]
    assert plain == annealed
