"""What a cascade is: one model of its stages, with their names, arguments and refusals."""

import copy
import gc
import math
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumerated import BitPair
from pairs import NormalGuide, NormalModel, data_plate, methods, modules, standard
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from pyroboost import Cascade, MetaModel
from pyroboost.handlers import is_plate


def three():
    return modules(4, 3), modules(3, 2), modules(2, 2)


def sites(trace):
    return [n for n, s in trace.nodes.items() if s["type"] == "sample" and not is_plate(s)]


def plates(trace):
    return [n for n, s in trace.nodes.items() if s["type"] == "sample" and is_plate(s)]


def traces(pair, *batch, seed=1):
    torch.manual_seed(seed)
    guide = poutine.trace(pair.guide).get_trace(*batch)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(*batch)
    return model, guide


def log_weight(pair, *batch, seed=1):
    model, guide = traces(pair, *batch, seed=seed)
    return (model.log_prob_sum() - guide.log_prob_sum()).item()


@pytest.fixture
def x():
    return torch.randn(5, 4)


# One model


def test_joint_and_guide_are_those_of_the_paper(x):
    """Eq. 3 and 4 written out from the stages' networks."""
    stages = three()
    model, guide = traces(Cascade(*stages), x)
    values = [x] + [guide.nodes[f"{i}.z"]["value"] for i in range(3)]
    log_q = log_p = 0.0
    for i, stage in enumerate(stages):
        q, m = stage.guide.fn, stage.model.fn
        law = dist.Normal(q.net(values[i]), q.log_scale.exp()).to_event(1)
        log_q = log_q + law.log_prob(values[i + 1]).sum()
        law = dist.Normal(m.net(values[i + 1]), 0.8).to_event(1)
        log_p = log_p + law.log_prob(values[i]).sum()
    log_p = log_p + standard(2, x).log_prob(values[-1]).sum()
    assert torch.allclose(model.log_prob_sum(), log_p, rtol=1e-5)
    assert torch.allclose(guide.log_prob_sum(), log_q, rtol=1e-5)


def test_names_are_those_of_the_stages(x):
    model, guide = traces(Cascade(*three()), x)
    assert sites(guide) == ["0.z", "1.z", "2.z"]
    assert sites(model) == ["2.z", "1.z", "0.z", "x"]
    assert plates(model) == plates(guide) == ["data"]
    cascade = Cascade(*three())
    assert (cascade.visible, cascade.hidden) == ("x", "2.z")
    assert "/" not in "".join(model.nodes)


NESTINGS = {
    "flat": lambda a, b, c: Cascade(a, b, c),
    "left": lambda a, b, c: Cascade(Cascade(a, b), c),
    "right": lambda a, b, c: Cascade(a, Cascade(b, c)),
    "plus": lambda a, b, c: Cascade(a) + b + c,
    "deep": lambda a, b, c: Cascade(Cascade(Cascade(Cascade(a)), Cascade(b)), Cascade(c)),
    "slices": lambda a, b, c: Cascade(Cascade(a, b, c)[:1], Cascade(a, b, c)[1:]),
}


@pytest.mark.parametrize("nest", NESTINGS.values(), ids=NESTINGS)
def test_nesting_does_not_matter(nest, x):
    stages = three()
    flat, nested = Cascade(*stages), nest(*stages)
    assert len(nested) == 3
    assert list(nested) == list(stages)
    assert nested.hidden == "2.z"
    assert repr(nested) == repr(flat)
    assert list(nested.state_dict()) == list(flat.state_dict())
    assert list(nested.named_trainable(x)) == list(flat.named_trainable(x))
    assert sites(traces(nested, x)[0]) == sites(traces(flat, x)[0])
    assert log_weight(nested, x) == log_weight(flat, x)


def test_one_stage_is_that_stage(x):
    stage = modules(4, 3)
    cascade = Cascade(stage)
    assert log_weight(cascade, x) == log_weight(stage, x)
    assert cascade.hidden == "0.z"
    torch.manual_seed(3)
    one = cascade.encode(x)
    torch.manual_seed(3)
    assert torch.equal(one, stage.encode(x))


