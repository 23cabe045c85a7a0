"""Every nesting of two compositions over tiny parts, against brute force over all bits."""

import math
from dataclasses import dataclass

import pytest
import torch
from enumerated import BitPair, all_bits
from scipy.stats import chi2
from torch import Tensor

from pyroboost import Cascade, Mixture, Product
from pyroboost.evaluation import log_likelihood, log_weights
from pyroboost.metamodel import MetaModel

SIZE = 3  # bits of x and of every hidden value, so that everything fits on everything
STATES = all_bits(SIZE)
WEIGHTS = [0.7, 0.3]
KINDS = ["leaf", "Cascade", "Mixture", "Product"]


@dataclass
class Node:
    """A composition and what brute force says of it."""

    pair: MetaModel
    density: Tensor  # p(x), (X,)
    joint: Tensor | None  # p(x, h) of the hidden site that a stage above would model, (X, H)


def leaf() -> Node:
    pair = BitPair(SIZE, SIZE, 0.8)
    pair.visible_shape = pair.hidden_shape = (SIZE,)
    joint = pair.m.log_joint(STATES, STATES).exp().detach().double()
    return Node(pair, joint.sum(1), joint)


def cascade(lower: Node, upper: Node) -> Node:
    given = lower.joint / lower.joint.sum(0)
    joint = None if upper.joint is None else given @ upper.joint
    return Node(Cascade(lower.pair, upper.pair), given @ upper.density, joint)


def mixture(one: Node, two: Node) -> Node:
    density = WEIGHTS[0] * one.density + WEIGHTS[1] * two.density
    joint = WEIGHTS[0] * one.joint + WEIGHTS[1] * two.joint
    return Node(Mixture(one.pair, two.pair, weights=WEIGHTS), density, joint)


def product(one: Node, two: Node) -> Node:
    energy = one.density * two.density
    return Node(Product(one.pair, two.pair, num_samples=200), energy / energy.sum(), None)


MAKERS = {"Cascade": cascade, "Mixture": mixture, "Product": product}


def make(kind: str) -> Node:
    return leaf() if kind == "leaf" else MAKERS[kind](leaf(), leaf())


def refused(outer: str, first: str, second: str) -> bool:
    """Tell whether an energy would stand where a density or a hidden variable is needed."""
    if outer == "Cascade":
        return first == "Product"
    return outer == "Mixture" and "Product" in (first, second)


CASES = [(outer, first, second) for outer in MAKERS for first in KINDS for second in KINDS]


def build(outer: str, first: str, second: str) -> Node:
    torch.manual_seed(sum(map(ord, outer + first + second)))
    return MAKERS[outer](make(first), make(second))


@pytest.mark.parametrize("case", [c for c in CASES if refused(*c)], ids=".".join)
def test_an_energy_is_refused_where_it_cannot_stand(case):
    outer, first, second = case
    composition = {"Cascade": Cascade, "Mixture": Mixture}[outer]
    with pytest.raises(TypeError, match="energy"):
        composition(make(first).pair, make(second).pair)


@pytest.mark.parametrize("case", [c for c in CASES if not refused(*c)], ids=".".join)
def test_density_is_the_brute_force_density(case):
    node = build(*case)
    torch.manual_seed(1)
    node.pair.refresh()
    # An energy at the top of a cascade samples its own parts anew for every draw from below.
    nested = case[0] == "Cascade" and case[2] == "Product"
    found = log_likelihood(node.pair, STATES, num_samples=400 if nested else 10_000)
    assert found.kind == "estimate"  # no part here knows its density
    shared = found.shared_error
    error = node.density * (found.std_error.double() + shared)
    assert bool(((found.value.double().exp() - node.density).abs() < 5 * error + 1e-6).all())
    assert float((error / node.density).max()) < 0.4  # the comparison has teeth
    assert abs(float(found.value.double().exp().sum()) - 1.0) < 5 * float(error.norm()) + shared


@pytest.mark.parametrize("case", [c for c in CASES if not refused(*c)], ids=".".join)
def test_samples_have_the_brute_force_density(case):
    node = build(*case)
    torch.manual_seed(2)
    count = 4000
    x = node.pair.sample(count)
    digits = (x.long() * torch.tensor([4, 2, 1])).sum(-1)
    seen = torch.bincount(digits, minlength=8).double()
    assert float(STATES[5] @ torch.tensor([4.0, 2.0, 1.0])) == 5  # the states are in this order
    if node.pair.is_program:
        statistic = float(((seen - count * node.density).square() / (count * node.density)).sum())
        assert chi2.sf(statistic, 7) > 1e-4
    else:  # chains: draws hang together
        assert float((seen / count - node.density).abs().max()) < 0.06


@pytest.mark.parametrize(
    "case", [c for c in CASES if not refused(*c) and "Product" not in c], ids=".".join
)
def test_hidden_density_is_the_brute_force_density(case):
    node = build(*case)
    prior = node.joint.sum(0)
    found = node.pair.log_prior(STATES)
    assert found.kind == "exact"
    torch.testing.assert_close(found.value.detach().double().exp(), prior, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "case", [c for c in CASES if not refused(*c) and "Product" not in c], ids=".".join
)
def test_data_given_hidden_values_have_the_brute_force_density(case):
    node = build(*case)
    given = (node.joint / node.joint.sum(0)).T
    torch.manual_seed(3)
    count = 3000
    for h in (0, 5):
        x = node.pair.decode(STATES[h].expand(count, -1))
        digits = (x.long() * torch.tensor([4, 2, 1])).sum(-1)
        seen = torch.bincount(digits, minlength=8).double()
        expected = count * given[h]
        assert chi2.sf(float(((seen - expected).square() / expected).sum()), 7) > 1e-4


@pytest.mark.parametrize("outer", ["Cascade", "Mixture"])
def test_the_comparison_rejects_a_wrong_density(outer):
    node, other = build(outer, "leaf", "Mixture"), build(outer, "Mixture", "leaf")
    torch.manual_seed(1)
    values = log_weights(node.pair, STATES, num_samples=20_000).double().exp()
    error = values.std(0) / math.sqrt(20_000)
    assert bool(((values.mean(0) - node.density).abs() < 5 * error).all())
    assert bool(((values.mean(0) - other.density).abs() > 5 * error).any())
