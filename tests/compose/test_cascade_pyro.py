"""Everything that Pyro does with a pair, done with a cascade."""

import copy
import importlib.util
import io
import itertools
import math
import warnings
from contextlib import redirect_stdout

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumerated import BitPair, all_bits, cascade_elbo, cascade_exact
from pairs import data_plate, modules, standard
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Importance,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.inspect import (
    generate_graph_specification,
    get_dependencies,
    get_model_relations,
)
from torch import nn

from pyroboost import Cascade, MetaModel
from pyroboost.handlers import is_plate


def gaussians():
    return Cascade(modules(4, 3), modules(3, 2), modules(2, 2))


def bits(*sizes, scale=1.0):
    return Cascade(*(BitPair(v, h, scale) for v, h in itertools.pairwise(sizes)))


@pytest.fixture
def x():
    return torch.randn(5, 4)


def mean_and_error(draw, count):
    values = torch.tensor([draw() for _ in range(count)])
    return values.mean().item(), values.std().item() / math.sqrt(count)


# SVI and its ELBOs


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("vectorised", [False, True])
def test_elbos_of_a_bit_cascade_against_enumeration(elbo, vectorised):
    cascade, x = bits(3, 2, 2), all_bits(3)
    exact = cascade_elbo(list(cascade), x).sum().item()
    particles = 200 if vectorised else 1
    loss = elbo(num_particles=particles, vectorize_particles=vectorised, max_plate_nesting=1)
    count = 10 if vectorised else 60
    mean, error = mean_and_error(lambda: -loss.loss(cascade.model, cascade.guide, x), count)
    assert abs(mean - exact) < 4 * error
    assert error < 0.7


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO])
@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites:UserWarning")
def test_svi_trains_all_stages_together(elbo, x):
    cascade = gaussians()
    before = {n: t.detach().clone() for n, t in cascade.named_trainable(x).items()}
    svi = SVI(cascade.model, cascade.guide, pyro.optim.Adam({"lr": 0.02}), elbo())
    losses = [svi.step(x) for _ in range(25)]
    assert sum(losses[-8:]) < sum(losses[:8])
    after = cascade.named_trainable(x)
    assert all(not torch.equal(before[n], t) for n, t in after.items())
    assert len(after) == 15


def test_vectorised_particles_agree_with_sequential_ones(x):
    cascade = gaussians()
    one = Trace_ELBO()
    many = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    mean, error = mean_and_error(lambda: one.loss(cascade.model, cascade.guide, x), 100)
    vector, other = mean_and_error(lambda: many.loss(cascade.model, cascade.guide, x), 10)
    assert abs(mean - vector) < 4 * math.hypot(error, other)


def test_vectorised_particles_add_one_dimension_to_every_site(x):
    cascade = gaussians()
    with poutine.trace() as tr, pyro.plate("particles", 7, dim=-2):
        cascade.guide(x)
    tr.trace.compute_log_prob()
    for i, size in enumerate((3, 2, 2)):
        assert tr.trace.nodes[f"{i}.z"]["value"].shape == (7, 5, size)
        assert tr.trace.nodes[f"{i}.z"]["log_prob"].shape == (7, 5)


def test_mean_field_elbo_is_refused_by_name(x):
    """Whose analytic KL would treat the prior of an inner site as independent of that site."""
    for cascade, batch in ((gaussians(), x), (gaussians()[:2], x)):
        loss = TraceMeanField_ELBO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match="TraceMeanField_ELBO on a Cascade"):
                loss.loss(cascade.model, cascade.guide, batch)


@pytest.mark.filterwarnings("ignore:Failed to verify mean field:UserWarning")
def test_mean_field_elbo_of_one_stage_is_right(x):
    """Its hidden site has no stage above, so that nothing stands in the way of the KL."""
    cascade = gaussians()[:1]
    many = {"num_particles": 400, "vectorize_particles": True, "max_plate_nesting": 1}
    exact = exact_gaussian_elbo(list(cascade), x).sum().item()
    for elbo in (TraceMeanField_ELBO, Trace_ELBO):
        loss = elbo(**many)
        mean, error = mean_and_error(
            lambda loss=loss: -loss.loss(cascade.model, cascade.guide, x), 5
        )
        assert abs(mean - exact) < 6 * error


