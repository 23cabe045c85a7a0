"""EUBO = log p(x) + KL(p || q) in closed form, for guides of every make."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import (
    SD,
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
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
    init_to_value,
)
from torch import nn

from pyroboost import MetaModel
from pyroboost.diagnostics import eubo

X = torch.tensor([2.0, -1.0], dtype=torch.float64)


@pytest.mark.parametrize(("width", "shift"), [(1.0, 0.0), (0.7, 0.0), (1.3, 0.4)])
def test_gaussian(width, shift):
    found = eubo((model, guide(width, shift)), exact(X), X)
    wanted = evidence(X) + reverse_kl(width, shift)
    assert abs(found.value - wanted) < 4.5 * found.std_error + 1e-7
    assert found.std_error < 0.06
    if (width, shift) == (1.0, 0.0):
        assert found.std_error < 1e-9


def test_bounds_and_both_divergences():
    assert reverse_kl(0.5) > kl(0.5)  # a narrow guide costs more from above
    found = eubo((model, guide(0.5)), exact(X, 500), X, num_samples=500)
    assert found.value - evidence(X) > kl(0.5)


def test_each_datum_has_its_own():
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    pair = MetaModel(local_model, local_guide(0.7), visible="x", hidden="z")
    for judged in (pair, (local_model, local_guide(0.7))):
        found = eubo(judged, exact(x, 400), x)
        wanted = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x) + reverse_kl(0.7, size=1)
        torch.testing.assert_close(found.per_datum, wanted, rtol=0.0, atol=0.4)
        assert found.value == pytest.approx(float(wanted.mean()), abs=0.12)


def test_error_counts_effective_draws():
    slow = exact(X, 1000)["z"]
    for t in range(1, 1000):
        slow[t] = X / 2 + 0.9 * (slow[t - 1] - X / 2) + math.sqrt(1 - 0.81) * (slow[t] - X / 2)
    one = eubo((model, guide(0.7)), {"z": slow}, X)
    two = eubo((model, guide(0.7)), exact(X, 1000), X)
    assert one.std_error > 1.7 * two.std_error


def test_a_missed_mode_makes_it_large():
    found = eubo((two_modes, one_mode), two_mode_draws(500), num_samples=500)
    # KL(p || q) is half of 12^2 / 2 plus the half within the mode, log(1/2).
    assert abs(found.value - (36.0 - math.log(2.0))) < 4.5 * found.std_error


# Constrained sites: the posterior of log s is N(x / 2, 1 / 2), and w is not informed


def scales(x):
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("parts", 2):
        pyro.sample("w", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    pyro.sample("x", dist.LogNormal(s.log(), 1.0), obs=x)


def scale_draws(count):
    w = dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])).sample((count, 2))
    return {"s": (0.5 + SD * torch.randn(count)).exp(), "w": w}


def hand(guide, x, draws):
    """E_p[log p - log q] with q a diagonal Gaussian on log s and stick-breaking w."""
    stick = torch.distributions.biject_to(torch.distributions.constraints.simplex)
    loc_s, loc_w = 0.2, torch.tensor([0.1, -0.2])
    s, w = draws["s"], draws["w"]
    u = stick.inv(w)
    jacobian = stick.log_abs_det_jacobian(u, w).sum(-1) + s.log()
    log_q = dist.Normal(loc_s, 0.6).log_prob(s.log()) - jacobian
    log_q = log_q + dist.Normal(loc_w, 0.6).log_prob(u).sum((-1, -2))
    log_p = dist.LogNormal(0.0, 1.0).log_prob(s) + dist.LogNormal(s.log(), 1.0).log_prob(x)
    log_p = log_p + dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])).log_prob(w).sum(-1)
    return float((log_p - log_q).mean())


def started(make):
    stick = torch.distributions.biject_to(torch.distributions.constraints.simplex)
    w = stick(torch.tensor([0.1, -0.2])).expand(2, 3)
    start = init_to_value(values={"s": torch.tensor(0.2).exp(), "w": w})
    return make(scales, init_loc_fn=start, init_scale=0.6)


def lists(program, **options):
    parts = AutoGuideList(program)
    parts.append(AutoDiagonalNormal(poutine.block(program, hide=["w"]), **options))
    parts.append(AutoNormal(poutine.block(program, hide=["s"]), **options))
    return parts


@pytest.mark.parametrize(
    "make",
    [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, lists],
    ids=lambda m: m.__name__,
)
def test_automatic_guides_are_scored_through_the_unconstrained_space(make):
    x, draws = torch.tensor(math.e), scale_draws(60)
    auto = started(make)
    found = eubo((scales, auto), draws, x)
    assert found.value == pytest.approx(hand(auto, x, draws), abs=1e-3)


def test_sites_that_the_guide_leaves_to_the_prior_are_taken_from_the_reference():
    def chain(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def part(x):
        pyro.sample("a", dist.Normal(0.5, 0.8))

    draws = {"a": torch.full((8,), 0.3), "b": torch.full((8,), 1.1)}
    x = torch.tensor(2.0)
    wanted = (
        dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.3))
        + dist.Normal(1.1, 1.0).log_prob(x)
        - dist.Normal(0.5, 0.8).log_prob(torch.tensor(0.3))
    )
    assert eubo((chain, part), draws, x).value == pytest.approx(float(wanted), abs=1e-5)


class TestRefusals:
    def test_structured_guide_names_its_site(self):
        auto = AutoStructured(model, conditionals="mvn")
        with pytest.raises(ValueError, match="draws 'z_aux' besides the model's sites"):
            eubo((model, auto), {"z": torch.randn(10, 2)}, X.float())

    def test_flow_without_an_inverse(self):
        class Planar(nn.Module):
            def __init__(self):
                super().__init__()
                self.flow = dist.transforms.Planar(2)

            def forward(self, x):
                base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
                pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))

        with pytest.raises(ValueError, match="cannot score a point that it did not draw"):
            eubo((model, Planar()), {"z": torch.randn(10, 2)}, X.float())

    def test_missing_site_and_other_shape(self):
        with pytest.raises(ValueError, match="no draws of 'z'"):
            eubo((model, guide()), {"w": torch.randn(10, 2)}, X)
        with pytest.raises(ValueError, match="have shape"):
            eubo((model, guide()), {"z": torch.randn(10, 3)}, X)

    def test_outside_the_support(self):
        draws = scale_draws(10)
        draws["s"][3] = 0.0
        with pytest.raises(ValueError, match="on or beyond the edge"):
            eubo((scales, started(AutoNormal)), draws, torch.tensor(1.0))

    def test_guide_without_mass(self):
        def narrow(x):
            law = dist.Uniform(torch.zeros_like(x), 1.0, validate_args=False)
            pyro.sample("z", law.to_event(1))

        with pytest.raises(ValueError, match="infinite bound"):
            eubo((model, narrow), {"z": 3 + torch.rand(10, 2, dtype=X.dtype)}, X)
