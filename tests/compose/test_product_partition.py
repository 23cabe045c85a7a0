"""Every estimate of log Z against a sum over states or a quadrature, and what is said of it."""

import math

import pytest
import torch
from enumerated import BitPair, all_bits
from product_parts import bit_product, gmm_product, pair_product, true_log_density, true_log_z
from torch import nn

from pyroboost.compose import Product, Ratio
from pyroboost.compose.partition import (
    Partition,
    doubt_of,
    from_weights,
    propose,
    search_table,
    with_constants,
)
from pyroboost.likelihood import Likelihood
from pyroboost.models import GMM, RBM, BernoulliMixture

METHODS = [
    ("importance", {}),
    ("importance", {"proposal": 0}),
    ("importance", {"proposal": 1}),
    ("importance", {"shares": [0.2, 0.8]}),
    ("bridge", {"num_draws": 2000}),
    ("bridge", {"num_draws": 2000, "proposal": 1}),
    ("ais", {"num_temperatures": 40}),
    ("ais", {"proposal": 1, "inverse_temperatures": torch.linspace(0, 1, 30) ** 2, "steps": 2}),
]


@pytest.mark.parametrize("make", [bit_product, gmm_product])
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_estimates_agree_with_the_exact_log_z(make, method, options):
    product = make()
    found = product.log_partition(method, **options)
    assert found.method == method
    assert found.reliable, found.describe()
    assert found.bias is None
    assert 0 < found.std_error < 0.15
    assert found.value == pytest.approx(true_log_z(product), abs=4.5 * found.std_error)
    assert product.partition.value == found.value
    assert product.partition.describe() == found.describe()
    assert 0 < found.ess <= found.num_samples


@pytest.mark.parametrize("proposal", [0, "mixture"])
@pytest.mark.parametrize("method", ["importance", "ais"])
def test_the_mean_of_weights_is_unbiased_for_z(method, proposal):
    """E[Z_hat] = Z on the natural scale, over many runs of a few draws each."""
    if (method, proposal) == ("ais", "mixture"):
        proposal = 1
    product = bit_product()
    z = math.exp(true_log_z(product))
    options = {"num_draws": 40, "num_temperatures": 6} if method == "ais" else {"num_draws": 40}
    runs = [product.log_partition(method, proposal=proposal, **options) for _ in range(150)]
    values = torch.tensor([run.value for run in runs]).exp()
    error = float(values.std()) / 150**0.5
    assert abs(float(values.mean()) - z) < 4.5 * error
    assert error < 0.1 * z


def test_estimated_densities_of_power_one_leave_z_unbiased_and_others_do_not():
    """E[Z_hat] with one importance sample per x: right for a_i = 1, too low for a_i < 1."""
    parts = BitPair(3, 2, 1.2), BitPair(3, 2, 1.2)
    for powers, proposal, biased in (([1.0, 1.0], 0, False), ([1.0, 0.5], 0, True)):
        product = Product(*parts, powers=powers)
        product.visible_shape = (3,)
        z = math.exp(true_log_z(product))
        found = product.log_partition(
            "importance", proposal=proposal, num_draws=60_000, num_samples=1
        )
        assert (found.bias is not None) == biased
        gap = (math.exp(found.value) - z) / (math.exp(found.value) * found.std_error)
        assert (gap < -6) if biased else (abs(gap) < 4.5)


def test_what_makes_an_estimate_biased_is_told():
    product = pair_product()
    product.visible_shape = (3,)
    assert "in the proposal" in product.log_partition(num_draws=50, num_samples=2).bias
    assert product.log_partition("bridge", num_draws=200, num_samples=2).bias is not None
    halves = Product(*product, powers=0.5)
    assert "power other than 1" in halves.log_partition(
        "importance", proposal=0, num_draws=50, num_samples=2
    ).bias  # fmt: skip
    assert "biased" in halves.partition.describe()


@pytest.mark.parametrize("method", ["importance", "bridge", "ais"])
def test_estimated_densities_come_close_with_many_samples(method):
    product = pair_product(num_samples=100)
    product.visible_shape = (3,)
    options = {"num_draws": 400, **({"num_temperatures": 10} if method == "ais" else {})}
    found = product.log_partition(method, **options)
    assert found.value == pytest.approx(true_log_z(product), abs=5 * found.std_error + 0.02)


