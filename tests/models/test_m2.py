"""The semi-supervised pair against quadrature, class by class."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumerated import all_bits
from labelled_pairs import CLASSES, bounds, log_joint, log_q, scored, tiny, unlabelled
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch.distributions import kl_divergence

from pyroboost import Cascade
from pyroboost.evaluation import draw, elbo, log_weights
from pyroboost.infer import fit
from pyroboost.infer.objectives import scale_latents
from pyroboost.models import M2, VAE
from pyroboost.models._labelled import EVERY, Labelled
from pyroboost.models._m2 import Joined

X = all_bits(3).double()
Y = torch.tensor([0, -1, 2, 1, -1, 0, -1, 2])


def mean_and_error(values):
    return values.mean(0), values.std(0) / len(values) ** 0.5


# The law of a class that is known for some data


def test_a_label_keeps_its_own_mass_and_leaves_none_to_others():
    logits = torch.randn(5, CLASSES).double()
    labels = torch.tensor([2, -1, 0, -1, 1])
    p = logits.softmax(-1)
    for normalised in (False, True):
        law = Labelled(logits, labels, normalised=normalised)
        table = torch.stack([law.log_prob(torch.tensor(c)) for c in range(CLASSES)], -1).exp()
        for n, label in enumerate(labels.tolist()):
            expected = p[n].clone()
            if label >= 0:
                expected = torch.zeros(CLASSES).double()
                expected[label] = 1.0 if normalised else p[n, label]
            torch.testing.assert_close(table[n], expected)


def test_draws_are_the_labels_where_there_are_any():
    law = Labelled(torch.tensor([0.5, 0.2, 0.3]).log(), torch.tensor([2, -1]))
    drawn = law.sample((20_000,))
    assert (drawn[:, 0] == 2).all()
    share = torch.bincount(drawn[:, 1], minlength=3) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.2, 0.3]), atol=0.015, rtol=0)


def test_the_law_can_be_expanded_and_enumerated():
    law = Labelled(torch.randn(3), torch.tensor([1, -1])).expand((4, 2))
    assert law.batch_shape == (4, 2)
    every = law.enumerate_support()
    assert every.shape == (3, 4, 2)
    mass = law.log_prob(every).exp().sum(0)
    assert (mass[:, 0] < 1).all()
    torch.testing.assert_close(mass[:, 1], torch.ones(4))


def test_divergence_counts_the_mass_of_the_label():
    prior, other = torch.randn(3).double(), torch.randn(2, 3).double()
    labels = torch.tensor([1, -1])
    p, q = Labelled(prior, labels), Labelled(other, labels, normalised=True)
    found = kl_divergence(q, p)
    free = kl_divergence(dist.Categorical(logits=other[1]), dist.Categorical(logits=prior))
    torch.testing.assert_close(found, torch.stack([-prior.log_softmax(-1)[1], free]))


def test_joined_is_one_linear_layer_of_value_and_one_hot_class():
    net = Joined(4, CLASSES, [5, 2], batch_norm=False, activation=torch.nn.Tanh)
    value, label = torch.randn(6, 4), torch.arange(6) % CLASSES
    both = torch.cat([value, torch.nn.functional.one_hot(label, CLASSES).float()], -1)
    weight = torch.cat([net.value.weight, net.label.T], 1)
    hidden = (both @ weight.T + net.value.bias).tanh()
    torch.testing.assert_close(net(value, label), net.above.net[-1](hidden))
    # Classes that lead are broadcast against the data.
    lead = torch.arange(CLASSES)[:, None]
    apart = torch.stack([net(value, torch.full((6,), c)) for c in range(CLASSES)])
    torch.testing.assert_close(net(value, lead), apart)


# The programs


def test_the_class_is_one_site_with_the_label_where_it_is_known():
    pair = tiny(label="digit")
    guide = pyro.poutine.trace(pair.guide).get_trace(X, Y)
    model = pyro.poutine.trace(pyro.poutine.replay(pair.model, trace=guide)).get_trace(X, Y)
    guide.compute_log_prob()
    model.compute_log_prob()
    known = Y >= 0
    assert torch.equal(guide.nodes["digit"]["value"][known], Y[known])
    assert (guide.nodes["digit"]["log_prob"][known] == 0).all()
    drawn = guide.nodes["digit"]["value"]
    expected = log_q(pair, X)[torch.arange(8), drawn]
    torch.testing.assert_close(guide.nodes["digit"]["log_prob"][~known], expected[~known])
    prior = torch.tensor([0.5, 0.2, 0.3]).double().log()
    torch.testing.assert_close(model.nodes["digit"]["log_prob"], prior[drawn], atol=1e-6, rtol=0)
    assert {n for n, s in model.nodes.items() if s["type"] == "sample"} == {
        *("data", "digit", "z", "x"),
    }


def test_weights_average_to_the_joint_with_a_label_and_to_the_marginal_without():
    pair = tiny()
    joint = log_joint(pair, X)
    exact = torch.where(Y >= 0, joint.gather(1, Y.clamp(min=0)[:, None])[:, 0], joint.logsumexp(1))
    weights = log_weights(pair, X, Y, num_samples=20_000).exp()
    mean, error = mean_and_error(weights)
    assert ((mean - exact.exp()).abs() < 4.5 * error).all()
    assert ((mean * 0.9 - exact.exp()).abs() > 4.5 * error).any()
    without, error = mean_and_error(log_weights(pair, X, num_samples=20_000).exp())
    assert ((without - joint.logsumexp(1).exp()).abs() < 4.5 * error).all()
    torch.testing.assert_close(joint.exp().sum(), torch.tensor(1.0).double(), atol=1e-6, rtol=0)


def test_elbo_of_partly_labelled_data_is_the_bound_of_each_row():
    pair = tiny()
    found = elbo(pair, X, Y, num_samples=20_000)
    own = bounds(pair, X).gather(1, Y.clamp(min=0)[:, None])[:, 0]
    exact = torch.where(Y >= 0, own, unlabelled(pair, X))
    assert ((found.value - exact).abs() < 4.5 * found.std_error).all()


@pytest.mark.parametrize("vectorized", [False, True])
def test_particles_agree(vectorized):
    pair = tiny()
    loss = Trace_ELBO(num_particles=3000, vectorize_particles=True, max_plate_nesting=1)
    if not vectorized:
        loss = Trace_ELBO(num_particles=150)
    rows = bounds(pair, X).gather(1, Y.clamp(min=0)[:, None])[:, 0]
    exact = torch.where(Y >= 0, rows, unlabelled(pair, X)).sum().detach()
    error = 12.0 / (3000 if vectorized else 150) ** 0.5
    assert abs(loss.loss(pair.model, pair.guide, X, Y) + float(exact)) < error


def test_enumeration_of_the_class_in_the_guide_is_the_same_bound():
    pair = tiny()
    loss = TraceEnum_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    found = loss.loss(pair.model, config_enumerate(pair.guide), X, Y)
    own = bounds(pair, X).gather(1, Y.clamp(min=0)[:, None])[:, 0]
    exact = torch.where(Y >= 0, own, unlabelled(pair, X)).sum().detach()
    assert abs(found + float(exact)) < 0.25


def test_enumeration_of_the_class_in_the_model_keeps_the_labels():
    """With z fixed, summing the model's class out leaves p(label) m(x | label, z) on its row."""
    pair, z = tiny(), torch.randn(8, 1).double()
    model = config_enumerate(pyro.poutine.condition(pair.model, {"z": z}))
    loss = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    found = -loss.loss(model, lambda x, y: None, X, Y)
    each = torch.stack([scored(pair, X, c, z)[:, 0] for c in range(CLASSES)], -1)
    exact = torch.where(Y >= 0, each.gather(1, Y.clamp(min=0)[:, None])[:, 0], each.logsumexp(1))
    assert found == pytest.approx(float(exact.sum().detach()), abs=1e-6)


