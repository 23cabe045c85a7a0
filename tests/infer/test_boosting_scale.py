"""Boosting judges rightly where log densities are large, plates subsample and data are sorted."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from boosting_pairs import Posterior, standard
from torch import nn

from pyroboost import flows
from pyroboost.distributions import Components
from pyroboost.infer import _boosting_bench, boost
from pyroboost.infer._boosting_pair import layout
from pyroboost.infer._mixture_draws import tabulate
from pyroboost.infer._mixture_table import Table
from pyroboost.infer._mixture_weights import on_simplex
from pyroboost.metamodel import MetaModel

CPU = torch.device("cpu")


def steady(dim=2):
    return Posterior(count=2, dim=dim, flow=lambda: flows.affine(dim, spread=0.0))


def table_of(model, guide, data, *, seed=1, components=(0,), draws=40):
    pair = MetaModel(model, guide, visible="x", hidden="z")
    programs = layout(pair, (data,), CPU, seed)
    args = (programs, [(data,)], components, draws, 7)
    return programs, tabulate(*args, over_data=False, device=CPU)


def test_a_term_counted_for_every_draw_is_noticed_beside_a_large_total():
    x = 50 + torch.randn(20_000, generator=torch.Generator().manual_seed(0))

    def model(x):
        z = pyro.sample("z", standard(2))
        pyro.factor("more", -0.5 * (z**2).sum())  # sums over whatever is on the left
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(50.0, 1.0), obs=x)

    _, table = table_of(model, steady(), x)
    # q is N(0, I), so the bound is the data's density less E[z^2 / 2] of two coordinates.
    exact = float(dist.Normal(50.0, 1.0).log_prob(x).double().sum()) - 1.0
    bound = table.bound(torch.ones(1))
    assert abs(bound.value - exact) < 5 * bound.error + 0.05


@pytest.mark.parametrize("seed", [7, 8, 9])
def test_components_of_a_subsampling_model_see_the_same_rows(seed):
    x = 1 + 3 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))

    def model(x):
        pyro.sample("z", standard(2))
        with pyro.plate("data", len(x), subsample_size=2_000) as rows:
            pyro.sample("x", dist.Normal(1.0, 3.0), obs=x[rows])

    programs, table = table_of(model, steady(), x, seed=seed, components=(0, 1))
    assert not programs.together
    first, second = (table.bound(w) for w in torch.eye(2))
    exact = float(dist.Normal(1.0, 3.0).log_prob(x).double().sum())
    assert first.value == pytest.approx(second.value, abs=1e-3)  # they are one law
    assert first.error > 1.0
    assert abs(first.value - exact) < 5 * first.error
    both = table.bound(torch.tensor([0.5, 0.5]))
    assert both.error == pytest.approx(first.error, rel=1e-6)  # of rows that both have seen


@pytest.mark.parametrize("shift", [0.0, -5e4, -5e6])
def test_weights_do_not_depend_on_the_size_of_log_densities(shift):
    noise = torch.Generator().manual_seed(0)
    z = torch.randn(2, 1000, 1, generator=noise) + torch.tensor([-2.0, 2.0])[:, None, None]
    laws = [dist.Normal(-2.0, 1.0), dist.Normal(2.0, 1.0)]
    scores = torch.stack([law.log_prob(z) for law in laws], -1)
    # A binary fraction, so that adding the shift loses nothing in single precision.
    joint = (scores + torch.tensor([0.3, 0.7]).log()).logsumexp(-1).double()
    table = Table(joint + shift, scores, torch.ones(1), (0, 1), False)
    found, _ = on_simplex(table, torch.tensor([0.5, 0.5]), 1)
    assert float(found[1]) == pytest.approx(0.7, abs=0.01)


def test_stored_densities_are_in_double_precision():
    table = Table(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1, 1), torch.ones(1), (0,), False)
    assert table.joint.dtype == table.scores.dtype == table.scale.dtype == torch.float64


def test_rows_that_judge_come_from_all_over_the_data(monkeypatch):
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.components = Components(lambda: flows.affine(1), 2)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", self.components(standard(1, (len(x),))))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.cat([torch.zeros(1000, 1), torch.ones(1000, 1)])
    seen = []

    def spy(programs, batches, *args, **settings):
        seen.append(torch.cat([batch[0] for batch in batches]))
        return tabulate(programs, batches, *args, **settings)

    monkeypatch.setattr(_boosting_bench, "tabulate", spy)
    boost((model, Guide()), x, epochs=1, start=1, evaluate_on=500, finetune=0, failures=1, seed=0)
    assert len(seen) > 1
    for rows in seen:
        assert len(rows) == 500
        assert 180 < int(rows.sum()) < 320
        assert torch.equal(rows, seen[0])


def test_a_latent_that_the_guide_does_not_sample_is_refused():
    def model():
        z = pyro.sample("z", standard(1))
        pyro.sample("k", dist.Bernoulli(logits=z[..., 0]))

    with pytest.raises(ValueError, match="samples 'k', of which the guide knows nothing"):
        boost((model, steady(1)), steps=5, seed=0)