@pytest.mark.parametrize(
    "law",
    [
        dist.Normal(torch.zeros(3), 1.0),
        dist.Normal(torch.zeros(3), 1.0).to_event(1),
        dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, False, True])),
        dist.Bernoulli(torch.full((3,), 0.5)),
        dist.Delta(torch.zeros(3)),
        dist.Gamma(torch.ones(3), 1.0).expand([2, 3]),
        dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
        dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), []),
    ],
)
def test_no_law_of_a_guide_has_an_analytic_kl_to_an_inner_site(law):
    from pyroboost.compose._joints import Chained

    with pytest.raises(RuntimeError, match="TraceMeanField_ELBO on a Cascade"):
        torch.distributions.kl_divergence(law, Chained(law, True))


def test_marks_of_the_cascade_leave_laws_as_they_are():
    from pyroboost.compose._joints import Chained

    law = dist.Normal(torch.zeros(3), 2.0).to_event(1)
    marked = Chained(law, True).expand([4])
    value = marked.sample()
    assert isinstance(marked, Chained)
    assert torch.equal(marked.log_prob(value), law.log_prob(value))
    assert marked.has_rsample
    assert marked.support is law.support or str(marked.support) == str(law.support)


# Enumeration


def category_pair(sizes, *, enumerate_in="guide", private=False, name="c", plate="data"):
    """Categorical h under categorical x; optionally with a private discrete site in the model."""
    visible, hidden = sizes
    infer = {"enumerate": "parallel"}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.prior = nn.Parameter(torch.randn(hidden))
            self.table = nn.Parameter(torch.randn(2, hidden, visible))

        def forward(self, x):
            with pyro.plate(plate, x.shape[-1]):
                h = pyro.sample(name, dist.Categorical(logits=self.prior))
                p = torch.tensor(0)
                if private:
                    p = pyro.sample("p", dist.Bernoulli(0.3), infer=infer).long()
                pyro.sample("x", dist.Categorical(logits=self.table[p, h]), obs=x)

        def log_joint(self):
            """log m(x, h) with the private site summed out.  # (hidden, visible)"""
            rows = self.table.log_softmax(-1)
            if private:
                weight = torch.tensor([0.7, 0.3]).log()
                rows = (rows + weight[:, None, None]).logsumexp(0)
            else:
                rows = rows[0]
            return self.prior.log_softmax(-1)[:, None] + rows

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(visible, hidden))

        def forward(self, x):
            with pyro.plate(plate, x.shape[-1]):
                law = dist.Categorical(logits=self.table[x])
                pyro.sample(name, law, infer=infer if enumerate_in == "guide" else {})

    return MetaModel(Model(), Guide(), visible="x", hidden=name)


def category_elbo(pairs, x):
    """The ELBO of a cascade of category pairs by summing over all hidden values."""
    law, elbo = torch.eye(pairs[0].model.fn.table.shape[-1])[x], 0.0
    for i, pair in enumerate(pairs):
        log_q, joint = pair.guide.fn.table.log_softmax(-1), pair.model.fn.log_joint()
        prior = pair.model.fn.prior.log_softmax(-1)
        log_m = joint if i == len(pairs) - 1 else joint - prior[:, None]
        elbo = elbo + (law @ (log_q.exp() * (log_m.T - log_q)).sum(-1)).sum()
        law = law @ log_q.exp()
    return elbo


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("plates", [("data", "data"), ("data", "rows")])
def test_enumeration_in_the_guide_is_exact(private, plates):
    """Every hidden site enumerated: the loss is the exact ELBO, also for plates of other names."""
    pairs = [
        category_pair((4, 3), private=private, plate=plates[0]),
        category_pair((3, 2), private=private, plate=plates[1]),
        category_pair((2, 3), plate=plates[1]),
    ]
    cascade, x = Cascade(*pairs), torch.tensor([0, 1, 2, 3, 3])
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    found = -loss.loss(cascade.model, cascade.guide, x)
    exact = category_elbo(pairs, x)
    assert abs(found - exact.item()) < 1e-4
    parameters = list(cascade.parameters())
    surrogate = -loss.differentiable_loss(cascade.model, cascade.guide, x)
    grads, expected = (
        torch.autograd.grad(value, parameters, allow_unused=True) for value in (surrogate, exact)
    )
    for grad, known in zip(grads, expected, strict=True):
        # Priors below the top do not count.
        found_grad = torch.zeros_like(known) if grad is None else grad
        assert torch.allclose(found_grad, known, atol=1e-4)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
