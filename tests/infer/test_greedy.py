"""Greedy boosting: what moves, what is measured, and each verdict where it is deserved."""

import copy
import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumerated import BitPair, all_bits, cascade_terms
from torch import nn

from pyroboost import Cascade, MetaModel
from pyroboost.infer import gains, greedy, stage_gain
from pyroboost.infer._stage_fit import own_settings, train_round
from pyroboost.infer.convergence import check_convergence, two_sample_p
from pyroboost.metamodel import Round
from pyroboost.models import GMM, VAE, FlowMixture


def independent(logits):
    """A stage whose visible law is a product of given Bernoullis, with an exact guide."""
    size = len(logits)
    pair = BitPair(size, 1)
    with torch.no_grad():
        pair.m.weight.zero_()
        pair.m.bias.copy_(logits)
        pair.q.net.weight.zero_()
        pair.q.net.bias.copy_(pair.m.prior)
    return pair


@pytest.fixture
def below():
    """One hidden bit, so that its law under the data is a single probability."""
    pair = BitPair(3, 1, 2.0)
    with torch.no_grad():
        pair.m.prior.fill_(-1.0)
    return pair


def agreed(pair):
    """Log odds of the hidden bit under the guide, averaged over uniform data."""
    return torch.logit(torch.sigmoid(pair.q.net(all_bits(3))).mean(0)).detach()


@pytest.mark.parametrize(
    ("stage", "verdict"),
    [
        (lambda pair: independent(agreed(pair)), "grows"),
        (lambda pair: independent(pair.m.prior.detach()), "nothing gained"),
        (lambda pair: independent(agreed(pair) + 4.0), "not well trained: retrain"),
    ],
)
def test_each_verdict_where_enumeration_says_so(below, stage, verdict):
    cascade = Cascade(below, stage(below))
    x = all_bits(3).repeat(2000, 1)
    gain = stage_gain(cascade, 1, x, seed=1)
    exact = float(cascade_terms(list(cascade), all_bits(3))[1].detach().mean())
    assert gain.verdict() == verdict
    assert abs(gain.value - exact) < 4 * gain.std_error
    assert {"grows": exact > 0.01, "nothing gained": abs(exact) < 1e-5}.get(verdict, exact < -0.01)


def test_error_of_log_z_enters_both_terms(below):
    """A stage whose log Z is only estimated makes its own and the next term less sure."""

    class Unsure(BitPair):
        def normalisation(self):
            return "estimate", 3.0

    top = Unsure(1, 1)
    x = all_bits(3).repeat(50, 1)
    assert stage_gain(Cascade(below, top), 1, x).std_error > 3.0
    upper = Cascade(below, top, independent(torch.zeros(1)))
    assert stage_gain(upper, 2, x).std_error > 3.0
    assert stage_gain(upper, 0, x).std_error < 3.0


class Line(nn.Module):
    """x = slope z + noise, z standard normal; the exact posterior, or another guide."""

    def __init__(self, slope, *, noise=0.5):
        super().__init__()
        self.slope, self.noise = slope, noise

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.slope * z, self.noise).to_event(1), obs=x)

    def exact(self, x):
        precision = 1 + self.slope**2 / self.noise**2
        loc = x * self.slope / self.noise**2 / precision
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, precision**-0.5).to_event(1))

    def collapsed(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).expand([len(x), 1]).to_event(1))

    def two_lumps(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sign() * 0.9949, 0.1).to_event(1))

    def pair(self, guide):
        return MetaModel(self.model, getattr(self, guide), visible="x", hidden="z")


def test_converged_is_said_of_a_perfect_stage():
    line = Line(2.0)
    found = check_convergence(
        line.pair("exact"), 2 * torch.randn(4000, 1) + 0.5 * torch.randn(4000, 1)
    )
    assert found.converged
    assert "converged" in found.describe()
    assert found.active == 1.0


def test_the_necessary_sign_alone_says_nothing():
    """Two lumps with the second moment of a standard normal pass the sign; a probe sees them."""
    line = Line(2.0)
    found = check_convergence(line.pair("two_lumps"), torch.randn(4000, 1))
    assert not found.sign_fails
    assert not found.converged
    assert found.describe().startswith("not converged (a probe gains")
    # KL(two lumps || N(0, 1)): log 2 + entropy terms, computed by quadrature.
    z = torch.linspace(-4, 4, 8001)
    log_q = (
        torch.stack([dist.Normal(m, 0.1).log_prob(z) for m in (-0.9949, 0.9949)]).logsumexp(0)
        - torch.tensor(2.0).log()
    )
    kl = torch.trapezoid(log_q.exp() * (log_q - dist.Normal(0.0, 1.0).log_prob(z)), z)
    assert abs(found.gain - float(kl)) < 0.1 * float(kl)


def test_a_wrong_scale_fails_the_sign():
    line = Line(2.0)
    found = check_convergence(line.pair("exact"), 6 * torch.randn(4000, 1))
    assert found.sign_fails
    assert found.describe().startswith("not converged (sign")


