"""The mixture of flows: exact density and guide, boosting on data, matching of densities."""

import copy
import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate

from pyroboost import flows
from pyroboost.compose import Cascade, Mixture, Product
from pyroboost.compose._line_search import best_weight, slope_at_zero, tempered
from pyroboost.data import plane_grid
from pyroboost.evaluation import log_weights
from pyroboost.infer import fit as fit_pair
from pyroboost.infer import greedy
from pyroboost.models import VAE, FlowMixture
from pyroboost.models._flow_weights import nearest, solve_weights

DOUBLE = torch.float64
SMALL = partial(flows.realnvp, steps=1, units=8, spread=0.2)


def make(count=3, weights=(0.5, 0.2, 0.3), **options):
    """A mixture in double precision, far from the identity, at another place and scale."""
    mixture = FlowMixture(2, count, SMALL, **options).double()
    mixture.weights = torch.tensor(weights)
    mixture.components.loc.copy_(torch.tensor([0.5, -0.3]))
    mixture.components.scale.copy_(torch.tensor([1.5, 0.7]))
    return mixture


def by_hand(mixture, x):
    """log w_c g_c(x) by torch's own change of variables.  # (N, C)"""
    parts, base, found = mixture.components, dist.Normal(0.0, 1.0), []
    for c, flow in enumerate(parts.flows.flows):
        y = (x - parts.loc) / parts.scale
        z0 = flow.inverse(y)[0]
        jacobian = torch.func.vmap(torch.func.jacrev(lambda v, f=flow: f.inverse(v)[0]))(y)
        log_g = base.log_prob(z0).sum(-1) + jacobian.det().abs().log() - parts.scale.log().sum()
        found.append(log_g + mixture.weights[c].log())
    return torch.stack(found, -1)


def two_modes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.rand(count, generator=generator) < 0.3
    place = torch.where(left, -2.5, 2.5)[:, None] * torch.tensor([1.0, 0.5])
    return place + 0.5 * torch.randn(count, 2, generator=generator)


# The density


def test_density_posterior_and_joint_are_those_by_hand():
    mixture, x = make(), torch.randn(20, 2, dtype=DOUBLE)
    joint = by_hand(mixture, x)
    found = mixture.log_marginal(x)
    assert found.kind == "exact"
    torch.testing.assert_close(found.value, joint.logsumexp(-1))
    torch.testing.assert_close(mixture.responsibilities(x), joint.softmax(-1))
    c = torch.randint(3, (20,))
    program = poutine.condition(mixture.model, data={"component": c})
    trace = poutine.trace(program).get_trace(x)
    torch.testing.assert_close(trace.log_prob_sum(), joint[torch.arange(20), c].sum())
    marginal = poutine.trace(mixture.marginal).get_trace(x)
    torch.testing.assert_close(marginal.log_prob_sum(), joint.logsumexp(-1).sum())
    torch.testing.assert_close(mixture.log_prior(c).value, mixture.weights.log()[c])
    alone = mixture.component(1).log_marginal(x).value
    torch.testing.assert_close(alone, joint[:, 1] - mixture.weights[1].log())


def test_the_density_integrates_to_one():
    mixture, grid = make(), plane_grid(20.0, 500, dtype=DOUBLE)
    value = grid.evaluate(lambda x: mixture.log_marginal(x).value)
    assert grid.log_integral(value) == pytest.approx(0.0, abs=1e-4)


def test_draws_have_the_density():
    """E_m[1 / m(x)] over a square is its area; means agree with the grid's."""
    mixture, grid = make(), plane_grid(20.0, 500, dtype=DOUBLE)
    density = grid.evaluate(lambda x: mixture.log_marginal(x).value).exp()
    mean = (density[:, None] * grid.points).sum(0) * math.exp(grid.log_cell)
    square = (density[:, None] * grid.points**2).sum(0) * math.exp(grid.log_cell)
    x = mixture.sample(20_000)
    error = x.std(0) / math.sqrt(len(x))
    assert ((x.mean(0) - mean).abs() < 4.5 * error).all()
    spread = (x**2).std(0) / math.sqrt(len(x))
    assert (((x**2).mean(0) - square).abs() < 4.5 * spread).all()
    drawn = Predictive(mixture.marginal, num_samples=3)(torch.zeros(5, 2, dtype=DOUBLE))
    assert drawn["x"].shape == (3, 5, 2)