def test_sampled_categories_agree_with_enumeration(elbo):
    pairs = [
        category_pair((4, 3), enumerate_in="nowhere"),
        category_pair((3, 2), enumerate_in="nowhere", plate="rows"),
    ]
    cascade, x = Cascade(*pairs), torch.tensor([0, 1, 2, 3, 3])
    loss = elbo(num_particles=300, vectorize_particles=True, max_plate_nesting=1)
    mean, error = mean_and_error(lambda: -loss.loss(cascade.model, cascade.guide, x), 20)
    assert abs(mean - category_elbo(pairs, x).item()) < 4 * error


def test_enumeration_of_the_top_alone():
    pairs = [category_pair((4, 3), enumerate_in="nowhere"), category_pair((3, 2))]
    cascade, x = Cascade(*pairs), torch.tensor([0, 1, 2, 3, 3])
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    mean, error = mean_and_error(lambda: -loss.loss(cascade.model, cascade.guide, x), 80)
    assert abs(mean - category_elbo(pairs, x).item()) < 4 * error


def test_enumeration_below_a_sampled_site_is_refused():
    pairs = [category_pair((4, 3)), category_pair((3, 2), enumerate_in="nowhere")]
    cascade, x = Cascade(*pairs), torch.tensor([0, 1, 2, 3, 3])
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    with pytest.raises(RuntimeError, match=r"'0.c' is enumerated and the hidden site of stage 1 "):
        loss.loss(cascade.model, cascade.guide, x)


@pytest.mark.parametrize("where", ["bottom", "top"])
def test_private_sites_enumerated_in_the_model(where):
    """Continuous hidden sites with a discrete private site that the guide does not know."""

    def make(visible, hidden):
        net, shift = nn.Linear(hidden, visible), torch.tensor([0.0, 1.0])

        def model(x):
            with data_plate(x):
                z = pyro.sample("z", standard(hidden, x))
                c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                loc = net(z) + shift[c.long()][..., None]
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

        def summed(x):
            with data_plate(x):
                z = pyro.sample("z", standard(hidden, x))
                loc = net(z)[..., None, :] + shift[:, None]
                parts = dist.Normal(loc, 1.0).to_event(1)
                law = dist.MixtureSameFamily(
                    dist.Categorical(torch.tensor([0.7, 0.3]).expand(loc.shape[:-1])), parts
                )
                pyro.sample("x", law, obs=x)

        guide = modules(visible, hidden).guide.fn
        return (
            MetaModel(model, guide, visible="x", hidden="z"),
            MetaModel(summed, guide, visible="x", hidden="z"),
        )

    discrete, summed = make(4, 3) if where == "bottom" else make(3, 2)
    other = modules(3, 2) if where == "bottom" else modules(4, 3)
    stack = (lambda m: (m, other)) if where == "bottom" else (lambda m: (other, m))
    x = torch.randn(5, 4)
    cascade, expected = Cascade(*stack(discrete)), Cascade(*stack(summed))
    torch.manual_seed(1)
    one = TraceEnum_ELBO(max_plate_nesting=1).loss(cascade.model, cascade.guide, x)
    torch.manual_seed(1)
    two = Trace_ELBO().loss(expected.model, expected.guide, x)
    assert abs(one - two) < 1e-3


# Predictive, Importance


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel, x):
    cascade = gaussians()
    kind = {"parallel": parallel, "num_samples": 6}
    prior = Predictive(poutine.uncondition(cascade.model), **kind)(x)
    assert {n: tuple(v.shape) for n, v in prior.items()} == {
        "2.z": (6, 5, 2),
        "1.z": (6, 5, 2),
        "0.z": (6, 5, 3),
        "x": (6, 5, 4),
    }
    posterior = Predictive(poutine.uncondition(cascade.model), guide=cascade.guide, **kind)(x)
    assert posterior["x"].shape == (6, 5, 4)
    assert posterior["0.z"].shape[:2] == (6, 5)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_from_the_composed_law(parallel):
    """Prior predictive mean and variance of two linear Gaussian stages."""
    cascade = Cascade(modules(1, 1), modules(1, 1))
    n, rows = (150, 2) if not parallel else (40_000, 2)
    x = torch.zeros(rows, 1)
    drawn = Predictive(poutine.uncondition(cascade.model), num_samples=n, parallel=parallel)(x)["x"]
    (w0, b0), (w1, b1) = (
        (s.model.fn.net.weight.item(), s.model.fn.net.bias.item()) for s in cascade
    )
    variance = w0**2 * (w1**2 + 0.64) + 0.64
    assert abs(drawn.mean().item() - (w0 * b1 + b0)) < 5 * math.sqrt(variance / drawn.numel())
    assert abs(drawn.var().item() / variance - 1) < 5 * math.sqrt(2 / drawn.numel())


