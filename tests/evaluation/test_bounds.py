"""The decomposed bound against enumeration, and its inequalities."""

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumerated import BitPair, all_bits, bernoulli, cascade_elbo, cascade_exact, cascade_terms

from pyroboost import Cascade, MetaModel
from pyroboost.evaluation import decompose, elbo, importance_bound, log_likelihood
from pyroboost.evaluation.weights import bound_draw, draw, resampled_draw
from pyroboost.infer import stage_gain


@pytest.fixture
def pairs():
    return [BitPair(4, 3, 0.7), BitPair(3, 2, 0.7), BitPair(2, 2, 0.7)]


def test_terms_are_those_of_theorem_1(pairs):
    """Each L_i agrees with its enumeration within the Monte Carlo error, for each datum."""
    x = all_bits(4)[[1, 6, 11, 12]]
    draws = 4000
    found = decompose(Cascade(*pairs), x.repeat(draws, 1), num_importance=1)
    for term, exact in zip(found.terms, cascade_terms(pairs, x), strict=True):
        table = term.per_datum.reshape(draws, len(x))
        error = table.std(0) / draws**0.5
        assert ((table.mean(0) - exact).abs() < 4 * error).all(), term.name
    # A prior below that is off by 0.3 nats would be seen.
    wrong = cascade_terms(pairs, x)[1] + 0.3
    table = found.terms[1].per_datum.reshape(draws, len(x))
    assert ((table.mean(0) - wrong).abs() > 4 * table.std(0) / draws**0.5).any()


def test_terms_sum_to_the_composed_elbo_on_the_same_samples(pairs):
    """Sum_i L_i is log p(x, h) - log q(h | x) of the composed pair at the h that were drawn."""
    cascade, x = Cascade(*pairs), all_bits(4)
    pyro.set_rng_seed(3)
    total = decompose(cascade, x).per_datum
    pyro.set_rng_seed(3)
    # The same draws: decompose measures memory in a fork of the random state.
    h, values = x, {}
    for i, pair in enumerate(pairs):
        h = pair.encode(h)
        values[f"{i}.h"] = h
    with torch.no_grad():
        joint = pyro.poutine.trace(pyro.poutine.condition(cascade.model, values)).get_trace(x)
        guide = pyro.poutine.trace(pyro.poutine.condition(cascade.guide, values)).get_trace(x)
    joint.compute_log_prob()
    guide.compute_log_prob()
    composed = joint.nodes["x"]["log_prob"] + sum(
        joint.nodes[n]["log_prob"] - guide.nodes[n]["log_prob"] for n in values
    )
    torch.testing.assert_close(total, composed, rtol=1e-4, atol=1e-4)


def test_elbo_and_importance_bounds_are_ordered(pairs):
    """ELBO <= K-sample bound <= log p(x), each near its enumerated value."""
    cascade, x = Cascade(*pairs), all_bits(4)[[1, 6]]
    exact, bound = cascade_exact(pairs, x), cascade_elbo(pairs, x)
    single = elbo(cascade, x, num_samples=20_000)
    assert single.kind == "bound"
    assert ((single.value - bound).abs() < 4 * single.std_error).all()
    repeats = x.repeat(2000, 1)
    tables = [importance_bound(cascade, repeats, num_samples=k).value for k in (2, 10)]
    means = [t.reshape(2000, 2).mean(0) for t in tables]
    errors = [t.reshape(2000, 2).std(0) / 2000**0.5 for t in tables]
    assert (bound < means[0] + 3 * errors[0]).all()
    assert (means[0] < means[1] + 3 * (errors[0] + errors[1])).all()
    assert (means[1] < exact + 3 * errors[1]).all()
    estimate = log_likelihood(cascade, x, num_samples=50_000)
    assert estimate.kind == "estimate"
    assert ((estimate.value - exact).abs() < 4 * estimate.std_error).all()


