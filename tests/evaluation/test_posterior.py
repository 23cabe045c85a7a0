"""Posterior quality against closed forms: evidence, ELBO, KL, the tail of the weights."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from gaussian_pairs import (
    local_evidence,
    local_guide,
    local_model,
    local_pair,
    shared_evidence,
    shared_guide,
    shared_model,
)
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.optim import Adam

from pyroboost import Cascade, MetaModel
from pyroboost.evaluation.posterior import posterior_quality
from pyroboost.models import GMM, VAE

_MANY = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)


@pytest.fixture
def x():
    return torch.randn(60, dtype=torch.float64) * math.sqrt(2.0)


def kl(width):
    """KL(q || p) of a posterior whose standard deviation is multiplied."""
    return (width**2 - 1) / 2 - math.log(width)


class TestClosedForms:
    def test_exact_guide(self, x):
        found = posterior_quality(local_pair(), x, num_samples=50)
        assert found.pareto_k.tolist() == [-math.inf] * 60
        assert found.joint_pareto_k == -math.inf
        torch.testing.assert_close(found.elbo.per_datum, local_evidence(x))
        torch.testing.assert_close(found.ess, torch.full((60,), 50.0, dtype=torch.float64))
        assert abs(found.gap.value) < 1e-12
        assert abs(found.joint_ess - 50) < 1e-6

    @pytest.mark.parametrize("width", [0.7, 1.3])
    def test_elbo_bound_and_gap(self, x, width):
        found = posterior_quality(local_pair(width), x, num_samples=2000)
        evidence = float(local_evidence(x).mean())
        draws_error = float(found.log_weights.std(0).mean()) / math.sqrt(2000 * 60)
        assert abs(found.elbo.value - (evidence - kl(width))) < 4 * draws_error
        assert found.elbo.value < found.importance_bound.value < evidence + 0.01
        assert abs(found.importance_bound.value - evidence) < 0.01
        assert abs(found.gap.value - kl(width)) < 0.01
        assert found.elbo.std_error == pytest.approx(
            float(found.elbo.per_datum.std()) / math.sqrt(60)
        )

    def test_k_of_a_narrow_guide(self, x):
        found = posterior_quality(local_pair(0.6), x, num_samples=5000)
        assert abs(float(found.pareto_k.mean()) - (1 - 0.36)) < 0.08

    def test_effective_sizes_of_a_wide_guide_in_closed_form(self):
        # E[w]^2 / E[w^2] = sqrt(2 s^2 - 1) / s^2 for one datum, to the power N for N of them.
        x, ratio = torch.zeros(10, dtype=torch.float64), math.sqrt(2 * 1.69 - 1) / 1.69
        found = posterior_quality(local_pair(1.3), x, num_samples=4000)
        assert abs(float(found.ess.mean()) / 4000 - ratio) < 0.01
        assert abs(found.joint_ess / 4000 - ratio**10) < 0.04
        assert -math.inf < found.joint_pareto_k < 0.3

    def test_a_missed_mode_is_not_seen_and_the_words_say_so(self):
        def model(x):
            with pyro.plate("data", len(x)):
                law = dist.Normal(torch.tensor([-20.0, 20.0]), 1.0)
                half = dist.Categorical(torch.tensor([0.5, 0.5]))
                pyro.sample("z", dist.MixtureSameFamily(half, law))
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(20.0, 1.0))

        found = posterior_quality((model, guide), torch.zeros(3), num_samples=200)
        assert float(found.pareto_k.max()) < 0.1
        assert found.gap.value < 0.01
        assert found.elbo.value == pytest.approx(
            -math.log(2) - 0.5 * math.log(2 * math.pi), abs=0.01
        )
        assert "cannot see a mode" in found.describe()

    def test_the_words_hold_numbers_and_no_verdict(self, x):
        text = posterior_quality(local_pair(0.6), x, num_samples=100).describe()
        for part in ("ELBO", "±", "gap", "k-hat", "above 0.50", "ESS", "of 60"):
            assert part in text
        assert not {"good", "bad", "fails", "reliable"} & set(text.lower().split())


class TestSharedHiddenValues:
    def test_exact(self):
        x = torch.randn(15, dtype=torch.float64) + 1
        found = posterior_quality((shared_model, shared_guide()), x, num_samples=100)
        assert found.shared
        assert found.pareto_k.tolist() == [-math.inf]
        assert found.elbo.value == pytest.approx(float(shared_evidence(x)))
        assert "all data" in found.describe()

    def test_narrow(self):
        x = torch.randn(15, dtype=torch.float64) + 1
        found = posterior_quality((shared_model, shared_guide(0.7)), x, num_samples=1000)
        evidence = float(shared_evidence(x))
        assert abs(found.importance_bound.value - evidence) < 4 * found.importance_bound.std_error
        assert abs(found.elbo.value - (evidence - kl(0.7))) < 4 * found.elbo.std_error
        assert abs(found.gap.value - kl(0.7)) < 4 * found.gap.std_error
        assert 0 < found.elbo.std_error < 0.06

    def test_a_plate_of_the_same_size_is_not_taken_for_the_data(self):
        def model(x):
            with pyro.plate("features", 4):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(w.sum(), 1.0), obs=x)

        def guide(x):
            with pyro.plate("features", 4):
                pyro.sample("w", dist.Normal(0.0, 1.0))

        found = posterior_quality((model, guide), torch.randn(4), num_samples=30)
        assert found.shared

    def test_scaled_subsample_is_refused(self):
        def model(x):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 100, subsample_size=len(x)):
                pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

        with pytest.raises(ValueError, match="subsampled plate or by poutine"):
            posterior_quality((model, shared_guide()), torch.randn(10), num_samples=30)


class TestPrograms:
    def test_tuple_agrees_with_the_meta_model(self, x):
        one = posterior_quality((local_model, local_guide(0.8)), x, num_samples=500)
        two = posterior_quality(local_pair(0.8), x, num_samples=500)
        assert not one.shared
        error = float(one.log_weights.std(0).mean()) / math.sqrt(500 * 60)
        assert abs(one.elbo.value - two.elbo.value) < 6 * error

    def test_nested_plates_and_inner_latents_belong_to_the_outermost_plate(self):
        def model(x):
            with pyro.plate("data", 6, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(6, 1), 1.0))
                with pyro.plate("time", 3, dim=-1):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            with pyro.plate("data", 6, dim=-2):
                pyro.sample("z", dist.Normal(x.sum(-1, keepdim=True) / 4, 0.5))

        x = torch.randn(6, 3)
        found = posterior_quality((model, guide), x, num_samples=40)
        cov = torch.eye(3) + 1.0
        exact = dist.MultivariateNormal(torch.zeros(3), cov).log_prob(x)
        torch.testing.assert_close(found.elbo.per_datum.float(), exact)
        assert found.pareto_k.tolist() == [-math.inf] * 6

    def test_autoguide_after_svi(self):
        x = torch.randn(8) + 1
        guide = AutoNormal(shared_model)
        svi = SVI(shared_model, guide, Adam({"lr": 0.1}), _MANY)
        for _ in range(120):
            svi.step(x)
        found = posterior_quality((shared_model, guide), x, num_samples=400)
        assert abs(found.importance_bound.value - float(shared_evidence(x))) < 0.05
        assert found.gap.value < 0.05

    def test_pyro_params_are_those_in_the_store(self):
        def guide(x):
            loc = pyro.param("loc", torch.tensor(0.0))
            pyro.sample("mean", dist.Normal(loc, 0.3))

        pyro.param("loc", torch.tensor(50.0))
        found = posterior_quality((shared_model, guide), torch.zeros(10), num_samples=30)
        assert found.elbo.value < -1000

    @pytest.mark.parametrize(
        "pair",
        [
            lambda: GMM(3, 4),
            lambda: VAE(4, 2, units=8),
            lambda: Cascade(VAE(4, 2, units=8), GMM(3, 2)),
        ],
    )
    def test_shipped_pairs(self, pair):
        pair = pair()
        found = posterior_quality(pair, torch.ones(5, 4), num_samples=50)
        assert found.log_weights.shape == (50, 5)
        assert found.kind == "bound"
        if isinstance(pair, GMM):
            assert found.pareto_k.tolist() == [-math.inf] * 5

    def test_modes_and_random_state_of_networks_are_left(self):
        pair = VAE(4, 2, units=8).train()
        posterior_quality(pair, torch.ones(5, 4), num_samples=25)
        assert all(module.training for module in pair.modules())


class TestRefusals:
    def test_point_estimate(self):
        guide = AutoDelta(shared_model)
        with pytest.raises(ValueError, match="gives 'mean' one value and no density"):
            posterior_quality((shared_model, guide), torch.randn(5), num_samples=30)

    def test_point_estimate_in_a_meta_model(self):
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(x / 2))

        pair = MetaModel(local_model, guide, visible="x", hidden="z")
        with pytest.raises(ValueError, match="gives 'z' one value and no density"):
            posterior_quality(pair, torch.randn(5), num_samples=30)

    def test_several_observed_sites_need_a_name(self):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)
                pyro.sample("y", dist.Normal(z, 1.0), obs=x)

        x = torch.randn(5)
        with pytest.raises(ValueError, match="observes 'x', 'y'; name the site"):
            posterior_quality((model, local_guide()), x, num_samples=30)
        found = posterior_quality((model, local_guide()), x, num_samples=30, visible="y")
        assert found.pareto_k.shape == (5,)

    def test_a_guide_that_draws_more(self):
        def guide(x):
            local_guide()(x)
            pyro.sample("other", dist.Normal(0.0, 1.0))

        with pytest.raises(ValueError, match="draws 'other', which the model does not have"):
            posterior_quality((local_model, guide), torch.randn(5), num_samples=30)

    def test_not_a_pair(self):
        with pytest.raises(TypeError, match="pass a meta-model or a tuple"):
            posterior_quality(local_model, torch.randn(5))

    def test_too_few_draws(self):
        with pytest.raises(ValueError, match="10 draws are too few"):
            posterior_quality(local_pair(), torch.randn(5), num_samples=10)


def test_plot_returns_axes():
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    found = posterior_quality(local_pair(0.8), torch.randn(5), num_samples=30)
    assert found.plot(ax=ax) is ax
    plt.close(figure)
