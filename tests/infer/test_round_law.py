"""The law of a round: its gradient by hand, its floor, its blending, and what it refuses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from boosting_pairs import Posterior, place, rows, standard, vae
from pyro.infer import Trace_ELBO
from torch.distributions import MixtureSameFamily

from pyroboost import flows
from pyroboost.distributions import BoostedFlow
from pyroboost.infer._boosting_pair import only, staged
from pyroboost.infer._round_law import RoundLaw, Stage, at_site, pathwise
from pyroboost.infer.objectives import Annealing
from pyroboost.metamodel import MetaModel

CENTRES = torch.tensor([[-1.0, 0.5], [1.5, 0.0], [0.3, -0.4]])
SCALES = torch.tensor([0.7, 1.2, 0.8])


def gaussian_model():
    pyro.sample("z", dist.Normal(torch.tensor([0.5, -0.5]), 1.5).to_event(1))
    pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=torch.tensor(0.3))


def posterior(weights=(0.4, 0.6, 0.0)):
    guide = Posterior()
    for flow, centre, scale in zip(guide.components.flows, CENTRES, SCALES, strict=True):
        place(flow, centre, scale)
    guide.components.weights.copy_(torch.tensor(weights))
    return guide


def by_hand(parameters, z0, kind, entropy, floor=-math.inf):
    """The loss of one draw, written with torch's normals: component 2 against 0 and 1."""
    shift, log_scale = parameters.chunk(2)
    z = shift + log_scale.exp() * z0
    log_g = torch.distributions.Normal(shift, log_scale.exp()).log_prob(z).sum()
    parts = [
        torch.distributions.Normal(m, s).log_prob(z).sum()
        for m, s in zip(CENTRES, SCALES, strict=True)
    ]
    prior = torch.distributions.Normal(torch.tensor([0.5, -0.5]), 1.5).log_prob(z).sum()
    seen = torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(0.3))
    fixed = torch.logsumexp(torch.stack([parts[0] + math.log(0.4), parts[1] + math.log(0.6)]), 0)
    whole = torch.logsumexp(
        torch.stack([parts[c] + math.log(w) for c, w in enumerate((0.2, 0.3, 0.5))]), 0
    )
    return {
        "plain": log_g - prior - seen,
        "residual": entropy * log_g + fixed.clamp(min=floor) - prior - seen,
        "kl": entropy * (log_g - prior) + fixed.clamp(min=floor) - seen,
        "mixture": whole - prior - seen,
    }[kind]


def gradient(kind, entropy, floor=-math.inf, seed=3):
    guide = posterior((0.2, 0.3, 0.5) if kind == "mixture" else (0.4, 0.6, 0.0))
    stage = Stage(2, kind, entropy=entropy, floor=floor)
    pair = MetaModel(gaussian_model, guide, visible="x", hidden="z")
    round_pair = staged(pair, guide.components, stage)
    torch.manual_seed(seed)
    with pyro.settings.context(module_local_params=True):
        loss = Trace_ELBO(max_plate_nesting=0).differentiable_loss(
            round_pair.model, round_pair.guide
        )
        loss.backward()
    return loss.detach(), guide.components.flows[2].steps[0].coefficients.bias.grad


@pytest.mark.parametrize("entropy", [1.0, 0.4])
@pytest.mark.parametrize("kind", ["plain", "residual", "kl", "mixture"])
def test_loss_and_gradient_are_those_of_the_formula(kind, entropy):
    loss, found = gradient(kind, entropy)
    torch.manual_seed(3)
    z0 = standard(2).rsample()
    parameters = torch.cat([CENTRES[2], torch.full((2,), SCALES[2].log())]).requires_grad_()
    expected = by_hand(parameters, z0, kind, entropy)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, parameters.grad)


@pytest.mark.parametrize("kind", ["plain", "residual", "mixture"])
def test_annealing_scales_the_fixed_density_too(kind):
    """The bound of a lower beta has all latent terms scaled, and so has its functional gradient."""
    guide = posterior((0.2, 0.3, 0.5) if kind == "mixture" else (0.4, 0.6, 0.0))
    pair = MetaModel(gaussian_model, guide, visible="x", hidden="z")
    annealing = Annealing(
        staged(pair, guide.components, Stage(2, kind, entropy=0.6)), lambda _: 0.3
    )
    model, program = annealing.programs(annealing.beta(0.0))
    torch.manual_seed(3)
    with pyro.settings.context(module_local_params=True):
        loss = Trace_ELBO(max_plate_nesting=0).differentiable_loss(model, program)
        loss.backward()
    torch.manual_seed(3)
    z0 = standard(2).rsample()
    parameters = torch.cat([CENTRES[2], torch.full((2,), SCALES[2].log())]).requires_grad_()
    seen = torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(0.3))
    expected = 0.3 * (by_hand(parameters, z0, kind, 0.6) + seen) - seen
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach())
    found = guide.components.flows[2].steps[0].coefficients.bias.grad
    torch.testing.assert_close(found, parameters.grad)


