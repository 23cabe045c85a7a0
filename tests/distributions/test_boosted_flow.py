"""The mixture's density is the mixture's, its draws follow it, and gradients go where asked."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import affine_autoregressive, planar
from torch import nn

from pyroboost import flows
from pyroboost.distributions import BoostedFlow
from pyroboost.flows import Affine, Flow

DOUBLE = torch.float64


def normal(*batch, dim=2, loc=0.0):
    return dist.Normal(torch.full((*batch, dim), loc, dtype=DOUBLE), 1.0).to_event(1)


def shifted(loc, log_scale=0.0, name="shifted"):
    """A flow that moves the standard normal to a known place."""
    step = Affine(len(loc), spread=0.0).double()
    with torch.no_grad():
        step.coefficients.bias[: len(loc)] = torch.tensor(loc, dtype=DOUBLE)
        step.coefficients.bias[len(loc) :] = log_scale
    return Flow([step], name=name)


def components(spread=0.3, context=0, dim=2):
    torch.manual_seed(3)
    listed = [
        flows.realnvp(dim, 2, spread=spread, context=context, units=16),
        flows.nlsq(dim, 2, spread=spread, context=context),
        flows.lu(dim, spread=spread, context=context),
    ]
    return [flow.double() for flow in listed]


def three(**kwargs):
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=DOUBLE)
    return BoostedFlow(normal(), components(**kwargs), weights)


def grid(edge, count):
    """Return the midpoints of a square's cells, and a cell's area."""
    width = 2 * edge / count
    axis = torch.arange(count, dtype=DOUBLE) * width - edge + width / 2
    return torch.cartesian_prod(axis, axis), width**2


# The density


def test_log_prob_is_that_of_the_mixture_written_out():
    q = three()
    z = 2 * torch.randn(5, 7, 2, dtype=DOUBLE)
    total = 0.0
    for weight, flow in zip([0.5, 0.2, 0.3], q.components, strict=True):
        z0, log_det = flow.inverse(z)
        density = torch.exp(-0.5 * (z0**2).sum(-1)) / (2 * math.pi) * log_det.exp()
        total = total + weight * density
    assert torch.allclose(q.log_prob(z), total.log())
    each = q.log_prob_components(z)
    assert each.shape == (5, 7, 3)
    assert torch.allclose((each + q.log_weights).logsumexp(-1), q.log_prob(z))


def test_mixture_of_normals_is_that_of_torch():
    q = BoostedFlow(normal(), [shifted([-1.0, 2.0], -0.5), shifted([3.0, 0.0], 0.4)])
    means = torch.tensor([[-1.0, 2.0], [3.0, 0.0]], dtype=DOUBLE)
    scales = torch.tensor([[-0.5], [0.4]], dtype=DOUBLE).exp().expand(2, 2)
    parts = torch.distributions.Independent(torch.distributions.Normal(means, scales), 1)
    choice = torch.distributions.Categorical(torch.ones(2, dtype=DOUBLE))
    expected = torch.distributions.MixtureSameFamily(choice, parts)
    z = 3 * torch.randn(50, 2, dtype=DOUBLE)
    assert torch.allclose(q.log_prob(z), expected.log_prob(z))


def test_density_integrates_to_one():
    z, area = grid(14.0, 281)
    with torch.no_grad():
        assert abs((three().log_prob(z).exp().sum() * area).item() - 1) < 1e-5


def test_one_random_component_is_not_the_mixture():
    """Scoring the component that was drawn, as the authors' code does, is far from log q."""
    q = BoostedFlow(normal(), [shifted([-4.0, 0.0]), shifted([4.0, 0.0])])
    z = q.sample((2000,))
    drawn = torch.randint(2, (2000,))
    one = q.log_prob_components(z).gather(-1, drawn[:, None]).squeeze(-1)
    exact = -math.log(2 * math.pi * math.e) - math.log(2)  # minus the entropy of two far normals
    assert abs(q.log_prob(z).mean().item() - exact) < 0.1
    assert one.mean().item() < exact - 10


