"""Importance-weighted losses: values and gradients against quadrature and enumeration."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumerated import BitPair, all_bits, cascade_exact
from pairs import modules
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO
from weighted_pairs import (
    bit_bound,
    bound,
    coin_bound,
    coin_pair,
    one_log_weight,
    one_pair,
    slopes,
    two_log_weight,
    two_pair,
)

from pyroboost import Cascade
from pyroboost.infer import fit, scale_latents
from pyroboost.infer.gradient_variance import gradient_variance
from pyroboost.infer.importance_weighted import ImportanceWeightedELBO
from pyroboost.infer.objectives import TemperedELBO, bound_estimator
from pyroboost.metamodel import MetaModel
from pyroboost.models import IWAE, VAE

STICK, DOUBLE = "sticking-the-landing", "doubly-reparameterised"
ROWS, DRAWS = 10_000, 50


class Tempered:
    """A loss over programs whose latent sites are scaled, as ``fit(annealing=...)`` scales them."""

    def __init__(self, loss, beta):
        self.loss, self.beta = loss, beta

    def differentiable_loss(self, model, guide, *args):
        model = scale_latents(self.beta)(model)
        guide = scale_latents(self.beta, everything=True)(guide)
        return self.loss.differentiable_loss(model, guide, *args)


def noise_of(pair, x, loss, beta=1.0, draws=DRAWS):
    """Mean gradients by the parameter's short name; model and guide share the roof."""
    found = gradient_variance(
        pair, x.expand(ROWS), loss=Tempered(loss, beta), num_draws=draws, seed=1
    )
    return {name.rsplit(".", 1)[-1]: noise for name, noise in found.items()}


def agrees(found, exact):
    """Whether minus the mean gradient is the exact one within 4.5 standard errors, everywhere."""
    return all(
        (found[n].mean + g).abs() < 4.5 * found[n].std_error + 1e-9 for n, g in exact.items()
    )


@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("gradient", ["standard", STICK, DOUBLE])
def test_gradients_are_those_of_the_quadrature(gradient, k, beta):
    """Each estimator's mean is autograd's gradient of the K-sample bound by quadrature.

    Sticking the landing leaves out the score of the guide, whose mean is zero for K = 1 only:
    for K = 2 it agrees with the quadrature that leaves it out, and not with the bound's gradient.
    """
    pair, x = one_pair(), torch.tensor(0.9, dtype=torch.float64)
    values = pair.guide.fn.values
    found = noise_of(pair, x, ImportanceWeightedELBO(k, gradient=gradient), beta)
    exact = slopes(bound(values, x, k, one_log_weight, beta=beta), values)
    if gradient == STICK and k > 1:
        kept = bound(values, x, k, one_log_weight, beta=beta, sticking=True)
        assert agrees(found, slopes(kept, values))
        assert not agrees(found, exact)
    else:
        assert agrees(found, exact)
    wrong = {name: 1.05 * g for name, g in exact.items()}
    assert not agrees(found, wrong)


@pytest.mark.parametrize(
    ("gradient", "k", "beta", "vectorize"),
    [
        ("standard", 2, 0.6, True),
        (STICK, 1, 0.6, True),
        (DOUBLE, 2, 0.6, True),
        (DOUBLE, 2, 1.0, False),
    ],
)
def test_hierarchical_guide_that_shares_a_parameter_with_the_model(gradient, k, beta, vectorize):
    """z1's law in the guide hangs on z2, and t belongs to both programs: the gradient is exact."""
    pair, x = two_pair(), torch.tensor(0.9, dtype=torch.float64)
    values = pair.guide.fn.values
    loss = ImportanceWeightedELBO(k, gradient=gradient, vectorize_particles=vectorize)
    found = noise_of(pair, x, loss, beta)
    value = bound(values, x, k, two_log_weight, beta=beta, dims=2, points=16)
    exact = slopes(value, values)
    assert agrees(found, exact)
    assert not agrees(found, {name: 1.1 * g for name, g in exact.items()})


