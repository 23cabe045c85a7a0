"""Composing, slicing, nesting, extending and copying leave every trained value where it is."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import MAKES, VAE, data_plate, functions, modules, seeded_log_joint, standard, train
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyroboost import Cascade, MetaModel

SIZES = [(4, 3), (3, 2), (2, 2)]


def stack(make):
    return [make(*size, tag) for size, tag in zip(SIZES, "abc", strict=True)]


def inputs():
    return [torch.randn(5, size) for size, _ in SIZES]


def values(stages, data):
    return [seeded_log_joint(stage, x) for stage, x in zip(stages, data, strict=True)]


every_make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)

OPERATIONS = {
    "compose": lambda a, b, c: Cascade(a, b, c),
    "nest left": lambda a, b, c: Cascade(Cascade(a, b), c),
    "nest right": lambda a, b, c: Cascade(a, Cascade(b, c)),
    "extend": lambda a, b, c: Cascade(a) + b + c,
    "slice": lambda a, b, c: Cascade(a, b, c)[1:],
    "slice and extend": lambda a, b, c: Cascade(a, b)[:1] + b + c,
}


@every_make
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations_change_no_trained_value(make, operation):
    stages, data = stack(make), inputs()
    for stage, x in zip(stages, data, strict=True):
        train(stage, x)
    before = values(stages, data)
    cascade = operation(*stages)
    first = data[3 - len(cascade)]
    assert math.isfinite(seeded_log_joint(cascade, first))
    cascade.sample(4)
    cascade.encode(first)
    copy.deepcopy(cascade)
    cascade.named_trainable(first)
    assert values(stages, data) == before


@every_make
def test_operations_before_any_run_change_nothing_either(make):
    """The values with which stages start are theirs, wherever they first run."""
    torch.manual_seed(0)
    stages, data = stack(make), inputs()
    alone = values(stages, data)
    pyro.clear_param_store()
    torch.manual_seed(0)
    stages, data = stack(make), inputs()
    cascade = Cascade(*stages)
    seeded_log_joint(cascade, data[0])
    assert values(stages, data) == alone


@every_make
def test_svi_moves_every_stage_and_the_stages_are_the_ones_outside(make):
    stages, data = stack(make), inputs()
    cascade, before = Cascade(*stages), values(stages, data)
    tensors = cascade.named_trainable(data[0])
    start = {n: t.detach().clone() for n, t in tensors.items()}
    train(cascade, data[0])
    assert all(not torch.equal(t, start[n]) for n, t in tensors.items())
    after = values(stages, data)
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert values(list(cascade), data) == after


@every_make
def test_training_one_stage_moves_that_stage_alone(make):
    stages, data = stack(make), inputs()
    cascade = Cascade(*stages)
    cascade.named_trainable(data[0])
    before = values(stages, data)
    train(stages[1], data[1])
    after = values(stages, data)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


@every_make
def test_a_copy_trains_itself_alone(make):
    stages, data = stack(make), inputs()
    cascade, x = Cascade(*stages), data[0]
    train(cascade, x)
    other = copy.deepcopy(cascade)
    value = seeded_log_joint(cascade, x)
    assert seeded_log_joint(other, x) == value
    assert other[0] is not stages[0]
    train(other, x)
    assert seeded_log_joint(cascade, x) == value
    moved = seeded_log_joint(other, x)
    assert moved != value
    train(cascade, x)
    assert seeded_log_joint(other, x) == moved


@every_make
def test_a_copy_of_a_stage_stands_beside_it(make):
    """A stage and its copy in one cascade are two."""
    stage, x = make(3, 3), torch.randn(5, 3)
    train(stage, x)
    other = copy.deepcopy(stage)
    cascade = Cascade(stage, other)
    train(cascade, x)
    assert len(cascade.named_trainable(x)) == 2 * len(stage.named_trainable(x))
    assert seeded_log_joint(stage, x) != seeded_log_joint(other, x)


@every_make
def test_state_round_trip(make, tmp_path):
    stages, data = stack(make), inputs()
    cascade, x = Cascade(*stages), data[0]
    train(cascade, x)
    value = seeded_log_joint(cascade, x)
    cascade.save(tmp_path / "cascade.pt")
    state = copy.deepcopy(cascade.state_dict())
    train(cascade, x)
    assert seeded_log_joint(cascade, x) != value
    cascade.load_state_dict(state)
    assert seeded_log_joint(cascade, x) == value
    pyro.clear_param_store()
    fresh = Cascade(*stack(make)).load(tmp_path / "cascade.pt")
    assert seeded_log_joint(fresh, x) == value


@every_make
def test_loading_a_cascade_of_other_depth_changes_nothing(make, tmp_path):
    stages, data = stack(make), inputs()
    cascade = Cascade(*stages)
    train(cascade, data[0])
    value = seeded_log_joint(cascade, data[0])
    cascade[:2].save(tmp_path / "two.pt")
    train(cascade, data[0])
    moved = seeded_log_joint(cascade, data[0])
    with pytest.raises(ValueError, match="does not hold the state of this Cascade"):
        cascade.load(tmp_path / "two.pt")
    assert seeded_log_joint(cascade, data[0]) == moved != value


@every_make
def test_double(make):
    stages, data = stack(make), inputs()
    cascade, x = Cascade(*stages), data[0]
    train(cascade, x)
    h = cascade.climb(x)
    fixed = {f"{i}.z": value for i, value in enumerate(h)}
    model = pyro.poutine.condition(cascade.model, data=fixed)
    before = pyro.poutine.trace(model).get_trace(x).log_prob_sum().item()
    cascade.to(torch.float64)
    fixed = {name: value.double() for name, value in fixed.items()}
    model = pyro.poutine.condition(cascade.model, data=fixed)
    after = pyro.poutine.trace(model).get_trace(x.double()).log_prob_sum()
    assert after.dtype == torch.float64
    assert abs(after.item() / before - 1) < 1e-5
    train(cascade, x.double())
    assert cascade.sample(3).dtype == torch.float64


@every_make
def test_torch_optimisers_train_a_cascade(make):
    cascade, x = Cascade(*stack(make)), torch.randn(5, 4)
    tensors = cascade.named_trainable(x)
    before = {n: t.detach().clone() for n, t in tensors.items()}
    loss, optim = Trace_ELBO()(cascade.model, cascade.guide), torch.optim.Adam(tensors.values())
    for _ in range(2):
        optim.zero_grad()
        loss(x).backward()
        optim.step()
    assert all(not torch.equal(before[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("name", [n for n in MAKES if n != "functions"])
def test_elbo_modules_find_the_parameters_of_all_stages(name):
    cascade, x = Cascade(*stack(MAKES[name])), torch.randn(5, 4)
    loss = Trace_ELBO()(cascade.model, cascade.guide)
    assert {id(p) for p in loss.parameters()} == {
        id(t) for t in cascade.named_trainable(x).values()
    }
    assert {id(p) for p in cascade.parameters()} == {id(p) for p in loss.parameters()}


@every_make
def test_optimiser_state_of_all_stages(make, tmp_path):
    cascade, x = Cascade(*stack(make)), torch.randn(5, 4)
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = SVI(cascade.model, cascade.guide, optim, Trace_ELBO())
    svi.step(x)
    state = optim.get_state()
    assert None not in state
    assert len(state) == len(cascade.named_trainable(x))
    optim.save(tmp_path / "optim.pt")
    kept = copy.deepcopy(cascade.state_dict())
    torch.manual_seed(1)
    svi.step(x)
    expected = {n: t.detach().clone() for n, t in cascade.named_trainable(x).items()}
    cascade.load_state_dict(kept)
    again = pyro.optim.Adam({"lr": 0.01})
    again.load(tmp_path / "optim.pt")
    torch.manual_seed(1)
    SVI(cascade.model, cascade.guide, again, Trace_ELBO()).step(x)
    after = cascade.named_trainable(x)
    assert all(torch.equal(after[n], t) for n, t in expected.items())


# Clashes


def test_two_function_pairs_with_one_param_are_refused():
    """Pyro would silently train one tensor for both."""
    one, two = functions(3, 3, "same"), functions(3, 3, "same")
    x = torch.randn(5, 3)
    cascade = Cascade(one, two)
    with pytest.raises(ValueError, match=r"stage 0 .* and stage 1 .* share the parameter 'same_"):
        cascade.guide(x)
    with pytest.raises(ValueError, match="share the parameter"):
        Cascade(one, two)
    assert math.isfinite(seeded_log_joint(Cascade(one, copy.deepcopy(one)), x))


def test_a_network_that_two_stages_use_is_refused():
    shared = nn.Linear(3, 3)

    def make():
        def model(x):
            with data_plate(x):
                z = pyro.sample("z", standard(3, x))
                pyro.sample("x", dist.Normal(shared(z), 0.8).to_event(1), obs=x)

        return MetaModel(model, modules(3, 3).guide.fn, visible="x", hidden="z")

    with pytest.raises(ValueError, match=r"share the parameter 'model\.parts\.0\.weight'"):
        Cascade(make(), make())


def test_one_start_is_not_one_parameter():
    """Pyro trains the very tensor that a param starts from; two params from one start are two."""
    start = torch.zeros(3)

    def make(tag):
        def model(x):
            with data_plate(x):
                z = pyro.sample("z", standard(3, x))
                loc = z + pyro.param(f"{tag}_loc", start)
                pyro.sample("x", dist.Normal(loc, 0.8).to_event(1), obs=x)

        return MetaModel(model, modules(3, 3).guide.fn, visible="x", hidden="z")

    cascade, x = Cascade(make("a"), make("b")), torch.randn(5, 3)
    train(cascade, x)
    assert not torch.equal(pyro.param("a_loc"), pyro.param("b_loc"))
    assert torch.equal(start, torch.zeros(3))


def test_two_of_pyros_example_class_stay_two():
    """Both register a decoder: Pyro alone gives the second the first one's, and never trains it."""
    vaes = VAE(4, 3), VAE(3, 2)
    stages = [MetaModel(v.model, v.guide, visible="x", hidden="z") for v in vaes]
    before = [v.decoder.weight.detach().clone() for v in vaes]
    x = torch.randn(8, 4)
    train(stages[0], x)
    h = stages[0].encode(x)
    train(stages[1], h)
    assert all(not torch.equal(b, v.decoder.weight) for b, v in zip(before, vaes, strict=True))
    first = vaes[0].decoder.weight.detach().clone()
    train(stages[1], h)
    assert torch.equal(first, vaes[0].decoder.weight)


def test_names_in_the_store_are_those_of_the_stage_and_not_of_its_place():
    stages, x = stack(modules), torch.randn(5, 4)
    train(Cascade(*stages), x)
    names = set(pyro.get_param_store())
    train(Cascade(Cascade(stages[0]), Cascade(*stages[1:])), x)
    train(stages[1], torch.randn(5, 3))
    assert set(pyro.get_param_store()) == names


def test_gradients_reach_the_stage_that_is_trained_and_no_other():
    stages, x = stack(modules), torch.randn(5, 4)
    cascade = Cascade(*stages)
    (round_,) = [r for r in cascade.rounds(x) if r.pair is stages[1]]
    loss = Trace_ELBO().differentiable_loss(stages[1].model, stages[1].guide, *round_.transform(x))
    loss.backward()
    reached = [all(p.grad is not None for p in s.parameters()) for s in stages]
    none = [all(p.grad is None for p in s.parameters()) for s in stages]
    assert reached == [False, True, False]
    assert none == [True, False, True]
