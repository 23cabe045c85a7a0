"""One sweep leaves the model invariant, at every temperature, in every layout."""

import pytest
import torch
from scipy.stats import chi2

from pyroboost.sampling import (
    binary_states,
    block_gibbs,
    draw_bits,
    exact_samples,
    free_energy,
    gibbs,
)


def machine(num_visible, num_hidden, *, batch=(), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = (*batch, num_visible), (*batch, num_hidden), (*batch, num_visible, num_hidden)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def p_value(visible, parameters, inverse_temperature=1.0):
    """Goodness of fit of visible draws to the enumerated marginal."""
    units = visible.shape[-1]
    scaled = [p.double() * inverse_temperature for p in parameters]
    expected = len(visible) * (-free_energy(binary_states(units).double(), *scaled)).softmax(0)
    numbers = (visible.long() * 2 ** torch.arange(units)).sum(-1)
    counts = torch.bincount(numbers, minlength=2**units).double()
    return chi2.sf(float(((counts - expected) ** 2 / expected).sum()), 2**units - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_have_the_probability_of_their_logits(dtype):
    logits = torch.tensor([-3.0, -0.5, 0.0, 2.0], dtype=dtype).expand(100_001, 4)
    bits = draw_bits(logits)
    assert bits.dtype == dtype
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    probs = logits[0].sigmoid()
    error = (probs * (1 - probs) / len(bits)).sqrt()
    assert ((bits.mean(0) - probs).abs() < 4 * error).all()
    # Neighbours share a 64-bit draw in single precision and must still be independent.
    correlation = torch.corrcoef(bits.T)[~torch.eye(4, dtype=torch.bool)]
    assert (correlation.abs() < 4 / len(bits) ** 0.5).all()


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-24])
def test_saturated_bits_are_certain_whatever_is_drawn(monkeypatch, uniform):
    monkeypatch.setattr(gibbs, "_uniform_like", lambda probs, _: torch.full_like(probs, uniform))
    assert draw_bits(torch.tensor([-200.0, 200.0])).tolist() == [0.0, 1.0]


def test_a_sweep_keeps_exact_samples_exact():
    parameters = machine(4, 3)
    start, _ = exact_samples(*parameters, num_samples=20_000)
    visible, hidden = block_gibbs(start, *parameters, sweeps=1)
    assert p_value(visible, parameters) > 1e-3
    flipped = [parameters[1], parameters[0], parameters[2].mT]
    assert p_value(hidden, flipped) > 1e-3
    assert p_value(visible, parameters, inverse_temperature=1.2) < 1e-9


def test_chains_forget_their_start_at_their_own_temperature():
    parameters = machine(4, 3)
    temperatures = torch.tensor([1.0, 0.3]).repeat_interleave(10_000)
    start = torch.ones(20_000, 4)
    visible, _ = block_gibbs(start, *parameters, sweeps=30, inverse_temperature=temperatures)
    assert p_value(visible[:10_000], parameters) > 1e-3
    assert p_value(visible[10_000:], parameters, inverse_temperature=0.3) > 1e-3
    assert p_value(visible[10_000:], parameters) < 1e-9


def test_batched_machines_run_as_they_would_alone():
    parameters = machine(4, 3, batch=(2, 3))
    start = torch.zeros(10_000, 2, 3, 4)
    visible, hidden = block_gibbs(start, *parameters, sweeps=30)
    assert visible.shape == (10_000, 2, 3, 4)
    assert hidden.shape == (10_000, 2, 3, 3)
    alone = [p[1, 2] for p in parameters]
    assert p_value(visible[:, 1, 2], alone) > 1e-3
    assert p_value(visible[:, 0, 2], alone) < 1e-9


def test_draws_repeat_with_the_generator_and_leave_the_global_state():
    parameters = machine(5, 3, dtype=torch.float64)
    state = torch.get_rng_state()
    draws = [
        block_gibbs(
            torch.zeros(7, 5), *parameters, sweeps=3, generator=torch.Generator().manual_seed(5)
        )
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    assert draws[0][0].dtype == torch.float64


def test_no_sweep_only_draws_the_hidden_layer():
    start = draw_bits(torch.zeros(6, 5))
    visible, hidden = block_gibbs(start, *machine(5, 3), sweeps=0)
    assert torch.equal(visible, start)
    assert hidden.shape == (6, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(5), torch.zeros(3), torch.zeros(5, 3)), "5 visible units"),
        ((torch.zeros(2, 5), torch.zeros(5), torch.zeros(2), torch.zeros(5, 3)), "V and H"),
        ((torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(3, 3), torch.zeros(5, 3)), "broadcast"),
        ((torch.zeros(2, 5), torch.zeros(5), torch.zeros(3), torch.zeros(5)), "give"),
        ((torch.zeros(2, 5), torch.zeros(5).double(), torch.zeros(3), torch.zeros(5, 3)), "share"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        block_gibbs(*arguments)
    with pytest.raises(ValueError, match="sweeps is -1"):
        block_gibbs(torch.zeros(2, 5), *machine(5, 3), sweeps=-1)
