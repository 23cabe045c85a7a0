"""The stratified bound: its value, its gradient by quadrature, weights that are learnt too."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from boosting_pairs import Posterior, place, rows, standard, vae
from pyro.infer import Trace_ELBO

from pyroboost import MetaModel, flows
from pyroboost.distributions import Components
from pyroboost.guides import BoostedFlowGuide
from pyroboost.infer import StratifiedELBO, boost, fit
from pyroboost.infer._coupled_rows import check_rows
from pyroboost.models import VAE

CENTRES, SCALES = torch.tensor([[-1.5], [1.0]]), torch.tensor([0.8, 0.7])
GRID = torch.linspace(-20, 20, 20001)


def model(*_):
    pyro.sample("z", dist.StudentT(3.0, torch.tensor([0.3]), 1.2).to_event(1))


def posterior(weights=(0.4, 0.6, 0.0)):
    guide = Posterior(count=3, dim=1, flow=lambda: flows.affine(1))
    for flow, centre, scale in zip(guide.components.flows, CENTRES, SCALES, strict=False):
        place(flow, centre, scale)
    guide.components.weights.copy_(torch.tensor(weights))
    return guide


def test_value_and_gradient_of_everything_are_those_of_quadrature():
    guide = posterior()
    components = guide.components
    with components.learning_weights(), pyro.settings.context(module_local_params=True):
        q = components(standard(1))
        log_q = q.log_prob(GRID[:, None])
        log_p = torch.distributions.StudentT(3.0, 0.3, 1.2).log_prob(GRID)
        kl = torch.trapezoid(log_q.exp() * (log_q - log_p), GRID)
        kl.backward()
        exact = [p.grad.clone() for p in components.parameters() if p.grad is not None]
        components.zero_grad()
        loss = StratifiedELBO(60_000, max_plate_nesting=0, vectorize_particles=True)
        torch.manual_seed(0)
        value = loss.differentiable_loss(model, guide)
        value.backward()
        found = [p.grad for p in components.parameters() if p.grad is not None]
    assert float(value.detach()) == pytest.approx(float(kl.detach()), abs=0.015)
    assert len(found) == len(exact) == 3  # two flows of two coefficients and the logits
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0)


def test_the_bound_is_that_of_draws_from_the_mixture():
    pair, x = vae(), rows(40)
    pair.guide.fn.components.weights.copy_(torch.tensor([0.3, 0.7]))
    torch.manual_seed(1)
    one = StratifiedELBO(200, vectorize_particles=True).loss(pair.model, pair.guide, x)
    ordinary = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    assert one == pytest.approx(ordinary.loss(pair.model, pair.guide, x), rel=0.03)


def test_noise_of_the_choice_is_gone():
    """Two far components of a target that is their mixture: no draw is better than another."""
    guide = posterior((0.5, 0.5, 0.0))
    place(guide.components.flows[0], torch.tensor([-20.0]), 1.0)
    place(guide.components.flows[1], torch.tensor([20.0]), 1.0)
    centres = torch.tensor([-20.0, 20.0])
    weights = torch.tensor([0.5, 0.5])

    def two(*_):
        mix, parts = dist.Categorical(weights), dist.Normal(centres[:, None], 1.0).to_event(1)
        pyro.sample("z", dist.MixtureSameFamily(mix, parts))

    values = [StratifiedELBO(max_plate_nesting=0).loss(two, guide) for _ in range(5)]
    assert max(map(abs, values)) < 1e-4


def test_a_fit_learns_flows_and_weights_together():
    torch.manual_seed(0)
    guide = Posterior(count=2, dim=1, flow=lambda: flows.affine(1))
    place(guide.components.flows[0], torch.tensor([-2.0]))
    place(guide.components.flows[1], torch.tensor([2.0]))
    guide.components.weights.fill_(0.5)
    law = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.2, 0.8])),
        dist.Normal(torch.tensor([[-3.0], [3.0]]), 0.7).to_event(1),
    )

    def two(*_):
        pyro.sample("z", law)

    loss = StratifiedELBO(10, max_plate_nesting=0, vectorize_particles=True)
    with guide.components.learning_weights():
        fit((two, guide), torch.zeros(400, 1), batch_size=1, epochs=1, loss=loss, lr=0.03, seed=0)
    torch.testing.assert_close(
        guide.components.weights, torch.tensor([0.2, 0.8]), atol=0.02, rtol=0
    )
    assert not guide.components.weights.requires_grad
    assert [n for n, _ in guide.named_parameters() if "logits" in n] == []


def test_weights_stand_still_outside_the_context():
    guide = posterior()
    loss = StratifiedELBO(max_plate_nesting=0)
    fit((model, guide), torch.zeros(5, 1), batch_size=1, epochs=1, loss=loss, seed=0)
    assert guide.components.weights.tolist() == pytest.approx([0.4, 0.6, 0.0])


def test_particles_and_sites_are_checked():
    with pytest.raises(ValueError, match="num_particles is 0"):
        StratifiedELBO(0)
    with pytest.raises(ValueError, match="no site from a BoostedFlow"):
        StratifiedELBO(max_plate_nesting=0).loss(model, model)


class Rows(torch.nn.Module):
    """A boosted site in a plate of two rows, and perhaps another site."""

    def __init__(self, other=False):
        super().__init__()
        self.components, self.other = Components(lambda: flows.affine(1, spread=1.0), 2), other
        self.components.weights[:] = torch.tensor([0.4, 0.6])

    def forward(self, *_):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3)) if self.other else torch.ones(())
        with pyro.plate("rows", 2):
            base = dist.Normal(torch.zeros(2, 1), scale).to_event(1)
            pyro.sample("z", self.components(base))


def rowed(couple, other=False):
    def model(*_):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0)) if other else torch.ones(())
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 1), scale).to_event(1))[..., 0]
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 2.0]))
        if couple:
            pyro.factor("pull", -0.5 * (z[..., 0] - z[..., 1]).square())

    return model


@pytest.mark.parametrize("other", [False, True])
def test_rows_that_act_on_each_other_are_refused(other):
    """One component for all rows is another law than one for each, if they act on each other."""
    with pytest.raises(ValueError, match=r"couples the rows of the boosted site.*as one vector"):
        boost((rowed(True, other), Rows(other)), (), steps=2, seed=0)
    found = boost((rowed(False, other), Rows(other)), (), steps=2, num_samples=20, seed=0)
    assert math.isfinite(found.bound.value)
    x = torch.ones(2, 1)
    coupled = MetaModel(rowed(True, other), Rows(other), visible="x", hidden="z")
    with pytest.raises(ValueError, match="couples the rows"):
        fit(coupled, x, epochs=1)
    fit(MetaModel(rowed(False, other), Rows(other), visible="x", hidden="z"), x, epochs=1)


def test_rows_of_a_model_are_told_apart_up_to_rounding():
    """Many rows and large numbers do not look coupled; batch norms are in eval mode."""
    torch.manual_seed(0)
    guide = {"guide": lambda e: BoostedFlowGuide(e, 3, 2, lambda d: flows.realnvp(d, 1))}
    pair, x = VAE(400, 3, units=8, **guide), (torch.rand(500, 400) < 0.5).float()
    check_rows(pair, (x,), torch.device("cpu"), 0)
    assert pair.training