def test_samples_follow_the_class_and_p_of_y_where_it_is_missing():
    pair = tiny()
    labels = torch.tensor([0, 1, 2, -1]).repeat_interleave(20_000)
    torch.manual_seed(0)
    drawn = pair.sample(torch.zeros(len(labels), 3).double(), labels).reshape(4, -1, 3)
    p = log_joint(pair, X).exp()
    expected = torch.cat([(p / p.sum(0)).T @ X, (p.sum(1) @ X)[None]])
    assert (drawn.mean(1) - expected).abs().max() < 4.5 * 0.5 / 20_000**0.5
    assert (expected[0] - expected[1]).abs().max() > 0.05
    assert pair.sample(7).shape == (7, 3)


def test_it_decodes_and_encodes_with_labels():
    pair = tiny()
    assert pair.decode(torch.zeros(4, 1).double(), torch.tensor([0, 1, 2, -1])).shape == (4, 3)
    assert pair.encode(X, Y).shape == (8, 1)
    exact = -0.5 * (X[:, :1].square() + torch.tensor(2 * torch.pi).log()).sum(-1)
    torch.testing.assert_close(pair.log_prior(X[:, :1]).value, exact)


# The objective


def losses(pair, x, y, *, copies=4000, weights=None, beta=1.0, loss=None):
    """Return the loss of many copies of the data, one value each, averaged in 40 parts."""
    model, guide = pair.model, pair.guide
    if beta != 1.0:
        model, guide = scale_latents(beta)(model), scale_latents(beta, everything=True)(guide)
    own = loss or pair.objective()
    each = copies // 40
    wide = x.repeat(each, 1), None if y is None else y.repeat(each)
    options = {} if weights is None else {"weights": weights.repeat(each)}
    with torch.no_grad():
        values = [own(model, guide, *wide, **options) / each for _ in range(40)]
    return torch.stack(values)


