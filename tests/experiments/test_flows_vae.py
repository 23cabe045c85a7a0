"""Table 1 and Figure 3 of gradient boosted flows: what is measured, and what is claimed of it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyroboost.evaluation import elbo
from pyroboost.experiments import flows_vae_models as models
from pyroboost.experiments import record
from pyroboost.experiments.flows_vae import verdicts
from pyroboost.experiments.flows_vae_figure import Watch, _shocks
from pyroboost.experiments.flows_vae_models import Judged
from pyroboost.experiments.flows_vae_settings import MODELS, PAPER, pictures, sizes_of
from pyroboost.experiments.registry import find
from pyroboost.experiments.runner import Run, run_experiment


@pytest.fixture
def run(tmp_path):
    return Run(scale="smoke", seeds=(0,), out=tmp_path, name="test")


def two_components(run):
    """An untrained boosted model whose components are told apart and both have weight."""
    found, sizes = pictures(run, "caltech"), sizes_of("caltech", "smoke")
    torch.manual_seed(0)
    pair = models.build("GBF", found, sizes).eval()
    components = pair.guide.fn.components
    components.weights.copy_(torch.tensor([0.3, 0.7]))
    with torch.no_grad():
        components.flows[1].steps[0].net.outer.bias += 0.5
    return pair, found


def test_the_two_bounds(run):
    """The mixture's is its ELBO; the paper's is lower by E log(q / g), the same draws serving."""
    pair, found = two_components(run)
    x = found.test[:6]
    own, mixed = models.bounds(pair, x, draws=150, others=1)
    whole = elbo(pair, x, num_samples=300)
    assert ((mixed - whole.value).abs() < 7 * whole.std_error).all()
    assert (whole.std_error < 0.2).all()
    assert (own < mixed).all()
    posterior = pair.guide.fn.posterior(x)
    gap = torch.zeros(6)
    for c, weight in enumerate((0.3, 0.7)):
        with torch.no_grad():
            z, log_g = posterior.rsample_component_and_log_prob(c, (4000,))
            gap += weight * (log_g - posterior.log_prob(z)).mean(0)
    assert torch.allclose(mixed - own, gap, atol=0.05)
    assert (gap > 0.07).all()
    least = 0.3 * math.log(0.3) + 0.7 * math.log(0.7)
    assert ((own - mixed) > least - 1e-4).all(), "never more than the entropy of the weights"


def test_a_single_law_has_one_bound(run):
    found, sizes = pictures(run, "caltech"), sizes_of("caltech", "smoke")
    pair = models.build("Planar", found, sizes).eval()
    own, mixed = models.bounds(pair, found.test[:5], draws=1, others=2)
    assert torch.equal(own, mixed)
    assert own.shape == (5,)


@pytest.mark.parametrize("kind", PAPER)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_every_table_runs(run, kind, name):
    found, sizes = pictures(run, kind), sizes_of(kind, "smoke")
    pair = models.build(name, found, sizes)
    judged = models.judge(pair, found.test[:3], sizes, seed=0)
    assert judged.paper.shape == judged.bound.shape == judged.likelihood.shape == (3,)
    assert (judged.paper > 0).all()


@pytest.mark.parametrize("kind", PAPER)
def test_paper_sizes_are_the_papers(kind):
    sizes = sizes_of(kind, "paper")
    assert (sizes.latent, sizes.steps, sizes.couplings, sizes.vectors) == (64, 16, 8, 32)
    assert (sizes.first, sizes.epochs, sizes.components, sizes.finetune) == (1000, 1000, 4, 50)
    assert (sizes.importance, sizes.test, sizes.network) == (2000, None, "gated")
    assert sizes.units == (512 if kind in ("mnist", "omniglot") else 256)
    assert sizes.total == 4000


def found_with(used=2, **likelihoods):
    """Results in which every image's NLL is given, with noise that all models share."""
    shared = torch.randn(400, generator=torch.Generator().manual_seed(0))
    run = {}
    for i, name in enumerate(MODELS):
        noise = 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(i + 1))
        nll = likelihoods.get(name.replace("+", "_plus"), 100.0) + 20 * shared + noise
        run[name] = Judged(nll + 5, nll + 4, nll, used if name.startswith("GBF") else 1)
    return run


def held(runs, kind):
    return [one["holds"] for one in verdicts(runs, kind)]


