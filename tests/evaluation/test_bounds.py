"""The decomposed bound against enumeration, and its inequalities."""

import pyro
import pytest
import torch
from enumerated import BitPair, all_bits, cascade_elbo, cascade_exact, cascade_terms

from pyroboost import Cascade
from pyroboost.evaluation import decompose, elbo, importance_bound, log_likelihood


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
