"""Rounds of multiplicative boosting: the theorem, the weights, the powers, the reports."""

import math

import pytest
import torch
from enumerated import BitPair, all_bits
from torch import nn

from pyroboost.compose import Product, Ratio
from pyroboost.compose.rounds import data_weights
from pyroboost.infer import multiplicative
from pyroboost.models import GMM, RBM, BernoulliMixture


def table(probabilities):
    """A mixture of bits with nearly the given probability of each state."""
    states = all_bits(int(math.log2(len(probabilities))))
    found = BernoulliMixture(len(states), states.shape[1]).double()
    found.assign(probabilities.double().log(), (40.0 * (2 * states - 1)).double())
    return found


def law(seed, size=8, sharpness=1.5):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(size, generator=generator, dtype=torch.float64)).softmax(0)


@pytest.mark.parametrize("seed", range(5))
def test_exact_rounds_never_lower_the_exact_log_likelihood(seed):
    """Each round is the best density for its weights: E_p[log q_t] rises for powers in (0, 1].

    With beta 1 the weighted data have the law p / q, and q (p / q)^a is nearer to p than q is.
    """
    p, product = law(seed), Product(table(law(seed + 50)))
    x, scores = all_bits(3).double(), []
    for power in (0.3, 1.0, 0.6):
        product.log_partition("exact")
        log_q = product.log_marginal(x).value
        scores.append(float(p @ log_q))
        weights, beta = data_weights(log_q, 1.0)
        assert beta == 1.0
        best = p * weights.double()
        product = Product(product, table(best / best.sum()), powers=[1.0, power])
    product.log_partition("exact")
    scores.append(float(p @ product.log_marginal(x).value))
    assert scores[0] < scores[1] < scores[2]
    assert scores[3] >= scores[2] - 1e-9
    assert scores[2] == pytest.approx(float(p @ p.log()), abs=1e-6)  # power 1: p itself


def test_a_round_towards_the_wrong_law_does_lower_it():
    """The same numbers with weights q instead of 1 / q: the theorem's check can fail."""
    p, q = law(1), law(51)
    best = p * q
    product = Product(table(q), table(best / best.sum()))
    product.log_partition("exact")
    assert float(p @ product.log_marginal(all_bits(3).double()).value) < float(p @ q.log())


def test_weights_are_powers_of_inverse_densities():
    log_q = torch.tensor([-1.0, -2.0, -700.0, -4.0]).double()
    weights, beta = data_weights(log_q[[0, 1, 3]], 0.5)
    expected = (-0.5 * log_q[[0, 1, 3]]).exp()
    torch.testing.assert_close(weights.double(), 3 * expected / expected.sum())
    assert beta == 0.5
    weights, beta = data_weights(log_q, 1.0)
    assert weights.tolist() == pytest.approx([0.0, 0.0, 4.0, 0.0])
    weights, beta = data_weights(log_q, 1.0, least=0.5)
    assert 0 < beta < 0.01
    share = float(weights.sum() ** 2 / weights.square().sum()) / 4
    assert share == pytest.approx(0.5, abs=1e-4)
    assert data_weights(log_q, 0.0)[0].tolist() == [1.0] * 4
    for bad in ({"beta": 1.5}, {"beta": -0.1}, {"beta": 1.0, "least": 1.0}):
        with pytest.raises(ValueError, match=r"within \[0, 1\]"):
            data_weights(log_q, **bad)
    with pytest.raises(ValueError, match="density 0 or NaN"):
        data_weights(torch.tensor([0.0, -math.inf]), 1.0)


def bits(count=1200):
    """Bits of which the first two agree and the last two disagree."""
    x = (torch.rand(count, 4) < 0.5).float()
    agree, differ = torch.rand(2, count) < 0.9
    x[:, 1] = torch.where(agree, x[:, 0], 1 - x[:, 0])
    x[:, 3] = torch.where(differ, 1 - x[:, 2], x[:, 2])
    return x


def test_rounds_see_data_weighed_by_the_product_before_them():
    x = bits(200)
    product = Product(make_mixture(), make_mixture(), BitPair(4, 2), powers=[1.0, 0.5, 2.0])
    rounds = product.rounds(x, x[:50], beta=0.8, least=0.0)
    first = next(rounds)
    assert (first.pair, first.weights, first.name) == (product[0], None, "0.BernoulliMixture")
    product[0].assign(torch.zeros(2), torch.randn(2, 4))  # as if it were trained now
    second = next(rounds)
    own = product[0].log_marginal(x).value.detach().double()
    expected = (-0.8 * own).softmax(0) * 200
    torch.testing.assert_close(second.weights.double(), expected, atol=1e-5, rtol=1e-4)
    expected = (-0.8 * own[:50]).softmax(0) * 50
    torch.testing.assert_close(second.validation_weights.double(), expected, atol=1e-5, rtol=1e-4)
    third = next(rounds)
    own = own + 0.5 * product[1].log_marginal(x).value.detach().double()
    expected = (-0.8 * own).softmax(0) * 200
    torch.testing.assert_close(third.weights.double(), expected, atol=1e-5, rtol=1e-4)
    assert third.pair is product[2]
    with pytest.raises(StopIteration):
        next(rounds)


