"""A mixture as a meta-model: densities, Pyro's tools, what it refuses, what it keeps."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumerated import BitPair, all_bits
from pairs import MAKES, log_joint, modules, seeded_log_joint, train, trained
from pyro import poutine
from pyro.infer import SVI, Importance, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.mcmc.util import initialize_model
from torch import nn

from pyroboost import Cascade, MetaModel
from pyroboost.compose import Mixture
from pyroboost.evaluation import decompose, elbo, log_likelihood, log_weights
from pyroboost.infer import fit
from pyroboost.likelihood import Likelihood
from pyroboost.models import GMM, RBM, VAE

KINDS = pytest.mark.parametrize("hidden", ["shared", "component"])


def vaes(hidden=None, **options):
    torch.manual_seed(0)
    parts = [VAE(4, 2, units=u, batch_norm=False) for u in (5, 3)]
    return Mixture(*parts, hidden=hidden, **options).eval()


def bits(n=6, size=4):
    return (torch.rand(n, size) < 0.5).float()


# Densities


def test_mixture_of_gaussian_mixtures_is_the_larger_one():
    small, large = [GMM(2, 3), GMM(1, 3)], GMM(3, 3)
    mixture = Mixture(*small, weights=[0.6, 0.4])
    parts = [gmm.mixture for gmm in small]
    large.mixture = parts[0]._replace(
        weights=torch.cat([0.6 * parts[0].weights, 0.4 * parts[1].weights]),
        locs=torch.cat([p.locs for p in parts]),
        scale=torch.cat([p.scale for p in parts]),
    )
    x = torch.randn(20, 3)
    found = mixture.log_marginal(x)
    assert found.kind == "exact"
    assert found.std_error is None
    assert torch.allclose(found.value, large.log_marginal(x).value, atol=1e-5)
    # The guide is exact as well: every weight is the density.
    weights = log_weights(mixture, x, num_samples=3)
    assert torch.allclose(weights, found.value.expand(3, -1), atol=1e-4)
    scored = poutine.trace(mixture.marginal).get_trace(x)
    assert {n for n, s in scored.nodes.items() if s["type"] == "sample"} == {"data", "x"}
    assert torch.allclose(scored.log_prob_sum(), found.value.sum(), atol=1e-4)


def test_weights_of_vaes_are_unbiased():
    """E[w] on the natural scale against quadrature over each part's two latents."""
    mixture, x = vaes(weights=[0.2, 0.8]), bits(3)
    grid = torch.linspace(-6, 6, 121)
    z = torch.cartesian_prod(grid, grid)
    step = math.log(0.1**2)
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + step
    terms = []
    for part in mixture:
        law = part.model.fn.law(z)
        terms.append(torch.stack([(law.log_prob(row) + prior).logsumexp(0) for row in x]))
    exact = (torch.stack(terms, -1) + mixture.log_weights).logsumexp(-1).detach()
    for hidden in ("shared", "component"):
        other = Mixture(*mixture, weights=[0.2, 0.8], hidden=hidden)
        w = (log_weights(other, x, num_samples=4000) - exact).exp()
        error = w.std(0) / math.sqrt(len(w))
        assert ((w.mean(0) - 1).abs() < 5 * error).all()
        assert (error < 0.1).all()
        assert elbo(other, x, num_samples=500).mean < exact.mean() + 0.01


def test_likelihood_is_exact_only_where_all_parts_are():
    x = bits()
    rbm, vae = RBM(4, 3), VAE(4, 2, units=3)
    rbm.refresh()
    assert Mixture(rbm, RBM(4, 2)).refresh() is None
    assert Mixture(rbm, vae).log_marginal(x) is None
    assert log_likelihood(Mixture(rbm, vae), x, num_samples=5).kind == "estimate"
    both = Mixture(rbm, RBM(4, 2), weights=[0.9, 0.1])
    both.refresh()
    assert log_likelihood(both, x).kind == "exact"
    assert both.hidden == "component"
    assert both.log_marginal(x).std_error is None