def exact_loss(pair, x, y, *, a, b, alpha=0.0, beta=1.0):
    """Minus the weighted sum over rows, each row's own part of J.  # (N,)"""
    known = y >= 0
    rows = bounds(pair, x, beta).gather(1, y.clamp(min=0)[:, None])[:, 0]
    chosen = log_q(pair, x).gather(1, y.clamp(min=0)[:, None])[:, 0]
    return -torch.where(known, b * rows + alpha * chosen, a * unlabelled(pair, x, beta))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"labelled_weight": 0.9},
        {"labelled_weight": 0.2, "classification_weight": 3.0},
        {"labelled_share": 0.1, "classification_weight": 0.7},
    ],
)
def test_the_objective_is_j_times_the_number_of_rows(settings):
    pair = tiny(**settings)
    b, alpha = settings.get("labelled_weight", 0.5), settings.get("classification_weight", 0.0)
    share = settings.get("labelled_share", 5 / 8)
    rows = exact_loss(
        pair, X, Y, a=(1 - b) / (1 - share), b=b / share, alpha=alpha / share
    ).detach()
    mean, error = mean_and_error(losses(pair, X, Y))
    assert abs(mean - rows.sum()) < 4.5 * error
    if "labelled_share" not in settings:
        per_row = exact_loss(pair, X, Y, a=1, b=1, alpha=alpha / b)
        j = (1 - b) * per_row[Y < 0].mean() + b * per_row[Y >= 0].mean()
        assert abs(mean - 8 * j) < 4.5 * error
    weights = torch.rand(8).double()
    mean, error = mean_and_error(losses(pair, X, Y, weights=weights))
    assert abs(mean - weights @ rows) < 4.5 * error


def test_the_expectation_over_shuffled_batches_is_j_where_the_share_is_told():
    pair = tiny(labelled_share=5 / 8, labelled_weight=0.3)
    order = torch.tensor([1, 4, 6, 0, 2, 3, 5, 7])  # batches with 0, 2 and 3 labels
    cuts = [order[:3], order[3:5], order[5:]]
    total = sum(losses(pair, X[rows], Y[rows]) for rows in cuts)
    mean, error = mean_and_error(total)
    exact = exact_loss(pair, X, Y, a=0.7 * 8 / 3, b=0.3 * 8 / 5).sum()
    assert abs(mean - exact) < 4.5 * error


