"""Programs own their parameters: found, trained, copied, moved and saved with the program alone."""

import copy
import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import MAKES, data_plate, log_joint, seeded_log_joint, standard, train, trained
from pyro import poutine
from pyro.distributions import constraints
from torch import nn

from pyroboost._callables import find_modules
from pyroboost.metamodel import MetaModel
from pyroboost.program import Program

GLOBAL_ENCODER, GLOBAL_DECODER = nn.Linear(3, 2), nn.Linear(2, 3)
network = nn.Linear(1, 1)  # has the name of an attribute that programs below read


def global_model(x):
    pyro.module("decoder", GLOBAL_DECODER)
    with data_plate(x):
        z = pyro.sample("z", standard(2, x))
        pyro.sample("x", dist.Normal(GLOBAL_DECODER(z), 0.8).to_event(1), obs=x)


def global_guide(x):
    pyro.module("encoder", GLOBAL_ENCODER)
    with data_plate(x):
        pyro.sample("z", dist.Normal(GLOBAL_ENCODER(x), 0.5).to_event(1))


def global_pair(*_):
    return MetaModel(global_model, global_guide, visible="x", hidden="z")


def enumerated_pair(*_):
    """The same behind a Pyro handler, which keeps the function within a partial."""
    return MetaModel(
        pyro.infer.config_enumerate(global_model), global_guide, visible="x", hidden="z"
    )


def default_pair(*_):
    def model(x, decoder=nn.Linear(2, 3)):  # noqa: B008
        with data_plate(x):
            z = pyro.sample("z", standard(2, x))
            pyro.sample("x", dist.Normal(decoder(z), 0.8).to_event(1), obs=x)

    return MetaModel(model, global_guide, visible="x", hidden="z")


def partial_pair(*_):
    def model(decoder, x):
        with data_plate(x):
            z = pyro.sample("z", standard(2, x))
            pyro.sample("x", dist.Normal(decoder(z), 0.8).to_event(1), obs=x)

    nets = [nn.Linear(2, 3)]
    return MetaModel(functools.partial(model, nets[0]), global_guide, visible="x", hidden="z")


class Callable:
    def __init__(self):
        self.nets = {"decoder": nn.Linear(2, 3)}

    def __call__(self, x):
        with data_plate(x):
            z = pyro.sample("z", standard(2, x))
            pyro.sample("x", dist.Normal(self.nets["decoder"](z), 0.8).to_event(1), obs=x)


def object_pair(*_):
    return MetaModel(Callable(), global_guide, visible="x", hidden="z")


ALL_MAKES = {
    **MAKES,
    "globals": global_pair,
    "handled": enumerated_pair,
    "defaults": default_pair,
    "partial": partial_pair,
    "object": object_pair,
}

every_make = pytest.mark.parametrize("make", ALL_MAKES.values(), ids=ALL_MAKES)


@pytest.fixture
def x():
    return torch.randn(6, 3)


@every_make
def test_svi_moves_every_parameter(make, x):
    pair = make(3, 2)
    before = trained(pair, x)
    train(pair, x)
    after = trained(pair, x)
    assert before.keys() == after.keys()
    assert {n for n in before if torch.equal(before[n], after[n])} == set()
    counts = {"pyro_modules": 7, "modules": 5}
    assert len(before) == counts.get(pair_name(make), 4)


def pair_name(make):
    return next(name for name, known in ALL_MAKES.items() if known is make)


@every_make
def test_named_trainable_holds_the_tensors_that_svi_trains(make, x):
    pair = make(3, 2)
    found = pair.named_trainable(x)
    before = {name: t.detach().clone() for name, t in found.items()}
    train(pair, x)
    assert all(not torch.equal(before[name], t) for name, t in found.items())
    assert all(t.is_leaf and t.requires_grad for t in found.values())
    again = pair.named_trainable(x)
    assert list(again) == list(found)
    assert all(again[name] is t for name, t in found.items())