@pytest.mark.parametrize("vectorize", [True, False])
def test_score_and_path_together(vectorize):
    """A coin has a score, the normal that hangs on it a path: enumeration and quadrature."""
    pair, x = coin_pair(), torch.tensor(0.9, dtype=torch.float64)
    values = pair.guide.fn.values
    loss = ImportanceWeightedELBO(2, vectorize_particles=vectorize)
    exact = slopes(coin_bound(values, x, 2), values)
    found = noise_of(pair, x, loss)
    assert agrees(found, exact)
    assert not agrees(found, {name: 1.15 * g for name, g in exact.items()})


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_bits_by_enumeration(beta):
    """Value and gradient of the two-sample bound of a sigmoid belief network, scores only."""
    pair, x = BitPair(3, 2, 0.8), all_bits(3)[[5]]
    parameters = [p for _, p in sorted(pair.named_parameters())]
    exact = bit_bound(pair, x, 2, beta).sum()
    slope = torch.autograd.grad(exact, parameters)
    loss = Tempered(ImportanceWeightedELBO(2), beta)
    noise = gradient_variance(pair, x.expand(ROWS, 3), loss=loss, num_draws=100, seed=2)
    for (name, found), g in zip(sorted(noise.items()), slope, strict=True):
        assert ((found.mean + g).abs() < 4.5 * found.std_error + 1e-7).all(), name
    many = x.expand(50_000, 3)
    value = -loss.differentiable_loss(pair.model, pair.guide, many).item() / len(many)
    assert abs(value - exact) < 0.02


def test_no_noise_is_left_where_the_guide_is_the_posterior():
    """Both path estimators give the guide no gradient there, the standard one gives it noise."""
    pair, x = one_pair(), torch.tensor([0.4, -1.0, 2.0], dtype=torch.float64)
    v = pair.guide.fn.values
    variance = 1 / (1 + v.a**2 / (2 * v.s).exp())
    with torch.no_grad():
        v.d.zero_()
        v.c.copy_(variance * v.a / (2 * v.s).exp())
        v.e.copy_(0.5 * variance.log())
    for gradient, least in ((STICK, 0.0), (DOUBLE, 0.0), ("standard", 1e-3)):
        pair.zero_grad()
        loss = ImportanceWeightedELBO(4, gradient=gradient)
        loss.differentiable_loss(pair.model, pair.guide, x).backward()
        size = max(v.c.grad.abs(), v.d.grad.abs(), v.e.grad.abs())
        assert size >= least
        assert gradient == "standard" or size < 1e-10


def test_variance_of_the_estimators():
    """With many particles the doubly reparameterised gradient of the guide is the quietest."""
    pair, x = one_pair(), torch.tensor(0.9, dtype=torch.float64)
    noise = {
        gradient: gradient_variance(
            pair, x.expand(50), loss=ImportanceWeightedELBO(32, gradient=gradient), seed=1
        )
        for gradient in ("standard", STICK, DOUBLE)
    }
    variances = {
        gradient: {name.rsplit(".", 1)[-1]: noise.variance for name, noise in found.items()}
        for gradient, found in noise.items()
    }
    for name in "cde":
        assert variances[DOUBLE][name] < 0.5 * variances["standard"][name], (name, variances)
    for name in "as":  # the model's gradient is the same estimator for all three
        assert variances[DOUBLE][name] == pytest.approx(variances["standard"][name])


def test_values_are_those_of_the_quadrature():
    pair, x = one_pair(), torch.tensor(0.9, dtype=torch.float64)
    values = pair.guide.fn.values
    for k, beta in ((1, 1.0), (2, 1.0), (3, 0.3)):
        exact = bound(values, x, k, one_log_weight, beta=beta, points=24)
        loss = Tempered(ImportanceWeightedELBO(k), beta)
        draws = 100_000
        value = -loss.differentiable_loss(pair.model, pair.guide, x.expand(draws)) / draws
        assert abs(value - exact) < 0.01


# Minibatches and weights