def test_weights_of_zero_are_never_evaluated():
    class Explosive(flows.Step):
        def _push(self, x, context):
            raise AssertionError("a component of weight zero was drawn")

        def _pull(self, y, context):
            raise AssertionError("a component of weight zero was scored")

    parts = [shifted([1.0, 0.0]), Flow([Explosive(2)])]
    one = BoostedFlow(normal(), parts[:1])
    z = torch.randn(6, 2, dtype=DOUBLE)
    for given in (
        {"weights": torch.tensor([1.0, 0.0], dtype=DOUBLE, requires_grad=True)},
        {"logits": torch.tensor([2.0, -math.inf], dtype=DOUBLE, requires_grad=True)},
    ):
        q = BoostedFlow(normal(), parts, **given)
        assert torch.equal(q.log_prob(z), one.log_prob(z))
        assert bool(q.sample_and_log_prob((5,))[1].isfinite().all())
        q.log_prob(z).sum().backward()
        (gradient,) = (tensor.grad for tensor in given.values())
        assert bool(gradient.isfinite().all())
        mean, _ = q.expectation(lambda z: z, 4000)
        assert torch.allclose(mean, torch.tensor([1.0, 0.0]).double(), atol=0.08)


def test_a_weight_of_zero_beside_others_changes_nothing():
    parts = components()
    weights = torch.tensor([0.4, 0.0, 0.6], dtype=DOUBLE)
    q = BoostedFlow(normal(), parts, weights)
    fewer = BoostedFlow(normal(), [parts[0], parts[2]], torch.tensor([0.4, 0.6], dtype=DOUBLE))
    z = torch.randn(9, 2, dtype=DOUBLE)
    assert torch.allclose(q.log_prob(z), fewer.log_prob(z))
    assert bool(q.log_prob_components(z).isfinite().all())
    strata = q.stratified((4,), score=True)
    assert strata.values.shape == (3, 4, 2)
    assert torch.allclose(strata.log_prob, q.log_prob(strata.values))
    assert torch.allclose(q.weights, weights)


def test_weights_by_logits_and_by_default():
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=DOUBLE)
    q = BoostedFlow(normal(), components(), logits=logits)
    assert torch.allclose(q.weights, logits.softmax(-1))
    equal = BoostedFlow(normal(), components())
    assert torch.allclose(equal.weights, torch.full((3,), 1 / 3, dtype=DOUBLE))


def test_gradients_of_weights_are_those_of_the_sum():
    """d log q / d w_c = g_c / q, and through logits w_c (g_c / q - 1)."""
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=DOUBLE, requires_grad=True)
    logits = weights.detach().log().requires_grad_()
    z = torch.randn(1, 2, dtype=DOUBLE)
    q = BoostedFlow(normal(), components(), weights)
    ratio = (q.log_prob_components(z) - q.log_prob(z)[:, None]).exp()[0].detach()
    (gradient,) = torch.autograd.grad(q.log_prob(z).sum(), weights)
    assert torch.allclose(gradient, ratio)
    learnt = BoostedFlow(normal(), components(), logits=logits)
    (gradient,) = torch.autograd.grad(learnt.log_prob(z).sum(), logits)
    assert torch.allclose(gradient, weights.detach() * (ratio - 1))


# Draws


def chi_square(q, density, count=30000):
    """Return the p-value of draws of q under the masses that a density has in cells."""
    from scipy.stats import chi2

    edge, cells, fine = 5.0, 10, 20
    z, area = grid(edge, cells * fine)
    with torch.no_grad():
        mass = (density(z).exp() * area).reshape(cells, fine, cells, fine).sum((1, 3)).flatten()
    draws = q.sample((count,))
    index = ((draws + edge) / (2 * edge / cells)).floor().long()
    inside = ((index >= 0) & (index < cells)).all(-1)
    seen = torch.bincount(index[inside][:, 0] * cells + index[inside][:, 1], minlength=cells**2)
    expected = torch.cat([mass, (1 - mass.sum())[None]]) * count
    seen = torch.cat([seen, count - seen.sum()[None]]).double()
    big = expected >= 5
    expected = torch.cat([expected[big], expected[~big].sum()[None]])
    seen = torch.cat([seen[big], seen[~big].sum()[None]])
    statistic = ((seen - expected) ** 2 / expected).sum().item()
    return chi2.sf(statistic, len(seen) - 1)


