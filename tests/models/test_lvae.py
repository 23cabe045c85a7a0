"""The ladder VAE against its equations, linear-Gaussian algebra and quadrature."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyroboost import Cascade
from pyroboost.evaluation import decompose, elbo, log_likelihood, log_weights
from pyroboost.infer import fit, greedy
from pyroboost.infer.importance_weighted import ImportanceWeightedELBO
from pyroboost.models import GMM, LVAE
from pyroboost.models.lvae import _merge


def small(latents=(3, 2), **settings):
    return LVAE(6, latents, **{"units": 8, **settings})


def bits(count=64):
    return (torch.rand(count, 6) < 0.3).float()


def test_merging_multiplies_two_normals():
    """The product of the two densities, normalised by quadrature, has the merged mean and scale."""
    grid = torch.linspace(-12.0, 12.0, 20_001, dtype=torch.float64)
    for m, s, m_p, s_p in ((0.5, 0.7, -1.0, 1.3), (2.0, 0.05, 0.0, 1.0), (1.0, 2.0, -0.5, 0.3)):
        parts = [torch.tensor(v, dtype=torch.float64) for v in (m, s, m_p, s_p)]
        law = _merge((parts[0], parts[1]), (parts[2], parts[3]))
        logs = dist.Normal(m, s).log_prob(grid) + dist.Normal(m_p, s_p).log_prob(grid)
        weights = logs.softmax(0)
        mean = (weights * grid).sum()
        assert abs(law.mean - mean) < 1e-6
        assert abs(law.stddev - (weights * (grid - mean) ** 2).sum().sqrt()) < 1e-6
    sharp = _merge((torch.tensor(1.0), torch.tensor(1e-4)), (torch.tensor(0.0), torch.tensor(50.0)))
    assert sharp.mean == pytest.approx(1.0)
    assert sharp.stddev == pytest.approx(1e-4)


@pytest.mark.parametrize("latents", [(3, 2), (4, 3, 2)])
def test_weights_are_the_hand_written_ones(latents):
    """log m(x, z_1..z_L) - log q: each z_l of the guide merges its message with the model's law."""
    lvae, x = small(latents).eval(), bits(5)
    descent, ladder = lvae.model.fn, lvae.guide.fn
    guide = pyro.poutine.trace(lvae.guide).get_trace(x)
    z = [guide.nodes[f"z{i + 1}"]["value"] for i in range(len(latents))]
    pyro.set_rng_seed(4)
    found = log_weights(lvae, x)[0]
    pyro.set_rng_seed(4)
    with torch.no_grad():
        total, z, climbing, messages = 0.0, {}, x, []
        for trunk, head in zip(ladder.trunks, ladder.heads, strict=True):
            climbing = trunk.net(climbing)
            loc, raw = head(climbing).chunk(2, -1)
            messages.append((loc, nn.functional.softplus(raw) + 1e-4))
        above = None
        for layer in reversed(range(len(latents))):
            loc, scale = messages[layer]
            prior = torch.zeros(latents[layer]), torch.ones(latents[layer])
            if above is not None:
                p_loc, p_raw = descent.steps[layer].net(above).chunk(2, -1)
                prior = p_loc, nn.functional.softplus(p_raw) + 1e-4
                precision = scale**-2 + prior[1] ** -2
                loc = (loc * scale**-2 + prior[0] * prior[1] ** -2) / precision
                scale = precision**-0.5
            above = loc + scale * torch.randn(5, latents[layer])
            total = total + dist.Normal(*prior).log_prob(above).sum(-1)
            total = total - dist.Normal(loc, scale).log_prob(above).sum(-1)
            z[layer] = above
        logits = descent.net.net(z[0])
    cross = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
    torch.testing.assert_close(found, total - cross, atol=1e-4, rtol=1e-4)


