"""What chains say of their mixing, against ArviZ on the same numbers."""

import arviz
import pytest
import torch

from pyroboost.sampling.chains import Chains


def chains(values, density=None):
    density = values.flatten(2).sum(-1) if density is None else density
    return Chains(values, density, "metropolis", 0.5, False, "for a reason", "v")


def test_ess_and_r_hat_are_those_of_arviz():
    values = torch.randn(4, 60, 2, 3).cumsum(1) * 0.1 + torch.randn(4, 60, 2, 3)
    found = chains(values)
    one = values[:, :, 1, 2].double().numpy()
    assert found.ess.shape == found.r_hat.shape == (2, 3)
    assert float(found.ess[1, 2]) == pytest.approx(float(arviz.ess(one)), rel=1e-6)
    assert float(found.r_hat[1, 2]) == pytest.approx(float(arviz.rhat(one)), rel=1e-6)
    density = found.log_density.double().numpy()
    assert found.ess_log_density == pytest.approx(float(arviz.ess(density)), rel=1e-6)
    assert found.r_hat_log_density == pytest.approx(float(arviz.rhat(density)), rel=1e-6)


def test_coordinates_that_never_move_and_chains_that_are_too_short_have_no_number():
    values = torch.cat([torch.randn(4, 20, 1), torch.zeros(4, 20, 1)], -1)
    assert chains(values).r_hat.isnan().tolist() == [False, True]
    assert chains(torch.randn(4, 3, 2)).ess.isnan().all()


def test_draws_and_groups_keep_chains_and_draws():
    values = torch.arange(24.0).reshape(2, 4, 3)
    found = chains(values)
    assert torch.equal(found.draws, values.reshape(8, 3))
    data = found.to_arviz()
    assert data["posterior"]["v"].dims == ("chain", "draw", "v_dim_0")
    assert (data["posterior"]["v"].values == values.numpy()).all()
    assert (data["sample_stats"]["lp"].values == found.log_density.numpy()).all()
    assert "approximate: for a reason" in found.describe()
