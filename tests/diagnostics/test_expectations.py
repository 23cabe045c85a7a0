"""Corrected averages against the exact posterior, and against the weights' own arithmetic."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import SD, guide, local_guide, local_model, model
from pyro.infer.autoguide import AutoNormal
from scipy import stats

from pyroboost import MetaModel
from pyroboost.diagnostics import psis_expectation
from pyroboost.diagnostics.expectations import weighted_quantiles

X = torch.tensor([2.0, -1.0], dtype=torch.float64)


class TestMoments:
    @pytest.mark.parametrize(("width", "shift"), [(1.0, 0.0), (1.4, 0.0), (1.2, 0.3)])
    def test_posterior_moments_of_a_wrong_guide(self, width, shift):
        found = psis_expectation((model, guide(width, shift)), "z", X, num_samples=800)
        assert bool(((found.mean - X / 2).abs() < 4.5 * found.std_error).all())
        assert bool(((found.sd - SD).abs() < 4.5 * found.sd_error).all())
        exact = torch.as_tensor(stats.norm.ppf(found.levels)) * SD
        error = (found.quantiles - (X / 2 + exact[:, None])).abs().max()
        assert float(error) < 0.15
        plain = 4.5 * width * SD / math.sqrt(800)
        assert bool(((found.guide_mean - X / 2 - shift).abs() < plain).all())
        assert bool(((found.guide_sd - width * SD).abs() < plain).all())
        if shift:
            assert bool(((found.shift + shift / SD).abs() < 0.2).all())

    def test_error_is_that_of_repeated_runs(self):
        runs = [psis_expectation((model, guide(1.3)), "z", X, num_samples=40) for _ in range(40)]
        means = torch.stack([run.mean for run in runs])
        reported = torch.stack([run.std_error for run in runs]).mean(0)
        assert bool(((means.std(0) / reported - 1).abs() < 0.35).all())
        sds = torch.stack([run.sd for run in runs]).std(0)
        reported = torch.stack([run.sd_error for run in runs]).mean(0)
        assert bool(((sds / reported - 1).abs() < 0.4).all())

    def test_exact_guide_gives_the_plain_average(self):
        found = psis_expectation((model, guide()), "z", X, num_samples=100)
        torch.testing.assert_close(found.mean, found.guide_mean)
        torch.testing.assert_close(found.sd, found.guide_sd)
        torch.testing.assert_close(found.std_error, found.guide_sd * math.sqrt(0.99 / 100))
        assert found.weight_pareto_k.tolist() == [-math.inf]
        assert float(found.ess) == pytest.approx(100)

    def test_deviation_of_equal_weights_is_the_sample_deviation(self):
        found = psis_expectation((model, guide()), {"sum": lambda d: d["z"].sum()}, X)["sum"]
        assert float((found.sd / 1.0 - 1).abs()) < 0.1
        values = torch.randn(7, 1, 1, dtype=torch.float64)
        got = weighted_quantiles(values, torch.full_like(values, 1 / 7), [0.3])
        assert float(got) == pytest.approx(np.quantile(values.numpy(), 0.3, method="hazen"))


class TestFunctions:
    def test_several_functions(self):
        def square(draw):
            return draw["z"].square().sum()

        found = psis_expectation((model, guide(1.2)), [square, "z"], X, num_samples=800)
        exact = float((X / 2).square().sum()) + 1.0
        assert abs(float(found["square"].mean) - exact) < 4.5 * float(found["square"].std_error)
        assert found["z"].mean.shape == (2,)
        assert list(psis_expectation((model, guide()), None, X, num_samples=30)) == ["z"]

    def test_k_of_a_function_can_be_larger_than_that_of_the_weights(self):
        # w h = exp(2 z^2) has k = 4 SD^2 under the exact guide, where w alone is constant.
        found = psis_expectation(
            (model, guide()), lambda d: (0.8 * d["z"][0] ** 2).exp(), torch.zeros(2).double()
        )
        assert found.weight_pareto_k.tolist() == [-math.inf]
        assert float(found.pareto_k) > 0.5
        assert found.name == "<lambda>"
        assert "w|h|" in found.describe()

    def test_constrained_sites_of_an_autoguide(self):
        def scale(x):
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.LogNormal(s.log(), 1.0), obs=x)

        x = torch.tensor(math.e)
        auto = AutoNormal(scale, init_scale=0.9)
        found = psis_expectation((scale, auto), "s", x, num_samples=800)
        exact = math.exp(0.5 + 0.25)  # log s is N(1/2, 1/2)
        assert abs(float(found.mean) - exact) < 4.5 * float(found.std_error)
        assert float(found.quantiles[2]) == pytest.approx(math.exp(0.5), rel=0.15)
        assert bool((found.quantiles > 0).all())

    def test_each_datum_has_its_own_weights(self):
        x = torch.linspace(-2, 2, 5, dtype=torch.float64)
        pair = MetaModel(local_model, local_guide(1.3), visible="x", hidden="z")
        for judged in (pair, (local_model, local_guide(1.3))):
            found = psis_expectation(judged, "z", x, num_samples=700)
            assert found.weight_pareto_k.shape == found.ess.shape == found.mean.shape == (5,)
            assert bool(((found.mean - x / 2).abs() < 4.5 * found.std_error).all())
            assert bool(((found.sd - SD).abs() < 4.5 * found.sd_error).all())


class TestRefusals:
    def test_unknown_site(self):
        with pytest.raises(ValueError, match="no site 'w'; the model has 'z'"):
            psis_expectation((model, guide()), "w", X, num_samples=30)

    def test_one_name_for_two(self):
        with pytest.raises(ValueError, match="one name"):
            psis_expectation((model, guide()), [lambda d: 1, lambda d: 2], X, num_samples=30)

    def test_function_without_rows(self):
        with pytest.raises(ValueError, match="return one row per datum"):
            psis_expectation(
                (local_model, local_guide()), lambda d: d["z"].sum(), X, num_samples=30
            )

    def test_nan(self):
        with pytest.raises(ValueError, match="is NaN at some draw"):
            psis_expectation((model, guide()), lambda d: d["z"].log(), X, num_samples=30)

    def test_levels(self):
        with pytest.raises(ValueError, match="between 0 and 1"):
            psis_expectation((model, guide()), "z", X, num_samples=30, levels=[5])

    def test_no_weight(self):
        def far(x):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.factor("edge", torch.where((z > 50).all(), 0.0, -math.inf))

        with pytest.raises(ValueError, match="every weight of a datum is zero"):
            psis_expectation((far, guide()), "z", X, num_samples=30)
