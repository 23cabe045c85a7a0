"""Enumeration against sums over all pairs of layers, its gradient, its samples, its memory."""

import itertools

import pytest
import torch
from scipy.stats import chi2

from pyroboost.sampling import (
    binary_states,
    enumeration,
    exact_log_partition,
    exact_samples,
    free_energy,
)


def machine(num_visible, num_hidden, *, batch=(), scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (*batch, num_visible), (*batch, num_hidden), (*batch, num_visible, num_hidden)
    return [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def brute_force(visible_bias, hidden_bias, weight):
    """All joint log densities of one machine, written out term by term."""
    table = {}
    for v in itertools.product((0.0, 1.0), repeat=len(visible_bias)):
        for h in itertools.product((0.0, 1.0), repeat=len(hidden_bias)):
            tv, th = torch.tensor(v).double(), torch.tensor(h).double()
            table[v, h] = tv @ visible_bias + th @ hidden_bias + tv @ weight @ th
    return table


@pytest.mark.parametrize(("num_visible", "num_hidden"), [(4, 3), (2, 5), (3, 3), (1, 1)])
def test_log_partition_and_its_gradient_are_those_of_the_whole_table(num_visible, num_hidden):
    parameters = [p.requires_grad_() for p in machine(num_visible, num_hidden, scale=2.0)]
    exact = exact_log_partition(*parameters)
    whole = torch.stack(list(brute_force(*parameters).values())).logsumexp(0)
    torch.testing.assert_close(exact, whole)
    ours = torch.autograd.grad(exact, parameters)
    for mine, reference in zip(ours, torch.autograd.grad(whole, parameters), strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("block", [1, 64, 2**22])
def test_blocks_change_neither_the_value_nor_the_gradient(monkeypatch, block):
    parameters = [p.requires_grad_() for p in machine(9, 5, batch=(3,))]
    whole = exact_log_partition(*parameters)
    reference = torch.autograd.grad(whole.sum(), parameters)
    monkeypatch.setattr(enumeration, "_BLOCK", block)
    blocked = exact_log_partition(*parameters)
    torch.testing.assert_close(blocked, whole)
    for mine, theirs in zip(torch.autograd.grad(blocked.sum(), parameters), reference, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_every_entry_of_a_batch_is_a_machine_of_its_own():
    biases, hidden, weight = machine(4, 3, batch=(2, 5))
    together = exact_log_partition(biases, hidden, weight)
    assert together.shape == (2, 5)
    one = exact_log_partition(biases[1, 2], hidden[1, 2], weight[1, 2])
    torch.testing.assert_close(together[1, 2], one)
    shared = exact_log_partition(biases[0, 0], hidden[:, :1], weight[0])
    assert shared.shape == (2, 5)
    alone = exact_log_partition(biases[0, 0], hidden[1, 0], weight[0, 3])
    torch.testing.assert_close(shared[1, 3], alone)


def test_free_energy_agrees_with_scikit_learn():
    from sklearn.neural_network import BernoulliRBM

    visible_bias, hidden_bias, weight = machine(12, 7)
    peer = BernoulliRBM(n_components=7)
    peer.intercept_visible_ = visible_bias.numpy()
    peer.intercept_hidden_ = hidden_bias.numpy()
    peer.components_ = weight.T.numpy()
    visible = torch.bernoulli(torch.full((20, 12), 0.5, dtype=torch.float64))
    ours = free_energy(visible, visible_bias, hidden_bias, weight)
    torch.testing.assert_close(ours, torch.from_numpy(peer._free_energy(visible.numpy())))


def test_free_energy_is_right_where_torch_would_drop_digits():
    # At a logit of 21, torch's softplus returns 21 although the remainder is 7.6e-10.
    energy = free_energy(
        torch.ones(1, 1).double(),
        torch.zeros(1).double(),
        torch.zeros(1).double(),
        torch.full((1, 1), 21.0).double(),
    )
    assert abs(float(energy) + 21.0 + 7.582560422162385e-10) < 1e-13


@pytest.mark.parametrize(("num_visible", "num_hidden"), [(3, 2), (2, 3)])
def test_samples_follow_the_joint_table_and_not_another(num_visible, num_hidden):
    parameters = machine(num_visible, num_hidden)
    visible, hidden = exact_samples(*parameters, num_samples=20_000)
    places = 2 ** torch.arange(num_visible + num_hidden)
    counts = torch.bincount((torch.cat([visible, hidden], -1).long() * places).sum(-1)).double()
    states = binary_states(num_visible + num_hidden).double()
    v, h = states[:, :num_visible], states[:, num_visible:]
    for temperature, fits in ((1.0, True), (1.15, False)):
        b, c, w = (p * temperature for p in parameters)
        log_joint = v @ b + h @ c + ((v @ w) * h).sum(-1)
        expected = 20_000 * log_joint.softmax(0)
        p_value = chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(states) - 1)
        assert (p_value > 1e-3) == fits


def test_batched_samples_repeat_with_the_generator_and_do_not_depend_on_the_table(monkeypatch):
    parameters = machine(6, 3, batch=(4,))
    parameters[0][1] = 50.0
    parameters[2][1] = 0.0
    for table in (2**24, 1):
        monkeypatch.setattr(enumeration, "_TABLE", table)
        draws = exact_samples(*parameters, num_samples=9, generator=torch.manual_seed(1))
        again = exact_samples(*parameters, num_samples=9, generator=torch.manual_seed(1))
        assert [d.shape for d in draws] == [(9, 4, 6), (9, 4, 3)]
        assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
        assert (draws[0][:, 1] == 1).all()
        assert not (draws[0][:, 0] == 1).all()


def test_twenty_units_are_summed_and_twenty_one_refused():
    large = exact_log_partition(torch.zeros(22), torch.zeros(20), torch.zeros(22, 20))
    torch.testing.assert_close(large, 42 * torch.tensor(2.0).log())
    with pytest.raises(ValueError, match=r"layers have 22 and 21 units .* at most 20"):
        exact_log_partition(torch.zeros(22), torch.zeros(21), torch.zeros(22, 21))
