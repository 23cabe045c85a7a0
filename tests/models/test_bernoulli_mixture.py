"""The mixture of bits as a pair: exact likelihood and guide, EM's promise, bits of a Gaussian."""

import copy
import itertools
import math

import pytest
import torch
from enumerated import all_bits
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam

from pyroboost.evaluation import log_weights
from pyroboost.infer import fit
from pyroboost.models import GMM, BernoulliMixture


def brute(mixture, x):
    """log m(x, c) from probabilities in double precision.  # (N, K)"""
    p = mixture.logits.double().sigmoid()
    x = x.double()[:, None]
    return mixture.log_weights.double() + (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)


def two_kinds(n=600):
    """Bits of two kinds of data, three of each of six bits mostly on."""
    first = torch.rand(n) < 0.4
    odds = torch.tensor([[0.9, 0.8, 0.9, 0.1, 0.2, 0.1], [0.1, 0.2, 0.2, 0.9, 0.7, 0.9]])
    return (torch.rand(n, 6) < odds[first.long()]).float()


def make(k=3, dim=4):
    mixture = BernoulliMixture(k, dim)
    mixture.assign(torch.randn(k), 2 * torch.randn(k, dim))
    return mixture


def test_densities_are_those_of_probabilities_and_sum_to_one():
    mixture, x = make(), all_bits(4)
    found = mixture.log_marginal(x)
    assert found.kind == "exact"
    joint, value = brute(mixture, x), found.value.detach().double()
    torch.testing.assert_close(value, joint.logsumexp(-1), atol=1e-5, rtol=0)
    assert float(value.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    found = mixture.responsibilities(x).detach().double()
    torch.testing.assert_close(found, joint.softmax(-1), atol=1e-5, rtol=0)
    prior = mixture.log_prior(torch.tensor([2, 0]))
    torch.testing.assert_close(prior.value, mixture.log_weights[[2, 0]])
    trace = poutine.trace(mixture.marginal).get_trace(x)
    torch.testing.assert_close(trace.log_prob_sum().detach(), value.sum().float())


def test_probabilities_that_are_almost_sure_are_not_clipped():
    mixture = BernoulliMixture(1, 2)
    mixture.assign(torch.zeros(1), torch.tensor([[80.0, -200.0]]))
    value = mixture.log_marginal(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])).value
    assert value.tolist() == pytest.approx([0.0, -80.0, -280.0])


def test_every_importance_weight_is_the_likelihood():
    mixture, x = make(), all_bits(4)
    expected = mixture.log_marginal(x).value.detach()
    table = log_weights(mixture, x, num_samples=5)
    torch.testing.assert_close(table, expected.expand(5, -1))


def test_the_objective_is_the_likelihood_and_weighs_data():
    mixture, x = make(), all_bits(4)
    exact = -mixture.log_marginal(x).value
    loss = mixture.objective()
    torch.testing.assert_close(loss(None, None, x), exact.sum())
    weights = torch.rand(16)
    torch.testing.assert_close(loss(None, None, x, weights=weights), (weights * exact).sum())
    every = config_enumerate(mixture.guide, "parallel")
    summed = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    expected = float(exact.detach().sum())
    assert summed.loss(mixture.model, every, x) == pytest.approx(expected, rel=1e-5)


def test_gradients_and_svi_train_it():
    data = two_kinds()
    for method in ("fit", "svi"):
        mixture = BernoulliMixture(2, 6)
        before = mixture.log_marginal(data).mean
        if method == "fit":
            fit(mixture, data, epochs=15, batch_size=300, lr=0.1, seed=0)
        else:
            svi = SVI(mixture.model, mixture.guide, Adam({"lr": 0.1}), Trace_ELBO())
            for _ in range(30):
                svi.step(data)
        assert mixture.log_marginal(data).mean > before + 0.3


def test_em_never_falls_and_finds_both_kinds():
    data = two_kinds(2000)
    mixture = BernoulliMixture(2, 6)
    result = mixture.fit_em(data[:1500], validation=data[1500:], restarts=2)
    history = result.history
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(history))
    assert result.converged
    assert max(result.restarts) == history[-1]
    assert result.held_out == pytest.approx(mixture.log_marginal(data[1500:]).mean)
    first = mixture.log_weights.exp().argmin()
    assert float(mixture.log_weights.exp()[first]) == pytest.approx(0.4, abs=0.06)
    truth = torch.tensor([0.1, 0.2, 0.2, 0.9, 0.7, 0.9])
    torch.testing.assert_close(mixture.logits[first].sigmoid(), truth, atol=0.06, rtol=0)


def test_em_of_one_component_is_counting():
    data, weights = two_kinds(50), torch.rand(50)
    mixture = BernoulliMixture(1, 6)
    mixture.fit_em(data, weights=weights, pseudo_count=0.5, restarts=1)
    scaled = (weights / weights.mean()).double()
    ones = (scaled[:, None] * data).sum(0)
    expected = (ones + 0.5) / (50 + 1.0)
    torch.testing.assert_close(mixture.logits[0].sigmoid().double(), expected, atol=1e-6, rtol=0)