def test_estimated_constants_make_an_estimate_with_their_error():
    x = bits(5, 24)
    parts = [RBM(24, 21, weight_scale=0.3) for _ in range(2)]
    for part in parts:
        part.refresh(num_chains=20, num_temperatures=30)
    mixture = Mixture(*parts, weights=[0.5, 0.5])
    found, own = mixture.log_marginal(x), [p.log_marginal(x) for p in parts]
    assert found.kind == "estimate"
    assert mixture.normalisation()[0] == "estimate"
    shares = torch.stack([o.value for o in own], -1).softmax(-1)
    errors = torch.tensor([p.log_partition_error for p in parts])
    expected = (shares * errors).square().sum(-1).sqrt()
    assert torch.allclose(found.std_error, expected, atol=1e-6)
    assert found.shared_error == pytest.approx(
        float((shares.mean(0) * errors).square().sum().sqrt()), rel=1e-4
    )
    assert mixture.normalisation()[1] == pytest.approx(max(errors.tolist()))


def test_prior_of_the_hidden_site():
    mixture = vaes()
    assert mixture.hidden == "z"
    assert mixture.hidden_shape == (2,)
    h = torch.randn(5, 2)
    assert torch.allclose(mixture.log_prior(h).value, mixture[0].log_prior(h).value)
    labels = Mixture(GMM(2, 3), GMM(3, 3), weights=[0.25, 0.75])
    assert labels.hidden == "component"
    assert labels.hidden_shape == ()
    prior = labels.log_prior(torch.tensor([0, 1, 1]))
    assert torch.allclose(prior.value.exp(), torch.tensor([0.25, 0.75, 0.75]))


def test_encode_names_the_component_by_its_responsibility():
    mixture = Mixture(GMM(1, 1), GMM(1, 1), weights=[0.3, 0.7])
    for part, loc in zip(mixture, (-1.0, 1.0), strict=True):
        part.mixture = part.mixture._replace(locs=torch.tensor([[loc]]))
    x = torch.tensor([0.4])
    terms = [w * dist.Normal(m, 1.0).log_prob(x).exp() for w, m in ((0.3, -1.0), (0.7, 1.0))]
    share = float(terms[1] / sum(terms))
    n = 20_000
    found = mixture.encode(x.expand(n, 1)).double().mean().item()
    assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / n)


def test_decode_draws_from_the_parts_that_may_have_made_h():
    """m(x | h) = sum_c m(c | h) m_c(x | h): the parts' priors decide, where they differ."""

    def part(prior, loc):
        def model(x):
            with pyro.plate("data", x.shape[-2]):
                h = pyro.sample("h", dist.Normal(torch.full((1,), prior), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(h + loc, 0.1).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", x.shape[-2]):
                pyro.sample("h", dist.Normal(x - loc, 0.1).to_event(1))

        return MetaModel(
            model, guide, visible="x", hidden="h", visible_shape=(1,), hidden_shape=(1,)
        )

    mixture, n = Mixture(part(-2.0, -10.0), part(2.0, 10.0), weights=[0.5, 0.5]), 4000
    assert mixture.hidden == "h"
    h = torch.full((n, 1), 0.25)
    share = torch.sigmoid(torch.tensor(2 * 2.0 * 0.25)).item()  # m_2(h) / (m_1(h) + m_2(h))
    found = (mixture.decode(h) > 0).double().mean().item()
    assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / n)
    assert share > 0.7


# Pyro's tools


@KINDS
@pytest.mark.parametrize("make", MAKES)
def test_pairs_of_every_make_train_by_svi(make, hidden):
    x = torch.randn(20, 3)
    mixture = Mixture(MAKES[make](3, 2, "a"), MAKES[make](3, 2, "b"), hidden=hidden)
    mixture.guide(x)
    before = trained(mixture, x)
    losses = train(mixture, x, steps=40)
    after = trained(mixture, x)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert "proportions.fn.logits" in before


@KINDS
def test_elbo_modules_and_optimisers_of_torch_train_it(hidden):
    x, mixture = bits(50), vaes(hidden)
    loss = Trace_ELBO()(mixture.model, mixture.guide)
    loss(x)
    names = {id(p) for p in loss.parameters()}
    assert names >= {id(p) for p in mixture.parameters()}
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.02)
    values = []
    for _ in range(60):
        optimiser.zero_grad()
        value = loss(x)
        value.backward()
        optimiser.step()
        values.append(value.item())
    assert sum(values[-10:]) < sum(values[:10])