def test_importance_estimates_the_evidence():
    cascade, x = bits(3, 2, 2, scale=0.5), all_bits(3)[5:6]
    torch.manual_seed(0)
    posterior = Importance(cascade.model, cascade.guide, num_samples=250).run(x)
    weights = torch.stack(posterior.log_weights).exp()
    exact = cascade_exact(list(cascade), x).exp().item()
    error = weights.std().item() / math.sqrt(250)
    assert abs(weights.mean().item() - exact) < 4 * error
    assert error < 0.2 * exact
    assert posterior.get_normalized_weights().shape == (250,)


# NUTS


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nuts_on_continuous_latents():
    """The posterior of a linear Gaussian chain is Gaussian and known."""
    cascade, x = Cascade(modules(1, 1), modules(1, 1)), torch.tensor([[1.5]])
    (w0, b0), (w1, b1) = (
        (s.model.fn.net.weight.item(), s.model.fn.net.bias.item()) for s in cascade
    )
    mcmc = MCMC(NUTS(cascade.model), num_samples=100, warmup_steps=50, disable_progbar=True)
    mcmc.run(x)
    samples = mcmc.get_samples()
    assert {n: v.shape[1:] for n, v in samples.items()} == {"0.z": (1, 1), "1.z": (1, 1)}
    prior_variance = w1**2 + 0.64
    precision = 1 / prior_variance + w0**2 / 0.64
    mean = (b1 / prior_variance + w0 * (1.5 - b0) / 0.64) / precision
    drawn = samples["0.z"].flatten()
    error = math.sqrt(1 / precision / 15)  # an effective size that 100 draws easily have
    assert abs(drawn.mean().item() - mean) < 4 * error


class Component(MetaModel):
    """A Gaussian mixture as a pair that can sum its component out."""

    def __init__(self, visible, count):
        loc, self_weight = torch.randn(count, visible), torch.ones(count)

        def model(x):
            with data_plate(x):
                c = pyro.sample("c", dist.Categorical(self_weight), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(loc[c], 1.0).to_event(1), obs=x)

        def guide(x):
            with data_plate(x):
                logits = dist.Normal(loc, 1.0).to_event(1).log_prob(x[..., None, :])
                pyro.sample("c", dist.Categorical(logits=logits))

        super().__init__(model, guide, visible="x", hidden="c")
        self.loc = loc

    @property
    def marginal(self):
        loc = self.loc

        def program(x):
            with data_plate(x):
                parts = dist.Normal(loc, 1.0).to_event(1)
                weight = dist.Categorical(torch.ones(len(loc)))
                pyro.sample("x", dist.MixtureSameFamily(weight, parts), obs=x)

        return program


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nuts_on_a_discrete_top_is_refused_and_its_marginal_runs(x):
    cascade = Cascade(modules(4, 2), Component(2, 3))
    with pytest.raises(RuntimeError, match=r"one copy for each value of the enumerated site '1.c'"):
        MCMC(NUTS(cascade.model), num_samples=2, warmup_steps=2, disable_progbar=True).run(x)
    mcmc = MCMC(NUTS(cascade.marginal), num_samples=4, warmup_steps=4, disable_progbar=True)
    mcmc.run(x)
    assert mcmc.get_samples()["0.z"].shape == (4, 5, 2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nuts_below_two_discrete_stages_is_refused(x):
    """Copies that come from further up than the stage directly above."""

    class Discrete(Component):
        def __init__(self):
            super().__init__(2, 3)

    def model(x):
        with pyro.plate("data", x.shape[-1]):
            b = pyro.sample("b", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            probs = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])[b.long()]
            pyro.sample("x", dist.Categorical(probs), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[-1]):
            pyro.sample("b", dist.Bernoulli(torch.full(x.shape, 0.5)))

    top = MetaModel(model, guide, visible="x", hidden="b")
    cascade = Cascade(modules(4, 2), Discrete(), top)
    with pytest.raises(RuntimeError, match="one copy for each value"):
        MCMC(NUTS(cascade.model), num_samples=2, warmup_steps=2, disable_progbar=True).run(x)


