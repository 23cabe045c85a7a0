"""The RBM distribution: value, gradient, samples and what it refuses."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy.stats import chi2

from pyroboost.distributions import RBM
from pyroboost.sampling import binary_states


def machine(num_visible, num_hidden, *, batch=(), seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (*batch, num_visible), (*batch, num_hidden), (*batch, num_visible, num_hidden)
    return [scale * torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


def joint_table(visible_bias, hidden_bias, weight):
    """Normalised joint probabilities of one machine, (2**V, 2**H), term by term."""
    visible = torch.tensor(list(itertools.product((0, 1), repeat=len(visible_bias)))).double()
    hidden = torch.tensor(list(itertools.product((0, 1), repeat=len(hidden_bias)))).double()
    density = (visible @ visible_bias)[:, None] + hidden @ hidden_bias
    density = density + visible @ weight @ hidden.T
    return visible, hidden, density.flatten().softmax(0).view_as(density)


@pytest.mark.parametrize("units", [(4, 3), (3, 5)])
def test_marginals_conditionals_and_joint_are_those_of_the_table(units):
    parameters = machine(*units)
    rbm = RBM(*parameters)
    visible, hidden, table = joint_table(*parameters)
    torch.testing.assert_close(rbm.log_prob(visible).exp(), table.sum(1))
    torch.testing.assert_close(rbm.T.log_prob(hidden).exp(), table.sum(0))
    pairs = rbm.joint_log_density(visible[:, None], hidden) - rbm.exact_log_partition()
    torch.testing.assert_close(pairs.exp(), table)
    given_visible = rbm.hidden_given(visible[:, None]).log_prob(hidden).exp()
    torch.testing.assert_close(given_visible, table / table.sum(1, keepdim=True))
    given_hidden = rbm.visible_given(hidden).log_prob(visible[:, None]).exp()
    torch.testing.assert_close(given_hidden, table / table.sum(0))
    torch.testing.assert_close(
        rbm.T.joint_log_density(hidden, visible[:, None]),
        rbm.joint_log_density(visible[:, None], hidden),
    )


@pytest.mark.parametrize("mirrored", [False, True])
def test_gradient_with_all_states_as_negatives_is_the_exact_one(mirrored):
    # Each visible state repeated in proportion to its probability is an exact sample.
    parameters = machine(3, 2, scale=0.0)
    parameters = [p.requires_grad_() for p in parameters]
    negatives = binary_states(3).double()
    exact, chained = RBM(*parameters), RBM(*parameters, negatives=negatives)
    data = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]).double()
    if mirrored:
        exact, chained, data = exact.T, chained.T, data[:, :2]
    torch.testing.assert_close(chained.log_prob(data), exact.log_prob(data))
    ours = torch.autograd.grad(chained.log_prob(data).sum(), parameters)
    reference = torch.autograd.grad(exact.log_prob(data).sum(), parameters)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("mirrored", [False, True])
def test_gradient_with_sampled_negatives_is_exact_in_expectation(mirrored):
    parameters = [p.requires_grad_() for p in machine(4, 3)]
    negatives = RBM(*parameters).sample((100_000,))
    chained = RBM(*parameters, negatives=negatives, log_partition=7.0)
    data = torch.tensor([[1.0, 1.0, 0.0, 1.0]]).double()
    exact = RBM(*parameters)
    if mirrored:
        exact, chained, data = exact.T, chained.T, data[:, :3]
    value = chained.log_prob(data)
    torch.testing.assert_close(value + 7.0, -chained.free_energy(data))
    ours = torch.autograd.grad(value.sum(), parameters)
    reference = torch.autograd.grad(exact.log_prob(data).sum(), parameters)
    for mine, theirs in zip(ours, reference, strict=True):
        assert (mine - theirs).abs().max() < 5 * 0.5 / 100_000**0.5


def test_exact_gradient_is_the_difference_of_moments():
    parameters = [p.requires_grad_() for p in machine(4, 3)]
    visible, hidden, table = joint_table(*(p.detach() for p in parameters))
    data = visible[[3, 7, 9]]
    gradients = torch.autograd.grad(RBM(*parameters).log_prob(data).sum(), parameters)
    mean_hidden = (data @ parameters[2] + parameters[1]).sigmoid().detach()
    expected = (
        data.sum(0) - 3 * table.sum(1) @ visible,
        mean_hidden.sum(0) - 3 * table.sum(0) @ hidden,
        data.T @ mean_hidden - 3 * visible.T @ table @ hidden,
    )
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_parameters_with_batch_dimensions_are_machines_of_their_own():
    parameters = machine(4, 3, batch=(5, 2))
    rbm = RBM(*parameters)
    assert (rbm.batch_shape, rbm.event_shape) == ((5, 2), (4,))
    value = rbm.sample((7,))
    assert value.shape == (7, 5, 2, 4) == rbm.shape((7,))
    log_prob = rbm.log_prob(value)
    assert log_prob.shape == (7, 5, 2)
    alone = RBM(*(p[3, 1] for p in parameters))
    torch.testing.assert_close(log_prob[:, 3, 1], alone.log_prob(value[:, 3, 1]))
    torch.testing.assert_close(
        rbm.T.log_prob(torch.ones(3).double())[3, 1], alone.T.log_prob(torch.ones(3).double())
    )
    hidden = rbm.hidden_given(value)
    assert (hidden.batch_shape, hidden.event_shape) == ((7, 5, 2), (3,))
    assert rbm.gibbs(value, 2).shape == value.shape


def test_batched_gradients_use_each_machines_own_negatives():
    parameters = [p.requires_grad_() for p in machine(4, 3, batch=(5,))]
    negatives = RBM(*parameters).sample((50_000,))
    value = torch.ones(5, 4).double()
    batched = RBM(*parameters, negatives=negatives).log_prob(value)
    exact = RBM(*parameters).log_prob(value)
    torch.testing.assert_close(batched, exact)
    ours = torch.autograd.grad(batched.sum(), parameters)
    reference = torch.autograd.grad(exact.sum(), parameters)
    for mine, theirs in zip(ours, reference, strict=True):
        assert (mine - theirs).abs().max() < 5 * 0.5 / 50_000**0.5
    with pytest.raises(ValueError, match=r"negatives have shape \(9, 4\).*\(S, 5, 4\)"):
        RBM(*parameters, negatives=torch.zeros(9, 4))


@pytest.mark.parametrize("units", [(5, 3), (3, 5)])
def test_samples_fit_the_density_and_not_a_wrong_one(units):
    parameters = machine(*units)
    rbm = RBM(*parameters)
    draws = rbm.sample((20_000,))
    states = binary_states(units[0]).double()
    counts = torch.bincount(
        (draws.long() * 2 ** torch.arange(units[0])).sum(-1), minlength=len(states)
    )
    for density, fits in ((rbm, True), (RBM(*(1.2 * p for p in parameters)), False)):
        expected = 20_000 * density.log_prob(states).exp()
        assert float(expected.sum()) == pytest.approx(20_000)
        p_value = chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(states) - 1)
        assert (p_value > 1e-3) == fits


def test_large_machines_say_how_they_sample_and_do_it():
    visible_bias, hidden_bias, weight = machine(30, 25, scale=0.3)
    rbm = RBM(visible_bias, hidden_bias, weight, sweeps=40)
    assert rbm.sampling == "40 Gibbs sweeps"
    assert "sampling=40 Gibbs sweeps" in repr(rbm)
    assert RBM(*machine(30, 20)).sampling == "exact"
    # A machine of independent parts is large and has known moments: p(v) is a product.
    weight = torch.zeros_like(weight)
    weight[0, 0] = 3.0
    draws = RBM(visible_bias, hidden_bias, weight, sweeps=5).sample((20_000,))
    pair = RBM(visible_bias[:1], hidden_bias[:1], weight[:1, :1]).log_prob(torch.ones(1).double())
    assert abs(draws[:, 0].mean() - pair.exp()) < 4 * 0.5 / 20_000**0.5
    assert abs(draws[:, 1].mean() - visible_bias[1].sigmoid()) < 4 * 0.5 / 20_000**0.5


@pytest.mark.parametrize("units", [(6, 3), (24, 22)])
def test_samples_repeat_with_the_generator(units):
    rbm = RBM(*machine(*units, scale=0.3), sweeps=3).expand([2])
    one, two, other = (
        rbm.sample((4,), generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert one.shape == (4, 2, units[0])
    assert rbm.sample((0,)).shape == (0, 2, units[0])
    assert not torch.equal(one, other)


def test_expansion_repeats_the_machine_without_copying_it():
    parameters = machine(4, 3)
    rbm = RBM(*parameters)
    many = rbm.expand([6, 5])
    assert many.weight is rbm.weight
    value = many.sample()
    assert value.shape == (6, 5, 4)
    torch.testing.assert_close(many.log_prob(value), rbm.log_prob(value))
    one = torch.ones(4).double()
    assert many.log_prob(one).shape == (6, 5)
    assert many.T.event_shape == (3,)
    assert many.T.batch_shape == (6, 5)
    column = RBM(*machine(4, 3, batch=(6, 1))).expand([6, 5])
    draws = column.sample((2,))
    assert draws.shape == (2, 6, 5, 4)
    assert not torch.equal(draws[..., 0, :], draws[..., 1, :])
    with pytest.raises(ValueError, match="does not expand"):
        many.expand([5])


def test_support_is_enumerated_where_it_is_small():
    rbm = RBM(*machine(4, 3, batch=(2,)))
    assert rbm.has_enumerate_support
    support = rbm.enumerate_support()
    assert support.shape == (16, 2, 4)
    torch.testing.assert_close(rbm.log_prob(support).exp().sum(0), torch.ones(2).double())
    assert rbm.enumerate_support(expand=False).shape == (16, 1, 4)
    assert rbm.support.check(support).all()
    large = RBM(*machine(21, 3))
    assert not large.has_enumerate_support
    with pytest.raises(NotImplementedError, match="21 visible units"):
        large.enumerate_support()


def test_an_unknown_log_partition_is_refused_and_a_stored_one_used():
    parameters = machine(30, 25)
    value = torch.zeros(2, 30).double()
    with pytest.raises(ValueError, match="annealed_log_partition"):
        RBM(*parameters).log_prob(value)
    energy = RBM(*parameters).free_energy(value)
    for stored in (3.0, torch.tensor(3.0), lambda: torch.tensor(3.0)):
        rbm = RBM(*parameters, log_partition=stored)
        torch.testing.assert_close(rbm.log_prob(value), -energy - 3.0)
        torch.testing.assert_close(rbm.T.log_partition, torch.tensor(3.0).double())
    learning = [p.requires_grad_() for p in parameters]
    with pytest.raises(ValueError, match="negatives="):
        RBM(*learning, log_partition=3.0).log_prob(value)
    with torch.no_grad():
        torch.testing.assert_close(RBM(*learning, log_partition=3.0).log_prob(value), -energy - 3.0)


@pytest.mark.parametrize("bad", [0.5, -1.0, 2.0, float("nan")])
@pytest.mark.parametrize("method", ["log_prob", "free_energy", "hidden_given", "gibbs"])
def test_values_other_than_bits_are_refused(bad, method):
    with pytest.raises(ValueError, match=f"RBM.{method}: .* other than 0 and 1"):
        getattr(RBM(*machine(4, 3)), method)(torch.full((2, 4), bad))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 3), "the 4 units"), ((), "the 4 units"), ((3, 4), "broadcasts with")],
)
def test_values_of_another_shape_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        RBM(*machine(4, 3, batch=(2,))).log_prob(torch.zeros(shape))


def test_parameters_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="numbers of units, V and H"):
        RBM(torch.zeros(4), torch.zeros(3), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="at least one Gibbs sweep"):
        RBM(*machine(4, 3), sweeps=0)
    with pytest.raises(ValueError, match="visible_bias"):
        RBM(torch.full((4,), float("nan")), torch.zeros(3), torch.zeros(4, 3))


def test_bits_of_any_type_have_the_same_density():
    rbm = RBM(*machine(4, 3, dtype=torch.float32))
    bits = torch.tensor([[True, False, True, True]])
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float64):
        assert rbm.log_prob(bits.to(dtype)).dtype == torch.float32
        torch.testing.assert_close(rbm.log_prob(bits.to(dtype)), rbm.log_prob(bits.float()))


def test_it_serves_as_a_prior_in_pyro_inside_plates_and_particles():
    parameters = [p.requires_grad_() for p in machine(4, 3, dtype=torch.float32)]
    data = torch.bernoulli(torch.full((6, 4), 0.5))

    def model(x):
        rbm = RBM(*parameters)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", rbm.T)
            pyro.sample("x", rbm.visible_given(h), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", RBM(*parameters).hidden_given(x))

    exact = -RBM(*parameters).log_prob(data).sum().detach()
    for elbo in (
        Trace_ELBO(),
        Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1),
    ):
        loss = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), elbo).evaluate_loss(data)
        assert loss == pytest.approx(float(exact), rel=1e-5)


def test_masked_and_independent_versions_work():
    rbm = RBM(*machine(4, 3, batch=(2,)))
    value = rbm.sample()
    assert rbm.to_event(1).log_prob(value).shape == ()
    masked = rbm.mask(torch.tensor([True, False])).log_prob(value)
    assert masked[1] == 0.0
    assert isinstance(rbm.hidden_given(value), dist.Independent)
