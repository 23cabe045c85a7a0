"""Pairs whose posterior, evidence and leave-one-out densities are known in closed form."""

import math

import pyro
import pyro.distributions as dist
import torch

from pyroboost import MetaModel


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(width=1.0, shift=0.0):
    """The posterior N(x / 2, 1 / 2) with its standard deviation multiplied, its mean moved."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, width * math.sqrt(0.5)))

    return guide


def local_pair(width=1.0, shift=0.0):
    return MetaModel(local_model, local_guide(width, shift), visible="x", hidden="z")


def local_evidence(x):
    return dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)


def shared_model(x):
    mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=x.dtype), 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def shared_posterior(x):
    variance = 1 / (len(x) + 0.01)
    return variance * x.sum(), math.sqrt(variance)


def shared_guide(width=1.0):
    def guide(x):
        loc, scale = shared_posterior(x)
        pyro.sample("mean", dist.Normal(loc, width * scale))

    return guide


def shared_evidence(x):
    cov = torch.eye(len(x), dtype=x.dtype) + 100.0
    return dist.MultivariateNormal(torch.zeros_like(x), cov).log_prob(x)


def shared_elpd(x):
    """The sum of log p(x_n | the others)."""
    total = x.new_zeros(())
    for n in range(len(x)):
        loc, scale = shared_posterior(torch.cat([x[:n], x[n + 1 :]]))
        total = total + dist.Normal(loc, math.sqrt(1 + scale**2)).log_prob(x[n])
    return total
