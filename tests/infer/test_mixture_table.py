"""Tables of draws: the mixture's bound, its gradient and the weights, against quadrature."""

import itertools
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from boosting_pairs import Posterior, place, rows, standard, vae
from pyro.infer import Trace_ELBO
from scipy.optimize import minimize

from pyroboost import flows
from pyroboost.infer._boosting_pair import layout
from pyroboost.infer._mixture_draws import Programs, Rows, tabulate
from pyroboost.infer._mixture_table import Table, gain
from pyroboost.infer._mixture_weights import WeightDescent, descend, on_line, on_simplex
from pyroboost.metamodel import MetaModel

CPU = torch.device("cpu")
CENTRES, SCALES = torch.tensor([[-1.5], [1.0], [0.2]]), torch.tensor([0.8, 0.7, 1.5])
GRID = torch.linspace(-25, 25, 20001, dtype=torch.float64)


def target():
    return dist.StudentT(3.0, torch.tensor([0.3]), 1.2).to_event(1)


def model(*_):
    pyro.sample("z", target())


def posterior(count=3):
    guide = Posterior(count=count, dim=1, flow=lambda: flows.affine(1))
    for flow, centre, scale in zip(guide.components.flows, CENTRES, SCALES, strict=False):
        place(flow, centre, scale)
    return guide


def table(count=4000, seed=0, which=(0, 1, 2), guide=None, program=model):
    guide = guide or posterior()
    pair = MetaModel(program, guide, visible="x", hidden="z")
    programs = Programs(pair.model, pair.guide, pair, 0, True)
    rows_ = [(torch.zeros(1, 1),)]
    return tabulate(programs, rows_, which, count, seed, over_data=False, device=CPU)


def on_grid(weights):
    """Return KL(q || p) and E_g[log q - log p] of every component by quadrature."""
    parts = [
        torch.distributions.Normal(m.double(), s.double()).log_prob(GRID)
        for m, s in zip(CENTRES[:, 0], SCALES, strict=True)
    ]
    log_q = torch.logsumexp(torch.stack(parts) + weights.double().log()[:, None], 0)
    log_p = torch.distributions.StudentT(3.0, 0.3, 1.2).log_prob(GRID)
    gamma = log_q - log_p
    slopes = torch.stack([torch.trapezoid(p.exp() * gamma, GRID) for p in parts])
    return torch.trapezoid(log_q.exp() * gamma, GRID), slopes


@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (0.6, 0.4, 0.0), (0.0, 0.0, 1.0)])
def test_bound_and_gradient_are_those_of_quadrature(weights):
    w = torch.tensor(weights)
    drawn = table(20_000)
    exact, slopes = on_grid(w)
    bound, found = drawn.bound(w), drawn.slopes(w)
    assert abs(bound.value + float(exact)) < 4.5 * bound.error
    assert bound.error < 0.01
    seen = w > 0
    assert bool(((found.value - slopes).abs() < 4.5 * found.error)[seen].all())


def test_error_of_the_bound_is_that_of_repeated_tables():
    w = torch.tensor([0.2, 0.5, 0.3])
    bounds = [table(200, seed).bound(w) for seed in range(60)]
    spread = torch.tensor([b.value for b in bounds]).std()
    stated = sum(b.error for b in bounds) / len(bounds)
    assert float(spread) == pytest.approx(stated, rel=4.5 / math.sqrt(2 * 59))


def test_derivative_of_the_stored_loss_is_its_own():
    drawn, w = table(50), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    value, slope = drawn.loss(w)
    assert value == pytest.approx(-drawn.bound(w).value, abs=1e-4)
    for c in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[c] = 1e-3
        numeric = (drawn.loss(w + step)[0] - drawn.loss(w - step)[0]) / 2e-3
        assert float(slope[c]) == pytest.approx(numeric, abs=2e-3)


def exact_weights(free):
    """Minimise the KL of quadrature over the simplex of some components."""

    def loss(v):
        w = torch.zeros(3, dtype=torch.float64)
        w[list(free)] = torch.as_tensor(v).abs()
        w = (w / w.sum()).clamp(min=1e-12)
        return float(on_grid(w)[0])

    found = minimize(loss, [1 / len(free)] * len(free), method="Nelder-Mead")
    w = torch.zeros(3, dtype=torch.float64)
    w[list(free)] = torch.as_tensor(found.x).abs()
    return w / w.sum(), found.fun