def test_likelihood_is_that_of_the_generative_model():
    """With one latent a layer, log p(x) by quadrature over both; importance sampling finds it."""
    lvae = LVAE(3, (1, 1), units=4, batch_norm=False, activation=nn.Tanh).double().eval()
    with torch.no_grad():  # messages so vague that the guide covers the posterior
        for head, raw in zip(lvae.guide.fn.heads, (2.0, 0.7), strict=True):
            head.weight.mul_(0.3)
            head.bias.copy_(torch.tensor([0.0, raw]))
    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    grid = torch.linspace(-8.0, 8.0, 401, dtype=torch.float64)
    with torch.no_grad():
        loc, scale = lvae.model.fn.prior(0, grid[:, None])
        below = dist.Normal(loc, scale).log_prob(grid)  # (z2, z1)
        logits = lvae.model.fn.net(grid[:, None])
    log_x = dist.Bernoulli(logits=logits).log_prob(x[:, None]).sum(-1)  # (N, z1)
    top = dist.Normal(0.0, 1.0).log_prob(grid)
    joint = log_x[:, None] + below + top[:, None]
    exact = joint.flatten(1).logsumexp(-1) + 2 * math.log(grid[1] - grid[0])
    found = log_likelihood(lvae, x, num_samples=50_000)
    assert ((found.value - exact).abs() < 4.5 * found.std_error).all()
    assert found.std_error.max() < 0.02
    bound = elbo(lvae, x, num_samples=20_000)
    assert (bound.value < exact + 4 * bound.std_error).all()


def test_model_and_guide_share_the_way_down():
    """One set of parameters, trained by either program, copied, kept and cast as one."""
    lvae = small()
    shared = {id(p) for p in lvae.model.fn.steps.parameters()}
    assert shared <= {id(p) for p in lvae.guide.parameters()}
    names = dict(lvae.named_parameters())
    assert len(names) == len({id(p) for p in lvae.parameters()})
    other = copy.deepcopy(lvae)
    assert other.guide.fn.descent is other.model.fn
    before = {n: p.clone() for n, p in lvae.named_parameters()}
    x = bits()
    svi = SVI(other.model, other.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x)
    assert all(torch.equal(p, before[n]) for n, p in lvae.named_parameters())
    assert all(not torch.equal(p, before[n]) for n, p in other.named_parameters())


def test_copy_dtype_and_file_keep_the_density(tmp_path):
    lvae, x = small((4, 3, 2)).eval(), bits(7)
    lvae.save(tmp_path / "lvae.pt")
    loaded = small((4, 3, 2)).eval().load(tmp_path / "lvae.pt")
    assert loaded.guide.fn.descent is loaded.model.fn
    with torch.no_grad():
        trace = pyro.poutine.trace(lvae.guide).get_trace(x)
    z = {name: trace.nodes[name]["value"] for name in ("z1", "z2", "z3")}

    def scores(pair, dtype=torch.float32):
        values = {name: value.to(dtype) for name, value in z.items()}
        programs = (pyro.poutine.condition(p, values) for p in (pair.model, pair.guide))
        with torch.no_grad():
            found = [pyro.poutine.trace(p).get_trace(x.to(dtype)).log_prob_sum() for p in programs]
        return torch.stack(found).float()

    expected = scores(lvae)
    for pair in (loaded, copy.deepcopy(lvae)):
        torch.testing.assert_close(scores(pair), expected)
    torch.testing.assert_close(scores(copy.deepcopy(lvae).double(), torch.float64), expected)


@pytest.mark.parametrize("loss", [None, ImportanceWeightedELBO(3)])
def test_warm_up_and_training(loss):
    """A fit with annealing raises the bound; SVI and torch reach every parameter."""
    x = torch.cat([torch.zeros(60, 6), torch.ones(60, 6)])
    lvae = small()
    start = elbo(lvae, x).mean
    result = fit(lvae, x, epochs=30, batch_size=40, lr=0.01, annealing=10, loss=loss, seed=0)
    assert result.history[0]["beta"] < 1.0
    assert result.history[-1]["beta"] == 1.0
    assert elbo(lvae, x, num_samples=10).mean > start + 2
    value = Trace_ELBO(max_plate_nesting=1)(lvae.model, lvae.guide)(x)
    value.backward()
    assert all(p.grad is not None for p in lvae.parameters())


