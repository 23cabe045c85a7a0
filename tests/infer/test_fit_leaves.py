"""What a fit leaves as it was: random states, modes, frozen parts, other pairs, the terminal."""

import random
from functools import partial

import pyro
import pytest
import torch
from fit_pairs import Bits, normal_pair, vae_pair
from torch.utils.data import DataLoader, TensorDataset

from pyroboost.infer import fit


def free(name):
    return pyro.param(name).detach()


def numpy_state():
    return pyro.util.get_rng_state()["numpy"][1].tolist()


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
