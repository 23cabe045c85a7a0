"""Tea, its baselines, and the baselines on other bits."""

import math

import pytest
import torch
from sklearn.naive_bayes import BernoulliNB

from pyroboost.data import (
    TEA_LOG_LIKELIHOOD,
    independent_bernoulli_log_likelihood,
    tea,
    tea_images,
    uniform_log_likelihood,
)


def test_tea_is_all_ways_to_share_the_tea():
    images = tea_images()
    assert images.shape == (243, 100)
    assert len(images.unique(dim=0)) == 243
    assert (images.sum(1) == 50).all()
    assert set(images.unique().tolist()) == {0.0, 1.0}


def test_liquid_lies_at_the_bottom_of_every_vessel():
    pot, cups = tea_images().view(243, 10, 10).split(5, dim=2)
    for vessel in (pot, *cups.split(2, dim=1)):  # rows from the top
        levels = vessel.mean(2)
        assert set(levels.unique().tolist()) <= {0.0, 1.0}  # whole lines
        assert (levels.diff(dim=1) >= 0).all()  # no air below liquid


def test_tea_split_is_a_partition_by_seed():
    state = torch.get_rng_state()
    data = tea(seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    parts = torch.cat([data.train, data.validation, data.test])
    assert [len(p) for p in (data.train, data.validation, data.test)] == [81, 81, 81]
    assert torch.equal(parts.unique(dim=0), tea_images().unique(dim=0))
    assert torch.equal(tea(seed=3).test, data.test)
    assert not torch.equal(tea(seed=4).test, data.test)
    assert "seed 3" in repr(data)


def test_baselines_of_tea():
    images = tea_images()
    assert round(uniform_log_likelihood(100), 2) == -69.31
    assert round(TEA_LOG_LIKELIHOOD, 2) == -5.49
    fitted = independent_bernoulli_log_likelihood(images, images)
    assert fitted.kind == "exact"
    assert round(fitted.mean, 2) == -48.04
    held_out = []
    for seed in range(30):
        data = tea(seed=seed)
        bits = independent_bernoulli_log_likelihood(data.train, data.validation, smoothing=0.01)
        held_out.append(bits.mean)
    # The paper's split gave -49.27: an ordinary one among ours.
    assert min(held_out) < -49.27 < max(held_out)
    assert abs(sum(held_out) / 30 + 49.27) < 0.6


def test_independent_bernoulli_agrees_with_scikit_learn():
    train, test = (torch.rand(40, 6) < 0.3).float(), (torch.rand(9, 6) < 0.3).float()
    ours = independent_bernoulli_log_likelihood(train, test, smoothing=1.0)
    theirs = BernoulliNB(alpha=1.0, fit_prior=True).fit(train.numpy(), [0] * 40)
    expected = torch.as_tensor(theirs.predict_joint_log_proba(test.numpy()))[:, 0]
    assert torch.allclose(ours.value, expected, atol=1e-6)


def test_independent_bernoulli_takes_grey_levels_as_expectations():
    train, grey = torch.rand(20, 5), torch.rand(3, 5)
    bits = (torch.rand(20_000, 3, 5) < grey).float().view(-1, 5)
    sampled = independent_bernoulli_log_likelihood(train, bits).value.view(20_000, 3)
    expected = independent_bernoulli_log_likelihood(train, grey).value
    error = sampled.std(0) / math.sqrt(20_000)
    assert ((sampled.mean(0) - expected).abs() < 4 * error).all()


def test_a_pixel_that_never_varied_costs_minus_infinity():
    train, test = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    exact = independent_bernoulli_log_likelihood(train, test).value
    assert exact[0] == -math.inf
    assert math.isclose(float(exact[1]), math.log(0.5))
    assert independent_bernoulli_log_likelihood(train, test, smoothing=0.5).value.isfinite().all()


def test_baselines_refuse_what_they_cannot_score():
    good = torch.zeros(2, 3)
    for train, test in ((good, torch.zeros(2, 4)), (torch.zeros(0, 3), good), (good[0], good)):
        with pytest.raises(ValueError, match="rows of one length"):
            independent_bernoulli_log_likelihood(train, test)
    for train, test in ((good - 1, good), (good, good + 2), (good * math.nan, good)):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            independent_bernoulli_log_likelihood(train, test)
    with pytest.raises(ValueError, match="smoothing is -1"):
        independent_bernoulli_log_likelihood(good, good, smoothing=-1)