def test_marginal_of_a_cascade_is_the_sum_over_its_top():
    cascade = Cascade(modules(4, 2), Component(2, 3))
    z, x = torch.randn(5, 2), torch.randn(5, 4)
    total = []
    for c in range(3):
        fixed = poutine.condition(cascade.model, data={"0.z": z, "1.c": torch.full((5,), c)})
        trace = poutine.trace(fixed).get_trace(x)
        trace.compute_log_prob()
        total.append(sum(trace.nodes[n]["log_prob"] for n in ("0.z", "1.c", "x")))
    fixed = poutine.condition(cascade.marginal, data={"0.z": z})
    found = poutine.trace(fixed).get_trace(x).log_prob_sum()
    assert torch.allclose(found, torch.stack(total).logsumexp(0).sum(), atol=1e-5)
    assert Cascade(modules(4, 2), modules(2, 2)).marginal is None


# Inspection


def test_relations_of_the_model_are_those_of_the_chain(x):
    cascade = gaussians()
    relations = get_model_relations(cascade.model, (x,))
    found = {n: set(up) for n, up in relations["sample_sample"].items()}
    assert found == {"2.z": set(), "1.z": {"2.z"}, "0.z": {"1.z"}, "x": {"0.z"}}
    assert relations["observed"] == ["x"]
    assert relations["plate_sample"] == {"data": ["2.z", "1.z", "0.z", "x"]}
    assert set(relations["sample_dist"].values()) == {"Normal"}
    guide = get_dependencies(cascade.guide, (x,))["prior_dependencies"]
    assert {n: set(up) for n, up in guide.items()} == {
        "0.z": {"0.z"},
        "1.z": {"0.z", "1.z"},
        "2.z": {"1.z", "2.z"},
    }


@pytest.mark.skipif(
    importlib.util.find_spec("graphviz") is None, reason="render_model needs python-graphviz"
)
def test_render_model(x):
    source = pyro.render_model(gaussians().model, model_args=(x,), render_params=True).source
    for site in ("0.z", "1.z", "2.z", "x"):
        assert site in source


def test_graph_of_the_model_shows_sites_plate_and_params(x):
    """What render_model draws, up to the drawing itself."""
    cascade = gaussians()
    relations = get_model_relations(cascade.model, (x,))
    graph = generate_graph_specification(relations, render_params=True)
    assert graph["plate_groups"]["data"] == ["2.z", "1.z", "0.z", "x"]
    assert {("2.z", "1.z"), ("1.z", "0.z"), ("0.z", "x")} <= set(graph["edge_list"])
    assert len(relations["param_constraint"]) == 6


def test_format_shapes_names_every_site(x):
    cascade = gaussians()
    trace = poutine.trace(cascade.model).get_trace(x)
    trace.compute_log_prob()
    text = trace.format_shapes()
    assert all(name in text for name in ("0.z", "1.z", "2.z", "log_prob 5"))


def test_nothing_is_printed_and_nothing_is_left(x):
    cascade, state = gaussians(), torch.get_rng_state()
    with redirect_stdout(io.StringIO()) as out:
        cascade.log_prior(torch.zeros(5, 2), template=x)
        copy.deepcopy(cascade)
    assert out.getvalue() == ""
    assert torch.equal(state, torch.get_rng_state())
    cascade.encode(x)
    cascade.sample(3)
    assert list(pyro.get_param_store()) == []


# Leading dimensions


def counting_from_the_left(visible, hidden):
    base = modules(visible, hidden)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(base.guide.fn.net(x), 0.5).to_event(1))

    return MetaModel(base.model.fn, guide, visible="x", hidden="z")


