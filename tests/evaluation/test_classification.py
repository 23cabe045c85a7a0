"""Predicted classes against enumeration, and their scores against scikit-learn."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumerated import all_bits
from labelled_pairs import CLASSES, encoded, log_joint, log_q, tiny, tower, tower_joint

from pyroboost import Cascade, MetaModel
from pyroboost.evaluation import (
    accuracy,
    brier_score,
    class_probabilities,
    expected_calibration_error,
)
from pyroboost.models import M2, VAE

X = all_bits(3).double()
WIDE = all_bits(4).double()[::3]


@torch.no_grad()
def test_a_single_pair_predicts_p_of_y_given_x():
    pair = tiny()
    exact = log_joint(pair, X).softmax(-1)
    for method in ("model", "posterior"):
        found = class_probabilities(pair, X, method=method, num_samples=8000)
        assert found.kind == "estimate"
        assert found.num_draws == 1
        torch.testing.assert_close(found.probabilities, exact, atol=0.02, rtol=0)
    guide = class_probabilities(pair, X, method="guide")
    torch.testing.assert_close(guide.probabilities, log_q(pair, X).exp())
    assert (guide.kind, guide.ess, guide.num_samples) == ("exact", None, 0)
    assert (guide.probabilities - exact).abs().max() > 0.1


@torch.no_grad()
def test_a_cascade_predicts_by_each_of_three_laws():
    """The posterior of the cascade, the paper's average over q(h | x), and that of the guide."""
    cascade = tower()
    h = all_bits(3).double()
    law = encoded(cascade, WIDE)
    exact = {
        "posterior": tower_joint(cascade, WIDE).softmax(-1),
        "model": law @ log_joint(cascade[1], h).softmax(-1),
        "guide": law @ log_q(cascade[1], h).exp(),
    }
    for method, expected in exact.items():
        found = class_probabilities(
            cascade,
            WIDE,
            method=method,
            num_samples=150,
            num_draws=600 if method != "guide" else 4000,
        )
        torch.testing.assert_close(found.probabilities, expected, atol=0.045, rtol=0)
        assert (found.ess is None) == (method != "posterior")
        # The three differ by more than the tolerance, so each is told from the others.
        for other in exact.keys() - {method}:
            assert (exact[other] - expected).abs().max() > 0.06, (method, other)
    found = class_probabilities(cascade, WIDE, method="posterior", num_draws=50)
    assert (found.ess >= 1).all()
    assert (found.ess <= 50).all()


@torch.no_grad()
def test_few_samples_and_little_memory_still_give_probabilities():
    cascade = tower()
    for memory in (0.01, 256.0):
        found = class_probabilities(cascade, WIDE, num_samples=1, num_draws=1, memory=memory)
        assert found.probabilities.shape == (len(WIDE), CLASSES)
        torch.testing.assert_close(found.probabilities.sum(-1), torch.ones(len(WIDE)).double())


def coin_model(x, y=None):
    """A user's pair: two classes, x normal around z + 2 y."""
    with pyro.plate("data", x.shape[-1]):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        kind = pyro.sample("kind", dist.Bernoulli(0.5), obs=None if y is None else y.to(x))
        pyro.sample("x", dist.Normal(z + 2 * kind, 1.0), obs=x)


def coin_guide(x, y=None):
    with pyro.plate("data", x.shape[-1]):
        if y is None:
            y = pyro.sample("kind", dist.Bernoulli(logits=x - 1))
        pyro.sample("z", dist.Normal((x - 2 * y) / 2, 0.5**0.5))


def test_any_pair_that_takes_labels_will_do():
    """Its guide is exact, so that one sample is enough; p(y | x) is a logistic function."""
    pair = MetaModel(coin_model, coin_guide, visible="x", hidden="z")
    x = torch.linspace(-3, 5, 9)
    exact = torch.stack([torch.sigmoid(1 - x), torch.sigmoid(x - 1)], -1)
    found = class_probabilities(pair, x, num_samples=1, num_classes=2, label="kind")
    torch.testing.assert_close(found.probabilities, exact)
    guide = class_probabilities(pair, x, method="guide", num_classes=2, label="kind")
    torch.testing.assert_close(guide.probabilities, exact)


def test_what_cannot_be_predicted_is_refused():
    pair = M2(3, CLASSES, 1, units=4)
    x = X.float()
    for bad in ({"method": "vote"}, {"num_samples": 0}, {"num_draws": 0}):
        with pytest.raises(ValueError, match="class_probabilities"):
            class_probabilities(pair, x, **bad)
    with pytest.raises(ValueError, match="at least one"):
        class_probabilities(pair, x[:0])
    with pytest.raises(ValueError, match="num_classes"):
        class_probabilities(VAE(3, 1, units=4), x)
    with pytest.raises(ValueError, match="no discrete site 'kind'"):
        class_probabilities(pair, x, method="guide", label="kind")
    deaf = Cascade(VAE(3, 3, units=4), M2(3, 3, 1, units=4, likelihood="gaussian"))
    with pytest.raises(ValueError, match="does not take the labels"):
        class_probabilities(deaf, x)


