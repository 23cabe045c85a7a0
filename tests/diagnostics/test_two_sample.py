"""Distances against closed forms, tests against their size and power."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from pyroboost.diagnostics.two_sample import classifier_test, distance, sliced_wasserstein


class TestSlicedWasserstein:
    @pytest.mark.parametrize("size", [1, 2, 5])
    def test_shifted_gaussians(self, size):
        a = torch.randn(1000, size, dtype=torch.float64)
        shift = torch.linspace(0.5, 2.0, size, dtype=torch.float64)
        # The same draws moved: every projection moves by u.m, and E (u.m)^2 = |m|^2 / D.
        found = sliced_wasserstein(a, a + shift, num_projections=2000)
        assert found == pytest.approx(float(shift.norm()) / math.sqrt(size), rel=0.05)
        fresh = torch.randn(1000, size, dtype=torch.float64) + shift
        found = sliced_wasserstein(a, fresh, num_projections=500)
        assert found == pytest.approx(float(shift.norm()) / math.sqrt(size), rel=0.1)

    def test_scaled_gaussians(self):
        # W2(N(0, 1), N(0, s^2)) = |s - 1| in one dimension, and so along every direction.
        a, b = torch.randn(20000, 3), 2.5 * torch.randn(20000, 3)
        assert sliced_wasserstein(a, b) == pytest.approx(1.5, rel=0.05)

    def test_one_dimension_of_unequal_sizes(self):
        a, b = torch.rand(300, 1), 5 + torch.rand(900, 1)  # far apart: W1 is close to W2
        other = wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy())
        assert sliced_wasserstein(a, b) == pytest.approx(other, rel=0.01)
        assert sliced_wasserstein(a, b) == pytest.approx(sliced_wasserstein(b, a))
        assert sliced_wasserstein(a, a[torch.randperm(300)]) == 0.0

    def test_null_level(self):
        same = distance(torch.randn(1000, 2), torch.randn(1000, 2))
        assert 0.5 < same.value / same.null < 2.0
        assert same.null <= same.null_largest
        moved = distance(torch.randn(1000, 2) + 0.5, torch.randn(1000, 2))
        assert moved.value > 3 * moved.null_largest

    def test_null_level_of_a_chain_that_mixes_slowly_is_higher(self):
        noise, chain = torch.randn(1000), [torch.tensor(0.0)]
        for e in noise:
            chain.append(0.95 * chain[-1] + math.sqrt(1 - 0.95**2) * e)
        slow = torch.stack(chain)[:, None]
        draws = torch.randn(1000, 1)
        assert distance(draws, slow).null > 2 * distance(draws, noise[:, None]).null


class TestClassifier:
    def test_size(self):
        cheap = KNeighborsClassifier(15)
        p = [
            classifier_test(torch.randn(60, 2), torch.randn(60, 2), classifier=cheap).p_value
            for _ in range(150)
        ]
        # At most 0.05, less by the union bound; the binomial error of 150 runs is 0.018.
        assert 0.0 < np.mean(np.array(p) < 0.05) < 0.05 + 4 * 0.018
        assert np.mean(np.array(p) < 0.2) < 0.2 + 4 * 0.033

    @pytest.mark.parametrize(
        "change",
        [
            lambda z: z + 0.7,
            lambda z: 1.8 * z,
            lambda z: torch.stack([z[:, 0], 0.9 * z[:, 0] + math.sqrt(0.19) * z[:, 1]], 1),
            lambda z: torch.where(z > 0, z.abs() + 1, -z.abs() - 1),
        ],
        ids=["moved", "wide", "correlated", "two modes"],
    )
    def test_power_where_forests_can_see(self, change):
        found = classifier_test(torch.randn(400, 2), change(torch.randn(400, 2)))
        assert found.p_value < 1e-3
        assert found.auc > 0.55
        assert found.accuracy > 0.53

    def test_auc_of_shifted_gaussians(self):
        found = classifier_test(
            torch.randn(2000, 1), torch.randn(2000, 1) + 1.0, classifier=LogisticRegression()
        )
        # P(z' > z) = Phi(1 / sqrt 2) for the best rule, whose accuracy is Phi(1 / 2).
        assert found.auc == pytest.approx(0.7602, abs=0.03)
        assert found.accuracy == pytest.approx(0.6915, abs=0.03)
        assert found.num_draws == 2000

    def test_sets_of_unequal_sizes_are_balanced(self):
        found = classifier_test(torch.randn(40, 2), torch.randn(700, 2))
        assert found.num_draws == 40
        assert found.p_value > 1e-3


@pytest.mark.parametrize("call", [sliced_wasserstein, classifier_test])
def test_refusals(call):
    good = torch.randn(30, 2)
    with pytest.raises(ValueError, match=r"pass \(S, D\) and \(R, D\)"):
        call(good, torch.randn(30, 3))
    with pytest.raises(ValueError, match="NaN or infinite"):
        call(good, good / 0)
    with pytest.raises(ValueError, match="there is nothing"):
        call(good[:0], good[:0])


def test_too_few_draws():
    with pytest.raises(ValueError, match="too few; pass at least 20"):
        classifier_test(torch.randn(10, 2), torch.randn(100, 2))
