"""Matching of a density that is known up to its log Z."""

import copy
import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyroboost import flows
from pyroboost.infer import NonFiniteLoss
from pyroboost.infer.callbacks import Callback
from pyroboost.models import FlowMixture
from pyroboost.models._flow_match import _estimate, _Target

DOUBLE = torch.float64
SMALL = partial(flows.realnvp, steps=1, units=8, spread=0.2)


def test_a_density_is_matched_and_its_normaliser_found():
    def log_density(z):
        modes = torch.stack([-(z - m).square().sum(-1) / (2 * 0.5**2) for m in (-1.5, 1.5)], -1)
        return (modes + torch.tensor([0.3, 0.7]).log()).logsumexp(-1)

    mixture = FlowMixture(2, 2, flows.affine)
    found = mixture.match(
        log_density, steps=150, finetune=1, finetune_length=100, lr=0.05, num_samples=4000, seed=0
    )
    truth = math.log(2 * math.pi * 0.5**2)
    assert abs(found.log_partition - truth) < max(5 * found.std_error, 0.02)
    assert sorted(mixture.weights.tolist()) == pytest.approx([0.3, 0.7], abs=0.02)
    assert found.ess > 3000
    assert "log Z" in str(found)


def test_matching_knows_location_and_scale():
    """The estimate is the same wherever the mixture's coordinates lie."""
    mixture = FlowMixture(2, 1, partial(flows.affine, spread=0.0))
    mixture.components.loc.fill_(3.0)
    mixture.components.scale.fill_(0.5)
    law = dist.Normal(torch.full((2,), 3.0), 0.5).to_event(1)
    found = mixture.match(lambda z: law.log_prob(z) + 1.7, steps=1, lr=1e-9, num_samples=50, seed=0)
    assert found.log_partition == pytest.approx(1.7, abs=1e-4)
    assert found.std_error < 1e-4


def test_a_density_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="one number for each point"):
        FlowMixture(2, 1, SMALL).match(lambda z: z, steps=1)


def test_the_power_of_the_density_rises_in_the_first_fit_alone():
    seen = []

    class Seen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(2))  # nobody trains what is matched

        def forward(self, z):
            return -(z - self.loc).square().sum(-1) / 2

    class Look(Callback):
        def on_batch(self, state):
            seen.append(next(m.power for m in state.pair.modules() if hasattr(m, "power")))

    density = Seen()
    mixture = FlowMixture(2, 2, flows.affine)
    mixture.match(
        density, steps=8, finetune=0, annealing=4, lr=0.1, num_samples=50, seed=0,
        callbacks=[Look()],
    )  # fmt: skip
    # the user's callback runs before the power is raised for the next step
    assert seen[:5] == pytest.approx([0.01, 0.2575, 0.505, 0.7525, 1.0])
    assert set(seen[5:]) == {1.0}
    assert density.loc.tolist() == [0.0, 0.0]


def test_an_annealed_density_is_trained_at_its_power_and_judged_at_one():
    target = _Target(lambda z: -z.square().sum(-1), FlowMixture(2, 1, SMALL).components)
    target.power = 0.25
    for training, power in ((True, 0.25), (False, 1.0)):
        target.train(training)
        trace = poutine.trace(
            poutine.condition(target, data={"z": torch.tensor([1.0, 2.0])})
        ).get_trace()
        trace.compute_log_prob()
        assert trace.nodes["log_density"]["log_prob"].item() == pytest.approx(-5.0 * power)


def test_a_match_that_fails_leaves_the_mixture_before_it():
    mixture = FlowMixture(2, 2, SMALL)
    mixture.weights = torch.tensor([0.4, 0.6])
    before = copy.deepcopy(mixture.state_dict())

    def break_off(state):
        raise KeyboardInterrupt

    def log_density(z):
        return -z.square().sum(-1)

    for call, kind in (
        (lambda: mixture.match(lambda z: z, steps=2), ValueError),
        (lambda: mixture.match(log_density, steps=2, callbacks=[break_off]), KeyboardInterrupt),
        (lambda: mixture.match(lambda z: math.nan * z.sum(-1), steps=2), NonFiniteLoss),
        (lambda: mixture.match(log_density, steps=2, num_samples=1), ValueError),
        (lambda: mixture.match(log_density, steps=2, annealing=-1), ValueError),
        (lambda: mixture.match(log_density, steps=2, annealing=1, checkpoints="x"), ValueError),
    ):
        with pytest.raises(kind):
            call()
        after = mixture.state_dict()
        tensors = [name for name, value in before.items() if isinstance(value, torch.Tensor)]
        assert all(torch.equal(after[name], before[name]) for name in tensors)


def test_a_density_that_is_infinite_at_a_draw_gives_no_log_z():
    parts = FlowMixture(2, 1, SMALL).components

    def log_density(z):
        return torch.where(z[..., 0] > 0, math.inf, 0.0)

    with pytest.raises(ValueError, match="log Z has no estimate"):
        _estimate(parts, log_density, 40, None)
