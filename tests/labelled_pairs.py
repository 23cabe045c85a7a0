"""Tiny semi-supervised pairs over bits whose every probability is a sum or a quadrature."""

import math

import numpy as np
import torch
from enumerated import BitPair, all_bits, bernoulli

from pyroboost import Cascade
from pyroboost.models import M2

CLASSES = 3


def tiny(size=3, *, scale=1.5, **settings):
    """Return an M2 over bits with one latent dimension, and a guide that covers its posterior."""
    # Smooth networks, so that quadrature is exact in their derivatives too.
    own = {"units": 5, "activation": torch.nn.Tanh, "prior": [0.5, 0.2, 0.3], **settings}
    pair = M2(size, CLASSES, 1, **own).double()
    with torch.no_grad():
        for parameter in pair.model.parameters():
            parameter.mul_(scale)
        pair.model.fn.net.label.mul_(3)  # classes that differ
        last = pair.guide.fn.net.above.net[-1][-1]
        last.bias.copy_(torch.tensor([0.1, 0.6]))  # a scale near one
        last.weight[1] *= 0.3
    return pair


def nodes(count=80):
    """Return nodes and log weights of E[f(z)], z standard normal."""
    z, w = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(z), torch.tensor(w / w.sum()).log()


def scored(pair, x, y, z):
    """log m(x, y, z), from the networks alone.  # (N, K) for x (N, D), z (K,) or (N, K)"""
    logits = pair.model.fn.net(z[..., None], torch.full(z.shape, y))
    normal = -0.5 * (z.square() + math.log(2 * math.pi))
    return pair.model.fn.log_prior[y] + normal + bernoulli(x[:, None], logits)


def log_joint(pair, x):
    """log m(x, y) by quadrature.  # (N, C)"""
    z, log_w = nodes()
    base = -0.5 * (z.square() + math.log(2 * math.pi))
    found = [(scored(pair, x, y, z) - base + log_w).logsumexp(-1) for y in range(CLASSES)]
    return torch.stack(found, -1)


def inferred(pair, x, y):
    """Location and scale of q(z | x, y).  # (N, 1) each"""
    loc, raw = pair.guide.fn.net(x, torch.full((len(x),), y)).chunk(2, -1)
    return loc, torch.nn.functional.softplus(raw) + 1e-4


def bounds(pair, x, beta=1.0):
    """L(x, y) = E_q log m(x, y, z) / q(z | x, y) by quadrature.  # (N, C)"""
    u, log_w = nodes()
    found = []
    for y in range(CLASSES):
        loc, scale = inferred(pair, x, y)
        z = loc + scale * u
        log_q = -0.5 * (u.square() + math.log(2 * math.pi)) - scale.log()
        prior = -0.5 * (z.square() + math.log(2 * math.pi)) + pair.model.fn.log_prior[y]
        likelihood = scored(pair, x, y, z) - prior
        found.append(((likelihood + beta * (prior - log_q)) * log_w.exp()).sum(-1))
    return torch.stack(found, -1)


def log_q(pair, x):
    """log q(y | x).  # (N, C)"""
    return pair.guide.fn.classify(x).log_softmax(-1)


def unlabelled(pair, x, beta=1.0):
    """The bound on log m(x) with the class summed out.  # (N,)"""
    q = log_q(pair, x)
    return (q.exp() * (bounds(pair, x, beta) - beta * q)).sum(-1)


def tower(**settings):
    """Return a cascade of a bit pair below and a tiny M2 on top."""
    below, top = BitPair(4, 3, scale=2.0).double(), tiny(3, scale=3.0, **settings)
    return Cascade(below, top, args=[(), (0,)])


def tower_joint(cascade, x):
    """log p(x, y) of a tower by summing over h.  # (N, C)"""
    h = all_bits(3).double()
    given = bernoulli(x[:, None], cascade[0].m.logits(h))  # (N, H)
    return (given[..., None] + log_joint(cascade[1], h)).logsumexp(1)


def encoded(cascade, x):
    """q(h | x) of every h.  # (N, H)"""
    return cascade[0].q.log_q(x, all_bits(3).double()).exp()
