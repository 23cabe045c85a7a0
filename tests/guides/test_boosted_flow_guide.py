"""The amortised mixture of flows as a guide: its law, its particles, its place in a cascade."""

import copy
import math

import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

from pyroboost import MetaModel, flows
from pyroboost.compose import Cascade
from pyroboost.distributions import BoostedFlow
from pyroboost.evaluation import decompose, elbo, log_likelihood, log_weights, posterior_quality
from pyroboost.guides import BoostedFlowGuide
from pyroboost.infer import Fit, StratifiedELBO, boost, fit, gradient_variance, greedy
from pyroboost.models import IWAE, VAE


def bits(rows=8, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, dim, generator=generator) < 0.4).float()


def boosted(context=0, weights=(0.5, 0.3, 0.2), spread=0.5, latent=3, hidden="z", kind=VAE, **more):
    """A VAE whose three components all have weight."""

    def make(dim):
        return flows.realnvp(dim, 1, units=8, context=context, spread=spread)

    def guide(encoder):
        return BoostedFlowGuide(encoder, latent, len(weights), make, hidden=hidden)

    vae = kind(6, latent, units=8, guide=guide, context=context, hidden=hidden, **more)
    vae.guide.fn.components.weights.copy_(torch.tensor(weights))
    return vae.eval()


@pytest.mark.parametrize("context", [0, 4])
def test_weights_are_the_hand_written_ones(context):
    """log m(x, z) - log q(z | x), the mixture summed over its components by hand."""
    vae, x = boosted(context), bits()
    guide = vae.guide.fn
    with poutine.trace() as traced:
        vae.guide(x)
    site = traced.trace.nodes["z"]
    z = site["value"].detach()
    out = vae.encoder(x)
    loc, raw = out[:, :3], out[:, 3:6]
    scale = nn.functional.softplus(raw) + 1e-4
    h = out[:, 6:] if context else None
    total = 0.0
    for weight, flow in zip((0.5, 0.3, 0.2), guide.components.flows, strict=True):
        z0, log_det = flow.inverse(z, h)
        total = (
            total
            + weight * (torch.distributions.Normal(loc, scale).log_prob(z0).sum(-1) + log_det).exp()
        )
    assert torch.allclose(site["fn"].log_prob(z), total.log(), atol=1e-5)
    assert torch.allclose(guide.posterior(x).log_prob(z), total.log(), atol=1e-5)


def test_every_component_is_drawn_in_its_share():
    """Components told apart by far shifts are counted over the data."""
    vae = boosted()
    guide = vae.guide.fn
    with torch.no_grad():
        for c, flow in enumerate(guide.components.flows):
            for step in flow.steps:
                step.net.outer.weight.zero_()
                step.net.outer.bias.zero_()
            moved = flow.steps[0].net.outer.bias.view(-1, 2)
            moved[:, 0] = 1000.0 * c
    z = vae.encode(bits(3000))
    place = (z / 1000).round().amax(-1).long()
    shares = torch.bincount(place, minlength=3) / 3000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.045)