def test_annealing_scales_every_layer():
    """At beta the loss is E[log m(x | z1)] + beta (all latent terms), on the same draws."""
    lvae, x = small().eval(), bits(20)
    seen = []

    def loss(model, guide, x):
        pyro.set_rng_seed(6)
        scaled = Trace_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x)
        pyro.set_rng_seed(6)
        inner = pyro.poutine.trace(lvae.guide).get_trace(x)
        outer = pyro.poutine.trace(pyro.poutine.replay(lvae.model, trace=inner)).get_trace(x)
        inner.compute_log_prob()
        outer.compute_log_prob()
        latent = sum(
            outer.nodes[z]["log_prob_sum"] - inner.nodes[z]["log_prob_sum"] for z in ("z1", "z2")
        )
        seen.append((scaled + outer.nodes["x"]["log_prob_sum"] + 0.3 * latent).detach())
        return scaled

    fit(lvae, x, epochs=1, batch_size=20, loss=loss, annealing=lambda _: 0.3, lr=0.0)
    assert abs(seen[0]) < 1e-3


@pytest.mark.parametrize("vectorize", [True, False])
def test_in_a_cascade(vectorize):
    """The topmost layer is the hidden site: names, prior, terms and the composed pair's ELBO."""
    lvae, gmm = small((4, 3, 2)), GMM(3, 2)
    x = bits()
    cascade = Cascade(lvae, gmm)
    greedy(cascade, x, epochs=2, seed=0)
    trace = pyro.poutine.trace(cascade.model).get_trace(x)
    assert {"0.z1", "0.z2", "0.z3", "1.component", "x"} <= set(trace.nodes)
    h = lvae.encode(x)
    torch.testing.assert_close(lvae.log_prior(h).value, dist.Normal(0.0, 1.0).log_prob(h).sum(-1))
    found = decompose(cascade, x.repeat(20, 1))
    loss = Trace_ELBO(num_particles=20, vectorize_particles=vectorize, max_plate_nesting=1)
    with torch.no_grad():
        cascade.eval()
        values = [-loss.loss(cascade.model, cascade.guide, x) / len(x) for _ in range(10)]
    spread = torch.tensor(values).std() / 10**0.5
    mean = sum(values) / 10
    assert abs(mean - found.elbo) < 5 * math.hypot(spread, 3 * found.elbo_error)
    assert cascade.sample(4).shape == (4, 6)
    assert cascade.decode(cascade.encode(x)).shape == x.shape


def test_an_analytic_kl_is_right_for_it():
    """Given z_{l+1} both laws are normal, so TraceMeanField_ELBO has the same mean."""
    lvae, x = small().eval(), bits(400)
    with torch.no_grad():
        pairs = [
            [kind(max_plate_nesting=1).loss(lvae.model, lvae.guide, x) for _ in range(30)]
            for kind in (Trace_ELBO, TraceMeanField_ELBO)
        ]
    one, two = (torch.tensor(v) for v in pairs)
    assert abs(one.mean() - two.mean()) < 4.5 * math.hypot(one.std(), two.std()) / 30**0.5


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("shape", [6, (2, 3)])
def test_shapes(likelihood, shape):
    full = (6,) if shape == 6 else shape
    lvae = LVAE(shape, (3, 2), units=(8, 4), layers=1, likelihood=likelihood)
    x = torch.zeros(5, *full)
    assert lvae.encode(x).shape == (5, 2)
    assert lvae.decode(torch.zeros(5, 2)).shape == x.shape
    assert lvae.sample(3).shape == (3, *full)
    assert log_weights(lvae, x, num_samples=2).shape == (2, 5)


def test_sizes_are_those_of_the_paper():
    """Four deterministic layers of 1000 upwards and downwards, two stochastic ones of 30."""
    lvae = LVAE(784)
    up = [m for m in lvae.guide.fn.trunks.modules() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in up] == [1000] * 4
    assert [m.out_features for m in lvae.guide.fn.heads] == [60, 60]
    norms = [m for m in lvae.modules() if isinstance(m, nn.BatchNorm1d)]
    assert [m.num_features for m in norms] == [1000] * 8


def test_refusals():
    with pytest.raises(ValueError, match="take two or more stochastic layers"):
        LVAE(6, (3,))
    with pytest.raises(ValueError, match=r"units=\(8, 4, 2\)"):
        LVAE(6, (3, 2), units=(8, 4, 2))
    with pytest.raises(ValueError, match="must be 'bernoulli' or 'gaussian'"):
        small(likelihood="poisson")
    with pytest.raises(ValueError, match="the sites x, z1, z1 are not all different"):
        small(hidden="z1")
    with pytest.raises(ValueError, match=r"LVAE: data of shape \(3, 5\) came for 'x'"):
        small().model(torch.zeros(3, 5))