def test_simplex_finds_the_weights_of_quadrature():
    best, least = exact_weights((0, 1, 2))
    found, steps = on_simplex(table(20_000), torch.tensor([1.0, 0.0, 0.0]), 2)
    assert float(found.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(found, best, atol=0.03, rtol=0)
    assert float(on_grid(found)[0]) < least + 5e-4
    assert steps[-1].weight == pytest.approx(float(found[2]))
    assert steps[-1].value == pytest.approx(-least, abs=4.5 * steps[-1].error)


def test_a_component_that_does_not_help_gets_no_weight():
    guide = Posterior(count=3, dim=1, flow=lambda: flows.affine(1))
    for flow, centre in zip(guide.components.flows, (0.0, 8.0, 0.0), strict=True):
        place(flow, torch.tensor([centre]))

    def normal(*_):
        pyro.sample("z", standard(1))

    drawn = table(500, guide=guide, which=(0, 1), program=normal)
    assert on_simplex(drawn, torch.tensor([1.0, 0.0]), 1)[0].tolist() == [1.0, 0.0]
    assert on_line(drawn, torch.tensor([1.0, 0.0]), 1)[0].tolist() == [1.0, 0.0]


def test_line_search_keeps_the_others_in_proportion():
    start = torch.tensor([0.25, 0.0, 0.75])
    drawn = table(20_000)
    found, steps = on_line(drawn, start, 1)
    assert float(found[2] / found[0]) == pytest.approx(3.0)

    def loss(rho):
        return float(on_grid((1 - rho) * start + rho * torch.tensor([0.0, 1.0, 0.0]))[0])

    losses = [loss(rho / 200) for rho in range(201)]
    best = min(range(201), key=losses.__getitem__) / 200
    assert 0.2 < best < 0.8
    assert float(found[1]) == pytest.approx(best, abs=0.03)
    assert len(steps) > 20
    assert all(s.error > 0 for s in steps)


def test_algorithm_1_reaches_the_weight_of_the_line_with_exact_gradients():
    start = torch.tensor([0.25, 0.0, 0.75])
    options = WeightDescent(num_samples=200, most=300, tolerance=1e-4)
    found, steps = descend(lambda t: table(200, 1000 + t), start, 1, options)
    best = on_line(table(20_000), start, 1)[0]
    torch.testing.assert_close(found, best, atol=0.04, rtol=0)
    first = steps[0]
    w = (1 - first.weight) * start + first.weight * torch.tensor([0.0, 1.0, 0.0])
    slopes = on_grid(w)[1]
    exact = float(slopes[1] - (start.double() * slopes).sum())
    assert first.weight == pytest.approx(1 / 3)
    assert abs(first.value - exact) < 4.5 * first.error


def test_algorithm_1_stops_only_when_the_weight_stands_still_and_is_clipped():
    calls = []

    def draw(t):
        calls.append(t)
        return table(50, t)

    start = torch.tensor([0.5, 0.5, 0.0])
    _, steps = descend(draw, start, 2, WeightDescent(tolerance=0.0, most=17))
    assert len(steps) == len(calls) == 17
    found, steps = descend(draw, start, 2, WeightDescent(step=100.0, largest=0.05, most=12))
    moves = [abs(b.weight - a.weight) for a, b in itertools.pairwise(steps)]
    assert max(moves) <= 0.05 + 1e-9
    assert 0 <= float(found[2]) <= 1
    _, steps = descend(draw, start, 2, WeightDescent(step=1e-9, least=4))
    assert len(steps) == 4


def test_gain_is_the_difference_of_bounds_with_the_error_of_pairs():
    drawn, w, v = table(3000), torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.4, 0.6, 0.0])
    found = gain(drawn, w, drawn, v)
    assert found.value == pytest.approx(drawn.bound(w).value - drawn.bound(v).value, abs=1e-5)
    exact = float(on_grid(v)[0] - on_grid(w)[0])
    assert abs(found.value - exact) < 4.5 * found.error
    assert found.error < math.hypot(drawn.bound(w).error, drawn.bound(v).error)
    few = table(3000, which=(0, 1))
    same = gain(drawn, w, few, v[:2])
    assert same.value == pytest.approx(found.value, abs=1e-5)
    assert same.error == pytest.approx(found.error, rel=1e-3)


