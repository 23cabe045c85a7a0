"""The posterior over all latents of a model: exact where it can be, whole where it must be."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import Adam

from pyroboost import flows
from pyroboost.evaluation import posterior_quality
from pyroboost.guides import AutoBoostedFlow
from pyroboost.guides._placement import Whitening
from pyroboost.guides._residual import gains
from pyroboost.infer import boost

NOISE = 0.7
DATA = torch.Generator().manual_seed(0)
X = torch.cat([torch.ones(40, 1), torch.randn(40, 2, generator=DATA)], 1)
Y = X @ torch.tensor([1.0, -2.0, 0.5]) + NOISE * torch.randn(40, generator=DATA)


def regression(x, y):
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    mean = weights @ x.mT  # with particles (S, 1, N)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("y", dist.Normal(mean.squeeze(-2) if mean.dim() > 1 else mean, NOISE), obs=y)


def regression_posterior(x, y, spread=2.0, noise=NOISE):
    """Return the mean, the covariance and the log evidence of a normal regression."""
    x, y = x.double(), y.double()
    prior = spread**2 * torch.eye(x.shape[1]).double()
    cov = torch.linalg.inv(torch.linalg.inv(prior) + x.mT @ x / noise**2)
    of_y = x @ prior @ x.mT + noise**2 * torch.eye(len(x)).double()
    log_z = dist.MultivariateNormal(torch.zeros(len(x)).double(), of_y).log_prob(y)
    return cov @ x.mT @ y / noise**2, cov, float(log_z)


def several():
    """Sites of many supports, in and out of plates."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    pyro.sample("part", dist.Beta(2.0, 3.0))
    with pyro.plate("rows", 4, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, rate))
        pyro.sample("x", dist.Normal(z, 0.5 + shares[..., 0]), obs=torch.arange(4.0))


def halves():
    """Two narrow modes, with 0.3 and 0.7 of the mass."""
    z = pyro.sample("z", dist.Normal(0.0, 20.0).expand([2]).to_event(1))
    centre = torch.tensor([4.0, 4.0])
    parts = torch.stack(
        [
            math.log(share) + dist.Normal(sign * centre, 0.5).to_event(1).log_prob(z)
            for share, sign in ((0.3, -1.0), (0.7, 1.0))
        ],
        -1,
    )
    prior = dist.Normal(0.0, 20.0).expand([2]).to_event(1).log_prob(z)
    pyro.factor("p", parts.logsumexp(-1) - prior)


# The posterior is right


@pytest.mark.parametrize("init", ["laplace", "pathfinder"])
def test_a_normal_posterior_is_exact_before_any_training(init):
    flow = lambda dim: flows.realnvp(dim, spread=0.0)  # noqa: E731
    guide = AutoBoostedFlow(regression, 2, flow, init=init)
    guide(X.double(), Y.double())
    mean, cov, log_z = regression_posterior(X, Y)
    exact = dist.MultivariateNormal(mean, cov)
    points = mean + torch.randn(20, 3).double()
    close = torch.isclose(guide.get_posterior().log_prob(points), exact.log_prob(points), atol=1e-3)
    assert bool(close.all())
    quality = posterior_quality((regression, guide), X.double(), Y.double(), num_samples=50)
    assert abs(quality.elbo.value - log_z) < 2e-3


def test_boosting_leaves_a_normal_posterior_near_the_closed_form():
    guide = AutoBoostedFlow(regression, 2, "lower")
    boost((regression, guide), (X, Y), steps=30, num_samples=200, seed=0, progress=False)
    mean, cov, log_z = regression_posterior(X, Y)
    draws = guide.get_posterior().sample((20_000,)).double()
    sd = cov.diagonal().sqrt()
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 0.1
    assert float(((draws.T.cov() - cov) / sd / sd[:, None]).abs().max()) < 0.1
    quality = posterior_quality((regression, guide), X, Y, num_samples=500)
    assert quality.importance_bound.value == pytest.approx(log_z, abs=0.05)


