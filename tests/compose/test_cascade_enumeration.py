"""A cascade of bits against sums over everything, written out by hand."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumerated import BitGuide, BitModel, BitPair, all_bits, bernoulli, cascade_exact
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.ops.provenance import track_provenance
from torch import nn

from pyroboost import Cascade, MetaModel
from pyroboost.traces import datum_log_prob


def configurations(cascade):
    """Return every value of all hidden sites together, one row each.  # {site: (H, size)}"""
    values = [all_bits(stage.sizes[1]) for stage in cascade]
    rows = list(itertools.product(*values))
    return {f"{i}.h": torch.stack([row[i] for row in rows]) for i in range(len(values))}


def traced(program, x, values):
    """Log density of a program with its hidden sites at these values, row by row.  # (N,)"""
    trace = poutine.trace(poutine.condition(program, data=values)).get_trace(x)
    trace.compute_log_prob()
    names = [*values, "x"] if "x" in trace.nodes else list(values)
    return sum(datum_log_prob(trace.nodes[n], len(x)) for n in names)


def tables(cascade, x):
    """Return log p(x, h) and log q(h | x) for all h.  # (H, N) both"""
    values = configurations(cascade)
    count = len(values["0.h"])
    rows = {name: value.repeat_interleave(len(x), 0) for name, value in values.items()}
    every = x.repeat(count, 1)
    model, guide = traced(cascade.model, every, rows), traced(cascade.guide, every, rows)
    return model.reshape(count, len(x)), guide.reshape(count, len(x))


def hand_joint(pairs, x, values):
    """log p(x, h_1, ..., h_k) of Eq. 3 from logits alone."""
    below, total = x, 0.0
    for i, pair in enumerate(pairs):
        h = values[f"{i}.h"]
        total = total + bernoulli(below, pair.m.logits(h))
        below = h
    return total + bernoulli(below, pairs[-1].m.prior)


@pytest.fixture(params=[(2, 2), (3, 2, 2), (2, 3, 2, 1)], ids=lambda sizes: f"{len(sizes) - 1}")
def cascade(request):
    torch.manual_seed(1)
    return Cascade(*(BitPair(v, h, 1.5) for v, h in itertools.pairwise(request.param)))


@pytest.fixture
def x(cascade):
    return all_bits(cascade[0].sizes[0])


@torch.no_grad()
def test_joint_is_the_one_written_by_hand(cascade, x):
    values = configurations(cascade)
    log_p, _ = tables(cascade, x)
    for row, datum in zip(log_p.T, x, strict=True):
        expected = hand_joint(list(cascade), datum.expand(len(row), -1), values)
        assert torch.allclose(row, expected, atol=1e-5)


@torch.no_grad()
def test_all_probabilities_sum_to_one(cascade, x):
    log_p, log_q = tables(cascade, x)
    assert abs(log_p.exp().sum().item() - 1) < 1e-5
    assert torch.allclose(log_q.exp().sum(0), torch.ones(len(x)), atol=1e-5)


@torch.no_grad()
def test_expected_weight_is_the_evidence(cascade, x):
    """E_q[p(x, h) / q(h | x)] = p(x), summed over h."""
    log_p, log_q = tables(cascade, x)
    expected = (log_q.exp() * (log_p - log_q).exp()).sum(0)
    exact = cascade_exact(list(cascade), x).exp()
    assert torch.allclose(expected, exact, atol=1e-5)
    assert torch.allclose(log_p.exp().sum(0), exact, atol=1e-5)


@torch.no_grad()
def test_nesting_gives_one_table():
    stages = [BitPair(3, 2), BitPair(2, 2), BitPair(2, 2)]
    x = all_bits(3)
    flat = tables(Cascade(*stages), x)
    for nested in (
        Cascade(Cascade(*stages[:2]), stages[2]),
        Cascade(stages[0], Cascade(*stages[1:])),
    ):
        for one, two in zip(flat, tables(nested, x), strict=True):
            assert torch.equal(one, two)


