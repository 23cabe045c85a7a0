"""The density that a guide has to match, and the normal laws at which it starts."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from torch.distributions import MultivariateNormal

from pyroboost import flows
from pyroboost.guides import AutoBoostedFlow
from pyroboost.guides._placement import Whitening, build, place
from pyroboost.guides._start import candidates, distinct, elbos, follow, refine


def plain():
    """Scalars, vectors, simplexes, a correlation matrix, a plate and a scale."""
    with pyro.poutine.scale(scale=0.7):
        rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    with pyro.plate("rows", 4, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, rate))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.arange(4.0))
    pyro.factor("extra", -(corr.square().sum()) - shares[0])


def by_column(x):
    """A model that a plate of points outside cannot serve: a matrix product with a vector."""
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("rows", len(x), dim=-1):
        pyro.sample("y", dist.Normal(x @ b, 1.0), obs=torch.ones(len(x)))


def stubborn(x):
    """One that `torch.vmap` cannot serve: it asks for the value of a latent."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    if a.dim() == 0:
        float(a)
    pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def impossible(x):
    """One that is scored point by point."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(float(a.detach()) * 0 + a, 1.0), obs=x)


def target_of(model, *args, **options):
    guide = AutoBoostedFlow(model, 1, init="none", **options)
    guide(*args)
    return guide, guide._target(args, {}, guide._init_loc())


def test_the_density_is_that_of_pyros_own_potential():
    guide, target = target_of(plain)
    points = 0.5 * torch.randn(5, target.dim)
    _, potential, _, _ = initialize_model(plain, (), {}, initial_params=free(guide, points[0]))
    expected = torch.stack([-potential(free(guide, point)) for point in points])
    assert torch.allclose(target(points), expected, atol=1e-4)


def free(guide, point):
    return {site["name"]: value for site, value in guide._unpack_latent(point)}


@pytest.mark.parametrize(
    ("model", "way"), [(by_column, "_mapped"), (stubborn, "_plated"), (impossible, None)]
)
def test_many_points_are_scored_as_one_by_one(model, way):
    _, target = target_of(model, torch.ones(3, 3) if model is by_column else torch.tensor(0.3))
    assert getattr(target._many, "__name__", None) == way
    points = torch.randn(4, target.dim)
    assert torch.allclose(target(points), torch.stack([target._single(p) for p in points]))
    slope = target.gradient(points)[1]
    if model is not by_column:
        assert torch.allclose(slope[:, 0], (0.3 - 2 * points[:, 0]).double(), atol=1e-5)
        assert torch.allclose(target.hessian(points), torch.tensor([[-2.0]]).double())


def test_derivatives_are_those_of_the_formula():
    x = torch.randn(6, 3)
    _, target = target_of(by_column, x)
    points = torch.randn(2, 3)
    _, slope = target.gradient(points)
    residuals = 1 - points @ x.mT
    assert torch.allclose(slope, (residuals @ x - points).double(), atol=1e-4)
    hessian = -(x.mT @ x + torch.eye(3)).double()
    assert torch.allclose(target.hessian(points), hessian, atol=1e-4)


def test_a_point_where_the_model_fails_has_no_density():
    def fragile():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample(
            "b", dist.Normal(0.0, torch.where(a > 1, math.nan, a.exp())), obs=torch.ones(())
        )

    _, target = target_of(fragile)
    assert target(torch.tensor([[0.5], [2.0]])).isfinite().tolist() == [True, False]


def test_subsamples_are_drawn_once():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x), subsample_size=3, dim=-1) as index:
            pyro.sample("x", dist.Normal(a, 1.0), obs=x[index])

    _, target = target_of(model, torch.randn(50))
    points = torch.zeros(2, 1)
    assert not target.random
    assert torch.equal(target(points), target(points))


def test_sites_that_are_hidden_make_the_density_random():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        a = pyro.sample("a", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(a, 1.0), obs=torch.ones(()))

    guide = AutoBoostedFlow(poutine.block(model, hide=["z"]), 2)
    guide()
    assert guide._target((), {}, guide._init_loc()).random
    assert not guide.places
    guide.propose(1)


# Laws


def some_whitening(dim, rank):
    basis = torch.linalg.qr(torch.randn(dim, rank, dtype=torch.float64))[0]
    stretch, scale = 0.2 + torch.rand(rank), 0.5 + torch.rand(dim)
    return Whitening.of(torch.randn(dim).double(), scale.double(), basis, stretch.double())


@pytest.mark.parametrize(("dim", "rank"), [(1, 0), (1, 1), (4, 0), (4, 2), (5, 5)])
def test_a_frame_is_the_normal_law_it_says(dim, rank):
    law = some_whitening(dim, rank)
    points = torch.randn(7, dim).double()
    y, log_det = law.pull(points)
    assert torch.allclose(law.push(y)[0], points)
    jacobian = torch.autograd.functional.jacobian(lambda u: law.pull(u)[0], points[0])
    assert torch.allclose(jacobian.slogdet()[1], log_det[0])
    assert torch.allclose(law.push(y)[1], -log_det)
    matrix = law.push(torch.eye(dim).double())[0] - law.loc
    exact = MultivariateNormal(law.loc, matrix.mT @ matrix)
    assert torch.allclose(law.log_prob(points), exact.log_prob(points))


@pytest.mark.parametrize("full", [0, 10])
def test_a_component_is_placed_at_a_law(full):
    frame, start = some_whitening(4, 4), some_whitening(4, 0 if full == 0 else 4)
    if full == 0:
        frame = some_whitening(4, 0)
    flow = build(lambda dim: flows.realnvp(dim, spread=0.0), frame, full).double()
    place(flow, start)
    points = torch.randn(6, 4).double()
    z0, log_det = flow.inverse(points)
    log_q = -0.5 * (z0.square() + math.log(2 * math.pi)).sum(-1) + log_det
    assert torch.allclose(log_q, start.log_prob(points))


def gaussian(mean, cov):
    def model():
        pyro.sample("z", dist.MultivariateNormal(mean, cov))

    return model


@pytest.mark.parametrize("full", [0, 20])
@pytest.mark.parametrize("laplace", [True, False])
def test_a_normal_target_is_found(full, laplace):
    torch.manual_seed(1)
    root = torch.randn(6, 6, dtype=torch.float64) + 2 * torch.eye(6)
    scale = torch.tensor([1e3, 1.0, 1e-2, 10.0, 1.0, 5.0], dtype=torch.float64)
    cov = scale[:, None] * (root @ root.mT) * scale
    mean = scale * torch.arange(6.0)
    _, target = target_of(gaussian(mean, cov))
    found = follow(target, torch.zeros(6), laplace=laplace, full=full)
    y = found.law.pull(mean)[0]
    if full:
        assert float(y.norm()) < 1e-3
        matrix = found.law.push(torch.eye(6).double())[0] - found.law.loc
        assert torch.allclose(matrix.mT @ matrix / scale / scale[:, None], root @ root.mT)
        assert abs(found.elbo) < 1e-6
    else:  # a quasi-Newton path has seen a few directions only
        assert float(y.norm()) < 0.1


def test_quasi_newton_serves_many_dimensions():
    torch.manual_seed(0)
    scale = torch.linspace(0.5, 3.0, 150)

    def model():
        pyro.sample("z", dist.Normal(1.0, scale).to_event(1))

    _, target = target_of(model)
    found = follow(target, torch.zeros(150), laplace=False, full=100)
    assert float((found.law.loc - 1).abs().max()) < 0.2
    assert found.elbo > -1e-3  # that of a unit scale is about -60


def two_modes():
    """A low mode at -4, and one at 3 with 0.8 of the mass."""
    z = pyro.sample("z", dist.Normal(0.0, 100.0))
    parts = torch.stack(
        [
            math.log(0.2) + dist.Normal(-4.0, 0.5).log_prob(z),
            math.log(0.8) + dist.Normal(3.0, 0.3).log_prob(z),
        ],
        -1,
    )
    pyro.factor("p", parts.logsumexp(-1) - dist.Normal(0.0, 100.0).log_prob(z))


def test_the_higher_of_two_modes_comes_first():
    _, target = target_of(two_modes)
    starts = [torch.tensor([-5.0]), torch.tensor([4.0]), torch.tensor([-3.0])]
    found = candidates(target, starts, laplace=True, full=10)
    assert len(found) == 2
    assert [round(float(one.law.loc[0])) for one in found] == [3, -4]
    assert abs(found[0].elbo - math.log(0.8)) < 1e-2
    assert abs(found[1].elbo - math.log(0.2)) < 1e-2
    assert distinct(found[::-1]) == found


def test_natural_gradients_reach_the_best_normal_law():
    """For log p = -exp(z) + a z the best normal law solves two equations."""

    def model():
        pyro.sample("rate", dist.Gamma(3.0, 1.0))

    _, target = target_of(model)
    found = follow(target, torch.zeros(1), laplace=True, full=10)
    better = refine(target, found)
    # E[p'] = 3 - E[e^z] = 0 and -E[p''] = E[e^z] = 1 / s^2, so s^2 = 1/3, m = log 3 - 1/6.
    assert abs(float(better.law.loc[0]) - (math.log(3) - 1 / 6)) < 0.03
    matrix = better.law.push(torch.ones(1).double())[0] - better.law.loc
    assert abs(float(matrix.square().sum()) - 1 / 3) < 0.03
    assert better.elbo > float(elbos(target, [found.law], 5000)[0])


def test_a_density_without_a_mode_has_a_start():
    def model():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()).expand([9]).to_event(1))

    _, target = target_of(model)
    starts = [torch.randn(10) for _ in range(4)]
    path = candidates(target, starts, laplace=False, full=50)
    peak = candidates(target, starts, laplace=True, full=50)
    assert path[0].elbo > -3 > -8 > max(one.elbo for one in peak)