@KINDS
def test_sequential_and_vectorised_particles_agree(hidden):
    """Law 6: draws aside differ from particle to particle."""
    mixture, x = vaes(hidden), bits(5)
    apart = log_weights(mixture, x, num_samples=1500).sum(-1).double()
    together = Trace_ELBO(num_particles=1500, vectorize_particles=True, max_plate_nesting=1)
    value = -together.loss(mixture.model, mixture.guide, x)
    assert abs(value - apart.mean().item()) < 5 * 2**0.5 * apart.std().item() / 1500**0.5
    with pyro.plate("particles", 3, dim=-2):
        trace = poutine.trace(mixture.guide).get_trace(x)
    inner = "z" if hidden == "shared" else "0.z"
    assert trace.nodes[inner]["value"].shape == (3, 5, 2)
    assert not torch.equal(trace.nodes[inner]["value"][0], trace.nodes[inner]["value"][1])


@KINDS
def test_sites_are_named_after_their_parts(hidden):
    mixture, x = vaes(hidden), bits()
    private = [] if hidden == "shared" else ["0.z", "1.z"]
    hidden_site = ["z"] if hidden == "shared" else []
    for program, own in ((mixture.model, ["x"]), (mixture.guide, [])):
        trace = poutine.trace(program).get_trace(x)
        names = {n for n, s in trace.nodes.items() if s["type"] == "sample"}
        assert names == {"data", "component", *hidden_site, *private, *own}
    assert "component" in trace.format_shapes()


@KINDS
def test_predictive_and_importance(hidden):
    mixture, x = vaes(hidden), bits(4)
    for parallel in (False, True):
        found = Predictive(poutine.uncondition(mixture.model), num_samples=7, parallel=parallel)(x)
        assert found["x"].shape == (7, 4, 4)
        assert set(found["x"].unique().tolist()) <= {0.0, 1.0}
        drawn = Predictive(mixture.model, guide=mixture.guide, num_samples=7, parallel=parallel)(x)
        assert drawn["component"].shape == (7, 4)
    weights = Importance(mixture.model, mixture.guide, num_samples=20).run(x).log_weights
    assert torch.isfinite(torch.stack([torch.as_tensor(w) for w in weights])).all()


def test_nuts_where_nothing_is_masked_and_a_refusal_elsewhere():
    """The component below one continuous h can be summed out in the model; with masks it cannot."""

    def part(loc):
        def model(x):
            with pyro.plate("data", x.shape[-2]):
                h = pyro.sample("h", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(h + loc, 0.5).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", x.shape[-2]):
                pyro.sample("h", dist.Normal(x, 1.0).to_event(1))

        return MetaModel(model, guide, visible="x", hidden="h", hidden_shape=(1,))

    x = torch.tensor([[0.5]])
    mixture = Mixture(part(-1.0), part(1.0), weights=[0.5, 0.5], hidden="shared")
    mixture.requires_grad_(False)
    _, potential, *_ = initialize_model(mixture.model, (x,), max_plate_nesting=1)
    for h in torch.linspace(-3, 3, 7):
        terms = [dist.Normal(h + loc, 0.5).log_prob(x[0, 0]) for loc in (-1.0, 1.0)]
        exact = torch.stack(terms).logsumexp(0) - math.log(2) + dist.Normal(0.0, 1.0).log_prob(h)
        assert torch.allclose(-potential({"h": h.reshape(1, 1)}), exact, atol=1e-5)
    kernel = pyro.infer.NUTS(mixture.model, max_plate_nesting=1)
    run = pyro.infer.MCMC(kernel, num_samples=5, warmup_steps=5, disable_progbar=True)
    run.run(x)
    assert run.get_samples()["h"].shape == (5, 1, 1)
    masked = Mixture(part(-1.0), part(1.0), hidden="component").requires_grad_(False)
    with pytest.raises(RuntimeError, match="enumerated in the model alone"):
        pyro.infer.MCMC(
            pyro.infer.NUTS(masked.model, max_plate_nesting=1), num_samples=1, warmup_steps=1
        ).run(x)


def test_analytic_kl_is_refused():
    mixture, x = vaes(), bits()
    with (
        pytest.warns(UserWarning, match="mean field"),
        pytest.raises(NotImplementedError, match="reparameterized"),
    ):
        TraceMeanField_ELBO().loss(mixture.model, mixture.guide, x)


def subsampled(size, seed):
    net = nn.Linear(2, 3)

    def model(x):
        with pyro.plate("data", len(x), subsample_size=size) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x[rows])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=size) as rows:
            pyro.sample("z", dist.Normal(x[rows][..., :2], 0.5).to_event(1))

    return MetaModel(model, guide, visible="x", hidden="z")