def subsampled(size):
    def index():
        return pyro.plate("data", 40, subsample_size=size)

    def model(x):
        with index() as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(len(rows)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with index() as rows:
            pyro.sample("z", dist.Normal(0.2 * x[rows], 1.0))

    return MetaModel(model, guide, visible="x", hidden="z")


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_minibatch_is_unbiased_for_all_data(vectorize):
    """The scale stands outside the logarithm; with Pyro's inside it the two differ by nats."""
    x = 1.5 * torch.randn(40)
    evidence = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).sum()
    means, errors = {}, {}
    for size in (40, 4):
        pair = subsampled(size)
        loss = ImportanceWeightedELBO(4, vectorize_particles=vectorize)
        count = 200 if size == 40 else 500
        drawn = -torch.tensor([loss.loss(pair.model, pair.guide, x) for _ in range(count)])
        means[size], errors[size] = drawn.mean(), drawn.std() / count**0.5
    assert abs(means[40] - means[4]) < 4 * math.hypot(errors[40], errors[4])
    assert means[40] < evidence + 4 * errors[40]
    assert means[4] < evidence + 4 * errors[4]
    pair = subsampled(4)
    pyros = RenyiELBO(alpha=0, num_particles=4, max_plate_nesting=1, vectorize_particles=vectorize)
    wrong = -sum(pyros.loss(pair.model, pair.guide, x) for _ in range(100)) / 100
    assert abs(wrong - means[40]) > 10 * errors[4]


def test_a_subsample_with_nothing_observed_keeps_its_scale():
    def program(loc):
        def run():
            with pyro.plate("data", 40, subsample_size=4):
                pyro.sample("z", dist.Normal(loc * torch.ones(4), 1.0))

        return run

    pyro.set_rng_seed(2)
    value = ImportanceWeightedELBO(1).loss(program(0.0), program(0.5))
    pyro.set_rng_seed(2)
    z = pyro.poutine.trace(program(0.5)).get_trace().nodes["z"]["value"]
    table = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.5, 1.0).log_prob(z)
    assert value == pytest.approx(-10 * float(table.sum()))


def test_without_a_scale_it_is_pyros_bound():
    """On whole data RenyiELBO with alpha = 0 is the same number on the same draws."""
    pair, x = one_pair(), torch.randn(7, dtype=torch.float64)
    pyros = RenyiELBO(alpha=0, num_particles=6, max_plate_nesting=1, vectorize_particles=True)
    pyro.set_rng_seed(3)
    theirs = pyros.loss(pair.model, pair.guide, x)
    pyro.set_rng_seed(3)
    assert ImportanceWeightedELBO(6).loss(pair.model, pair.guide, x) == pytest.approx(theirs)


class Weigh(pyro.poutine.messenger.Messenger):
    """Multiply the scale of every site, by 0 as well."""

    def __init__(self, scale):
        super().__init__()
        self.factor = scale

    def _pyro_sample(self, msg):
        msg["scale"] = msg["scale"] * self.factor


@pytest.mark.parametrize("make", [one_pair, coin_pair])
def test_weights_of_data_stand_outside(make):
    """The bound is linear in weights per datum, also with annealing, and zero weights are fine."""
    pair, x = make(), torch.randn(5, dtype=torch.float64)
    weights = torch.tensor([0.0, 2.0, 0.3, 1.0, 1.7], dtype=torch.float64)

    def loss(scale, gradient="standard"):
        pyro.set_rng_seed(5)
        weigh = Weigh(scale)
        elbo = Tempered(ImportanceWeightedELBO(3, gradient=gradient), 0.7)
        return elbo.differentiable_loss(weigh(pair.model), weigh(pair.guide), x)

    parts = torch.stack([loss(row) for row in torch.eye(5, dtype=torch.float64)])
    torch.testing.assert_close(loss(weights), (weights * parts).sum())
    torch.testing.assert_close(loss(2.5), 2.5 * parts.sum())
    for gradient in ("standard", STICK, DOUBLE) if make is one_pair else ("standard",):
        tensors = list(pair.guide.fn.values.parameters())
        whole = torch.autograd.grad(loss(weights, gradient), tensors)
        rows = [
            torch.autograd.grad(loss(row, gradient), tensors)
            for row in torch.eye(5, dtype=torch.float64)
        ]
        for found, *each in zip(whole, *rows, strict=True):
            torch.testing.assert_close(found, (weights * torch.stack(each)).sum())


