"""What single steps compute, beside formulas and code of other hands."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from flow_cases import points
from pyro.distributions.transforms.spline import _monotonic_rational_spline
from torch.func import functional_call, stack_module_state, vmap

from pyroboost import flows
from pyroboost.flows import (
    LU,
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    Flow,
    Householder,
    LowerTriangular,
    NonlinearSquared,
    Permutation,
    Spline,
    SplineCoupling,
    Step,
)


def test_affine_and_linear_steps_are_their_formulas():
    x = points(9, 3)
    step = Affine(3, spread=1.0).double()
    shift, log_scale = step.coefficients().chunk(2)
    assert torch.allclose(step(x), shift + log_scale.exp() * x)
    for kind in (LowerTriangular, LU):
        step = kind(3, spread=1.0).double()
        matrix = step.matrix()
        assert torch.allclose(step(x), x @ matrix.mT + step.coefficients()[:3])
        log_det = torch.linalg.slogdet(matrix)[1]
        assert torch.allclose(step.push(x)[1], log_det.expand(9))
    matrix = LowerTriangular(4, spread=1.0).matrix()
    assert torch.equal(matrix, matrix.tril())
    assert bool((matrix.tril(-1) != 0).sum() == 6)
    assert bool((LU(4, spread=1.0).matrix() != 0).all())


def test_a_lower_triangular_step_makes_the_normal_law_of_its_matrix():
    step = LowerTriangular(3, spread=0.7).double()
    base = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    mine = dist.TransformedDistribution(base, [step])
    law = dist.MultivariateNormal(step.coefficients()[:3], scale_tril=step.matrix())
    x = points(20, 3)
    assert torch.allclose(mine.log_prob(x), law.log_prob(x))


def test_householder_is_a_product_of_reflections():
    step = Householder(4, pairs=2, spread=1.0).double()
    x = points(9, 4)
    expected = x
    for v in step.coefficients().reshape(4, 4):
        reflection = torch.eye(4).double() - 2 * torch.outer(v, v) / (v @ v)
        expected = expected @ reflection
    assert torch.allclose(step(x), expected)
    rotation = torch.stack([step(row) for row in torch.eye(4).double()])
    assert torch.isclose(torch.linalg.det(rotation), torch.ones(()).double())


def test_couplings_keep_what_they_keep():
    x = points(9, 5)
    for kind in (AdditiveCoupling, AffineCoupling, SplineCoupling):
        step = kind(5, kept=[4, 1], spread=1.0, units=[7, 6]).double()
        y = step(x)
        assert torch.equal(y[:, [4, 1]], x[:, [4, 1]])
        assert bool((y[:, [0, 2, 3]] != x[:, [0, 2, 3]]).all())
        other = x.clone()
        other[:, 4] += 1  # what stays says how the rest moves
        assert bool((step(other)[:, [0, 2, 3]] != y[:, [0, 2, 3]]).all())
    additive = AdditiveCoupling(2, spread=1.0).double()
    assert torch.allclose((additive(x[:, :2]) - x[:, :2])[:, 1], additive.net(x[:, :1], None)[:, 0])
    affine = AffineCoupling(2, spread=1.0, limit=0.5).double()
    shift, raw = affine.net(x[:, :1], None).unbind(-1)
    scale = (0.5 * (raw / 0.5).tanh()).exp()
    assert torch.allclose(affine(x[:, :2])[:, 1], shift + scale * x[:, 1])
    with torch.no_grad():
        affine.net.outer.bias.fill_(1e4)
    assert affine.push(x[:, :2])[1].max().item() <= 0.5


@pytest.mark.parametrize("dim", [2, 3, 4, 7])
@pytest.mark.parametrize("name", ["nice", "realnvp", "spline"])
def test_factories_move_every_coordinate_and_mix_them_all(name, dim):
    """A pair moves everything; after two pairs every output depends on every input."""
    flow = getattr(flows, name)(dim, 1, spread=0.3).double()
    x = points(1, dim)[0] / 2
    moved = {i for step in flow.steps[:2] for i in step.order[step.sizes[0] :].tolist()}
    assert moved == set(range(dim))
    flow = getattr(flows, name)(dim, 3, spread=0.3).double()
    jacobian = torch.func.jacrev(lambda row: flow(row)[0])(x)
    assert bool((jacobian.abs() > 1e-12).all())
    kept = [step.order[: step.sizes[0]].tolist() for step in flow.steps[:4]]
    first, odd = list(range(dim // 2)), list(range(1, dim, 2))
    assert kept[0::2] == [first, odd]  # halves, then every second coordinate, then again
    assert all(sorted(a + b) == list(range(dim)) for a, b in (kept[:2], kept[2:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nonlinear_squared_inverse_against_bisection(dtype):
    """Strong and weak bumps, near and far: the cubic's worst places included."""
    from scipy.optimize import brentq

    k = flows.elementwise.SHARE * flows.elementwise.LARGEST
    bumps = np.array([-k, -1.0, -1e-3, 0.0, 1e-3, 1.0, k])
    places = [-1e6, -101, -99, -3, -math.sqrt(3), -0.5, 0, 1e-9, 1, math.sqrt(3), 1.8, 99, 101, 1e6]
    r, c = (torch.tensor(a.ravel()) for a in np.meshgrid(places, bumps))
    r = r.to(dtype).double()
    exact = [
        brentq(lambda u, r=r, c=c: u + c / (1 + u * u) - r, r - 2, r + 2, xtol=1e-14)
        for r, c in zip(r.tolist(), c.tolist(), strict=True)
    ]
    step = NonlinearSquared(len(r), spread=0.0).to(dtype)
    with torch.no_grad():
        *_, raw, g = step.coefficients.bias.chunk(5)
        raw.copy_(torch.atanh((c / k).clamp(-1 + 1e-15, 1 - 1e-15)))
        g.zero_()
    u, _ = step.pull(r.to(dtype))
    exact = torch.tensor(exact, dtype=torch.float64)
    slope = 1 - 2 * c * exact / (1 + exact**2) ** 2  # by which the inverse multiplies rounding
    error = ((u.double() - exact).abs() * slope / (1 + exact.abs())).max()
    assert error < (1e-14 if dtype == torch.float64 else 3e-6)