def test_raw_scales_do_not_matter():
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(60, 2, generator=generator) * torch.tensor([700.0, 0.01])
    x = torch.cat([torch.ones(60, 1), torch.tensor([4000.0, 0.5]) + raw], 1)
    y = x @ torch.tensor([3.0, 0.01, 40.0]) + torch.randn(60, generator=generator)

    def model(x, y):
        weights = pyro.sample("weights", dist.Normal(x.new_zeros(3), 100.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)

    x, y = x.double(), y.double()
    guide = AutoBoostedFlow(model, 1, "lower")
    log_z = regression_posterior(x, y, 100.0, 1.0)[2]
    quality = posterior_quality((model, guide), x, y, num_samples=100)
    assert quality.elbo.value == pytest.approx(log_z, abs=0.2)


def test_the_second_mode_is_found_with_its_weight():
    guide = AutoBoostedFlow(halves, 2, "lower", num_starts=6)
    pyro.set_rng_seed(2)
    options = {"num_particles": 8, "num_samples": 500, "finetune": 0}
    boost((halves, guide), steps=60, lr=3e-3, seed=0, progress=False, **options)
    draws = guide.get_posterior().sample((20_000,))
    assert float((draws[:, 0] > 0).float().mean()) == pytest.approx(0.7, abs=0.02)
    with torch.no_grad():
        log_w = guide.log_density(draws) - guide.get_posterior().log_prob(draws)
    assert abs(float(log_w.mean())) < 0.05  # the density is normalised: log Z = 0


def test_a_proposal_goes_to_the_mode_that_is_missing():
    guide = AutoBoostedFlow(halves, 2, "lower", num_starts=1, init_loc_fn=near(4.0))
    guide()
    assert float(guide.whitening.loc[0]) == pytest.approx(4.0, abs=0.1)
    other = started_at(-4.0)
    guide.places.extend(one.law for one in other._search(target_of(other)))
    guide.propose(1)
    placed = guide.components.flows[1](torch.zeros(1, 2))[0]
    assert torch.allclose(placed, torch.tensor([[-4.0, -4.0]]), atol=0.3)


def test_the_gain_of_a_law_is_that_of_the_mixture():
    """A normal law at the missing mode gains -log 0.7; one that is nowhere gains nothing."""
    guide = AutoBoostedFlow(
        halves, 2, partial(flows.lower, spread=0.0), num_starts=1, init_loc_fn=near(4.0)
    )
    guide()
    missing = started_at(-4.0).places[0]
    nowhere = Whitening.of(missing.loc - 20, missing.scale, missing.basis, missing.stretch)
    found = gains(target_of(guide), guide.get_posterior(), [missing, nowhere])
    assert float(found[0]) == pytest.approx(-math.log(0.7), abs=0.03)  # weights on a grid
    assert float(found[1]) < 0


def near(value):
    return init_to_value(values={"z": torch.full((2,), value)})


def started_at(value):
    guide = AutoBoostedFlow(halves, 2, "lower", num_starts=1, init_loc_fn=near(value))
    guide()
    return guide


def target_of(guide, *args):
    return guide._target(args, {}, guide._init_loc())


def test_a_second_proposal_goes_elsewhere():
    guide = AutoBoostedFlow(halves, 2, "lower", num_starts=1, init_loc_fn=near(4.0))
    places = []
    for _ in range(2):
        guide.propose(1)
        places.append(guide.components.flows[1](torch.zeros(1, 2))[0])
    assert not torch.allclose(places[0], places[1], atol=0.01)


def test_a_proposal_covers_what_a_narrow_start_misses():
    """The target has thicker tails than any normal law: a mixture of widths is better."""

    def model():
        pyro.sample("z", dist.StudentT(3.0).expand([2]).to_event(1))

    guide = AutoBoostedFlow(model, 2, "lower", init="laplace")
    guide()
    guide.propose(1)
    mixture = guide.get_posterior()
    before = -divergence(guide, mixture)
    guide.components.weights[:] = torch.tensor([0.6, 0.4])
    assert -divergence(guide, guide.get_posterior()) > before + 0.01


def divergence(guide, law):
    with torch.no_grad():
        draws, log_q = law.sample_and_log_prob((20_000,))
        return float((log_q - guide.log_density(draws)).mean())


# As a Pyro guide


@pytest.mark.parametrize("flow", ["spline", "affine", "lower", "realnvp"])
def test_all_supports_are_kept(flow):
    guide = AutoBoostedFlow(several, 2, flow, num_starts=2)
    found = Predictive(several, guide=guide, num_samples=7)()
    assert found["shares"].shape[-1] == 3
    assert torch.allclose(found["shares"].sum(-1), torch.ones(7, 1).squeeze(-1), atol=1e-5)
    assert bool((found["rate"] > 0).all())
    assert found["z"].shape == (7, 4)
    assert bool((found["corr"].square().sum(-1) - 1 < 1e-4).all())
    medians, quantiles = guide.median(), guide.quantiles([0.1, 0.9])
    assert medians["z"].shape == (4,)
    assert quantiles["z"].shape == (2, 4)
    assert bool(
        (quantiles["z"][0] < medians["z"]).all() and (medians["z"] < quantiles["z"][1]).all()
    )


def test_the_guide_scores_latents_as_its_posterior_does():
    """The density of the constrained sites is the mixture's, with the transforms' volumes."""
    guide = AutoBoostedFlow(several, 2, "lower", num_starts=2)
    guide()
    guide.components.weights[:] = torch.tensor([0.5, 0.5])
    trace = poutine.trace(guide).get_trace()
    total = trace.log_prob_sum()
    replayed = poutine.trace(poutine.replay(several, trace=trace)).get_trace()
    u = trace.nodes[f"_{guide._pyro_name}_latent"]["value"]
    expected = guide.log_density(u[None])[0] - guide.get_posterior().log_prob(u)
    assert torch.allclose(replayed.log_prob_sum() - total, expected, atol=1e-3)


@pytest.mark.parametrize("dim", [1, 2])
def test_one_dimension_gets_a_flow_that_can_move_it(dim):
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([dim]).to_event(1))

    guide = AutoBoostedFlow(model, 2, "nice")
    guide()
    assert guide.components.flows[0].name == ("spline" if dim == 1 else "nice")