def test_residual_and_kl_differ_unless_lambda_is_one():
    assert not torch.allclose(gradient("residual", 0.5)[1], gradient("kl", 0.5)[1], rtol=1e-2)
    torch.testing.assert_close(gradient("residual", 1.0)[1], gradient("kl", 1.0)[1])


def test_floor_stops_the_reward_and_is_counted():
    loss, found = gradient("residual", 0.7, floor=5.0)
    torch.manual_seed(3)
    z0 = standard(2).rsample()
    parameters = torch.cat([CENTRES[2], torch.full((2,), SCALES[2].log())]).requires_grad_()
    expected = by_hand(parameters, z0, "residual", 0.7, floor=5.0)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(found, parameters.grad)


def test_floor_fraction_is_that_of_the_draws():
    guide = posterior()
    q = guide.components(standard(2, (4000,)))
    stage = Stage(2, "residual", floor=-3.0)
    z = RoundLaw(q, stage).rsample()
    law = RoundLaw(q, stage)
    law.log_prob(z)
    share = float((q.log_prob(z) < -3.0).double().mean())
    assert 0.1 < share < 0.9
    assert stage.counts.tolist() == [round(share * 4000), 4000]


def test_mixture_objective_has_the_gradient_of_the_true_bound():
    """In 1-d by quadrature: d/dtheta KL(q || p) = w_c E[d/dtheta of log q(z) - log p(z)]."""
    flow = flows.affine(1)
    place(flow, torch.tensor([0.8]), 0.6)
    other = flows.affine(1)
    place(other, torch.tensor([-1.0]), 1.1)
    base = standard(1)
    q = BoostedFlow(base, [other, flow], torch.tensor([0.7, 0.3]))
    grid = torch.linspace(-12, 12, 20001)[:, None]
    log_p = torch.distributions.StudentT(4.0, 0.5, 1.0).log_prob(grid[:, 0])
    log_q = q.log_prob(grid)
    kl = torch.trapezoid(log_q.exp() * (log_q - log_p), grid[:, 0])
    (exact,) = torch.autograd.grad(kl, flow.parameters())
    torch.manual_seed(0)
    many = BoostedFlow(base.expand((400_000,)), [other, flow], torch.tensor([0.7, 0.3]))
    law = RoundLaw(many, Stage(1, "mixture"))
    z = law.rsample()
    target = torch.distributions.StudentT(4.0, 0.5, 1.0).log_prob(z[:, 0])
    loss = 0.3 * (law.log_prob(z) - target).mean()
    (found,) = torch.autograd.grad(loss, flow.parameters())
    torch.testing.assert_close(found, exact, atol=0.004, rtol=0.0)


def test_pathwise_reaches_nothing_but_the_points():
    scale = torch.tensor(1.3, requires_grad=True)
    z = torch.randn(5, 2, requires_grad=True)
    value = pathwise(lambda v: -0.5 * (v / scale).square().sum(-1), z)
    value.sum().backward()
    assert scale.grad is None
    torch.testing.assert_close(z.grad, (-z / scale**2).detach())


def test_base_and_encoder_learn_through_the_draws_alone():
    """For log G held fixed in x: the encoder's gradient is that with a detached base in G."""
    pair = vae()
    encoder = pair.guide.fn
    x = rows(20)
    flow = encoder.components.flows
    weights = torch.tensor([1.0, 0.0])
    round_pair = staged(pair, encoder.components, Stage(1, "residual", entropy=0.6))
    with only(encoder.components, [1], weights), pyro.settings.context(module_local_params=True):
        torch.manual_seed(1)
        Trace_ELBO().differentiable_loss(round_pair.model, round_pair.guide, x).backward()
    found = encoder.net.weight.grad.clone()
    encoder.zero_grad()
    torch.manual_seed(1)
    m, s = encoder.net(x).chunk(2, -1)
    base = torch.distributions.Normal(m, s.exp())
    z0 = base.rsample()
    z, log_det = flow[1](z0)
    log_g = base.log_prob(z0).sum(-1) - log_det
    back, log_det = flow[0].inverse(z)
    fixed = torch.distributions.Normal(m.detach(), s.exp().detach()).log_prob(back).sum(-1)
    decoder = pair.model.fn
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    law = torch.distributions.Normal(decoder.net(z), decoder.log_scale.exp())
    loss = 0.6 * log_g + fixed + log_det - prior - law.log_prob(x).sum(-1)
    loss.sum().backward()
    torch.testing.assert_close(found, encoder.net.weight.grad, rtol=1e-3, atol=1e-3)


