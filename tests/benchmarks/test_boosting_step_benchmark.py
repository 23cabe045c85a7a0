"""One step of boosting against one step of an ordinary Pyro guide with the same flow."""

import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyroboost import flows
from pyroboost.distributions import Components, FlowLaw
from pyroboost.infer._round_law import RoundLaw, Stage, at_site

DATA, ROUNDS = 100, 40


def base():
    return dist.Normal(torch.zeros(2), 1.0).to_event(1)


def model():
    with pyro.plate("data", DATA):
        pyro.sample("z", dist.Normal(torch.ones(2), 2.0).to_event(1))


def stepping(law, parameters):
    """Return one step of Adam on the bound of a guide that samples from this law."""
    optimiser = torch.optim.Adam(parameters)

    def guide():
        with pyro.plate("data", DATA):
            pyro.sample("z", law())

    def step():
        optimiser.zero_grad()
        Trace_ELBO().differentiable_loss(model, guide).backward()
        optimiser.step()

    return step


def boosting(name, fixed):
    """A step of round C + 1 of boosting: component C is trained beside C fixed ones."""
    components = Components(lambda: getattr(flows, name)(2), fixed + 1)
    components.weights.copy_(torch.tensor([1 / fixed] * fixed + [0.0]))
    for flow in components.flows[:fixed]:
        flow.requires_grad_(False)
    stage = Stage(fixed, objective="residual")
    step = stepping(lambda: components(base()), components.flows[fixed].parameters())

    def inside():
        with at_site(lambda mixture: RoundLaw(mixture, stage)):
            step()

    return inside


def cpu(call):
    began = time.process_time()
    call()
    return time.process_time() - began


@pytest.mark.parametrize("fixed", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["realnvp", "spline", "nlsq"])
def test_a_step_costs_at_most_one_flow_per_component(benchmark, name, fixed):
    """With C fixed components at most C + 1 ordinary steps, that is, two for the first."""
    torch.manual_seed(0)
    plain = getattr(flows, name)(2)
    ordinary = stepping(
        lambda: dist.TransformedDistribution(base(), [plain.condition(None)]), plain.parameters()
    )
    twin = getattr(flows, name)(2)
    remembering = stepping(lambda: FlowLaw(base(), twin), twin.parameters())
    calls = (boosting(name, fixed), ordinary, remembering)
    found = [[cpu(call) for call in calls] for _ in range(ROUNDS)]
    benchmark.pedantic(calls[0], rounds=5)
    ours, theirs, law = (sorted(times)[ROUNDS // 4] for times in zip(*found, strict=True))
    benchmark.extra_info.update({"ratio": ours / theirs, "ratio_to_flow_law": ours / law})
    print(
        f"\n{name}, {fixed} fixed: {1e3 * ours:.2f} ms a step, {ours / theirs:.2f} times a guide "
        f"of Pyro with that flow, {ours / law:.2f} times one that remembers its draw (aim: at most "
        f"{fixed + 1} times the faster of the two)"
    )
    assert ours / min(theirs, law) <= fixed + 1