@torch.no_grad()
def test_one_stage_has_its_own_density():
    stage, x = BitPair(3, 2), all_bits(3)
    log_p, log_q = tables(Cascade(stage), x)
    h = all_bits(2)
    assert torch.allclose(log_p.T, stage.m.log_joint(x, h), atol=1e-5)
    assert torch.allclose(log_q.T, stage.q.log_q(x, h), atol=1e-5)


@torch.no_grad()
def test_draws_have_the_probabilities_of_the_sum(cascade, x):
    """Goodness of fit of ``sample``, which rejects the single bottom stage."""
    from scipy.stats import chi2

    n = 20_000
    drawn = cascade.sample(torch.zeros(n, x.shape[-1]))
    index = (drawn * 2.0 ** torch.arange(x.shape[-1] - 1, -1, -1)).sum(-1).long()
    counts = torch.bincount(index, minlength=len(x)).double()

    def p_value(law):
        statistic = ((counts - n * law) ** 2 / (n * law)).sum().item()
        return chi2.sf(statistic, len(x) - 1)

    assert p_value(cascade_exact(list(cascade), x).exp().double()) > 1e-3
    if len(cascade) > 1:
        assert p_value(cascade_exact(list(cascade)[:1], x).exp().double()) < 1e-6


@torch.no_grad()
def test_encoding_has_the_probabilities_of_the_guide():
    cascade, n = Cascade(BitPair(2, 2), BitPair(2, 2)), 20_000
    x = torch.tensor([[1.0, 0.0]])
    h = cascade.encode(x.expand(n, -1))
    frequency = torch.stack([(h == row).all(-1).double().mean() for row in all_bits(2)])
    _, log_q = tables(cascade, x)
    law = log_q.exp().reshape(4, 4).sum(0).double()  # over 0.h
    assert ((frequency - law).abs() < 5 * (law * (1 - law) / n).sqrt()).all()


# Theorem 2


class Table(MetaModel):
    """A pair whose law of x is a given table, over one hidden bit, with its exact posterior."""

    def __init__(self, law):
        size = int(math.log2(len(law)))
        share = torch.rand(len(law)) * 0.8 + 0.1
        weights = torch.stack([law * (1 - share), law * share])  # (h, x)
        prior, given_h = weights.sum(1), weights / weights.sum(1, keepdim=True)
        posterior = weights[1] / weights.sum(0)
        bits = all_bits(size)

        def index(x):
            return (x * 2.0 ** torch.arange(size - 1, -1, -1)).sum(-1).long()

        class Rows(dist.TorchDistribution):
            support = dist.constraints.independent(dist.constraints.boolean, 1)
            arg_constraints = {}

            def __init__(self, probs):
                self.probs = probs
                super().__init__(probs.shape[:-1], torch.Size([size]), validate_args=False)

            def expand(self, shape, _instance=None):
                return Rows(self.probs.expand(*shape, len(law)))

            def log_prob(self, value):
                probs = self.probs.expand(*value.shape[:-1], len(law))
                return probs.gather(-1, index(value)[..., None])[..., 0].log()

            def sample(self, sample_shape=()):
                return bits[torch.distributions.Categorical(self.probs).sample(sample_shape)]

        def model(x):
            with pyro.plate("data", x.shape[-2]):
                h = pyro.sample("h", dist.Bernoulli(prior[1:]).to_event(1))
                pyro.sample("x", Rows(given_h[h[..., 0].long()]), obs=x)

        def guide(x):
            with pyro.plate("data", x.shape[-2]):
                pyro.sample("h", dist.Bernoulli(posterior[index(x)][..., None]).to_event(1))

        super().__init__(model, guide, visible="x", hidden="h")
        self.sizes = size, 1


def elbo(cascade, x):
    log_p, log_q = tables(cascade, x)
    return (log_q.exp() * (log_p - log_q)).sum(0)