def test_tight_terms_obey_law_three():
    """L_1 + E[log m_2 - log m_1] <= composed importance-weighted bound <= log p."""
    pairs = [BitPair(4, 3, 1.5), BitPair(3, 2, 1.5)]
    x = all_bits(4)[[3, 9]].repeat(3000, 1)
    found = decompose(Cascade(*pairs), x, num_importance=5)
    exact = cascade_exact(pairs, x).mean()
    composed = importance_bound(Cascade(*pairs), x, num_samples=5)
    spread = 3 * found.tight_error
    assert found.elbo < found.tight + spread
    assert found.tight < exact + spread
    assert composed.mean < exact + 3 * composed.standard_error
    # The wrong climb: an importance-weighted first term with h drawn from q instead of the
    # self-normalised law is not a bound, and its sum lies visibly elsewhere.
    wrong = found.terms[0].tight + found.terms[1].value
    assert abs(wrong - found.tight) > spread


def test_theorem_2_nothing_grows_above_an_exact_stage():
    """Above a stage that is the aggregated posterior exactly, later terms sum to at most 0."""
    below, top = BitPair(3, 2), BitPair(2, 1)
    x = all_bits(3)
    # The aggregated law of h_1 under uniform data, as a stage: it takes no hidden value.
    law = below.q.log_q(x, all_bits(2)).exp().mean(0)
    terms = (law * (top.exact(all_bits(2)) - law.log())).sum()
    assert terms <= 0
    for seed in range(20):
        pyro.set_rng_seed(seed)
        other = BitPair(2, 2, 2.0)
        assert (law * (other.exact(all_bits(2)) - law.log())).sum() <= 1e-6


def test_table_and_errors():
    found = decompose(Cascade(BitPair(3, 2)), all_bits(3), num_samples=2)
    assert "0: BitPair" in found.table()
    assert found.partial_sums()[0] == pytest.approx((found.elbo, found.elbo_error))
    with pytest.raises(ValueError, match="each must be at least one"):
        decompose(Cascade(BitPair(3, 2)), all_bits(3), num_samples=0)


def test_errors_of_log_z_cancel_in_sums_but_not_in_terms():
    """A stage's log Z enters its own term and the next one; of a sum, only the top one's stays."""

    class Unsure(BitPair):
        def normalisation(self):
            return "estimate", 3.0

    found = decompose(Cascade(Unsure(3, 2), BitPair(2, 2)), all_bits(3), num_samples=2)
    assert [term.kind for term in found.terms] == ["estimate", "estimate"]
    assert all(term.std_error > 3.0 for term in found.terms)
    first, both = (error for _, error in found.partial_sums())
    assert first > 3.0
    assert both < 3.0
    assert found.elbo_error == both


# Stages that see their data through several particles


class Weighted(BitPair):
    """A pair of bits with a two-sample bound of its own."""

    num_particles = 2

    def encode(self, x, *args):
        return bound_draw(self, x, *args).hidden


def tables(pair):
    """All values, all h, log w and log q of each value against each h, log m(h)."""
    values, h = all_bits(pair.sizes[0]), all_bits(pair.sizes[1])
    log_q = pair.q.log_q(values, h)
    return pair.m.log_joint(values, h) - log_q, log_q, bernoulli(h, pair.m.prior)


def own_bound(pair):
    """The bound of each value that the pair has of its own, summed out."""
    log_w, log_q, _ = tables(pair)
    return averaged(log_q, partial(log_mean, log_w), pair)


def log_mean(log_w, rows):
    """The log of the mean weight of some draws."""
    return log_w[:, rows].logsumexp(-1) - math.log(len(rows))


def averaged(log_q, of, pair):
    """The mean of a function of K rows of h that are drawn from the guide."""
    states = itertools.product(range(log_q.shape[1]), repeat=pair.num_particles)
    return sum(log_q[:, rows].sum(-1).exp() * of(rows) for rows in map(list, states))


def weighted_terms(pairs):
    """L_1 and L_2 of each value of x, by enumeration of all draws and of which is kept."""
    below, top = pairs
    log_w, log_q, log_prior = tables(below)
    gain = own_bound(top) - log_prior

    def kept(rows):
        return (log_w[:, rows].softmax(-1) * gain[rows]).sum(-1)

    return own_bound(below), averaged(log_q, kept, below)