def test_pareto_k_is_that_of_the_mixtures_tail():
    """p = N(0, 1) and q = N(0, s^2) with s < 1: the weights have the tail k = 1 - s^2."""
    guide = Posterior(count=2, dim=1, flow=lambda: flows.affine(1))
    place(guide.components.flows[0], torch.tensor([0.0]), 0.5)
    place(guide.components.flows[1], torch.tensor([0.0]), 1.1)

    def normal(*_):
        pyro.sample("z", standard(1))

    drawn = table(4000, guide=guide, which=(0, 1), program=normal)
    assert drawn.pareto_k(torch.tensor([1.0, 0.0])) == pytest.approx(0.75, abs=0.25)
    assert drawn.pareto_k(torch.tensor([0.5, 0.5])) < 0.2
    few = table(10, guide=guide, which=(0, 1), program=normal)
    assert few.pareto_k(torch.tensor([1.0, 0.0])) is None


def test_tables_of_data_have_the_bound_of_pyro_and_lie_below_log_p():
    pair, x = vae(), rows(200)
    encoder = pair.guide.fn
    with torch.no_grad():
        encoder.net.weight.mul_(0.1)
    w = torch.tensor([0.3, 0.7])
    encoder.components.weights.copy_(w)
    programs = layout(pair, (x[:20],), CPU, 0)
    assert programs.vectorized
    assert programs.nesting == 1
    batches = [(x[:120],), (x[120:],)]
    drawn = tabulate(programs, batches, [0, 1], 200, 0, over_data=True, device=CPU)
    assert drawn.joint.shape == (2, 200, 200)
    elbo = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(5)
    with torch.no_grad():
        value = -elbo.loss(pair.model, pair.guide, x) / 200
        log_p = pair.model.fn.log_marginal(x)
    noise = 3 * float(drawn.terms(w).std()) / math.sqrt(200 * 200)
    assert drawn.bound(w).value == pytest.approx(value, abs=max(0.03, 5 * noise))
    assert drawn.bound(w).value < float(log_p.mean())
    per_row = drawn.terms(w).mean(1).sum(0)
    assert drawn.bound(w).error == pytest.approx(float(per_row.std()) / math.sqrt(200))


def test_one_run_a_draw_gives_the_same_numbers_as_all_at_once():
    pair, x = vae(), rows(12)
    programs = layout(pair, (x,), CPU, 0)
    one_by_one = Programs(pair.model, pair.guide, pair, 1, False)
    w = torch.tensor([0.3, 0.7])
    a = tabulate(programs, [(x,)], [0, 1], 200, 0, over_data=True, device=CPU)
    b = tabulate(one_by_one, [(x,)], [0, 1], 200, 0, over_data=True, device=CPU)
    rows_a, rows_b = a.terms(w).mean(1).sum(0), b.terms(w).mean(1).sum(0)
    torch.testing.assert_close(rows_a, rows_b, atol=0.6, rtol=0.1)


def test_a_model_that_cannot_take_a_dimension_is_run_draw_by_draw():
    def flat(*_):
        z = pyro.sample("z", standard(1))
        pyro.sample("x", dist.Normal(z.reshape(1), 1.0).to_event(1), obs=torch.ones(1))

    def silent(*_):
        z = pyro.sample("z", standard(1))
        pyro.factor("x", -z.square().sum())  # sums over the draws as well

    for program in (flat, silent):
        pair = MetaModel(program, posterior(), visible="x", hidden="z")
        assert not layout(pair, (torch.zeros(1, 1),), CPU, 0).vectorized


class WithAnother(torch.nn.Module):
    """A guide that draws a second site beside the boosted one, in a plate or not."""

    def __init__(self, plated):
        super().__init__()
        self.guide, self.plated = posterior(), plated

    def forward(self, *_):
        pyro.sample("z", self.guide.components(standard(1)))
        with pyro.plate("rows", 4) if self.plated else nullcontext():
            pyro.sample("b", dist.Normal(0.5, 0.7))