def test_a_ratio_is_part_of_the_sum():
    product = Product(BernoulliMixture(2, 4), Ratio(nn.Linear(4, 1)), powers=[1.0, 2.0])
    exact = product.log_partition("exact").value
    for method in ("importance", "bridge", "ais"):
        found = product.log_partition(method, num_draws=2000)
        assert found.value == pytest.approx(exact, abs=4.5 * found.std_error)
    with pytest.raises(ValueError, match=r"one of \[0\]"):
        product.log_partition("importance", proposal=1)


def far_apart():
    """Two narrow normals, far from each other, to a wide one: weights with a terrible tail."""
    parts = GMM(1, 1), GMM(1, 1)
    for part, loc, scale in zip(parts, (0.0, 6.0), (0.5, 2.0), strict=True):
        with torch.no_grad():
            part.components.locs.fill_(loc)
            part.components.log_scale.fill_(math.log(scale))
    return Product(*parts, powers=[0.02, 1.0])


def test_k_hat_refuses_a_likelihood_that_looks_sure():
    product = far_apart()
    found = product.log_partition("importance", proposal=0, num_draws=2000)
    exact = product.log_partition("closed form").value
    assert found.value < exact - 5 * found.std_error  # what the error alone would have said
    assert not found.reliable
    assert "k-hat" in found.doubt
    assert "error unknown" in found.describe()
    product.keep(found)
    assert product.partition.doubt == found.doubt
    likelihood = product.log_marginal(torch.zeros(3, 1))
    assert likelihood.doubt == found.doubt
    assert likelihood.standard_error == math.inf
    assert "error unknown" in likelihood.describe()
    assert "k-hat" in likelihood.describe()
    assert product.normalisation() == ("estimate", math.inf)
    mixed = product.log_partition("importance", num_draws=2000)
    assert mixed.reliable
    assert mixed.value == pytest.approx(exact, abs=4.5 * mixed.std_error)


def test_doubts_survive_what_is_done_to_likelihoods():
    sure = Likelihood(torch.zeros(2), "estimate", torch.ones(2))
    doubted = Likelihood(torch.zeros(2), "estimate", torch.ones(2), doubt="for a reason")
    assert (doubted + 1.0).doubt == "for a reason"
    assert Likelihood.cat([sure, doubted]).doubt == "for a reason"
    assert Likelihood.cat([sure, sure]).doubt is None
    assert math.isfinite(sure.standard_error)
    assert "for a reason" not in sure.describe()


def test_few_draws_are_not_judged():
    product = gmm_product()
    assert "too few" in product.log_partition("importance", num_draws=10).doubt
    assert doubt_of(0.4, 10_000) is None
    assert doubt_of(0.8, 10_000) is not None
    assert doubt_of(math.inf, 10_000) is not None
    assert doubt_of(0.55, 100) is not None  # 100 draws bear 0.5
    assert doubt_of(-math.inf, 100) is None


def test_chains_that_have_not_mixed_are_told():
    """Two far modes, which chains from either part do not leave."""
    parts = [BernoulliMixture(2, 30) for _ in range(2)]
    for part in parts:
        odds = torch.full((2, 30), 4.0)
        odds[1] = -4.0
        part.assign(torch.zeros(2), odds)
    product = Product(*parts)
    found = product.log_partition("bridge", num_draws=1000)
    assert "R-hat" in found.doubt
    assert product.partition.doubt is not None


def test_the_default_is_the_surest_way():
    assert bit_product().log_partition().method == "exact"
    assert Product(BernoulliMixture(2, 4), BernoulliMixture(2, 4)).log_partition().method == (
        "closed form"
    )
    assert gmm_product().log_partition().method == "importance"
    noisy = pair_product(num_samples=2)
    noisy.visible_shape = (3,)
    assert noisy.log_partition(num_draws=50).method == "importance"


def test_weights_of_proposals_are_the_ratio_of_densities():
    product = gmm_product()
    for proposal, shares in ((0, None), (1, None), ("mixture", None), ("mixture", [1.0, 3.0])):
        found = propose(product, 400, proposal, shares=shares)
        own = [part.log_marginal(found.x).value.detach() for part in product]
        split = (0.25, 0.75) if shares else (0.5, 0.5)
        mixture = torch.logaddexp(own[0] + math.log(split[0]), own[1] + math.log(split[1]))
        density = own[proposal] if proposal != "mixture" else mixture
        expected = true_log_density(product, found.x) - density
        torch.testing.assert_close(found.log_weights, expected)
    cancelled = propose(product, 10, 0)
    assert cancelled.table[0].isnan().all()
    assert not cancelled.table[1].isnan().any()