def test_draws_follow_the_density_and_no_other():
    q = three()
    swapped = BoostedFlow(normal(), q.components, q.weights.flip(0))
    assert chi_square(q, q.log_prob) > 1e-3
    assert chi_square(q, swapped.log_prob) < 1e-6
    assert chi_square(q, lambda z: q.log_prob_components(z)[..., 0]) < 1e-6
    near = torch.tensor([0.44, 0.23, 0.33], dtype=DOUBLE)
    assert chi_square(q, BoostedFlow(normal(), q.components, near).log_prob) < 1e-3


def test_every_example_draws_its_own_component():
    parts = [shifted([-50.0, 0.0]), shifted([50.0, 0.0])]
    q = BoostedFlow(normal(4), parts, torch.tensor([0.3, 0.7], dtype=DOUBLE))
    right = (q.sample((4000,))[..., 0] > 0).double()
    assert torch.allclose(right.mean(0), torch.full((4,), 0.7, dtype=DOUBLE), atol=0.036)
    pairs = torch.corrcoef(right.T)
    assert (pairs - torch.eye(4)).abs().max() < 0.08  # examples of one call are independent


def test_a_draw_and_its_density_at_once():
    context = torch.randn(6, 4, dtype=DOUBLE)
    loc = torch.randn(6, 2, dtype=DOUBLE)
    base = dist.Normal(loc, 0.7).to_event(1)
    q = BoostedFlow(base, components(context=4), context=context)
    z, log_q = q.sample_and_log_prob((20,))
    assert z.shape == (20, 6, 2)
    assert torch.allclose(log_q, q.log_prob(z), atol=1e-9)
    assert not z.requires_grad
    assert not log_q.requires_grad
    torch.manual_seed(11)
    z = q.sample((20,))
    torch.manual_seed(11)
    assert torch.equal(q.sample_and_log_prob((20,))[0], z)
    assert q.sample((0,)).shape == (0, 6, 2)
    assert q.sample_and_log_prob()[1].shape == (6,)


# Batches


def test_a_conditional_base_and_contexts_row_by_row():
    context = torch.randn(5, 4, dtype=DOUBLE)
    loc = 3 * torch.randn(5, 2, dtype=DOUBLE)
    parts = [*components(context=4), flows.affine(2).double()]  # one without a context
    weights = torch.tensor([0.2, 0.4, 0.1, 0.3], dtype=DOUBLE)
    q = BoostedFlow(dist.Normal(loc, 0.5).to_event(1), parts, weights, context=context)
    assert q.batch_shape == (5,)
    assert q.event_shape == (2,)
    z = q.sample((300,))
    log_q = q.log_prob(z)
    for i in range(5):
        base = dist.Normal(loc[i], 0.5).to_event(1)
        row = BoostedFlow(base, parts, weights, context=context[i])
        assert torch.allclose(row.log_prob(z[:, i]), log_q[:, i])
    # Draws of a row lie where that row's density is high: an expected log density of its own
    entropy = log_q.mean(0)
    shuffled = q.log_prob(z.roll(1, 1)).mean(0)
    assert bool((entropy > shuffled).all())
    # A context alone makes a batch
    alone = BoostedFlow(normal(), parts, weights, context=context)
    assert alone.batch_shape == (5,)
    assert alone.sample((2,)).shape == (2, 5, 2)
    noise = alone.rsample_component(2)  # each row has its own noise
    assert noise.unique(dim=0).shape == (5, 2)


def test_expand():
    context = torch.randn(3, 4, dtype=DOUBLE)
    q = BoostedFlow(normal(3), components(context=4), context=context)
    wide = q.expand((5, 3))
    assert isinstance(wide, BoostedFlow)
    assert wide.batch_shape == (5, 3)
    z = wide.sample((2,))
    assert z.shape == (2, 5, 3, 2)
    assert torch.allclose(wide.log_prob(z), q.log_prob(z))
    assert z.unique().numel() == z.numel()
    assert wide.rsample_component(0, (2,)).shape == (2, 5, 3, 2)
    assert torch.equal(wide.log_prob(z[0, 0, 0]), q.log_prob(z[0, 0, 0]).expand(5, 3))
    assert three().expand_by((4,)).log_prob(torch.zeros(2, dtype=DOUBLE)).shape == (4,)
    assert q.log_prob(torch.zeros(2, dtype=DOUBLE)).shape == (3,)
    with pytest.raises(RuntimeError, match="expand"):
        q.expand((4,))


