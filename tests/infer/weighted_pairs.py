"""Small pairs whose importance-weighted bounds can be written out, and their quadrature."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyroboost.metamodel import MetaModel


def normal(value, loc, scale):
    """Log density of a normal, by hand."""
    scale = torch.as_tensor(scale, dtype=torch.float64)
    return -0.5 * (((value - loc) / scale) ** 2 + math.log(2 * math.pi)) - scale.log()


def nodes(count):
    """Points and log weights of E over a standard normal."""
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(points), torch.tensor(weights / weights.sum()).log()


class Values(nn.Module):
    """Parameters of model and guide under one roof, so that they can be shared."""

    def __init__(self, **values):
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))


class Program(nn.Module):
    def __init__(self, values, run):
        super().__init__()
        self.values, self.run = values, run

    def forward(self, x):
        self.run(self.values, x)


def pair(values, model, guide, hidden="z"):
    return MetaModel(Program(values, model), Program(values, guide), visible="x", hidden=hidden)


# One latent: z ~ N(0, 1), x ~ N(a z, s), q = N(c x + d, e)


def one_model(v, x):
    with pyro.plate("data", x.shape[-1]):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(v.a * z, v.s.exp()), obs=x)


def one_guide(v, x):
    with pyro.plate("data", x.shape[-1]):
        pyro.sample("z", dist.Normal(v.c * x + v.d, v.e.exp()))


def one_values():
    return Values(a=0.8, s=-0.3, c=0.3, d=0.2, e=-0.2)


def one_pair():
    return pair(one_values(), one_model, one_guide)


def one_log_weight(v, x, noise, beta, q):
    """log w at z = mean + scale * noise; ``q`` holds the parameters that log q is scored with."""
    z = v.c * x + v.d + v.e.exp() * noise
    prior, law = normal(z, 0.0, 1.0), normal(z, q.c * x + q.d, q.e.exp())
    return normal(x, v.a * z, v.s.exp()) + beta * (prior - law)


# Two latents: z2 ~ N(0, 1), z1 ~ N(t z2, .7), x ~ N(z1, s); the guide uses t as well


def two_model(v, x):
    with pyro.plate("data", x.shape[-1]):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros_like(x), 1.0))
        z1 = pyro.sample("z1", dist.Normal(v.t * z2, 0.7))
        pyro.sample("x", dist.Normal(z1, v.s.exp()), obs=x)


def two_guide(v, x):
    with pyro.plate("data", x.shape[-1]):
        z2 = pyro.sample("z2", dist.Normal(v.c * x, v.e.exp()))
        pyro.sample("z1", dist.Normal(0.5 * x + 0.5 * v.t * z2, (v.f * (1 + 0.1 * z2)).exp()))


def two_values():
    return Values(t=0.6, s=-0.2, c=0.3, e=-0.3, f=-0.6)


def two_pair():
    return pair(two_values(), two_model, two_guide, hidden="z2")


def two_log_weight(v, x, noise, beta, q):
    n2, n1 = noise
    z2 = v.c * x + v.e.exp() * n2
    z1 = 0.5 * x + 0.5 * v.t * z2 + (v.f * (1 + 0.1 * z2)).exp() * n1
    law = normal(z2, q.c * x, q.e.exp())
    law = law + normal(z1, 0.5 * x + 0.5 * q.t * z2, (q.f * (1 + 0.1 * z2)).exp())
    prior = normal(z2, 0.0, 1.0) + normal(z1, v.t * z2, 0.7)
    return normal(x, z1, v.s.exp()) + beta * (prior - law)


# A coin and a normal that hangs on it: one site with a score, one with a path


def coin_model(v, x):
    with pyro.plate("data", x.shape[-1]):
        c = pyro.sample("c", dist.Bernoulli(logits=torch.zeros_like(x)))
        z = pyro.sample("z", dist.Normal(v.a * c, 1.0))
        pyro.sample("x", dist.Normal(z, v.s.exp()), obs=x)


def coin_guide(v, x):
    with pyro.plate("data", x.shape[-1]):
        c = pyro.sample("c", dist.Bernoulli(logits=v.g * x))
        pyro.sample("z", dist.Normal(0.5 * x + v.d * c, v.e.exp()))


def coin_pair():
    return pair(Values(a=1.2, s=-0.3, g=0.7, d=0.3, e=-0.4), coin_model, coin_guide)


def detached(values):
    """The same parameters as constants."""
    constants = Values(**{name: p.item() for name, p in values.named_parameters()})
    return constants.requires_grad_(False)


def bound(values, x, num_particles, log_weight, *, beta=1.0, sticking=False, dims=1, points=40):
    r"""E log (1/K) sum w_k of one datum by Gauss-Hermite quadrature over all K draws.

    With ``sticking`` log q is scored with constants, so that autograd leaves its part out.
    """
    q = detached(values) if sticking else values
    points, logs = nodes(points)
    grids = torch.meshgrid(*[points] * dims, indexing="ij")
    mass = sum(torch.meshgrid(*[logs] * dims, indexing="ij")).reshape(-1)
    noise = [g.reshape(-1) for g in grids]
    table = log_weight(values, x, noise[0] if dims == 1 else noise, beta, q)
    return mixed(table, mass, num_particles)


def mixed(table, mass, num_particles):
    """E log (1/K) sum w_k over K independent rows of a table with these log probabilities."""
    total, logs = 0.0, []
    rows = [
        table.reshape([-1 if i == k else 1 for i in range(num_particles)])
        for k in range(num_particles)
    ]
    masses = [
        mass.reshape([-1 if i == k else 1 for i in range(num_particles)])
        for k in range(num_particles)
    ]
    logs = torch.logsumexp(torch.stack(torch.broadcast_tensors(*rows)), 0)
    total = (sum(masses).exp() * (logs - math.log(num_particles))).sum()
    return total


def coin_bound(values, x, num_particles, points=30):
    """The same for the coin, by enumeration and quadrature."""
    v = values
    noise, logs = nodes(points)
    tables, masses = [], []
    for c in (0.0, 1.0):
        z = 0.5 * x + v.d * c + v.e.exp() * noise
        log_c = nn.functional.logsigmoid(v.g * x if c else -v.g * x)
        joint = math.log(0.5) + normal(z, v.a * c, 1.0) + normal(x, z, v.s.exp())
        tables.append(joint - log_c - normal(z, 0.5 * x + v.d * c, v.e.exp()))
        masses.append(log_c + logs)
    return mixed(torch.cat(tables), torch.cat(masses), num_particles)


def slopes(value, values):
    """Gradient of a bound by the name of the parameter; zero where it does not depend on it."""
    names, tensors = zip(*values.named_parameters(), strict=True)
    found = torch.autograd.grad(value, tensors, allow_unused=True)
    return {
        n: torch.zeros(()) if g is None else g.detach() for n, g in zip(names, found, strict=True)
    }


def bit_bound(pair, x, num_particles, beta=1.0):
    """The K-sample bound of each datum of a pair of bits, by enumeration of all K draws."""
    from enumerated import all_bits, bernoulli

    h = all_bits(pair.sizes[1])
    log_q = pair.q.log_q(x, h)
    prior = bernoulli(h, pair.m.prior)
    log_x = pair.m.log_joint(x, h) - prior
    table = log_x + beta * (prior - log_q)
    total = 0.0
    for rows in itertools.product(range(len(h)), repeat=num_particles):
        chosen = list(rows)
        mass = log_q[:, chosen].sum(-1).exp()
        mean = table[:, chosen].logsumexp(-1) - math.log(num_particles)
        total = total + mass * mean
    return total
