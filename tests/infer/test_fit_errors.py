"""What stops a fit: NaN and infinity by name, Ctrl-C without harm."""

import os
import signal
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from fit_pairs import vae_pair
from torch import nn

from pyroboost.infer import Callback, NonFiniteLoss, fit
from pyroboost.metamodel import MetaModel


class Spoilt(nn.Module):
    """A model that goes wrong in its n-th gradient-enabled run, at a place of choice."""

    def __init__(self, place, at):
        super().__init__()
        self.place, self.at, self.runs = place, at, 0
        self.w = nn.Parameter(torch.tensor(0.5))
        self.noise = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        self.runs += torch.is_grad_enabled()
        place = self.place if self.runs >= self.at else ""
        nan = torch.tensor(float("nan"))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.w + nan if place == "z" else self.w, 1.0))
            loc = pyro.sample("y", dist.Normal(z, self.noise.exp()))
            if place == "x":
                loc = loc + nan
            elif place == "outside":
                loc = loc * 1e30
            elif place == "gradient":  # 0 with an infinite slope
                loc = loc + (self.w - self.w.detach()).sqrt()
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.a * x, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5))


def spoilt_pair(place, at):
    return MetaModel(Spoilt(place, at), Guide(), visible="x", hidden="y")


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(("place", "site"), [("z", "z"), ("x", "x"), ("outside", "x")])
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_names_epoch_batch_and_site(place, site, validate):
    """Four batches an epoch: run 7 is epoch 2, batch 3; the weights of epoch 1 come back."""
    pair, kept = spoilt_pair(place, 7), {}

    def keep(state):
        kept.update({n: p.detach().clone() for n, p in state.pair.named_parameters()})

    with pyro.validation_enabled(validate), pytest.raises(NonFiniteLoss) as caught:
        fit(pair, torch.linspace(0, 1, 40), epochs=5, batch_size=10, lr=0.1, callbacks=[keep])
    error = caught.value
    assert (error.epoch, error.batch, error.site) == (2, 3, site)
    assert "in epoch 2, batch 3, and the first that is not finite is the " in str(error)
    assert f"of site '{site}'; the weights as they stood after epoch 1 are back" in str(error)
    assert all(torch.equal(p, kept[n]) for n, p in pair.named_parameters())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_the_search_sees_the_draws_that_failed(seed):
    """x has no location where z is negative: with other draws the site would not be found."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("w", torch.tensor(0.0)), 1.0))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("v", torch.tensor(0.0)), 1.0))

    with pytest.raises(NonFiniteLoss) as caught:
        fit((model, guide), torch.ones(40), epochs=9, batch_size=2, seed=seed, lr=1e-9)
    assert caught.value.site == "x"


def test_gradient_that_is_not_finite_with_clipping():
    pair = spoilt_pair("gradient", 3)
    with pytest.raises(
        NonFiniteLoss, match="norm of the gradient is inf in epoch 1, batch 3"
    ) as caught:
        fit(pair, torch.ones(40), epochs=1, batch_size=10, clip_norm=1.0)
    assert caught.value.site == "model.fn.w"
    assert all(torch.isfinite(p).all() for p in pair.parameters())


@pytest.mark.parametrize(("at", "batch"), [(2, 3), (4, 4)])
def test_gradient_that_is_not_finite_names_the_parameter(at, batch):
    """Without clipping it shows in the next batch, or at the end of the epoch."""
    pair = spoilt_pair("gradient", at)
    with pytest.raises(NonFiniteLoss, match=r"parameter 'model.fn.w'") as caught:
        fit(pair, torch.ones(40), epochs=1, batch_size=10)
    assert (caught.value.epoch, caught.value.batch) == (1, batch)
    assert caught.value.site == "model.fn.w"
    assert pair.model.fn.w.item() == 0.5


def test_best_weights_come_back_where_held_out_data_chose_them():
    pair, kept, x = spoilt_pair("x", 12), {}, torch.linspace(-1, 1, 40)

    def keep(state):
        if state.best_epoch == state.epoch:
            kept.update({n: p.detach().clone() for n, p in state.pair.named_parameters()})

    with pytest.raises(NonFiniteLoss):
        fit(pair, x, validation=x, epochs=5, batch_size=10, lr=0.5, callbacks=[keep])
    assert all(torch.equal(p, kept[n]) for n, p in pair.named_parameters())


def test_batch_with_nan_is_named():
    bad = torch.ones(10)
    bad[3] = torch.nan
    with pytest.raises(NonFiniteLoss, match=r"epoch 1, batch 2.*tensor 0 of the batch itself"):
        fit(spoilt_pair("none", 99), [torch.ones(10), bad], epochs=1)


def test_held_out_bound_is_named():
    pair = spoilt_pair("none", 99)
    held_out = [torch.ones(5), torch.full((5,), torch.inf)]
    with pytest.raises(NonFiniteLoss, match=r"batch 2 of the held-out data") as caught:
        fit(pair, torch.ones(10), validation=held_out, epochs=1)
    assert caught.value.held_out


def test_other_errors_pass_unchanged():
    def loss(model, guide, x):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(spoilt_pair("none", 99), torch.ones(10), epochs=1, loss=loss)
    with pytest.raises(ValueError, match="support"):
        fit(vae_pair(), torch.full((10, 8), 0.5), epochs=1)


def test_loss_without_a_guilty_site():
    def loss(model, guide, x):
        return pair.model.fn.w * float("inf")

    pair = spoilt_pair("none", 99)
    with pytest.raises(NonFiniteLoss, match="no site") as caught:
        fit(pair, torch.ones(10), epochs=1, loss=loss)
    assert caught.value.site is None


class Interrupt(Callback):
    def __init__(self, how):
        self.how = how

    def on_batch(self, state):
        if (state.epoch, state.batch) == (2, 3):
            if self.how == "raise":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("how", ["raise", "signal"])
def test_ctrl_c_saves_and_the_same_call_ends_as_if_nothing_had_been(how, tmp_path):
    x = torch.bernoulli(torch.full((50, 8), 0.5))
    words = {"epochs": 4, "batch_size": 10, "seed": 1, "lr": 0.05}

    def fresh():
        torch.manual_seed(0)
        return vae_pair()

    whole = fresh()
    fit(whole, x, **words)
    pair, path = fresh(), tmp_path / "run.pt"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(pair, x, checkpoint=path, callbacks=[Interrupt(how)], **words)
    assert signal.getsignal(signal.SIGINT) is before
    saved = torch.load(path, weights_only=True)["counters"]
    assert (saved["epoch"], saved["batch"]) == (1, 3)
    assert pair.encode(x).shape == (50, 2)
    other = vae_pair()
    fit(other, x, checkpoint=path, **words)
    for p, q in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_interrupt_at_the_end_leaves_the_last_epoch_in_the_file(tmp_path):
    """Then the pair has its best weights, which are not where training would go on."""

    class Late(Callback):
        def on_end(self, state):
            raise KeyboardInterrupt

    x, path = torch.bernoulli(torch.full((40, 8), 0.5)), tmp_path / "run.pt"
    words = {"validation": 1.0 - x, "batch_size": 10, "lr": 0.1, "seed": 1, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        fit(vae_pair(), x, epochs=4, callbacks=[Late()], **words)
    content = torch.load(path, weights_only=True)
    assert content["counters"]["best_epoch"] < 4
    best, last = content["best"], content["pair"]
    assert not torch.equal(best["model.fn.net.0.weight"], last["model.fn.net.0.weight"])


def test_a_resumed_fit_that_fails_goes_back_to_the_same_weights(tmp_path):
    """Killed within epoch 2 and resumed, it still has the weights of epoch 1 to go back to."""
    pair, kept, x = spoilt_pair("x", 99), {}, torch.linspace(0, 1, 40)

    def keep(state):
        kept.update({n: p.detach().clone() for n, p in state.pair.named_parameters()})

    words = {"epochs": 3, "batch_size": 10, "lr": 0.1, "checkpoint": tmp_path / "run.pt"}
    with pytest.raises(KeyboardInterrupt):
        fit(pair, x, callbacks=[keep, Interrupt("raise")], **words)
    pair.model.fn.at = pair.model.fn.runs + 1
    with pytest.raises(NonFiniteLoss, match="epoch 2, batch 4"):
        fit(pair, x, **words)
    assert all(torch.equal(p, kept[n]) for n, p in pair.named_parameters())


def test_an_interrupt_within_a_step_waits_for_its_end():
    """Both parameters have made the same number of steps when the interrupt comes through."""
    pair = spoilt_pair("none", 99)

    class Late(torch.optim.SGD):
        def step(self, closure=None):
            os.kill(os.getpid(), signal.SIGINT)
            super().step(closure)

    start = pair.model.fn.w.item()
    with pytest.raises(KeyboardInterrupt):
        fit(pair, torch.ones(10), epochs=1, optimizer=partial(Late, lr=0.1))
    assert pair.model.fn.w.item() != start
