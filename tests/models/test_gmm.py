"""The Gaussian mixture as a pair: exact likelihood, exact guide, gradients, EM's promises."""

import copy
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.mcmc import MCMC, NUTS
from sklearn.mixture import GaussianMixture
from torch import nn

from pyroboost.infer.objectives import scale_latents
from pyroboost.models._em import Mixture
from pyroboost.models.gmm import GMM

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
KINDS = ["full", "diag"]


def make(kind, k=3, dim=2, dtype=torch.float64, **names):
    """A mixture with every parameter away from its initial value."""
    gmm = GMM(k, dim, covariance=kind, **names).to(dtype)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in gmm.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=g, dtype=dtype))
    return gmm


def brute(gmm, x):
    """log m(x, c) by torch's own distributions, (N, K)."""
    weights, locs, scale = gmm.mixture
    if scale.dim() == 3:
        normal = torch.distributions.MultivariateNormal(locs, scale @ scale.mT)
    else:
        normal = torch.distributions.Independent(torch.distributions.Normal(locs, scale), 1)
    return weights.log() + normal.log_prob(x[:, None])


def two_moons(n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    angle = math.pi * torch.rand(n, generator=g)
    upper = torch.rand(n, generator=g) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], 1) + 0.1 * torch.randn(n, 2, generator=g)


def gradients(gmm):
    return torch.cat([p.grad.reshape(-1).clone() for p in gmm.parameters()])


def exact_gradient(gmm, x):
    gmm.zero_grad()
    (-gmm.log_marginal(x).value.sum()).backward()
    return gradients(gmm)


@pytest.mark.parametrize("kind", KINDS)
def test_densities_are_those_of_torch(kind):
    gmm, x = make(kind), torch.randn(6, 2, dtype=torch.float64)
    joint = brute(gmm, x)
    found = gmm.log_marginal(x)
    assert found.kind == "exact"
    torch.testing.assert_close(found.value, joint.logsumexp(-1))
    torch.testing.assert_close(gmm.responsibilities(x), joint.softmax(-1))
    prior = gmm.log_prior(torch.tensor([2, 0]))
    assert prior.kind == "exact"
    torch.testing.assert_close(prior.value, gmm.mixture.weights.log()[[2, 0]])
    trace = poutine.trace(gmm.marginal).get_trace(x)
    torch.testing.assert_close(trace.log_prob_sum(), found.value.sum())
    assert set(trace.stochastic_nodes) <= {"data"}