@every_make
def test_two_of_a_make_share_nothing_in_memory(make, x):
    if make in (global_pair, enumerated_pair):
        pytest.skip("pairs over one global network are meant to share it")
    one, two = make(3, 2, "a"), make(3, 2, "b")
    shared = [GLOBAL_ENCODER.weight, GLOBAL_ENCODER.bias]
    before = trained(two, x)
    train(one, x)
    after = two.named_trainable(x)
    moved = [t for n, t in after.items() if not torch.equal(before[n], t)]
    assert all(any(t is s for s in shared) for t in moved)


@every_make
def test_copy_has_the_values_and_training_it_moves_only_itself(make, x):
    pair = make(3, 2)
    train(pair, x)
    value = seeded_log_joint(pair, x)
    other = copy.deepcopy(pair)
    assert seeded_log_joint(other, x) == value
    before = trained(pair, x)
    mine = trained(other, x)
    train(other, x)
    assert seeded_log_joint(pair, x) == value
    assert all(torch.equal(t, before[n]) for n, t in pair.named_trainable(x).items())
    assert all(not torch.equal(t, mine[n]) for n, t in other.named_trainable(x).items())


@every_make
def test_training_the_original_leaves_the_copy(make, x):
    pair = make(3, 2)
    train(pair, x)
    other = copy.deepcopy(pair)
    value = seeded_log_joint(other, x)
    train(pair, x)
    assert seeded_log_joint(other, x) == value
    third = copy.deepcopy(other)
    assert seeded_log_joint(third, x) == value


@every_make
def test_wrapping_a_pair_that_plain_svi_has_trained_keeps_its_values(make, x):
    pair = make(3, 2)
    model, guide = pair.model.fn, pair.guide.fn
    pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO()).step(x)
    torch.manual_seed(3)
    tr = poutine.trace(guide).get_trace(x)
    expected = poutine.trace(poutine.replay(model, trace=tr)).get_trace(x).log_prob_sum()
    expected = (expected - tr.log_prob_sum()).item()
    wrapped = MetaModel(model, guide, visible="x", hidden="z")
    copied = copy.deepcopy(wrapped)  # before it was ever run
    assert seeded_log_joint(copied, x, seed=3) == expected
    assert seeded_log_joint(wrapped, x, seed=3) == expected


@every_make
def test_state_dict_is_complete(make, x):
    pair = make(3, 2)
    train(pair, x)
    state, value = copy.deepcopy(pair.state_dict()), seeded_log_joint(pair, x)
    train(pair, x)
    assert seeded_log_joint(pair, x) != value
    pair.load_state_dict(state)
    assert seeded_log_joint(pair, x) == value


@every_make
def test_state_of_a_pair_that_was_wrapped_after_training_is_complete(make, x):
    pair = make(3, 2)
    train(pair, x)
    wrapped = MetaModel(pair.model.fn, pair.guide.fn, visible="x", hidden="z")
    assert wrapped.model.get_extra_state().keys() >= pair.model.get_extra_state().keys()


@every_make
def test_save_and_load_into_a_fresh_pair_and_a_fresh_store(make, x, tmp_path):
    pair = make(3, 2)
    train(pair, x)
    value = seeded_log_joint(pair, x)
    pair.save(tmp_path / "pair.pt")
    train(pair, x)
    pyro.clear_param_store()
    fresh = make(3, 2).load(tmp_path / "pair.pt")
    assert seeded_log_joint(fresh, x) == value
    train(fresh, x)
    assert seeded_log_joint(fresh, x) != value


@pytest.mark.parametrize("copied", [False, True])
@every_make
def test_double_leaves_the_density(make, copied, x):
    if not copied and make not in MAKES.values():
        pytest.skip("networks that the other tests of this file use stay as they are")
    pair = make(3, 2)
    train(pair, x)
    z = pair.encode(x)
    guide = poutine.trace(poutine.condition(pair.guide, data={"z": z}))
    before = guide.get_trace(x).log_prob_sum().item()
    pair = (copy.deepcopy(pair) if copied else pair).to(torch.float64)
    guide = poutine.trace(poutine.condition(pair.guide, data={"z": z.double()}))
    after = guide.get_trace(x.double()).log_prob_sum()
    assert after.dtype == torch.float64
    assert abs(after.item() - before) < 1e-4
    assert all(t.dtype == torch.float64 for t in pair.named_trainable(x.double()).values())
    train(pair, x.double())