def test_components_may_differ():
    guide = AutoBoostedFlow(regression, flow=["spline", flows.lu, "affine"])
    guide(X, Y)
    assert [flow.name for flow in guide.components.flows] == ["spline", "lu", "affine"]


def test_plain_svi_trains_one_component():
    guide = AutoBoostedFlow(regression, 1, "realnvp", init="none")
    svi = SVI(regression, guide, Adam({"lr": 0.02}), Trace_ELBO(max_plate_nesting=1))
    losses = [svi.step(X, Y) for _ in range(60)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_particles_are_drawn_in_one_pass():
    objective = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    guide = AutoBoostedFlow(several, 2, "lower", num_starts=2)
    guide()
    guide.components.weights[:] = torch.tensor([0.5, 0.5])
    with torch.no_grad():
        together = -objective.loss(several, guide)
        draws, log_q = guide.get_posterior().sample_and_log_prob((2000,))
        apart = guide.log_density(draws) - log_q
    assert together == pytest.approx(float(apart.mean()), abs=5 * float(apart.std()) / 1000**0.5)


def test_several_components_are_refused_by_an_ordinary_objective():
    guide = AutoBoostedFlow(regression, 2, "lower")
    guide(X, Y)
    guide.components.weights[:] = torch.tensor([0.5, 0.5])
    svi = SVI(regression, guide, Adam({"lr": 0.01}), Trace_ELBO(max_plate_nesting=1))
    with pytest.raises(NotImplementedError, match=r"2 components have weight.*boost"):
        svi.step(X, Y)
    assert math.isfinite(svi.evaluate_loss(X, Y))
    assert math.isfinite(Trace_ELBO().loss(regression, guide, X, Y))  # gradients are on


def mixed(y):
    """A mixture with discrete labels."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y), dim=-1):
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(torch.where(z > 0, mu[..., 1], mu[..., 0]), 1.0), obs=y)


def test_hidden_labels_are_enumerated():
    y = torch.tensor([-2.0, -2.2, 2.0, 1.7])
    guide = AutoBoostedFlow(poutine.block(mixed, hide=["z"]), 1, "lower")
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    svi = SVI(config_enumerate(mixed), guide, Adam({"lr": 0.05}), objective)
    losses = [svi.step(y) for _ in range(40)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-10:]) < sum(losses[:10])


def test_it_is_a_member_of_a_list():
    guide = AutoGuideList(several)
    guide.append(AutoBoostedFlow(poutine.block(several, expose=["rate", "z"]), 1, "lower"))
    guide.append(AutoNormal(poutine.block(several, hide=["rate", "z"])))
    svi = SVI(several, guide, Adam({"lr": 0.01}), Trace_ELBO(max_plate_nesting=1))
    assert all(math.isfinite(svi.step()) for _ in range(5))
    assert set(guide()) == set(guide.median()) == {"rate", "shares", "corr", "part", "z"}
    assert set(guide.quantiles([0.2, 0.8])) == set(guide.median())
    state = guide.state_dict()
    # The other part does not know its state before its first call; this one does.
    alone = AutoBoostedFlow(several, 1, "lower", num_starts=2)
    alone.load_state_dict({k[2:]: v for k, v in state.items() if k.startswith("0.")})
    assert torch.equal(alone.whitening.loc, guide[0].whitening.loc)


@pytest.mark.parametrize("other", [AutoNormal, AutoDelta])
def test_a_member_of_a_list_is_boosted_to_the_other_mode(other):
    """The two modes of a have the odds of a quadrature; b is what the other guide is for."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 3.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a * a + 0.3 * a, 0.5), obs=torch.tensor(9.0))

    grid = torch.linspace(-6, 6, 4001)
    log_p = dist.Normal(0.0, 3.0).log_prob(grid)
    log_p = log_p + dist.Normal(grid * grid + 0.3 * grid, 0.5).log_prob(torch.tensor(9.0))
    share = float(log_p.softmax(0)[grid > 0].sum())
    guide = AutoGuideList(model)
    guide.append(AutoBoostedFlow(poutine.block(model, expose=["a"]), 2, "affine"))
    guide.append(other(poutine.block(model, expose=["b"])))
    boost((model, guide), (), steps=200, seed=0)
    draws = guide[0].get_posterior().sample((20_000,))
    assert float((draws > 0).float().mean()) == pytest.approx(share, abs=0.02)


def test_a_new_component_sees_the_other_members_of_a_list_at_their_medians():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 0.1))

    guide = AutoGuideList(model)
    guide.append(AutoBoostedFlow(poutine.block(model, expose=["b"]), 2, "affine"))
    guide.append(AutoNormal(poutine.block(model, expose=["a"])))
    guide()
    with torch.no_grad():
        guide[1].locs.a.fill_(2.0)
    b = torch.tensor([[2.0], [2.1]])
    expected = dist.Normal(2.0, 0.1).log_prob(b[:, 0]) + dist.Normal(0.0, 1.0).log_prob(
        torch.tensor(2.0)
    )
    assert torch.allclose(guide[0].log_density(b), expected, atol=1e-5)