class NormModel(nn.Module):
    """A decoder with batch norm, folded where ``fold`` says so."""

    def __init__(self, visible, hidden, fold):
        super().__init__()
        self.norm, self.net = nn.BatchNorm1d(hidden), nn.Linear(hidden, visible)
        self.fold, self.hidden = fold, hidden

    def forward(self, x):
        with data_plate(x):
            z = pyro.sample("z", standard(self.hidden, x))
            if self.fold:
                out = self.norm(z.reshape(-1, self.hidden)).reshape(z.shape)
            else:
                out = self.norm(z)
            pyro.sample("x", dist.Normal(self.net(out), 0.8).to_event(1), obs=x)


def normed(visible, hidden, fold):
    guide = modules(visible, hidden).guide.fn
    return MetaModel(NormModel(visible, hidden, fold), guide, visible="x", hidden="z")


def vectorised(cascade, x):
    return Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=1).loss(
        cascade.model, cascade.guide, x
    )


def test_a_stage_that_counts_its_data_from_the_left_is_refused(x):
    cascade = Cascade(modules(4, 3), counting_from_the_left(3, 2))
    message = r"stage 1 \(MetaModel\) cannot take values with leading dimensions .* one by one"
    with pytest.raises(ValueError, match=message):
        vectorised(cascade, x)
    assert math.isfinite(Trace_ELBO(num_particles=3).loss(cascade.model, cascade.guide, x))


@pytest.mark.parametrize("rows", [5, 3])
def test_batch_norm_on_three_dimensions_is_refused(rows):
    """Also where as many data as hidden units let it pass, and normalise the wrong dimension."""
    x = torch.randn(rows, 4)
    cascade = Cascade(normed(4, 3, fold=False), modules(3, 2))
    with pytest.raises(ValueError, match=r"stage 0 \(MetaModel\) cannot take values with leading"):
        vectorised(cascade, x)
    with pytest.raises(ValueError, match="stage 0"):
        Predictive(cascade.model, num_samples=4, parallel=True)(x)
    assert math.isfinite(Trace_ELBO(num_particles=3).loss(cascade.model, cascade.guide, x))


@pytest.mark.parametrize("rows", [5, 3])
def test_batch_norm_that_folds_is_taken(rows):
    x = torch.randn(rows, 4)
    assert math.isfinite(vectorised(Cascade(normed(4, 3, fold=True), modules(3, 2)), x))


def test_a_stage_that_mixes_particles_is_refused(x):
    base = modules(3, 2)

    def guide(x):
        with data_plate(x):
            loc = base.guide.fn.net(x - x.mean(0))
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    mixing = MetaModel(base.model.fn, guide, visible="x", hidden="z")
    with pytest.raises(ValueError, match="log densities differ from those of the parts"):
        vectorised(Cascade(modules(4, 3), mixing), x)


def test_private_sites_do_not_make_a_stage_refused(x):
    net = nn.Linear(3, 4)

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", standard(3, x))
            c = pyro.sample("c", dist.Normal(z, 1.0).to_event(1))
            e = pyro.sample("e", standard(4, x))
            pyro.sample("x", dist.Normal(net(c) + e, 0.8).to_event(1), obs=x)

    def guide(x):
        with data_plate(x):
            c = pyro.sample("c", standard(3, x))
            pyro.sample("e", standard(4, x))
            pyro.sample("z", dist.Normal(c, 1.0).to_event(1))

    pair = MetaModel(model, guide, visible="x", hidden="z")
    assert math.isfinite(vectorised(Cascade(pair, modules(3, 2)), x))


def test_the_check_of_leading_dimensions_takes_no_random_number(x):
    one, two = gaussians(), None
    two = copy.deepcopy(one)
    vectorised(two, x)  # checked before
    torch.manual_seed(3)
    first = vectorised(one, x)
    torch.manual_seed(3)
    assert first == vectorised(two, x)


# Minibatches

TOTAL, BATCH = 6, 2


def subsampled(visible, hidden, *, form, plate="data", base=None):
    """The three forms in which users write minibatches."""
    base = modules(visible, hidden) if base is None else base

    def open_plate(x, rows):
        if form == "size":
            return pyro.plate(plate, TOTAL, subsample_size=BATCH)
        if form == "rows":
            return pyro.plate(plate, TOTAL, subsample=rows)
        return pyro.plate(plate, x.shape[-2])

    def around(x):
        factor = TOTAL / x.shape[-2] if form == "scale" else 1.0
        return poutine.scale(scale=factor)

    def model(x, rows=None):
        with around(x), open_plate(x, rows) as index:
            x = x[..., index, :] if form == "size" and x.shape[-2] > BATCH else x
            z = pyro.sample("z", standard(hidden, x))
            pyro.sample("x", dist.Normal(base.model.fn.net(z), 0.8).to_event(1), obs=x)

    def guide(x, rows=None):
        with around(x), open_plate(x, rows) as index:
            x = x[..., index, :] if form == "size" and x.shape[-2] > BATCH else x
            law = dist.Normal(base.guide.fn.net(x), base.guide.fn.log_scale.exp()).to_event(1)
            pyro.sample("z", law)

    return MetaModel(model, guide, visible="x", hidden="z")