@every_make
def test_elbo_module_with_a_torch_optimiser(make, x):
    pair = make(3, 2)
    params = pair.named_trainable(x)
    before = {n: t.detach().clone() for n, t in params.items()}
    loss = pyro.infer.Trace_ELBO()(pair.model, pair.guide)
    optim = torch.optim.SGD(params.values(), lr=0.01)
    loss(x).backward()
    optim.step()
    assert all(not torch.equal(before[n], t) for n, t in params.items())


@pytest.mark.parametrize("name", ["modules", "closures", "methods", "pyro_modules"])
def test_elbo_module_finds_the_parameters_of_modules(name, x):
    pair = MAKES[name](3, 2)
    loss = pyro.infer.Trace_ELBO()(pair.model, pair.guide)
    assert {id(p) for p in loss.parameters()} == {id(t) for t in pair.named_trainable(x).values()}


@every_make
def test_optimiser_state_survives_save_and_load(make, x, tmp_path):
    pair = make(3, 2)
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = pyro.infer.SVI(pair.model, pair.guide, optim, pyro.infer.Trace_ELBO())
    svi.step(x)
    svi.step(x)
    optim.save(tmp_path / "optim.pt")
    state = optim.get_state()
    assert None not in state
    assert len(state) == len(pair.named_trainable(x))
    kept = copy.deepcopy(pair.state_dict())

    torch.manual_seed(5)
    svi.step(x)
    expected = trained(pair, x)

    pair.load_state_dict(kept)
    again = pyro.optim.Adam({"lr": 0.05})
    again.load(tmp_path / "optim.pt")
    torch.manual_seed(5)
    pyro.infer.SVI(pair.model, pair.guide, again, pyro.infer.Trace_ELBO()).step(x)
    assert all(torch.equal(t, expected[n]) for n, t in pair.named_trainable(x).items())


@every_make
def test_services_leave_the_store_and_the_stream_alone(make, x):
    pair = make(3, 2)
    pair.named_trainable(x)  # free params exist from their first run on, as in Pyro
    names, state = list(pyro.get_param_store()), torch.get_rng_state()
    assert len(names) == (4 if make is MAKES["functions"] else 0)
    pair.named_trainable(x)
    pair.log_prior(torch.zeros(6, 2), template=x)
    assert torch.equal(torch.get_rng_state(), state)
    pair.encode(x)
    assert list(pyro.get_param_store()) == names


def test_names_of_optimiser_state_do_not_depend_on_who_ran_last(x):
    """One module is part of the model and of the guide, and so has two names."""
    pair = MAKES["methods"](3, 2)
    optim = pyro.optim.Adam({"lr": 0.05})
    pyro.infer.SVI(pair.model, pair.guide, optim, pyro.infer.Trace_ELBO()).step(x)
    names = set(optim.get_state())
    for program in (pair.guide, pair.model, pair.guide):
        poutine.trace(program).get_trace(x)
        assert set(optim.get_state()) == names


def test_frozen_parameters_stay():
    pair = MAKES["modules"](3, 2)
    pair.model.requires_grad_(False)
    before = {n: p.clone() for n, p in pair.model.named_parameters()}
    train(pair, torch.randn(5, 3))
    assert all(torch.equal(before[n], p) for n, p in pair.model.named_parameters())
    assert set(pair.named_trainable(torch.randn(5, 3))) == {
        "guide.fn.net.weight",
        "guide.fn.net.bias",
        "guide.fn.log_scale",
    }


def test_module_param_of_another_program_in_the_store_is_not_taken(x):
    """Pyro hands the second decoder the first one's tensors, and then never trains it."""
    one, two = MAKES["closures"](3, 2), MAKES["closures"](3, 2)
    train(one, x)
    before = trained(two, x)
    train(two, x)
    assert all(not torch.equal(before[n], t) for n, t in two.named_trainable(x).items())


def test_a_name_of_an_attribute_is_no_global():
    class Box:
        network = None

    box = Box()

    def model(x):
        return box.network

    assert find_modules(model) == []
    assert network not in find_modules(Program(model).fn)