def test_mixture_draws_are_stratified_or_independent():
    parts = [BernoulliMixture(1, 1) for _ in range(2)]
    for part, odds in zip(parts, (-30.0, 30.0), strict=True):
        part.assign(torch.zeros(1), torch.full((1, 1), odds))
    product = Product(*parts)
    fixed = propose(product, 100, shares=[1.0, 3.0]).x
    assert fixed[:, 0].tolist() == [0.0] * 25 + [1.0] * 75
    loose = torch.stack([propose(product, 100, independent=True).x[:, 0] for _ in range(60)])
    assert float(loose.sum(1).std()) == pytest.approx(5.0, rel=0.4)
    assert abs(float(loose[:, :50].mean()) - 0.5) < 0.05


def test_one_set_of_draws_serves_all_powers():
    for product in (bit_product(), gmm_product()):
        table, proposal, summed = search_table(product, 20_000)
        assert summed == (product.support == "bits")
        for powers in ([1.0, 0.7], [0.5, 1.2]):
            weights = torch.tensor(powers, dtype=torch.float64) @ table - proposal
            found = from_weights(weights, "importance", None)
            exact = true_log_z(Product(*product, powers=powers))
            assert found.value == pytest.approx(exact, abs=1e-4 if summed else 5 * found.std_error)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("guess", {}, "method is 'guess'"),
        ("importance", {"proposal": 2}, "the proposal is 2"),
        ("importance", {"proposal": "best"}, "the proposal is 'best'"),
        ("importance", {"shares": [1.0]}, "one positive number"),
        ("importance", {"shares": [1.0, 0.0]}, "one positive number"),
        ("bridge", {"proposal": "mixture"}, "leads to one part"),
        ("ais", {"proposal": "mixture"}, "starts at one part"),
        ("exact", {}, "exact sums need bits"),
        ("closed form", {}, "no closed form"),
        ("ais", {"inverse_temperatures": torch.tensor([0.0, 0.5])}, "rising from 0 to 1"),
    ],
)
def test_methods_that_do_not_fit_are_refused(method, options, words):
    with pytest.raises(ValueError, match=words):
        gmm_product().log_partition(method, **options)


def test_exact_sums_refuse_estimated_densities():
    product = pair_product()
    product.visible_shape = (3,)
    with pytest.raises(ValueError, match=r"parts \[0, 1\] are estimated"):
        product.log_partition("exact")
    bound = BernoulliMixture(2, 3)
    bound.log_marginal = lambda x, *args: Likelihood(torch.zeros(len(x)), "bound")
    with pytest.raises(ValueError, match="gives a bound"):
        Product(bound, BernoulliMixture(2, 3)).log_density(all_bits(3))


def test_descriptions():
    assert Partition(1.0, 0.0, "exact").describe() == "log Z = 1.000 ± 0.000 nats (exact)"
    assert Partition(1.0, 0.0, "exact").exact
    assert not Partition(1.0, 0.1, "importance", 5.0, 0.1, 10).exact


@pytest.mark.parametrize("options", [
    {"method": "importance", "proposal": 0},
    {"method": "importance"},
    {"method": "bridge", "proposal": 0},
    {"method": "ais", "proposal": 0},
])  # fmt: skip
def test_what_a_proposing_part_does_not_know_of_its_constant_is_part_of_the_error(options):
    torch.manual_seed(0)
    machine = RBM(24, 22)
    with torch.no_grad():
        machine.weight.copy_(0.6 * torch.randn(24, 22))
    other = BernoulliMixture(3, 24)
    values, told = [], []
    for seed in range(6):
        torch.manual_seed(seed)
        machine.refresh(num_chains=10, num_temperatures=20)
        product = Product(machine, other)
        found = product.log_partition(**options, num_draws=300)
        values.append(float(product.log_marginal(torch.zeros(1, 24)).value))
        told.append(found.std_error)
    own = machine.normalisation()[1]
    assert min(told) > 0.02
    if options.get("proposal") == 0:
        assert found.std_error >= own
    # Errors that are told are of the size of those that are made.
    spread = float(torch.tensor(values).std())
    assert spread < 4 * sum(told) / len(told)


def test_a_part_that_knows_its_constant_adds_no_error():
    torch.manual_seed(0)
    product = Product(BernoulliMixture(2, 5), BernoulliMixture(3, 5))
    found = product.log_partition("importance", num_draws=500)
    again = with_constants(found, product, {0: 0.5, 1: 0.5})
    assert again == found


def test_a_number_of_draws_below_one_is_refused():
    product = Product(BernoulliMixture(2, 5), BernoulliMixture(3, 5))
    for count in (0, -3):
        with pytest.raises(ValueError, match="num_draws"):
            product.log_partition("importance", num_draws=count)
