"""Annealed estimates of log Z against enumeration."""

import pytest
import torch

from pyroboost.sampling import (
    ais,
    annealed_log_partition,
    draw_bits,
    exact_log_partition,
    exact_samples,
    reverse_annealed_log_partition,
)


def machine(num_visible, num_hidden, *, scale=1.0, seed=0, batch=(), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (*batch, num_visible), (*batch, num_hidden), (*batch, num_visible, num_hidden)
    scales = (0.5, 0.5, scale)
    return [
        (k * torch.randn(s, generator=generator)).to(dtype)
        for s, k in zip(shapes, scales, strict=True)
    ]


def deviation(estimate, exact):
    """Error of Z (or of 1/Z, after a reverse run) on the natural scale, in standard errors."""
    sign = 1.0 if estimate.direction == "forward" else -1.0
    return (sign * (estimate.log_partition - exact)).expm1() / estimate.std_error


# Ten machines with weak and ten with strong couplings, of either shape.
CASES = [(0.1 if seed < 10 else 1.5, seed, (11, 6) if seed % 2 else (6, 11)) for seed in range(20)]


@pytest.mark.parametrize("start", ["uniform", "biases"])
@pytest.mark.parametrize(("scale", "seed", "units"), CASES)
def test_forward_and_reverse_estimates_are_within_three_standard_errors(scale, seed, units, start):
    parameters = machine(*units, scale=scale, seed=seed)
    options = {"num_temperatures": 100, "start": start, "generator": torch.manual_seed(seed)}
    exact = exact_log_partition(*parameters)
    forward = annealed_log_partition(*parameters, num_chains=500, **options)
    samples, _ = exact_samples(*parameters, num_samples=500)
    reverse = reverse_annealed_log_partition(*parameters, samples=samples, **options)
    assert abs(deviation(forward, exact)) < 3.0
    assert abs(deviation(reverse, exact)) < 3.0
    assert 1.0 <= forward.ess <= 500.0


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_check_fails_when_chains_run_at_a_wrong_temperature(monkeypatch, direction):
    def too_cold(logits, *, generator=None, out=None):
        return draw_bits(1.3 * logits, generator=generator, out=out)

    parameters = machine(11, 6, scale=1.5)
    samples, _ = exact_samples(*parameters, num_samples=2000)
    monkeypatch.setattr(ais, "draw_bits", too_cold)
    if direction == "forward":
        estimate = annealed_log_partition(*parameters, num_chains=2000, num_temperatures=100)
    else:
        estimate = reverse_annealed_log_partition(
            *parameters, samples=samples, num_temperatures=100
        )
    assert abs(deviation(estimate, exact_log_partition(*parameters))) > 5.0


def test_few_temperatures_underestimate_forward_and_overestimate_in_reverse():
    parameters = machine(11, 6, scale=1.5, batch=(40,))
    exact = exact_log_partition(*parameters)
    coarse = {"num_temperatures": 4}
    forward = annealed_log_partition(*parameters, num_chains=10, **coarse)
    samples, _ = exact_samples(*parameters, num_samples=10)
    reverse = reverse_annealed_log_partition(*parameters, samples=samples, **coarse)
    low, high = forward.log_partition - exact, reverse.log_partition - exact
    assert low.mean() + 2 * low.std() / 40**0.5 < 0.0
    assert high.mean() - 2 * high.std() / 40**0.5 > 0.0


def test_two_temperatures_are_plain_importance_sampling_and_unbiased():
    # E[w] = Z on the natural scale, for the smallest schedule and 4 chains, many times over.
    parameters = [p.unsqueeze(0) for p in machine(4, 3)]
    parameters[0] = parameters[0].expand(20_000, -1)
    estimate = annealed_log_partition(*parameters, num_chains=4, num_temperatures=2)
    ratio = (estimate.log_weights - exact_log_partition(*(p[:1] for p in parameters))).exp()
    error = ratio.std() / ratio.numel() ** 0.5
    assert abs(ratio.mean() - 1.0) < 3 * error < 0.05


def test_batches_schedules_and_states():
    parameters = machine(6, 4, batch=(2, 3))
    exact = exact_log_partition(*parameters)
    schedule = torch.linspace(0, 1, 60) ** 1.5
    estimate = annealed_log_partition(*parameters, num_chains=400, inverse_temperatures=schedule)
    assert estimate.log_partition.shape == estimate.std_error.shape == estimate.ess.shape == (2, 3)
    assert estimate.log_weights.shape == (400, 2, 3)
    assert estimate.visible.shape == (400, 2, 3, 6)
    assert estimate.hidden.shape == (400, 2, 3, 4)
    assert (deviation(estimate, exact).abs() < 3.5).all()


@pytest.mark.parametrize("units", [(8, 4), (4, 8)])
def test_the_last_states_are_samples_of_the_model(units):
    parameters = machine(*units)
    end = annealed_log_partition(*parameters, num_chains=20_000, num_temperatures=50)
    visible, hidden = exact_samples(*parameters, num_samples=20_000)
    moments = end.visible.mT @ end.hidden / 20_000, visible.mT @ hidden / 20_000
    assert (moments[0] - moments[1]).abs().max() < 5 * 0.5 * (2 / 20_000) ** 0.5


def test_a_better_start_is_accepted_and_helps():
    visible_bias, hidden_bias, weight = machine(11, 6, scale=0.05)
    visible_bias = visible_bias - 5.0
    parameters = visible_bias, hidden_bias, weight
    options = {"num_chains": 200, "num_temperatures": 20}
    near = annealed_log_partition(*parameters, start=(visible_bias, torch.zeros(())), **options)
    far = annealed_log_partition(*parameters, start="uniform", **options)
    assert near.std_error < far.std_error
    assert abs(deviation(near, exact_log_partition(*parameters))) < 3.0


def test_estimates_repeat_with_the_generator_and_keep_the_precision():
    parameters = machine(30, 25, dtype=torch.float32)
    options = {"num_chains": 5, "num_temperatures": 9}
    runs = [
        annealed_log_partition(*parameters, **options, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    assert torch.equal(runs[0].log_weights, runs[1].log_weights)
    assert runs[0].log_partition.dtype == torch.float32
    assert not runs[0].log_partition.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_temperatures": 1}, "at least 2"),
        ({"num_chains": 0}, "at least one chain"),
        ({"inverse_temperatures": torch.tensor([0.0, 0.7, 0.5, 1.0])}, "rising"),
        ({"inverse_temperatures": torch.tensor([0.1, 1.0])}, "begin at 0 and end at 1"),
        ({"start": "data"}, "start is not understood"),
        ({"start": (torch.zeros(3), torch.zeros(4))}, "start is not understood"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        annealed_log_partition(*machine(6, 4), **options)


def test_reverse_runs_need_one_sample_per_chain():
    with pytest.raises(ValueError, match=r"one visible state per chain, \(S, 6\)"):
        reverse_annealed_log_partition(*machine(6, 4), samples=torch.zeros(5, 4))