def test_sampled_objective_is_one_component_drawn_for_each_example():
    guide = posterior().requires_grad_(False)
    law = RoundLaw(guide.components(standard(2, (20_000,))), Stage(2, "sampled", entropy=0.5))
    z = law.rsample()[:1].expand(20_000, 2)  # one point, so that only the choice differs
    parts = law.mixture.log_prob_components(z)[0]
    own = law.log_prob(z.clone()) - 0.5 * parts[2]
    first = torch.isclose(own, parts[0], atol=1e-5)
    assert bool((first | torch.isclose(own, parts[1], atol=1e-5)).all())
    assert abs(float(first.double().mean()) - 0.4) < 5 * math.sqrt(0.24 / 20_000)
    exact = float(0.4 * parts[0] + 0.6 * parts[1])
    assert float(own.mean()) == pytest.approx(exact, abs=0.1)
    assert float(law.mixture.log_prob(z)[0]) > exact + 1e-3  # Jensen: not the mixture


@pytest.mark.parametrize(("kind", "reached"), [("sampled", True), ("residual", False)])
def test_only_the_sampled_objective_pulls_at_the_base_through_the_fixed_density(kind, reached):
    guide, loc = posterior(), torch.zeros(50, 2, requires_grad=True)
    q = guide.components(dist.Normal(loc, 1.0).to_event(1))
    fixed = RoundLaw(q, Stage(2, kind, entropy=0.0)).log_prob(torch.randn(50, 2))
    (grad,) = torch.autograd.grad(fixed.sum(), loc, allow_unused=True)
    assert (float(grad.abs().max()) > 1e-3) == reached


def test_blended_examples_have_the_law_and_the_score_of_the_fixed_mixture():
    guide = posterior()
    q = guide.components(standard(2, (60_000,)))
    stage = Stage(2, "residual", entropy=0.5, rate=0.3)
    law = RoundLaw(q, stage)
    z = law.rsample()
    score, blended = law.log_prob(z), law._drawn[2]
    parts = q.log_prob_components(z)
    fixed = q.log_prob(z)
    torch.testing.assert_close(score[blended], fixed[blended], atol=1e-4, rtol=1e-4)
    new = 0.5 * parts[..., 2] + fixed
    torch.testing.assert_close(score[~blended], new[~blended], atol=1e-4, rtol=1e-4)
    assert abs(float(blended.double().mean()) - 0.3) < 5 * math.sqrt(0.21 / 60_000)
    mean = 0.4 * CENTRES[0] + 0.6 * CENTRES[1]
    second = 0.4 * (CENTRES[0] ** 2 + SCALES[0] ** 2) + 0.6 * (CENTRES[1] ** 2 + SCALES[1] ** 2)
    drawn = z[blended].detach()
    error = 5 * drawn.std(0) / len(drawn) ** 0.5
    assert bool(((drawn.mean(0) - mean).abs() < error).all())
    assert bool(((drawn.square().mean(0) - second).abs() < 4 * error).all())
    new = z[~blended].detach()
    assert bool(((new.mean(0) - CENTRES[2]).abs() < 5 * 0.8 / len(new) ** 0.5).all())


def test_blended_examples_train_the_base_and_no_flow():
    guide, loc = posterior(), torch.zeros(40, 2, requires_grad=True)
    components = guide.components
    with only(components, [2], torch.tensor([0.4, 0.6, 0.0])):
        law = RoundLaw(
            components(dist.Normal(loc, 1.0).to_event(1)), Stage(2, "residual", rate=1.0)
        )
        z = law.rsample()
        (z.square().sum() + law.log_prob(z).sum()).backward()
    assert float(loc.grad.abs().min()) > 0
    assert all(p.grad is None or not p.grad.any() for p in components.parameters())


def test_nothing_is_blended_without_gradients():
    law = RoundLaw(posterior().components(standard(2, (9,))), Stage(2, "residual", rate=1.0))
    with torch.no_grad():
        law.rsample()
    assert law._drawn[2] is None


