"""ArviZ's container, whichever ArviZ is installed: groups, dimensions, densities, netCDF."""

import math

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gaussian_pairs import (
    local_evidence,
    local_guide,
    local_model,
    local_pair,
    shared_guide,
    shared_model,
)
from pyro.infer.autoguide import AutoNormal

from pyroboost import Cascade, MetaModel, _arviz
from pyroboost.evaluation import _groups
from pyroboost.evaluation.inference_data import to_arviz
from pyroboost.evaluation.weights import log_weights
from pyroboost.models import GMM, VAE

GROUPS = {
    "posterior",
    "prior",
    "posterior_predictive",
    "prior_predictive",
    "log_likelihood",
    "observed_data",
    "sample_stats",
}


def groups(found):
    return set(found.children if hasattr(found, "children") else found.groups())


def tensor(variable):
    return torch.as_tensor(np.array(variable.values))


class TestGroups:
    def test_function_pair(self):
        x = torch.randn(7, dtype=torch.float64)
        found = to_arviz(local_pair(0.8), x, num_samples=30)
        assert groups(found) == GROUPS
        for group in ("posterior", "prior"):
            assert found[group]["z"].dims == ("chain", "draw", "data")
            assert found[group]["z"].shape == (1, 30, 7)
        for group in ("posterior_predictive", "prior_predictive", "log_likelihood"):
            assert found[group]["x"].dims == ("chain", "draw", "data")
        assert found["observed_data"]["x"].dims == ("data",)
        np.testing.assert_array_equal(found["observed_data"]["x"].values, x.numpy())
        np.testing.assert_array_equal(found["posterior"]["data"].values, np.arange(7))

    def test_densities_are_those_of_the_draws(self):
        x = torch.randn(7, dtype=torch.float64)
        found = to_arviz(local_pair(0.8, 0.2), x, num_samples=30)
        z = tensor(found["posterior"]["z"])[0]
        likelihood = dist.Normal(z, 1.0).log_prob(x)
        log_p = likelihood + dist.Normal(0.0, 1.0).log_prob(z)
        log_q = dist.Normal(x / 2 + 0.2, 0.8 * math.sqrt(0.5)).log_prob(z)
        stats = found["sample_stats"]
        torch.testing.assert_close(tensor(found["log_likelihood"]["x"])[0], likelihood)
        torch.testing.assert_close(tensor(stats["log_p"])[0], log_p)
        torch.testing.assert_close(tensor(stats["log_q"])[0], log_q)
        torch.testing.assert_close(tensor(stats["log_weight"])[0], log_p - log_q)

    def test_weights_are_those_of_log_weights(self):
        pair = VAE(6, 2, units=8)
        x = torch.bernoulli(torch.full((5, 6), 0.5))
        weight = tensor(
            to_arviz(pair, x, num_samples=300, prior=False)["sample_stats"]["log_weight"]
        )[0]
        other = log_weights(pair, x, num_samples=300)
        error = ((weight.var(0) + other.var(0)) / 300).sqrt()
        assert bool(((weight.mean(0) - other.mean(0)).abs() < 4 * error + 1e-6).all())

    def test_prior_and_predictive_laws(self):
        x = torch.full((400,), 2.0)
        found = to_arviz(local_pair(), x, num_samples=50)
        moments = {
            ("prior", "z"): (0.0, 1.0),
            ("posterior", "z"): (1.0, math.sqrt(0.5)),
            ("prior_predictive", "x"): (0.0, math.sqrt(2.0)),
            ("posterior_predictive", "x"): (1.0, math.sqrt(1.5)),
        }
        for (group, name), (mean, std) in moments.items():
            values = found[group][name].values
            assert abs(values.mean() - mean) < 0.05
            assert abs(values.std() - std) < 0.05

    def test_predictive_can_be_left_out(self):
        found = to_arviz(local_pair(), torch.zeros(3), num_samples=5, predictive=False)
        assert groups(found) == GROUPS - {"posterior_predictive", "prior_predictive"}

    def test_cascade(self):
        cascade = Cascade(VAE(6, 3, units=8), VAE(3, 2, units=8, likelihood="gaussian"), GMM(2, 2))
        x = torch.bernoulli(torch.full((5, 6), 0.5))
        found = to_arviz(cascade, x, num_samples=20)
        assert groups(found) == GROUPS
        dims = {n: v.dims for n, v in found["posterior"].data_vars.items()}
        assert dims == {
            "0.z": ("chain", "draw", "data", "0.z_dim_1"),
            "1.z": ("chain", "draw", "data", "1.z_dim_1"),
            "2.component": ("chain", "draw", "data"),
        }
        assert found["prior"]["0.z"].shape == (1, 20, 5, 3)
        assert found["posterior_predictive"]["x"].shape == (1, 20, 5, 6)
        assert found["log_likelihood"]["x"].shape == (1, 20, 5)
        assert found["sample_stats"]["log_weight"].dims == ("chain", "draw", "data")
        z = tensor(found["posterior"]["0.z"])[0]
        expected = torch.stack([_likelihood(cascade[0], h, x) for h in z])
        torch.testing.assert_close(tensor(found["log_likelihood"]["x"])[0], expected)

    def test_no_r_hat_is_offered(self):
        import pyroboost.evaluation.inference_data as module

        assert "R-hat" in to_arviz.__doc__
        assert not [name for name in vars(module) if "rhat" in name.lower()]