def test_nonlinear_squared_is_its_formula_and_monotone():
    step = NonlinearSquared(2, spread=3.0).double()
    a, log_b, log_d, raw, g = step.coefficients().chunk(5)
    b, d = log_b.exp(), log_d.exp()
    c = raw.tanh() * 0.98 * 8 * math.sqrt(3) / 9 * b / d
    x = torch.linspace(-8, 8, 4001).double()[:, None].expand(-1, 2)
    y = step(x)
    assert torch.allclose(y, a + b * x + c / (1 + (d * x + g) ** 2))
    assert bool((y.diff(dim=0) > 0).all())


def test_splines_against_pyros():
    """Widths, heights and slopes mean the same, but for the slope at the edges: .999 in Pyro's."""
    step = Spline(2, bins=5, bound=3.0, spread=1.0).double()
    raw = step.coefficients().reshape(2, 14)
    widths, heights = raw[:, :5].softmax(-1), raw[:, 5:10].softmax(-1)
    slopes = torch.nn.functional.softplus(raw[:, 10:] + math.log(math.expm1(0.999)))
    x = 6.2 * torch.rand(4000, 2).double() - 3.1
    y, log_det = _monotonic_rational_spline(x, widths, heights, slopes, bound=3.0)
    mine, mine_log_det = step.push(x)
    assert torch.allclose(mine, y, atol=3e-3)
    knots = 6 * (0.001 + 0.995 * widths).cumsum(-1) - 3
    middle = ((x > knots[:, 0] + 1e-5) & (x < knots[:, 3] - 1e-5)).all(-1)
    assert 500 < int(middle.sum()) < 4000
    assert torch.allclose(mine[middle], y[middle], atol=1e-12)
    assert torch.allclose(mine_log_det[middle], log_det.sum(-1)[middle], atol=1e-11)


def test_splines_at_the_edges_of_their_box_and_at_knots():
    step = Spline(1, bins=6, bound=2.0, spread=1.5).double()
    edges = torch.tensor([[-2.0], [2.0]]).double()
    for way in (step.push, step.pull):
        out, log_slope = way(edges)
        assert torch.equal(out, edges)
        assert torch.equal(log_slope, torch.zeros(2).double())
        for inside in (edges * (1 - 1e-9), edges * (1 - 1e-15)):
            near, log_slope = way(inside)
            assert torch.allclose(near, inside, atol=1e-12)
            assert torch.allclose(log_slope, torch.zeros(2).double(), atol=1e-4)
    knots = flows._splines._knots(step.coefficients()[:6], 2.0)[:, None]
    images = step(knots)
    assert torch.allclose(images, flows._splines._knots(step.coefficients()[6:12], 2.0)[:, None])
    assert torch.allclose(step.inv(images), knots, atol=1e-10)
    x = torch.linspace(-3, 3, 3001).double()[:, None]
    assert bool((step(x).diff(dim=0) > 0).all())
    steep = Spline(1, spread=0.0)
    with torch.no_grad():
        steep.coefficients.bias.copy_(40 * torch.randn(23))  # bins and slopes at their least
    x = torch.linspace(-4, 4, 5001)[:, None].requires_grad_()
    for way in (steep.push, steep.pull):
        out, log_det = way(x)
        assert bool(out.isfinite().all() and log_det.isfinite().all())
        (gradient,) = torch.autograd.grad((out.sum() + log_det.sum()), x)
        assert bool(gradient.isfinite().all())