@pytest.mark.parametrize("plated", [True, False])
@pytest.mark.parametrize("sums", [True, False])
def test_other_draws_of_a_guide_do_not_keep_its_draws_apart(plated, sums):
    """One run and many compare by the same draws at every site; a sum over draws still shows."""
    seen = torch.randn(4) if plated else torch.randn(())

    def program(*_):
        z = pyro.sample("z", standard(1))
        with pyro.plate("rows", 4) if plated else nullcontext():
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., 0] * (1 + b), 1.0), obs=seen)
        if sums:
            pyro.factor("silent", -b.square().sum())

    pair = MetaModel(program, WithAnother(plated), visible="x", hidden="z")
    assert layout(pair, (torch.zeros(1, 1),), CPU, 0).vectorized is not sums


def test_subsampled_plates_scale_model_and_guide_alike():
    def program(x):
        with pyro.plate("data", 1000, subsample=x):
            z = pyro.sample("z", standard(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = posterior()

    class Rowed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.guide = guide

        def forward(self, x):
            with pyro.plate("data", 1000, subsample=x):
                pyro.sample("z", guide.components(standard(1)))

    pair = MetaModel(program, Rowed(), visible="x", hidden="z")
    x = torch.randn(10, 1)
    programs = layout(pair, (x,), CPU, 0)
    drawn = tabulate(programs, [(x,)], [0, 1, 2], 300, 0, over_data=True, device=CPU)
    assert drawn.scale.tolist() == [100.0] * 10
    w = torch.tensor([0.2, 0.3, 0.5])
    guide.components.weights.copy_(w)
    elbo = Trace_ELBO(num_particles=3000, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        value = -elbo.loss(pair.model, pair.guide, x) / 10
    assert drawn.bound(w).value == pytest.approx(value, rel=0.03)


def test_sites_of_other_plates_are_counted_once():
    r = Rows(draws=2, batch=(3,), nesting=2)
    values = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    torch.testing.assert_close(r.of(values), values.sum(1))
    shared = torch.tensor([5.0, 7.0]).reshape(2, 1, 1)
    assert r.of(shared).sum(1).tolist() == pytest.approx([5.0, 7.0])
    inner = torch.ones(2, 1, 8)  # eight of another plate, where the rows are
    assert r.of(inner).sum(1).tolist() == pytest.approx([8.0, 8.0])
    assert r.of(torch.tensor(3.0)).sum(1).tolist() == pytest.approx([3.0, 3.0])
    single = Rows(draws=1, batch=(3,), nesting=None)
    assert single.of(torch.ones(4, 3)).tolist() == [[4.0, 4.0, 4.0]]


def test_the_same_seed_gives_a_component_the_same_draws_whatever_the_others_are():
    a, b = table(20, which=(0, 2)), table(20, which=(0, 1, 2))
    assert torch.equal(a.joint[0], b.joint[0])
    assert torch.equal(a.joint[1], b.joint[2])


def test_a_site_that_is_not_in_the_plate_of_the_data_is_refused():
    pair = MetaModel(model, posterior(), visible="x", hidden="z")
    programs = Programs(pair.model, pair.guide, pair, 0, True)
    with pytest.raises(ValueError, match="1 rows for 5 data"):
        tabulate(programs, [(torch.zeros(5, 1),)], [0], 3, 0, over_data=True, device=CPU)


def test_errors_of_a_slope_over_data_are_those_of_its_rows():
    """What makes some data hard for every component cancels in the difference of components."""
    torch.manual_seed(0)
    hard = 20 * torch.randn(1, 1, 400)
    joint = -hard + 0.1 * torch.randn(2, 8, 400)
    drawn = Table(joint, torch.zeros(2, 8, 400, 2), torch.ones(400), (0, 1), over_data=True)
    slopes = drawn.slopes(torch.tensor([0.5, 0.5]))
    found = slopes.combined(torch.tensor([-1.0, 1.0]))
    each = (joint[0] - joint[1]).double().mean(0)
    assert found.value == pytest.approx(float(each.mean()), abs=1e-6)
    assert found.error == pytest.approx(float(each.std()) / 20, rel=1e-6)
    assert found.error < float(slopes.error.norm()) / 50