def test_verdicts_follow_differences_image_by_image():
    assert held([found_with(GBF=99.0, GBF_plus=98.0)], "mnist") == [True, True, False]
    assert held([found_with(GBF=99.5, GBF_plus=99.5)], "omniglot") == [True, False, True]
    assert held([found_with(GBF=99.0, GBF_plus=98.0)], "frey") == [True, True, True]
    assert held([found_with(GBF=99.0, GBF_plus=98.0, IAF=97.0)], "frey") == [True, True, False]
    better = {"Planar": 90.0, "Radial": 91.0, "Sylvester": 92.0}
    assert held([found_with(**better)], "caltech") == [False, False, True]
    assert held([found_with(**better, IAF=91.5)], "caltech") == [False, False, False]


def test_models_of_one_decoder_are_compared_by_their_bounds():
    """Their likelihoods are the same number, whatever the estimates are."""
    found = found_with(GBF=99.0, GBF_plus=98.0)
    lower = {**found, "GBF": replace(found["GBF"], paper=found["RealNVP"].paper - 1.0)}
    found["GBF"] = replace(found["GBF"], bound=found["RealNVP"].bound + 0.1)
    found["GBF+"] = replace(found["GBF+"], bound=found["RealNVP"].bound - 0.1)
    claims = verdicts([found], "mnist", frozen=True)
    assert [one["holds"] for one in claims[:2]] == [False, True]
    assert claims[0]["evidence"].startswith("the mixture's -ELBO of GBF is 0.100")
    assert claims[1]["evidence"].startswith("the mixture's -ELBO of GBF+ is 0.200")
    assert "by the paper's bound" in claims[0]["evidence"]
    assert "1.000 below" in verdicts([lower], "mnist", frozen=True)[0]["evidence"]
    alike = found_with(GBF=98.0, GBF_plus=98.0, RealNVP=98.0)
    assert [verdicts([alike], "frey", frozen=f)[2]["holds"] for f in (True, False)] == [True, False]


def test_one_component_in_use_is_no_boosting():
    claims = verdicts([found_with(used=1, GBF=90.0)], "mnist")
    assert not claims[0]["holds"]
    assert "1 component in use" in claims[0]["evidence"]


def test_seeds_that_disagree_widen_the_error():
    alike = [found_with(GBF=99.9), found_with(GBF=99.9)]
    apart = [found_with(GBF=99.5), found_with(GBF=100.3)]
    assert held(alike, "mnist")[0]
    assert not held(apart, "mnist")[0]


def test_what_is_watched_is_kept(run, tmp_path):
    """Losses of the component in training and of the mixture; a new watch reads the old file."""
    pair, found = two_components(run)
    for p in pair.guide.fn.components.flows[0].parameters():
        p.requires_grad_(False)
    before = pair.guide.fn.components.weights.clone()
    path = Path(tmp_path) / "deep" / "watch.pt"
    watch = Watch(pair, found.test[:20], path)
    watch._record(0)
    assert torch.equal(pair.guide.fn.components.weights, before)
    again = Watch(pair, found.test[:20], path)
    (key,) = again.curve
    assert key == (1, 0)
    own, mixture = again.curve[key]
    assert torch.equal(own, watch.curve[key][0])
    pair.guide.fn.components.weights.copy_(torch.tensor([0.0, 1.0]))
    alone = -models.bounds(pair, found.test[:20], draws=30, others=1)[1]
    assert abs(own.mean() - alone.mean()) < 1.0
    assert own.shape == mixture.shape == (20,)


class Stop(Exception):
    """Stands for a killed process."""


def test_an_interrupted_figure_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    """Checkpoints of the first fit, of boosting, and what was watched, all serve again."""
    experiment = find("flows.figure3")
    whole = record.read(run_experiment(experiment, scale="smoke", out=tmp_path / "whole"))
    real = models.finetuned
    monkeypatch.setattr(models, "finetuned", lambda *a, **k: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        run_experiment(experiment, scale="smoke", out=tmp_path / "cut")
    monkeypatch.setattr(models, "finetuned", real)
    again = record.read(run_experiment(experiment, scale="smoke", out=tmp_path / "cut"))
    assert again["resumed"]
    assert again["rows"] == whole["rows"]
    assert not list((tmp_path / "cut").rglob("*.pt"))


def test_shock_and_rise():
    def row(own, mixture):
        return torch.full((3,), own), torch.full((3,), mixture)

    curve = {(0, 0): row(9.0, 9.0), (0, 1): row(5.0, 5.0)}
    curve |= {(1, 0): row(8.0, 5.0), (1, 1): row(7.0, 6.0), (1, 2): row(7.5, 6.0)}
    curve |= {(1, e): row(4.0, 5.5) for e in range(3, 9)}
    shock, rise = _shocks(curve)[1]
    assert shock.tolist() == [2.5] * 3
    assert rise.tolist() == [0.5] * 3
