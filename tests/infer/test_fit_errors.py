"""What stops a fit: NaN and infinity by name, Ctrl-C without harm."""

import os
import signal
from functools import partial
from itertools import pairwise

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


@pytest.fixture
def ctrl_c():
    """Let SIGINT raise, as at a terminal: a background job of a shell is started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupt(Callback):
    def __init__(self, how):
        self.how = how

    def on_batch(self, state):
        if (state.epoch, state.batch) == (2, 3):
            if self.how == "raise":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("how", ["raise", "signal"])
def test_ctrl_c_saves_and_the_same_call_ends_as_if_nothing_had_been(how, tmp_path, ctrl_c):
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


def test_an_interrupt_within_a_step_waits_for_its_end(ctrl_c):
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


def test_an_ignored_interrupt_stays_ignored(ctrl_c):
    """As under nohup, where Ctrl-C is somebody else's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pair = vae_pair()
    fit(pair, torch.ones(50, 8), epochs=4, batch_size=10, callbacks=[Interrupt("signal")])
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


# Batches that are left out


class Refusing(Spoilt):
    """A model that goes wrong in some of its gradient-enabled runs, and is whole in the others."""

    def __init__(self, place, runs):
        super().__init__("", 10**9)
        self.bad, self.kind = set(runs), place

    def forward(self, x):
        bad = self.runs + torch.is_grad_enabled() in self.bad
        self.place, self.at = self.kind, 0 if bad else 10**9
        if bad and self.kind in _RAISED:
            self.runs += torch.is_grad_enabled()
            _RAISED[self.kind]()
        super().forward(x)


def wrong():
    raise ValueError("two shapes differ")


_RAISED = {
    "refused": lambda: dist.Normal(0.0, torch.tensor(-1.0), validate_args=True),
    "decomposition": lambda: torch.linalg.cholesky(-torch.eye(2)),
    "program": wrong,
}


def refusing(place, runs=(2, 7)):
    return MetaModel(Refusing(place, runs), Guide(), visible="x", hidden="y")


@pytest.mark.parametrize("place", ["z", "x", "outside", "gradient", "refused", "decomposition"])
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_bad_batches_are_left_out_up_to_the_limit(place):
    data, kept = torch.linspace(0, 1, 40), []

    def keep(state):
        kept.append({n: p.detach().clone() for n, p in state.pair.named_parameters()})

    pair = refusing(place)
    with pyro.validation_enabled(False):
        result = fit(
            pair,
            data,
            epochs=2,
            batch_size=10,
            seed=0,
            max_skipped=2,
            callbacks=[Watched(keep)],
        )
    assert [row["skipped"] for row in result.history] == [1, 2]
    assert [row["num_data"] for row in result.history] == [30, 30]
    assert [row["batches"] for row in result.history] == [4, 4]
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in result.history)
    moved = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(kept)]
    assert moved == [False, True, True, True, True, False, True]  # from batch 1 on


class Watched(Callback):
    def __init__(self, call):
        self.call = call

    def on_batch(self, state):
        self.call(state)


@pytest.mark.parametrize("place", ["x", "gradient", "refused", "decomposition"])
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_one_bad_batch_more_than_the_limit_is_told(place):
    data = torch.linspace(0, 1, 40)
    expected = (NonFiniteLoss, ValueError, torch.linalg.LinAlgError)
    with pyro.validation_enabled(False), pytest.raises(expected):
        fit(refusing(place), data, epochs=2, batch_size=10, lr=0.1, max_skipped=1, clip_norm=1.0)


def test_a_program_that_is_wrong_is_never_left_out():
    with pytest.raises(ValueError, match="two shapes differ"):
        fit(refusing("program"), torch.linspace(0, 1, 40), epochs=2, batch_size=10, max_skipped=9)


def test_a_limit_below_zero_is_refused():
    with pytest.raises(ValueError, match="max_skipped is -1; take 0 or more"):
        fit(vae_pair(), torch.zeros(4, 6), epochs=1, max_skipped=-1)


def test_left_out_batches_change_nothing_for_others():
    """With nothing to leave out, the limit alone changes no number."""
    ends = []
    for limit in (0, 5):
        pair = refusing("x", ())
        with pyro.validation_enabled(False):
            fit(pair, torch.linspace(0, 1, 40), epochs=2, batch_size=10, seed=0, max_skipped=limit)
        ends.append([p.detach().clone() for p in pair.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class Picky(Spoilt):
    """A model that refuses its held-out data, seven rows, the first time."""

    def __init__(self):
        super().__init__("", 10**9)
        self.met = 0

    def forward(self, x):
        self.met += len(x) == 7
        if len(x) == 7 and self.met == 1:
            dist.Normal(0.0, torch.tensor(-1.0), validate_args=True)
        super().forward(x)


def test_a_held_out_bound_that_fails_is_minus_infinity_where_batches_may_be_left_out():
    data, held_out = torch.linspace(0, 1, 40), torch.linspace(0, 1, 7)
    pair = MetaModel(Picky(), Guide(), visible="x", hidden="y")
    result = fit(pair, data, epochs=3, validation=held_out, max_skipped=1)
    bounds = [row["validation_bound"] for row in result.history]
    assert bounds[0] == -float("inf")
    assert result.best_bound == max(bounds[1:])
    pair = MetaModel(Picky(), Guide(), visible="x", hidden="y")
    with pytest.raises(ValueError, match="to satisfy the constraint"):
        fit(pair, data, epochs=3, validation=held_out)
