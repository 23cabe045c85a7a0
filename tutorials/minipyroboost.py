"""Cascade boosting in one file: what pyroboost does, in miniature, with torch and pyro alone.

A stage is a Pyro model/guide pair with a visible site x and a hidden site h. In a cascade each
stage models the hidden values of the one below, and the whole is itself such a pair:
    p(x, h_1, ..., h_k) = m_k(h_{k-1}, h_k) prod_{i<k} m_i(h_{i-1} | h_i),    h_0 = x,
    q(h_1, ..., h_k | x) = prod_i q_i(h_i | h_{i-1}).
"""

import itertools
import sys
from collections import namedtuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

Stage = namedtuple("Stage", "model guide visible hidden")  # two programs, the names of two sites


class Rename(poutine.messenger.Messenger):
    """Rename the sites of a program, so that two stages may both call theirs x and h."""

    def __init__(self, prefix, names):
        self.prefix, self.names = prefix, names

    def _pyro_sample(self, msg):
        msg["name"] = self.names.get(msg["name"], self.prefix + msg["name"])


class Capture(poutine.messenger.Messenger):
    """Keep one site's message, whose value handlers outside may set; draw=True ignores data."""

    def __init__(self, name, draw=False):
        self.name, self.draw = name, draw

    def _pyro_sample(self, msg):
        if msg["name"] == self.name:
            self.msg = msg
            if self.draw:  # above the bottom stage nothing is observed
                msg["is_observed"], msg["value"], msg["done"] = False, None, False


def given(stage, h):
    """Fix h and hide its site: the prior drops out of the joint m(x, h), and m(x | h) stays."""
    return poutine.block(poutine.condition(stage.model, {stage.hidden: h}), hide=[stage.hidden])


def encode(x, stage):
    """Draw h ~ q(h | x)."""
    with Capture(stage.hidden) as site:
        stage.guide(x)
    return site.msg["value"]


def climb(x, stages):
    """Draw x, h_1, ..., h_k from the guides, without gradients and with nobody listening."""
    with torch.no_grad(), poutine.block():
        return list(itertools.accumulate(stages, encode, initial=x))


def cascade(*stages):
    """Make one stage of a chain of them: its model runs from the top, its guide from below."""
    names = [stages[0].visible, *(f"{i}.{s.hidden}" for i, s in enumerate(stages))]  # x, h_1, ...
    renames = [Rename(f"{i}.", {s.visible: names[i]}) for i, s in enumerate(stages)]

    def model(x):
        h, templates = None, climb(x, stages[:-1])  # above x, only the shape of a template counts
        for i, stage in reversed(list(enumerate(stages))):
            with renames[i], Capture(stage.visible, draw=i > 0) as site:
                (stage.model if h is None else given(stage, h))(templates[i])
            h = site.msg["value"]

    def guide(x):
        for i, stage in enumerate(stages):
            with renames[i]:
                x = encode(x, stage)

    return Stage(model, guide, stages[0].visible, names[-1])


def greedy(stages, x, steps, lr=0.02):
    """Train each stage by plain SVI on fresh draws from those below, which stand still."""
    for i, stage in enumerate(stages):  # SVI moves what this stage's programs name, no more
        svi = SVI(stage.model, stage.guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
        for _ in range(steps):
            svi.step(climb(x, stages[:i])[-1])


def run(program, x):
    """Trace a program; return the trace and the sum of its log densities for each datum."""
    trace = poutine.trace(program).get_trace(x)
    trace.compute_log_prob()
    return trace, sum(s["log_prob"] for s in trace.nodes.values() if s["type"] == "sample")


def terms(stages, x):
    """Draw the chain; L_i = log m_i(h_{i-1}, h_i) / q_i(h_i | h_{i-1}) - log m_{i-1}(h_{i-1})."""
    found, below = [], 0.0
    for stage in stages:
        guide, log_q = run(stage.guide, x)
        model, log_m = run(poutine.replay(stage.model, guide), x)
        found.append(log_m - log_q - below)  # this stage replaces the prior of the one below
        x, below = (model.nodes[stage.hidden][key] for key in ("value", "log_prob"))
    return torch.stack(found)  # sums to log p(x, h_1, ..., h_k) - log q(h_1, ..., h_k | x)


def bits(tag, visible, hidden):
    """Write a pair as any Pyro user would, with few enough bits to sum over them."""

    def law(name, x, size):
        weight = pyro.param(f"{tag}.{name}", 0.3 * torch.randn(x.shape[1] + 1, size))
        return dist.Bernoulli(logits=torch.cat([x, x.new_ones(len(x), 1)], 1) @ weight).to_event(1)

    def model(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", law("prior", x[:, :0], hidden))
            pyro.sample("x", law("decoder", h, visible), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", law("encoder", x, hidden))

    return Stage(model, guide, "x", "h")


def main(smoke=False):
    """Boost three layers of bits, then check sums over every (h_1, h_2, h_3); --smoke is brief."""
    pyro.set_rng_seed(0)
    pairs = (torch.rand(500, 1) < 0.5) ^ (torch.rand(500, 3) < 0.1)  # three bits that often agree,
    data = (pairs.repeat(1, 2) ^ (torch.rand(500, 6) < 0.02)).float()  # each seen twice, blurred
    stages = [bits("a", 6, 3), bits("b", 3, 3), bits("c", 3, 2)]
    greedy(stages, data, steps=20 if smoke else 400)
    found, pair = terms(stages, data), cascade(*stages)
    x, *h = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 14).split([6, 3, 3, 2], dim=1)
    fixed = {f"{i}.h": value for i, value in enumerate(h)}  # every (x, h_1, h_2, h_3) there is
    log_p, log_q = (run(poutine.condition(p, fixed), x)[1].reshape(64, 256) for p in pair[:2])
    rows = (data @ 2 ** torch.arange(5.0, -1.0, -1.0)).long()  # which of the 64 x a datum is
    bound, exact = (log_q.exp() * (log_p - log_q)).sum(1)[rows], log_p.logsumexp(1)[rows]
    print("L_i:", *(f"{t.mean():.3f} ± {t.std() / 500**0.5:.3f} nats (sampled)," for t in found))
    total, error = found.sum(0).mean(), (found.sum(0) - bound).std() / 500**0.5
    print(f"sum {total:.3f} ± {error:.3f}, exact {bound.mean():.3f} <= log p(x) {exact.mean():.3f}")
    assert abs(log_p.logsumexp((0, 1))) < 1e-4, "the cascade's joint does not sum to one"
    assert abs(total - bound.mean()) < 4 * error, "the terms do not sum to the bound"
    return stages, pair


if __name__ == "__main__":
    main(smoke="--smoke" in sys.argv[1:])