def test_in_a_pyro_program():
    q = three()

    def model():
        with pyro.plate("data", 6):
            return pyro.sample("z", q)

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["z"]["value"].shape == (6, 2)
    expected = q.log_prob(trace.nodes["z"]["value"]).sum()
    assert torch.allclose(trace.log_prob_sum(), expected)
    assert not list(pyro.get_param_store())


# Side by side and in blocks


def written_out(q, z):
    """The mixture's density by a loop over its components."""
    scores = []
    for weight, flow in zip(q.weights, q.components, strict=True):
        z0, log_det = flow.inverse(z, q.context)
        scores.append(weight.log() + q.base.log_prob(z0) + log_det)
    return torch.stack(scores, -1).logsumexp(-1)


@pytest.mark.parametrize(("context", "count"), [(0, 4), (0, 1200), (4, 4), (4, 250)])
def test_components_of_one_shape_among_others(count, context):
    """Numbers and gradients are those of a loop, for few points and many, in blocks and not."""
    parts = [*components(context=context), *components(context=context, spread=0.5)]
    parts += [flows.affine(2).double()]
    weights = torch.tensor([0.2, 0.1, 0.1, 0.0, 0.3, 0.2, 0.1], dtype=DOUBLE)
    rows = torch.randn(5, 4, dtype=DOUBLE) if context else None
    base = normal(5, loc=0.5) if context else normal()
    z = torch.randn(count, 5, 2, dtype=DOUBLE)
    z = z if context else z[:, 0]
    parameters = [p for c in (0, 1, 2, 4, 5, 6) for p in parts[c].parameters()]
    results = []
    for memory in (256.0, 0.02):
        q = BoostedFlow(base, parts, weights, context=rows, memory=memory)
        results.append(torch.autograd.grad(q.log_prob(z).sum(), parameters))
        assert torch.allclose(q.log_prob(z), written_out(q, z))
        wide = q.expand((3, *q.batch_shape))
        assert torch.allclose(
            wide.log_prob(z[:4, None]), q.log_prob(z[:4, None]).expand(4, 3, *q.batch_shape)
        )
        drawn, log_q = q.sample_and_log_prob((count,))
        assert torch.allclose(log_q, written_out(q, drawn), atol=1e-8)
        each = q.log_prob_components(z)
        assert torch.allclose(each[..., 3], q._score(3, z))
    expected = torch.autograd.grad(written_out(q, z).sum(), parameters)
    for found in results:
        assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_no_more_rows_pass_than_fit_in_memory():
    class Seen(flows.Step):
        rows: list = []

        def _push(self, x, context):
            self.rows.append(x.shape[:-1].numel())
            return x + 1.0, x.new_zeros(x.shape[:-1])

        def _pull(self, y, context):
            self.rows.append(y.shape[:-1].numel())
            return y - 1.0, y.new_zeros(y.shape[:-1])

    parts = [Flow([Seen(2)]), flows.affine(2).double(), Flow([Seen(2)])]
    limit = int(0.05 * 2**20 / (12 * 2 * 8))
    for base in (normal(), normal(3000)):  # many samples, or many rows of one
        q = BoostedFlow(base, parts, memory=0.05)
        Seen.rows.clear()
        z, log_q = q.sample_and_log_prob((3000,) if not base.batch_shape else ())
        assert torch.allclose(q.log_prob(z), log_q)
        assert torch.allclose(written_out(q, z), log_q)
        assert 0 < max(Seen.rows[:-2]) <= limit
    assert limit < 1000
    with pytest.raises(ValueError, match="memory is 0"):
        BoostedFlow(normal(), parts, memory=0.0)


# Gradients


def reached(loss, parts):
    for flow in parts:
        flow.zero_grad(set_to_none=True)
    loss.backward()
    return [any(p.grad is not None for p in flow.parameters()) for flow in parts]


