"""The posteriors of the table: their references are theirs, and the verdicts read the rows."""

import math

import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch.distributions import biject_to

from pyroboost.contexts import local_params
from pyroboost.experiments import flows_posteriors as table
from pyroboost.experiments import posterior_guides as guides
from pyroboost.experiments.posterior_models import POSTERIORS
from pyroboost.experiments.record import measured
from pyroboost.guides import AutoBoostedFlow

EXACT = ("funnel", "banana", "raw-scale regression")


def data_of(name):
    return POSTERIORS[name].data(torch.Generator().manual_seed(1))


def reference_of(name, run=None):
    guide = AutoBoostedFlow(POSTERIORS[name].model, 1, "affine", init="none")
    guide(*data_of(name))
    found = table._reference(guide, POSTERIORS[name], data_of(name), run, 0)
    return guide, found


@pytest.mark.parametrize("name", EXACT)
def test_exact_draws_have_no_mean_slope(name):
    """Stein: the mean of the gradient of log p is zero, that of u times it is minus one."""
    guide, draws = reference_of(name)
    target = guide._target(data_of(name), {}, draws[0].float())
    assert target._many is not None
    slope = target.gradient(draws.float())[1]
    centred = draws - draws.mean(0)
    for values in (slope, centred * slope + 1):
        error = values.std(0) / math.sqrt(len(values))
        assert bool((values.mean(0).abs() < 5 * error).all())


@pytest.mark.parametrize("name", POSTERIORS)
def test_every_model_is_scored_in_one_pass_with_particles(name):
    """Points in a plate outside agree with points by themselves: particles are right."""
    guide = AutoBoostedFlow(POSTERIORS[name].model, 1, "affine", init="none")
    guide(*data_of(name))
    target = guide._target(data_of(name), {}, guide._init_loc())
    points = target.start + 0.1 * torch.randn(3, target.dim)
    apart = torch.stack([target._single(point) for point in points])
    assert torch.allclose(target._plated(points), apart, rtol=1e-4, atol=1e-3)


def test_labels_are_exchanged_by_a_coin():
    def run(model, data, **start):
        mu = torch.tensor([-1.0, 2.0]).expand(4000, 2)
        return {"mu": mu, "sigma": mu.abs(), "share": torch.full((4000,), 0.3)}

    _, draws = reference_of("label switching", run)
    swapped = draws[:, 0] > 0
    assert float(swapped.double().mean()) == pytest.approx(0.5, abs=0.04)
    share = biject_to(torch.distributions.constraints.unit_interval)(draws[:, 4])
    assert torch.allclose(share[swapped], torch.tensor(0.7).double())


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_rivals_are_scored_as_they_are(kind):
    """Draws of a trained guide, with their densities, integrate a density to one."""
    posterior = POSTERIORS["banana"]
    with local_params():
        rival = kind(posterior.model)
        guides.train(rival, posterior.model, (), 0.2, table.SIZES["smoke"])
        u, log_q = guides.draw(rival, 4000)
    assert u.shape == (4000, 2)
    # q is normal with its own moments: compare its mean log density to minus its entropy.
    entropy = 0.5 * float(u.double().T.cov().logdet()) + 1 + math.log(2 * math.pi)
    assert -float(log_q.mean()) == pytest.approx(entropy, abs=0.05)


@pytest.mark.parametrize("name", ["IAF", "spline coupling"])
def test_flows_are_scored_at_their_own_draws(name):
    posterior = POSTERIORS["banana"]
    with local_params():
        rival = guides.rival(name, posterior.model)
        # One step: a longer training flattens splines until float32 inverts them poorly.
        guides.train(rival, posterior.model, (), 1e-9, table.SIZES["smoke"])
        u, log_q = guides.draw(rival, 50)
        with torch.no_grad():
            again = rival.get_posterior().log_prob(u.clone())
    assert torch.allclose(log_q, again, atol=0.02)


def test_a_perfect_guide_is_judged_perfect():
    _, draws = reference_of("raw-scale regression")
    sizes = table.Sizes(draws=500, repeats=2)

    class Exact:
        pass

    law = torch.distributions.MultivariateNormal(draws.mean(0), draws.T.cov())
    original = guides.draw
    guides.draw = lambda one, count: (u := law.sample((count,)), law.log_prob(u))
    try:
        judged = table._judge(Exact(), lambda u: law.log_prob(u) + 3, draws, 400.0, sizes)
    finally:
        guides.draw = original
    assert judged[table.KHAT][0] == -1.0
    assert judged[table.ESS][0] == pytest.approx(1.0)
    assert judged[table.BOUND][0] == pytest.approx(3.0)
    assert judged[table.EVIDENCE][0] == pytest.approx(3.0)
    assert judged[table.MEANS][0] < 0.1
    assert judged[table.SPREADS][0] < 0.1
    assert judged[table.WIDTHS][0] < 0.15
    assert judged[table.MEANS][1] == pytest.approx(0.05)


def rows_of(khat):
    return [
        measured(f"{name}: {guide}", metric, value, std_error=None, kind="measure")
        for name, values in khat.items()
        for guide, value in zip(table.GUIDES, values, strict=True)
        for metric in (table.KHAT, table.BOUND, table.MEANS, table.WIDTHS)
    ]


def test_verdicts_name_where_the_boosted_guide_is_not_best():
    rows = rows_of({"a": [4, 3, 2, 5, 1], "b": [4, 3, 2, 5, 1], "c": [0, 3, 2, 5, 1]})
    khat, bound, *_ = table.verdicts(rows, ("a", "b", "c"))
    assert khat["holds"]
    assert khat["evidence"] == (
        "2 of 3, 2 of them by more than twice the error of the draws; not on c (AutoNormal 0.00, "
        "boosted 1.00), 1 of them as clear"
    )
    assert not bound["holds"]
    assert "not on a (spline coupling 5.00, boosted 1.00)" in bound["evidence"]


def test_verdicts_tell_what_the_errors_leave_clear():
    rows = [
        row | {"std_error": 0.4}
        for row in rows_of({"a": [4, 3, 2, 5, 1], "b": [4, 3, 2.3, 5, 1], "c": [4, 3, 2, 5, 1.9]})
    ]
    khat = table.verdicts(rows, ("a", "b", "c"))[0]
    assert khat["evidence"] == "3 of 3, 1 of them by more than twice the error of the draws"
    assert khat["holds"]


def test_more_firsts_within_the_error_do_not_outweigh_a_clear_defeat():
    rows = [
        row | {"std_error": 0.4}
        for row in rows_of({"a": [4, 3, 2, 5, 1.9], "b": [4, 3, 2, 5, 1.8], "c": [0, 3, 2, 5, 3]})
    ]
    khat = table.verdicts(rows, ("a", "b", "c"))[0]
    assert not khat["holds"]
    assert khat["evidence"].startswith("2 of 3, 0 of them")


def test_the_noise_of_a_width_is_that_of_normal_draws():
    draws = torch.randn(400, 2000, generator=torch.Generator().manual_seed(0)).double()
    widths = table._width(draws)
    spread = float((widths / widths.mean()).std())
    assert spread == pytest.approx(table._EXACT_WIDTH / 20, rel=0.08)