def make_mixture(k=2):
    mixture = BernoulliMixture(k, 4)
    mixture.assign(torch.randn(k), torch.randn(k, 4))
    return mixture


def test_boosting_raises_the_exact_held_out_likelihood_and_reports_it():
    x = bits()
    product = Product(BernoulliMixture(1, 4), BernoulliMixture(2, 4), BernoulliMixture(2, 4))
    result = multiplicative(product, x[:800], validation=x[800:], seed=0)
    base, *later = result.rounds
    assert base.verdict == "base"
    assert math.isnan(base.ess)
    assert base.held_out.kind == "exact"
    grown = [r for r in later if r.verdict == "grows"]
    assert grown
    assert result.rounds[-1].held_out.mean > base.held_out.mean + 0.05
    for one in grown:
        assert 0 < one.power <= 2.0
        assert one.gain > 2 * one.gain_error > 0
        assert 80 - 1 <= one.ess <= 800
        assert one.held_out.kind == "exact"
    assert list(result.product) == [product[0], *(r.part for r in grown)]
    final = result.product.log_marginal(x[800:])
    torch.testing.assert_close(final.value, result.rounds[-1].held_out.value)
    table = result.table()
    assert table.count("\n") == 3
    assert "grows" in table
    assert "exact" in table


def test_gains_add_up_to_the_rise_of_the_likelihood():
    x = bits()
    product = Product(BernoulliMixture(1, 4), BernoulliMixture(3, 4))
    base, later = multiplicative(product, x[:800], validation=x[800:], seed=0).rounds
    assert later.power > 0
    rise = later.held_out.mean - base.held_out.mean
    assert rise == pytest.approx(later.gain, abs=1e-4)


def test_the_search_finds_the_best_power():
    """Against a fine grid of exact log-likelihoods."""
    x = bits()
    product = Product(BernoulliMixture(1, 4), BernoulliMixture(3, 4))
    result = multiplicative(product, x, seed=0)
    found = result.rounds[1].power
    scores = {}
    for power in (0.05 * i for i in range(1, 41)):
        one = Product(*result.product, powers=[1.0, power])
        one.refresh()
        scores[power] = one.log_marginal(x).mean
    assert found == pytest.approx(max(scores, key=scores.get), abs=0.051)


def test_a_useless_part_is_left_out_and_kept_in_its_report():
    x = bits()
    spoilt = BernoulliMixture(1, 4)
    product = Product(BernoulliMixture(2, 4), spoilt, BernoulliMixture(2, 4))
    settings = {1: {"max_iterations": 0, "pseudo_count": 1e6}}
    result = multiplicative(product, x[:800], validation=x[800:], seed=0, stages=settings)
    report = result.rounds[1]
    assert report.verdict == "nothing gained"
    assert report.power == 0.0
    assert report.part is spoilt
    assert spoilt not in list(result.product)
    stopped = multiplicative(
        product, x[:800], validation=x[800:], seed=0, stages=settings, stop=True
    )
    assert len(stopped.rounds) == 2
    given = multiplicative(
        product, x[:800], validation=x[800:], seed=0, stages=settings, alphas=[0.5, 0.25]
    )
    assert given.product.powers.tolist() == [1.0, 0.5, 0.25]


def test_a_start_keeps_what_was_trained():
    x = bits()
    product = Product(make_mixture(), BernoulliMixture(2, 4), powers=[0.7, 1.0])
    before = product[0].logits.clone()
    result = multiplicative(product, x, start=1, seed=0)
    assert torch.equal(product[0].logits, before)
    assert [r.index for r in result.rounds] == [1]
    assert result.product.powers[0] == 0.7
    assert result.rounds[0].verdict == "grows"


def test_gradient_rounds_and_estimated_densities():
    torch.manual_seed(1)
    x = bits(600)
    product = Product(BernoulliMixture(1, 4), BitPair(4, 3), num_samples=20)
    result = multiplicative(
        product,
        x[:400],
        validation=x[400:],
        seed=0,
        epochs=60,
        lr=0.05,
        batch_size=400,
        num_draws=1000,
    )
    report = result.rounds[1]
    assert report.verdict == "grows"
    assert report.held_out.kind == "estimate"
    assert report.held_out.mean > result.rounds[0].held_out.mean
    assert report.fit.epochs_run == 60
    assert not math.isnan(report.pareto_k)


