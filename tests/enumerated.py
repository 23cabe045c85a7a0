"""Tiny models of bits whose every probability can be written out."""

import itertools

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyroboost.metamodel import MetaModel


def all_bits(size):
    """Return every vector of bits.  # (2^size, size)"""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)))


def bernoulli(bits, logits):
    """Log probability of bits, summed over the last dimension, written out by hand."""
    return (bits * logits - torch.nn.functional.softplus(logits)).sum(-1)


class BitModel(nn.Module):
    def __init__(self, visible, hidden, scale=1.0):
        super().__init__()
        self.prior = nn.Parameter(scale * torch.randn(hidden))
        self.weight = nn.Parameter(scale * torch.randn(hidden, visible))
        self.bias = nn.Parameter(scale * torch.randn(visible))

    def logits(self, h):
        return h @ self.weight + self.bias

    def forward(self, x):
        with pyro.plate("data", x.shape[-2]):
            h = pyro.sample("h", dist.Bernoulli(logits=self.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.logits(h)).to_event(1), obs=x)

    def log_joint(self, x, h):
        """log m(x, h) for all rows of x against all rows of h.  # (X, H)"""
        return bernoulli(h, self.prior) + bernoulli(x[:, None], self.logits(h))


class BitGuide(nn.Module):
    def __init__(self, visible, hidden, scale=1.0):
        super().__init__()
        self.net = nn.Linear(visible, hidden)
        with torch.no_grad():
            self.net.weight.mul_(scale)

    def forward(self, x):
        with pyro.plate("data", x.shape[-2]):
            pyro.sample("h", dist.Bernoulli(logits=self.net(x)).to_event(1))

    def log_q(self, x, h):
        """log q(h | x) for all rows of x against all rows of h.  # (X, H)"""
        return bernoulli(h, self.net(x)[:, None])


class BitPair(MetaModel):
    """A sigmoid belief network of one layer with a factorised guide."""

    def __init__(self, visible, hidden, scale=1.0):
        super().__init__(
            BitModel(visible, hidden, scale),
            BitGuide(visible, hidden, scale),
            visible="x",
            hidden="h",
        )
        self.sizes = visible, hidden

    @property
    def m(self):
        return self.model.fn

    @property
    def q(self):
        return self.guide.fn

    def exact(self, x):
        """log m(x) by summing over h."""
        return self.m.log_joint(x, all_bits(self.sizes[1])).logsumexp(-1)


def cascade_exact(pairs, x):
    """log p(x) of a cascade of bit pairs by summing over every hidden variable."""
    log_p = pairs[-1].exact(all_bits(pairs[-1].sizes[0]))  # log m_k(h_{k-1})
    for pair in reversed(pairs[:-1]):
        h = all_bits(pair.sizes[1])
        values = all_bits(pair.sizes[0])
        conditional = bernoulli(values[:, None], pair.m.logits(h))
        log_p = (conditional + log_p).logsumexp(-1)
    index = (x * 2.0 ** torch.arange(x.shape[-1] - 1, -1, -1)).sum(-1).long()
    return log_p[index]


def cascade_elbo(pairs, x):
    """The composed pair's ELBO by summing over every hidden variable."""
    return sum(cascade_terms(pairs, x))


def cascade_terms(pairs, x):
    """L_1, ..., L_k per datum, each stage's own ELBO in place of its likelihood, summed out."""
    terms = []
    law = torch.eye(2 ** x.shape[-1])[
        (x * 2.0 ** torch.arange(x.shape[-1] - 1, -1, -1)).sum(-1).long()
    ]  # (N, values of h_{i-1}): where each datum is after i - 1 stages
    below = None
    for pair in pairs:
        values, h = all_bits(pair.sizes[0]), all_bits(pair.sizes[1])
        log_q = pair.q.log_q(values, h)
        own = (log_q.exp() * (pair.m.log_joint(values, h) - log_q)).sum(-1)
        terms.append(law @ (own if below is None else own - below))
        law = law @ log_q.exp()
        below = bernoulli(h, pair.m.prior)
    return terms