def test_search_ends_on_functions_that_refer_to_each_other():
    net = nn.Linear(1, 1)

    def one(n):
        return two(n - 1) if n else net(torch.zeros(1))

    def two(n):
        return one(n)

    assert find_modules(one) == [net]
    copied = copy.deepcopy(Program(one))
    assert find_modules(copied.fn) != [net]


def test_a_copy_that_would_train_the_original_is_refused():
    class Holder:
        """Keeps its network in a function, where deepcopy does not look."""

        def __init__(self):
            net = nn.Linear(1, 1)
            self.run = lambda x: net(x)

        def __call__(self, x):
            return self.run(x)

    with pytest.raises(TypeError, match="would still train the original's 'weight'"):
        copy.deepcopy(Program(Holder(), "model"))


def test_a_param_that_model_and_guide_share_stays_shared_in_a_copy(x):
    def model(x):
        weight = pyro.param("weight", torch.ones(3))
        with data_plate(x):
            z = pyro.sample("z", standard(3, x))
            pyro.sample("x", dist.Normal(z * weight, 1.0).to_event(1), obs=x)

    def guide(x):
        weight = pyro.param("weight", torch.ones(3))
        with data_plate(x):
            pyro.sample("z", dist.Normal(x * weight, 1.0).to_event(1))

    pair = MetaModel(model, guide, visible="x", hidden="z")
    train(pair, x)
    other = copy.deepcopy(pair)
    assert len(other.named_trainable(x)) == 1
    train(other, x)
    assert seeded_log_joint(other, x) != seeded_log_joint(pair, x)


def test_a_constrained_param_over_a_module_tensor_is_constrained():
    net = nn.Linear(2, 3)
    net.noise = nn.Parameter(torch.full((3,), 0.9))
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    x = torch.zeros(6, 3)  # for which the best noise is none

    def model(x):
        noise = pyro.param("noise", net.noise, constraint=constraints.positive)
        with data_plate(x):
            z = pyro.sample("z", standard(2, x))
            pyro.sample("x", dist.Normal(net(z), noise).to_event(1), obs=x)

    pair = MetaModel(model, global_guide, visible="x", hidden="z")
    train(pair, x, steps=3, lr=1.0)
    assert (pyro.param("noise") > 0).all()
    assert (pyro.param("noise") < 0.9).all()
    state = pair.model.get_extra_state()
    assert torch.equal(state["noise"], pyro.param("noise").unconstrained())


def test_replacing_a_parameter_is_noticed(x):
    pair = MAKES["methods"](3, 2)
    train(pair, x)
    decoder = pair.model.fn.__self__.decoder
    decoder.weight = nn.Parameter(torch.zeros(3, 2))
    pyro.infer.SVI(
        pair.model, pair.guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO()
    ).step(x)
    assert (decoder.weight != 0).any()


def test_a_tensor_that_is_not_contiguous_trains_and_has_a_name(x):
    pair = MAKES["modules"](3, 2)
    net = pair.model.fn.net
    net.weight = nn.Parameter(torch.randn(2, 3).t())
    optim = pyro.optim.Adam({"lr": 0.05})
    before = net.weight.detach().clone()
    pyro.infer.SVI(pair.model, pair.guide, optim, pyro.infer.Trace_ELBO()).step(x)
    assert not torch.equal(net.weight, before)
    assert None not in optim.get_state()


def test_learning_rates_by_name(x):
    pair = MAKES["modules"](3, 2)
    before = trained(pair, x)
    optim = pyro.optim.Adam(lambda name: {"lr": 0.0 if "guide" in name else 0.1})
    pyro.infer.SVI(pair.model, pair.guide, optim, pyro.infer.Trace_ELBO()).step(x)
    moved = {n for n, t in pair.named_trainable(x).items() if not torch.equal(before[n], t)}
    assert moved == {n for n in before if n.startswith("model")}


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="the guide is int, which cannot be called"):
        Program(3, "guide")


def test_log_joint_reaches_handlers_outside(x):
    pair = MAKES["modules"](3, 2)
    with poutine.scale(scale=2.0):
        torch.manual_seed(1)
        double = log_joint(pair, x)
    torch.manual_seed(1)
    assert torch.allclose(double, 2 * log_joint(pair, x))