@pytest.mark.parametrize("kind", KINDS)
def test_density_integrates_to_one(kind):
    gmm = make(kind)
    axis = torch.linspace(-25, 25, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        total = gmm.log_marginal(grid).value.exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scikit_learn_scores_the_same(kind):
    data = two_moons().double()
    gmm = GMM(4, 2, covariance=kind).double()
    gmm.fit_em(data, start="kmeans", restarts=1, max_iterations=3)
    weights, locs, scale = gmm.mixture
    theirs = GaussianMixture(4, covariance_type=kind)
    theirs.weights_, theirs.means_ = weights.numpy(), locs.numpy()
    theirs.precisions_cholesky_ = (
        torch.linalg.inv(scale).mT if kind == "full" else 1 / scale
    ).numpy()
    expected = torch.from_numpy(theirs.score_samples(data.numpy()))
    with torch.no_grad():
        found = gmm.log_marginal(data).value
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", [(), (5,)])
def test_every_importance_weight_is_the_likelihood(kind, leading):
    """With the exact guide, log m(x, c) - log q(c | x) = log m(x) for every draw of c."""
    gmm, x = make(kind), torch.randn(*leading, 7, 2, dtype=torch.float64)
    expected = brute(gmm, x.reshape(-1, 2)).logsumexp(-1).reshape(*leading, 7)
    for guide in (gmm.guide, gmm.recognition):
        guided = poutine.trace(guide).get_trace(x)
        model = poutine.trace(poutine.replay(gmm.model, trace=guided)).get_trace(x)
        for trace in (guided, model):
            trace.compute_log_prob()
        sites = model.nodes["component"]["log_prob"] + model.nodes["x"]["log_prob"]
        torch.testing.assert_close(sites - guided.nodes["component"]["log_prob"], expected)
        assert guided.nodes["component"]["value"].shape == (*leading, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_both_elbos_are_the_likelihood(kind):
    gmm, x = make(kind), torch.randn(7, 2, dtype=torch.float64)
    expected = -float(gmm.log_marginal(x).value.detach().sum())
    every = config_enumerate(gmm.guide, "parallel")
    summed = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    assert Trace_ELBO().loss(gmm.model, gmm.guide, x) == pytest.approx(expected)
    assert summed.loss(gmm.model, gmm.guide, x) == pytest.approx(expected)
    assert summed.loss(gmm.model, every, x) == pytest.approx(expected)
    assert gmm.objective()(gmm.model, gmm.guide, x).item() == pytest.approx(expected)
    many = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert many.loss(gmm.model, gmm.guide, x) == pytest.approx(expected)


def test_objective_under_annealing_is_the_annealed_bound():
    gmm, x = make("full"), torch.randn(7, 2, dtype=torch.float64)
    joint, beta = brute(gmm, x), 0.3
    log_w, q = gmm.mixture.weights.log(), joint.softmax(-1)
    latent = log_w - joint.log_softmax(-1)
    expected = -(q * (beta * latent + joint - log_w)).sum()
    model = scale_latents(beta)(gmm.model)
    guide = scale_latents(beta, everything=True)(gmm.guide)
    torch.testing.assert_close(gmm.objective()(model, guide, x).detach(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["guide", "recognition"])
def test_enumerated_gradient_is_the_likelihoods(kind, which):
    gmm, x = make(kind), torch.randn(7, 2, dtype=torch.float64)
    expected = exact_gradient(gmm, x)
    gmm.zero_grad()
    loss = gmm.objective()(gmm.model, getattr(gmm, which), x)
    loss.backward()
    torch.testing.assert_close(gradients(gmm), expected)
    assert expected.abs().min() > 1e-6  # every parameter takes part


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_gradient_is_the_likelihoods_in_expectation(kind):
    gmm, x = make(kind), torch.randn(5, 2, dtype=torch.float64)
    expected = exact_gradient(gmm, x)
    draws = []
    for _ in range(200):
        gmm.zero_grad()
        Trace_ELBO().differentiable_loss(gmm.model, gmm.guide, x).backward()
        draws.append(gradients(gmm))
    draws = torch.stack(draws)
    error = draws.std(0) / math.sqrt(len(draws))
    z = (draws.mean(0) - expected) / error.clamp_min(1e-12)
    assert z.abs().max() < 4.0
    assert (error / expected.abs().mean()).max() < 0.2  # the test has power


def test_guide_sends_no_gradient_and_recognition_does():
    gmm, x = make("full"), torch.randn(5, 2, dtype=torch.float64)
    for program, expected in ((gmm.guide, False), (gmm.recognition, True)):
        trace = poutine.trace(program).get_trace(x)
        assert trace.log_prob_sum().requires_grad is expected


@pytest.mark.parametrize("kind", KINDS)
def test_svi_raises_the_likelihood(kind):
    data = two_moons()
    gmm = GMM(4, 2, covariance=kind)
    before = gmm.log_marginal(data).mean
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    guide = config_enumerate(gmm.guide, "parallel")
    svi = SVI(gmm.model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(150):
        svi.step(data)
    assert gmm.log_marginal(data).mean > before + 0.5
    assert gmm.log_marginal(data).mean > -2.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["prior", "kmeans", "current"])
def test_em_raises_the_likelihood_and_sets_the_parameters(kind, start):
    data = two_moons()
    gmm = GMM(5, 2, covariance=kind)
    result = gmm.fit_em(data, start=start, tolerance=1e-6)
    assert result.converged
    assert not result.kept_start
    assert result.held_out is None
    assert len(result.restarts) == (1 if start == "current" else 4)
    assert result.history[-1] == max(result.restarts)
    assert gmm.log_marginal(data).mean == pytest.approx(result.history[-1], abs=1e-4)
    assert result.history[-1] > -1.7
    assert result.seconds > 0


def test_fitted_likelihood_is_scikit_learns():
    data = two_moons().double()
    gmm = GMM(3, 2).double()
    weights, locs, scale = gmm.mixture
    theirs = GaussianMixture(
        3,
        tol=1e-9,
        max_iter=2000,
        weights_init=weights.numpy(),
        means_init=locs.numpy(),
        precisions_init=torch.cholesky_inverse(scale).numpy(),
        init_params="random_from_data",
    ).fit(data.numpy())
    gmm.fit_em(data, start="current", tolerance=1e-9, max_iterations=2000)
    assert gmm.log_marginal(data).mean == pytest.approx(theirs.score(data.numpy()), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_stage_on_standard_normals_cannot_lower_the_bound(kind):
    """Fitted to N(0, I) or to anything else, the training likelihood stays above log(1 - e)."""
    for data in (torch.randn(60, 3), 5 + 4 * torch.randn(60, 3)):
        normal = -0.5 * (data.square() + math.log(2 * math.pi)).sum(-1).mean()
        gmm = GMM(6, 3, covariance=kind)
        for steps in (0, 1, 50):
            gmm.fit_em(data, start_weight=0.02, max_iterations=steps)
            assert gmm.log_marginal(data).mean >= float(normal) + math.log1p(-0.02) - 1e-5


def test_start_is_kept_where_the_fit_does_worse_on_held_out_data():
    """Six full components on 40 standard normals of ten dimensions can only overfit."""
    data, held_out = torch.randn(40, 10), torch.randn(500, 10)
    gmm = GMM(6, 10)
    result = gmm.fit_em(data, validation=held_out, start_weight=0.02)
    assert result.kept_start
    assert result.held_out.fit < result.held_out.start
    assert result.held_out.start >= result.held_out.prior + math.log1p(-0.02)
    normal = -0.5 * (held_out.square() + math.log(2 * math.pi)).sum(-1).mean()
    assert result.held_out.prior == pytest.approx(float(normal), abs=1e-5)
    assert gmm.log_marginal(held_out).mean == pytest.approx(result.held_out.start, abs=1e-4)
    assert float(gmm.mixture.weights[0]) == pytest.approx(0.98)
    moons = GMM(4, 2)
    result = moons.fit_em(two_moons(), validation=two_moons(seed=1))
    assert not result.kept_start
    assert moons.log_marginal(two_moons(seed=1)).mean == pytest.approx(
        result.held_out.fit, abs=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_component_fits_by_its_moments(kind):
    data = 3 + two_moons()
    gmm = GMM(1, 2, covariance=kind)
    gmm.fit_em(data, restarts=1)
    torch.testing.assert_close(gmm.mixture.locs[0], data.mean(0))


def test_singular_data_leave_trainable_parameters():
    gmm = GMM(5, 2)
    gmm.fit_em(torch.tensor([[0.0, 1.0], [2.0, 2.0]]).repeat(20, 1))
    assert all(p.isfinite().all() for p in gmm.parameters())
    assert math.isfinite(gmm.log_marginal(torch.tensor([[0.0, 1.0]])).mean)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_density(kind):
    gmm = make(kind)
    draws = gmm.sample(40_000)
    assert draws.shape == (40_000, 2)
    assert draws.dtype == torch.float64
    weights, locs, scale = gmm.mixture
    mean = weights @ locs
    inner = scale @ scale.mT if kind == "full" else scale.square().diag_embed()
    moment = torch.einsum("k,kde->de", weights, inner + locs[:, :, None] * locs[:, None])
    error = draws.std(0) / 200
    assert ((draws.mean(0) - mean).abs() / error).max() < 4
    products = draws[:, :, None] * draws[:, None]
    assert ((products.mean(0) - moment).abs() / (products.std(0) / 200)).max() < 4


def test_encode_decode_and_predictive():
    gmm = make("full", visible="h", hidden="part")
    x = torch.randn(2000, 2, dtype=torch.float64)
    part = gmm.encode(x)
    assert part.shape == (2000,)
    expected = gmm.responsibilities(x).detach().mean(0)
    share = torch.bincount(part, minlength=3) / 2000
    assert ((share - expected).abs() < 4 * (0.25 / 2000) ** 0.5).all()
    only = gmm.decode(torch.full((2000,), 1))
    assert ((only.mean(0) - gmm.mixture.locs[1]).abs() < 4 * only.std(0) / 2000**0.5).all()
    draws = Predictive(gmm.model, guide=gmm.guide, num_samples=4)(x[:5])
    assert draws["part"].shape == (4, 5)
    assert draws["h"].shape == (4, 5, 2)


def test_nuts_samples_the_marginal_program():
    """The component summed out leaves a smooth density that NUTS can climb."""
    gmm = GMM(2, 2)
    gmm.mixture = Mixture(
        torch.tensor([0.3, 0.7]), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.ones(2, 2)
    )

    def model():
        return poutine.uncondition(gmm.marginal)(torch.zeros(1, 2))

    mcmc = MCMC(NUTS(model), num_samples=300, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["x"].reshape(-1, 2)
    assert (draws.mean(0) - torch.tensor([0.4, 0.35])).abs().max() < 0.35


@pytest.mark.parametrize("kind", KINDS)
def test_state_copies_and_precision(kind):
    gmm, x = make(kind), torch.randn(6, 2, dtype=torch.float64)
    value = gmm.log_marginal(x).value.detach()
    twin = copy.deepcopy(gmm)
    other = GMM(3, 2, covariance=kind).double()
    other.load_state_dict(gmm.state_dict())
    for same in (twin, other):
        torch.testing.assert_close(same.log_marginal(x).value, value)
        torch.testing.assert_close(same.objective()(same.model, same.guide, x), -value.sum())
    svi = SVI(twin.model, twin.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(x)
    assert not torch.allclose(twin.log_marginal(x).value, value)
    torch.testing.assert_close(gmm.log_marginal(x).value, value)
    single = copy.deepcopy(gmm).float()
    torch.testing.assert_close(
        single.log_marginal(x.float()).value.double(), value, atol=1e-4, rtol=0
    )
    assert len(list(gmm.parameters())) == (4 if kind == "full" else 3)


def test_mixture_round_trip():
    gmm = make("full")
    other = GMM(3, 2).double()
    other.mixture = gmm.mixture
    for a, b in zip(other.mixture, gmm.mixture, strict=True):
        torch.testing.assert_close(a, b)
    diagonal = make("diag")
    other.mixture = diagonal.mixture  # a diagonal is a full covariance too
    torch.testing.assert_close(other.mixture.scale, diagonal.mixture.scale.diag_embed())
    with pytest.raises(ValueError, match="cannot take full components"):
        diagonal.mixture = gmm.mixture
    with pytest.raises(ValueError, match=r"\(4, 2\)"):
        other.mixture = make("full", k=4).mixture


def test_em_is_reproducible_from_a_generator():
    data, found = two_moons(), []
    for _ in range(2):
        gmm = GMM(4, 2)
        state = torch.get_rng_state()
        gmm.fit_em(data, generator=torch.Generator().manual_seed(3))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(gmm.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(found[0].values(), found[1].values(), strict=True)
        if isinstance(a, torch.Tensor)
    )


def test_trains_with_plain_torch():
    data = two_moons()
    gmm = GMM(3, 2)
    optimiser = torch.optim.Adam(gmm.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = Trace_ELBO().differentiable_loss(gmm.model, gmm.guide, data)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert isinstance(gmm, nn.Module)


def test_misuse_is_refused_in_a_sentence():
    gmm, data = GMM(3, 2), two_moons()
    with pytest.raises(ValueError, match="at least 1"):
        GMM(0, 2)
    with pytest.raises(ValueError, match="'tied'"):
        GMM(2, 2, covariance="tied")
    for run in (gmm.log_marginal, gmm.fit_em, gmm.model, gmm.guide, gmm.marginal):
        with pytest.raises(ValueError, match=r"\(4, 3\).*\(N, 2\)"):
            run(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="2 data for 3 components"):
        gmm.fit_em(torch.zeros(2, 2))
    with pytest.raises(TypeError, match="one tensor"):
        gmm.fit_em([data])
    with pytest.raises(ValueError, match=r"validation.*NaN"):
        gmm.fit_em(data, validation=torch.full((3, 2), math.nan))
    for options in (
        {"start": "random"},
        {"start_weight": 1.0},
        {"restarts": 0},
        {"max_iterations": -1},
        {"tolerance": -1.0},
        {"variance_floor": 0.0},
        {"start": "current", "restarts": 2},
    ):
        with pytest.raises(ValueError, match=r"GMM\.fit_em: "):
            gmm.fit_em(data, **options)


def test_data_with_nan_have_no_likelihood():
    x = torch.zeros(3, 2)
    x[1, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 3 data hold NaN or infinity"):
        GMM(2, 2).log_marginal(x)