@pytest.mark.parametrize("coin", [True, False])
def test_whole_kl_blends_whole_runs_with_an_unscaled_prior(coin):
    guide = posterior()
    stage = Stage(2, "kl", entropy=0.5, rate=1.0 if coin else 0.0)
    pair = MetaModel(gaussian_model, guide, visible="x", hidden="z")
    round_pair = staged(pair, guide.components, stage)
    with pyro.settings.context(module_local_params=True):
        guide_trace = pyro.poutine.trace(round_pair.guide).get_trace()
        model = pyro.poutine.replay(round_pair.model, trace=guide_trace)
        model_trace = pyro.poutine.trace(model).get_trace()
    z = guide_trace.nodes["z"]["value"]
    assert model_trace.nodes["z"]["scale"] == (1.0 if coin else 0.5)
    q = guide.components(standard(2))
    expected = q.log_prob(z) + (0.0 if coin else 0.5 * q.log_prob_components(z)[2])
    torch.testing.assert_close(guide_trace.nodes["z"]["fn"].log_prob(z), expected)


def test_plates_particles_and_subsampling_keep_shapes_and_scales():
    guide = posterior()

    def program():
        with pyro.plate("data", 50, subsample=torch.arange(5)):
            return pyro.sample("z", guide.components(standard(2, (5,))))

    staged_program = at_site(lambda q: RoundLaw(q, Stage(2, "residual")))(program)
    with pyro.plate("particles", 7, dim=-2):
        node = pyro.poutine.trace(staged_program).get_trace().nodes["z"]
    assert isinstance(node["fn"], RoundLaw)
    assert node["value"].shape == (7, 5, 2)
    assert node["scale"] == 10.0
    q = guide.components(standard(2))
    expected = q.log_prob(node["value"]) + q.log_prob_components(node["value"])[..., 2]
    torch.testing.assert_close(node["fn"].log_prob(node["value"]), expected)


def test_particles_in_a_row_and_at_once_agree():
    pair, x = vae(), rows(30)
    encoder = pair.guide.fn
    encoder.components.weights.copy_(torch.tensor([1.0, 0.0]))
    round_pair = staged(pair, encoder.components, Stage(1, "residual", floor=-8.0, entropy=0.8))
    found = []
    for stacked in (False, True):
        torch.manual_seed(int(stacked))
        elbo = Trace_ELBO(num_particles=400, vectorize_particles=stacked, max_plate_nesting=1)
        with torch.no_grad(), pyro.settings.context(module_local_params=True):
            found.append(elbo.loss(round_pair.model, round_pair.guide, x))
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_gradients_reach_the_rounds_parameters_and_no_others():
    pair, x = vae(count=3), rows(30)
    encoder = pair.guide.fn
    components = encoder.components
    with only(components, [2], torch.tensor([0.5, 0.5, 0.0])):
        round_pair = staged(pair, components, Stage(2, "residual", rate=0.5))
        with pyro.settings.context(module_local_params=True):
            Trace_ELBO().differentiable_loss(round_pair.model, round_pair.guide, x).backward()
    for name, p in pair.named_parameters():
        others = "flows.0" in name or "flows.1" in name
        assert (p.grad is None) == others, name
        assert others or bool(p.grad.any()), name


def test_guides_without_one_boosted_site_are_refused():
    two = posterior()

    def twice():
        pyro.sample("a", two.components(standard(2)))
        pyro.sample("b", two.components(standard(2)))

    def none():
        pyro.sample("a", standard(2))

    with pytest.raises(ValueError, match="both 'a' and 'b'"), at_site(lambda q: q):
        twice()
    with pytest.raises(ValueError, match="no site from a BoostedFlow"), at_site(lambda q: q):
        none()


def test_float64_stays():
    guide = posterior().double()
    base = dist.Normal(torch.zeros(3, 2, dtype=torch.float64), 1.0).to_event(1)
    for kind in ("residual", "sampled", "mixture"):
        law = RoundLaw(guide.components(base), Stage(2, kind, rate=0.5, floor=-4.0))
        z = law.rsample()
        assert z.dtype == law.log_prob(z).dtype == torch.float64


def test_mixture_of_torch_agrees_with_the_fixed_density():
    q = posterior().components(standard(2))
    law = MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.4, 0.6])),
        torch.distributions.Independent(
            torch.distributions.Normal(CENTRES[:2], SCALES[:2, None].expand(2, 2)), 1
        ),
    )
    z = torch.randn(50, 2)
    torch.testing.assert_close(
        RoundLaw(q, Stage(2, "residual", entropy=0.0)).log_prob(z), law.log_prob(z)
    )