@KINDS
def test_one_subsample_and_one_scale(hidden):
    """All parts see the rows that the first chose, and every site counts by the same factor."""
    mixture, x = Mixture(subsampled(4, 0), subsampled(4, 1), hidden=hidden), torch.randn(20, 3)
    guide = poutine.trace(mixture.guide).get_trace(x)
    model = poutine.trace(poutine.replay(mixture.model, trace=guide)).get_trace(x)
    assert torch.equal(model.nodes["data"]["value"], guide.nodes["data"]["value"])
    assert [n for n in model.nodes if "data" in n] == ["data"]
    sites = [s for t in (model, guide) for n, s in t.nodes.items() if s["type"] == "sample"]
    assert {float(s["scale"]) for s in sites if s["name"] != "data"} == {5.0}
    assert torch.equal(model.nodes["x"]["value"], x[guide.nodes["data"]["value"]])
    with pytest.raises(ValueError, match="one size"):
        Mixture(subsampled(4, 0), subsampled(5, 1)).guide(x)


@KINDS
def test_plates_within_a_datum_are_summed(hidden):
    """Data in dimension -2, pixels in -1: with exact guides every weight is the density."""

    def part(loc):
        def model(x):
            with pyro.plate("data", x.shape[-2], dim=-2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with pyro.plate("pixels", x.shape[-1], dim=-1):
                    pyro.sample("x", dist.Normal(z + loc, 1.0), obs=x)

        def guide(x):
            mean = (x - loc).sum(-1, keepdim=True) / (x.shape[-1] + 1)
            with pyro.plate("data", x.shape[-2], dim=-2):
                pyro.sample("z", dist.Normal(mean, (x.shape[-1] + 1) ** -0.5))

        return MetaModel(model, guide, visible="x", hidden="z")

    x = torch.randn(5, 3)
    mixture = Mixture(part(-1.0), part(1.0), weights=[0.3, 0.7], hidden=hidden)
    joint = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1.0)
    terms = torch.stack([joint.log_prob(x + 1.0), joint.log_prob(x - 1.0)], -1)
    exact = (terms + mixture.log_weights).logsumexp(-1)
    assert torch.allclose(log_weights(mixture, x)[0], exact, atol=1e-5)
    together = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=2)
    assert -together.loss(mixture.model, mixture.guide, x) == pytest.approx(
        exact.sum().item(), abs=1e-4
    )
    assert set(mixture.encode(x).shape) <= {1, 5}
    assert {n for n in poutine.trace(mixture.model).get_trace(x).nodes if "pix" in n} == {"pixels"}


# Nesting