def test_items_are_the_stages_and_slices_cascades_of_them():
    stages = three()
    cascade = Cascade(*stages)
    assert cascade[0] is stages[0]
    assert cascade[-1] is stages[2]
    assert isinstance(cascade[1:], Cascade)
    assert list(cascade[1:]) == list(stages[1:])
    assert list(cascade[:2]) == list(stages[:2])
    with pytest.raises(ValueError, match="there is no stage"):
        cascade[3:]
    with pytest.raises(IndexError):
        cascade[3]


def test_repr_reads_well():
    assert repr(Cascade(modules(3, 2), BitPair(2, 2))) == (
        "Cascade(0: MetaModel('x' | 'z'), 1: BitPair('x' | 'h'))"
    )


def test_what_is_no_stage_is_refused():
    with pytest.raises(TypeError, match="stage 1 is Linear, not a meta-model; wrap the pair"):
        Cascade(modules(3, 2), nn.Linear(2, 2))


# Services


def test_encode_decode_and_sample(x):
    cascade = Cascade(*three())
    h = cascade.encode(x)
    assert h.shape == (5, 2)
    assert cascade.decode(h).shape == (5, 4)
    assert cascade.sample(9).shape == (9, 4)
    assert [v.shape[-1] for v in cascade.climb(x)] == [3, 2, 2]
    assert [v.shape[-1] for v in cascade.climb(x, stages=1)] == [3]
    assert cascade.log_marginal(x) is None
    assert cascade.objective() is None


def test_samples_have_the_law_of_the_model():
    """Mean and variance of x through two linear Gaussian stages."""
    cascade, n = Cascade(modules(1, 1), modules(1, 1)), 100_000
    (w0, b0), (w1, b1) = (
        (s.model.fn.net.weight.item(), s.model.fn.net.bias.item()) for s in cascade
    )
    variance = w0**2 * (w1**2 + 0.64) + 0.64
    x = cascade.sample(torch.zeros(n, 1))
    assert abs(x.mean().item() - (w0 * b1 + b0)) < 5 * math.sqrt(variance / n)
    assert abs(x.var().item() / variance - 1) < 5 * math.sqrt(2 / n)
    h = torch.full((n, 1), 2.0)
    x = cascade.decode(h)
    variance = w0**2 * 0.64 + 0.64
    assert abs(x.mean().item() - (w0 * (2 * w1 + b1) + b0)) < 5 * math.sqrt(variance / n)
    assert abs(x.var().item() / variance - 1) < 5 * math.sqrt(2 / n)


def test_log_prior_is_that_of_the_top_stage(x):
    cascade, h = Cascade(*three()), torch.randn(5, 2)
    expected = standard(2, h).log_prob(h)
    assert torch.allclose(cascade.log_prior(h, template=x).value, expected)
    cascade.encode(x)
    assert torch.allclose(cascade.log_prior(h).value, expected)


def test_rounds_train_each_stage_on_fresh_draws_from_below(x):
    cascade = Cascade(*three())
    rounds = list(cascade.rounds(x))
    assert [r.pair for r in rounds] == list(cascade)
    assert rounds[0].transform is None
    (one,), (two,) = rounds[2].transform(x), rounds[2].transform(x)
    assert one.shape == (5, 2)
    assert not torch.equal(one, two)
    torch.manual_seed(4)
    (drawn,) = rounds[1].transform(x)
    torch.manual_seed(4)
    assert torch.equal(drawn, cascade[0].encode(x))


# Arguments


def labelled(visible, hidden):
    """A pair whose prior mean is its label; it records what it was given."""
    base, seen = modules(visible, hidden), []

    def model(x, *args):
        seen.append(args)
        shift = args[0][:, None] if args else 0.0
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(hidden) + shift, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(base.model.fn.net(z), 0.8).to_event(1), obs=x)

    def guide(x, *args):
        seen.append(args)
        with data_plate(x):
            pyro.sample("z", dist.Normal(base.guide.fn.net(x), 1.0).to_event(1))

    pair = MetaModel(model, guide, visible="x", hidden="z")
    pair.seen = seen
    return pair


def given_to(cascade):
    return [{tuple(int(t[0]) for t in args) for args in stage.seen} for stage in cascade]


@pytest.fixture
def labels():
    return [torch.full((5,), float(i)) for i in range(3)]


def test_arguments_go_to_the_bottom_by_default(x, labels):
    cascade = Cascade(labelled(4, 3), labelled(3, 2))
    log_weight(cascade, x, *labels)
    cascade.encode(x, *labels)
    cascade.sample(x, *labels)
    assert given_to(cascade) == [{(0, 1, 2)}, {()}]


