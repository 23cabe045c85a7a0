"""Components: their weights, restarts, and weights that learn."""

import copy

import pyro.distributions as dist
import pytest
import torch

from pyroboost import flows
from pyroboost.distributions import BoostedFlow, Components

BASE = dist.Normal(torch.zeros(4, 2), 1.0).to_event(1)


def three():
    return Components(lambda: flows.affine(2, spread=0.5), 3)


def test_the_first_component_has_all_the_weight():
    parts = three()
    assert parts.weights.tolist() == [1.0, 0.0, 0.0]
    assert parts.active == [0]
    assert len(parts) == 3
    q, z = parts(BASE), torch.randn(7, 4, 2)
    assert isinstance(q, BoostedFlow)
    assert q.has_rsample
    torch.testing.assert_close(q.log_prob(z), q.log_prob_components(z)[..., 0])


def test_a_list_makes_components_that_differ():
    parts = Components([lambda: flows.affine(2), lambda: flows.realnvp(2, 1)])
    assert [flow.name for flow in parts.flows] == ["affine", "realnvp"]


def test_weights_are_a_buffer_and_part_of_the_state():
    parts, other = three(), three()
    parts.weights.copy_(torch.tensor([0.2, 0.3, 0.5]))
    other.load_state_dict(parts.state_dict())
    z = torch.randn(5, 4, 2)
    assert torch.equal(parts(BASE).log_prob(z), other(BASE).log_prob(z))
    assert "weights" not in dict(parts.named_parameters())
    assert repr(parts).splitlines()[1].strip() == "weights=[0.2, 0.3, 0.5]"


def test_a_deepcopy_is_apart():
    parts = three()
    other = copy.deepcopy(parts)
    other.restart(0)
    other.weights.fill_(1 / 3)
    assert parts.active == [0]
    assert not torch.equal(next(parts.flows[0].parameters()), next(other.flows[0].parameters()))


def test_float64_stays_through_a_restart():
    parts = three().double()
    parts.restart(1)
    assert {p.dtype for p in parts.parameters()} == {torch.float64} == {parts.weights.dtype}


def test_restart_builds_a_new_flow_in_one_place_and_keeps_mode_and_weights():
    parts = three().eval()
    parts.weights.copy_(torch.tensor([0.5, 0.5, 0.0]))
    before = [p.detach().clone() for p in parts.parameters()]
    parts.restart(1)
    same = [torch.equal(a, b) for a, b in zip(before, parts.parameters(), strict=True)]
    assert same == [True, False, True]
    assert not parts.flows[1].training
    assert parts.weights.tolist() == [0.5, 0.5, 0.0]


def test_learning_weights_are_a_softmax_of_active_components_and_are_stored():
    parts = three()
    parts.weights.copy_(torch.tensor([0.25, 0.0, 0.75]))
    z = torch.randn(5, 4, 2)
    before = parts(BASE).log_prob(z)
    with parts.learning_weights():
        assert parts.logits.shape == (2,)
        torch.testing.assert_close(parts(BASE).log_prob(z), before)
        torch.testing.assert_close(parts.mixing(), parts.weights)
        parts(BASE).log_prob(z).sum().backward()
        assert bool(parts.logits.grad.any())
        assert parts.flows[1].steps[0].coefficients.bias.grad is None
        with torch.no_grad():
            parts.logits.copy_(torch.tensor([0.0, 0.0]))
        assert not parts(BASE).has_rsample
    assert parts.weights.tolist() == [0.5, 0.0, 0.5]
    assert parts.logits is None
    assert parts.mixing() is parts.weights


def test_learning_weights_are_stored_and_gone_after_an_error_too():
    parts = three()
    parts.weights.copy_(torch.tensor([0.5, 0.5, 0.0]))

    def learn_and_fail():
        with parts.learning_weights():
            parts.logits.data.copy_(torch.tensor([0.0, 1.0]))
            raise KeyError

    with pytest.raises(KeyError):
        learn_and_fail()
    expected = torch.tensor([0.0, 1.0]).softmax(-1)
    torch.testing.assert_close(parts.weights[:2], expected)
    assert parts.logits is None
    with parts.learning_weights(), pytest.raises(RuntimeError, match="already open"):
        parts.learning_weights().__enter__()


@pytest.mark.parametrize(
    ("make", "count", "kind", "words"),
    [
        (lambda: flows.affine(2), None, ValueError, "count is None"),
        (lambda: flows.affine(2), 0, ValueError, "count is 0"),
        ([], None, ValueError, "0 functions came"),
        ([lambda: flows.affine(2)], 2, ValueError, "1 functions came for count=2"),
        (lambda: torch.nn.Linear(2, 2), 2, TypeError, "component 0 built Linear"),
        (lambda: flows.Flow([dist.transforms.Planar(2)]), 2, ValueError, "component 0"),
    ],
)
def test_what_cannot_be_boosted_is_refused(make, count, kind, words):
    with pytest.raises(kind, match=words):
        Components(make, count)