def test_em_reaches_a_stationary_point_of_its_objective():
    """The gradient of log-likelihood plus log prior is zero where EM has converged."""
    data = two_kinds(300)
    weights = torch.rand(300, dtype=torch.float64) + 0.5
    mixture = BernoulliMixture(3, 6).double()
    mixture.fit_em(data, weights=weights, pseudo_count=2.0, tolerance=1e-13, max_iterations=3000)
    parts = mixture.components
    value = ((weights / weights.mean()) * mixture.log_marginal(data).value).sum()
    odds = parts.logits
    prior = torch.nn.functional.logsigmoid(odds) + torch.nn.functional.logsigmoid(-odds)
    prior = 2.0 * (prior.sum() + parts.weight_logits.log_softmax(-1).sum())
    gradients = torch.autograd.grad(value + prior, [odds, parts.weight_logits])
    assert max(float(g.abs().max()) for g in gradients) < 1e-3


def test_weights_are_repetitions():
    data = two_kinds(40)
    times = torch.randint(1, 4, (40,))
    once, often = BernoulliMixture(2, 6).double(), BernoulliMixture(2, 6).double()
    once.fit_em(data, weights=times.double(), restarts=1, tolerance=1e-12, pseudo_count=1.0)
    often.fit_em(data.repeat_interleave(times, 0), restarts=1, tolerance=1e-12,
                 pseudo_count=float(times.sum()) / 40)  # fmt: skip
    found, expected = (m.log_marginal(data).value.detach() for m in (once, often))
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_bits_that_never_change_keep_finite_odds():
    mixture = BernoulliMixture(2, 3)
    mixture.fit_em(torch.ones(20, 3))
    assert mixture.logits.isfinite().all()
    assert -20 < mixture.log_marginal(torch.zeros(1, 3)).mean < -5


def test_a_gaussian_mixture_on_bits_is_renormalised_over_the_corners():
    gmm = GMM(3, 5, covariance="diag").double()
    with torch.no_grad():
        gmm.components.log_scale.normal_()
        gmm.components.logits.normal_()
    mixture, x = gmm.on_bits(), all_bits(5).double()
    expected = gmm.log_marginal(x).value.detach().log_softmax(0)
    torch.testing.assert_close(mixture.log_marginal(x).value.detach(), expected)
    torch.testing.assert_close(mixture.responsibilities(x), gmm.responsibilities(x))
    locs, scale = gmm.mixture.locs, gmm.mixture.scale
    torch.testing.assert_close(mixture.logits, (2 * locs - 1) / (2 * scale**2))
    with pytest.raises(ValueError, match="no closed form"):
        GMM(2, 3).on_bits()


def test_copies_and_dtypes_keep_densities(tmp_path):
    mixture, x = make(), all_bits(4)
    before = mixture.log_marginal(x).value.detach()
    mixture.save(tmp_path / "m.pt")
    assert torch.equal(BernoulliMixture(3, 4).load(tmp_path / "m.pt").log_marginal(x).value, before)
    copied = copy.deepcopy(mixture).double()
    torch.testing.assert_close(copied.log_marginal(x).value.float(), before)
    copied.fit_em(two_kinds(40)[:, :4])
    assert torch.equal(mixture.log_marginal(x).value, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": torch.full((3, 4), 0.5)}, "other than 0 and 1"),
        ({"data": torch.zeros(3, 5)}, r"\(N, 4\)"),
        ({"pseudo_count": 0.0}, "positive count"),
        ({"restarts": 0}, "at least one"),
        ({"max_iterations": -1}, "no negative number"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"weights": torch.ones(2)}, "weights of shape"),
        ({"weights": torch.tensor([1.0, -1.0, 1.0])}, "at least 0 each"),
        ({"weights": torch.zeros(3)}, "not all 0"),
    ],
)
def test_em_refuses_what_is_of_no_use(options, words):
    with pytest.raises(ValueError, match=words):
        BernoulliMixture(2, 4).fit_em(**{"data": torch.ones(3, 4), **options})


def test_other_refusals():
    with pytest.raises(TypeError, match="EM needs all data"):
        BernoulliMixture(2, 4).fit_em([1, 2])
    with pytest.raises(ValueError, match="both must be"):
        BernoulliMixture(0, 4)
    with pytest.raises(ValueError, match="this mixture has"):
        BernoulliMixture(2, 4).assign(torch.zeros(2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="finite"):
        BernoulliMixture(2, 4).assign(torch.zeros(2), torch.full((2, 4), math.inf))
    with pytest.raises(ValueError, match="other than 0 and 1"):
        BernoulliMixture(2, 4).log_marginal(torch.full((1, 4), 2.0))