def test_a_collapsed_guide_is_undecided():
    """Where no unit is active, sign and probe pass, and nothing may be concluded."""
    line = Line(0.0, noise=1.0)
    found = check_convergence(line.pair("collapsed"), torch.randn(4000, 1))
    assert not found.sign_fails
    assert found.active == 0.0
    assert not found.converged
    assert "undecided" in found.describe()


def test_draws_that_differ_from_the_data_are_not_converged():
    """The hidden law is right and active, but what is decoded is not the data."""
    line, wrong = Line(2.0), Line(-2.0, noise=1.5)
    pair = MetaModel(wrong.model, line.exact, visible="x", hidden="z")
    found = check_convergence(pair, 2 * torch.randn(4000, 1) + 0.5 * torch.randn(4000, 1))
    assert not found.converged
    assert "its draws differ" in found.describe()


def test_two_sample_test_has_its_level():
    """Equal laws: p-values are not small too often; different laws: they are."""
    p = [two_sample_p(torch.randn(200, 2), torch.randn(200, 2)) for _ in range(40)]
    assert sum(value < 0.05 for value in p) <= 7
    assert two_sample_p(torch.randn(400, 2), 1.5 * torch.randn(400, 2) + 0.5) < 0.01


def bits(count=256):
    loc = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0.0, 0, 0, 1, 1, 1]])
    return torch.bernoulli(0.1 + 0.8 * loc[torch.arange(count) % 2])


def small():
    return Cascade(VAE(6, 2, units=16), VAE(2, 2, units=16, likelihood="gaussian"), GMM(2, 2))


def values(module):
    return {n: t.clone() for n, t in module.state_dict().items() if isinstance(t, torch.Tensor)}


def same(module, before):
    return all(torch.equal(t, before[n]) for n, t in values(module).items())


def test_only_the_stage_of_the_round_moves():
    """Stages below keep parameters and buffers; a new stage is trained alone."""
    cascade = small()
    greedy(cascade[:1], bits(), epochs=2, seed=0)
    bottom = values(cascade[0])
    greedy(cascade, bits(), epochs=2, start=1, seed=0)
    assert same(cascade[0], bottom)
    middle = values(cascade[1])
    assert len(greedy(cascade[:2] + GMM(2, 2), bits(), epochs=2, start=2).stages) == 1
    assert same(cascade[0], bottom)
    assert same(cascade[1], middle)


def test_stages_below_are_in_eval_mode_and_draw_afresh():
    """The stage above sees new h in each epoch, from running statistics."""
    cascade = small()
    modes, seen = [], []
    first = cascade[0]
    encode = first.encode

    def spy(x, *args):
        h = encode(x, *args)
        modes.append(first.guide.training)
        seen.append(h)
        return h

    first.encode = spy
    greedy(cascade[:2], bits(64), epochs=3, start=1, batch_size=64, seed=0)
    first.encode = encode
    full = [h.sort(0).values for h in seen if len(h) == 64]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(full[:3]))
    assert all(modes)  # its own mode is given back; service() switches it within


def test_seed_repeats_and_leaves_the_global_stream():
    runs, start, data = [], small(), bits()
    for _ in range(2):
        cascade = copy.deepcopy(start)
        state = torch.get_rng_state()
        result = greedy(cascade, data, epochs=1, seed=3)
        assert torch.equal(state, torch.get_rng_state())
        torch.rand(17)
        runs.append((values(cascade), [s.train.value for s in result.stages]))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(t, runs[1][0][n]) for n, t in runs[0][0].items())


def test_stops_by_itself():
    """A second stage that cannot gain ends the boosting and is left out."""
    cascade = Cascade(VAE(6, 2, units=16), VAE(2, 1, units=4, likelihood="gaussian"), GMM(2, 1))
    result = greedy(cascade, bits(), validation=bits(), epochs=1, stop=True, seed=0)
    assert len(result.stages) == 2
    assert result.stages[1].verdict != "grows"
    assert len(result.cascade) == 1
    assert "verdict" in str(result)


def test_checkpoints_resume(tmp_path):
    """The same call finds its finished stages and ends with the same weights."""
    data = bits()
    first = small()
    second = copy.deepcopy(first)
    greedy(first, data, epochs=2, seed=0, checkpoints=tmp_path / "run")
    greedy(second[:1], data, epochs=2, seed=0, checkpoints=tmp_path / "again")
    result = greedy(second, data, epochs=2, seed=0, checkpoints=tmp_path / "again")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"0.VAE.pt", "1.VAE.pt"}
    assert same(second, values(first))
    assert len(result.stages) == 3