def test_arguments_go_where_they_are_sent(x, labels):
    cascade = Cascade(labelled(4, 3), labelled(3, 2), labelled(2, 2), args=[(1,), (0, 2), ()])
    log_weight(cascade, x, *labels)
    cascade.sample(x, *labels)
    cascade.encode(x, *labels)
    cascade.log_prior(torch.zeros(5, 2), *labels, template=x)
    assert given_to(cascade) == [{(1,)}, {(0, 2)}, {()}]


def test_arguments_of_the_top_reach_its_prior(x, labels):
    cascade = Cascade(labelled(4, 3), labelled(3, 2), args=[None, (2,)])
    h = torch.randn(5, 2)
    expected = dist.Normal(labels[2][:, None], 1.0).log_prob(h).sum(-1)
    assert torch.allclose(cascade.log_prior(h, *labels, template=x).value, expected)


NESTED_ARGS = {
    "outer and inner": (
        lambda a, b, c: Cascade(Cascade(a, b, args=[(1,), (0,)]), c, args=[(2, 0), (1,)]),
        [{(0,)}, {(2,)}, {(1,)}],
    ),
    "inner only": (
        lambda a, b, c: Cascade(Cascade(a, b, args=[(1,), (0,)]), c),
        [{(1,)}, {(0,)}, {()}],
    ),
    "on top": (
        lambda a, b, c: Cascade(a, Cascade(b, c, args=[(1,), (0,)]), args=[(), (2, 1)]),
        [{()}, {(1,)}, {(2,)}],
    ),
    "slice": (
        lambda a, b, c: Cascade(a, *Cascade(a2(a), b, c, args=[None, (0,), (1,)])[1:], args=None),
        [{(0, 1, 2)}, {()}, {()}],
    ),
    "slice kept": (
        lambda a, b, c: Cascade(a, b, c, args=[(), (2,), (1,)])[:],
        [{()}, {(2,)}, {(1,)}],
    ),
}


def a2(stage):
    return copy.deepcopy(stage)


@pytest.mark.parametrize(("nest", "expected"), NESTED_ARGS.values(), ids=NESTED_ARGS)
def test_arguments_follow_nesting_and_slicing(nest, expected, x, labels):
    cascade = nest(labelled(4, 3), labelled(3, 2), labelled(2, 2))
    log_weight(cascade, x, *labels)
    assert given_to(cascade) == expected


def test_arguments_of_a_slice_are_those_of_its_stages(labels):
    cascade = Cascade(labelled(4, 3), labelled(3, 2), labelled(2, 2), args=[None, None, (1,)])
    upper = cascade[1:]
    upper.encode(torch.zeros(5, 3), *labels)
    assert [s.seen[-1] for s in upper] == [(), (labels[1],)]
    assert [len(a) for a in cascade[:1].stage_args(labels)] == [3]


@pytest.mark.parametrize("args", [[0, None], [(-1,), None], ["a", None]])
def test_arguments_that_are_no_positions_are_refused(args):
    with pytest.raises(ValueError, match="give a tuple of positions, or None"):
        Cascade(modules(4, 3), modules(3, 2), args=args)


def test_arguments_that_are_missing_are_named(x):
    with pytest.raises(ValueError, match="args has 1 entries for 2 stages"):
        Cascade(modules(4, 3), modules(3, 2), args=[None])
    with pytest.raises(TypeError, match=r"stage 1 \(MetaModel\) takes further argument 2, and 0"):
        Cascade(labelled(4, 3), labelled(3, 2), args=[None, (2,)]).encode(x)


# Generation


def test_generation_leaves_labels_and_factors_of_every_stage():
    def make(visible, hidden):
        net = nn.Linear(hidden, visible)

        def model(x):
            with data_plate(x):
                pyro.sample("label", dist.Bernoulli(x.new_full((), 0.5)), obs=x.new_ones(len(x)))
                z = pyro.sample("z", standard(hidden, x))
                pyro.factor("extra", -z.sum(-1))
                pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

        return MetaModel(model, NormalGuide(visible, hidden), visible="x", hidden="z")

    cascade, x = Cascade(make(4, 3), make(3, 2)), torch.randn(5, 4)
    model, _ = traces(cascade, x)
    assert sites(model) == ["1.label", "1.z", "1.extra", "0.z", "0.label", "0.extra", "x"]
    for name in ("0.label", "1.label", "0.extra", "1.extra"):
        assert model.nodes[name]["is_observed"]
    assert cascade.sample(x).shape == x.shape
    with poutine.trace() as tr, poutine.uncondition():
        cascade.model(x)
    assert not tr.trace.nodes["x"]["is_observed"]


