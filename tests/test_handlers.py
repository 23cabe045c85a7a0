"""The handlers: names, values and scales, and what they leave alone."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyroboost.handlers import capture, given, rename, unobserve


def program(x=None):
    loc = pyro.param("loc", torch.tensor(0.5))
    with pyro.plate("data", 4):
        h = pyro.sample("h", dist.Normal(loc, 1.0))
        return pyro.sample("x", dist.Normal(h, 1.0), obs=x)


def names(trace, kind):
    return {name for name, node in trace.nodes.items() if node["type"] == kind}


def test_rename_reaches_sites_plates_frames_and_params():
    with (
        poutine.trace() as tr,
        rename("s.{}".format, plates="p.{}".format, params="q.{}".format),
    ):
        program(torch.zeros(4))
    assert names(tr.trace, "sample") == {"p.data", "s.h", "s.x"}
    assert names(tr.trace, "param") == {"q.loc"}
    assert [f.name for f in tr.trace.nodes["s.x"]["cond_indep_stack"]] == ["p.data"]
    assert list(pyro.get_param_store()) == ["q.loc"]


def test_rename_leaves_out_what_it_is_not_told():
    with poutine.trace() as tr, rename("s.{}".format):
        program()
    assert names(tr.trace, "sample") == {"data", "s.h", "s.x"}
    assert [f.name for f in tr.trace.nodes["s.h"]["cond_indep_stack"]] == ["data"]
    assert list(pyro.get_param_store()) == ["loc"]


def test_renamed_params_are_two_parameters():
    with rename(params="a.{}".format):
        program()
    with rename(params="b.{}".format):
        program()
    store = pyro.get_param_store()
    store["a.loc"] = torch.tensor(3.0)
    assert store["b.loc"].item() == 0.5


def test_handlers_outside_see_new_names_and_inside_old_ones():
    inner = poutine.condition(program, data={"h": torch.ones(4)})
    outer = poutine.condition(
        lambda: rename("s.{}".format)(inner)(), data={"s.x": torch.full((4,), 2.0)}
    )
    trace = poutine.trace(outer).get_trace()
    assert trace.nodes["s.h"]["value"].tolist() == [1.0] * 4
    assert trace.nodes["s.x"]["value"].tolist() == [2.0] * 4


def test_rename_keeps_plates_outside_as_they_are():
    with poutine.trace() as tr, pyro.plate("particles", 3, dim=-2), rename(plates="p.{}".format):
        program()
    frames = {f.name for f in tr.trace.nodes["x"]["cond_indep_stack"]}
    assert frames == {"particles", "p.data"}


def test_capture_keeps_the_local_name_under_rename_and_replay():
    value = torch.arange(4.0)
    with poutine.condition(data={"s.h": value}), rename("s.{}".format), capture("h") as site:
        program()
    assert site.value is value


def test_capture_knows_the_scale_of_the_program_alone():
    def scaled():
        with pyro.plate("data", 10, subsample_size=5), poutine.scale(scale=3.0):
            pyro.sample("h", dist.Normal(0.0, 1.0))

    with poutine.scale(scale=7.0), capture("h") as site:
        scaled()
    assert site.scale == 6.0


def test_capture_says_which_site_is_missing():
    with capture("nowhere") as site:
        program()
    assert not site.seen
    with pytest.raises(KeyError, match="no sample site 'nowhere'"):
        _ = site.value


def test_capture_forgets_between_runs():
    site = capture("h")
    with site:
        program()
    with site:
        pass
    assert not site.seen


def test_capture_and_unobserve_do_not_take_a_plate_for_a_site():
    with capture("data") as site, unobserve("data"):
        program()
    assert not site.seen


def observed_program(x):
    with pyro.plate("data", 4):
        pyro.sample("label", dist.Bernoulli(0.5), obs=torch.ones(4))
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.factor("extra", h)
        pyro.sample("x", dist.Normal(h, 1.0), obs=x)


def test_unobserve_frees_one_site_and_no_label_or_factor():
    with poutine.trace() as tr, unobserve("x"), capture("x") as site:
        observed_program(torch.full((4,), 1e6))
    nodes = tr.trace.nodes
    assert not nodes["x"]["is_observed"]
    assert site.value.abs().max() < 100
    assert nodes["label"]["is_observed"]
    assert nodes["label"]["value"].tolist() == [1.0] * 4
    assert nodes["extra"]["is_observed"]


def test_unobserve_lets_handlers_outside_choose_the_value():
    with poutine.condition(data={"x": torch.full((4,), 5.0)}), unobserve("x"), capture("x") as site:
        program(torch.zeros(4))
    assert site.value.tolist() == [5.0] * 4


def test_given_drops_the_density_of_the_fixed_site_only():
    h, x = torch.randn(4), torch.randn(4)
    trace = poutine.trace(given(program, {"h": h})).get_trace(x)
    assert "h" not in trace.nodes
    expected = dist.Normal(h, 1.0).log_prob(x).sum()
    assert torch.allclose(trace.log_prob_sum(), expected)


def test_unobserve_refuses_a_site_that_is_no_random_draw():
    def masked(x):
        on = torch.tensor([True, False, True, True])
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x, obs_mask=on)

    with pytest.raises(ValueError, match="'x' is deterministic"), unobserve("x"):
        masked(torch.zeros(4))