def test_own_algorithm_or_gradients():
    """A mixture is fitted by EM, or by gradients where that is asked for."""
    cascade = small()
    result = greedy(cascade, bits(), epochs=1, seed=0, stages={2: {"max_iterations": 3}})
    assert type(result.stages[2].fit).__name__ == "EMResult"
    options = {2: {"method": "gradient", "epochs": 1}}
    result = greedy(cascade, bits(), epochs=1, start=2, seed=0, stages=options)
    assert type(result.stages[0].fit).__name__ == "Fit"
    with pytest.raises(ValueError, match=r"method 'own' .* is not for VAE, which has no algorithm"):
        greedy(cascade, bits(), epochs=1, stages={0: {"method": "own"}})


def test_refusals():
    with pytest.raises(ValueError, match="start=3 or stages"):
        greedy(small(), bits(), epochs=1, start=3)
    with pytest.raises(ValueError, match="names a stage"):
        greedy(small(), bits(), epochs=1, stages={5: {}})
    with pytest.raises(TypeError, match=r"got VAE, not a Cascade; wrap it in Cascade\(\.\.\.\)"):
        greedy(VAE(4, 2, units=3), bits())
    with pytest.raises(ValueError, match="pass at least 20"):
        check_convergence(Line(1.0).pair("exact"), torch.zeros(5, 1))


# Weighted data


def test_weights_reach_every_stage_and_the_measures():
    torch.manual_seed(0)
    x, w = (torch.rand(60, 4) < 0.5).float(), torch.rand(60)
    pair = Cascade(VAE(4, 2, units=6), VAE(2, 2, units=6, likelihood="gaussian"), GMM(2, 2))
    result = greedy(
        pair, x, validation=x, weights=w, validation_weights=w, epochs=1, lr=0.0, seed=3
    )
    for index, report in enumerate(result.stages):
        gains = stage_gain(pair, index, x, weights=w, seed=3 + index)
        assert (report.train, report.held_out) == (gains, gains)
    plain = stage_gain(pair, 0, x, seed=3)
    assert abs(plain.value - result.stages[0].train.value) > 1e-4


def test_an_own_algorithm_sees_data_in_proportion_to_their_weights():
    torch.manual_seed(0)
    x = torch.randn(4000, 1) + torch.tensor([0.0, 6.0]).repeat(2000)[:, None]
    w = torch.tensor([3.0, 1.0]).repeat(2000)
    pair = Cascade(GMM(2, 1))
    greedy(pair, x, weights=w, stages={0: {"start": "kmeans"}}, seed=0)
    mixture = pair[0].mixture
    assert abs(float(mixture.weights[mixture.locs[:, 0].argmin()]) - 0.75) < 0.01


def test_a_weighted_gain_is_the_weighted_mean_with_its_error():
    values, w = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([1.0, 1.0, 2.0])
    mean, error = gains._mean(values, w)
    assert mean == pytest.approx(2.75)
    assert error == pytest.approx(
        ((0.25 * 1.75) ** 2 + (0.25 * 0.75) ** 2 + (0.5 * 1.25) ** 2) ** 0.5
    )


def test_a_cascade_that_is_a_part_is_trained_stage_by_stage_on_its_weights():
    torch.manual_seed(0)
    x, w = (torch.rand(80, 4) < 0.5).float(), torch.rand(80)
    one, two = (Cascade(VAE(4, 2, units=6, batch_norm=False), GMM(2, 2)) for _ in range(2))
    two.load_state_dict(one.state_dict())
    item = Round(two, x, None, "1.Cascade", None, w)
    found = train_round(1, item, {"epochs": 2}, None, 5)
    wanted = greedy(one, x, weights=w, epochs=2, seed=5)
    assert [s.train for s in found.stages] == [s.train for s in wanted.stages]
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_own_algorithm_is_given_the_settings_that_it_takes():
    common = {"epochs": 5, "batch_size": 30, "lr": 0.1, "clip_norm": 1.0, "annealing": 2}
    em = own_settings(GMM(2, 2).own_fit, {**common, "restarts": 3})
    assert em == {"restarts": 3}
    flow = own_settings(FlowMixture(2, 1).own_fit, {**common, "steps": 7})
    assert flow == {"batch_size": 30, "lr": 0.1, "clip_norm": 1.0, "steps": 7}


def test_without_a_standard_error_nothing_is_decided():
    for value, error in ((0.5, float("inf")), (0.5, float("nan")), (float("nan"), 0.1)):
        assert gains.Gain(value, error).verdict() == "undecided"


@pytest.mark.parametrize(
    ("index", "rows", "weights", "words"),
    [
        (2, 5, None, "no stage 2"),
        (-1, 5, None, "no stage -1"),
        (0, 1, None, "no standard error"),
        (0, 5, torch.zeros(5), "all 0"),
        (0, 5, torch.ones(4), "have shape"),
    ],
)
def test_gains_that_cannot_be_measured_are_refused(index, rows, weights, words):
    pair = Cascade(VAE(4, 2, units=6), GMM(2, 2))
    with pytest.raises(ValueError, match=words):
        stage_gain(pair, index, torch.zeros(rows, 4), weights=weights)