def test_templates_are_never_read():
    """A template of NaN or far-off values for x changes nothing that is drawn."""
    cascade = Cascade(*three())
    torch.manual_seed(1)
    one = cascade.sample(torch.zeros(6, 4))
    torch.manual_seed(1)
    assert torch.equal(one, cascade.sample(torch.full((6, 4), 1e9)))


# Refusals


def test_declared_sizes_that_do_not_fit_are_refused_at_once():
    below, above = modules(4, 3), modules(5, 2)
    below.hidden_shape, above.visible_shape = (3,), (5,)
    with pytest.raises(ValueError, match=r"stage 0 \(MetaModel\) does not fit under stage 1"):
        Cascade(below, above)


@pytest.mark.parametrize("run", ["model", "guide", "encode", "sample"])
def test_sizes_that_do_not_fit_are_refused_at_the_first_run(run, x):
    cascade = Cascade(modules(4, 3), modules(3, 2), modules(5, 2))
    message = r"stage 1 \(MetaModel\) does not fit under stage 2 \(MetaModel\): its 'z' has shape"
    with pytest.raises(ValueError, match=message):
        getattr(cascade, run)(x) if run != "encode" else cascade.guide(x)


def test_sizes_that_broadcast_do_not_fit_either(x):
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", standard(2, x))
            pyro.sample("x", dist.Normal(z[..., :1], 0.8).to_event(1), obs=x)

    wide = MetaModel(model, NormalGuide(3, 2), visible="x", hidden="z")
    with pytest.raises(ValueError, match=r"stage 0 .* does not fit under stage 1"):
        Cascade(modules(4, 3), wide).model(x)


def test_discrete_and_continuous_do_not_fit(x):
    message = "does not fit under stage 1 .*: its 'z' is continuous, and the stage above models a d"
    with pytest.raises(ValueError, match=message):
        Cascade(modules(4, 3), BitPair(3, 2)).model(x)
    message = "its 'h' is discrete, and the stage above models a continuous one"
    with pytest.raises(ValueError, match=message):
        Cascade(BitPair(4, 3), modules(3, 2)).guide(torch.ones(5, 4))


def test_event_dimensions_that_differ_do_not_fit(x):
    def model(x):
        with pyro.plate("data", x.shape[-2], dim=-2), pyro.plate("units", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[-2], dim=-2), pyro.plate("units", 3, dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0))

    plated = MetaModel(model, guide, visible="x", hidden="z")
    with pytest.raises(
        ValueError, match="its 'z' has 1 event dimensions, and the stage above mode"
    ):
        Cascade(modules(4, 3), plated).model(x)


def test_values_that_the_stage_above_cannot_have_do_not_fit():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(9)))
            pyro.sample("x", dist.Normal(c.float(), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(torch.ones(len(x), 9)))

    def bit_model(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * b), obs=x)

    def bit_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(torch.full((len(x),), 0.5)))

    cascade = Cascade(
        MetaModel(model, guide, visible="x", hidden="c"),
        MetaModel(bit_model, bit_guide, visible="x", hidden="b"),
    )
    with pytest.raises(ValueError, match="'c' takes values outside of what the other can have"):
        cascade.model(torch.zeros(30))


@pytest.mark.parametrize("site", ["visible", "hidden"])
def test_sites_that_a_stage_lacks_are_named(site, x):
    names = {"visible": "x", "hidden": "z"} | {site: "nowhere"}
    pair = MetaModel(NormalModel(3, 2), NormalGuide(3, 2), **names)
    with pytest.raises(ValueError, match=r"stage 1 .*: its model has no site 'nowhere'; its sites"):
        Cascade(modules(4, 3), pair).model(x)


def test_guide_and_model_of_a_stage_must_agree(x):
    pair = MetaModel(NormalModel(3, 2), NormalGuide(3, 1), visible="x", hidden="z")
    with pytest.raises(ValueError, match=r"stage 1 .*: its guide draws 'z' in shape \(5, 1\), its"):
        Cascade(modules(4, 3), pair).model(x)