def test_every_importance_weight_is_the_likelihood():
    mixture, x = make(weights=(0.5, 0.0, 0.5)), torch.randn(9, 2, dtype=DOUBLE)
    expected = mixture.log_marginal(x).value.detach()
    torch.testing.assert_close(log_weights(mixture, x, num_samples=4), expected.expand(4, -1))


def test_the_guide_enumerates_to_the_exact_loss():
    mixture, x = make(), torch.randn(6, 2, dtype=DOUBLE)
    every = config_enumerate(mixture.guide, "parallel")
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(mixture.model, every, x)
    exact = mixture.objective()(None, None, x)
    torch.testing.assert_close(loss, exact)
    parameters = list(mixture.components.flows.parameters())
    for one, other in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(exact, parameters), strict=True
    ):
        torch.testing.assert_close(one, other)
    weights = torch.rand(6, dtype=DOUBLE)
    weighed = mixture.objective()(None, None, x, weights=weights)
    torch.testing.assert_close(weighed, -(weights * mixture.log_marginal(x).value).sum())


def test_a_component_of_weight_zero_costs_nothing_and_gets_nothing():
    mixture, x = make(weights=(0.4, 0.0, 0.6)), torch.randn(5, 2, dtype=DOUBLE)
    mixture.components.flows.flows[1].forward = None  # whoever runs it fails
    mixture.components.flows.flows[1].inverse = None
    mixture.log_marginal(x).value.sum().backward()
    assert all(p.grad is None for p in mixture.components.flows.flows[1].parameters())
    assert mixture.responsibilities(x)[:, 1].eq(0).all()
    assert set(mixture.encode(x).tolist()) <= {0, 2}


def test_one_component_may_have_another_base():
    heavy = FlowMixture(2, 1, SMALL, base=lambda z: dist.StudentT(3.0, z, 1.0).to_event(1))
    far = torch.full((1, 2), 30.0)
    normal = FlowMixture(2, 1, SMALL)
    normal.load_state_dict(heavy.state_dict())
    assert heavy.log_marginal(far).mean > normal.log_marginal(far).mean + 100


def test_copies_files_and_types_keep_the_density(tmp_path):
    mixture, x = make(), torch.randn(7, 2, dtype=DOUBLE)
    expected = mixture.log_marginal(x).value.detach()
    mixture.save(tmp_path / "m.pt")
    other = FlowMixture(2, 3, SMALL).double().load(tmp_path / "m.pt")
    torch.testing.assert_close(other.log_marginal(x).value.detach(), expected)
    twin = copy.deepcopy(mixture)
    fit_pair(twin, torch.randn(50, 2, dtype=DOUBLE), epochs=1)
    torch.testing.assert_close(mixture.log_marginal(x).value.detach(), expected)
    assert not torch.allclose(twin.log_marginal(x).value.detach(), expected)
    single = mixture.float().log_marginal(x.float()).value.detach()
    torch.testing.assert_close(single.double(), expected, atol=1e-4, rtol=1e-4)


def test_it_goes_where_meta_models_go():
    x = torch.randn(6, 2)
    one, other = FlowMixture(2, 1, SMALL), FlowMixture(2, 1, SMALL)
    m = torch.stack([p.log_marginal(x).value for p in (one, other)], -1)
    mixed = Mixture(one, other, weights=[0.3, 0.7]).log_marginal(x)
    expected = (m + torch.tensor([0.3, 0.7]).log()).logsumexp(-1)
    torch.testing.assert_close(mixed.value, expected)
    product = Product(one, other, powers=[0.5, 2.0]).log_density(x)
    torch.testing.assert_close(product.value, m @ torch.tensor([0.5, 2.0]), atol=1e-5, rtol=1e-5)
    vae = VAE(5, 2, units=4)
    cascade = Cascade(vae, one)
    bits = torch.randint(2, (6, 5)).float()
    trace = poutine.trace(cascade.guide).get_trace(bits)
    joint = poutine.trace(poutine.replay(cascade.model, trace=trace)).get_trace(bits)
    z = next(n["value"] for n in trace.nodes.values() if n.get("value") is not None
             and getattr(n["value"], "shape", None) == (6, 2))  # fmt: skip
    assert z.isfinite().all()
    assert float(joint.log_prob_sum().detach()) < 0
    elbo = Trace_ELBO().differentiable_loss(cascade.model, cascade.guide, bits)
    elbo.backward()
    assert all(p.grad is not None for p in one.parameters())