def test_a_mask_leaves_data_out():
    """Masked data add nothing, and a masked observation leaves the prior against the guide."""
    pair, x = one_pair(), torch.randn(6, dtype=torch.float64)
    on = torch.tensor([True, False, True, True, False, True])
    loss = ImportanceWeightedELBO(3)

    def value(handler, guided=True):
        pyro.set_rng_seed(5)
        guide = handler(pair.guide) if guided else pair.guide
        return loss.differentiable_loss(handler(pair.model), guide, x)

    whole = value(pyro.poutine.mask(mask=on))
    torch.testing.assert_close(whole, value(Weigh(on.double())))
    guide = pyro.poutine.trace(pair.guide)
    pyro.set_rng_seed(5)
    with pyro.plate("particles", 3, dim=-2):
        law = guide.get_trace(x).nodes["z"]
    table = torch.where(on, 0.0, -law["fn"].log_prob(law["value"]))
    rest = (table.logsumexp(0) - math.log(3)).masked_fill(on, 0.0).sum()
    model_only = pyro.poutine.mask(mask=on)
    torch.testing.assert_close(value(model_only, guided=False), whole - rest)


def test_nested_plates_make_one_weight_per_datum():
    """Pixels in a plate within the data, on either side of it, are summed before the mean."""
    x = torch.randn(5, 3)

    def pair(data_dim):
        shape = (5, 1) if data_dim == -2 else (5,)
        value = x if data_dim == -2 else x.T

        def model():
            with pyro.plate("data", 5, dim=data_dim):
                z = pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0))
                with pyro.plate("pixels", 3, dim=-3 - data_dim):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=value)

        def guide():
            with pyro.plate("data", 5, dim=data_dim):
                mean = pyro.param("mean", torch.tensor(0.1))
                pyro.sample("z", dist.Normal(mean.expand(shape), 0.8))

        return model, guide

    losses = []
    for dim in (-1, -2):
        for vectorize in (True, False):
            for gradient in ("standard", DOUBLE):
                loss = ImportanceWeightedELBO(
                    4, max_plate_nesting=2, vectorize_particles=vectorize, gradient=gradient
                )
                pyro.set_rng_seed(1)
                losses.append(loss.differentiable_loss(*pair(dim)))
                losses[-1].backward()
    for index, value in enumerate(losses):
        pyro.set_rng_seed(1)
        vectorized = index // 2 % 2 == 0
        noise = torch.randn(4, 5) if vectorized else torch.stack([torch.randn(5) for _ in "1234"])
        z = 0.1 + 0.8 * noise
        table = dist.Normal(z[..., None], 1.0).log_prob(x).sum(-1)
        table = table + dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.1, 0.8).log_prob(z)
        torch.testing.assert_close(-value, (table.logsumexp(0) - math.log(4)).sum())


# In Pyro and in a fit


def test_trains_by_svi_and_reaches_every_parameter():
    x = (torch.rand(30, 6) < 0.3).float()
    for gradient in ("standard", STICK, DOUBLE):
        vae = VAE(6, 2, units=8)
        loss = ImportanceWeightedELBO(4, gradient=gradient)
        before = {n: p.clone() for n, p in vae.named_parameters()}
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), loss)
        losses = [svi.step(x) for _ in range(60)]
        assert sum(losses[-10:]) < sum(losses[:10])
        assert all(not torch.equal(p, before[n]) for n, p in vae.named_parameters())
        assert len(list(loss(vae.model, vae.guide).parameters())) == len(before)


def test_svi_gradient_is_the_differentiable_loss():
    pair, x = one_pair(), torch.randn(4, dtype=torch.float64)
    other = copy.deepcopy(pair)
    loss = ImportanceWeightedELBO(3, gradient=DOUBLE)
    pyro.set_rng_seed(1)
    value = loss.loss_and_grads(pair.model, pair.guide, x)
    pyro.set_rng_seed(1)
    tensor = loss.differentiable_loss(other.model, other.guide, x)
    tensor.backward()
    assert value == pytest.approx(tensor.item())
    for p, o in zip(pair.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, o.grad)


