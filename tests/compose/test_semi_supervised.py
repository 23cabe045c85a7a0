"""Cascades whose last stage has a class variable, against sums over every hidden variable."""

import copy

import pyro
import pytest
import torch
from enumerated import all_bits, bernoulli
from labelled_pairs import bounds, encoded, log_q, tiny, tower, tower_joint, unlabelled

from pyroboost import Cascade
from pyroboost.data import labelled_batches
from pyroboost.evaluation import decompose, elbo, log_weights
from pyroboost.infer import Callback, fit, greedy
from pyroboost.infer.gains import stage_gain
from pyroboost.models import M2, VAE

X = all_bits(4).double()[::2]
Y = torch.tensor([0, -1, 2, 1, -1, 0, -1, 2])


@pytest.fixture
def cascade():
    torch.manual_seed(2)
    return tower()


@torch.no_grad()
def exact_terms(cascade, x, y):
    """L_1 and L_2 per datum by summing over h: the second has log m(h, y) where y is known."""
    h, law = all_bits(3).double(), encoded(cascade, x)
    below, top = cascade[0], cascade[1]
    log_weight = below.m.log_joint(x, h) - below.q.log_q(x, h)
    each = torch.cat([bounds(top, h), unlabelled(top, h)[:, None]], -1)  # column -1: no label
    last = each[:, y].T - bernoulli(h, below.m.prior)
    return (law * log_weight).sum(-1), (law * last).sum(-1)


@torch.no_grad()
def test_weights_average_to_the_joint_of_labelled_and_the_marginal_of_other_data(cascade):
    joint = tower_joint(cascade, X)
    exact = torch.where(Y >= 0, joint.gather(1, Y.clamp(min=0)[:, None])[:, 0], joint.logsumexp(1))
    weights = log_weights(cascade, X, Y, num_samples=20_000).exp()
    error = weights.std(0) / 20_000**0.5
    assert ((weights.mean(0) - exact.exp()).abs() < 4.5 * error).all()
    without = log_weights(cascade, X, None, num_samples=20_000).exp()
    error = without.std(0) / 20_000**0.5
    assert ((without.mean(0) - joint.logsumexp(1).exp()).abs() < 4.5 * error).all()


def test_the_decomposed_bound_has_the_labels_in_its_last_term(cascade):
    wide = X.repeat(500, 1), Y.repeat(500)
    found = decompose(cascade, *wide, num_samples=2, num_importance=2)
    for term, exact in zip(found.terms, exact_terms(cascade, X, Y), strict=True):
        values = term.per_datum.reshape(500, 8)
        assert ((values.mean(0) - exact).abs() < 4.5 * values.std(0) / 500**0.5).all()
    with torch.no_grad():
        joint = tower_joint(cascade, X)
    exact = torch.where(Y >= 0, joint.gather(1, Y.clamp(min=0)[:, None])[:, 0], joint.logsumexp(1))
    tight = torch.stack([term.tight_per_datum for term in found.terms]).sum(0).reshape(500, 8)
    assert (tight.mean(0) < exact + 4.5 * tight.std(0) / 500**0.5).all()
    assert found.tight > found.elbo


def test_elbo_and_the_gain_of_the_stage_say_the_same(cascade):
    base, last = exact_terms(cascade, X, Y)
    found = elbo(cascade, X, Y, num_samples=10_000)
    assert ((found.value - base - last).abs() < 4.5 * found.std_error).all()
    gain = stage_gain(cascade, 1, X.repeat(1000, 1), Y.repeat(1000), seed=0)
    assert abs(gain.value - last.mean()) < 4.5 * gain.std_error
    below = stage_gain(cascade, 0, X.repeat(1000, 1), Y.repeat(1000), seed=0)
    assert abs(below.value - base.mean()) < 4.5 * below.std_error


def test_the_objective_of_the_last_stage_is_j_on_what_the_stages_below_infer(cascade):
    """J = a E_unlabelled E_q(h | x) U(h) + b E_labelled E_q(h | x) L(h, y)."""
    top = cascade[1]
    item = list(cascade.rounds((X, Y)))[1]
    values = []
    for _ in range(40):
        h, y = item.transform(X.repeat(50, 1), Y.repeat(50))
        assert torch.equal(y, Y.repeat(50))
        with torch.no_grad():
            values.append(-top.objective()(top.model, top.guide, h, y) / len(h))
    values = torch.stack(values)
    with torch.no_grad():
        h, law = all_bits(3).double(), encoded(cascade, X)
        each = torch.cat([bounds(top, h), unlabelled(top, h)[:, None]], -1)
        rows = (law * each[:, Y].T).sum(-1)
    exact = 0.5 * rows[Y < 0].mean() + 0.5 * rows[Y >= 0].mean()
    assert abs(values.mean() - exact) < 4.5 * values.std() / 40**0.5


