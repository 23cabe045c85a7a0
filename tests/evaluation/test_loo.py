"""Draws that PSIS resamples stand for the posterior, and leave-one-out by them is right."""

import math
import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from gaussian_pairs import local_pair, shared_elpd, shared_guide, shared_model, shared_posterior

from pyroboost import Cascade, _arviz
from pyroboost.evaluation.inference_data import to_arviz
from pyroboost.evaluation.loo import psis_loo
from pyroboost.models import GMM, VAE


def tensor(variable):
    return torch.as_tensor(np.array(variable.values))


def _likelihood(pair, h, x):
    from pyroboost.contexts import service
    from pyroboost.handlers import given

    with service(pair):
        trace = pyro.poutine.trace(given(pair.model, {pair.hidden: h})).get_trace(x)
        trace.compute_log_prob()
    return trace.nodes[pair.visible]["log_prob"]


class TestResampling:
    def test_each_datum_is_resampled_apart(self):
        x = torch.linspace(-2, 2, 20, dtype=torch.float64)
        pair = local_pair(1.2, 0.3)
        plain = to_arviz(pair, x, num_samples=1000, prior=False)
        found = to_arviz(pair, x, num_samples=1000, prior=False, resample=True)
        off = plain["posterior"]["z"].values[0].mean(0) - x.numpy() / 2
        right = found["posterior"]["z"].values[0]
        assert np.abs(off).min() > 0.2
        assert np.abs(right.mean(0) - x.numpy() / 2).max() < 0.09
        assert np.abs(right.std(0) - math.sqrt(0.5)).max() < 0.06
        assert found["posterior"].attrs["resampled"] == "PSIS"
        assert "log_weight" not in found["sample_stats"].data_vars

    def test_all_groups_are_resampled_alike(self):
        x = torch.randn(6, dtype=torch.float64)
        found = to_arviz(local_pair(0.8), x, num_samples=60, resample=True)
        z = tensor(found["posterior"]["z"])[0]
        likelihood = dist.Normal(z, 1.0).log_prob(x)
        torch.testing.assert_close(tensor(found["log_likelihood"]["x"])[0], likelihood)
        log_q = dist.Normal(x / 2, 0.8 * math.sqrt(0.5)).log_prob(z)
        torch.testing.assert_close(tensor(found["sample_stats"]["log_q"])[0], log_q)

    def test_wide_hidden_values_stay_together(self):
        pair = Cascade(VAE(6, 3, units=8), GMM(2, 3))
        x = torch.bernoulli(torch.full((5, 6), 0.5))
        found = to_arviz(pair, x, num_samples=40, resample=True)
        z = tensor(found["posterior"]["0.z"])[0]
        expected = torch.stack([_likelihood(pair[0], h, x) for h in z])
        torch.testing.assert_close(tensor(found["log_likelihood"]["x"])[0], expected)

    def test_shared_hidden_values_move_together(self):
        x = torch.randn(10, dtype=torch.float64) + 1
        found = to_arviz(
            (shared_model, shared_guide(1.4)), x, num_samples=1500, prior=False, resample=True
        )
        loc, scale = shared_posterior(x)
        mean = found["posterior"]["mean"].values
        assert abs(mean.mean() - float(loc)) < 0.03
        assert abs(mean.std() / scale - 1) < 0.06


class TestLeaveOneOut:
    @pytest.mark.parametrize("width", [1.0, 1.5])
    def test_shared_mean_in_closed_form(self, width):
        x = torch.randn(20, dtype=torch.float64) + 1
        found = psis_loo((shared_model, shared_guide(width)), x, num_samples=1000)
        value, error = _arviz.elpd(found)
        assert abs(value - float(shared_elpd(x))) < 0.15
        assert 0 < error < 5
        assert found.n_data_points == 20

    def test_draws_of_a_wide_guide_as_they_are_would_be_wrong(self):
        x = torch.randn(20, dtype=torch.float64) + 1
        draws = to_arviz((shared_model, shared_guide(3.0)), x, num_samples=1000, prior=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")
            raw, _ = _arviz.elpd(_arviz.loo(draws, "x"))
        found, _ = _arviz.elpd(psis_loo((shared_model, shared_guide(3.0)), x, num_samples=1000))
        exact = float(shared_elpd(x))
        assert abs(found - exact) < 0.3
        assert abs(raw - exact) > 3

    def test_resampled_draws_serve_arviz_directly(self):
        x = torch.randn(20, dtype=torch.float64) + 1
        found = to_arviz(
            (shared_model, shared_guide(1.5)), x, num_samples=1000, prior=False, resample=True
        )
        value, _ = _arviz.elpd(arviz.loo(found, var_name="x", reff=1.0))
        assert abs(value - float(shared_elpd(x))) < 0.15