# Boosting on data


def test_the_second_component_finds_the_other_mode_and_the_weights_are_right():
    train, held_out, test = two_modes(2000), two_modes(1000, 1), two_modes(4000, 2)
    mixture = FlowMixture(2, 3, flows.affine)
    report = mixture.fit(
        train, validation=held_out, steps=160, passes=2, lr=0.05, batch_size=500, seed=0
    )
    weights, parts = mixture.weights, mixture.components
    centres = torch.stack([parts.loc + parts.scale * f(torch.zeros(2))[0]
                           for f in parts.flows.flows]).detach()  # fmt: skip
    left = weights[centres[:, 0] < 0].sum()
    assert float(left) == pytest.approx(0.3, abs=0.02)
    assert all(b >= a for a, b in zip(report.history, report.history[1:], strict=False))
    first, verdicts = report.history[0], [s.verdict for s in report.steps]
    assert verdicts[:2] == ["base", "grows"]
    truth = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])),
        dist.Normal(torch.tensor([[-2.5, -1.25], [2.5, 1.25]]), 0.5).to_event(1),
    ).log_prob(test)
    gap = truth - mixture.log_marginal(test).value.detach()
    assert float(gap.mean()) < 0.03
    assert first < report.history[-1] - 0.5
    assert "grows" in str(report)
    grid = plane_grid(8.0, 300)
    total = grid.log_integral(grid.evaluate(parts.log_density))
    assert total == pytest.approx(0.0, abs=2e-3)


def test_a_component_that_does_not_help_has_weight_zero():
    x = torch.randn(900, 2)
    mixture = FlowMixture(2, 3, flows.affine)
    report = mixture.fit(
        x[:600], validation=x[600:], steps=30, passes=0, lr=0.05, objective="residual", seed=1
    )
    assert mixture.weights.tolist() == [1.0, 0.0, 0.0]
    assert [s.verdict for s in report.steps] == ["base", "nothing gained", "nothing gained"]
    assert mixture.components.flows.active == [0]


def test_weights_are_repetitions():
    x = two_modes(60).double()
    times = torch.randint(1, 4, (60,))
    found = []
    for data, weights in ((x, times.double()), (x.repeat_interleave(times, 0), None)):
        mixture = FlowMixture(2, 2, flows.affine).double()
        options = {"steps": 30, "passes": 1, "joint_steps": 10, "batch_size": 1000, "lr": 0.05}
        mixture.fit(
            data, weights=weights, resample=False, ess=0.0, objective="residual", seed=3, **options
        )
        found.append(mixture)
    torch.testing.assert_close(found[0].weights, found[1].weights, atol=1e-6, rtol=0)
    values = [m.log_marginal(x).value.detach() for m in found]
    torch.testing.assert_close(*values, atol=1e-6, rtol=0)


def test_rows_of_weight_zero_do_not_count():
    x, wild = two_modes(80), torch.full((5, 2), 40.0)
    weights = torch.cat([torch.ones(80), torch.zeros(5)])
    mixture = FlowMixture(2, 1, flows.affine)
    mixture.fit(torch.cat([x, wild]), weights=weights, steps=2, seed=0)
    torch.testing.assert_close(mixture.components.loc, x.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixture.components.scale, x.std(0, correction=0))


def test_data_of_any_scale_are_fitted_alike():
    x = two_modes(300).double()
    shift, stretch = torch.tensor([1e3, -5.0]).double(), torch.tensor([1e-2, 100.0]).double()
    values = []
    for data in (x, shift + stretch * x):
        mixture = FlowMixture(2, 2, flows.affine).double()
        mixture.fit(data, steps=20, lr=0.05, seed=0)
        values.append(mixture.log_marginal(data).value.detach())
    torch.testing.assert_close(values[0], values[1] + stretch.log().sum(), atol=1e-3, rtol=1e-3)


