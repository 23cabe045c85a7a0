"""Single flows as amortised guides: every kind, scored at its own draws."""

import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyroboost import flows
from pyroboost.compose import Cascade
from pyroboost.evaluation import elbo, log_likelihood, posterior_quality
from pyroboost.guides import BoostedFlowGuide, FlowGuide
from pyroboost.infer import fit
from pyroboost.models import VAE

KINDS = {
    "planar": lambda d: flows.planar(d, 2, context=5, spread=0.3),
    "radial": lambda d: flows.radial(d, 2, context=5, spread=0.3),
    "orthogonal": lambda d: flows.sylvester(d, 2, vectors=2, context=5, spread=0.3),
    "householder": lambda d: flows.sylvester(d, 2, "householder", context=5, spread=0.3),
    "triangular": lambda d: flows.sylvester(d, 2, "triangular", context=5, spread=0.3),
    "iaf": lambda d: flows.iaf(d, 2, units=8, context=5, spread=0.3),
    "realnvp": lambda d: flows.realnvp(d, 1, units=8, context=5, spread=0.3),
}


def bits(rows=8, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, dim, generator=generator) < 0.4).float()


def guided(flow, latent=3):
    vae = VAE(
        6, latent, units=8, context=5, guide=lambda encoder: FlowGuide(encoder, latent, flow)
    ).eval()
    return widened(vae, latent)


def widened(vae, latent=3):
    """Make the base about as wide as the prior, so that importance weights are tame."""
    with torch.no_grad():
        vae.encoder.net[-1].bias[latent : 2 * latent] = 1.0
    return vae


@pytest.mark.parametrize("name", KINDS)
def test_importance_sampling_agrees_with_the_normal_guide(name):
    """Two proposals for one model: log m(x) is the same, so the density of own draws is right."""
    vae, x = guided(KINDS[name]), bits(4)
    plain = widened(VAE(6, 3, units=8))
    plain.model.fn.net.load_state_dict(vae.decoder.state_dict())
    ours = log_likelihood(vae, x, num_samples=20_000)
    theirs = log_likelihood(plain, x, num_samples=20_000)
    error = (ours.std_error**2 + theirs.std_error**2).sqrt()
    assert ((ours.value - theirs.value).abs() < 5 * error).all()
    assert error.max() < 0.08


@pytest.mark.parametrize("name", KINDS)
def test_trains_and_its_particles_agree(name):
    vae, x = guided(KINDS[name]), bits(60)
    before = {n: p.clone() for n, p in vae.named_parameters()}
    fit(vae, x, epochs=2, batch_size=20, seed=0)
    assert all(not torch.equal(p, before[n]) for n, p in vae.named_parameters())
    vae.eval()
    wide = Trace_ELBO(num_particles=300, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        together = -wide.loss(vae.model, vae.guide, x) / 60
    assert abs(together - elbo(vae, x, num_samples=300).mean) < 0.15
    quality = posterior_quality(vae, x[:5], num_samples=100)
    assert quality.pareto_k.isfinite().all()


def test_the_density_is_that_of_a_mixture_of_one():
    """The same RealNVP as FlowGuide and as BoostedFlowGuide."""
    vae, x = guided(KINDS["realnvp"]), bits()
    other = BoostedFlowGuide(vae.encoder, 3, 1, KINDS["realnvp"])
    other.components.flows[0].load_state_dict(vae.guide.fn.flow.state_dict())
    trace = poutine.trace(vae.guide).get_trace(x)
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert torch.allclose(other.posterior(x).log_prob(site["value"]), site["log_prob"], atol=1e-5)


def test_other_points_are_refused_in_words():
    vae, x = guided(KINDS["planar"]), bits()
    z = vae.encode(x)
    conditioned = poutine.condition(vae.guide, {"z": z})
    with pytest.raises(ValueError, match="flow 'planar' has no inverse in closed form"):
        poutine.trace(conditioned).get_trace(x).log_prob_sum()


def test_in_a_cascade():
    below = guided(KINDS["planar"])
    above = VAE(3, 2, units=8, likelihood="gaussian", guide=lambda e: FlowGuide(e, 2)).eval()
    cascade, x = Cascade(below, above), bits(20)
    whole = elbo(cascade, x, num_samples=300)
    wide = Trace_ELBO(num_particles=300, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        assert abs(-wide.loss(cascade.model, cascade.guide, x) / 20 - whole.mean) < 0.3
    assert log_likelihood(cascade, x, num_samples=50).mean > whole.mean


def test_refusals():
    with pytest.raises(TypeError, match="built Planar; let it return a pyroboost"):
        FlowGuide(nn.Linear(6, 6), 3, flows.Planar)
    with pytest.raises(ValueError, match=r"FlowGuide: the encoder gave outputs of widths \[6\]"):
        FlowGuide(nn.Linear(6, 6), 3, KINDS["planar"])(bits())
