"""One small Gaussian pair in every make in which Pyro users write pairs."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyroboost.metamodel import MetaModel


def data_plate(x):
    """Open the plate over data, which are counted from the right to leave particles alone."""
    return pyro.plate("data", x.shape[-2])


def standard(size, like):
    return dist.Normal(like.new_zeros(size), like.new_ones(size)).to_event(1)


# Plain modules


class NormalModel(nn.Module):
    def __init__(self, visible, hidden):
        super().__init__()
        self.net = nn.Linear(hidden, visible)
        self.hidden = hidden

    def forward(self, x):
        with data_plate(x):
            z = pyro.sample("z", standard(self.hidden, x))
            pyro.sample("x", dist.Normal(self.net(z), 0.8).to_event(1), obs=x)


class NormalGuide(nn.Module):
    def __init__(self, visible, hidden):
        super().__init__()
        self.net = nn.Linear(visible, hidden)
        self.log_scale = nn.Parameter(torch.full((hidden,), -0.5))

    def forward(self, x):
        with data_plate(x):
            law = dist.Normal(self.net(x), self.log_scale.exp()).to_event(1)
            pyro.sample("z", law)


def modules(visible, hidden, tag="a"):
    return MetaModel(
        NormalModel(visible, hidden), NormalGuide(visible, hidden), visible="x", hidden="z"
    )


# Functions with pyro.param: their names are the only thing that keeps them apart


def functions(visible, hidden, tag="a"):
    start = torch.randn(hidden, visible), torch.randn(visible, hidden)

    def model(x):
        weight = pyro.param(f"{tag}_decoder", lambda: start[0].to(x))
        noise = pyro.param(f"{tag}_noise", x.new_tensor(0.8), constraint=constraints.positive)
        with data_plate(x):
            z = pyro.sample("z", standard(hidden, x))
            pyro.sample("x", dist.Normal(z @ weight, noise).to_event(1), obs=x)

    def guide(x):
        weight = pyro.param(f"{tag}_encoder", lambda: start[1].to(x))
        scale = pyro.param(
            f"{tag}_scale", x.new_full((hidden,), 0.5), constraint=constraints.positive
        )
        with data_plate(x):
            pyro.sample("z", dist.Normal(x @ weight, scale).to_event(1))

    return MetaModel(model, guide, visible="x", hidden="z")


# Functions with pyro.module over networks that they enclose


def closures(visible, hidden, tag="a"):
    decoder, encoder = nn.Linear(hidden, visible), nn.Linear(visible, hidden)

    def model(x):
        pyro.module("decoder", decoder)
        with data_plate(x):
            z = pyro.sample("z", standard(hidden, x))
            pyro.sample("x", dist.Normal(decoder(z), 0.8).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with data_plate(x):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    return MetaModel(model, guide, visible="x", hidden="z")


# Pyro's example class: networks and methods in one module


class VAE(nn.Module):
    def __init__(self, visible, hidden):
        super().__init__()
        self.encoder = nn.Linear(visible, hidden)
        self.decoder = nn.Linear(hidden, visible)
        self.z_dim = hidden

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[-2]):
            z_loc = x.new_zeros(torch.Size((x.shape[-2], self.z_dim)))
            z_scale = x.new_ones(torch.Size((x.shape[-2], self.z_dim)))
            z = pyro.sample("z", dist.Normal(z_loc, z_scale).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.8).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[-2]):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))


def methods(visible, hidden, tag="a"):
    vae = VAE(visible, hidden)
    return MetaModel(vae.model, vae.guide, visible="x", hidden="z")


# PyroModules, whose attributes are called the same in every stage


class PyroNormalModel(PyroModule):
    def __init__(self, visible, hidden):
        super().__init__()
        self.net = nn.Linear(hidden, visible)
        self.noise = PyroParam(torch.tensor(0.8), constraint=constraints.positive)
        self.shift = nn.Parameter(torch.zeros(visible))
        self.hidden = hidden

    def forward(self, x):
        with data_plate(x):
            z = pyro.sample("z", standard(self.hidden, x))
            law = dist.Normal(self.net(z) + self.shift, self.noise).to_event(1)
            pyro.sample("x", law, obs=x)


class PyroNormalGuide(PyroModule):
    def __init__(self, visible, hidden):
        super().__init__()
        self.net = PyroModule[nn.Linear](visible, hidden)
        self.spread = PyroParam(torch.full((hidden,), 0.5), constraint=constraints.positive)

    def forward(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(self.net(x), self.spread).to_event(1))


def pyro_modules(visible, hidden, tag="a"):
    return MetaModel(
        PyroNormalModel(visible, hidden), PyroNormalGuide(visible, hidden), visible="x", hidden="z"
    )


MAKES = {
    "modules": modules,
    "functions": functions,
    "closures": closures,
    "methods": methods,
    "pyro_modules": pyro_modules,
}


def log_joint(pair, x):
    """Draw h and return log m(x, h) - log q(h | x) of a pair, as Pyro traces it."""
    guide = pyro.poutine.trace(pair.guide).get_trace(x)
    model = pyro.poutine.trace(pyro.poutine.replay(pair.model, trace=guide)).get_trace(x)
    return model.log_prob_sum() - guide.log_prob_sum()


def seeded_log_joint(pair, x, seed=7):
    """Return ``log_joint`` under a seed, so that equal pairs give equal numbers."""
    torch.manual_seed(seed)
    return log_joint(pair, x).item()


def trained(pair, *batch):
    """Return clones of everything that training moves."""
    return {name: t.detach().clone() for name, t in pair.named_trainable(*batch).items()}


def train(pair, *batch, steps=2, lr=0.05):
    """Train by plain SVI."""
    svi = pyro.infer.SVI(
        pair.model, pair.guide, pyro.optim.Adam({"lr": lr}), pyro.infer.Trace_ELBO()
    )
    return [svi.step(*batch) for _ in range(steps)]