def test_a_batch_of_one_kind_has_the_other_term_left_out():
    pair = tiny(labelled_weight=0.3)
    mean, error = mean_and_error(losses(pair, X, None))
    assert abs(mean + 0.7 * unlabelled(pair, X).sum()) < 4.5 * error
    full = Y.clamp(min=0)
    mean, error = mean_and_error(losses(pair, X, full))
    rows = bounds(pair, X).gather(1, full[:, None])[:, 0]
    assert abs(mean + 0.3 * rows.sum()) < 4.5 * error


def test_annealing_scales_latent_terms_of_the_objective():
    pair = tiny()
    mean, error = mean_and_error(losses(pair, X, Y, beta=0.25))
    exact = exact_loss(pair, X, Y, a=0.5 * 8 / 3, b=0.5 * 8 / 5, beta=0.25).sum()
    assert abs(mean - exact) < 4.5 * error


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_within_a_cascade_of_one_stage_the_objective_is_the_same(beta):
    pair = tiny()
    cascade = Cascade(pair)
    a, error_a = mean_and_error(losses(cascade, X, Y, beta=beta, copies=400))
    b, error_b = mean_and_error(losses(pair, X, Y, beta=beta))
    assert abs(a - b) < 4.5 * (error_a**2 + error_b**2) ** 0.5


def test_the_gradient_is_that_of_j():
    pair = tiny(labelled_weight=0.4, classification_weight=0.5)
    exact_loss(pair, X, Y, a=0.6 * 8 / 3, b=0.4 * 8 / 5, alpha=0.5 * 8 / 5).sum().backward()
    exact = {name: p.grad.clone() for name, p in pair.named_parameters()}
    found = {name: [] for name in exact}
    for _ in range(20):
        pair.zero_grad()
        wide = X.repeat(200, 1), Y.repeat(200)
        (pair.objective()(pair.model, pair.guide, *wide) / 200).backward()
        for name, p in pair.named_parameters():
            found[name].append(p.grad.clone())
    for name, values in found.items():
        mean, error = mean_and_error(torch.stack(values))
        assert ((mean - exact[name]).abs() < 5 * error + 1e-9).all(), name
        assert exact[name].abs().max() > 0


def test_without_a_classification_loss_labels_do_not_move_the_classifier():
    pair = tiny()
    full = Y.clamp(min=0)
    pair.objective()(pair.model, pair.guide, X, full).backward()
    assert all(p.grad is None or not p.grad.any() for p in pair.guide.fn.classify.parameters())
    pair = tiny(classification_weight=0.1)
    pair.objective()(pair.model, pair.guide, X, full).backward()
    assert all(p.grad.abs().max() > 0 for p in pair.guide.fn.classify.parameters())


# Use


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("shape", [4, (2, 2)])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_it_is_fitted_like_any_pair(likelihood, shape, batch_norm):
    pair = M2(shape, 3, 2, units=6, layers=2, likelihood=likelihood, batch_norm=batch_norm)
    size = (40, 4) if shape == 4 else (40, 2, 2)
    x = (torch.rand(size) < 0.5).float()
    y = torch.arange(40) % 4 - 1
    before = {name: t.detach().clone() for name, t in pair.named_trainable(x, y).items()}
    result = fit(pair, (x, y), validation=(x, y), epochs=2, batch_size=20, seed=0, annealing=1)
    assert result.best_bound is not None
    after = pair.named_trainable(x, y)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert pair.sample(3, torch.tensor([0, -1, 2])).shape == (3, *size[1:])
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert torch.isfinite(torch.tensor(svi.step(x, y)))


