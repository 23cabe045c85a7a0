"""The loss of a round by the whole mixture: value and gradients against quadrature."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from boosting_pairs import place
from torch import nn

from pyroboost import flows
from pyroboost.distributions import Components
from pyroboost.infer import _boosting_fit, boost
from pyroboost.infer._boosting_losses import DrawnELBO, MappedELBO, MixtureELBO
from pyroboost.infer._boosting_pair import only, staged
from pyroboost.infer._round_law import Stage
from pyroboost.infer.fit import fit
from pyroboost.metamodel import MetaModel

GRID = torch.linspace(-15, 15, 30_001)
WEIGHTS = torch.tensor([0.7, 0.3])


class Model(nn.Module):
    """A skewed law whose place is a parameter."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.2))

    def forward(self, *_):
        pyro.sample("z", dist.StudentT(4.0, self.shift.expand(1), 1.0).to_event(1))


class Guide(nn.Module):
    """Two affine flows over a base that trains with them."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.3]))
        self.log_scale = nn.Parameter(torch.tensor([-0.2]))
        self.components = Components(lambda: flows.affine(1), 2)
        place(self.components.flows[0], torch.tensor([-1.0]), 1.1)
        place(self.components.flows[1], torch.tensor([0.8]), 0.6)

    def law(self):
        base = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        return self.components(base)

    def forward(self, *_):
        pyro.sample("z", self.law())


def by_quadrature(model, guide):
    """Return the bound, and its term of component 1."""
    with torch.enable_grad():
        log_q = guide.law().log_prob(GRID[:, None])
        log_g = guide.law().log_prob_components(GRID[:, None])[:, 1]
        log_p = dist.StudentT(4.0, model.shift, 1.0).log_prob(GRID)
    bound = torch.trapezoid(log_q.exp() * (log_p - log_q), GRID)
    return bound, torch.trapezoid(log_g.exp() * (log_p - log_q), GRID)


def prepared():
    model, guide = Model(), Guide()
    pair = MetaModel(model, guide, visible="x", hidden="z")
    stage = Stage(1, "mixture")
    return model, guide, staged(pair, guide.components, stage), stage


def losses(count):
    return {"drawn": DrawnELBO(count, 0, stacks=True), "mapped": MappedELBO(count, 0)}


@pytest.mark.parametrize("kind", ["drawn", "mapped"])
def test_all_terms_train_all_parameters_by_the_true_gradient(kind):
    model, guide, pair, stage = prepared()
    with only(guide.components, [1], WEIGHTS), pyro.settings.context(module_local_params=True):
        names = ["shift", "loc", "log_scale"]
        moved = [model.shift, guide.loc, guide.log_scale, *guide.components.flows[1].parameters()]
        exact = torch.autograd.grad(-by_quadrature(model, guide)[0], moved)
        torch.manual_seed(0)
        loss = MixtureELBO(losses(200_000)[kind], stage, guide.components, everything=True)
        value = loss.differentiable_loss(pair.model, pair.guide)
        value.backward()
        bound = float(by_quadrature(model, guide)[0].detach())
    assert -float(value.detach()) == pytest.approx(bound, abs=0.02)
    for name, p, slope in zip([*names, "flow"], moved, exact, strict=True):
        torch.testing.assert_close(p.grad, slope, atol=0.01, rtol=0.0, msg=name)
    assert all(p.grad is None for p in guide.components.flows[0].parameters())
    assert stage.component == 1


@pytest.mark.parametrize("kind", ["drawn", "mapped"])
def test_epochs_are_judged_by_the_bound_and_not_by_one_term(kind):
    model, guide, pair, stage = prepared()
    with only(guide.components, [1], WEIGHTS), pyro.settings.context(module_local_params=True):
        bound, term = (float(v.detach()) for v in by_quadrature(model, guide))
        torch.manual_seed(1)
        loss = MixtureELBO(losses(10)[kind], stage, guide.components, everything=False)
        found = -loss.judge(100_000).loss(pair.model, pair.guide)
        own = -float(
            MixtureELBO(losses(100_000)[kind], stage, guide.components, everything=False)
            .differentiable_loss(pair.model, pair.guide)
            .detach()
        )
    assert abs(bound - term) > 0.1
    assert found == pytest.approx(bound, abs=0.01)
    assert own == pytest.approx(term, abs=0.01)


@pytest.mark.parametrize("still", [True, False])
def test_rounds_are_trained_and_judged_so(monkeypatch, still):
    """All terms train where something beside the flows does."""
    seen = []

    def watch(pair, data, **settings):
        seen.append(settings["loss"])
        return fit(pair, data, **settings)

    monkeypatch.setattr(_boosting_fit, "fit", watch)
    model, guide = Model(), Guide()
    for p in (model.shift, guide.loc, guide.log_scale):
        p.requires_grad_(not still)
    boost((model, guide), (), steps=3, objective="mixture", finetune=0, num_samples=50, seed=0)
    assert not isinstance(seen[0], MixtureELBO)  # the first component has no others
    assert [one.everything for one in seen[1:]] == [not still] * len(seen[1:])
    assert len(seen) > 1
