"""Pareto k against closed-form tails and Pyro's own fit; smoothed weights against exact means."""

import math
import sys

import numpy as np
import pytest
import torch
from gaussian_pairs import local_guide, local_model
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights
from pyro.ops.stats import fit_generalized_pareto

from pyroboost.sampling.psis import good_k, pareto_k, psis, psis_resample


def narrow_weights(width, draws, data):
    """log p - log q for p = N(0, 1), q = N(0, width^2)."""
    z = width * torch.randn(draws, data, dtype=torch.float64)
    return -(z**2) / 2 + z**2 / (2 * width**2) + math.log(width)


class TestParetoK:
    @pytest.mark.parametrize("width", [0.5, 0.7, 0.9])
    def test_too_narrow_guide_has_the_tail_of_its_law(self, width):
        # w > t where z^2 > 2 log t / (1/width^2 - 1), so P(w > t) ~ t^(-1 / (1 - width^2)).
        k = pareto_k(narrow_weights(width, 20_000, 40))
        assert abs(float(k.mean()) - (1 - width**2)) < 0.06
        assert float(k.std()) < 0.12

    def test_too_wide_guide_has_bounded_weights(self):
        assert float(pareto_k(narrow_weights(1.5, 5000, 10)).max()) < 0.0

    @pytest.mark.parametrize("draws", [200, 2000])
    def test_agrees_with_pyros_fit(self, draws):
        table = 1.5 * torch.randn(draws, 5, dtype=torch.float64)
        tail = math.ceil(min(draws / 5, 3 * math.sqrt(draws)))
        for row, k in zip(table.T, pareto_k(table), strict=True):
            top = row.sort().values[-tail - 1 :].sub(row.max()).exp()
            expected, _ = fit_generalized_pareto(top[1:] - top[0])
            assert abs(float(k) - expected) < 0.02

    def test_agrees_with_pyros_diagnostic(self):
        x, guide = torch.tensor([0.3], dtype=torch.float64), local_guide(0.7)
        settings = {"max_plate_nesting": 1}
        torch.manual_seed(1)
        theirs = psis_diagnostic(local_model, guide, x, num_particles=5000, **settings)
        torch.manual_seed(1)
        table, _, _ = vectorized_importance_weights(
            local_model, guide, x, num_samples=5000, normalized=False, **settings
        )
        assert abs(theirs - float(pareto_k(table.detach()))) < 0.02

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_constant_weights_have_no_tail(self, dtype):
        constant = torch.full((100, 3), -700.0, dtype=dtype)
        noise = torch.randn(100, 3, dtype=dtype) * torch.finfo(dtype).eps * 700
        found = psis(constant + noise)
        assert found.pareto_k.tolist() == [-math.inf] * 3
        torch.testing.assert_close(
            found.log_weights.exp(), torch.full((100, 3), 0.01, dtype=dtype), rtol=1e-3, atol=0
        )

    def test_small_but_real_differences_are_not_rounding(self):
        table = -700 + 0.05 * torch.randn(1000, 2)
        assert bool(pareto_k(table).isfinite().all())

    def test_an_atom_at_the_largest_weight_is_no_tail(self):
        # A discrete hidden site: two values of the weight, the larger one in a third of the draws.
        table = torch.where(torch.rand(300, 1) < 1 / 3, 1.0, -2.0)
        found = psis(table)
        assert found.pareto_k.item() == -math.inf
        torch.testing.assert_close(found.log_weights, table.log_softmax(0))

    def test_a_rare_largest_value_is_unknown(self):
        table = torch.zeros(300, 1)
        table[:2] = 3.0
        assert pareto_k(table).item() == math.inf

    def test_zero_weights(self):
        table = torch.randn(200, 2)
        table[:, 1] = -math.inf
        table[:50, 0] = -math.inf
        found = psis(table)
        assert math.isfinite(found.pareto_k[0])
        assert found.pareto_k[1] == math.inf
        assert bool((found.log_weights[:50, 0] == -math.inf).all())
        assert not bool(found.log_weights.isnan().any())


class TestSmoothing:
    def test_order_is_kept_and_weights_sum_to_one(self):
        table = 2 * torch.randn(400, 3, 2)
        found = psis(table)
        assert found.log_weights.shape == (400, 3, 2)
        assert found.pareto_k.shape == (3, 2)
        torch.testing.assert_close(found.log_weights.exp().sum(0), torch.ones(3, 2))
        assert bool((found.log_weights.argsort(0) == table.argsort(0)).all())

    def test_smoothing_lowers_the_error_of_a_mean(self):
        # E_p[z^2] = 1 by draws from N(0, 0.6^2), whose weights have k = 0.64: infinite variance.
        z = 0.6 * torch.randn(500, 400, dtype=torch.float64)
        raw = -(z**2) / 2 + z**2 / (2 * 0.36)
        smoothed = (psis(raw).log_weights.exp() * z**2).sum(0)
        plain = (raw.softmax(0) * z**2).sum(0)
        assert float((smoothed - 1).abs().mean()) < float((plain - 1).abs().mean())
        assert float((smoothed - 1).square().mean()) < float((plain - 1).square().mean())

    def test_input_is_left_alone_and_data_are_apart(self):
        table = 2 * torch.randn(100, 5, dtype=torch.float64)
        before = table.clone()
        found = psis(table)
        assert torch.equal(table, before)
        alone = psis(table[:, 2:3])
        torch.testing.assert_close(found.log_weights[:, 2:3], alone.log_weights)

    def test_shift_does_not_matter(self):
        table = 2 * torch.randn(100, 2, dtype=torch.float64)
        torch.testing.assert_close(psis(table - 300).pareto_k, psis(table).pareto_k)

    def test_blocks_change_nothing(self, monkeypatch):
        table = 2 * torch.randn(100, 7)
        whole = psis(table)
        monkeypatch.setattr(sys.modules[psis.__module__], "_BLOCK", 200)
        torch.testing.assert_close(psis(table), whole)

    def test_resampled_moments_are_those_of_the_target(self):
        z = 0.8 * torch.randn(4000, 50, dtype=torch.float64) + 0.3
        table = -(z**2) / 2 + (z - 0.3) ** 2 / (2 * 0.64)
        chosen = z.gather(0, psis_resample(table))
        assert abs(float(chosen.mean())) < 0.02
        assert abs(float(chosen.square().mean()) - 1) < 0.03

    def test_resampled_columns_are_independent(self):
        table = 0.5 * torch.randn(2000, 2)
        ranks = psis_resample(table).double()
        assert abs(float(torch.corrcoef(ranks.T)[0, 1])) < 0.1

    def test_generator_decides(self):
        table = torch.randn(50, 3)
        a, b = (psis_resample(table, generator=torch.Generator().manual_seed(3)) for _ in "ab")
        assert torch.equal(a, b)


class TestRefusals:
    def test_too_few_draws(self):
        with pytest.raises(ValueError, match="24 draws are too few"):
            psis(torch.randn(24, 3))
        assert pareto_k(torch.randn(25, 3)).shape == (3,)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_nan_and_infinity(self, bad):
        table = torch.randn(100, 3)
        table[4, 1] = bad
        with pytest.raises(ValueError, match="1 of 300 log weights are NaN or plus infinity"):
            psis(table)


def test_good_k():
    assert good_k(10**6) == 0.7
    np.testing.assert_allclose(good_k(100), 0.5)