def test_cascade_over_a_mixture_and_mixture_of_cascades():
    torch.manual_seed(0)
    x = bits(8)
    below = Cascade(vaes(), GMM(2, 2))
    assert decompose(below, x).terms[0].name == "0: Mixture"
    parts = [Cascade(VAE(4, 2, units=3, batch_norm=False), GMM(k, 2)) for k in (2, 3)]
    above = Mixture(*parts, weights=[0.5, 0.5])
    assert above.hidden == "component"
    assert above.marginal is None
    nested = Mixture(vaes(), VAE(4, 2, units=3, batch_norm=False), weights=[0.5, 0.5])
    assert nested.hidden == "z"
    for pair in (below, above, nested):
        assert math.isfinite(log_joint(pair, x).item())
        loss = Trace_ELBO()(pair.model, pair.guide)
        loss(x).backward()
        grads = [p.grad is not None for p in pair.parameters()]
        assert all(grads)
        particles = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
        assert math.isfinite(particles.loss(pair.model, pair.guide, x))
        assert pair.sample(3).shape == (3, 4)


@torch.no_grad()
def test_nested_mixtures_weigh_as_one():
    """Mixture(Mixture(a, b), c) has the density of Mixture(a, b, c)."""
    torch.manual_seed(1)
    a, b, c = (BitPair(3, 2, 1.5) for _ in range(3))
    x = all_bits(3)
    for hidden in ("shared", "component"):
        inner = Mixture(a, b, weights=[0.5, 0.5], hidden=hidden)
        nested = Mixture(inner, c, weights=[0.6, 0.4], hidden="component")
        terms = [w * p.exact(x).exp() for w, p in ((0.3, a), (0.3, b), (0.4, c))]
        w = log_weights(nested, x, num_samples=4000).exp() / sum(terms)
        assert ((w.mean(0) - 1).abs() < 5 * w.std(0) / math.sqrt(len(w))).all()
    # Parts that are exact make every weight exact, however they nest.
    one, two, three = GMM(2, 2), GMM(1, 2), GMM(2, 2)
    flat = Mixture(one, two, three, weights=[0.3, 0.3, 0.4])
    nested = Mixture(Mixture(one, two, weights=[0.5, 0.5]), three, weights=[0.6, 0.4])
    x = torch.randn(10, 2)
    assert torch.allclose(nested.log_marginal(x).value, flat.log_marginal(x).value, atol=1e-5)
    assert torch.allclose(log_weights(nested, x)[0], flat.log_marginal(x).value, atol=1e-4)


# Objective


def test_objective_of_exact_parts_is_the_exact_likelihood():
    torch.manual_seed(0)
    mixture, x = Mixture(GMM(2, 2), GMM(3, 2), weights=[0.3, 0.7]), torch.randn(9, 2)
    loss = mixture.objective()(mixture.model, mixture.guide, x)
    found = torch.autograd.grad(loss, list(mixture.parameters()))
    exact = -mixture.log_marginal(x).value.sum()
    by_hand = torch.autograd.grad(exact, list(mixture.parameters()))
    assert torch.allclose(loss, exact, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, by_hand, strict=True))
    weights = torch.arange(9.0)
    weighted = mixture.objective()(mixture.model, mixture.guide, x, weights=weights)
    assert torch.allclose(weighted, -(weights * mixture.log_marginal(x).value).sum(), atol=1e-4)


@KINDS
def test_the_component_adds_no_noise_to_the_gradient(hidden):
    """With reparameterised parts the baseline takes the component's score out entirely."""
    mixture, x = vaes(hidden, weights=[0.4, 0.6]), bits(6)
    parameters = list(mixture.parameters())

    def gradient(loss, seed):
        torch.manual_seed(seed)
        mixture.zero_grad()
        loss().backward()
        return torch.cat([p.grad.flatten() for p in parameters])

    elbo_ = Trace_ELBO()
    traced = [
        gradient(lambda: elbo_.differentiable_loss(mixture.model, mixture.guide, x), s)
        for s in range(80)
    ]
    own = [
        gradient(lambda: mixture.objective()(mixture.model, mixture.guide, x), s) for s in range(80)
    ]
    traced, own = torch.stack(traced).double(), torch.stack(own).double()
    error = ((traced.var(0) + own.var(0)) / 80).sqrt()
    assert ((traced.mean(0) - own.mean(0)).abs() < 5 * error + 1e-4).all()
    assert traced.var(0).sum() < 10 * own.var(0).sum()