@torch.no_grad()
def test_after_an_exact_stage_later_terms_sum_to_at_most_nothing():
    """Theorem 2: m_2(h_1) is the aggregated posterior, and its guide is exact."""
    x, data = all_bits(3), torch.distributions.Dirichlet(torch.ones(8)).sample()
    bottom = BitPair(3, 2, 1.5)
    law = (data[:, None] * bottom.q.log_q(x, all_bits(2)).exp()).sum(0)
    exact = Table(law)
    two = Cascade(bottom, exact)
    gain = (data * (elbo(two, x) - elbo(Cascade(bottom), x))).sum().item()
    prior = bernoulli(all_bits(2), bottom.m.prior).exp()
    divergence = (law * (law / prior).log()).sum().item()
    assert abs(gain - divergence) < 1e-4  # L_2 of an exact stage is the whole divergence
    for seed in range(20):
        torch.manual_seed(seed)
        later = [BitPair(1, 2), BitPair(2, 1)]
        gain = (data * (elbo(Cascade(two, *later), x) - elbo(two, x))).sum().item()
        assert gain <= 1e-5
    # A stage that is not exact leaves room for others.
    other = Cascade(bottom, BitPair(2, 1, 2.0))
    room = (data * (elbo(two, x) - elbo(other, x))).sum().item()
    assert room > 1e-3


# The gradient of joint fine-tuning


class TiedGuide(nn.Module):
    """q(h | x) from the model's own weights, as in an RBM, with or without their gradient."""

    def __init__(self, model, attached):
        super().__init__()
        self.model, self.attached = model, attached

    def forward(self, x):
        logits = x @ self.model.weight.T + self.model.prior
        with pyro.plate("data", x.shape[-2]):
            law = dist.Bernoulli(logits=logits if self.attached else logits.detach())
            pyro.sample("h", law.to_event(1))


class TiedPair(MetaModel):
    """A pair with tied recognition weights, detached in its guide and attached below others."""

    def __init__(self, visible, hidden):
        model = BitModel(visible, hidden)
        super().__init__(model, TiedGuide(model, False), visible="x", hidden="h")
        self.sizes = visible, hidden
        self.attached = MetaModel(model, TiedGuide(model, True), visible="x", hidden="h").guide

    @property
    def recognition(self):
        return self.attached


def exact_elbo(pairs, x, top_detached):
    """The ELBO by a sum over all hidden values, as a function of the parameters."""
    total, law = 0.0, torch.ones(len(x), 1)
    values = x[:, None]
    for i, pair in enumerate(pairs):
        m, h = pair.model.fn, all_bits(pair.sizes[1])
        if isinstance(pair, TiedPair):
            logits = values @ m.weight.T + m.prior
            logits = logits.detach() if i == len(pairs) - 1 and top_detached else logits
        else:
            logits = pair.guide.fn.net(values)
        log_q = bernoulli(h, logits[..., None, :])  # (N, values, H)
        inner = bernoulli(values[..., None, :], m.logits(h)) - log_q
        if i == len(pairs) - 1:
            inner = inner + bernoulli(h, m.prior)
        total = total + (law * (log_q.exp() * inner).sum(-1)).sum()
        law = (law[..., None] * log_q.exp()).sum(1)
        values = h.expand(len(x), -1, -1)
    return total


def expected_gradient(cascade, x, elbo):
    """Sum the gradient of Pyro's surrogate over all values of the guide, by their probability."""
    parameters = list(cascade.parameters())
    values = configurations(cascade)
    with torch.no_grad():
        _, log_q = tables(cascade, x)
    total = [torch.zeros_like(p) for p in parameters]
    for row, weight in enumerate(log_q[:, 0].exp()):
        chosen = poutine.trace(cascade.guide).get_trace(x)
        for i, (name, value) in enumerate(values.items()):
            value = value[row : row + 1]
            if elbo is TraceGraph_ELBO and i:  # a draw remembers what it was drawn from
                value = track_provenance(value, frozenset({f"{i - 1}.h"}))
            chosen.nodes[name]["value"] = value
        cascade.zero_grad()
        elbo().loss_and_grads(cascade.model, poutine.replay(cascade.guide, trace=chosen), x)
        for found, parameter in zip(total, parameters, strict=True):
            found -= weight * (0.0 if parameter.grad is None else parameter.grad)
    return total


