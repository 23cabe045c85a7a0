"""A mixture of bits against sums over everything, written out by hand."""

import pytest
import torch
from enumerated import BitPair, all_bits, bernoulli
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.poutine.messenger import Messenger

from pyroboost.compose import Cascade, Mixture
from pyroboost.traces import datum_log_prob


class fixed(Messenger):
    """Give sites their values, draws aside included."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def rows_of(x, **values):
    """Return data and values of sites in all combinations, one row each."""
    sizes = [len(x), *(len(v) for v in values.values())]
    grids = torch.cartesian_prod(*(torch.arange(n) for n in sizes)).reshape(-1, len(sizes))
    chosen = [v[g] for v, g in zip(values.values(), grids.T[1:], strict=True)]
    return x[grids[:, 0]], dict(zip(values, chosen, strict=True))


def traces(mixture, x, values):
    """Run guide and model with draws aside and component at these values."""
    with fixed(values):
        guide = poutine.trace(mixture.guide).get_trace(x)
    model = poutine.trace(poutine.replay(mixture.model, trace=guide)).get_trace(x)
    model.compute_log_prob()
    guide.compute_log_prob()
    return model, guide


def total(trace, count):
    sites = [n for n in trace.nodes.values() if n["type"] == "sample" and n["name"] != "data"]
    return sum(datum_log_prob(site, count) for site in sites)


def draws_of(mixture):
    """Every value of the draws aside and of the component, by site."""
    values = {f"{i}.h.drawn": all_bits(part.sizes[1]) for i, part in enumerate(mixture)}
    return values | {"component": torch.arange(len(mixture))}


def weighed(mixture, x):
    """Return log weight, log probability of all draws and recorded log q, row by row."""
    x, values = rows_of(x, **draws_of(mixture))
    model, guide = traces(mixture, x, values)
    log_q = total(guide, len(x))
    law = guide.nodes["component"]["fn"].log_prob(values["component"])
    for i, part in enumerate(mixture):
        law = law + bernoulli(values[f"{i}.h.drawn"], part.q.net(x))
    return total(model, len(x)) - log_q, law


def exact(mixture, x):
    terms = torch.stack([part.exact(x) for part in mixture], -1)
    return (terms + mixture.log_weights).logsumexp(-1)


def pair_of(hidden, weights=(0.3, 0.7), sizes=((3, 2), (3, 2))):
    torch.manual_seed(1)
    return Mixture(*(BitPair(v, h, 1.5) for v, h in sizes), weights=weights, hidden=hidden)


KINDS = pytest.mark.parametrize("hidden", ["shared", "component"])


@KINDS
@torch.no_grad()
def test_expected_weight_is_the_evidence(hidden):
    """E_q[w] = m(x), summed over all draws aside and the component."""
    mixture, x = pair_of(hidden), all_bits(3)
    log_weight, law = weighed(mixture, x)
    assert torch.allclose(law.exp().reshape(len(x), -1).sum(-1), torch.ones(len(x)))
    found = (law + log_weight).exp().reshape(len(x), -1).sum(-1)
    assert torch.allclose(found, exact(mixture, x).exp(), atol=1e-6)


@KINDS
@torch.no_grad()
def test_weight_does_not_depend_on_the_component(hidden):
    """log w = log sum_i w_i r_i, the bound of parts that are not exact."""
    mixture, x = pair_of(hidden), all_bits(3)
    log_weight, _ = weighed(mixture, x)
    log_weight = log_weight.reshape(-1, 2)
    rows, values = rows_of(x, **draws_of(mixture))
    ratios = [
        part.m.log_joint(rows, z).diagonal() - part.q.log_q(rows, z).diagonal()
        for part, z in zip(mixture, (values["0.h.drawn"], values["1.h.drawn"]), strict=True)
    ]
    expected = (torch.stack(ratios, -1) + mixture.log_weights).logsumexp(-1).reshape(-1, 2)
    assert torch.allclose(log_weight, expected, atol=1e-5)


@torch.no_grad()
def test_joint_is_the_one_written_by_hand():
    """m(h) m(c | h) m_c(x | h) = w_c m_c(x, h), which sums to one."""
    mixture = pair_of("shared")
    x, values = rows_of(all_bits(3), h=all_bits(2), component=torch.arange(2))
    trace = poutine.trace(poutine.condition(mixture.model, data=values)).get_trace(x)
    trace.compute_log_prob()
    found = total(trace, len(x))
    joints = [part.m.log_joint(x, values["h"]).diagonal() for part in mixture]
    by_part = torch.stack(joints, -1) + mixture.log_weights
    expected = by_part.gather(-1, values["component"][:, None])[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert abs(found.exp().sum().item() - 1) < 1e-5
    prior = datum_log_prob(trace.nodes["h"], len(x))
    assert torch.allclose(prior, mixture.log_prior(values["h"]).value, atol=1e-6)
    laws = [bernoulli(values["h"], part.m.prior).exp() for part in mixture]
    assert torch.allclose(prior.exp(), 0.3 * laws[0] + 0.7 * laws[1], atol=1e-6)


@KINDS
@torch.no_grad()
def test_one_part_has_its_own_density(hidden):
    """Law 4, in the densities and in every weight."""
    torch.manual_seed(2)
    part, x = BitPair(3, 2, 1.5), all_bits(3)
    mixture = Mixture(part, hidden=hidden)
    rows, values = rows_of(x, **draws_of(mixture))
    log_weight, law = weighed(mixture, x)
    z = values["0.h.drawn"]
    log_q = part.q.log_q(rows, z).diagonal()
    assert torch.allclose(log_weight, part.m.log_joint(rows, z).diagonal() - log_q, atol=1e-5)
    assert torch.allclose(law, log_q, atol=1e-5)
    assert torch.allclose(exact(mixture, x), part.exact(x), atol=1e-6)


@KINDS
@torch.no_grad()
def test_samples_have_the_probabilities_of_the_sum(hidden):
    """Goodness of fit, which rejects the parts alone."""
    from scipy.stats import chi2

    mixture, x, n = pair_of(hidden), all_bits(3), 20_000
    index = (mixture.sample(torch.zeros(n, 3)) * torch.tensor([4.0, 2.0, 1.0])).sum(-1).long()
    counts = torch.bincount(index, minlength=8).double()

    def p_value(law):
        law = law.exp().double()
        return chi2.sf(((counts - n * law) ** 2 / (n * law)).sum().item(), 7)

    assert p_value(exact(mixture, x)) > 1e-3
    assert all(p_value(part.exact(x)) < 1e-6 for part in mixture)


@torch.no_grad()
def test_a_part_of_weight_zero_takes_no_part():
    mixture, x = pair_of("shared", weights=(0.0, 1.0)), all_bits(3)
    log_weight, law = weighed(mixture, x)
    keep = law > -torch.inf
    assert keep.double().mean() == 0.5  # the component is never the first
    found = (law + log_weight)[keep].exp().reshape(len(x), -1).sum(-1)
    assert torch.allclose(found, mixture[1].exact(x).exp(), atol=1e-6)
    assert mixture.weights.tolist() == [0.0, 1.0]


# Gradients


def gradients(value, parameters):
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def exact_bound(mixture, x):
    """E_q log sum_i w_i r_i of one datum, by a sum over all draws, as a function of everything."""
    values = torch.cartesian_prod(*(torch.arange(2 ** p.sizes[1]) for p in mixture))
    values = values.reshape(-1, len(mixture))
    law, terms = 0.0, []
    for i, part in enumerate(mixture):
        h = all_bits(part.sizes[1])[values[:, i]]
        log_q = part.q.log_q(x, h)[0]
        law = law + log_q
        terms.append(part.m.log_joint(x, h)[0] - log_q)
    return (law.exp() * (torch.stack(terms, -1) + mixture.log_weights).logsumexp(-1)).sum()


def expected(mixture, x, loss):
    """Sum gradients over all values of the draws, by their probability."""
    parameters = list(mixture.parameters())
    with torch.no_grad():
        _, law = weighed(mixture, x)
    _, values = rows_of(x, **draws_of(mixture))
    found = [torch.zeros_like(p) for p in parameters]
    for row, weight in enumerate(law.exp()):
        mixture.zero_grad()
        with fixed({name: value[row : row + 1] for name, value in values.items()}):
            loss(mixture, x)
        for one, p in zip(found, parameters, strict=True):
            one -= weight * (0.0 if p.grad is None else p.grad)
    return found


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO])
@KINDS
def test_expected_gradient_is_that_of_the_bound(elbo, hidden):
    """Hidden bits have no pathwise gradient: the component carries the scores of all draws."""
    mixture, x = pair_of(hidden, sizes=((2, 1), (2, 1))), all_bits(2)[1:2]
    mixture.guide(x)
    found = expected(mixture, x, lambda m, x: elbo().loss_and_grads(m.model, m.guide, x))
    by_hand = gradients(exact_bound(mixture, x), list(mixture.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, by_hand, strict=True))
    assert all(g.abs().max() > 1e-4 for g in by_hand)  # every parameter is reached


def test_enumerating_the_component_in_the_guide_gives_the_bound_and_its_gradient():
    mixture, x = pair_of("component", sizes=((2, 1), (2, 1))), all_bits(2)[1:2]
    elbo, guide = TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(mixture.guide)
    mixture.guide(x)
    parameters = list(mixture.parameters())
    z = torch.cartesian_prod(torch.arange(2), torch.arange(2)).float()
    loss, found = 0.0, [torch.zeros_like(p) for p in parameters]
    for row in z:
        values = {f"{i}.h.drawn": row[i].reshape(1, 1) for i in range(2)}
        with torch.no_grad():
            weight = sum(p.q.log_q(x, r.reshape(1, 1)) for p, r in zip(mixture, row, strict=True))
        mixture.zero_grad()
        with fixed(values):
            value = elbo.differentiable_loss(mixture.model, guide, x)
        value.backward()
        loss -= weight.exp().item() * value.item()
        for one, p in zip(found, parameters, strict=True):
            one -= weight.exp().item() * (0.0 if p.grad is None else p.grad)
    assert abs(loss - exact_bound(mixture, x).item()) < 1e-5
    by_hand = gradients(exact_bound(mixture, x), parameters)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, by_hand, strict=True))


@torch.no_grad()
def test_a_component_above_a_shared_hidden_site_is_drawn_even_where_enumeration_is_asked_for():
    """The hidden value comes from the component: summed out, the two would come apart."""
    mixture, x = pair_of("shared"), all_bits(3)
    torch.manual_seed(5)
    drawn = Trace_ELBO(max_plate_nesting=1).loss(mixture.model, mixture.guide, x)
    torch.manual_seed(5)
    enumerated, every = TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(mixture.guide)
    with pytest.warns(UserWarning, match="found no sample sites configured for enumeration"):
        assert abs(enumerated.loss(mixture.model, every, x) - drawn) < 1e-4


@KINDS
def test_objective_has_the_gradient_of_the_bound(hidden):
    mixture, x = pair_of(hidden, sizes=((2, 1), (2, 1))), all_bits(2)[1:2]
    parameters = list(mixture.parameters())
    value, found = 0.0, [torch.zeros_like(p) for p in parameters]
    loss = mixture.objective()
    for row in torch.cartesian_prod(torch.arange(2), torch.arange(2)).float():
        with torch.no_grad():
            weight = sum(p.q.log_q(x, r.reshape(1, 1)) for p, r in zip(mixture, row, strict=True))
        queue = iter(row)

        class in_turn(Messenger):
            def _pyro_sample(self, msg):
                if msg["name"] == "h" and msg["value"] is None:
                    msg["value"], msg["done"] = next(queue).reshape(1, 1), True  # noqa: B023

        mixture.zero_grad()
        with in_turn():
            one = loss(mixture.model, mixture.guide, x)
        one.backward()
        value -= weight.exp().item() * one.item()
        for total_, p in zip(found, parameters, strict=True):
            total_ -= weight.exp().item() * (0.0 if p.grad is None else p.grad)
    assert abs(value - exact_bound(mixture, x).item()) < 1e-5
    by_hand = gradients(exact_bound(mixture, x), parameters)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, by_hand, strict=True))


# Under a stage, in a stage


@torch.no_grad()
def test_a_stage_above_a_shared_hidden_site():
    """.50 instead of .74: m(x | h) of a mixture needs p(c | h), not the weights."""
    mixture, top, x = pair_of("shared", sizes=((2, 1), (2, 1))), BitPair(1, 1, 1.5), all_bits(2)
    cascade = Cascade(mixture, top)
    h = all_bits(1)
    joints = torch.stack([part.m.log_joint(x, h) for part in mixture], -1) + mixture.log_weights
    joint = joints.logsumexp(-1)  # log m(x, h)
    prior = torch.stack([bernoulli(h, p.m.prior) for p in mixture], -1) + mixture.log_weights
    given = joint - prior.logsumexp(-1)
    exact_p = (given + top.exact(h)).logsumexp(-1)
    assert abs(exact_p.exp().sum().item() - 1) < 1e-5
    rows, values = rows_of(x, **{"0.h": h, "0.component": torch.arange(2), "1.h": all_bits(1)})
    trace = poutine.trace(poutine.condition(cascade.model, data=values)).get_trace(rows)
    trace.compute_log_prob()
    found = total(trace, len(rows)).reshape(len(x), -1).logsumexp(-1)
    assert torch.allclose(found, exact_p, atol=1e-5)
    wrong = torch.stack([bernoulli(x[:, None], p.m.logits(h)) for p in mixture], -1)
    wrong = ((wrong + mixture.log_weights).logsumexp(-1) + top.exact(h)).logsumexp(-1)
    assert (wrong - exact_p).abs().max() > 0.01  # the trap is there


def cascade_rows(cascade, x):
    mixture, top = cascade
    values = {f"0.{i}.h.drawn": all_bits(p.sizes[1]) for i, p in enumerate(mixture)}
    values |= {"0.component": torch.arange(len(mixture)), "1.h": all_bits(top.sizes[1])}
    return rows_of(x, **values)


def test_a_cascade_over_a_mixture_has_the_right_weights_and_gradient():
    torch.manual_seed(4)
    mixture, top = pair_of("shared", sizes=((2, 1), (2, 1))), BitPair(1, 1, 1.5)
    cascade, x = Cascade(mixture, top), all_bits(2)[1:2]
    cascade.guide(x)
    rows, values = cascade_rows(cascade, x)
    z = torch.stack([values["0.0.h.drawn"], values["0.1.h.drawn"]], 1)
    c, g = values["0.component"], values["1.h"]
    terms, law = [], 0.0
    for i, part in enumerate(mixture):
        log_q = bernoulli(z[:, i], part.q.net(rows))
        own = bernoulli(z[:, i], part.m.prior) + bernoulli(rows, part.m.logits(z[:, i]))
        terms.append(own - log_q)
        law = law + log_q
    terms = torch.stack(terms, -1) + mixture.log_weights
    law = law + terms.log_softmax(-1).gather(-1, c[:, None])[:, 0]
    h = z[torch.arange(len(z)), c]
    prior = torch.stack([bernoulli(h, p.m.prior) for p in mixture], -1) + mixture.log_weights
    top_q = bernoulli(g, top.q.net(h))
    log_w = terms.logsumexp(-1) - prior.logsumexp(-1) - top_q
    log_w = log_w + bernoulli(g, top.m.prior) + bernoulli(h, top.m.logits(g))
    law = law + top_q
    by_hand = gradients((law.exp() * log_w).sum(), list(cascade.parameters()))
    with fixed(values):
        guide = poutine.trace(cascade.guide).get_trace(rows)
    model = poutine.trace(poutine.replay(cascade.model, trace=guide)).get_trace(rows)
    model.compute_log_prob()
    guide.compute_log_prob()
    found = total(model, len(rows)) - total(guide, len(rows))
    assert torch.allclose(found, log_w, atol=1e-5)
    grads = [torch.zeros_like(p) for p in cascade.parameters()]
    for row, weight in enumerate(law.detach().exp()):
        cascade.zero_grad()
        with fixed({name: value[row : row + 1] for name, value in values.items()}):
            Trace_ELBO().loss_and_grads(cascade.model, cascade.guide, x)
        for one, p in zip(grads, cascade.parameters(), strict=True):
            one -= weight * (0.0 if p.grad is None else p.grad)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, by_hand, strict=True))
