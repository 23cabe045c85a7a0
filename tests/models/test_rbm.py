"""The RBM meta-model: gradients by enumeration, chains, log Z and what it refuses."""

import copy

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO

from pyroboost.models.rbm import RBM
from pyroboost.sampling import binary_states, exact_log_partition


def strong(num_visible=5, num_hidden=3, *, seed=0, dtype=torch.float64, **options):
    """An RBM with couplings that matter and, in double precision, no rounding to speak of."""
    rbm = RBM(num_visible, num_hidden, **options).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (rbm.visible_bias, rbm.hidden_bias, rbm.weight):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return rbm


def parameters(rbm):
    return [rbm.visible_bias, rbm.hidden_bias, rbm.weight]


def bits(*shape, seed=1):
    return torch.bernoulli(
        torch.full(shape, 0.5).double(), generator=torch.Generator().manual_seed(seed)
    )


def likelihood_gradient(rbm, data):
    """Hand-written gradient of the summed log likelihood: data moments minus model moments."""
    b, c, w = (p.detach() for p in parameters(rbm))
    states = binary_states(rbm.num_visible).double()
    hidden = torch.sigmoid(states @ w + c)
    log_marginal = states @ b + torch.log1p((states @ w + c).exp()).sum(-1)
    probs = log_marginal.softmax(0)
    mean = torch.sigmoid(data @ w + c)
    return (
        data.sum(0) - len(data) * probs @ states,
        mean.sum(0) - len(data) * probs @ hidden,
        data.T @ mean - len(data) * (probs[:, None] * states).T @ hidden,
    )


def loss_gradient(rbm, data, elbo=None):
    loss = (elbo or Trace_ELBO(max_plate_nesting=1)).differentiable_loss(rbm.model, rbm.guide, data)
    return torch.autograd.grad(loss, parameters(rbm))


def model_chains(rbm, count):
    """Set the persistent chains to exact hidden samples of the present model."""
    with torch.no_grad():
        rbm._machine.chains = rbm.distribution().T.sample((count,))


# The expected gradient