def test_over_a_cascade():
    """The composed pair's own two-sample bound lies between its ELBO and log p."""
    pairs = [BitPair(4, 3, 0.7), BitPair(3, 2, 0.7)]
    x = all_bits(4)[[1, 6]].repeat(3000, 1)
    cascade = Cascade(*pairs)
    exact = cascade_exact(pairs, x).sum()
    with torch.no_grad():
        single = Trace_ELBO(max_plate_nesting=1).loss(cascade.model, cascade.guide, x)
        several = ImportanceWeightedELBO(10).loss(cascade.model, cascade.guide, x)
    assert -single < -several < exact


def test_what_judges_a_fit():
    """The plain bound, unless loss or pair has an importance-weighted one."""
    plain, iwae = VAE(6, 2, units=8), IWAE(6, 2, num_samples=4, units=8)
    assert type(bound_estimator(plain, None, 3)) is Trace_ELBO
    assert type(bound_estimator(plain, TemperedELBO(0.5), 3)) is Trace_ELBO
    assert type(bound_estimator(iwae, TraceEnum_ELBO(), 3)) is TraceEnum_ELBO
    loss = ImportanceWeightedELBO(6)
    for pair, given, k in (
        (plain, loss, 6),
        (plain, loss.differentiable_loss, 6),
        (iwae, loss, 6),
        (iwae, None, 4),
        (iwae, Trace_ELBO(), 4),
    ):
        judge = bound_estimator(pair, given, 2)
        assert (judge.elbo.num_particles, judge.draws) == (k, 2)
    with pytest.raises(ValueError, match="num_validation_particles is 0"):
        bound_estimator(plain, None, 0)


def test_held_out_bound_of_a_fit_is_the_weighted_one():
    """One epoch at lr 0: the held-out bound is the K-sample bound, above the plain ELBO."""
    pair, x = one_pair(), torch.linspace(-2.0, 2.0, 2000, dtype=torch.float64)
    words = {"validation": x, "epochs": 1, "lr": 0.0, "batch_size": 2000}
    found = fit(pair, x, loss=ImportanceWeightedELBO(3), **words).history[0]["validation_bound"]
    plain = fit(pair, x, **words).history[0]["validation_bound"]
    values = pair.guide.fn.values
    with torch.no_grad():
        few = x[::50]
        one, three = (
            sum(bound(values, v, k, one_log_weight, points=20) for v in few) / len(few)
            for k in (1, 3)
        )
    assert abs(plain - one) < 0.05
    assert abs(found - three) < 0.05
    assert three - one > 0.1


def test_annealing_of_a_fit_is_inside_the_logarithm():
    """The loss that a fit reports at beta = 0.5 is the annealed bound of the quadrature."""
    pair, x = one_pair(), torch.full((20_000,), 0.9, dtype=torch.float64)
    result = fit(
        pair,
        x,
        epochs=1,
        batch_size=20_000,
        lr=0.0,
        loss=ImportanceWeightedELBO(2),
        annealing=lambda _: 0.5,
    )
    exact = bound(pair.guide.fn.values, x[0], 2, one_log_weight, beta=0.5)
    assert abs(result.history[0]["loss"] + exact) < 0.02


def test_weighted_fit_is_the_weighted_bound():
    """Two values of x with weights 0.5 and 1.5, annealed: the loss is their weighted bounds."""
    pair, x = one_pair(), torch.tensor([0.9, -0.7], dtype=torch.float64).repeat(10_000)
    weights = torch.tensor([0.5, 1.5], dtype=torch.float64).repeat(10_000)
    words = {"epochs": 1, "batch_size": len(x), "lr": 0.0, "annealing": lambda _: 0.5}
    for gradient in ("standard", DOUBLE):
        loss = ImportanceWeightedELBO(2, gradient=gradient)
        row = fit(pair, x, loss=loss, weights=weights, **words).history[0]
        values = pair.guide.fn.values
        one, two = (bound(values, v, 2, one_log_weight, beta=0.5) for v in x[:2])
        assert abs(row["loss"] + 0.25 * one + 0.75 * two) < 0.02