def test_below_a_stage_the_parts_recognition_programs_run():
    """An exact guide detaches its parameters; below another stage their score counts."""
    mixture, x = Mixture(GMM(2, 2), GMM(2, 2)), torch.randn(5, 2)
    for program, scored in ((mixture.guide, False), (mixture.recognition, True)):
        trace = poutine.trace(program).get_trace(x)
        trace.compute_log_prob()
        assert trace.nodes["0.component"]["log_prob"].requires_grad == scored


@KINDS
def test_nothing_is_left_of_the_score_of_a_component(hidden):
    """For one draw, not in the mean: baselines take out mixtures among the parts as well."""
    torch.manual_seed(3)
    inner = vaes(hidden, weights=[0.4, 0.6])
    mixture, x = Mixture(inner, VAE(4, 2, units=3, batch_norm=False), hidden=hidden), bits(6)
    guide = poutine.trace(mixture.guide).get_trace(x)
    model = poutine.trace(poutine.replay(mixture.model, trace=guide)).get_trace(x)
    guide.compute_score_parts()
    model.compute_log_prob()
    sites = [n for n in guide.nodes if guide.nodes[n]["type"] == "sample" and n != "data"]
    log_r = sum(model.nodes[n]["log_prob"] for n in [*sites, "x"])
    log_r = (log_r - sum(guide.nodes[n]["log_prob"] for n in sites)).detach()
    _, score, baseline = guide.nodes["component"]["score_parts"]
    assert log_r.abs().min() > 0.1
    kept = torch.autograd.grad((score * log_r).sum(), list(mixture.parameters()), retain_graph=True)
    left = torch.autograd.grad((score * log_r - baseline).sum(), list(mixture.parameters()))
    assert max(g.abs().max() for g in kept) > 0.1
    assert max(g.abs().max() for g in left) < 1e-4


def test_parts_that_see_data_through_several_samples_do_so_in_the_objective():
    mixture, x = vaes(), bits(5)
    mixture[0].num_particles = 3
    torch.manual_seed(1)
    loss = mixture.objective()(mixture.model, mixture.guide, x)
    torch.manual_seed(1)
    first = torch.stack([log_weights(mixture[0], x)[0] for _ in range(3)]).logsumexp(0)
    terms = torch.stack([first - math.log(3), log_weights(mixture[1], x)[0]], -1)
    assert torch.allclose(loss, -(terms + mixture.log_weights).logsumexp(-1).sum(), atol=1e-4)


@KINDS
def test_fit_takes_a_mixture_with_weights_or_annealing(hidden):
    mixture, x = vaes(hidden), bits(40)
    first = fit(mixture, x, epochs=5, lr=0.02, weights=torch.rand(40), seed=0)
    assert first.history[-1]["loss"] < first.history[0]["loss"]
    warm = fit(mixture, x, epochs=2, loss=Trace_ELBO(), annealing=1, weights=torch.rand(40), seed=0)
    assert warm.epochs_run == 2
    with pytest.raises(ValueError, match="annealing"):
        fit(mixture, x, epochs=1, annealing=2, seed=0)


def test_parts_without_a_fresh_constant_can_be_trained_but_not_evaluated():
    mixture, x = Mixture(RBM(4, 2), RBM(4, 3)), bits(20)
    with pytest.raises(ValueError, match="refresh"):
        mixture.encode(x)
    assert fit(mixture, x, epochs=1, seed=0).epochs_run == 1
    mixture.refresh()
    assert mixture.log_marginal(x).kind == "exact"


@KINDS
def test_particles_through_a_cascade_over_a_mixture(hidden):
    """Draws aside stand still when a stage is checked for leading dimensions."""
    torch.manual_seed(0)
    mixture = Mixture(
        *(VAE(2, 2, units=4, batch_norm=False, likelihood="gaussian") for _ in range(2)),
        hidden=hidden,
    )
    cascade, x = Cascade(VAE(4, 2, units=4, batch_norm=False), mixture).eval(), bits(5)
    apart = log_weights(cascade, x, num_samples=1000).sum(-1).double()
    together = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
    value = -together.loss(cascade.model, cascade.guide, x)
    assert abs(value - apart.mean().item()) < 5 * 2**0.5 * apart.std().item() / 1000**0.5


