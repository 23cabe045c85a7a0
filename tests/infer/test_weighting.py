"""A weight per datum in the one training loop: values, gradients, refusals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate

from pyroboost import Cascade, MetaModel
from pyroboost.contexts import local_params
from pyroboost.evaluation import elbo, importance_bound
from pyroboost.infer import fit
from pyroboost.infer.batches import Batches
from pyroboost.infer.objectives import Annealing, resolve_loss
from pyroboost.infer.weighting import weighed, weighted_rows
from pyroboost.models import GMM, RBM, VAE


def sgd(lr=0.1):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def normal_pair():
    """x ~ N(m, 2) with the exact guide, whose bound is log p(x) for any draw."""

    def model(x):
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + m) / 2, 0.5**0.5))

    return MetaModel(model, guide, visible="x", hidden="z")


X = torch.tensor([-1.0, 0.5, 2.0, 4.0])
W = torch.tensor([0.5, 0.0, 3.0, 1.0])


def test_weights_have_mean_one_and_rows_of_weight_zero_are_left_out():
    (x, y), w = weighted_rows((X, X + 1), W)
    assert (x.tolist(), (y - x).tolist()) == ([-1.0, 2.0, 4.0], [1.0] * 3)
    torch.testing.assert_close(w, torch.tensor([0.5, 3.0, 1.0]) / 1.5)


def test_weights_smaller_than_the_least_square_root_do_not_underflow():
    _, w = weighted_rows((X,), torch.tensor([1e-38, 2e-38, 1e-38, 0.0]))
    torch.testing.assert_close(w, torch.tensor([0.75, 1.5, 0.75]))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (W[:3], "have shape"),
        (-W, "negative"),
        (W * float("nan"), "NaN"),
        (0 * W, "all 0"),
        (W[:, None], "have shape"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        fit(normal_pair(), X, epochs=1, weights=weights)


def test_weights_of_an_iterable_are_refused():
    with pytest.raises(TypeError, match="as tensors"):
        fit(normal_pair(), [X, X], epochs=1, weights=W)


def test_validation_weights_without_validation_are_refused():
    with pytest.raises(ValueError, match="without validation"):
        fit(normal_pair(), X, epochs=1, validation_weights=W)


def test_a_step_moves_along_the_weighted_mean_gradient():
    # With the exact guide the gradient in m of log p(x) is (x - m) / 2, here without noise.
    pair = normal_pair()
    fit(pair, X, epochs=1, optimizer=sgd(), weights=W, batch_size=10, seed=0)
    moved = pyro.param("m").item()
    # The pathwise gradient of a single draw is noisy only through z, whose score cancels.
    torch.testing.assert_close(
        torch.tensor(moved), 0.1 * (W * X / 2).sum() / W.sum(), rtol=0, atol=0.06
    )


def test_expected_gradient_is_that_of_the_weighted_bound():
    pair = normal_pair()
    loss = weighed(resolve_loss(pair, Trace_ELBO(num_particles=2000)), W[[0, 2, 3]])
    value = loss(pair.model, pair.guide, X[[0, 2, 3]])
    m = pyro.get_param_store()._params["m"]
    (gradient,) = torch.autograd.grad(value, m)
    expected = (W * -dist.Normal(0.0, 2**0.5).log_prob(X)).sum()
    torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, -(W * X / 2).sum(), rtol=0, atol=0.15)


def test_integer_weights_equal_repeated_rows():
    torch.manual_seed(0)
    x = (torch.rand(6, 5) < 0.5).float()
    w = torch.tensor([2.0, 1.0, 3.0, 0.0, 1.0, 2.0])
    vae = VAE(5, 2, units=7, batch_norm=False)
    rows = w > 0
    names = dict(vae.named_parameters())

    def gradient(loss, x):
        found = []
        for seed in range(300):
            torch.manual_seed(seed)
            with local_params():
                grads = torch.autograd.grad(loss(vae.model, vae.guide, x), list(names.values()))
            found.append(torch.cat([g.flatten() for g in grads]))
        found = torch.stack(found)
        return found.mean(0), found.std(0) / 300**0.5

    elbo = Trace_ELBO(max_plate_nesting=1).differentiable_loss
    one, one_error = gradient(weighed(elbo, w[rows]), x[rows])
    two, two_error = gradient(elbo, x.repeat_interleave(w.long(), 0))
    error = (one_error.square() + two_error.square()).sqrt()
    assert bool(((one - two).abs() <= 5 * error + 1e-5).all())
    wrong, _ = gradient(elbo, x[rows])
    assert bool(((wrong - two).abs() > 8 * error + 1e-3).any())


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_a_mixture_is_weighted_by_its_exact_likelihood(covariance):
    torch.manual_seed(0)
    gmm, x, w = GMM(3, 2, covariance=covariance), torch.randn(4, 2), torch.rand(4)
    parameters = list(gmm.parameters())
    with local_params():
        own = weighed(resolve_loss(gmm, None), w)(gmm.model, gmm.guide, x)
        repeated = sum(
            wn * resolve_loss(gmm, None)(gmm.model, gmm.guide, xn)
            for wn, xn in zip(w, x[:, None], strict=True)
        )
    for a, b in zip(
        torch.autograd.grad(own, parameters), torch.autograd.grad(repeated, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_site_enumerated_in_the_guide_is_weighted():
    torch.manual_seed(0)
    gmm, x, w = GMM(3, 2), torch.randn(4, 2), torch.rand(4)
    every = config_enumerate(gmm.recognition, "parallel")
    with local_params():
        loss = weighed(TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss, w)
        value = loss(gmm.model, every, x)
    torch.testing.assert_close(value, -(w * gmm.log_marginal(x).value).sum())


def test_a_site_enumerated_in_the_model_is_refused():
    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(c.float(), 1.0), obs=x)

    pair = MetaModel(model, lambda x: pyro.param("a", torch.tensor(0.0)), visible="x", hidden="c")
    with pytest.raises(ValueError, match="enumerates 'c'"):
        weighed(TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss, W)(
            pair.model, pair.guide, X
        )


def test_a_site_outside_the_data_is_refused():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match="'m' has no dimension"):
        fit((model, guide), X, epochs=1, weights=W)


def test_a_loss_that_runs_no_program_is_refused():
    with pytest.raises(ValueError, match="reached none"):
        fit(VAE(1, 1, units=3), (X > 0).float()[:, None], epochs=1, weights=W,
            loss=lambda model, guide, x: x.sum())  # fmt: skip


@pytest.mark.parametrize("phase", ["pcd", "cd", "exact"])
def test_an_rbm_is_weighted_in_its_positive_phase_and_its_log_partition(phase):
    torch.manual_seed(0)
    x, w = (torch.rand(5, 4) < 0.5).float(), torch.tensor([0.5, 2.0, 1.0, 3.0, 1.0])
    rbm = RBM(4, 3, negative_phase=phase, num_chains=4000, sweeps=20, weight_scale=0.7)
    exact = RBM(4, 3, negative_phase="exact")
    exact.load_state_dict({
        **exact.state_dict(),
        **{k: v for k, v in rbm.state_dict().items() if k.split(".")[-1] in (
            "visible_bias", "hidden_bias", "weight")},
    })  # fmt: skip
    exact.refresh()
    want = (-(w * exact.distribution().log_prob(x))).sum()

    def gradients(pair, x, w):
        pair.train()
        with local_params():
            loss = weighed(pair.objective(), w)(pair.model, pair.guide, x)
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(pair.parameters()))]
        ), loss

    # Contrastive divergence of 20 sweeps on 4 units forgets the data it starts from.
    for _ in range(10):
        found, _ = gradients(rbm, x, w)
    target, value = gradients(exact, x, w)
    torch.testing.assert_close(value.detach(), want)
    share = 4000 if phase == "pcd" else len(x)
    tolerance = 1e-5 if phase == "exact" else 6 * float(w.sum()) / share**0.5
    assert float((found - target).abs().max()) < tolerance


def test_annealing_and_weights_multiply():
    pair, w = normal_pair(), torch.tensor([2.0])
    annealing = Annealing(pair, lambda _: 0.5)
    programs = annealing.programs(annealing.beta(0.1))
    torch.manual_seed(0)
    once = resolve_loss(pair, None)(*programs, X[:1])
    torch.manual_seed(0)
    twice = weighed(resolve_loss(pair, None), w)(*programs, X[:1])
    torch.testing.assert_close(twice, 2 * once)


def test_a_subsampled_plate_keeps_its_scale():
    def model(x):
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=x)

    w = torch.tensor([0.5, 1.0, 2.0, 0.25])
    loss = weighed(Trace_ELBO().differentiable_loss, w)(model, lambda x: None, X)
    torch.testing.assert_close(loss.detach(), 25 * -(w * dist.Normal(0.0, 1.0).log_prob(X)).sum())


def test_vectorised_particles_keep_the_weights_with_their_data():
    pair = normal_pair()
    x, w = X[:3], W[[0, 2, 3]]  # three particles of three data: sizes tell nothing
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    value = weighed(elbo.differentiable_loss, w)(pair.model, pair.guide, x)
    torch.testing.assert_close(
        value.detach(), -(w * dist.Normal(0.0, 2**0.5).log_prob(x)).sum(), rtol=1e-4, atol=1e-4
    )


def test_held_out_bound_is_the_weighted_mean():
    pair = normal_pair()
    found = fit(pair, X, epochs=1, lr=0.0, validation=X, validation_weights=W, seed=0)
    want = (W * dist.Normal(0.0, 2**0.5).log_prob(X)).sum() / W.sum()
    torch.testing.assert_close(torch.tensor(found.history[0]["validation_bound"]), want)


def test_weights_pass_through_a_transform_and_two_arguments():
    seen = []

    def loss(model, guide, x, y, weights):
        seen.append((x, y, weights))
        return (weights * x).sum() * pyro.param("m", torch.tensor(1.0))

    def model(x, y):
        pyro.param("m", torch.tensor(1.0))

    fit((model, lambda x, y: None), (X, X + 1), epochs=1, weights=W, loss=loss,
        transform=lambda x, y: (10 * x, y), batch_size=2)  # fmt: skip
    x, y, w = (torch.cat(parts) for parts in zip(*seen, strict=True))
    order = x.argsort()
    torch.testing.assert_close(x[order], 10 * X[[0, 2, 3]])
    torch.testing.assert_close(y[order], X[[0, 2, 3]] + 1)
    torch.testing.assert_close(w[order], W[[0, 2, 3]] / 1.5)


def test_weights_are_part_of_what_a_checkpoint_belongs_to():
    one, two = (
        Batches(X, 2, torch.device("cpu"), shuffle=True, weights=w).describe() for w in (W, W + 1)
    )
    assert one != two


def test_a_weighted_fit_finds_the_weighted_mean():
    # EM-free check end to end: one Gaussian component, whose optimum is the weighted mean.
    torch.manual_seed(0)
    x, w = torch.randn(200, 1) * 0.3 + 1.0, torch.rand(200)
    gmm = GMM(1, 1)
    fit(gmm, x, epochs=200, weights=w, lr=0.05, batch_size=200, seed=0)
    mean = (w[:, None] * x).sum(0) / w.sum()
    torch.testing.assert_close(gmm.mixture.locs[0], mean, rtol=0, atol=2e-3)


def test_a_cascade_is_weighted_as_a_whole():
    torch.manual_seed(0)
    pair = Cascade(VAE(5, 2, units=7, batch_norm=False), VAE(2, 2, units=7, likelihood="gaussian"))
    x, w = (torch.rand(3, 5) < 0.5).float(), torch.tensor([0.5, 1.0, 3.0])
    elbo = Trace_ELBO(max_plate_nesting=1).differentiable_loss
    with local_params():
        torch.manual_seed(1)
        total = weighed(elbo, w)(pair.model, pair.guide, x)
        torch.manual_seed(1)
        guide = pyro.poutine.trace(pair.guide).get_trace(x)
        model = pyro.poutine.trace(pyro.poutine.replay(pair.model, guide)).get_trace(x)
    for trace in (guide, model):
        trace.compute_log_prob()
    terms = sum(
        sign * site["log_prob"]
        for sign, trace in ((1, model), (-1, guide))
        for site in trace.nodes.values()
        if site["type"] == "sample" and site["log_prob"].dim()
    )
    torch.testing.assert_close(total, -(w * terms).sum())


def test_a_plate_of_features_as_large_as_the_batch_is_not_taken_for_the_data():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("features", 4, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.sum(-1) / 5, 5**-0.5))

    torch.manual_seed(0)
    x, w = 3 * torch.randn(4, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    law = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + torch.ones(4, 4))
    value = weighed(Trace_ELBO(max_plate_nesting=2).differentiable_loss, w)(model, guide, x)
    torch.testing.assert_close(value, -(w * law.log_prob(x)).sum(), rtol=1e-4, atol=1e-3)
    pair = MetaModel(model, guide, visible="x", hidden="z")
    torch.testing.assert_close(elbo(pair, x).value, law.log_prob(x), rtol=1e-4, atol=1e-3)
    bound = importance_bound(pair, x[:2], num_samples=2)  # two rows twice: four again
    torch.testing.assert_close(bound.value, law.log_prob(x[:2]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("count", [4, 7])
def test_a_global_site_in_a_plate_of_any_size_is_refused(count):
    def model(x):
        with pyro.plate("features", 4):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(b.sum(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("features", 4):
            pyro.sample("b", dist.Normal(pyro.param("m", torch.zeros(4)), 1.0))

    with pytest.raises(ValueError, match="has no dimension"):
        fit((model, guide), torch.zeros(count), epochs=1, weights=torch.ones(count))


def test_the_value_of_a_weighted_rbms_loss_is_its_weighted_likelihood():
    torch.manual_seed(0)
    x, w = (torch.rand(5, 4) < 0.5).float(), torch.tensor([0.5, 2.0, 1.0, 3.0, 1.0])
    rbm = RBM(4, 3, weight_scale=0.7)
    rbm.refresh()
    want = -(w * rbm.log_marginal(x).value).sum()
    rbm.train()
    with local_params():
        value = weighed(rbm.objective(), w)(rbm.model, rbm.guide, x)
    torch.testing.assert_close(value.detach(), want)