@pytest.mark.parametrize("context", [0, 4])
def test_particles_stand_on_the_left(context):
    vae, x = boosted(context), bits(5)
    loose = Trace_ELBO(num_particles=1)
    wide = Trace_ELBO(num_particles=6000, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        together = wide.loss(vae.model, vae.guide, x)
        one_by_one = torch.tensor([loose.loss(vae.model, vae.guide, x) for _ in range(600)])
    table = log_weights(vae, x, num_samples=6000)
    error = table.sum(1).std() / 6000**0.5
    assert abs(table.sum(1).mean() + together) < 6 * error
    assert abs(one_by_one.mean() - together) < 5 * one_by_one.std() / 600**0.5


def test_importance_sampling_agrees_with_the_normal_guide():
    """Both proposals estimate one log m(x)."""
    vae, x = boosted(spread=0.2), bits(4)
    plain = VAE(6, 3, units=8)
    plain.model.fn.net.load_state_dict(vae.decoder.state_dict())
    plain.encoder.load_state_dict(vae.encoder.state_dict())
    ours = log_likelihood(vae, x, num_samples=20_000)
    theirs = log_likelihood(plain, x, num_samples=20_000)
    error = (ours.std_error**2 + theirs.std_error**2).sqrt()
    assert ((ours.value - theirs.value).abs() < 5 * error).all()
    assert error.max() < 0.1


def test_one_component_trains_like_an_ordinary_guide():
    """Gradients reach encoder, decoder and component 0, and nothing else moves."""
    vae = boosted(weights=(1.0, 0.0, 0.0))
    x = bits(200)
    before = {n: p.clone() for n, p in vae.named_parameters()}
    found = fit(vae, x, epochs=30, lr=5e-3, seed=0)
    assert found.history[-1]["loss"] < found.history[0]["loss"] - 0.1
    for name, parameter in vae.named_parameters():
        still = ".flows.1." in name or ".flows.2." in name
        assert torch.equal(parameter, before[name]) == still, name


def test_plain_svi_and_a_pair_of_its_own():
    """MetaModel(vae.model, guide) over a trained encoder starts from the same posterior."""
    vae, x = VAE(6, 3, units=8).eval(), bits(50)
    guide = BoostedFlowGuide(vae.encoder, 3, 2, lambda d: flows.realnvp(d, 1, spread=0.0))
    pair = MetaModel(vae.model, guide, visible="x", hidden="z")
    ours, theirs = elbo(pair, x, num_samples=2000), elbo(vae, x, num_samples=2000)
    error = (ours.std_error**2 + theirs.std_error**2).sqrt()
    assert ((ours.value - theirs.value).abs() < 5 * error).all()
    svi = SVI(pair.model, pair.guide, Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert pair.guide.fn.encoder is vae.encoder


def test_a_cascade_with_boosted_stages_has_the_bound_identity():
    """The sum of the L_i is the ELBO of the composed pair, and each stage keeps its own flows."""
    below = boosted()
    above = VAE(
        3,
        2,
        units=8,
        likelihood="gaussian",
        guide=lambda encoder: BoostedFlowGuide(
            encoder, 2, 2, lambda d: flows.realnvp(d, 1, units=8, spread=0.5)
        ),
    ).eval()
    above.guide.fn.components.weights.copy_(torch.tensor([0.6, 0.4]))
    cascade, x = Cascade(below, above), bits(30)
    terms = decompose(cascade, x, num_samples=400, num_importance=1)
    whole = elbo(cascade, x, num_samples=400)
    total, error = terms.partial_sums()[-1]
    assert abs(total - whole.mean) < 0.15
    guide = poutine.trace(cascade.guide).get_trace(x)
    sites = [
        s
        for s in guide.nodes.values()
        if s["type"] == "sample" and isinstance(s["fn"], BoostedFlow)
    ]
    assert [len(s["fn"].components) for s in sites] == [3, 2]
    wide = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        assert abs(-wide.loss(cascade.model, cascade.guide, x) / 30 - whole.mean) < 0.15
    assert error > 0


def test_iwae_and_posterior_quality_take_it():
    iwae, x = boosted(kind=IWAE, num_samples=3), bits(20)
    assert iwae.encode(x).shape == (20, 3)
    assert posterior_quality(iwae, x, num_samples=50).elbo.std_error > 0
    kept = {name: p.clone() for name, p in iwae.named_parameters()}
    twin = copy.deepcopy(iwae)
    with pytest.warns(UserWarning, match="3 components have weight.*score-function gradient"):
        fit(twin, x, epochs=1)
    assert all(torch.equal(p, kept[name]) for name, p in iwae.named_parameters())
    assert not torch.equal(twin.encoder.net[0].weight, iwae.encoder.net[0].weight)


def test_several_components_are_fitted_by_pathwise_gradients():
    """Without a word where the loss is the stratified one; Pyro's own loss warns, and measures."""
    vae, x = boosted(), bits(20)

    def noise(loss=None):
        found = gradient_variance(vae, x, loss=loss, num_draws=30, seed=0)
        return sum(g.variance for name, g in found.items() if name.startswith("guide"))

    one = noise(StratifiedELBO())
    with pytest.warns(UserWarning, match="3 components"):
        other = noise(Trace_ELBO(max_plate_nesting=1))
    assert noise() == one
    assert other > 4 * one
    assert math.isfinite(fit(vae, x, epochs=1).history[-1]["loss"])
    assert math.isfinite(Trace_ELBO().loss(vae.model, vae.guide, x))


def test_components_may_differ_and_state_is_kept(tmp_path):
    def make():
        listed = [lambda d: flows.lu(d), lambda d: flows.realnvp(d, 1, context=4)]
        return VAE(
            6, 3, units=8, context=4, guide=lambda e: BoostedFlowGuide(e, 3, flow=listed)
        ).eval()

    vae, x = make(), bits()
    vae.guide.fn.components.weights.copy_(torch.tensor([0.25, 0.75]))
    vae.save(tmp_path / "vae.pt")
    again = make().load(tmp_path / "vae.pt")
    z = vae.encode(x)
    assert torch.equal(
        again.guide.fn.posterior(x).log_prob(z), vae.guide.fn.posterior(x).log_prob(z)
    )
    assert "lu: 0.25, realnvp: 0.75" in repr(again.guide.fn.posterior(x))
    wide = copy.deepcopy(vae).double()
    double = wide.guide.fn.posterior(x.double()).log_prob(z.double())
    assert torch.allclose(double.float(), vae.guide.fn.posterior(x).log_prob(z), atol=1e-4)


def test_images_and_encoders_of_pairs():
    """Data of several dimensions, and an encoder that gives a tuple and knows no event_dim."""

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.head = nn.Linear(4 * 16, 7)

        def forward(self, x):
            assert x.dim() == 4, "one leading dimension, whatever stands before the data"
            h = self.head(self.conv(x).flatten(1))
            return h[:, :2], h[:, 2:4], h[:, 4:]

    guide = BoostedFlowGuide(
        Pairs(), 2, 2, lambda d: flows.realnvp(d, 1, context=3), event_dim=3, hidden="h"
    )
    x = torch.rand(2, 5, 1, 6, 6)
    base, context = guide.base(x)
    assert base.batch_shape == (2, 5)
    assert context.shape == (2, 5, 3)
    assert poutine.trace(guide).get_trace(x).nodes["h"]["value"].shape == (2, 5, 2)
    assert torch.allclose(base.mean[1], guide.base(x[1])[0].mean, atol=1e-6)


def test_refusals():
    encoder = nn.Linear(6, 6)
    with pytest.raises(
        ValueError, match=r"widths \[6\]; it must give 2 \+ 2: location, raw scale,"
    ):
        BoostedFlowGuide(encoder, 2)(bits())
    with pytest.raises(ValueError, match=r"must give 3 \+ 3 \+ 4: location, raw scale and context"):
        BoostedFlowGuide(encoder, 3, 2, lambda d: flows.realnvp(d, context=4))(bits())
    with pytest.raises(ValueError, match=r"contexts of widths \[2, 4\]"):
        BoostedFlowGuide(
            encoder, 3, flow=[lambda d: flows.lu(d, context=2), lambda d: flows.lu(d, context=4)]
        )
    with pytest.raises(ValueError, match="component 0: flow 'planar': step Planar has no inverse"):
        BoostedFlowGuide(encoder, 3, 2, lambda d: flows.planar(d, 2))
    with pytest.raises(ValueError, match="allow_slow=True"):
        BoostedFlowGuide(encoder, 3, 2, lambda d: flows.iaf(d, 2))
    assert BoostedFlowGuide(encoder, 3, 2, lambda d: flows.iaf(d, 2), allow_slow=True)
    with pytest.raises(ValueError, match="latent is 0"):
        BoostedFlowGuide(encoder, 0, 1, lambda d: flows.affine(2))
    with pytest.raises(ValueError, match="for 3 dimensions of one datum"):
        BoostedFlowGuide(encoder, 3, event_dim=3)(bits())
    with pytest.raises(ValueError, match="context is 4, further outputs of the default encoder"):
        VAE(6, 2, context=4)


def test_boosting_a_stage_of_a_cascade():
    """A stage is boosted on what the stage below infers, like any pair; its bound is the ELBO."""
    below, x = VAE(6, 3, units=8).eval(), bits(300)
    above = VAE(
        3,
        2,
        units=8,
        likelihood="gaussian",
        guide=lambda encoder: BoostedFlowGuide(encoder, 2, 2, lambda d: flows.realnvp(d, 1)),
    )
    torch.manual_seed(0)
    h = below.encode(x)
    report = boost(above, h[:200], validation=h[200:], epochs=4, finetune=1, seed=0)
    assert abs(sum(report.weights) - 1) < 1e-6
    assert torch.allclose(above.guide.fn.components.weights, torch.tensor(report.weights))
    whole = elbo(above.eval(), h[200:], num_samples=300)
    assert abs(whole.mean - report.bound.value) < 0.3
    cascade = Cascade(below, above)
    assert elbo(cascade, x, num_samples=5).value.isfinite().all()


def upper(latent=3, **settings):
    return VAE(
        latent,
        2,
        units=8,
        likelihood="gaussian",
        guide=lambda encoder: BoostedFlowGuide(encoder, 2, 2, lambda d: flows.realnvp(d, 1)),
        **settings,
    )


def test_boosting_draws_what_the_stage_below_infers_anew():
    """With a transform rows are what it makes of them, drawn afresh in every epoch."""
    below, above, x = VAE(6, 3, units=8).eval(), upper(), bits(60)
    seen = []

    def infer(*batch):
        with torch.no_grad():
            seen.append(below.encode(batch[0]))
        return (seen[-1],)

    torch.manual_seed(0)
    report = boost(
        above, x[:40], validation=x[40:], transform=infer, epochs=2, batch_size=40, finetune=0,
        seed=0,
    )  # fmt: skip
    assert all(h.shape[1] == 3 for h in seen)
    full = torch.stack([h for h in seen if len(h) == 40])
    assert len(full) >= 4  # two epochs of two rounds
    assert all(not torch.equal(full[0], h) for h in full[1:])
    assert math.isfinite(report.bound.value)
    with pytest.raises(ValueError, match="transform is for epochs="):
        boost(above, (x,), transform=infer, steps=10)


def test_greedy_boosts_the_stages_that_can_be():
    """Both stages have boosted posteriors, and both are boosted; by gradients on request."""
    torch.manual_seed(0)
    x = bits(300)
    first = VAE(
        6, 3, units=8, guide=lambda e: BoostedFlowGuide(e, 3, 2, lambda d: flows.realnvp(d, 1))
    )
    cascade = Cascade(first, upper())
    settings = {"validation": x[200:], "epochs": 3, "lr": 5e-3, "seed": 0}
    found = greedy(cascade, x[:200], finetune=0, **settings)
    for stage, report in zip(cascade, found.stages, strict=True):
        boosting = report.fit
        assert [r.component for r in boosting.rounds][:2] == [0, 1]
        assert torch.allclose(
            stage.guide.fn.components.weights, torch.tensor(boosting.weights), atol=1e-6
        )
    plain = greedy(cascade, x[:200], stages={1: {"method": "gradient"}}, start=1, **settings)
    assert isinstance(plain.stages[0].fit, Fit)
    with pytest.raises(
        ValueError, match=r"method 'boost' of round 0 .* holds no single boosted mixture"
    ):
        greedy(Cascade(VAE(6, 3, units=8)), x, method="boost", epochs=1)


def test_greedy_boosts_on_data_drawn_by_their_weights():
    """Data of weight 0 are never seen."""
    torch.manual_seed(0)
    x = bits(100)
    x[:50, 0], x[50:, 0] = 0.0, 1.0
    pair = VAE(
        6, 3, units=8, guide=lambda e: BoostedFlowGuide(e, 3, 2, lambda d: flows.realnvp(d, 1))
    )
    seen = []

    def watch(module, args, _):
        if module.training:
            seen.append(args[0][..., 0].flatten())

    pair.encoder.register_forward_hook(watch)
    weights = torch.cat([torch.ones(50), torch.zeros(50)])
    result = greedy(Cascade(pair), x, weights=weights, epochs=2, finetune=0, evaluate_on=50, seed=0)
    assert result.stages[0].fit.rounds[0].verdict == "base"
    assert float(torch.cat(seen).max()) == 0.0


def test_greedy_leaves_an_objective_of_its_own():
    """An IWAE is not trained by the plain bound because its guide could be boosted."""
    torch.manual_seed(0)
    pair = IWAE(
        6, 3, units=8, num_samples=3,
        guide=lambda e: BoostedFlowGuide(e, 3, 2, lambda d: flows.realnvp(d, 1)),
    )  # fmt: skip
    found = greedy(Cascade(pair), bits(60), epochs=1, seed=0)
    assert isinstance(found.stages[0].fit, Fit)