def test_elbo_gradient_with_the_exact_negative_phase_is_the_likelihoods_by_enumeration():
    # The positive phase still draws h: its expectation is taken over all hidden states.
    rbm = strong(negative_phase="exact")
    data = bits(4, 5)
    total = [torch.zeros_like(p) for p in parameters(rbm)]
    states = binary_states(3).double()
    posterior = torch.distributions.Bernoulli(logits=data @ rbm.weight + rbm.hidden_bias)
    for state in states:
        h = state.expand(4, -1)
        weights = posterior.log_prob(h).sum(-1).exp().detach()
        clamped = pyro.condition(rbm.model, data={"h": h})
        for n in range(4):
            model = pyro.poutine.trace(clamped).get_trace(data)
            model.compute_log_prob()
            log_joint = model.nodes["h"]["log_prob"][n] + model.nodes["x"]["log_prob"][n]
            for t, g in zip(total, torch.autograd.grad(log_joint, parameters(rbm)), strict=True):
                t += weights[n] * g
    for mine, expected in zip(total, likelihood_gradient(rbm, data), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("phase", ["pcd", "exact"])
def test_plain_svi_is_persistent_contrastive_divergence_in_expectation(phase):
    rbm = strong(negative_phase=phase)
    data = bits(6, 5)
    rows = data.repeat(5000, 1)
    if phase == "pcd":
        model_chains(rbm, 200_000)
    gradient = [-g / 5000 for g in loss_gradient(rbm, rows)]
    exact = likelihood_gradient(rbm, data)
    assert max(float(g.abs().max()) for g in exact) > 1.0
    for mine, expected in zip(gradient, exact, strict=True):
        # Six rows, each averaged over 5,000 draws of a bit; the chains' error is a tenth of that.
        assert (mine - expected).abs().max() < 5 * 0.5 * (6 / 5000) ** 0.5


@pytest.mark.parametrize("phase", ["pcd", "cd", "exact"])
def test_the_own_objective_has_the_same_expected_gradient_and_value_as_the_elbo(phase):
    rbm = strong(negative_phase=phase)
    data = bits(6, 5)
    rows = data.repeat(5000, 1)
    if phase == "pcd":
        model_chains(rbm, 50_000)
    objective = rbm.objective()(rbm.model, rbm.guide, rows)
    ours = torch.autograd.grad(objective, parameters(rbm))
    theirs = loss_gradient(rbm, rows)
    for mine, other in zip(ours, theirs, strict=True):
        assert ((mine - other).abs().max() / 5000) < 0.2
    value = Trace_ELBO().differentiable_loss(rbm.model, rbm.guide, rows)
    torch.testing.assert_close(objective.detach(), value.detach())


def test_contrastive_divergence_starts_at_the_data():
    # Far apart modes: chains from the data stay in its mode, chains of the model do not.
    rbm = RBM(4, 1, negative_phase="cd").double()
    with torch.no_grad():
        rbm.weight.fill_(40.0)
        rbm.hidden_bias.fill_(-80.0)
        rbm.visible_bias.fill_(-20.0)
    for loss in (rbm.objective(), Trace_ELBO(max_plate_nesting=1).differentiable_loss):
        for data in (torch.ones(3, 4), torch.zeros(3, 4)):
            gradient = torch.autograd.grad(loss(rbm.model, rbm.guide, data), parameters(rbm))
            assert all(g.abs().max() < 1e-6 for g in gradient)


def test_longer_contrastive_divergence_approaches_the_likelihood_gradient():
    data = bits(3, 5).repeat(3000, 1)
    distance = []
    for sweeps in (1, 30):
        rbm = strong(negative_phase="cd", sweeps=sweeps)
        with torch.no_grad():
            rbm.weight.mul_(2.0)
        gradient = loss_gradient(rbm, data)
        exact = likelihood_gradient(rbm, data)
        pairs = zip(gradient, exact, strict=True)
        distance.append(max(float((g + e).abs().max()) / len(data) for g, e in pairs))
    assert distance[1] < 0.05 < distance[0]


@pytest.mark.parametrize("phase", ["pcd", "exact"])
def test_training_by_plain_svi_raises_the_exact_likelihood(phase):
    truth = strong(6, 3, dtype=torch.float32)
    truth.refresh()
    data = truth.sample(1000)
    best = truth.log_marginal(data).mean
    rbm = RBM(6, 3, negative_phase=phase, num_chains=500)
    rbm.refresh()
    assert rbm.log_marginal(data).mean < best - 0.5
    svi = SVI(rbm.model, rbm.guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(400):
        svi.step(data)
    rbm.refresh()
    assert rbm.log_marginal(data).mean > best - 0.05


# The exact guide


@pytest.mark.parametrize("units", [(5, 3), (3, 5)])
def test_every_importance_weight_is_the_likelihood(units):
    rbm = strong(*units)
    rbm.refresh()
    data = bits(7, units[0])
    with torch.no_grad():
        for _ in range(3):
            guide = pyro.poutine.trace(rbm.guide).get_trace(data)
            model = pyro.poutine.trace(pyro.poutine.replay(rbm.model, trace=guide)).get_trace(data)
            guide.compute_log_prob()
            model.compute_log_prob()
            log_weight = (
                model.nodes["h"]["log_prob"]
                + model.nodes["x"]["log_prob"]
                - guide.nodes["h"]["log_prob"]
            )
            torch.testing.assert_close(log_weight, rbm.log_marginal(data).value)


def test_likelihoods_sum_to_one_and_agree_with_scikit_learn():
    from sklearn.neural_network import BernoulliRBM

    rbm = strong()
    rbm.refresh()
    states = binary_states(5).double()
    likelihood = rbm.log_marginal(states)
    assert likelihood.kind == "exact"
    assert likelihood.std_error is None
    torch.testing.assert_close(likelihood.value.exp().sum(), torch.tensor(1.0).double())
    prior = rbm.log_prior(binary_states(3).double())
    torch.testing.assert_close(prior.value.exp().sum(), torch.tensor(1.0).double())
    peer = BernoulliRBM(n_components=3)
    peer.intercept_visible_ = rbm.visible_bias.detach().numpy()
    peer.intercept_hidden_ = rbm.hidden_bias.detach().numpy()
    peer.components_ = rbm.weight.detach().T.numpy()
    energies = torch.from_numpy(peer._free_energy(states.numpy()))
    torch.testing.assert_close(likelihood.value, -energies - rbm.log_partition)


def test_guide_is_detached_and_recognition_is_not():
    rbm = strong()
    data = bits(4, 5)
    for program, attached in ((rbm.guide, False), (rbm.recognition, True)):
        trace = pyro.poutine.trace(program).get_trace(data)
        trace.compute_log_prob()
        assert trace.nodes["h"]["log_prob"].requires_grad == attached
        own = rbm.distribution().hidden_given(data).log_prob(trace.nodes["h"]["value"])
        torch.testing.assert_close(trace.nodes["h"]["log_prob"], own)


def test_recognition_has_a_baseline_that_follows_the_cost_through_batches_of_any_size():
    rbm = strong()
    rbm.refresh()
    svi = SVI(rbm.model, rbm.recognition, pyro.optim.SGD({"lr": 0.0}), TraceGraph_ELBO())
    data = bits(4, 5)
    svi.step(data)
    baseline = rbm._machine.baseline
    torch.testing.assert_close(baseline, rbm.log_marginal(data).value.mean())
    before = baseline.clone()
    svi.step(data[:1])
    expected = torch.lerp(before, rbm.log_marginal(data[:1]).value[0], 0.1)
    torch.testing.assert_close(rbm._machine.baseline, expected)
    assert "baseline" not in "".join(pyro.get_param_store())


def test_the_marginal_program_scores_x_alone():
    rbm = strong()
    rbm.refresh()
    data = bits(4, 5)
    with torch.no_grad():
        trace = pyro.poutine.trace(rbm.marginal).get_trace(data)
        torch.testing.assert_close(trace.log_prob_sum(), rbm.log_marginal(data).value.sum())
    assert "h" not in trace.nodes


# Chains


def test_chains_advance_once_in_each_execution_that_records_gradients():
    rbm = strong(12, 8, num_chains=50)
    data = bits(4, 12)
    assert rbm.chains.shape == (50, 8)

    def moved(action):
        before = rbm.chains.clone()
        action()
        return not torch.equal(before, rbm.chains)

    assert moved(lambda: rbm.model(data))
    rbm.refresh()
    with torch.no_grad():
        assert not moved(lambda: rbm.model(data))
        assert not moved(lambda: rbm.log_marginal(data))
    assert not moved(lambda: rbm.guide(data))
    assert not moved(lambda: rbm.encode(data))
    assert not moved(lambda: rbm.sample(3))
    assert not moved(lambda: rbm.named_trainable(data))
    rbm.eval()
    assert not moved(lambda: rbm.model(data))
    rbm.train().requires_grad_(False)
    assert not moved(lambda: rbm.model(data))


def test_one_execution_is_the_set_number_of_sweeps():
    from pyroboost.sampling import block_gibbs

    rbm = strong(12, 8, num_chains=9, sweeps=3)
    start, state = rbm.chains.clone(), torch.get_rng_state()
    rbm._machine.law()
    torch.set_rng_state(state)
    b, c, w = (p.detach() for p in parameters(rbm))
    expected, _ = block_gibbs(start, c, b, w.mT, sweeps=3)
    assert torch.equal(rbm.chains, expected)


def test_chains_and_log_partition_are_part_of_the_state():
    rbm = strong()
    rbm.refresh()
    rbm.model(bits(4, 5))
    other = strong(seed=3)
    other.load_state_dict(rbm.state_dict())
    assert torch.equal(other.chains, rbm.chains)
    assert other.is_fresh
    data = bits(4, 5)
    torch.testing.assert_close(other.log_marginal(data).value, rbm.log_marginal(data).value)


def test_a_deepcopy_trains_alone_and_keeps_its_densities():
    rbm = strong(dtype=torch.float32)
    rbm.refresh()
    data = bits(8, 5).float()
    twin = copy.deepcopy(rbm)
    kept = rbm.log_marginal(data).value
    torch.testing.assert_close(twin.log_marginal(data).value, kept)
    chains = rbm.chains.clone()
    svi = SVI(twin.model, twin.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(data)
    assert not torch.equal(twin.weight, rbm.weight)
    assert torch.equal(rbm.chains, chains)
    torch.testing.assert_close(rbm.log_marginal(data).value, kept)
    torch.testing.assert_close(rbm.double().log_marginal(data.double()).value.float(), kept)


# log Z


def test_a_stale_likelihood_is_refused_until_refreshed():
    rbm = strong()
    data = bits(3, 5)

    def elbo():
        with torch.no_grad():
            return Trace_ELBO().loss(rbm.model, rbm.guide, data)

    for ask in (lambda: rbm.log_marginal(data), lambda: rbm.log_prior(bits(3, 3)), elbo):
        with pytest.raises(ValueError, match=r"log Z is unknown .* call .refresh\(\)"):
            ask()
    rbm.refresh()
    assert rbm.log_partition_method == "exact"
    torch.testing.assert_close(rbm.log_partition, exact_log_partition(*parameters(rbm)).detach())
    elbo()
    with torch.no_grad():
        rbm.weight[0, 0] += 1e-3
    for ask in (lambda: rbm.log_marginal(data), elbo):
        with pytest.raises(ValueError, match=r"log Z is out of date .* call .refresh\(\)"):
            ask()
    rbm.refresh()
    assert rbm.is_fresh


def test_training_works_on_a_stale_log_partition():
    rbm = strong(24, 22)
    value = Trace_ELBO(max_plate_nesting=1).differentiable_loss(rbm.model, rbm.guide, bits(3, 24))
    value.backward()
    assert all(p.grad is not None for p in parameters(rbm))


def test_large_machines_are_estimated_with_their_error():
    # Two independent halves of 21 by 11 units: log Z by exact sums, estimated as one machine.
    torch.manual_seed(0)
    rbm = RBM(42, 22).double()
    with torch.no_grad():
        rbm.weight.zero_()
        rbm.weight[:21, :11] = torch.randn(21, 11)
        rbm.weight[21:, 11:] = torch.randn(21, 11)
        rbm.visible_bias.normal_()
    b, c, w = (p.detach() for p in parameters(rbm))
    exact = exact_log_partition(b[:21], c[:11], w[:21, :11])
    exact = exact + exact_log_partition(b[21:], c[11:], w[21:, 11:])
    state = torch.get_rng_state()
    rbm.refresh(num_chains=300, num_temperatures=400, generator=torch.manual_seed(4))
    torch.set_rng_state(state)
    assert rbm.log_partition_method == "AIS, 300 chains"
    assert 0.0 < rbm.log_partition_error < 0.2
    assert abs((rbm.log_partition - exact).expm1()) < 3 * rbm.log_partition_error
    likelihood = rbm.log_marginal(bits(5, 42))
    assert likelihood.kind == "estimate"
    assert likelihood.shared_error == rbm.log_partition_error
    assert likelihood.num_samples == 300
    assert likelihood.std_error.shape == likelihood.ess.shape == (5,)


def test_refreshing_leaves_the_random_state_and_a_fresh_value_alone():
    rbm = strong(24, 22)
    state = torch.get_rng_state()
    rbm.refresh(num_chains=5, num_temperatures=20)
    kept = rbm.log_partition.clone()
    rbm.refresh()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(rbm.log_partition, kept)


# The start from the RBM below


@pytest.mark.parametrize("units", [(5, 3), (24, 22)])
def test_the_transposed_rbm_below_gives_a_term_of_exactly_zero(units):
    below = strong(*units, dtype=torch.float32)
    below.refresh(num_chains=20, num_temperatures=50)
    above = RBM.transposed(below, visible="h", hidden="g", num_chains=7)
    h = below.encode(bits(30, units[0]).float())
    above.refresh()
    for rows in (1, 3, 30):  # products of few rows round by the memory order of the couplings
        assert torch.equal(above.log_marginal(h[:rows]).value, below.log_prior(h[:rows]).value)
    assert above.log_partition_method == below.log_partition_method
    assert above.chains.shape == (7, units[0])
    assert (above.num_visible, above.num_hidden) == units[::-1]
    guide = pyro.poutine.trace(above.guide).get_trace(h)
    with torch.no_grad():
        loss = Trace_ELBO().loss(above.model, above.guide, h)
    assert loss == pytest.approx(-float(below.log_prior(h).value.sum()), rel=1e-5)
    assert set(guide.nodes) >= {"g"}
    with torch.no_grad():
        above.weight.add_(1.0)
    assert not torch.equal(above.weight.mT, below.weight)


def test_a_start_of_unknown_log_partition_is_refreshed_and_carried_over():
    below = strong()
    above = RBM(3, 5, start=below)
    assert below.is_fresh
    assert above.is_fresh
    with pytest.raises(ValueError, match=r"use RBM.transposed\(below\)"):
        RBM(5, 3, start=below)


# Data and settings


def test_visible_biases_start_at_the_data():
    rbm = RBM(3, 2)
    data = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    rbm.init_visible_bias(data)
    expected = torch.tensor([3 / 4, 2 / 4, 1 / 4])
    torch.testing.assert_close(rbm.visible_bias.detach().sigmoid(), expected)
    assert not rbm.is_fresh


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(2, 4), r"takes \(N, 5\)"),
        (torch.zeros(5), r"takes \(N, 5\)"),
        (torch.full((2, 5), 0.5), "binarise"),
        (torch.full((2, 5), float("nan")), "binarise"),
    ],
)
def test_data_that_are_not_rows_of_bits_are_refused(data, message):
    rbm = RBM(5, 3)
    rbm.refresh()
    for ask in (rbm.model, rbm.guide, rbm.log_marginal, rbm.init_visible_bias, rbm.encode):
        with pytest.raises(ValueError, match=message):
            ask(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden": 0}, "num_hidden is 0"),
        ({"num_chains": 0}, "num_chains is 0"),
        ({"sweeps": 0}, "sweeps is 0"),
        ({"negative_phase": "pt"}, "'pcd', 'cd' or 'exact'"),
        ({"num_hidden": 21, "negative_phase": "exact"}, "21 units"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RBM(**{"num_visible": 30, "num_hidden": 3, **options})


def test_it_draws_encodes_and_shows_itself():
    rbm = strong(names := 6, 4, visible="pixels", hidden="features")
    data = bits(3, names)
    assert rbm.encode(data).shape == (3, 4)
    assert rbm.decode(rbm.encode(data)).shape == (3, 6)
    assert set(rbm.sample(50).unique().tolist()) == {0.0, 1.0}
    assert "log_partition=stale" in repr(rbm)
    rbm.refresh()
    assert "log_partition=exact" in repr(rbm)
    assert len(rbm.named_trainable(data)) == 3
    vectorised = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        loss = vectorised.loss(rbm.model, rbm.guide, data)
    assert loss == pytest.approx(-float(rbm.log_marginal(data).value.sum()))
