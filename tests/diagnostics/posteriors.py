"""Posteriors known in closed form, and guides that are wrong by a known amount."""

import math

import pyro
import pyro.distributions as dist
import torch

SD = math.sqrt(0.5)  # posterior standard deviation of one datum


def model(x):
    """Two unknowns with one datum each: the posterior of z is N(x / 2, 1 / 2)."""
    z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def guide(width=1.0, shift=0.0):
    def run(x):
        pyro.sample("z", dist.Normal(x / 2 + shift, width * SD).to_event(1))

    return run


def evidence(x):
    return float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).sum())


def kl(width, shift=0.0, size=2):
    """KL(q || p) of the guide, summed over coordinates."""
    return size * ((width**2 + (shift / SD) ** 2 - 1) / 2 - math.log(width))


def reverse_kl(width, shift=0.0, size=2):
    """KL(p || q)."""
    return size * ((1 + (shift / SD) ** 2) / (2 * width**2) - 0.5 + math.log(width))


def exact(x, count=2000, chains=None):
    lead = (count,) if chains is None else (chains, count)
    return {"z": x / 2 + SD * torch.randn(*lead, len(x), dtype=x.dtype)}


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(width=1.0, shift=0.0):
    def run(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, width * SD))

    return run


def two_modes():
    """An energy with two modes of equal mass, log Z = 0, twelve deviations apart."""
    law = dist.Normal(torch.tensor([-6.0, 6.0]), 1.0)
    half = dist.Categorical(torch.tensor([0.5, 0.5]))
    pyro.sample("z", dist.MixtureSameFamily(half, law))


def one_mode():
    pyro.sample("z", dist.Normal(6.0, 1.0))


def two_mode_draws(count):
    sign = (torch.rand(count) < 0.5).float() * 2 - 1
    return {"z": 6.0 * sign + torch.randn(count)}