def _likelihood(pair, h, x):
    from pyroboost.contexts import service
    from pyroboost.handlers import given

    with service(pair):
        trace = pyro.poutine.trace(given(pair.model, {pair.hidden: h})).get_trace(x)
        trace.compute_log_prob()
    return trace.nodes[pair.visible]["log_prob"]


def regression(features, y):
    """Regression with shared weights, a noise of its own for each datum and a computed value."""
    with pyro.plate("features", features.shape[1]):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    mean = pyro.deterministic("mean", features @ w)
    with pyro.plate("rows", len(features)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


class TestPrograms:
    def test_regression_with_an_autoguide(self):
        features, y = torch.randn(9, 3), torch.randn(9)
        guide = AutoNormal(regression)
        guide(features, y)
        found = to_arviz((regression, guide), features, y, num_samples=20)
        assert groups(found) == GROUPS | {"constant_data"}
        posterior, stats = found["posterior"], found["sample_stats"]
        assert set(posterior.data_vars) == {"w", "mean"}
        assert posterior["w"].dims == ("chain", "draw", "features")
        assert posterior["mean"].shape == (1, 20, 9)
        assert found["log_likelihood"]["y"].dims == ("chain", "draw", "rows")
        assert stats["log_p"].dims == ("chain", "draw")
        arg = found["constant_data"]["arg_features"]  # "features" is a dimension
        assert arg.dims == ("rows", "arg_features_dim_1")
        np.testing.assert_array_equal(arg.values, features.numpy())
        w = tensor(posterior["w"])[0]
        torch.testing.assert_close(tensor(posterior["mean"])[0], w @ features.T)
        expected = dist.Normal(w @ features.T, 1.0).log_prob(y)
        torch.testing.assert_close(tensor(found["log_likelihood"]["y"])[0], expected)
        prior = dist.Normal(0.0, 1.0).log_prob(w).sum(-1)
        torch.testing.assert_close(tensor(stats["log_p"])[0], expected.sum(-1) + prior)

    def test_nested_plates_name_their_dimensions(self):
        def model(x):
            with pyro.plate("data", 6, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(6, 1), 1.0))
                with pyro.plate("time", 3, dim=-1):
                    pyro.sample("x", dist.Normal(z, 1.0).expand([6, 3]), obs=x)

        def guide(x):
            with pyro.plate("data", 6, dim=-2):
                pyro.sample("z", dist.Normal(x.sum(-1, keepdim=True) / 4, 0.5))

        found = to_arviz((model, guide), torch.randn(6, 3), num_samples=30, resample=True)
        assert found["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_1")
        assert found["posterior_predictive"]["x"].dims == ("chain", "draw", "data", "time")
        assert found["log_likelihood"]["x"].dims == ("chain", "draw", "data")
        assert found["observed_data"]["x"].dims == ("data", "time")

    def test_latent_sites_without_a_guide_come_from_their_prior(self):
        def model(x):
            pyro.sample("free", dist.Normal(3.0, 0.1))
            local_model(x)

        found = to_arviz((model, local_guide()), torch.zeros(4), num_samples=40)
        assert abs(found["posterior"]["free"].values.mean() - 3.0) < 0.1
        spread = found["sample_stats"]["log_weight"].values.std()
        assert spread < 1e-5

    def test_factor_counts_and_is_no_data(self):
        def model(x):
            local_model(x)
            pyro.factor("bonus", torch.tensor(2.5))

        found = to_arviz((model, local_guide()), torch.zeros(1), num_samples=5)
        assert set(found["observed_data"].data_vars) == {"x"}
        expected = float(local_evidence(torch.zeros(1))) + 2.5
        np.testing.assert_allclose(found["sample_stats"]["log_weight"].values, expected, rtol=1e-5)

    def test_random_subsample_is_refused(self):
        def model(x):
            with pyro.plate("data", len(x), subsample_size=3) as rows:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

        def guide(x):
            with pyro.plate("data", len(x), subsample_size=3):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        with pytest.raises(ValueError, match="without a random subsample"):
            to_arviz((model, guide), torch.randn(10), num_samples=20)

    def test_no_draws(self):
        with pytest.raises(ValueError, match="num_samples is 0"):
            to_arviz(local_pair(), torch.zeros(3), num_samples=0)