def exact_gaussian_elbo(stages, x):
    """The ELBO of a chain of linear Gaussian stages, per datum, by its moments."""
    mean, spread = x, torch.zeros(len(x), x.shape[-1], x.shape[-1])
    elbo = torch.zeros(len(x))

    def expected(loc, cov, target, target_cov, cross, weight, bias, variance):
        """E[log N(t; W s + b, v)] for jointly Gaussian t and s."""
        gap = target - loc @ weight.T - bias
        inner = (
            target_cov - weight @ cross - (weight @ cross).mT + weight @ cov @ weight.T
        ).diagonal(dim1=-2, dim2=-1)
        return (-0.5 * (gap**2 + inner) / variance - 0.5 * math.log(2 * math.pi * variance)).sum(-1)

    for stage in stages:
        q, m = stage.guide.fn, stage.model.fn
        a, b, s = q.net.weight, q.net.bias, q.log_scale.exp()
        loc = mean @ a.T + b
        cov = a @ spread @ a.T + torch.diag(s**2)
        cross = a @ spread  # Cov(h, x)
        elbo = elbo + (0.5 * math.log(2 * math.pi) + 0.5 + s.log()).sum()
        args = loc, cov, mean, spread, cross, m.net.weight, m.net.bias, 0.64
        elbo = elbo + expected(*args)
        mean, spread = loc, cov
    second = mean**2 + spread.diagonal(dim1=-2, dim2=-1)
    return elbo + (-0.5 * second - 0.5 * math.log(2 * math.pi)).sum(-1)


def batches(form, x):
    """Arguments of the pair for one minibatch, drawn as users of this form draw it."""
    if form == "size":
        return (x,)
    rows = torch.randperm(TOTAL)[:BATCH]
    return (x[rows], rows) if form == "rows" else (x[rows],)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize("form", ["size", "rows", "scale"])
@pytest.mark.parametrize("upper", ["plain", "other plate", "same form"])
def test_expected_loss_of_a_minibatch_is_the_loss_of_all_data(form, upper, elbo):
    bases = [modules(3, 2), modules(2, 2)]
    bottom = subsampled(3, 2, form=form, base=bases[0])
    top = {
        "plain": lambda: bases[1],
        "other plate": lambda: subsampled(2, 2, form="none", plate="rows", base=bases[1]),
        "same form": lambda: subsampled(2, 2, form=form, base=bases[1]),
    }[upper]()
    args = [None, (0,)] if form == "rows" and upper == "same form" else None
    cascade, x = Cascade(bottom, top, args=args), torch.randn(TOTAL, 3)
    exact = exact_gaussian_elbo(bases, x).sum().item()
    loss = elbo(num_particles=30, vectorize_particles=True, max_plate_nesting=1)
    mean, error = mean_and_error(
        lambda: -loss.loss(cascade.model, cascade.guide, *batches(form, x)), 60
    )
    assert abs(mean - exact) < 4 * error
    assert error < 0.1 * abs(exact)


@pytest.mark.parametrize("form", ["size", "rows", "scale"])
def test_every_site_of_a_minibatch_has_one_scale_and_one_subsample(form):
    cascade = Cascade(subsampled(3, 2, form=form), modules(2, 2), modules(2, 2))
    batch = batches(form, torch.randn(TOTAL, 3))
    guide = poutine.trace(cascade.guide).get_trace(*batch)
    model = poutine.trace(poutine.replay(cascade.model, trace=guide)).get_trace(*batch)
    for trace in (guide, model):
        nodes = {n: s for n, s in trace.nodes.items() if s["type"] == "sample"}
        scales = {n: s["scale"] for n, s in nodes.items() if not is_plate(s)}
        assert set(scales.values()) == {TOTAL / BATCH}, scales
        assert [n for n, s in nodes.items() if is_plate(s)] == ["data"]
        assert all(s["value"].shape[0] == BATCH for n, s in nodes.items() if not is_plate(s))