def test_the_class_keeps_its_label_under_its_new_name(cascade):
    guide = pyro.poutine.trace(cascade.guide).get_trace(X, Y)
    model = pyro.poutine.trace(pyro.poutine.replay(cascade.model, trace=guide)).get_trace(X, Y)
    guide.compute_log_prob()
    model.compute_log_prob()
    known = Y >= 0
    drawn = guide.nodes["1.y"]["value"]
    assert torch.equal(drawn[known], Y[known])
    assert (guide.nodes["1.y"]["log_prob"][known] == 0).all()
    h = guide.nodes["0.h"]["value"]
    expected = log_q(cascade[1], h)[torch.arange(8), drawn]
    torch.testing.assert_close(guide.nodes["1.y"]["log_prob"][~known], expected[~known])
    prior = torch.tensor([0.5, 0.2, 0.3]).double().log()
    torch.testing.assert_close(model.nodes["1.y"]["log_prob"], prior[drawn], atol=1e-6, rtol=0)


@torch.no_grad()
def test_samples_are_those_of_the_class(cascade):
    labels = torch.tensor([0, 1, 2, -1]).repeat_interleave(20_000)
    drawn = cascade.sample(torch.zeros(len(labels), 4).double(), labels).reshape(4, -1, 4)
    every = all_bits(4).double()
    p = tower_joint(cascade, every).exp()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0).double(), atol=1e-6, rtol=0)
    expected = torch.cat([(p / p.sum(0)).T @ every, (p.sum(1) @ every)[None]])
    assert (drawn.mean(1) - expected).abs().max() < 4.5 * 0.5 / 20_000**0.5
    assert (expected - expected[3]).abs().max() > 0.03
    assert cascade.sample(5, None).shape == (5, 4)
    assert cascade.encode(X, Y).shape == (8, 1)


def two_models():
    torch.manual_seed(0)
    return Cascade(VAE(6, 2, units=8), M2(2, 3, 2, units=8, likelihood="gaussian"), args=[(), (0,)])


@pytest.fixture
def data():
    torch.manual_seed(1)
    return (torch.rand(60, 6) < 0.5).float(), torch.randint(-1, 3, (60,))


def test_kingmas_two_models_are_trained_greedily(data):
    cascade = two_models()
    result = greedy(cascade, data, validation=data, epochs=2, batch_size=20, seed=0)
    assert [stage.name for stage in result.stages] == ["VAE", "M2"]
    assert all(stage.fit.epochs_run == 2 for stage in result.stages)
    # The first stage has no use for labels: it learns what it learns without them.
    alone = two_models()
    greedy(alone[:1], data[0], validation=data[0], epochs=2, batch_size=20, seed=0)
    for (name, mine), (_, other) in zip(
        cascade[0].named_parameters(), alone[0].named_parameters(), strict=True
    ):
        assert torch.equal(mine, other), name
    # The stage below stays as it is while the last one is trained.
    below = copy.deepcopy(list(cascade[0].parameters()))
    batches = labelled_batches(*data, batch_size=10, labelled_per_batch=5)
    greedy(cascade, batches, start=1, epochs=1, seed=0)
    assert all(map(torch.equal, below, cascade[0].parameters()))


def test_all_stages_are_trained_together_by_the_plain_bound(data):
    cascade = two_models()
    before = {n: t.detach().clone() for n, t in cascade.named_trainable(*data).items()}
    fit(cascade, data, epochs=2, batch_size=20, seed=0)
    after = cascade.named_trainable(*data)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_files_and_copies_keep_the_bound(data, tmp_path):
    cascade = two_models()
    cascade.save(tmp_path / "cascade.pt")
    twin = copy.deepcopy(cascade)
    fit(twin[1], (torch.randn(60, 2), data[1]), epochs=1, seed=0)

    def score(one):
        torch.manual_seed(5)
        return elbo(one, *data).value

    assert not torch.equal(score(twin), score(cascade))
    torch.testing.assert_close(score(twin.load(tmp_path / "cascade.pt")), score(cascade))
    one, two = cascade[:1], Cascade(cascade[:1], cascade[1], args=[(), (0,)])
    assert two.args == cascade.args
    assert one.encode(data[0]).shape == (60, 2)


class Stop(Exception):
    """Stands for a killed process."""


def test_training_on_mixed_batches_resumes_within_an_epoch(data, tmp_path):
    """Killed in the middle of an epoch and started again, it ends bit-equal."""

    def run(path, kill=None):
        cascade = two_models()
        batches = labelled_batches(*data, batch_size=6, labelled_per_batch=3)
        item = list(cascade.rounds(batches))[1]
        seen = 0

        class Hook(Callback):
            def on_batch(self, state):
                nonlocal seen
                seen += 1
                if seen == kill:
                    raise Stop

        fit(
            item.pair,
            item.data,
            transform=item.transform,
            epochs=3,
            seed=3,
            checkpoint=path,
            checkpoint_every=2,
            callbacks=[Hook()],
        )
        return list(cascade[1].parameters())

    whole = run(tmp_path / "whole.pt")
    with pytest.raises(Stop):
        run(tmp_path / "cut.pt", kill=8)
    again = run(tmp_path / "cut.pt")
    assert all(map(torch.equal, whole, again))


def test_labels_must_fit_the_data():
    cascade = Cascade(tiny(3), args=[(0,)])
    with pytest.raises(ValueError, match=r"\(8,\)"):
        cascade.encode(all_bits(3).double(), torch.zeros(5).long())
    with pytest.raises(TypeError, match="further argument 0"):
        cascade.encode(all_bits(3).double())
