"""Errors against a reference, in its own deviations, and what the reference itself is worth."""

import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

from pyroboost.diagnostics import compare


def normal(*shape, loc=0.0, scale=1.0):
    return loc + scale * torch.randn(*shape)


def test_a_reference_may_come_from_arviz():
    import arviz as az

    torch.manual_seed(0)
    draws = {"a": normal(4, 100, loc=1.0), "b": normal(4, 100, 3)}
    data = (
        az.from_dict({"posterior": {n: v.numpy() for n, v in draws.items()}})
        if (az.__version__.startswith("1"))
        else az.from_dict({n: v.numpy() for n, v in draws.items()})
    )
    guide = {name: normal(*value.flatten(0, 1).shape) for name, value in draws.items()}
    found = compare(guide, data)
    expected = compare(guide, draws, group_by_chain=True)
    assert torch.equal(found.sites["a"].mean_error, expected.sites["a"].mean_error)
    assert found.mean_error == expected.mean_error
    with pytest.raises(TypeError, match="ArviZ's InferenceData with a posterior"):
        compare(guide, 3)


class TestErrors:
    def test_known_shift_and_scale(self):
        reference = {"a": normal(4, 500, loc=5.0, scale=3.0), "b": normal(4, 500, 2)}
        draws = {"a": normal(2000, loc=6.5, scale=6.0), "b": normal(2000, 2)}
        found = compare(draws, reference, group_by_chain=True)
        a, b = found.sites["a"], found.sites["b"]
        assert float(a.mean_error) == pytest.approx(0.5, abs=0.15)
        assert float(a.sd_error) == pytest.approx(1.0, abs=0.1)
        # Quantiles: (6.5 + 6 q) - (5 + 3 q) over 3.
        for level, error in zip(found.levels, a.quantile_error, strict=True):
            expected = 0.5 + float(dist.Normal(0.0, 1.0).icdf(torch.tensor(level)))
            assert float(error) == pytest.approx(expected, abs=0.2)
        assert b.mean_error.shape == b.sd_error.shape == (2,)
        assert float(b.mean_error.abs().max()) < 4 * found.noise
        assert a.two_sample.p_value < 1e-6 < 1e-3 < b.two_sample.p_value
        assert found.two_sample.p_value < 1e-6
        assert a.distance.value > 5 * a.distance.null_largest
        assert b.distance.value < 2 * b.distance.null_largest
        assert found.mean_error == pytest.approx(0.5, abs=0.15)
        assert found.quantile_error > 1.5 > found.sd_error

    def test_noise_counts_effective_draws(self):
        found = compare({"z": normal(500)}, {"z": normal(2, 250)}, group_by_chain=True)
        assert found.noise == pytest.approx(math.sqrt(1 / 500 + 1 / found.reference.ess))
        assert 250 < found.reference.ess <= 500

    def test_dependence_between_sites_is_seen_only_in_the_whole(self):
        z = normal(2000, 2)
        reference = {"a": z[:, 0], "b": 0.95 * z[:, 0] + math.sqrt(1 - 0.95**2) * z[:, 1]}
        found = compare({"a": normal(2000), "b": normal(2000)}, reference)
        assert min(s.two_sample.p_value for s in found.sites.values()) > 1e-3
        assert found.two_sample.p_value < 1e-6
        assert found.distance.value > 2 * found.distance.null_largest

    def test_coordinates_that_never_move(self):
        def factor(count):
            tril = torch.zeros(count, 2, 2)
            tril[:, 0, 0], tril[:, 1, 0], tril[:, 1, 1] = 1.0, *torch.randn(2, count)
            return {"L": tril}

        found = compare(factor(300), factor(300))
        assert bool(found.sites["L"].sd_error.isfinite().all())
        assert found.sites["L"].mean_error[0].tolist() == [0.0, 0.0]
        with pytest.raises(ValueError, match="never moves"):
            compare({"L": torch.randn(300, 2, 2)}, factor(300))


class TestReference:
    def test_chains_in_different_modes(self):
        stuck = normal(4, 250) + torch.tensor([5.0, 5.0, -5.0, -5.0])[:, None]
        found = compare({"z": normal(1000)}, {"z": stuck}, group_by_chain=True)
        assert found.reference.r_hat > 1.5
        assert "has not converged: R-hat" in found.describe()
        assert "'z'" in found.describe() or " z " in found.describe()
        merged = compare({"z": normal(1000)}, {"z": stuck[:, ::4].flatten()})
        assert "came as one chain" in merged.describe()

    def test_short_reference(self):
        found = compare({"z": normal(1000)}, {"z": normal(4, 50)}, group_by_chain=True)
        assert "The reference is short: ESS" in found.describe()
        assert found.two_sample.num_draws <= 200

    def test_good_reference_has_no_doubts(self):
        found = compare({"z": normal(500)}, {"z": normal(4, 500)}, group_by_chain=True)
        assert found.reference.doubts() == []
        text = found.describe()
        for part in ("ESS", "R-hat", "sliced Wasserstein", "AUC", "None sees"):
            assert part in text

    def test_a_slow_chain_does_not_reject_the_exact_law(self):
        z = torch.empty(4, 1000)
        z[:, 0] = torch.randn(4)
        for t in range(1, 1000):
            z[:, t] = 0.9 * z[:, t - 1] + math.sqrt(1 - 0.81) * torch.randn(4)
        found = compare({"z": normal(4000)}, {"z": z}, group_by_chain=True)
        assert found.reference.ess < 600
        assert found.two_sample.num_draws <= found.reference.ess
        assert found.two_sample.p_value > 0.01

    def test_mcmc_of_pyro(self):
        def model():
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

        logging.getLogger("pyro").setLevel(logging.ERROR)
        mcmc = MCMC(NUTS(model), num_samples=60, warmup_steps=40, disable_progbar=True)
        mcmc.run()
        found = compare({"z": normal(100, 2), "more": normal(100)}, mcmc)
        assert found.reference.num_draws == 60
        assert "only on one side: more" in found.describe()


class TestRefusals:
    def test_no_common_site(self):
        with pytest.raises(ValueError, match="no common site"):
            compare({"a": normal(50)}, {"b": normal(50)})

    def test_other_shapes(self):
        with pytest.raises(ValueError, match="only the first dimension"):
            compare({"a": normal(50, 2)}, {"a": normal(50, 3)})
        with pytest.raises(ValueError, match="as many draws for every site"):
            compare({"a": normal(50)}, {"a": normal(50), "b": normal(40)})

    def test_few_reference_draws_are_not_repeated(self):
        with pytest.raises(ValueError, match="200 and 12 draws are too few"):
            compare({"a": normal(200)}, {"a": normal(12)})

    def test_nan(self):
        with pytest.raises(ValueError, match="draws of 'a' are NaN"):
            compare({"a": normal(50) * math.nan}, {"a": normal(50)})
        with pytest.raises(ValueError, match="draws of 'a' that are NaN"):
            compare({"a": normal(50)}, {"a": normal(50) / 0})

    def test_not_a_reference(self):
        with pytest.raises(TypeError, match="pass an MCMC"):
            compare({"a": normal(50)}, normal(50))

    def test_levels(self):
        with pytest.raises(ValueError, match="between 0 and 1"):
            compare({"a": normal(50)}, {"a": normal(50)}, levels=[0.0])
