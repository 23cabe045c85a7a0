"""One table of flows, for the laws that hold for every one of them."""

import torch
from torch.func import jacrev, vmap

from pyroboost import flows
from pyroboost.flows import Flow, Permutation


def repeated(factory):
    def build(dim, depth, **kwargs):
        return Flow([factory(dim, **kwargs) for _ in range(depth)])

    return build


def permuted(dim, depth, **kwargs):
    order = [*range(1, dim), 0]
    parts = [part for _ in range(depth) for part in (flows.affine(dim, **kwargs), order)]
    return Flow([p if isinstance(p, Flow) else Permutation(p) for p in parts])


def rotated(dim, depth, **kwargs):
    return flows.householder(dim, depth, **kwargs)


BUILD = {
    "affine": repeated(flows.affine),
    "lower": repeated(flows.lower),
    "lu": repeated(flows.lu),
    "householder": rotated,
    "permutation": permuted,
    "nice": flows.nice,
    "realnvp": flows.realnvp,
    "spline": flows.spline,
    "nlsq": flows.nlsq,
}
COUPLED = {"nice", "realnvp", "householder"}  # these need two coordinates


def make(name, dim, depth, *, context=0, spread=0.4, seed=0):
    torch.manual_seed(seed)
    return BUILD[name](dim, depth, context=context, spread=spread).double()


def points(count, dim, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(count, dim, dtype=torch.float64, generator=generator)


def log_det_by_autograd(function, x):
    """Return log |det| of the Jacobian at each row of x."""
    return torch.linalg.slogdet(vmap(jacrev(function))(x))[1]


def normal(z):
    """Log density of the standard normal, by hand."""
    return -0.5 * (z**2 + torch.log(torch.tensor(2 * torch.pi))).sum(-1)


def log_density(flow, x, context=None):
    z0, log_det = flow.inverse(x, context)
    return normal(z0) + log_det


def train(flow, steps=5, context=None):
    """Move every parameter by a few steps of maximum likelihood, and return the losses."""
    x = points(64, flow.dim, seed=2) + 0.5
    context = context if context is None else context[:1].expand(64, -1)
    parameters, losses = list(flow.parameters()), []
    for _ in range(steps):
        loss = -log_density(flow, x, context).mean()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(loss, parameters), strict=True
            ):
                parameter -= 0.003 * gradient.sign()
    return losses