def test_a_stage_that_subsamples_its_own_plate_is_refused():
    top = subsampled(2, 2, form="size", plate="rows")
    cascade = Cascade(modules(3, 2), top)
    with pytest.raises(
        ValueError, match=r"stage 1 .* subsamples its own plate 'rows', which the bot"
    ):
        Trace_ELBO().loss(cascade.model, cascade.guide, torch.randn(TOTAL, 3))


def test_a_stage_that_scales_otherwise_is_refused():
    cascade = Cascade(modules(3, 2), subsampled(2, 2, form="scale"))
    with pytest.raises(
        ValueError, match=r"stage 1 .* scales its data by 3 and the bottom stage by 1"
    ):
        cascade.model(torch.randn(BATCH, 3))


def test_a_factor_per_datum_is_refused():
    base = modules(3, 2)

    def model(x):
        with data_plate(x), poutine.scale(scale=torch.arange(1.0, 1 + len(x))):
            z = pyro.sample("z", standard(2, x))
            pyro.sample("x", dist.Normal(base.model.fn.net(z), 0.8).to_event(1), obs=x)

    pair = MetaModel(model, base.guide.fn, visible="x", hidden="z")
    with pytest.raises(ValueError, match=r"stage 0 .* scales each datum by its own factor"):
        Cascade(pair, modules(2, 2)).model(torch.randn(5, 3))


def annealed(read):
    base = modules(3, 2)

    def model(x, *args):
        with data_plate(x):
            with poutine.scale(scale=read(args)):
                z = pyro.sample("z", standard(2, x))
            pyro.sample("x", dist.Normal(base.model.fn.net(z), 0.8).to_event(1), obs=x)

    def guide(x, *args):
        with data_plate(x), poutine.scale(scale=read(args)):
            pyro.sample("z", dist.Normal(base.guide.fn.net(x), 0.5).to_event(1))

    return MetaModel(model, guide, visible="x", hidden="z")


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_annealing_by_an_argument_reaches_all_stages_above(kind, x):
    cascade, x = Cascade(annealed(lambda args: args[0]), modules(2, 2)), x[:, :3]
    for beta in (0.25, 0.5, 1.0):
        model = poutine.trace(cascade.model).get_trace(x, kind(beta))
        found = {n: float(model.nodes[n]["scale"]) for n in ("x", "0.z", "1.z")}
        assert found == {"x": 1.0, "0.z": beta, "1.z": beta}


def test_annealing_that_the_arguments_do_not_show_is_refused(x):
    beta = [0.25]
    cascade, x = Cascade(annealed(lambda _: beta[0]), modules(2, 2)), x[:, :3]
    cascade.model(x)
    beta[0] = 0.5
    for run in (cascade.model, cascade.guide):
        with pytest.raises(RuntimeError, match=r"stage 0 .* scales 'z' by 0.5, and by 0.25"):
            run(x)


def test_scaling_the_whole_cascade_scales_everything(x):
    cascade = gaussians()
    torch.manual_seed(1)
    one = Trace_ELBO().loss(cascade.model, cascade.guide, x)
    torch.manual_seed(1)
    scaled = poutine.scale(cascade.model, 3.0), poutine.scale(cascade.guide, 3.0)
    assert abs(Trace_ELBO().loss(*scaled, x) / one - 3) < 1e-5


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_last_batches_of_any_size(rows):
    cascade = gaussians()
    for n in (5, rows, 5):
        assert math.isfinite(Trace_ELBO().loss(cascade.model, cascade.guide, torch.randn(n, 4)))


def test_config_enumerate_reaches_the_stages():
    pairs = [category_pair((4, 3), enumerate_in=""), category_pair((3, 2), enumerate_in="")]
    cascade, x = Cascade(*pairs), torch.tensor([0, 1, 2, 3, 3])
    for how in ("parallel", "sequential"):
        guide = config_enumerate(cascade.guide, default=how)
        found = -TraceEnum_ELBO(max_plate_nesting=1).loss(cascade.model, guide, x[:2])
        assert abs(found - category_elbo(pairs, x[:2]).item()) < 1e-4
