"""Weights are averaged, counted and resampled as written on the natural scale."""

import math

import pytest
import torch
from scipy.stats import chi2

from pyroboost.sampling import effective_sample_size, log_mean_exp, normalised_weights, resample


def test_log_mean_exp_is_the_natural_scale_mean_with_its_standard_error():
    weights = torch.rand(50, 3, dtype=torch.float64) + 0.1
    estimate = log_mean_exp(weights.log() - 700.0)
    standard_error = weights.std(0) / math.sqrt(50) / weights.mean(0)
    torch.testing.assert_close(estimate.value, weights.mean(0).log() - 700.0)
    torch.testing.assert_close(estimate.std_error, standard_error)
    torch.testing.assert_close(estimate.ess, weights.sum(0) ** 2 / (weights**2).sum(0))
    torch.testing.assert_close(effective_sample_size(weights.log()), estimate.ess)
    torch.testing.assert_close(normalised_weights(weights.log()), weights / weights.sum(0))


def test_standard_error_covers_the_truth_as_often_as_it_says():
    # Gaussian weights exp(x - 1/2) have mean 1; two standard errors cover about 95%.
    log_weights = torch.randn(500, 2000, dtype=torch.float64) - 0.5
    estimate = log_mean_exp(log_weights)
    covered = ((estimate.value.exp() - 1).abs() < 2 * estimate.std_error).double().mean()
    assert 0.90 < float(covered) < 0.97
    halved = ((estimate.value.exp() - 1).abs() < estimate.std_error).double().mean()
    assert float(halved) < 0.75


def test_columns_without_weight_and_single_samples_do_not_pretend_to_know_an_error():
    estimate = log_mean_exp(torch.tensor([[-math.inf, 0.0], [-math.inf, 0.0]]))
    assert estimate.value.tolist() == [-math.inf, 0.0]
    assert estimate.ess.tolist() == [0.0, 2.0]
    assert estimate.std_error.isnan().tolist() == [True, False]
    single = log_mean_exp(torch.tensor([-3.0]))
    assert single.value.item() == -3.0
    assert single.std_error.isnan()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(bad):
    for function in (log_mean_exp, effective_sample_size, normalised_weights, resample):
        with pytest.raises(ValueError, match="NaN or plus infinity"):
            function(torch.tensor([0.0, bad]))
    with pytest.raises(ValueError, match="at least one sample"):
        log_mean_exp(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="every weight of one column is zero"):
        normalised_weights(torch.full((2, 1), -math.inf))
    with pytest.raises(ValueError, match="'multinomial' or 'systematic'"):
        resample(torch.zeros(2), method="residual")
    with pytest.raises(ValueError, match="at least one draw"):
        resample(torch.zeros(2), 0)


@pytest.mark.parametrize("method", ["multinomial", "systematic"])
def test_indices_are_drawn_in_proportion_and_repeat_with_the_generator(method):
    log_weights = torch.tensor([[0.1, 0.0], [0.2, 0.7], [0.0, 0.1], [0.7, 0.2]]).log()
    indices = resample(log_weights, 20_000, method=method, generator=torch.manual_seed(3))
    again = resample(log_weights, 20_000, method=method, generator=torch.manual_seed(3))
    assert indices.shape == (20_000, 2)
    assert torch.equal(indices, again)
    for column in range(2):
        counts = torch.bincount(indices[:, column], minlength=4).double()
        expected = 20_000 * log_weights[:, column].double().exp()
        assert (counts[expected == 0] == 0).all()
        used = expected > 0
        statistic = float(((counts - expected)[used] ** 2 / expected[used]).sum())
        assert chi2.sf(statistic, int(used.sum()) - 1) > 1e-3
        wrong = expected.roll(1) + 1.0
        assert chi2.sf(float(((counts - wrong) ** 2 / wrong).sum()), 3) < 1e-9


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
@pytest.mark.parametrize("method", ["multinomial", "systematic"])
def test_samples_without_weight_are_never_drawn(monkeypatch, method, uniform):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, **_: self.fill_(uniform))
    log_weights = torch.tensor([-math.inf, 0.3, 0.1, -math.inf])
    indices = resample(log_weights, 7, method=method)
    assert set(indices.tolist()) <= {1, 2}


def test_systematic_counts_are_the_expected_ones_rounded():
    log_weights = torch.randn(30, 5)
    indices = resample(log_weights, 40, method="systematic")
    expected = 40 * normalised_weights(log_weights.double())
    for column in range(5):
        counts = torch.bincount(indices[:, column], minlength=30)
        assert ((counts - expected[:, column]).abs() < 1 + 1e-9).all()
    assert resample(log_weights).shape == (30, 5)