class TestNetCDF:
    def test_cascade_round_trip(self, tmp_path):
        cascade = Cascade(VAE(6, 2, units=8), GMM(2, 2))
        found = to_arviz(cascade, torch.ones(5, 6), num_samples=10)
        path = tmp_path / "inference.nc"
        found.to_netcdf(str(path))
        read = arviz.from_netcdf(str(path))
        assert groups(read) == groups(found)
        for group in groups(found):
            assert set(read[group].data_vars) == set(found[group].data_vars)
            for name, variable in found[group].data_vars.items():
                assert read[group][name].dims == variable.dims
                np.testing.assert_array_equal(read[group][name].values, variable.values)
        assert read["posterior"].attrs["inference_library"] == "pyroboost"

    def test_slashes_and_bfloat16(self, tmp_path):
        values = torch.ones(3, 2, dtype=torch.bfloat16)
        group = {"net/z": _groups.Variable(values, ["net/z_dim_0"])}
        found = _arviz.container({"posterior": _groups.dataset("posterior", group, {})})
        found.to_netcdf(str(tmp_path / "a.nc"))
        read = arviz.from_netcdf(str(tmp_path / "a.nc"))
        assert read["posterior"]["net.z"].dims == ("chain", "draw", "net.z_dim_0")

    def test_boolean_and_integer_sites(self, tmp_path):
        def model(x):
            with pyro.plate("data", len(x)):
                h = pyro.sample("h", dist.Bernoulli(0.3))
                pyro.sample("x", dist.Poisson(1 + h), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("h", dist.Bernoulli(0.5))

        pair = MetaModel(model, guide, visible="x", hidden="h")
        found = to_arviz(pair, torch.tensor([0.0, 1.0, 2.0]), num_samples=5)
        found.to_netcdf(str(tmp_path / "a.nc"))


class TestAdapter:
    def test_weights_are_smoothed_with_the_right_sign(self):
        rows = 2 * torch.randn(3, 500, dtype=torch.float64).numpy()
        smoothed, k = _arviz.smooth(rows)
        assert smoothed.shape == (3, 500)
        assert k.shape == (3,)
        np.testing.assert_allclose(np.exp(smoothed).sum(-1), 1.0)
        assert (np.argmax(smoothed, -1) == np.argmax(rows, -1)).all()

    def test_version(self):
        assert _arviz.is_one() == (int(arviz.__version__.split(".")[0]) >= 1)

    def test_approximate_loo_only_where_there_is_one(self):
        x = torch.randn(20, dtype=torch.float64)
        draws = to_arviz((shared_model, shared_guide()), x, num_samples=100, predictive=False)
        assert (_arviz.loo_approximate(draws, "x") is None) != _arviz.is_one()

    def test_arviz_summarises_the_container(self):
        found = to_arviz(local_pair(), torch.zeros(3), num_samples=50)
        summary = arviz.summary(found["posterior"], kind="stats", round_to="none")
        assert len(summary) == 3
