"""A mixture at the edges: inverses that overflow, float32 far out, batches and no draws at all."""

import pyro.distributions as dist
import pytest
import torch

from pyroboost import flows
from pyroboost.distributions import BoostedFlow
from pyroboost.flows import Affine, Flow, Step

DOUBLE = torch.float64
KINDS = ["affine", "lu", "nice", "nlsq", "realnvp", "spline"]


class Moved(Step):
    """A shift by a hundred; with `fragile` it cannot be undone above fifty, where its draws are."""

    def __init__(self, fragile):
        super().__init__(2)
        self.fragile = fragile
        self.shift = torch.nn.Parameter(torch.full((2,), 100.0, dtype=DOUBLE))

    def _push(self, x, context):
        return x + self.shift, x.new_zeros(x.shape[:-1])

    def _pull(self, y, context):
        lost = 0 * (50 - y).sqrt() if self.fragile else 0.0
        return y - self.shift + lost, y.new_zeros(y.shape[:-1])


def normal(*batch):
    return dist.Normal(torch.zeros(*batch, 2, dtype=DOUBLE), 1.0).to_event(1)


def test_a_component_is_not_inverted_at_its_own_draws():
    """Of an inverse that fails there even unused numbers would make the gradient NaN."""
    results = []
    for fragile in (False, True):
        part = Moved(fragile)
        weights = torch.tensor([0.3, 0.7], dtype=DOUBLE, requires_grad=True)
        q = BoostedFlow(normal(), [Flow([part]), Flow([Affine(2, spread=0.0).double()])], weights)
        torch.manual_seed(2)
        strata = q.stratified((6,), score=True)
        loss = (strata.weights * strata.log_prob.mean(1)).sum()
        results.append([loss, *torch.autograd.grad(loss, [part.shift, weights])])
        torch.manual_seed(2)
        z, log_q = q.sample_and_log_prob((40,))
        assert bool((z[:, 0] > 50).any())
        results[-1].append(log_q)
    for expected, found in zip(*results, strict=True):
        assert bool(found.isfinite().all())
        assert torch.allclose(found, expected)


def test_strata_of_mixed_kinds_in_blocks():
    """Scores of draws are those of the mixture, whatever fits in memory; weights of zero too."""
    torch.manual_seed(1)
    names = ("realnvp", "lu", "realnvp", "nlsq")
    parts = [getattr(flows, name)(2, spread=0.4).double() for name in names]
    weights = torch.tensor([0.4, 0.3, 0.0, 0.3], dtype=DOUBLE)
    for memory, count in ((256.0, 5), (0.02, 5), (256.0, 400)):
        q = BoostedFlow(normal(3), parts, weights, memory=memory)
        with torch.no_grad():
            strata = q.stratified((count,), score=True)
            assert strata.values.shape == (4, count, 3, 2)
            assert torch.allclose(strata.log_prob, q.log_prob(strata.values), atol=1e-8)
        one = BoostedFlow(normal(3), parts[:1], memory=memory).stratified((count,), score=True)
        assert torch.allclose(one.log_prob, q.log_prob_components(one.values)[..., 0], atol=1e-8)


@pytest.mark.parametrize("name", KINDS)
def test_far_points_in_float32(name):
    """No NaN however far a point is; near enough for a finite density gradients are finite too."""
    torch.manual_seed(4)
    parts = [getattr(flows, name)(2, spread=0.5) for _ in range(3)]
    q = BoostedFlow(dist.Normal(torch.zeros(2), 1.0).to_event(1), parts)
    signs = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [0.0, 1.0]])
    for size in (1e2, 1e6, 1e12):
        z = (size * signs).requires_grad_()
        log_q = q.log_prob(z)
        assert bool((log_q < -size).all())
        assert bool(log_q.isfinite().all())
        found = torch.autograd.grad(log_q.sum(), [z, *(p for f in parts for p in f.parameters())])
        assert all(bool(gradient.isfinite().all()) for gradient in found)
    assert not bool(q.log_prob(1e30 * signs).isnan().any())


def test_a_far_component_does_not_spoil_a_near_one():
    """In float32 one component's density is zero where the other's is not."""
    far, near = flows.affine(2, spread=0.0), flows.affine(2, spread=0.0)
    with torch.no_grad():
        far.steps[0].coefficients.bias[:2] = 1e22  # its square overflows
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    q = BoostedFlow(base, [far, near], torch.tensor([0.5, 0.5]))
    z = torch.randn(5, 2, requires_grad=True)
    log_q = q.log_prob(z)
    assert torch.allclose(log_q, base.log_prob(z) - torch.tensor(2.0).log())
    log_q.sum().backward()
    assert torch.allclose(z.grad, -z.detach())
    assert all(bool(p.grad.isfinite().all()) for f in (far, near) for p in f.parameters())


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (3,)])
@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
def test_shapes(shape, batch):
    """Every batch shape, with a context and without, and samples that are none."""
    torch.manual_seed(5)
    for width in (0, 3):
        names = ("realnvp", "realnvp", "nlsq")
        parts = [getattr(flows, n)(2, spread=0.3, context=width).double() for n in names]
        context = torch.randn(*batch, width, dtype=DOUBLE) if width else None
        q = BoostedFlow(normal(*batch), parts, context=context)
        z, log_q = q.sample_and_log_prob(shape)
        assert z.shape == (*shape, *batch, 2)
        assert log_q.shape == (*shape, *batch)
        assert torch.allclose(q.log_prob(z), log_q)
        assert q.log_prob_components(z).shape == (*shape, *batch, 3)
        strata = q.stratified(shape, score=True)
        assert strata.values.shape == (3, *shape, *batch, 2)
        assert torch.allclose(strata.log_prob, q.log_prob(strata.values))
        drawn, log_g = q.rsample_component_and_log_prob(1, shape)
        assert torch.allclose(log_g, q.log_prob_components(drawn)[..., 1])