def test_labels_decide_what_is_learnt():
    """Two clouds of points whose labels are known for two rows only."""
    torch.manual_seed(0)
    y = torch.arange(200) % 2
    x = torch.randn(200, 2) * 0.3 + 4.0 * y[:, None] - 2
    labels = torch.full((200,), -1)
    labels[:2] = 1 - y[:2]
    pair = M2(2, 2, 1, units=16, likelihood="gaussian", labelled_share=0.01)
    fit(pair, (x, labels), epochs=60, batch_size=200, lr=0.02, seed=0)
    right = pair.guide.fn.logits(x).argmax(-1) == 1 - y
    assert right.float().mean() > 0.98


def test_state_survives_copies_files_and_precision(tmp_path):
    pair = M2(3, 3, 1, units=5)
    x = X.float()

    def score(one, data):
        torch.manual_seed(3)
        return draw(one, data, Y).log_weight

    before = score(pair, x)
    twin = copy.deepcopy(pair)
    pair.save(tmp_path / "pair.pt")
    fit(twin, (x, Y), epochs=1, batch_size=4, seed=0)
    assert torch.equal(score(pair, x), before)
    assert not torch.equal(score(twin, x), before)
    torch.testing.assert_close(score(twin.load(tmp_path / "pair.pt"), x), before)
    wide = copy.deepcopy(pair).double()
    assert score(wide, X).dtype == torch.float64
    assert wide.objective()(wide.model, wide.guide, X, Y).dtype == torch.float64
    assert "label='y'" in repr(pair)


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (torch.zeros(8), TypeError, "torch.float32"),
        (torch.ones(8).bool(), TypeError, "torch.bool"),
        ([0] * 8, TypeError, "list"),
        (torch.zeros(7).long(), ValueError, r"\(8,\)"),
        (torch.zeros(8, 3).long(), ValueError, r"\(8,\)"),
        (torch.full((8,), 3), ValueError, "0 to 2"),
        (torch.full((8,), -2), ValueError, "-1 where"),
    ],
)
def test_labels_of_no_use_are_refused(labels, error, words):
    pair = tiny()
    with pytest.raises(error, match=words):
        pair.encode(X, labels)
    with pytest.raises(error, match=words):
        pair.sample(X, labels)


def test_settings_of_no_use_are_refused():
    for bad in (
        {"labelled_weight": 0.0},
        {"labelled_weight": 1.0},
        {"labelled_share": 1.5},
        {"classification_weight": -1.0},
        {"likelihood": "poisson"},
        {"label": "z"},
        {"layers": 0},
        {"prior": [0.5, 0.5]},
        {"prior": [1.0, 0.0, 0.0]},
    ):
        with pytest.raises(ValueError, match="M2:"):
            M2(4, 3, 2, units=4, **bad)
    with pytest.raises(ValueError, match="two classes"):
        M2(4, 1, 2, units=4)
    pair = M2(4, 3, 2, units=4)
    with pytest.raises(ValueError, match="takes"):
        pair.encode(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="binarise"):
        elbo(pair, torch.full((5, 4), 0.5))


def test_every_class_stands_for_labels_in_a_leading_dimension():
    pair = tiny()
    guide = pyro.poutine.trace(pair.guide).get_trace(X, EVERY)
    assert guide.nodes["z"]["value"].shape == (CLASSES, 8, 1)
    assert torch.equal(guide.nodes["y"]["value"], torch.arange(CLASSES)[:, None].expand(-1, 8))
    drawn = pyro.poutine.trace(pair.model).get_trace(X, EVERY)
    assert drawn.nodes["z"]["value"].shape == (CLASSES, 8, 1)


def test_a_vae_below_takes_no_labels_and_the_names_are_kept():
    cascade = Cascade(
        VAE(4, 2, units=4), M2(2, 3, 2, units=4, likelihood="gaussian"), args=[(), (0,)]
    )
    x, y = (torch.rand(6, 4) < 0.5).float(), torch.tensor([0, 1, 2, -1, -1, 0])
    guide = pyro.poutine.trace(cascade.guide).get_trace(x, y)
    assert torch.equal(guide.nodes["1.y"]["value"][y >= 0], y[y >= 0])
