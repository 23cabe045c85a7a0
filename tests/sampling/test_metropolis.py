"""Chains leave the law that they are told to leave, seen against enumeration and quadrature."""

import math

import pytest
import torch
from scipy.stats import chi2, kstest, norm

from pyroboost.sampling import binary_states
from pyroboost.sampling.metropolis import flip_gibbs, independence_metropolis, random_walk


def states_of(bits):
    """The number of each row of bits, unit 0 being the lowest digit."""
    return (bits * 2 ** torch.arange(bits.shape[-1])).sum(-1).long()


def fits(states, probabilities):
    """The p-value of independent draws of states under a law."""
    counts = torch.bincount(states, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(states)
    return chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1)


@pytest.fixture
def law():
    """A law of three bits, with couplings, as (log density of rows, probabilities)."""
    table = torch.tensor([0.5, -1.0, 0.2, 1.5, -0.3, 0.8, -1.2, 0.1])
    return lambda x: table[states_of(x)][None], table.softmax(0)


def test_independence_chains_leave_the_target_and_no_other_law(law):
    """Each of 4,000 chains gives one draw, so that the draws are independent."""
    _, target = law
    proposal = torch.tensor([0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    drawn = torch.multinomial(proposal, 60 * 4000, replacement=True).reshape(60, 4000)
    rows, accepted = independence_metropolis((target.log() - proposal.log())[drawn])
    last = drawn.gather(0, rows)[-1]
    assert fits(last, target) > 1e-3
    assert fits(last, proposal) < 1e-9
    assert fits(last, target.flip(0)) < 1e-9
    assert 0.3 < accepted < 0.95


def test_every_step_of_the_scan_is_the_textbook_rule():
    table, generator = torch.randn(30, 5).double(), torch.Generator().manual_seed(2)
    rows, accepted = independence_metropolis(table, generator=generator)
    uniform = torch.empty_like(table).uniform_(generator=generator.manual_seed(2))
    moves = 0
    for chain in range(5):
        at = 0
        for time in range(1, 30):
            if uniform[time, chain] < (table[time, chain] - table[at, chain]).exp():
                at, moves = time, moves + 1
            assert rows[time, chain] == at
    assert accepted == pytest.approx(moves / (29 * 5))


def test_chains_leave_places_without_density_and_refuse_what_is_no_number():
    table = torch.tensor([[-math.inf, 0.0], [-math.inf, -math.inf], [1.0, -math.inf]])
    rows, _ = independence_metropolis(table)
    assert rows.tolist() == [[0, 0], [0, 0], [2, 0]]
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or plus infinity"):
            independence_metropolis(torch.tensor([[0.0], [bad]]))
    with pytest.raises(ValueError, match="one row per proposal"):
        independence_metropolis(torch.zeros(3))


def test_old_estimates_are_kept():
    """With unbiased estimates of very different noise, only chains that keep them are right."""
    target = torch.tensor([0.1, 0.2, 0.3, 0.4])
    spread = torch.tensor([1.0, 20.0, 1.0, 20.0])  # states 1 and 3 are estimated badly
    drawn = torch.randint(4, (300, 4000))
    chance = 1.0 / spread[drawn]
    noise = torch.where(torch.rand(drawn.shape) < chance, spread[drawn], 1e-30)
    table = (target[drawn] * noise).log()
    rows, _ = independence_metropolis(table)
    assert fits(drawn.gather(0, rows)[-1], target) > 1e-3

    at = drawn[0]  # the same chains, but the estimate of the present state is made anew
    for time in range(1, 300):
        again = torch.where(torch.rand(4000) < 1 / spread[at], spread[at], 1e-30)
        ratio = table[time] - (target[at] * again).log()
        at = torch.where(torch.rand(4000).log() < ratio, drawn[time], at)
    assert fits(at, target) < 1e-9


@pytest.mark.parametrize("block", [1, 2, 3])
def test_gibbs_draws_blocks_of_bits_from_their_conditionals(law, block):
    density, target = law
    start = torch.zeros(6000, 3)
    walk = flip_gibbs(start, density, torch.ones(1), sweeps=12, block=block)
    assert fits(states_of(walk.state), target) > 1e-3
    assert fits(states_of(walk.state), target.flip(0)) < 1e-9
    torch.testing.assert_close(walk.terms, density(walk.state))
    assert torch.equal(start, torch.zeros(6000, 3))


def test_a_block_of_all_bits_is_an_exact_draw(law):
    density, target = law
    walk = flip_gibbs(torch.ones(6000, 3), density, torch.ones(1), block=3)
    assert fits(states_of(walk.state), target) > 1e-3


def test_gibbs_weighs_terms_and_draws_only_the_sites_asked_for(law):
    density, target = law
    two = lambda x: torch.cat([density(x), x.sum(-1)[None]])  # noqa: E731
    powers = torch.tensor([0.5, -1.0])
    tilted = (0.5 * target.log() - binary_states(3).sum(-1)).softmax(0)
    walk = flip_gibbs(torch.zeros(6000, 3), two, powers, sweeps=12)
    assert fits(states_of(walk.state), tilted) > 1e-3
    walk = flip_gibbs(torch.zeros(50, 1, 3), lambda x: x.sum((1, 2))[None], torch.ones(1),
                      sites=torch.tensor([1]), sweeps=3)  # fmt: skip
    assert walk.state.shape == (50, 1, 3)
    assert walk.state[..., [0, 2]].sum() == 0
    assert walk.state[..., 1].sum() > 0


def test_gibbs_keeps_the_terms_with_which_a_state_was_entered():
    """Terms that are drawn anew at each call: those of bits that stay must not change."""
    terms = lambda x: torch.randn(1, len(x)) - 1e6 * x.sum(-1)  # noqa: E731
    current = torch.full((1, 20), 3.0)
    walk = flip_gibbs(torch.zeros(20, 2), terms, torch.ones(1), current=current, sweeps=2)
    assert torch.equal(walk.terms, current)
    assert walk.accepted == 0.0


@pytest.mark.parametrize("options", [{"sweeps": -1}, {"block": 0}, {"block": 13}])
def test_gibbs_refuses_options_without_meaning(law, options):
    with pytest.raises(ValueError, match="flip_gibbs"):
        flip_gibbs(torch.zeros(2, 3), law[0], torch.ones(1), **options)


def test_random_walks_reach_a_normal_law():
    terms = lambda x: -0.5 * (x[:, 0] - 1.0).square()[None]  # noqa: E731
    walk = random_walk(torch.zeros(3000, 1), terms, torch.tensor([4.0]), scale=0.8, steps=60)
    assert kstest(walk.state[:, 0].numpy(), norm(1.0, 0.5).cdf).pvalue > 1e-3
    assert kstest(walk.state[:, 0].numpy(), norm(1.0, 1.0).cdf).pvalue < 1e-9
    torch.testing.assert_close(walk.terms, terms(walk.state))
    assert 0.3 < walk.accepted < 0.8
