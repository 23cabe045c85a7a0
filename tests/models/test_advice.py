"""Advice: each of the cases where it is known to hold, and what the mixtures promise."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroboost import Cascade, MetaModel
from pyroboost.models import GMM, RBM, VAE, advise


def shifted(shift, scale):
    """A pair whose hidden value follows the data one to one: h = x, m(h) = N(shift, scale)."""

    def model(x):
        with pyro.plate("data", x.shape[-2]):
            prior = dist.Normal(x.new_full((2,), shift), scale).to_event(1)
            h = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(h, 0.01).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[-2]):
            pyro.sample("z", dist.Normal(x, 0.01).to_event(1))

    return MetaModel(model, guide, visible="x", hidden="z", hidden_shape=(2,))


def two_clusters(count):
    torch.manual_seed(0)
    centre = torch.tensor([-3.0, 3.0])[torch.randint(2, (count, 1))]
    return torch.randn(count, 2) * 0.5 + centre


def test_clusters_in_the_hidden_variable_call_for_a_mixture():
    x = two_clusters(1200)
    advice = advise(shifted(0.0, 1.0), x[:600], held_out=x[600:], components=(1, 2, 4))
    assert advice.case == "base"
    assert advice.next_step == "add the mixture"
    assert advice.chosen.components in (2, 4)
    boosted = advice.boosted
    assert isinstance(boosted, Cascade)
    assert boosted[1] is advice.chosen.mixture


def test_the_information_criterion_finds_the_number_of_components():
    x = two_clusters(1200)
    advice = advise(shifted(0.0, 1.0), x, components=(1, 2, 3, 5), criterion="bic")
    assert advice.chosen.components == 2
    k, n = 2, 600
    h_density = advice.chosen.mixture.log_marginal
    # The hidden value is the datum to within 0.01, so that the criterion can be had from x.
    fitted = h_density(x[:600]).value.detach().double()
    own = -2 * float(fitted.sum()) + (k - 1 + 5 * k) * math.log(n)
    assert advice.chosen.bic == pytest.approx(own, abs=15)


def test_gains_are_those_of_the_mixture_over_the_prior():
    x = two_clusters(800)
    trial = advise(shifted(0.0, 1.0), x[:400], held_out=x[400:], components=(2,)).trials[0]
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    for gain, part in ((trial.train_gain, x[:400]), (trial.gain, x[400:])):
        want = (trial.mixture.log_marginal(part).value.detach() - prior.log_prob(part)).mean()
        assert gain.value == pytest.approx(float(want), abs=0.02)


def test_a_mixture_keeps_its_promise_where_nothing_can_be_gained():
    torch.manual_seed(0)
    x = torch.randn(2000, 2)
    advice = advise(shifted(0.0, 1.0), x[:1000], held_out=x[1000:], components=(1, 5, 10))
    assert all(t.train_gain.value >= math.log(0.99) - 1e-6 for t in advice.trials)
    assert advice.next_step == "stop"
    assert advice.convergence.converged
    with pytest.raises(ValueError, match="no mixture is advised"):
        _ = advice.boosted


def test_a_stage_that_does_harm_is_to_be_trained_again():
    torch.manual_seed(0)
    x = torch.randn(400, 2)
    advice = advise(Cascade(shifted(0.0, 1.0), shifted(5.0, 1.0)), x)
    assert (advice.case, advice.next_step) == ("not well trained", "retrain")
    assert "first of the three cases" in str(advice)


def test_a_stage_that_repeats_the_one_below_has_converged():
    torch.manual_seed(0)
    x = torch.randn(3000, 2)
    good = Cascade(shifted(0.0, 1.0), GMM(1, 2))
    good[1].mixture = good[1].mixture._replace(
        locs=torch.zeros(1, 2), scale=torch.eye(2)[None], weights=torch.ones(1)
    )
    advice = advise(good, x)
    assert (advice.case, advice.next_step) == ("close to the law below", "stop") or (
        advice.case,
        advice.next_step,
    ) == ("converged", "stop")
    assert advice.trials == ()  # a component's number is no vector of reals


def test_hidden_bits_get_no_mixture():
    torch.manual_seed(0)
    rbm = RBM(4, 3)
    rbm.refresh()
    assert advise(rbm, (torch.rand(60, 4) < 0.5).float()).trials == ()


def test_words_carry_the_numbers():
    x = two_clusters(400)
    words = str(advise(shifted(0.0, 1.0), x, components=(2,)))
    assert "mixture of 2" in words
    assert "nats held out" in words
    assert words.splitlines()[-1].startswith("Next: add the mixture of 2")


def test_advice_repeats_itself_and_leaves_the_random_state():
    x = two_clusters(200)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two = (advise(shifted(0.0, 1.0), x, components=(2,)) for _ in range(2))
    assert bool((torch.get_rng_state() == before).all())
    assert one.trials[0].gain == two.trials[0].gain


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"criterion": "aic"}, "criterion"),
        ({"components": ()}, "components"),
        ({"components": (0,)}, "components"),
        ({"held_out": torch.zeros(5, 6)}, "5 data"),
    ],
)
def test_bad_requests_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        advise(VAE(6, 2, units=4), torch.zeros(60, 6), **options)


def test_a_stage_over_an_index_is_not_said_to_be_of_the_top_ones_kind():
    x = two_clusters(600)
    gmm = GMM(3, 2)
    gmm.fit_em(x)
    advice = replace(advise(gmm, x), next_step="add a stage")
    assert "index 'component'" in str(advice)
    rbm = RBM(4, 3)
    rbm.refresh()
    bits = replace(advise(rbm, (torch.rand(60, 4) < 0.5).float()), next_step="add a stage")
    assert "exchange" in str(bits)