def test_draws_that_no_parameter_moves_get_no_weight():
    """A model that gives most draws a density of zero has a finite loss and gradient."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            shift = pyro.param("shift", torch.tensor(0.3))
            inside = (z - shift).abs() < 1.5
            pyro.factor("gate", torch.where(inside, 0.0, -math.inf))
            pyro.sample("x", dist.Normal(shift * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0).expand([len(x)]))

    for gradient in ("standard", STICK, DOUBLE):
        loss = ImportanceWeightedELBO(30, gradient=gradient)
        value = loss.differentiable_loss(model, guide, torch.randn(20))
        value.backward()
        assert value.isfinite()
        for name in ("shift", "m"):
            slope = pyro.param(name).unconstrained().grad
            assert slope.isfinite()
            assert slope != 0.0


def test_cascades_have_hierarchical_guides():
    """q(h2 | h1) hangs on h1: the two unbiased estimators have one mean."""
    cascade = Cascade(modules(2, 2), modules(2, 1)).double()
    x = torch.tensor([[0.8, -1.1]], dtype=torch.float64).expand(4000, 2)
    found = [
        gradient_variance(
            cascade,
            x,
            loss=ImportanceWeightedELBO(3, gradient=gradient),
            num_draws=40,
            seed=seed,
        )
        for seed, gradient in enumerate(("standard", DOUBLE, STICK))
    ]
    close = [
        all(
            (
                (noise.mean - other[n].mean).abs()
                < 4.5 * torch.hypot(noise.std_error, other[n].std_error) + 1e-9
            ).all()
            for n, noise in found[0].items()
        )
        for other in found[1:]
    ]
    assert close == [True, False]
    assert all(noise.variance > 0 for noise in found[1].values())


def test_tempered_elbo_is_the_annealed_bound():
    pair, x = one_pair(), torch.full((50_000,), 0.9, dtype=torch.float64)
    with torch.no_grad():
        exact = bound(pair.guide.fn.values, x[0], 1, one_log_weight, beta=0.3)
        value = -TemperedELBO(0.3).loss(pair.model, pair.guide, x) / len(x)
    assert abs(value - exact) < 0.02
    loss = TemperedELBO(lambda step: (step + 1) / 4, max_plate_nesting=1)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), loss)
    betas = []
    for _ in range(3):
        svi.step(x[:5])
        betas.append(loss.value)
    loss.differentiable_loss(pair.model, pair.guide, x[:5]).backward()
    assert [*betas, loss.value] == [0.25, 0.5, 0.75, 1.0]
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="take a finite positive number"):
            TemperedELBO(beta)


# Refusals


def test_refuses_settings():
    with pytest.raises(ValueError, match="num_particles is 0"):
        ImportanceWeightedELBO(0)
    with pytest.raises(ValueError, match="gradient is 'dreg'"):
        ImportanceWeightedELBO(2, gradient="dreg")
    with pytest.raises(ValueError, match="num_draws is 1"):
        gradient_variance(one_pair(), torch.zeros(2, dtype=torch.float64), num_draws=1)


@pytest.mark.parametrize("gradient", [STICK, DOUBLE])
def test_refuses_draws_without_a_path(gradient):
    pair = BitPair(3, 2)
    loss = ImportanceWeightedELBO(2, gradient=gradient)
    with pytest.raises(ValueError, match="'h' of the guide is not one; use gradient='standard'"):
        loss.differentiable_loss(pair.model, pair.guide, all_bits(3))


def test_a_point_mass():
    """Its gradient is that of log p under two estimators; the third has no meaning for it."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Delta(pyro.param("m", torch.tensor([0.3, -0.2])), event_dim=1))

    x = torch.randn(4)
    for gradient in ("standard", STICK):
        loss = ImportanceWeightedELBO(3, gradient=gradient, vectorize_particles=False)
        value = loss.differentiable_loss(model, guide, x)
        m = pyro.param("m").detach().clone().requires_grad_()
        exact = (
            dist.Normal(0.0, 1.0).log_prob(m).sum() + dist.Normal(m.sum(), 1.0).log_prob(x).sum()
        )
        torch.testing.assert_close(-value, exact)
        (found,) = torch.autograd.grad(-value, pyro.param("m").unconstrained())
        torch.testing.assert_close(found, *torch.autograd.grad(exact, m))
    with pytest.raises(ValueError, match="'z' is a point mass"):
        ImportanceWeightedELBO(3, gradient=DOUBLE).differentiable_loss(model, guide, x)


