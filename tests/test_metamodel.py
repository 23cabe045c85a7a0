"""The contract of a meta-model, for pairs of every make."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumerated import BitPair, all_bits, bernoulli
from pairs import MAKES, VAE, data_plate, functions, modules, seeded_log_joint, standard, train
from pyro import poutine
from torch import nn

from pyroboost import Likelihood, MetaModel
from pyroboost.traces import datum_log_prob, latent_parents

every_make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


@every_make
def test_encode_decode_sample_have_the_right_shapes(make):
    pair, x = make(3, 2), torch.randn(5, 3)
    h = pair.encode(x)
    assert h.shape == (5, 2)
    assert not h.requires_grad
    assert pair.decode(h).shape == (5, 3)
    assert pair.sample(7).shape == (7, 3)
    assert pair.sample(torch.zeros(4, 3)).shape == (4, 3)
    assert pair.sample_hidden(4).shape == (4, 2)


def test_services_draw_from_the_laws_of_the_pair():
    """Means and spreads of many draws against the Gaussian laws written out."""
    pair, n = modules(1, 1), 200_000
    x = torch.full((n, 1), 1.5)
    net, guide = pair.model.fn.net, pair.guide.fn
    weight, bias = net.weight.item(), net.bias.item()
    laws = [
        (pair.encode(x), guide.net(x[:1]).item(), guide.log_scale.exp().item()),
        (pair.decode(x), weight * 1.5 + bias, 0.8),
        (pair.sample(x), bias, math.hypot(weight, 0.8)),
        (pair.sample_hidden(x), 0.0, 1.0),
    ]
    for drawn, mean, spread in laws:
        assert abs(drawn.mean().item() - mean) < 5 * spread / math.sqrt(n)
        assert abs(drawn.std().item() / spread - 1) < 5 / math.sqrt(2 * n)


@every_make
def test_log_prior_is_the_density_of_the_hidden_site(make):
    pair, h = make(3, 2), torch.randn(6, 2)
    known = pair.log_prior(h, template=torch.zeros(6, 3))
    assert known.kind == "exact"
    assert torch.allclose(known.value, standard(2, h).log_prob(h))
    assert pair.log_marginal(torch.zeros(6, 3)) is None
    assert pair.objective() is None


def test_log_prior_ignores_scale_and_obeys_masks():
    on = torch.tensor([True, False, True])

    def model(x):
        with pyro.plate("data", 30, subsample_size=3), poutine.mask(mask=on):
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([3]))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    pair = MetaModel(model, lambda x: None, visible="x", hidden="h")
    h = torch.randn(3)
    expected = torch.where(on, dist.Normal(0.0, 1.0).log_prob(h), torch.zeros(()))
    assert torch.allclose(pair.log_prior(h, template=h).value, expected)


def test_number_of_draws_needs_a_known_shape():
    pair = modules(3, 2)
    with pytest.raises(ValueError, match="shape of 'x' is unknown before any data; pass a templ"):
        pair.sample(3)
    pair.encode(torch.zeros(2, 3))
    assert pair.sample(3).shape == (3, 3)
    with pytest.raises(ValueError, match="name two different sites"):
        MetaModel(lambda x: None, lambda x: None, visible="x", hidden="x")


def test_generation_leaves_labels_and_factors_as_they_are():
    """A factor made latent, or a label drawn anew, would show in what is drawn."""

    def model(x, label):
        with pyro.plate("data", len(x)):
            pyro.sample("label", dist.Bernoulli(0.5), obs=label)
            h = pyro.sample("h", dist.Normal(1e3 * label, 1.0))
            pyro.factor("extra", h)
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    def guide(x, label):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(x, 1.0))

    pair = MetaModel(model, guide, visible="x", hidden="h")
    label = torch.tensor([0.0, 1.0, 1.0, 0.0])
    x = pair.sample(torch.zeros(4), label)
    assert torch.equal(x > 500, label.bool())
    h = pair.encode(x, label)
    assert torch.equal(pair.decode(h, label) > 500, label.bool())
    assert torch.allclose(pair.log_prior(h, label).value, dist.Normal(1e3 * label, 1).log_prob(h))


def test_hidden_with_latent_parents_is_refused_where_a_number_would_be_wrong():
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
            h = pyro.sample("h", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(h + model.direct * c, 1.0), obs=x)

    pair = MetaModel(model, lambda x: None, visible="x", hidden="h", visible_shape=())
    model.direct = 0.0
    with pytest.raises(ValueError, match="hidden site 'h' depends on the latent 'c'"):
        pair.log_prior(torch.zeros(3))


def test_decode_is_refused_only_where_parents_reach_x_past_h():
    def model(x, direct):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
            h = pyro.sample("h", dist.Normal(c, 1.0))
            loc = h + c if direct else h
            pyro.sample("x", dist.Normal(loc, 1e-3), obs=x)

    def make():
        return MetaModel(model, lambda x, d: None, visible="x", hidden="h", visible_shape=())

    h = torch.tensor([5.0, -5.0])
    assert torch.allclose(make().decode(h, False), h, atol=0.1)
    with pytest.raises(ValueError, match="depends on the latent 'c'"):
        make().decode(h, True)


def test_latent_parents_follow_long_ways_round():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        h = pyro.sample("h", dist.Normal(b, 1.0))
        c = pyro.sample("c", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(h + c, 1.0), obs=torch.tensor(0.0))

    assert latent_parents(model, "h") == ["b"]
    assert latent_parents(model, "h", around="x") == ["b"]  # x <- c <- a -> b -> h
    assert latent_parents(model, "a") == []


def test_own_vae_class_as_in_the_tutorial_is_a_meta_model():
    """Modules and methods that register their networks, SVI as its tutorial runs it."""
    vae = VAE(4, 2)
    pair = MetaModel(vae.model, vae.guide, visible="x", hidden="z")
    x = torch.randn(8, 4)
    losses = train(pair, x, steps=60, lr=0.02)
    assert sum(losses[-10:]) < sum(losses[:10])
    torch.manual_seed(2)
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({}), pyro.infer.Trace_ELBO())
    plain = svi.evaluate_loss(x)
    assert abs(seeded_log_joint(pair, x, seed=2) + plain) < 1e-4


def test_services_run_in_eval_mode_and_give_modes_back():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(2), nn.Dropout(0.9)
            self.norm.eval()

        def forward(self, x):
            with data_plate(x):
                z = pyro.sample("z", standard(2, x))
                law = dist.Normal(self.drop(self.norm(z)), 1.0).to_event(1)
                pyro.sample("x", law, obs=x)

    pair = MetaModel(Model(), Model(), visible="x", hidden="z", visible_shape=(2,))
    seen = []
    pair.model.fn.drop.register_forward_hook(lambda m, *_: seen.append(m.training))
    pair.decode(torch.ones(9, 2))
    pair.sample(torch.ones(9, 2))
    assert set(seen) == {False}
    assert pair.training
    assert pair.model.fn.drop.training
    assert not pair.model.fn.norm.training
    assert torch.equal(pair.model.fn.norm.running_mean, torch.zeros(2))


def test_services_do_not_speak_to_handlers_outside():
    pair = modules(3, 2)
    with poutine.trace() as tr:
        pair.sample(torch.zeros(4, 3))
        pair.encode(torch.zeros(4, 3))
        pair.decode(torch.zeros(4, 2))
    assert list(tr.trace.nodes) == []


def test_density_of_bits_against_enumeration():
    """The exact joint of the pair from its trace, for each of all hidden values."""
    pair, x = BitPair(3, 2), all_bits(3)
    h = all_bits(2)
    for row in h:
        model = poutine.condition(pair.model, data={"h": row.expand(8, 2)})
        trace = poutine.trace(model).get_trace(x)
        trace.compute_log_prob()
        total = sum(datum_log_prob(trace.nodes[name], 8) for name in ("h", "x"))
        assert torch.allclose(total, pair.m.log_joint(x, row[None])[:, 0], atol=1e-6)
    assert torch.allclose(pair.log_prior(h, template=x[:4]).value, bernoulli(h, pair.m.prior))


def test_datum_log_prob_sums_pixels_and_refuses_global_sites():
    def program():
        pyro.sample("shared", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4, dim=-2), pyro.plate("pixels", 3, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([4, 3]))

    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    value = trace.nodes["x"]["value"]
    expected = dist.Normal(0.0, 1.0).log_prob(value).sum(-1)
    assert torch.allclose(datum_log_prob(trace.nodes["x"], 4), expected)
    with pytest.raises(ValueError, match="site 'shared' has log densities of shape"):
        datum_log_prob(trace.nodes["shared"], 4)


# Files


def test_save_replaces_the_file_in_one_step(tmp_path, monkeypatch):
    pair, path = modules(3, 2), tmp_path / "pair.pt"
    pair.save(path)
    good = path.read_bytes()

    def dies(thing, part):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        pair.save(path)
    assert path.read_bytes() == good


def test_files_hold_tensors_only(tmp_path):
    pair, x = functions(3, 2), torch.randn(4, 3)
    train(pair, x)
    pair.save(tmp_path / "pair.pt")
    saved = torch.load(tmp_path / "pair.pt", weights_only=True)
    assert {"a_decoder", "a_noise"} <= saved["state"]["model._extra_state"].keys()


WRONG = {
    "other sizes": lambda: modules(5, 2),
    "other make": lambda: MAKES["methods"](3, 2),
    "other params": lambda: functions(3, 2, "other"),
}


@pytest.mark.parametrize("make", [modules, functions, MAKES["pyro_modules"]])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_load_of_a_wrong_file_changes_nothing(make, wrong, tmp_path):
    x, path = torch.randn(4, 3), tmp_path / "wrong.pt"
    pair, other = make(3, 2), wrong()
    train(pair, x)
    train(other, torch.randn(4, 5) if wrong is WRONG["other sizes"] else x)
    other.save(path)
    value = seeded_log_joint(pair, x)
    with pytest.raises(ValueError, match=re.escape(str(path)) + " does not hold the state of this"):
        pair.load(path)
    assert seeded_log_joint(pair, x) == value


def test_load_of_params_of_another_shape_changes_nothing(tmp_path):
    x = torch.randn(4, 3)
    other = functions(3, 1)
    train(other, x)
    other.save(tmp_path / "pair.pt")
    pyro.clear_param_store()
    pair = functions(3, 2)
    train(pair, x)
    value = seeded_log_joint(pair, x)
    with pytest.raises(ValueError, match="param 'a_decoder' has shape"):
        pair.load(tmp_path / "pair.pt")
    assert seeded_log_joint(pair, x) == value


def test_load_says_what_is_wrong_with_a_file(tmp_path):
    pair = modules(3, 2)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        pair.load(tmp_path / "nowhere.pt")
    (tmp_path / "broken.pt").write_bytes(b"not a file of torch")
    with pytest.raises(ValueError, match="does not hold the state"):
        pair.load(tmp_path / "broken.pt")


# Likelihoods


def test_likelihood_knows_its_kind_and_error():
    value = torch.tensor([-1.0, -2.0, -6.0])
    known = Likelihood(value, "bound", num_samples=5, shared_error=0.3)
    assert known.mean == -3.0
    spread = value.std().item() / math.sqrt(3)
    assert abs(known.standard_error - math.hypot(spread, 0.3)) < 1e-6
    assert "lower bound, 5 samples" in known.describe()
    with pytest.raises(ValueError, match="it must be one of exact, bound, estimate"):
        Likelihood(value, "good")


def test_joined_likelihoods_are_as_weak_as_their_weakest():
    parts = [Likelihood(torch.zeros(2), "exact"), Likelihood(torch.ones(3), "estimate")]
    joined = Likelihood.cat(parts)
    assert joined.kind == "estimate"
    assert joined.value.tolist() == [0, 0, 1, 1, 1]
    assert len(joined) == 5
    with pytest.raises(ValueError, match="no block to join"):
        Likelihood.cat([])


def test_fitting_teaches_the_shape_of_a_datum():
    """After a fit a number of draws is enough for a pair that did not say its shape."""
    from pyroboost.infer import fit

    def model(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None] + loc, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 1.0))

    pair = MetaModel(model, guide, visible="x", hidden="z")
    with pytest.raises(ValueError, match="pass a template"):
        pair.sample(4)
    fit(pair, torch.randn(20, 2), epochs=1)
    assert pair.sample(4).shape == (4, 2)