def test_growth_goes_on_from_the_present_state():
    x = two_modes(1500)
    mixture = FlowMixture(2, 2, flows.affine)
    small = FlowMixture(2, 1, flows.affine)
    small.fit(x, steps=100, lr=0.05, batch_size=500, seed=0)
    mixture.components.flows.flows[0].load_state_dict(small.components.flows.flows[0].state_dict())
    mixture.standardise_by(x)
    before = mixture.log_marginal(x)
    torch.testing.assert_close(before.value, small.log_marginal(x).value)
    report = mixture.fit(x, start="current", steps=100, passes=0, lr=0.05, batch_size=500, seed=0)
    assert [s.component for s in report.steps] == [1]
    assert mixture.log_marginal(x).mean > before.mean + 0.1


def test_a_fit_that_ends_below_its_start_is_put_back():
    x = torch.randn(40, 2)
    mixture = FlowMixture(2, 1, partial(flows.affine, spread=0.0))
    report = mixture.fit(4 + x, validation=torch.randn(200, 2), steps=20, lr=0.1, seed=0)
    assert report.kept_start
    assert "the start was kept" in str(report)
    zero = torch.zeros(1, 2)
    assert mixture.log_marginal(zero).mean == pytest.approx(-math.log(2 * math.pi), abs=1e-6)


def test_a_seed_makes_the_fit_and_leaves_the_stream_alone():
    x, found = two_modes(200), []
    before = torch.get_rng_state()
    start = FlowMixture(2, 2, SMALL).state_dict()
    torch.set_rng_state(before)
    for _ in range(2):
        mixture = FlowMixture(2, 2, SMALL)
        mixture.load_state_dict(start)
        mixture.fit(x, steps=6, seed=5)
        found.append(mixture.log_marginal(x).value.detach())
        torch.set_rng_state(before)
    assert torch.equal(*found)
    mixture.fit(x, steps=2, seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_it_is_a_prior_on_top_of_a_vae():
    torch.manual_seed(1)
    bits = (torch.rand(400, 6) < torch.where(torch.rand(400, 1) < 0.5, 0.1, 0.9)).float()
    cascade = Cascade(VAE(6, 2, units=8), FlowMixture(2, 2, SMALL))
    grown = greedy(
        cascade,
        bits[:300],
        validation=bits[300:],
        epochs=10,
        stages={1: {"steps": 30, "passes": 0}},
        seed=0,
        stop=False,
    )
    top = grown.reports[1] if hasattr(grown, "reports") else grown.stages[1]
    assert top.held_out.value > -2 * top.held_out.std_error
    assert grown.cascade.sample(4).shape == (4, 6)


@pytest.mark.parametrize(
    ("kind", "call", "words"),
    [
        (ValueError, lambda m: m.fit(torch.ones(5, 3)), r"of shape \(N, 2\)"),
        (ValueError, lambda m: m.fit(torch.full((5, 2), math.nan)), "NaN or infinity"),
        (ValueError, lambda m: m.fit(torch.ones(5, 2), steps=1), "constant"),
        (TypeError, lambda m: m.fit([1.0]), "one tensor"),
        (TypeError, lambda m: m.fit(torch.ones(5, 2, dtype=torch.long)), "float32 or float64"),
        (ValueError, lambda m: m.fit(torch.randn(5, 2), steps=0), "steps is 0"),
        (ValueError, lambda m: m.fit(torch.randn(5, 2), ess=1.0), "ess is 1.0"),
        (ValueError, lambda m: m.fit(torch.randn(5, 2), epochs=3), "epochs has no meaning"),
        (ValueError, lambda m: m.fit(torch.randn(5, 2), start="here"), "start is 'here'"),
        (ValueError, lambda m: m.fit(torch.randn(5, 2), objective="kl"), "objective is 'kl'"),
        (ValueError, lambda m: m.fit(torch.randn(5, 2), weights=torch.ones(4)), "weights"),
        (
            ValueError,
            lambda m: m.fit(torch.randn(5, 2), validation_weights=torch.ones(4)),
            "without",
        ),
        (ValueError, lambda m: m.log_marginal(torch.zeros(3)), r"of shape \(N, 2\)"),
        (ValueError, lambda m: setattr(m, "weights", torch.tensor([1.0])), "no convex combination"),
        (ValueError, lambda m: FlowMixture(2, 0), "at least 1"),
        (ValueError, lambda m: FlowMixture(2, 3, [SMALL, SMALL]), "3"),
        (ValueError, lambda m: FlowMixture(2, 1, lambda d: flows.affine(3)), "another dimension"),
        (ValueError, lambda m: FlowMixture(2, 1, partial(flows.affine, context=2)), "context"),
        (TypeError, lambda m: FlowMixture(2, 1, lambda d: torch.nn.Linear(d, d)), "Linear"),
    ],
)
def test_bad_input_is_refused(kind, call, words):
    with pytest.raises(kind, match=words):
        call(FlowMixture(2, 2, SMALL))


# Matching


def test_a_density_is_matched_and_its_normaliser_found():
    def log_density(z):
        modes = torch.stack([-(z - m).square().sum(-1) / (2 * 0.5**2) for m in (-1.5, 1.5)], -1)
        return (modes + torch.tensor([0.3, 0.7]).log()).logsumexp(-1)

    mixture = FlowMixture(2, 2, flows.affine)
    found = mixture.match(
        log_density, steps=300, finetune=1, finetune_length=300, lr=0.03, num_samples=4000, seed=0
    )
    truth = math.log(2 * math.pi * 0.5**2)
    assert abs(found.log_partition - truth) < max(5 * found.std_error, 0.02)
    assert sorted(mixture.weights.tolist()) == pytest.approx([0.3, 0.7], abs=0.02)
    assert found.ess > 3000
    assert "log Z" in str(found)


def test_matching_knows_location_and_scale():
    """The estimate is the same wherever the mixture's coordinates lie."""
    mixture = FlowMixture(2, 1, partial(flows.affine, spread=0.0))
    mixture.components.loc.fill_(3.0)
    mixture.components.scale.fill_(0.5)
    law = dist.Normal(torch.full((2,), 3.0), 0.5).to_event(1)
    found = mixture.match(lambda z: law.log_prob(z) + 1.7, steps=1, lr=1e-9, num_samples=50, seed=0)
    assert found.log_partition == pytest.approx(1.7, abs=1e-4)
    assert found.std_error < 1e-4


def test_a_density_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="one number for each point"):
        FlowMixture(2, 1, SMALL).match(lambda z: z, steps=1)


