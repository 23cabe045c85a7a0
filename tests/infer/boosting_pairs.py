"""Small pairs that the tests of boosting share."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyroboost import flows
from pyroboost.distributions import Components
from pyroboost.flows.elementwise import Affine
from pyroboost.metamodel import MetaModel


def standard(dim, batch=()):
    return dist.Normal(torch.zeros(*batch, dim), 1.0).to_event(1)


class Posterior(nn.Module):
    """q(z) over one vector: a guide for whole data."""

    def __init__(self, count=3, dim=2, flow=None, site="z"):
        super().__init__()
        self.site, self.dim = site, dim
        self.components = Components(flow or (lambda: flows.affine(dim, spread=0.5)), count)

    def forward(self, *_):
        return pyro.sample(self.site, self.components(standard(self.dim)))


class Placed(Posterior):
    """A guide that starts new components at given places."""

    def __init__(self, places, **settings):
        super().__init__(**settings)
        self.places = places

    def propose(self, c, *args):
        self.components.restart(c)
        place(self.components.flows[c], self.places[c])


def place(flow, centre, scale=1.0):
    """Make an affine flow z = centre + scale * z0."""
    with torch.no_grad():
        centre = torch.as_tensor(centre)
        values = torch.cat([centre, torch.full_like(centre, scale).log()])
        flow.steps[0].coefficients.bias.copy_(values)


class Drifting(Affine):
    """An affine step with a buffer that moves whenever it is used in training mode."""

    def __init__(self, dim):
        super().__init__(dim, spread=0.1)
        self.register_buffer("uses", torch.zeros(()))

    def _map(self, x, numbers, inverse):
        if self.training:
            self.uses += 1
        return super()._map(x, numbers, inverse)


class Decoder(nn.Module):
    """x ~ N(W z + b, s): the marginal of x is normal."""

    def __init__(self, latent=2, width=3):
        super().__init__()
        self.net = nn.Linear(latent, width)
        self.log_scale = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard(self.net.in_features))
            law = dist.Normal(self.net(z), self.log_scale.exp()).to_event(1)
            pyro.sample("x", law, obs=x)

    def log_marginal(self, x):
        """Return the exact log p(x)."""
        w = self.net.weight
        cov = w @ w.T + torch.diag((2 * self.log_scale).exp())
        return torch.distributions.MultivariateNormal(self.net.bias, cov).log_prob(x)


class Encoder(nn.Module):
    """q(z | x) with a normal base."""

    def __init__(self, latent=2, width=3, count=2, flow=None):
        super().__init__()
        self.net = nn.Linear(width, 2 * latent)
        self.components = Components(flow or (lambda: flows.realnvp(latent, 1, units=8)), count)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            m, s = self.net(x).chunk(2, -1)
            pyro.sample("z", self.components(dist.Normal(m, s.exp()).to_event(1)))


def vae(count=2, **settings):
    return MetaModel(Decoder(), Encoder(count=count, **settings), visible="x", hidden="z")


def rows(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.3, -0.8]])
    return torch.randn(count, 2, generator=g) @ w.T + 0.5 * torch.randn(count, 3, generator=g)