def test_gradients_reach_the_component_asked_for_and_no_other():
    loc = torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    parts = components()
    q = BoostedFlow(dist.Normal(loc, 1.0).to_event(1), parts)
    assert reached(q.rsample_component(1, (4,)).sum(), parts) == [False, True, False]
    assert loc.grad is not None
    z, log_g = q.rsample_component_and_log_prob(2, (4,))
    assert reached(log_g.sum(), parts) == [False, False, True]
    assert torch.allclose(log_g, q.log_prob_components(z)[..., 2])
    assert reached(q.log_prob(z.detach()).sum(), parts) == [True, True, True]
    assert torch.equal(q.rsample_component(-1, (1,)).detach() * 0, torch.zeros(1, 2).double())
    assert not q.has_rsample
    assert not q.sample((3,)).requires_grad


def test_the_pathwise_gradient_is_that_of_an_expectation():
    """E_g[z^2] of N(m, e^2s) is m^2 + e^2s: its derivatives are 2m and 2 e^2s."""
    part = shifted([1.5], 0.3)
    q = BoostedFlow(normal(dim=1), [part])
    (q.rsample_component(0, (200000,)) ** 2).mean().backward()
    gradient = part.steps[0].coefficients.bias.grad
    assert torch.allclose(gradient, torch.tensor([3.0, 2 * math.exp(0.6)]).double(), atol=0.06)


def test_stratified_expectations_against_quadrature():
    """Values, and gradients for weights, which rsample could not give."""
    logits = torch.tensor([0.5, -0.3, 0.1], dtype=DOUBLE, requires_grad=True)
    parts = components()
    q = BoostedFlow(normal(), parts, logits=logits)

    def h(z):
        return (z[..., 0] - 0.5) ** 2 + z[..., 0] * z[..., 1]

    z, area = grid(14.0, 281)
    exact = (q.log_prob(z).exp() * h(z)).sum() * area
    (exact_gradient,) = torch.autograd.grad(exact, logits)
    strata = q.stratified((40000,))
    assert strata.log_prob is None
    means = h(strata.values).mean(1)
    estimate = (strata.weights * means).sum()
    error = ((strata.weights * h(strata.values).std(1)) ** 2 / 40000).sum().sqrt()
    assert abs(estimate - exact) < 4.5 * error
    (gradient,) = torch.autograd.grad(estimate, logits)
    assert torch.allclose(gradient, exact_gradient, atol=4.5 * error.item())
    value, error = q.expectation(h, 40000)
    assert abs(value - exact) < 4.5 * error
    repeats = torch.stack([q.expectation(h, 50)[0] for _ in range(200)]).detach()
    claimed = torch.stack([q.expectation(h, 50)[1] for _ in range(50)]).mean()
    assert 0.8 < (repeats.std() / claimed).item() < 1.25


def test_strata_score_the_mixture():
    context = torch.randn(4, 3, dtype=DOUBLE)
    q = BoostedFlow(normal(4), components(context=3), context=context)
    strata = q.stratified((6,), score=True)
    assert strata.values.shape == (3, 6, 4, 2)
    assert torch.allclose(strata.log_prob, q.log_prob(strata.values))
    assert torch.allclose(strata.weights, q.weights)
    assert (
        reached((strata.weights.view(3, 1, 1) * strata.log_prob).sum(), q.components) == [True] * 3
    )


def test_the_gradient_of_the_stratified_bound_is_exact():
    """KL(q | N(0, 1)) in one dimension, by quadrature, for all parameters."""
    torch.manual_seed(5)
    parts = [shifted([-1.0], 0.2), shifted([1.5], -0.4)]
    logits = torch.tensor([0.2, -0.4], dtype=DOUBLE, requires_grad=True)
    parameters = [logits, *(p for flow in parts for p in flow.parameters())]
    q = BoostedFlow(normal(dim=1), parts, logits=logits)
    z = torch.linspace(-12, 12, 4001, dtype=DOUBLE)[:, None]
    log_q = q.log_prob(z)
    exact = (log_q.exp() * (log_q - normal(dim=1).log_prob(z))).sum() * (24 / 4000)
    expected = torch.autograd.grad(exact, parameters)
    strata = q.stratified((40000,), score=True)
    terms = (strata.log_prob - normal(dim=1).log_prob(strata.values)).mean(1)
    found = torch.autograd.grad((strata.weights * terms).sum(), parameters)
    for gradient, truth in zip(found, expected, strict=True):
        assert torch.allclose(gradient, truth, atol=0.03)