# Scores


@pytest.fixture
def predicted():
    torch.manual_seed(1)
    p = (2.0 * torch.randn(500, 4)).softmax(-1)
    return p, torch.multinomial((p + 0.3), 1)[:, 0]


def test_accuracy_is_that_of_sklearn(predicted):
    from sklearn.metrics import accuracy_score

    p, y = predicted
    assert accuracy(p, y) == pytest.approx(accuracy_score(y, p.argmax(-1)))


def test_brier_score_is_twice_sklearns_for_two_classes(predicted):
    from sklearn.metrics import brier_score_loss

    p, y = predicted
    two, right = p[:, :2] / p[:, :2].sum(-1, keepdim=True), (y == 1).long()
    expected = brier_score_loss(right, two[:, 1].double())
    assert brier_score(two, right) == pytest.approx(2 * expected, abs=1e-6)
    one_hot = torch.eye(4)[y]
    assert brier_score(p, y) == pytest.approx(float((p - one_hot).square().sum() / 500), abs=1e-6)
    assert brier_score(one_hot, y) == 0.0
    assert brier_score(one_hot.roll(1, -1), y) == 2.0


@pytest.mark.parametrize("num_bins", [1, 5, 15])
def test_calibration_error_is_that_of_sklearns_bins(predicted, num_bins):
    from sklearn.calibration import calibration_curve

    p, y = predicted
    confidence, guess = p.double().max(-1)
    right = (guess == y).double()
    observed, stated = calibration_curve(right, confidence, n_bins=num_bins)
    counts = torch.histc(confidence, num_bins, 0, 1).numpy()
    counts = counts[counts > 0] / 500
    expected = float((counts * abs(observed - stated)).sum())
    assert expected_calibration_error(p, y, num_bins) == pytest.approx(expected, abs=1e-9)


def test_a_calibrated_forecast_has_a_small_error_and_a_boastful_one_a_large():
    torch.manual_seed(0)
    p = torch.rand(50_000, 3).softmax(-1)
    y = torch.multinomial(p, 1)[:, 0]
    assert expected_calibration_error(p, y) < 0.01
    sharp = torch.nn.functional.one_hot(p.argmax(-1), 3).float()
    assert expected_calibration_error(sharp, y) > 0.5


def test_bins_side_by_side_do_not_cancel():
    """Too sure by .95 in one bin and too modest by .15 in the next one, for any place of both."""
    for high, low in ((0.95, 0.85), (0.75, 0.65)):
        p = torch.tensor([[high, 1 - high], [low, 1 - low]])
        found = expected_calibration_error(p, torch.tensor([1, 0]), 10)
        assert found == pytest.approx((high + 1 - low) / 2, abs=1e-6)


def test_a_certain_forecast_falls_into_the_last_bin():
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert expected_calibration_error(p, torch.tensor([0, 0, 1])) == 0.0
    assert expected_calibration_error(p, torch.tensor([1, 1, 0])) == 1.0


@pytest.mark.parametrize("score", [accuracy, brier_score, expected_calibration_error])
@pytest.mark.parametrize(
    ("p", "y", "words"),
    [
        (torch.ones(3) / 3, torch.tensor([0, 1, 2]), r"\(N, C\)"),
        (torch.ones(2, 2) / 2, torch.tensor([0]), r"\(N, C\)"),
        (torch.ones(0, 2), torch.zeros(0).long(), "at least one"),
        (torch.ones(2, 2), torch.tensor([0, 1]), "sum to one"),
        (torch.tensor([[-0.5, 1.5]]), torch.tensor([0]), "negative"),
        (torch.tensor([[torch.nan, 1.0]]), torch.tensor([0]), "NaN"),
        (torch.ones(1, 2) / 2, torch.tensor([-1]), "missing"),
        (torch.ones(1, 2) / 2, torch.tensor([2]), "0 to 1"),
        (torch.ones(1, 2) / 2, torch.tensor([0.0]), "class numbers"),
    ],
)
def test_scores_refuse_what_is_no_forecast(score, p, y, words):
    with pytest.raises(ValueError, match=words):
        score(p, y)


def test_calibration_error_needs_a_bin():
    with pytest.raises(ValueError, match="num_bins"):
        expected_calibration_error(torch.ones(1, 2) / 2, torch.tensor([0]), 0)


@pytest.mark.parametrize("method", ["model", "guide"])
def test_another_number_of_classes_than_the_pairs_own_is_refused(method):
    with pytest.raises(ValueError, match="has 3 classes"):
        class_probabilities(M2(6, 3, 2, units=8), torch.zeros(4, 6), method=method, num_classes=2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_labels_of_narrow_integers_are_refused(dtype):
    pair = M2(6, 3, 2, units=8)
    with pytest.raises(TypeError, match="int64"):
        pair.sample(4, torch.zeros(4, dtype=dtype))