def test_steps_and_flows_are_transforms_of_pyro():
    base = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    x = points(20, 3)
    flow = flows.realnvp(3, 2, spread=0.5).double()
    z0, log_det = flow.inverse(x)
    expected = base.log_prob(z0) + log_det
    for transforms in ([*flow.steps], [flow.condition()]):
        law = dist.TransformedDistribution(base, transforms)
        assert torch.allclose(law.log_prob(x), expected)
        assert law.rsample((7,)).shape == (7, 3)
        assert law.batch_shape == ()
    amortised, context = flows.nlsq(3, 1, context=2, spread=0.5).double(), points(20, 2)
    law = dist.ConditionalTransformedDistribution(base, [amortised]).condition(context)
    z0, log_det = amortised.inverse(x, context)
    assert torch.allclose(law.log_prob(x), base.log_prob(z0) + log_det)
    step = AffineCoupling(3, context=2, spread=0.5).double()
    transform = step.condition(context)
    assert torch.allclose(transform.inv(transform(x)), x)
    assert torch.allclose(transform.log_abs_det_jacobian(x, transform(x)), step.push(x, context)[1])
    assert "AffineCoupling(3, context=2)" in repr(transform)


def test_flows_of_one_shape_run_in_one_batched_pass():
    listed = [flows.spline(2, 2, spread=0.5).double() for _ in range(3)]
    x = points(10, 2)
    parameters, buffers = stack_module_state(listed)

    def run(parameters, buffers):
        return functional_call(listed[0], (parameters, buffers), (x,))

    z, log_det = vmap(run)(parameters, buffers)
    for i, flow in enumerate(listed):
        assert torch.allclose(z[i], flow(x)[0])
        assert torch.allclose(log_det[i], flow(x)[1])


def test_flows_are_put_together():
    flow = Flow([flows.lu(3), Permutation([2, 0, 1]), flows.nice(3, 1)]).double()
    assert [s.label for s in flow.steps][:2] == ["LU", "Permutation"]
    assert flow.dim == 3
    x = points(5, 3)
    halfway, first = flow.steps[0].push(x)
    assert torch.allclose(Flow(flow.steps[1:])(halfway)[1] + first, flow(x)[1])
    nothing = Flow([], dim=3)
    assert torch.equal(nothing(x)[0], x)
    assert torch.equal(nothing.inverse(x)[1], torch.zeros(5))
    assert torch.equal(Permutation([2, 0, 1])(x), x[:, [2, 0, 1]])
    mixed = Flow([flows.affine(3, context=2), Permutation([1, 0, 2])])
    assert mixed.context == 2
    assert "context=2" in repr(mixed)
    assert "identity" in repr(nothing)


REFUSED = [
    (lambda: flows.nice(1), "needs at least 2"),
    (lambda: flows.householder(1), "needs at least 2"),
    (lambda: flows.realnvp(2, 0), "steps is 0"),
    (lambda: flows.nlsq(2, 0), "steps is 0"),
    (lambda: flows.householder(3, 0), "pairs is 0"),
    (lambda: flows.affine(0), "dim is 0"),
    (lambda: flows.affine(2, context=-1), "context is -1"),
    (lambda: flows.realnvp(2, units=0), "units"),
    (lambda: flows.realnvp(2, units=[]), "units"),
    (lambda: flows.realnvp(2, limit=0.0), "limit"),
    (lambda: flows.spline(2, bins=0), "bins is 0"),
    (lambda: flows.spline(1, bound=-1.0), "bound is -1"),
    (lambda: AdditiveCoupling(3, kept=[0, 1, 2]), "kept"),
    (lambda: AdditiveCoupling(3, kept=[0, 0]), "kept"),
    (lambda: AdditiveCoupling(3, kept=[3]), "kept"),
    (lambda: Permutation([0, 2]), "each of 0 to D - 1 once"),
    (lambda: Flow([]), "pass dim="),
    (lambda: Flow([Affine(2), Affine(3)]), r"dim \[2, 3\]"),
    (lambda: Flow([Affine(2, context=1), Affine(2, context=4)]), "context"),
    (lambda: flows.lu(2)(torch.zeros(4, 3)), "last dimension must be 2"),
    (lambda: flows.lu(2).inverse(torch.zeros(())), "last dimension must be 2"),
    (lambda: Affine(2).push(torch.zeros(4, 3)), "last dimension must be 2"),
    (lambda: flows.lu(2, context=3)(torch.zeros(4, 2)), "needs a context"),
    (lambda: Affine(2, context=3)(torch.zeros(4, 2)), "needs a context"),
    (lambda: flows.lu(2, context=3)(torch.zeros(4, 2), torch.zeros(4, 2)), r"give \(\.\.\., 3\)"),
    (lambda: flows.lu(2, context=3)(torch.zeros(4, 2), torch.zeros(5, 3)), "broadcast"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_bad_input_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_flow_takes_only_transforms():
    with pytest.raises(TypeError, match="a step is Linear"):
        Flow([torch.nn.Linear(2, 2)])


def test_a_step_of_ones_own():
    class Double(Step):
        def _push(self, x, context):
            return 2 * x, x.new_full(x.shape[:-1], self.dim * math.log(2))

    flow = Flow([Double(2)], name="mine")
    assert torch.equal(flow(torch.ones(3, 2))[0], 2 * torch.ones(3, 2))
    with pytest.raises(ValueError, match="Double defines no _pull"):
        flows.check_invertible(flow)
