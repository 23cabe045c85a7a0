"""The report: numbers in closed form, every guide that Pyro users have, and words that hold."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import (
    evidence,
    exact,
    guide,
    kl,
    local_guide,
    local_model,
    model,
    one_mode,
    reverse_kl,
    two_mode_draws,
    two_modes,
)
from pyro.infer.autoguide import AutoNormal, AutoStructured

from pyroboost import MetaModel
from pyroboost.diagnostics import report
from pyroboost.models import VAE

X = torch.tensor([2.0, -1.0], dtype=torch.float64)


class TestClosedForms:
    @pytest.mark.parametrize(("width", "shift"), [(1.3, 0.0), (1.0, 0.4)])
    def test_bounds_and_evidence(self, width, shift):
        reference = exact(X, 500, chains=4)
        found = report(
            (model, guide(width, shift)),
            X,
            reference=reference,
            group_by_chain=True,
            num_samples=800,
        )
        truth, below, above = evidence(X), kl(width, shift), reverse_kl(width, shift)
        assert abs(found.elbo.value - (truth - below)) < 4.5 * found.elbo.std_error
        assert abs(found.evidence.value - truth) < 4.5 * found.evidence.std_error
        assert abs(found.eubo.value - (truth + above)) < 4.5 * found.eubo.std_error
        assert abs(found.divergence.value - below - above) < 4.5 * found.divergence.std_error
        assert found.elbo.value < truth < found.eubo.value
        z = found.expectations["z"]
        assert bool(((z.mean - X / 2).abs() < 4.5 * z.std_error).all())
        assert found.comparison.sd_error == pytest.approx(width - 1, abs=0.1)

    def test_exact_guide(self):
        found = report((model, guide()), X, reference=exact(X, 300), num_samples=300)
        assert abs(found.divergence.value) < 1e-9
        assert found.elbo.value == pytest.approx(evidence(X))
        assert found.comparison.two_sample.p_value > 0.01
        assert "more than a nat" not in found.describe()

    def test_per_datum(self):
        x = torch.linspace(-2, 2, 5, dtype=torch.float64)
        pair = MetaModel(local_model, local_guide(0.8), visible="x", hidden="z")
        found = report(pair, x, reference=exact(x, 400), num_samples=400)
        assert found.quality.pareto_k.shape == (5,)
        assert found.eubo.per_datum.shape == found.divergence.per_datum.shape == (5,)
        both = kl(0.8, size=1) + reverse_kl(0.8, size=1)
        assert found.divergence.value == pytest.approx(both, abs=0.06)
        assert found.comparison.sites["z"].mean_error.shape == (5,)


class TestBlindSpot:
    """A guide on one of two modes: every number from its own draws is perfect."""

    def test_alone_the_report_says_that_it_cannot_see(self):
        found = report((two_modes, one_mode), num_samples=300)
        assert float(found.quality.pareto_k.max()) < 0.1
        assert float(found.quality.ess.min()) > 299
        assert found.quality.gap.value < 1e-3
        assert found.evidence.value == pytest.approx(-math.log(2.0), abs=1e-3)
        assert found.evidence.std_error < 1e-3
        text = found.describe()
        assert "cannot see a mode" in text
        assert "No reference: nothing above can see mass that the guide misses" in text

    def test_a_reference_reveals_it(self):
        found = report((two_modes, one_mode), reference=two_mode_draws(1000), num_samples=600)
        assert float(found.quality.pareto_k.max()) < 0.1
        assert found.eubo.value - found.evidence.value > 30
        comparison = found.comparison
        assert comparison.two_sample.p_value < 1e-6
        assert comparison.mean_error == pytest.approx(6 / math.sqrt(37), abs=0.1)
        assert comparison.distance.value > 3 * comparison.distance.null_largest
        text = found.describe()
        assert "more than a nat: the reference has mass where the guide hardly draws" in text
        assert "do not count it" in text

    def test_k_is_never_shown_alone(self):
        text = report((two_modes, one_mode), num_samples=100).describe()
        for part in ("k-hat", "ESS", "ELBO", "Evidence", "cannot see"):
            assert part in text


def test_a_guide_that_cannot_score_is_refused_in_words():
    auto = AutoStructured(model, conditionals="normal")
    found = report((model, auto), X.float(), reference=exact(X.float(), 200), num_samples=100)
    assert found.eubo is None
    assert found.divergence is None
    assert "No upper bound: eubo: the guide draws 'z_aux'" in found.describe()
    assert found.comparison is not None


def test_doubts_of_the_reference_are_kept():
    one = report((model, guide()), X, reference=exact(X, 500), num_samples=50)
    assert "came as one chain" in one.describe()
    far = {"z": exact(X, 100, chains=2)["z"] + torch.tensor([0.0, 9.0])[:, None, None]}
    two = report((model, guide()), X, reference=far, group_by_chain=True, num_samples=50)
    assert "has not converged" in two.describe()


@pytest.mark.parametrize("observed", [("x",), ("x", "y"), ()], ids=["one", "two", "none"])
def test_models_with_any_number_of_observed_sites(observed):
    def program():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for name in observed:
            pyro.sample(name, dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    def solve():
        pyro.sample("z", dist.Normal(0.0, (1 + len(observed)) ** -0.5))

    found = report((program, solve), num_samples=30)
    assert found.quality.pareto_k.tolist() == [-math.inf]
    exact = -0.5 * len(observed) * math.log(2 * math.pi) - 0.5 * math.log(1 + len(observed))
    assert found.elbo.value == pytest.approx(exact, abs=1e-5)


def test_shipped_model():
    found = report(VAE(4, 2, units=8), torch.ones(5, 4), num_samples=40)
    assert found.quality.pareto_k.shape == (5,)
    assert "5 data, judged each" in found.describe()


class TestPicturesAndContainer:
    @pytest.fixture
    def found(self):
        reference = {"s": torch.rand(2, 60).add(0.5), "w": torch.randn(2, 60, 3)}

        def program(x):
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            with pyro.plate("parts", 3):
                w = pyro.sample("w", dist.Normal(0.0, s))
            pyro.deterministic("sum", w.sum())
            pyro.sample("x", dist.Normal(w.sum(), 1.0), obs=x)

        auto = AutoNormal(program)
        yield report(
            (program, auto),
            torch.tensor(1.0),
            reference=reference,
            group_by_chain=True,
            num_samples=40,
        )
        plt.close("all")

    def test_pictures(self, found):
        figure = found.plot()
        assert [ax.get_xlabel() for ax in figure.axes] == ["s", "w[0]", "w[1]", "w[2]"]
        labels = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
        assert labels == ["guide", "guide, weighted", "reference"]
        assert len(found.plot(["w[1]"]).axes) == 1
        assert len(found.plot_pairs(["s", "w"]).axes) == 10
        with pytest.raises(ValueError, match="are not among"):
            found.plot(["nothing"])

    def test_container(self, found, tmp_path):
        data = found.to_arviz()
        assert data["posterior"]["w"].dims == ("chain", "draw", "parts")
        assert data["posterior"]["sum"].shape == (1, 40)
        assert data["reference"]["w"].shape == (2, 60, 3)
        assert data["reference"]["chain"].values.tolist() == [0, 1]
        stats = data["sample_stats"]
        weight = stats["log_weight"].values
        np.testing.assert_allclose(
            weight, (stats["log_p"] - stats["log_q"]).values, rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(np.exp(stats["log_psis_weight"].values).sum(), 1.0, rtol=1e-5)
        assert "±" in stats.attrs["elbo"]
        np.testing.assert_allclose(weight.mean(), found.elbo.value, rtol=1e-5)
        data.to_netcdf(tmp_path / "report.nc")

    def test_weights_per_datum(self):
        x = torch.zeros(3, dtype=torch.float64)
        found = report((local_model, local_guide(0.8)), x, num_samples=30)
        assert found.to_arviz()["sample_stats"]["log_psis_weight"].dims == (
            "chain",
            "draw",
            "data",
        )
        assert len(found.plot().axes) == 3
        plt.close("all")
