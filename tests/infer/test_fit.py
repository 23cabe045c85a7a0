"""The training loop: what it finds, what it reads, what it says, what it leaves alone."""

import json
import math
import random
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from fit_pairs import Bits, Decoder, Encoder, normal_guide, normal_model, normal_pair, vae_pair
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyroboost.infer import Callback, fit, scale_latents
from pyroboost.metamodel import MetaModel

SGD = partial(torch.optim.SGD, lr=0.5)


def free(name):
    return pyro.param(name).detach()


def numpy_state():
    return pyro.util.get_rng_state()["numpy"][1].tolist()


def factor_pair(log_factor=lambda w: -((w - 3.0) ** 2)):
    """A pair with one weight w whose bound per datum is log_factor(w), whatever the data."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.0))

        def forward(self, x, *labels):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.factor("x", log_factor(self.w).expand(len(x)))

    def guide(x, *labels):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    return MetaModel(Model(), guide, visible="x", hidden="z")


def climbing(pair):
    """Settings whose loss has gradient -1 per datum: SGD with lr 1 raises w by 1 a step."""

    def loss(model, guide, x):
        trace = pyro.poutine.trace(model).get_trace(x)
        return 0.0 * trace.log_prob_sum() - len(x) * pair.model.fn.w

    return {"loss": loss, "optimizer": partial(torch.optim.SGD, lr=1.0), "batch_size": 10}


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


class TestStopping:
    """w climbs by 1 an epoch, the held-out bound is -(w - 3)^2: best after epoch 3."""

    def climb(self, **words):
        pair, x = factor_pair(), torch.zeros(10)
        result = fit(
            pair, x, validation=x, epochs=words.pop("epochs", 9), **climbing(pair), **words
        )
        return pair.model.fn.w.item(), result

    def test_best_weights_are_back(self):
        w, result = self.climb()
        assert (w, result.best_epoch, result.epochs_run) == (3.0, 3, 9)
        assert result.best_bound == pytest.approx(0.0, abs=1e-6)
        bounds = [row["validation_bound"] for row in result.history]
        assert bounds == pytest.approx([-((w - 3.0) ** 2) for w in range(1, 10)], abs=1e-5)

    def test_patience(self):
        w, result = self.climb(patience=2)
        assert (w, result.best_epoch, result.epochs_run) == (3.0, 3, 5)
        assert "no better held-out bound in 2 epochs" in result.stopped

    def test_best_and_patience_count_only_once_annealed(self):
        """Annealing reaches 1 with epoch 5: the better epochs 3 and 4 do not count."""
        w, result = self.climb(patience=2, annealing=5)
        assert (w, result.best_epoch, result.epochs_run) == (5.0, 5, 7)

    def test_annealing_that_never_reaches_one_keeps_the_last_weights(self):
        w, result = self.climb(patience=1, annealing=20, epochs=4)
        assert (w, result.best_epoch, result.epochs_run) == (4.0, None, 4)
        assert "annealing ended at 0.2" in result.stopped

    def test_plateau_schedule_reads_the_held_out_bound(self):
        """The bound is best at epoch 3, so a plateau of patience 0 halves the rate from then on."""
        for mode in ("min", "max"):
            plateau = partial(
                torch.optim.lr_scheduler.ReduceLROnPlateau, mode=mode, patience=0, factor=0.5
            )
            _, result = self.climb(scheduler=plateau, epochs=6)
            assert [row["lr"] for row in result.history] == [1.0, 1.0, 1.0, 1.0, 0.5, 0.25]

    def test_schedule_steps_once_an_epoch(self):
        decay = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1)
        _, result = self.climb(scheduler=decay, epochs=5)
        assert [row["lr"] for row in result.history] == pytest.approx([1, 1, 0.1, 0.1, 0.01])

    def test_clipping(self):
        """The gradient is -1, clipped to 0.25: w climbs by 0.25 a step."""
        pair = factor_pair()
        fit(pair, torch.zeros(10), epochs=2, clip_norm=0.25, **climbing(pair))
        assert pair.model.fn.w.item() == pytest.approx(0.5, abs=1e-5)


class TestCallbacks:
    def test_all_hooks_in_order_and_stop(self):
        calls = []

        class Spy(Callback):
            def on_start(self, state):
                calls.append(("start", state.epoch, state.batch))

            def on_batch(self, state):
                calls.append(("batch", state.epoch, state.batch))
                if (state.epoch, state.batch) == (2, 1):
                    state.stop("enough")

            def on_epoch(self, state):
                calls.append(("epoch", state.epoch, len(state.history)))

            def on_end(self, state):
                calls.append(("end", state.epoch, state.pair.model.fn.w.item()))

        pair = factor_pair()
        result = fit(pair, torch.zeros(20), epochs=5, callbacks=[Spy()], **climbing(pair))
        assert result.stopped == "enough"
        assert result.epochs_run == 2
        assert result.history[1]["batches"] == 1
        assert calls == [
            ("start", 1, 0),
            ("batch", 1, 1),
            ("batch", 1, 2),
            ("epoch", 1, 1),
            ("batch", 2, 1),
            ("epoch", 2, 2),
            ("end", 2, 3.0),
        ]

    def test_a_function_is_called_each_epoch_and_may_stop(self):
        def stop(state):
            if state.epoch == 2:
                state.stop()

        pair = factor_pair()
        result = fit(pair, torch.zeros(10), epochs=5, callbacks=[stop], **climbing(pair))
        assert result.epochs_run == 2

    def test_drawing_in_a_callback_does_not_change_the_fit(self):
        def run(callbacks):
            pyro.clear_param_store()
            torch.manual_seed(1)
            fit(normal_pair(), torch.arange(30.0), epochs=3, batch_size=7, callbacks=callbacks)
            return free("a"), torch.get_rng_state()

        class Draw(Callback):
            def on_batch(self, state):
                torch.randn(3)

            on_epoch = on_batch

        for one, other in zip(run([]), run([Draw()]), strict=True):
            assert torch.equal(one, other)

    def test_history_is_json_and_repr_reads(self):
        result = fit(normal_pair(), torch.ones(9), validation=torch.ones(3), epochs=2)
        assert json.loads(json.dumps(result.history, allow_nan=False)) == result.history
        assert set(result.history[0]) >= {"epoch", "loss", "validation_bound", "beta", "lr"}
        assert [row["epoch"] for row in result.history] == [1, 2]
        assert repr(result).startswith("Fit(2 epochs, loss ")
        assert "all epochs done" in repr(result)


class TestLeavesAlone:
    def test_seed_is_local_and_repeats(self):
        def run(seed):
            pyro.clear_param_store()
            before = [torch.get_rng_state().tolist(), random.getstate(), numpy_state()]
            fit(normal_pair(), torch.arange(30.0), epochs=2, batch_size=7, seed=seed)
            assert [torch.get_rng_state().tolist(), random.getstate(), numpy_state()] == before
            return free("a")

        first = run(5)
        torch.randn(3)
        assert torch.equal(first, run(5))
        assert not torch.equal(first, run(6))

    def test_held_out_evaluation_does_not_disturb_training(self):
        def run(validation):
            pyro.clear_param_store()
            torch.manual_seed(1)
            fit(normal_pair(), torch.arange(30.0), validation=validation, epochs=1, batch_size=7)
            return free("a"), torch.get_rng_state()

        loader = DataLoader(TensorDataset(torch.arange(9.0)), batch_size=3, shuffle=True)
        plain = run(None)
        for other in (run(torch.arange(9.0)), run(loader)):
            assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))

    def test_held_out_bound_uses_common_random_numbers(self):
        """With lr 0 every epoch has the same bound, also from a loader that shuffles itself."""
        loader = DataLoader(
            TensorDataset(torch.arange(9.0)), 3, shuffle=True, generator=torch.Generator()
        )
        for held_out in (torch.arange(9.0), loader, Bits(torch.full((9,), 0.5), 4)):
            result = fit(
                normal_pair(),
                torch.arange(9.0),
                validation=held_out,
                epochs=3,
                optimizer=partial(torch.optim.SGD, lr=0.0),
            )
            assert len({row["validation_bound"] for row in result.history}) == 1

    def test_refresh_comes_before_each_evaluation(self):
        pair, calls = vae_pair(), []
        pair.refresh = lambda: calls.append(pair.model.training)
        x = torch.bernoulli(torch.full((20, 8), 0.5))
        fit(pair, x, validation=x, epochs=3)
        assert calls == [False] * 3

    def test_modes_and_frozen_buffers(self):
        """A frozen part keeps its mode and its statistics; every module has its mode back."""
        pair = vae_pair()
        pair.eval()
        pair.guide.requires_grad_(False)
        pair.model.fn.net[3].train()
        modes = [m.training for m in pair.modules()]
        frozen = {n: b.clone() for n, b in pair.guide.state_dict().items() if "_extra" not in n}
        running = pair.model.fn.net[1].running_mean.clone()
        fit(pair, torch.bernoulli(torch.full((20, 8), 0.5)), epochs=1)
        assert [m.training for m in pair.modules()] == modes
        assert all(torch.equal(pair.guide.state_dict()[n], b) for n, b in frozen.items())
        assert not torch.equal(pair.model.fn.net[1].running_mean, running)

    def test_param_store_gains_nothing_from_modules(self):
        pyro.param("mine", torch.tensor(1.0))
        fit(vae_pair(), torch.zeros(20, 8), epochs=1)
        assert list(pyro.get_param_store().keys()) == ["mine"]

    def test_another_pair_of_the_same_class_stays(self):
        one, other = vae_pair(), vae_pair()
        before = [p.clone() for p in other.parameters()]
        fit(one, torch.zeros(20, 8), epochs=1)
        assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))

    def test_gradients_are_cleared_and_no_grad_is_no_hindrance(self):
        pair = vae_pair()
        before = [p.clone() for p in pair.parameters()]
        with torch.no_grad():
            fit(pair, torch.bernoulli(torch.full((20, 8), 0.5)), epochs=1)
        assert all(p.grad is None for p in pair.parameters())
        assert all(not torch.equal(p, q) for p, q in zip(pair.parameters(), before, strict=True))

    def test_auto_device(self):
        pair = vae_pair()
        fit(pair, torch.zeros(20, 8), epochs=1, device="auto")
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert {p.device.type for p in pair.parameters()} == {expected}


class TestBar:
    @pytest.mark.parametrize("data", [torch.ones(30), [torch.ones(5)] * 3])
    def test_quiet_without_a_terminal(self, data, capfd):
        fit(normal_pair(), data, epochs=2, batch_size=10)
        assert capfd.readouterr().err == ""

    def test_shows_epochs_when_asked(self, capfd):
        x = torch.ones(30)
        fit(normal_pair(), x, validation=x, epochs=2, batch_size=10, progress=True)
        shown = capfd.readouterr().err
        assert "6/6" in shown
        assert "bound=" in shown


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