def test_an_rbm_is_refreshed_before_it_is_judged():
    x = bits(400)
    product = Product(BernoulliMixture(1, 4), RBM(4, 3))
    result = multiplicative(product, x, seed=0, epochs=10, lr=0.05, batch_size=400)
    assert result.product.is_fresh
    assert result.rounds[1].held_out.kind == "exact"


def test_discriminative_rounds_correct_a_density():
    """On bits: data against draws, with the classifier's log odds as a factor."""
    x = bits()
    net = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 1))
    product = Product(BernoulliMixture(1, 4), Ratio(net))
    settings = {1: {"epochs": 80, "lr": 0.03, "batch_size": 800}}
    result = multiplicative(product, x[:800], validation=x[800:], seed=0, stages=settings)
    report = result.rounds[1]
    assert report.verdict == "grows"
    assert report.power == pytest.approx(1.0, abs=0.35)  # the log odds are the log ratio
    assert math.isnan(report.ess)
    assert report.held_out.kind == "exact"
    assert report.held_out.mean > result.rounds[0].held_out.mean + 0.4
    exact = 2 * math.log(0.5) - 2 * (0.9 * -math.log(0.9) + 0.1 * -math.log(0.1))
    assert report.held_out.mean == pytest.approx(exact, abs=0.15)


def test_discriminative_rounds_are_fits_to_labels():
    x = bits(300)
    ratio = Ratio(nn.Linear(4, 1))
    product = Product(make_mixture(), ratio)
    rounds = product.rounds(x, x[:40])
    next(rounds)
    item = next(rounds)
    (inputs, labels), (_, held_out) = item.data, item.validation
    assert inputs.shape == (600, 4)
    assert labels.sum() == 300
    assert torch.equal(inputs[labels == 1], x)
    assert held_out.tolist() == [1.0] * 40 + [0.0] * 40
    assert {id(p) for p in item.pair.parameters()} == {id(p) for p in ratio.parameters()}


def test_reals_are_boosted_too():
    x = torch.cat([torch.randn(600, 1), 0.3 * torch.randn(600, 1) + 3.0])[torch.randperm(1200)]
    product = Product(GMM(1, 1), GMM(2, 1))
    kmeans = {0: {"start": "kmeans"}, 1: {"start": "kmeans"}}
    result = multiplicative(
        product, x[:800], validation=x[800:], seed=0, stages=kmeans, num_draws=4000
    )
    report = result.rounds[1]
    assert report.verdict == "grows"
    assert report.held_out.kind == "estimate"
    assert report.held_out.doubt is None
    assert report.held_out.mean > result.rounds[0].held_out.mean + 0.1


def test_seeds_repeat_rounds_and_leave_the_random_state():
    x = bits(400)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        product = Product(BernoulliMixture(1, 4), BernoulliMixture(2, 4))
        state = torch.get_rng_state()
        results.append(multiplicative(product, x, seed=4))
        assert torch.equal(torch.get_rng_state(), state)
    one, two = ([(r.power, r.gain) for r in result.rounds] for result in results)
    assert one == two


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": 2}, "names a round"),
        ({"stages": {5: {}}}, "names a round"),
        ({"alphas": [1.0, 2.0]}, "alphas has 2 entries"),
        ({"betas": []}, "betas has 0 entries"),
        ({"alphas": -1.0}, "powers are positive"),
        ({"max_power": 0.0}, "take a positive number"),
        ({"betas": 2.0}, r"within \[0, 1\]"),
    ],
)
def test_options_without_meaning_are_refused(options, words):
    product = Product(BernoulliMixture(1, 4), BernoulliMixture(1, 4))
    with pytest.raises(ValueError, match=words):
        multiplicative(product, bits(50), **options)


def test_data_without_rows_to_weigh_are_refused():
    product = Product(BernoulliMixture(1, 4), BernoulliMixture(1, 4))
    with pytest.raises(TypeError, match="need one tensor"):
        multiplicative(product, [bits(50)])
    with pytest.raises(TypeError, match="need one tensor"):
        list(product.rounds((bits(50),)))
    with pytest.raises(ValueError, match="first part is a ratio"):
        multiplicative(Product(Ratio(nn.Linear(4, 1)), make_mixture()), bits(50))


def test_other_compositions_and_weights_of_data_are_refused():
    product = Product(BernoulliMixture(1, 4), BernoulliMixture(1, 4))
    with pytest.raises(TypeError, match=r"got RBM, not a Product; wrap it in Product\(\.\.\.\)"):
        multiplicative(RBM(4, 2), bits(50))
    with pytest.raises(TypeError, match="got list, not a Product; wrap the meta-models in"):
        multiplicative([RBM(4, 2)], bits(50))
    for options in ({"weights": torch.ones(50)}, {"stages": {1: {"weights": torch.ones(50)}}}):
        with pytest.raises(TypeError, match=r"got weights=, and its rounds make their own"):
            multiplicative(product, bits(50), **options)