def gradients(value, parameters):
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("top", [BitPair, TiedPair])
def test_joint_fine_tuning_has_the_right_gradient(elbo, top):
    """One datum, all hidden values: tied weights below get the whole gradient."""
    torch.manual_seed(3)
    cascade, x = Cascade(TiedPair(3, 2), top(2, 2)), torch.tensor([[1.0, 0.0, 1.0]])
    cascade.guide(x)
    found = expected_gradient(cascade, x, elbo)
    parameters = list(cascade.parameters())
    exact = gradients(exact_elbo(list(cascade), x, top_detached=True), parameters)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, exact, strict=True))


def test_a_detached_guide_below_misses_a_part_of_the_gradient():
    """Why what runs below another stage is not the guide: the missing part is not small."""
    torch.manual_seed(3)
    cascade, x = Cascade(TiedPair(3, 2), BitPair(2, 2)), torch.tensor([[1.0, 0.0, 1.0]])
    cascade[0].attached = cascade[0].guide
    parameters = list(cascade.parameters())
    found = expected_gradient(cascade, x, Trace_ELBO)
    exact = gradients(exact_elbo(list(cascade), x, top_detached=True), parameters)
    assert max((a - b).abs().max().item() for a, b in zip(found, exact, strict=True)) > 0.1


def test_gradient_of_an_exact_detached_guide_alone_is_that_of_the_likelihood():
    """Law 2 and its reason: with the exact posterior the score has mean zero."""
    torch.manual_seed(2)

    class Exact(MetaModel):
        def __init__(self):
            model = BitModel(2, 2)

            def guide(x):
                with pyro.plate("data", x.shape[-2]):
                    h = all_bits(2)
                    joint = model.log_joint(x, h).detach()
                    log_q = joint - joint.logsumexp(-1, keepdim=True)
                    index = torch.arange(4)
                    first = log_q[:, index >= 2].logsumexp(-1)
                    a = pyro.sample("a", dist.Bernoulli(first.exp()), infer={"is_auxiliary": True})
                    pair = log_q.exp().reshape(-1, 2, 2)[torch.arange(len(x)), a.long()]
                    b = pyro.sample(
                        "b", dist.Bernoulli(pair[:, 1] / pair.sum(-1)), infer={"is_auxiliary": True}
                    )
                    pyro.sample("h", dist.Delta(torch.stack([a, b], -1), event_dim=1))

            super().__init__(model, guide, visible="x", hidden="h")

    pair, x = Exact(), all_bits(2)
    guide = poutine.trace(pair.guide).get_trace(x)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
    model.compute_log_prob()
    guide.compute_log_prob()
    weight = sum(datum_log_prob(model.nodes[n], 4) for n in ("x", "h"))
    weight = weight - sum(datum_log_prob(guide.nodes[n], 4) for n in ("a", "b", "h"))
    exact = pair.model.fn.log_joint(x, all_bits(2)).logsumexp(-1)
    assert torch.allclose(weight, exact, atol=1e-5)


def test_bit_guide_of_the_reference_is_the_one_that_runs():
    guide, x = BitGuide(3, 2), all_bits(3)
    trace = poutine.trace(poutine.condition(guide, data={"h": x[:, :2]})).get_trace(x)
    expected = bernoulli(x[:, :2], guide.net(x)).sum()
    assert torch.allclose(trace.log_prob_sum(), expected)