def parented(visible, hidden):
    net = nn.Linear(hidden, visible)

    def model(x):
        with data_plate(x):
            c = pyro.sample("c", standard(hidden, x))
            h = pyro.sample("h", dist.Normal(c, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(h), 1.0).to_event(1), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("c", standard(hidden, x).expand(x.shape[:-1]))
            pyro.sample("h", standard(hidden, x).expand(x.shape[:-1]))

    return MetaModel(model, guide, visible="x", hidden="h")


def test_a_hidden_site_with_latent_parents_stands_on_top_only(x):
    cascade = Cascade(modules(4, 3), parented(3, 2))
    assert math.isfinite(log_weight(cascade, x))
    message = r"hidden site 'h' of stage 0 \(MetaModel\) depends on the latent 'c'"
    for run in ("model", "guide"):
        with pytest.raises(ValueError, match=message):
            getattr(Cascade(parented(4, 3), modules(3, 2)), run)(x)


def test_private_sites_and_parents_within_a_plate_are_no_parents(x):
    """What depends on h, and the plate's subsample, do not make h depend on anything."""

    def model(x):
        with pyro.plate("data", 50, subsample_size=len(x)):
            h = pyro.sample("h", standard(3, x))
            c = pyro.sample("c", dist.Normal(h, 1.0).to_event(1))
            loc = c.sum(-1, keepdim=True).expand(*c.shape[:-1], 4)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 50, subsample_size=len(x)):
            h = pyro.sample("h", standard(3, x))
            pyro.sample("c", dist.Normal(h, 1.0).to_event(1))

    pair = MetaModel(model, guide, visible="x", hidden="h")
    assert math.isfinite(log_weight(Cascade(pair, modules(3, 2)), x))


def test_the_same_stage_twice_is_refused(x):
    stage = modules(3, 3)
    with pytest.raises(ValueError, match=r"stage 0 .* and stage 1 .* share the parameter"):
        Cascade(stage, stage)
    with pytest.raises(ValueError, match="rename it or pass copy"):
        Cascade(Cascade(modules(3, 3), stage), stage)
    assert len(Cascade(stage, copy.deepcopy(stage))) == 2


def test_composing_runs_nothing_and_draws_nothing(x):
    stages, more = three(), modules(2, 2)
    state, store = torch.get_rng_state(), list(pyro.get_param_store())
    cascade = Cascade(*stages)
    _ = cascade[1:], cascade + more, repr(cascade), copy.deepcopy(cascade)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store()) == store
    one = traces(cascade, x, seed=9)[1].nodes["0.z"]["value"]
    two = traces(cascade, x, seed=9)[1].nodes["0.z"]["value"]
    assert torch.equal(one, two)  # the dry run of the first pass took no random number


def test_no_data_are_kept_alive():
    cascade, x = Cascade(*three()), torch.randn(5, 4)
    Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1).loss(
        cascade.model, cascade.guide, x
    )
    cascade.sample(x)
    held = weakref.ref(x)
    del x
    gc.collect()
    assert held() is None
    facts = cascade._chain._facts.values()
    kept = [t for stages, _ in facts for f in stages for t in (f.template, f.hidden, f.inferred)]
    assert all(t.untyped_storage().nbytes() <= 8 for t in kept)


def test_stages_of_pyros_own_make_stack(x):
    cascade = Cascade(methods(4, 3), methods(3, 2))
    assert math.isfinite(log_weight(cascade, x))


def test_recognition_is_what_runs_below_and_the_guide_what_runs_on_top(x):
    class Marked(MetaModel):
        def __init__(self, visible, hidden):
            super().__init__(
                NormalModel(visible, hidden), NormalGuide(visible, hidden), visible="x", hidden="z"
            )
            self.below = copy.deepcopy(self.guide)

        @property
        def recognition(self):
            return self.below

    stages = Marked(4, 3), Marked(3, 2)
    ran = []
    for i, stage in enumerate(stages):
        stage.guide.fn.net.register_forward_hook(lambda *_, i=i: ran.append(f"guide {i}"))
        stage.below.fn.net.register_forward_hook(lambda *_, i=i: ran.append(f"below {i}"))
    cascade = Cascade(*stages)
    cascade.guide(x)
    ran.clear()
    cascade.guide(x)
    assert ran == ["below 0", "guide 1"]
    ran.clear()
    cascade[:1].guide(x)
    assert ran[-1] == "guide 0"
