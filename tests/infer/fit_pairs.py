"""Small pairs that the tests of the training loop share."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyroboost.metamodel import MetaModel


def normal_model(x):
    """z ~ N(m, 1), x ~ N(z, 1): log p(x) is log N(x; m, 2)."""
    m = pyro.param("m", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_guide(x):
    a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor(0.0))
    s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(a * x + b, s))


def normal_pair():
    return MetaModel(normal_model, normal_guide, visible="x", hidden="z")


class Decoder(nn.Module):
    def __init__(self, visible, hidden, width):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(hidden, width),
            nn.BatchNorm1d(width),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Linear(width, visible),
        )
        self.hidden = hidden

    def forward(self, x):
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(len(x), self.hidden), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


class Encoder(nn.Module):
    def __init__(self, visible, hidden, width):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(visible, width),
            nn.BatchNorm1d(width),
            nn.Tanh(),
            nn.Linear(width, 2 * hidden),
        )

    def forward(self, x):
        loc, log_scale = self.net(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def vae_pair(visible=8, hidden=2, width=6):
    model, guide = Decoder(visible, hidden, width), Encoder(visible, hidden, width)
    return MetaModel(model, guide, visible="x", hidden="z")


class Chained(nn.Module):
    """A model with a persistent chain: a buffer that moves once per gradient-enabled run."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.register_buffer("chain", torch.zeros(3))

    def forward(self, x):
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.chain.copy_(0.9 * self.chain + torch.randn(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            loc = (self.w * (1.0 + 0.1 * self.chain)).sum() + z
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def chained_guide(x):
    c = pyro.param("c", torch.tensor(0.3), constraint=dist.constraints.interval(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(c * x, 0.7))


def chained_pair():
    return MetaModel(Chained(), chained_guide, visible="x", hidden="z")


class Bits:
    """A re-iterable that draws new bits from grey levels at the start of each pass."""

    def __init__(self, grey, batch_size):
        self.grey, self.batch_size = grey, batch_size
        self.passes = []

    def __len__(self):
        return -(-len(self.grey) // self.batch_size)

    def __iter__(self):
        bits = torch.bernoulli(self.grey)
        self.passes.append(bits)
        return iter(bits.split(self.batch_size))


def factor_pair(log_factor=lambda w: -((w - 3.0) ** 2)):
    """A pair with one weight w whose bound per datum is log_factor(w), whatever the data."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.0))

        def forward(self, x, *labels):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.factor("x", log_factor(self.w).expand(len(x)))

    def guide(x, *labels):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    return MetaModel(Model(), guide, visible="x", hidden="z")


def climbing(pair):
    """Settings whose loss has gradient -1 per datum: SGD with lr 1 raises w by 1 a step."""

    def loss(model, guide, x):
        trace = pyro.poutine.trace(model).get_trace(x)
        return 0.0 * trace.log_prob_sum() - len(x) * pair.model.fn.w

    return {"loss": loss, "optimizer": partial(torch.optim.SGD, lr=1.0), "batch_size": 10}