def test_a_bound_makes_a_bound():
    class Bound(VAE):
        def log_marginal(self, x, *args):
            return Likelihood(torch.full((len(x),), -3.0), "bound")

    mixture = Mixture(Bound(4, 2, units=3), Bound(4, 2, units=3), weights=[0.5, 0.5])
    found = mixture.log_marginal(bits())
    assert found.kind == "bound"
    assert torch.allclose(found.value, torch.tensor(-3.0))


# Weights


def test_weights_are_set_kept_and_checked():
    mixture = vaes(weights=torch.tensor([0.25, 0.75]))
    assert torch.allclose(mixture.weights, torch.tensor([0.25, 0.75]))
    mixture.weights = [1.0, 0.0]
    assert mixture.weights.tolist() == [1.0, 0.0]
    x = bits(5)
    loss = mixture.objective()(mixture.model, mixture.guide, x)
    loss.backward()
    assert torch.isfinite(mixture.proportions.fn.logits.grad).all()
    for wrong in ([0.5, 0.6], [1.5, -0.5], [1.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="one weight each"):
            mixture.weights = wrong


def test_a_datum_that_no_part_can_make_has_density_zero():
    def part(low, high):
        def model(x):
            with pyro.plate("data", x.shape[-2]):
                h = pyro.sample("h", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                law = dist.Uniform(h.detach() * 0 + low, high, validate_args=False)
                pyro.sample("x", law.to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", x.shape[-2]):
                pyro.sample("h", dist.Normal(torch.zeros(1), 1.0).to_event(1))

        return MetaModel(model, guide, visible="x", hidden="h")

    mixture = Mixture(part(0.0, 2.0), part(0.0, 2.0), hidden="shared")
    with pyro.validation_enabled(False):
        found = log_weights(mixture, torch.tensor([[0.5], [3.0]]))[0]
    assert found[0].isfinite()
    assert found[1] == -math.inf


# Keeping


@KINDS
def test_copies_files_and_dtypes_leave_densities_unchanged(hidden, tmp_path):
    mixture, x = vaes(hidden, weights=[0.3, 0.7]), bits()
    value = seeded_log_joint(mixture, x)
    other = copy.deepcopy(mixture)
    assert seeded_log_joint(other, x) == value
    train(other, x)
    assert seeded_log_joint(mixture, x) == value
    assert seeded_log_joint(other, x) != value
    assert all(
        not torch.equal(a, b) for a, b in zip(mixture.parameters(), other.parameters(), strict=True)
    )
    mixture.save(tmp_path / "mixture.pt")
    torch.manual_seed(9)
    fresh = Mixture(*(VAE(4, 2, units=u, batch_norm=False) for u in (5, 3)), hidden=hidden).eval()
    fresh.load(tmp_path / "mixture.pt")
    assert seeded_log_joint(fresh, x) == pytest.approx(value, abs=1e-5)
    assert torch.equal(fresh.weights, mixture.weights)
    means = [
        log_weights(m, x.to(d), num_samples=2000).exp().mean(0)
        for m, d in (
            (copy.deepcopy(mixture), torch.float32),
            (copy.deepcopy(mixture).double(), torch.float64),
        )
    ]
    assert means[1].dtype == torch.float64
    assert torch.allclose(means[0].double(), means[1], rtol=0.2)


def test_exact_densities_survive_double():
    mixture, x = Mixture(GMM(2, 2), GMM(1, 2), weights=[0.3, 0.7]), torch.randn(5, 2)
    before = mixture.log_marginal(x).value
    after = mixture.double().log_marginal(x.double()).value
    assert torch.allclose(before.double(), after, atol=1e-5)


# Refusals


def test_parts_that_do_not_fit_are_refused_in_words():
    vae = VAE(4, 2, units=3)
    with pytest.raises(ValueError, match="no part"):
        Mixture()
    with pytest.raises(TypeError, match="wrap the pair in MetaModel"):
        Mixture(vae, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="share the parameter"):
        Mixture(vae, vae)
    with pytest.raises(ValueError, match="shapes"):
        Mixture(vae, VAE(5, 2, units=3))
    with pytest.raises(ValueError, match="hidden is 'both'"):
        Mixture(vae, VAE(4, 2, units=3), hidden="both")
    with pytest.raises(ValueError, match="the mixture's own"):
        Mixture(GMM(2, 3), GMM(2, 3), hidden="shared")
    bits_and_reals = Mixture(vae, VAE(4, 2, units=3, likelihood="gaussian"))
    with pytest.raises(ValueError, match="one visible space"):
        bits_and_reals.guide(bits())
    unlike = Mixture(vae, VAE(4, 3, units=3), hidden="shared")
    with pytest.raises(ValueError, match="hidden='component'"):
        unlike.guide(bits())
    assert Mixture(vae, VAE(4, 3, units=3)).hidden == "component"
    assert Mixture(vae, RBM(4, 2)).hidden == "component"  # reals and bits of one shape


def test_free_params_of_one_name_are_found_in_the_first_run():
    mixture = Mixture(MAKES["functions"](3, 2, "a"), MAKES["functions"](3, 2, "a"))
    with pytest.raises(ValueError, match="share the parameter 'a_decoder'"):
        mixture.guide(torch.randn(4, 3))


def test_programs_that_a_mixture_cannot_mask_are_refused():
    x = torch.randn(5, 2)

    def no_plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def scale_of_all(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", x.shape[-2]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

    def no_site(x):
        with pyro.plate("data", x.shape[-2]):
            pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)

    good = modules(2, 2)
    for model, words in (
        (no_plate, "in no plate"),
        (scale_of_all, "outside of the plate"),
        (no_site, "no site"),
    ):
        part = MetaModel(model, copy.deepcopy(good.guide), visible="x", hidden="z")
        mixture = Mixture(modules(2, 2), part)
        with pytest.raises(ValueError, match=words):
            log_joint(mixture, x)


def test_private_sites_are_not_enumerated_in_the_model():
    def model(x):
        with pyro.plate("data", x.shape[-2]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + k[..., None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[-2]):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    part = MetaModel(model, guide, visible="x", hidden="z")
    mixture = Mixture(part, modules(2, 2), hidden="shared")
    with pytest.raises(RuntimeError, match="count once for each"):
        pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss(
            mixture.model, mixture.guide, torch.randn(4, 2)
        )


def test_svi_of_a_mixture_with_a_label_site_masks_it():
    """An observed private site counts only for the data whose component has it."""

    def model(x, y):
        with pyro.plate("data", x.shape[-2]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Bernoulli(0.9), obs=y)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, y):
        with pyro.plate("data", x.shape[-2]):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    parts = [MetaModel(model, guide, visible="x", hidden="z") for _ in range(2)]
    mixture = Mixture(*parts, hidden="shared", weights=[0.5, 0.5])
    x, y = torch.randn(6, 2), torch.ones(6)
    found = log_weights(mixture, x, y)[0]
    expected = dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1) + math.log(0.9)
    assert torch.allclose(found, expected, atol=1e-4)


def test_svi_moves_the_weights_to_the_shares_of_the_data():
    torch.manual_seed(0)
    mixture = Mixture(GMM(1, 1), GMM(1, 1), weights=[0.5, 0.5])
    for part, loc in zip(mixture, (-3.0, 3.0), strict=True):
        part.mixture = part.mixture._replace(locs=torch.tensor([[loc]]))
        part.requires_grad_(False)
    x = torch.cat([torch.randn(300, 1) - 3, torch.randn(100, 1) + 3])
    svi = SVI(mixture.model, mixture.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(150):
        svi.step(x)
    assert abs(mixture.weights[0].item() - 0.75) < 0.03