@pytest.mark.parametrize("kinds", [(Weighted, BitPair), (BitPair, Weighted), (Weighted, Weighted)])
def test_terms_of_stages_with_bounds_of_their_own(kinds):
    """decompose and stage_gain have the enumerated means, and single draws have others."""
    pairs = [kind(*sizes, 1.5) for kind, sizes in zip(kinds, ((4, 2), (2, 2)), strict=True)]
    rows, draws = [3, 9, 12], 3000
    x, cascade = all_bits(4)[rows].repeat(draws, 1), Cascade(*pairs)
    exact = [term[rows] for term in weighted_terms(pairs)]
    found = decompose(cascade, x, num_importance=1)
    for term, mean in zip(found.terms, exact, strict=True):
        table = term.per_datum.reshape(draws, 3)
        assert ((table.mean(0) - mean).abs() < 4.5 * table.std(0) / draws**0.5).all(), term.name
    plain = torch.stack(cascade_terms(pairs, x[:3]))
    assert ((torch.stack(exact) - plain).abs().amax(0) > 0.05).all()
    # What is tighter than a stage's own bound has at least its K.
    for term, mean in zip(found.terms, exact, strict=True):
        if all(kind is Weighted for kind in kinds):
            assert abs(term.tight - mean.mean()) < 4.5 * term.tight_error
    for index, mean in enumerate(exact):
        gain = stage_gain(cascade, index, x, seed=1)
        assert abs(gain.value - mean.mean()) < 4.5 * gain.std_error


def test_terms_stay_below_the_composed_bound():
    """L_1 + L_2 <= the composed pair's two-sample bound <= log p(x), every one enumerated."""
    for seed in range(10):
        pyro.set_rng_seed(seed)
        pairs = [Weighted(3, 2, 1.5), BitPair(2, 2, 1.5)]
        x = all_bits(3)
        total = sum(weighted_terms(pairs))
        (log_w, log_q, log_prior), (log_w2, log_q2, _) = map(tables, pairs)
        both = (log_w[:, :, None] + log_w2 - log_prior[:, None]).flatten(1)  # (x, h_1 and h_2)
        law = (log_q[:, :, None] + log_q2).flatten(1)
        composed = averaged(law, partial(log_mean, both), pairs[0])
        assert (total <= composed + 1e-5).all()
        assert (composed <= cascade_exact(pairs, x) + 1e-5).all()


def test_bound_draw_keeps_one_draw_by_its_weight():
    """The value that is kept, its log m(h) and the mean weight belong together."""
    pair, x, count = Weighted(3, 2, 1.5), all_bits(3)[[5]], 40_000
    drawn = bound_draw(pair, x.expand(count, 3))
    torch.testing.assert_close(drawn.log_prior, bernoulli(drawn.hidden, pair.m.prior))
    log_w, log_q, _ = (table[5] if table.dim() == 2 else table for table in tables(pair))
    law = torch.zeros(4)
    for first, second in itertools.product(range(4), repeat=2):
        mass = (log_q[first] + log_q[second]).exp()
        share = log_w[[first, second]].softmax(0)
        law[first] += mass * share[0]
        law[second] += mass * share[1]
    found = torch.stack([(drawn.hidden == h).all(-1).float().mean() for h in all_bits(2)])
    assert ((found - law).abs() < 4.5 * (law * (1 - law) / count).sqrt()).all()
    assert ((log_q.exp() - law).abs() > 4.5 * (law * (1 - law) / count).sqrt()).any()
    pyro.set_rng_seed(1)
    one = draw(pair, x)
    pyro.set_rng_seed(1)
    pair.num_particles = 1
    assert torch.equal(bound_draw(pair, x).log_weight, one.log_weight)


def test_resampled_draw_refuses_plates_of_a_fixed_size():
    def model(x):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:4])

    def guide(x):
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))

    pair = MetaModel(model, guide, visible="x", hidden="z")
    with pytest.raises(ValueError, match="let its plates follow the number of data"):
        resampled_draw(pair, torch.zeros(4), num_samples=2)