def test_a_list_is_scored_by_the_joint():
    """The start of a member takes the other members where these start."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 0.1))

    guide = AutoGuideList(model)
    guide.append(
        AutoDelta(
            poutine.block(model, expose=["a"]),
            init_loc_fn=init_to_value(values={"a": torch.tensor(3.0)}),
        )
    )
    guide.append(AutoBoostedFlow(poutine.block(model, expose=["b"]), 1, "affine"))
    guide()
    started = guide.prototype_trace.nodes["a"]["value"]
    assert float(guide[1].whitening.loc[0]) == pytest.approx(float(started), abs=0.05)


def test_nuts_runs_in_the_coordinates_of_the_best_component():
    guide = AutoBoostedFlow(regression, 2, "realnvp")
    guide(X, Y)
    guide.propose(1, X, Y)
    guide.components.weights[:] = torch.tensor([0.3, 0.7])
    neutra = NeuTraReparam(guide)
    model = neutra.reparam(regression)
    potential = initialize_model(model, (X, Y))[1]
    z0 = torch.randn(3)
    u, log_det = guide.components.flows[1](z0)
    expected = guide.log_density(u[None], X, Y)[0] + log_det
    found = -potential({"weights_shared_latent": z0})
    assert torch.allclose(found, expected, atol=1e-3)
    mcmc = MCMC(NUTS(model, max_plate_nesting=1), 5, 5, disable_progbar=True)
    mcmc.run(X, Y)
    draws = neutra.transform_sample(mcmc.get_samples()["weights_shared_latent"])
    assert bool(draws["weights"].isfinite().all())


# Copies and states


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_can_be_loaded_before_the_first_call(dtype):
    guide = AutoBoostedFlow(regression, 3, ["realnvp", "spline", "lower"])
    guide(X, Y)
    guide.to(dtype)
    guide.propose(1, X, Y)
    guide.components.weights[:] = torch.tensor([0.5, 0.3, 0.2])
    points = torch.randn(10, 3, dtype=dtype)
    fresh = AutoBoostedFlow(regression, 3, ["realnvp", "spline", "lower"])
    fresh.load_state_dict(guide.state_dict())
    assert torch.equal(
        fresh.get_posterior().log_prob(points), guide.get_posterior().log_prob(points)
    )
    fresh(X, Y)  # finds the model's sites, and leaves the flows alone
    assert torch.equal(
        fresh.get_posterior().log_prob(points), guide.get_posterior().log_prob(points)
    )
    again = AutoBoostedFlow(regression, 3, ["realnvp", "spline", "lower"], init="none")
    again(X, Y)
    again.to(dtype).load_state_dict(guide.state_dict())
    assert torch.equal(
        again.get_posterior().log_prob(points), guide.get_posterior().log_prob(points)
    )


def test_a_state_of_another_model_is_refused():
    guide = AutoBoostedFlow(halves, 1, "lower")
    guide()
    other = AutoBoostedFlow(regression, 1, "lower")
    other.load_state_dict(guide.state_dict())
    with pytest.raises(ValueError, match="2 latent dimensions and this model 3"):
        other(X, Y)


def test_a_copy_is_whole_and_moves_alone():
    guide = AutoBoostedFlow(regression, 2, "realnvp")
    guide(X, Y)
    points = torch.randn(10, 3)
    before = guide.get_posterior().log_prob(points)
    twin = copy.deepcopy(guide)
    assert torch.equal(twin.get_posterior().log_prob(points), before)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
        twin.whitening.loc.add_(1.0)
    twin.propose(1, X, Y)
    assert guide._model is not None
    assert twin._model is not None
    assert torch.equal(guide.get_posterior().log_prob(points), before)
    guide.propose(1, X, Y)  # the model is still there
    twin(X, Y)


def test_double_precision_gives_the_same_density():
    guide = AutoBoostedFlow(regression, 2, "spline")
    guide(X, Y)
    points = torch.randn(10, 3)
    before = guide.get_posterior().log_prob(points)
    after = guide.double().get_posterior().log_prob(points.double())
    assert torch.allclose(after, before.double(), atol=1e-3)
    assert guide(X.double(), Y.double())["weights"].dtype == torch.float64


def test_a_state_of_the_process_is_left_alone():
    guide = AutoBoostedFlow(regression, 2, lambda dim: flows.realnvp(dim, 1, units=4))
    guide(X, Y)
    state = torch.get_rng_state()
    guide.median(), guide.quantiles([0.1, 0.5])
    guide.log_density(torch.zeros(2, 3), X, Y)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(pyro.get_param_store()) == len(list(guide.named_parameters()))


def test_a_start_draws_no_more_than_a_prototype_and_the_flows():
    def consumed(**options):
        torch.manual_seed(5)
        guide = AutoBoostedFlow(regression, 2, "realnvp", **options)
        guide(X, Y)
        return torch.get_rng_state()

    assert torch.equal(consumed(init="none"), consumed(init="pathfinder"))
    assert torch.equal(consumed(init="laplace"), consumed(num_starts=3))


def test_the_same_seed_gives_the_same_start():
    def built():
        torch.manual_seed(5)
        guide = AutoBoostedFlow(regression, 2, "realnvp")
        guide(X, Y)
        return guide.whitening.loc

    assert torch.equal(built(), built())


# Refusals


def test_a_latent_in_a_subsampled_plate_is_refused():
    def model(x):
        with pyro.plate("rows", 10, subsample_size=4, dim=-1) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = AutoBoostedFlow(model)
    for _ in range(2):  # and stays so
        with pytest.raises(NotImplementedError, match=r"site 'z' is in plate 'rows'.* 4 of 10"):
            guide(torch.zeros(10))


def test_data_in_a_subsampled_plate_are_not():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=4, dim=-1) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = AutoBoostedFlow(model, 1)
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO(max_plate_nesting=1))
    assert math.isfinite(svi.step(torch.zeros(10)))


def test_discrete_latents_are_refused_with_advice():
    with pytest.raises(ValueError, match=r"discrete sample site 'z'.*poutine.block"):
        AutoBoostedFlow(mixed)(torch.zeros(3))


def test_a_model_without_latents_is_refused():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(()))

    with pytest.raises(RuntimeError, match="found no latent variables"):
        AutoBoostedFlow(model)()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init": "map"}, "init is 'map'"),
        ({"num_starts": 0}, "num_starts is 0"),
        ({"full": -1}, "full is -1"),
        ({"components": 0}, "components=0"),
        ({"components": 3, "flow": ["lower", "lower"]}, "2 flows came for components=3"),
        ({"flow": "planar"}, "flow is 'planar'"),
    ],
)
def test_options_of_no_use_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AutoBoostedFlow(regression, **options)


@pytest.mark.parametrize(
    ("flow", "kind", "words"),
    [
        (lambda dim: flows.Flow([planar(dim)], name="planar"), ValueError, "no inverse"),
        (lambda dim: flows.lower(dim + 1), ValueError, "4 dimensions and the model 3"),
        (lambda dim: flows.lower(dim, context=2), ValueError, "context of width 2"),
        (lambda dim: dim, TypeError, "built int"),
    ],
)
def test_flows_of_no_use_are_refused(flow, kind, words):
    with pytest.raises(kind, match=words):
        AutoBoostedFlow(regression, 2, flow)(X, Y)


def planar(dim):
    from pyro.distributions.transforms import planar as build

    return build(dim)


def test_an_autoregressive_flow_is_boosted_on_request():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a * a, 0.5))

    with pytest.raises(ValueError, match="allow_slow=True"):
        AutoBoostedFlow(model, 2, lambda dim: flows.iaf(dim))()
    guide = AutoBoostedFlow(model, 2, lambda dim: flows.iaf(dim), allow_slow=True)
    found = boost((model, guide), (), steps=40, num_samples=200, seed=0)
    assert found.bound.value < 4.5 * found.bound.error  # the evidence is one
    other = AutoBoostedFlow(model, 2, lambda dim: flows.iaf(dim), allow_slow=True)
    other.load_state_dict(guide.state_dict())
    points = torch.randn(5, 2)
    expected = guide.get_posterior().log_prob(points)
    assert torch.allclose(other.get_posterior().log_prob(points), expected)


def test_what_is_neither_a_name_nor_a_function_is_refused():
    with pytest.raises(TypeError, match="flow is int"):
        AutoBoostedFlow(regression, 1, [3])


def test_a_density_that_is_nowhere_finite_is_refused():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.tensor(-math.inf))

    with pytest.raises(RuntimeError, match="finite log density"):
        AutoBoostedFlow(model)()


def test_the_posterior_needs_a_dimension():
    with pytest.raises(RuntimeError, match="call the guide once"):
        AutoBoostedFlow(regression).get_posterior()


def test_starts_where_the_density_is_not_finite_are_passed_over():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        pyro.factor("half", torch.where(z > 0.5, -z, z * 0 - math.inf))

    pyro.set_rng_seed(1)
    guide = AutoBoostedFlow(
        model, 1, init_loc_fn=partial(init_to_value, values={"z": torch.tensor(-1.0)})
    )
    guide()
    assert float(guide.whitening.loc) > 0.5


def test_a_proposal_follows_from_state_attempt_and_seed():
    """A guide that has loaded the state of another, as after a kill, proposes the same."""
    one = AutoBoostedFlow(halves, 2, "lower", num_starts=2)
    one()
    two = AutoBoostedFlow(halves, 2, "lower", num_starts=2)
    two.load_state_dict(one.state_dict())
    two()
    assert len(two.places) == len(one.places) > 0
    places = []
    for guide, attempt in ((one, 0), (one, 1), (two, 1), (two, 0)):
        pyro.set_rng_seed(3)
        guide.propose(1, attempt=attempt)
        with torch.no_grad():
            places.append(guide.components.flows[1](torch.zeros(1, 2))[0])
    torch.testing.assert_close(places[0], places[3])
    torch.testing.assert_close(places[1], places[2])
    assert not torch.equal(places[0], places[1])
