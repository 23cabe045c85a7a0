"""The training loop: what it finds, what it reads, what it says, what it leaves alone."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from fit_pairs import (
    Bits,
    Decoder,
    Encoder,
    factor_pair,
    normal_guide,
    normal_model,
    normal_pair,
    vae_pair,
)
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyroboost.infer import fit, scale_latents
from pyroboost.metamodel import MetaModel

SGD = partial(torch.optim.SGD, lr=0.5)


def free(name):
    return pyro.param(name).detach()


class TestConjugate:
    """z ~ N(m, 1), x ~ N(z, 1): posterior N((x + m) / 2, 1/2), evidence N(m, 2)."""

    @pytest.fixture
    def data(self):
        return 1.5 + math.sqrt(2.0) * torch.randn(600, generator=torch.Generator().manual_seed(3))

    def test_posterior_and_evidence(self, data):
        pair, held_out = normal_pair(), data[500:]
        result = fit(
            pair,
            data[:500],
            validation=held_out,
            epochs=60,
            batch_size=50,
            lr=0.1,
            scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.92),
            num_validation_particles=20,
        )
        m = data[:500].mean()
        assert abs(free("m") - m) < 0.05
        assert abs(free("a") - 0.5) < 0.03
        assert abs(free("b") - free("m") / 2) < 0.05
        assert abs(free("s") - math.sqrt(0.5)) < 0.03
        exact = dist.Normal(free("m"), math.sqrt(2.0)).log_prob(held_out).mean()
        last = result.history[-1]["validation_bound"]
        assert abs(result.best_bound - exact) < 0.01
        assert abs(last - exact) < 0.01

    def test_a_tuple_is_a_pair(self, data):
        fit((normal_model, normal_guide), data, epochs=2, lr=0.1)
        assert free("m") > 0.1

    def test_loss_is_per_datum(self, data):
        """One step of SGD from a known place moves m by lr times the mean of z - m."""
        values = []

        class Keep(pyro.poutine.messenger.Messenger):
            def _pyro_post_sample(self, msg):
                if msg["name"] == "z":
                    values.append(msg["value"].detach())

        pair = normal_pair()
        with Keep():
            fit(pair, data[:40], epochs=1, batch_size=40, optimizer=SGD)
        assert torch.allclose(free("m"), 0.5 * values[-1].mean(), atol=1e-6)

    def test_history_loss_is_the_mean_over_data(self, data):
        """With lr 0 the loss of an epoch is the negative ELBO per datum, ragged batch included."""
        pair = normal_pair()
        freeze = partial(torch.optim.SGD, lr=0.0)
        result = fit(pair, data[:505], epochs=40, batch_size=50, optimizer=freeze)
        exact = -(dist.Normal(0.0, 1.0).log_prob(data[:505]) - 0.5).mean()  # q is the prior
        losses = torch.tensor([row["loss"] for row in result.history])
        assert abs(losses.mean() - exact) < 4 * losses.std() / math.sqrt(40)
        assert {row["batches"] for row in result.history} == {11}
        assert {row["num_data"] for row in result.history} == {505}


class TestData:
    def test_each_datum_once_an_epoch_in_a_new_order(self):
        orders = []

        def loss(model, guide, x, y):
            assert torch.equal(x, -y)
            orders.append(x)
            return (model.fn.w**2) * len(x)

        x = torch.arange(23.0)
        fit(factor_pair(), (x, -x), epochs=2, batch_size=5, loss=loss)
        first, second = torch.cat(orders[:5]), torch.cat(orders[5:])
        assert torch.equal(first.sort()[0], x)
        assert torch.equal(second.sort()[0], x)
        assert not torch.equal(first, second)

    @pytest.mark.parametrize(("rows", "sizes"), [(23, [5, 5, 5, 5, 3]), (11, [5, 6]), (1, [1])])
    def test_a_single_last_row_joins_the_batch_before(self, rows, sizes):
        seen = []

        def loss(model, guide, x):
            seen.append(len(x))
            return (model.fn.w**2) * len(x)

        fit(factor_pair(), torch.zeros(rows), epochs=1, batch_size=5, loss=loss)
        assert seen == sizes

    def test_reiterable_draws_fresh_bits_each_epoch(self):
        data = Bits(torch.full((40, 8), 0.5), 10)
        result = fit(vae_pair(), data, epochs=3)
        drawn = data.passes[-3:]
        assert not torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[1], drawn[2])
        assert [row["batches"] for row in result.history] == [4, 4, 4]

    def test_loader_and_list_of_batches(self):
        x = torch.bernoulli(torch.full((40, 8), 0.5))
        loader = DataLoader(TensorDataset(x), batch_size=16, shuffle=True)
        assert fit(vae_pair(), loader, epochs=1, validation=loader).history[0]["num_data"] == 40
        assert fit(vae_pair(), list(x.split(16)), epochs=2).history[1]["batches"] == 3

    @pytest.mark.parametrize(
        ("data", "error", "sentence"),
        [
            ((x for x in [torch.ones(3)]), TypeError, "iterated only once"),
            (np.ones(3), TypeError, "batch 1 of data holds"),
            (7, TypeError, "type int"),
            (torch.tensor([1.0, math.nan]), ValueError, "NaN or infinity"),
            (torch.tensor(1.0), ValueError, "one length"),
            ((torch.ones(3), torch.ones(4)), ValueError, "one length"),
            ([], ValueError, "no batch"),
            ([torch.ones(0)], ValueError, "at least one row"),
        ],
    )
    def test_useless_data_are_refused(self, data, error, sentence):
        with pytest.raises(error, match=sentence):
            fit(normal_pair(), data, epochs=1)

    @pytest.mark.parametrize(
        ("words", "error", "sentence"),
        [
            ({"patience": 2}, ValueError, "validation"),
            ({"lr": 0.1, "optimizer": SGD}, ValueError, "both given"),
            ({"batch_size": 0}, ValueError, "batch_size"),
            ({"clip_norm": 0.0}, ValueError, "clip_norm"),
            ({"checkpoint_every": 3}, ValueError, "needs a file"),
            ({"annealing": -1}, ValueError, "annealing"),
            ({"annealing": lambda p: 0.0}, ValueError, "beta = 0.0"),
            ({"loss": TraceGraph_ELBO()}, TypeError, "differentiable_loss"),
            ({"callbacks": [3]}, TypeError, "callback"),
            ({"num_validation_particles": 0}, ValueError, "num_validation_particles"),
        ],
    )
    def test_useless_settings_are_refused(self, words, error, sentence):
        with pytest.raises(error, match=sentence):
            fit(normal_pair(), torch.ones(4), epochs=1, **words)

    def test_nothing_to_train_is_refused(self):
        pair = factor_pair()
        pair.requires_grad_(False)
        with pytest.raises(ValueError, match="nothing to train"):
            fit(pair, torch.ones(4), epochs=1)


def test_enumerated_loss_is_kept_for_the_held_out_bound():
    """A mixture whose component has no guide: the bound is the exact log p(x)."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor([-1.0, 1.0]))

        @pyro.infer.config_enumerate
        def forward(self, x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
                pyro.sample("x", dist.Normal(self.loc[k], 1.0), obs=x)

    pair = MetaModel(Mixture(), lambda x: None, visible="x", hidden="k")
    x = torch.randn(30)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    result = fit(pair, x, validation=x, epochs=5, batch_size=30, lr=0.1, loss=loss)
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(pair.model.fn.loc.detach(), 1.0)
    )
    assert result.best_bound == pytest.approx(float(mixture.log_prob(x).mean()), abs=1e-5)


def test_own_objective_is_used_when_no_loss_is_given():
    class Own(MetaModel):
        def objective(self):
            return lambda model, guide, x: ((self.model.fn.net[0].bias - 1.0) ** 2).sum() * len(x)

    pair = Own(Decoder(8, 2, 6), Encoder(8, 2, 6), visible="x", hidden="z")
    result = fit(pair, torch.zeros(20, 8), epochs=200, lr=0.05)
    assert result.history[-1]["loss"] < 1e-2
    with pytest.raises(ValueError, match="reached none"):
        fit(pair, torch.zeros(20, 8), epochs=1, annealing=2)


def test_scale_latents_leaves_plates_and_observations():
    trace = pyro.poutine.trace(scale_latents(0.5)(normal_model)).get_trace(torch.ones(3))
    scales = {name: node["scale"] for name, node in trace.nodes.items() if node["type"] == "sample"}
    assert scales == {"data": 1.0, "z": 0.5, "x": 1.0}