def test_nesting_is_guessed():
    pair, x = one_pair(), torch.randn(5, dtype=torch.float64)
    loss = ImportanceWeightedELBO(3, max_plate_nesting=math.inf)
    loss.loss(pair.model, pair.guide, x)
    assert loss.max_plate_nesting == 2
    pyro.set_rng_seed(1)
    value = loss.loss(pair.model, pair.guide, x)
    pyro.set_rng_seed(1)
    assert value == ImportanceWeightedELBO(3).loss(pair.model, pair.guide, x)


def programs(model_sites, guide_sites):
    """Programs that sample the named sites as told: (name, scale, plates, observed)."""

    def program(sites):
        def run():
            known = {}
            for name, scale, plates, observed in sites:
                with pyro.poutine.scale(scale=scale):
                    for p, n, d in plates:
                        if p not in known:
                            known[p] = pyro.plate(p, 6, subsample_size=n, dim=d)
                    stack = [known[p] for p, _, _ in plates]
                    for plate in stack:
                        plate.__enter__()
                    value = torch.zeros(()) if observed else None
                    pyro.sample(name, dist.Normal(0.0, 1.0), obs=value)
                    for plate in reversed(stack):
                        plate.__exit__(None, None, None)

        return run

    return program(model_sites), program(guide_sites)


DATA, PART, OTHER = [("data", 6, -1)], [("data", 3, -1)], [("other", 6, -1)]
Z, X = ("z", 1.0, DATA, False), ("x", 1.0, DATA, True)


@pytest.mark.parametrize(
    ("model", "guide", "words"),
    [
        ([Z, X], [Z, ("w", 1.0, DATA, False)], "the guide draws 'w', which the model lacks"),
        ([Z, ("w", 1.0, DATA, False), X], [Z], "does not draw the model's latent site 'w'"),
        ([Z, X], [("z", 1.0, OTHER, False)], "'z' lies in other plates in the guide"),
        (
            [("z", 1.0, [], False), ("x", 1.0, PART, True)],
            [("z", 1.0, [], False)],
            "the plate 'data' is subsampled and holds 'x' but not every other site",
        ),
        ([Z, X, ("y", 0.5, DATA, True)], [Z], "'x' and 'y' have different scales"),
        ([Z, X], [("z", 0.5, DATA, False)], "'z' is scaled by 0.5 and 'z' by 1 beyond their data"),
        (
            [("z", torch.rand(6), DATA, False), X],
            [Z],
            "the scale of 'z' varies over data in another way",
        ),
        (
            [("z", torch.rand(6), [], False), ("x", torch.rand(6), [], True)],
            [("z", 1.0, [], False)],
            "the scale of 'x' varies along dimension -1, which is no plate over data",
        ),
    ],
)
def test_refuses_pairs_without_a_bound_per_datum(model, guide, words):
    loss = ImportanceWeightedELBO(2, vectorize_particles=False)
    with pytest.raises(ValueError, match=words):
        loss.loss(*programs(model, guide))


def test_refuses_loops_over_data():
    def program(observed):
        def run():
            for i in pyro.plate("data", 2):
                pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
                if observed:
                    pyro.sample(f"x{i}", dist.Normal(0.0, 1.0), obs=torch.zeros(()))

        return run

    with pytest.raises(ValueError, match="the plate 'data' around 'z0' runs in a loop"):
        ImportanceWeightedELBO(2).loss(program(True), program(False))


@pytest.mark.parametrize("count", [0, 2.5])
def test_a_number_of_particles_that_is_none_is_refused(count):
    with pytest.raises(ValueError, match="whole number"):
        ImportanceWeightedELBO(count)
