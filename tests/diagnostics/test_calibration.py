"""Calibration: right guides pass, narrow and biased ones show the shape that they must."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import guide, local_guide, local_model, model
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from scipy import stats

from pyroboost import MetaModel
from pyroboost.diagnostics import _uniformity, vsbc

X = torch.zeros(2, dtype=torch.float64)


def run(*wrong, replicates=150):
    return vsbc((model, guide(*wrong)), X, replicates=replicates, num_samples=20)


class TestShapes:
    def test_exact_guide_passes(self):
        found = run()
        assert float(found.symmetry["z"].min()) > 0.01
        assert float(found.uniformity["z"].min()) > 0.01
        assert float((found.spread["z"] - 1).abs().max()) < 0.3

    def test_narrow_guide_is_symmetric_and_a_u(self):
        found = run(0.4)
        assert float(found.symmetry["z"].min()) > 0.01
        assert float(found.uniformity["z"].max()) < 0.005
        # The probability is Phi(r u) with u normal and r = 1 / 0.4.
        exact = 12 * float((stats.norm.cdf(stats.norm.rvs(size=10**6, random_state=0) / 0.4)).var())
        assert float((found.spread["z"] - exact).abs().max()) < 0.3
        assert exact > 1.8

    def test_wide_guide_is_a_hill(self):
        found = run(2.5)
        assert float(found.spread["z"].max()) < 0.6
        assert float(found.uniformity["z"].max()) < 0.005

    def test_biased_guide_is_asymmetric(self):
        found = run(1.0, 0.5)
        assert float(found.symmetry["z"].max()) < 1e-3
        exact = stats.norm.cdf(-0.5 / 1.0) - 0.5  # z - z' has variance 1/2 + 1/2
        assert float((found.shift["z"] - exact).abs().max()) < 5 / math.sqrt(12 * 150)

    def test_local_latents_of_a_meta_model(self):
        pair = MetaModel(local_model, local_guide(), visible="x", hidden="z")
        found = vsbc(pair, torch.zeros(3, dtype=torch.float64), replicates=60, num_samples=20)
        assert found.probabilities["z"].shape == found.truth["z"].shape == (60, 3)
        assert float(found.uniformity["z"].min()) > 0.003

    def test_ties_of_discrete_sites_are_uniform_too(self):
        def coin(x):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)
            return z

        def same(x):
            pyro.sample("z", dist.Bernoulli(0.3))

        found = vsbc((coin, same), torch.tensor(0.0), replicates=200, num_samples=10)
        assert stats.kstest(found.probabilities["z"].numpy(), "uniform").pvalue > 0.01


def fitted(x):
    auto = AutoNormal(model, init_scale=0.5)
    svi = SVI(model, auto, Adam({"lr": 0.2}), Trace_ELBO())
    for _ in range(10):
        svi.step(x)
    return auto


class TestFits:
    def test_every_fit_is_fresh_and_the_store_is_left(self):
        pyro.param("mine", torch.tensor(3.0))
        seen = []

        def fit(x):
            auto = fitted(x)
            seen.append((float((auto.median()["z"] - x / 2).abs().max()), float(x.abs().sum())))
            return auto

        found = vsbc(model, torch.zeros(2), fit=fit, replicates=10, num_samples=10)
        assert list(pyro.get_param_store()) == ["mine"]
        assert float(pyro.param("mine").detach()) == 3.0
        assert len({data for _, data in seen}) == 10
        assert found.probabilities["z"].shape == (10, 2)

    def test_params_of_one_fit_do_not_reach_the_next(self):
        starts = []

        def fit(x):
            loc = pyro.param("loc", torch.zeros(2))
            starts.append(float(loc.detach().abs().sum()))
            with torch.no_grad():
                loc.add_(5.0)

            def guide(x):
                pyro.sample("z", dist.Normal(pyro.param("loc"), 1.0).to_event(1))

            return guide

        found = vsbc(model, torch.zeros(2), fit=fit, replicates=10, num_samples=20)
        assert starts == [0.0] * 10
        # The guide drew at 5, while the truth is standard normal.
        assert float(found.probabilities["z"].mean()) < 0.1

    def test_data_are_found_among_the_arguments(self):
        def regression(design, y):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("n", len(design)):
                pyro.sample("y", dist.Normal(w * design, 1.0), obs=y)

        def solve(design, y):
            variance = 1 / (1 + (design**2).sum())
            pyro.sample("w", dist.Normal(variance * (design * y).sum(), variance.sqrt()))

        design = torch.tensor([1.0, 2.0, -1.0])
        found = vsbc((regression, solve), design, torch.ones(3), replicates=100, num_samples=30)
        assert float(found.uniformity["w"]) > 0.01

    def test_rebuilt_arguments(self):
        def series(y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for t in range(2):
                pyro.sample(f"y{t}", dist.Normal(z, 1.0), obs=y[t])

        def solve(y):
            pyro.sample("z", dist.Normal(y.sum() / 3, 3**-0.5))

        with pytest.raises(ValueError, match="'y0' is 0 of the arguments"):
            vsbc((series, solve), torch.randn(2))
        found = vsbc(
            (series, solve),
            torch.zeros(2),
            replicates=80,
            num_samples=30,
            rebuild=lambda sites: (torch.stack([sites["y0"], sites["y1"]]),),
        )
        assert float(found.uniformity["z"]) > 0.01


class TestTests:
    def test_symmetry_is_exact(self):
        # All signs of ten values, as likely as each other: p-values by counting.
        offsets = np.linspace(0.05, 0.4, 8)
        signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
        distances = []
        for row in signs:
            p = 0.5 + row * offsets
            grid = np.concatenate([p, 1 - p])
            f, g = ((v[:, None] <= grid + 1e-12).mean(0) for v in (p, 1 - p))
            distances.append(np.abs(f - g).max())
        distances = np.array(distances)
        for row, d in list(zip(signs, distances, strict=True))[::17]:
            counted = (distances >= d - 1e-9).mean()
            assert _uniformity.symmetry(0.5 + row * offsets) == pytest.approx(counted)

    def test_uniformity_has_the_size_it_says(self):
        rng = np.random.default_rng(7)
        p = np.array([_uniformity.uniformity(rng.uniform(size=80)) for _ in range(400)])
        for level in (0.05, 0.2):
            assert abs((p <= level).mean() - level) < 4.5 * math.sqrt(level * (1 - level) / 400)

    def test_band_holds_a_uniform_ecdf(self):
        rng = np.random.default_rng(5)
        z, low, high = _uniformity.band(100)
        inside = 0
        for _ in range(400):
            ecdf = (rng.uniform(size=100)[:, None] <= z).mean(0)
            inside += bool(((ecdf >= low - 1e-12) & (ecdf <= high + 1e-12)).all())
        assert abs(inside / 400 - 0.95) < 0.05


class TestResult:
    def test_words_picture_and_container(self):
        import matplotlib.pyplot as plt

        found = run(replicates=40)
        text = found.describe()
        for part in ("40 data sets", "20 draws", "too narrow", "dependence between parameters"):
            assert part in text
        figure = found.plot()
        assert len(figure.axes) == 4
        plt.close(figure)
        container = found.to_arviz()
        assert container["prior"]["z"].shape == (1, 40, 2)
        values = container["sample_stats_prior"]["z"].values[0]
        np.testing.assert_array_equal(values, found.probabilities["z"].numpy())

    def test_refusals(self):
        with pytest.raises(TypeError, match="without fit="):
            vsbc(model, X)
        with pytest.raises(TypeError, match="with fit="):
            vsbc((model, guide()), X, fit=fitted)
        with pytest.raises(ValueError, match="at least ten data sets"):
            vsbc((model, guide()), X, replicates=5)
        with pytest.raises(ValueError, match="name sites that both draw"):
            vsbc((model, guide()), X, sites=["w"], replicates=10, num_samples=5)

        def energy(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("e", -(z**2))

        with pytest.raises(ValueError, match=r"scores 'e' by pyro.factor"):
            vsbc((energy, guide()), X)