# Modules


def test_copies_and_conversion():
    q = three()
    z = torch.randn(8, 2, dtype=DOUBLE)
    q.log_prob(z)
    q.sample_and_log_prob((3,))
    twin = copy.deepcopy(q)
    assert torch.equal(twin.log_prob(z), q.log_prob(z))
    before = q.log_prob(z)
    with torch.no_grad():
        next(twin.components[0].parameters()).add_(1.0)
    assert torch.equal(q.log_prob(z), before)
    assert not torch.allclose(twin.log_prob(z), before)
    module = nn.ModuleList(copy.deepcopy(list(q.components))).float()
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    single = BoostedFlow(base, [*module], q.weights)
    assert single.log_prob(z.float()).dtype == torch.float32
    assert torch.allclose(single.log_prob(z.float()).double(), before, atol=1e-4)
    assert "realnvp: 0.5, nlsq: 0.2, lu: 0.3" in repr(q)


# What is refused


def build(**changes):
    given = {"base": normal(), "components": components(), **changes}
    return BoostedFlow(given.pop("base"), given.pop("components"), **given)


WEIGHTS = [[0.5, 0.6, 0.3], [-0.1, 0.6, 0.5], [math.nan, 0.5, 0.5], [0.5, 0.5], [[1.0, 0.0, 0.0]]]
REFUSED = [
    *[({"weights": torch.tensor(weights)}, "weights") for weights in WEIGHTS],
    ({"logits": torch.tensor([0.0, 0.0])}, "logits have shape"),
    ({"logits": torch.tensor([0.0, math.inf, 0.0])}, "below infinity"),
    ({"logits": torch.tensor([-math.inf] * 3)}, "one of them finite"),
    ({"logits": torch.zeros(3), "weights": torch.ones(3) / 3}, "both"),
    ({"components": []}, "no components"),
    ({"components": [flows.lu(3)]}, "component 0 .*dimension 3"),
    ({"base": dist.Normal(torch.zeros(2), 1.0)}, "to_event"),
    ({"components": components(context=3)}, "needs a context of width 3, and none came"),
    (
        {"components": components(context=3), "context": torch.zeros(5, 2)},
        r"of shape \(5, 2\) came",
    ),
    (
        {"components": components(context=3), "context": torch.zeros(5, 3), "base": normal(4)},
        "does not fit",
    ),
    (
        {"components": [flows.lu(2), Flow([planar(2)], name="mine")]},
        "component 1: flow 'mine': step Planar has no inverse .*flows.realnvp",
    ),
    ({"components": [Flow([affine_autoregressive(2)], dim=2)]}, "2 passes"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_cannot_be_a_mixture_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        build(**changes)


def test_other_refusals():
    with pytest.raises(TypeError, match=r"component 0 is Planar; .* Flow\(\[transform\]\)"):
        build(components=[planar(2)])
    q = build(validate_args=True)
    for value in (torch.zeros(3), torch.zeros(2, 3), torch.zeros(())):
        with pytest.raises(ValueError, match="log_prob: points have shape"):
            q.log_prob(value)
    with pytest.raises(ValueError, match="not all finite"):
        q.log_prob_components(torch.tensor([0.0, math.nan]).double())
    with pytest.raises(NotImplementedError, match="rsample_component"):
        q.rsample((2,))
    with pytest.raises(IndexError, match="no component 3"):
        q.rsample_component(3)
    with pytest.raises(ValueError, match="num_samples is 1"):
        q.expectation(torch.sum, 1)
    uniform = dist.Categorical(torch.ones(2))
    mixed = dist.MixtureSameFamily(uniform, normal(2))
    q = build(base=mixed)
    with pytest.raises(NotImplementedError, match="MixtureSameFamily has no pathwise gradient"):
        q.rsample_component(0)
    with torch.no_grad():
        assert q.rsample_component(0, (3,)).shape == (3, 2)
    slow = BoostedFlow(
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        [Flow([affine_autoregressive(2)], dim=2)],
        allow_slow=True,
    )
    z, log_q = slow.sample_and_log_prob((5,))
    assert torch.allclose(slow.log_prob(z), log_q, atol=1e-5)
    assert np.isfinite(log_q.numpy()).all()