# Weights


def test_the_weights_solve_their_problem():
    """At the maximum the mean of g_c / q is 1 for what has weight, and at most 1 for the rest."""
    logs = torch.randn(200, 4, dtype=DOUBLE)
    logs[:, 3] -= 3.0
    v = torch.rand(200, dtype=DOUBLE)
    w = solve_weights(dict(enumerate(logs.T)), torch.full((4,), 0.25), v, max_iterations=5000)
    q = (logs + w.log()).logsumexp(-1, keepdim=True)
    slopes = (v / v.sum()) @ (logs - q).exp()
    assert float(w.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(slopes[w > 0], torch.ones(int((w > 0).sum()), dtype=DOUBLE),
                               atol=1e-2, rtol=0)  # fmt: skip
    assert (slopes[w == 0] <= 1 + 1e-2).all()
    assert float(w[3]) == 0.0


def test_the_nearest_are_a_share_around_one_of_them():
    x = torch.randn(100, 2)
    weights = torch.zeros(100)
    weights[7] = 1.0
    mask = nearest(x, weights, 0.1)
    distance = (x - x[7]).norm(dim=-1)
    assert int(mask.sum()) == 10
    assert distance[mask].max() < distance[~mask].min()


def test_weights_in_line_search_temper_and_slope_are_repetitions():
    log_q, log_m = torch.randn(30, dtype=DOUBLE), torch.randn(30, dtype=DOUBLE)
    times = torch.randint(1, 5, (30,))
    q, m = (t.repeat_interleave(times, 0) for t in (log_q, log_m))
    assert best_weight(log_q, log_m, times.double()) == pytest.approx(best_weight(q, m))
    weighted = slope_at_zero(log_q, log_m, weights=times.double())
    plain = slope_at_zero(q, m)
    assert weighted.ratio == pytest.approx(plain.ratio)
    assert weighted.near == pytest.approx(plain.near)
    one, many = tempered(log_q, 0.0, weights=times.double()), tempered(q, 0.0)
    first = torch.cat([torch.zeros(1, dtype=torch.long), times.cumsum(0)[:-1]])
    expected = many.weights[first] * times / len(q) * 30
    torch.testing.assert_close(one.weights, expected.to(one.weights))
    alike = slope_at_zero(log_q, log_m, weights=torch.ones(30))
    assert alike.ratio_error == pytest.approx(slope_at_zero(log_q, log_m).ratio_error, rel=0.05)
