"""Samples of a product against its exact law, by a test that also refuses wrong laws."""

import pytest
import torch
from enumerated import BitPair, all_bits
from product_parts import GRID, STEP, bit_product, gmm_product, rbm, true_log_density
from scipy.stats import chi2, kstest
from torch import nn

from pyroboost.compose import Product, Ratio
from pyroboost.evaluation import log_likelihood
from pyroboost.models import GMM, VAE, BernoulliMixture


def law_of(product):
    return true_log_density(product, all_bits(product.visible_shape[0])).softmax(0)


def index_of(x):
    return (x * 2.0 ** torch.arange(x.shape[-1] - 1, -1, -1)).sum(-1).long()


def fits(x, law):
    """p-value of independent draws of bits under a law of all states."""
    counts = torch.bincount(index_of(x), minlength=len(law)).double()
    expected = law * len(x)
    keep = expected > 4  # rare states are one cell
    counts = torch.cat([counts[keep], counts[~keep].sum()[None]])
    expected = torch.cat([expected[keep], expected[~keep].sum()[None].clamp_min(1e-9)])
    return chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1)


def cdf_of(product):
    log_q = true_log_density(product, GRID)
    steps = (log_q.exp() / (log_q.exp().sum() * STEP) * STEP).cumsum(0).numpy()

    def cdf(x):
        places = ((x - float(GRID[0])) / STEP).round().clip(0, len(steps) - 1).astype(int)
        return steps[places]

    return cdf


WAYS = [
    ("exact", {}),
    ("resample", {"num_draws": 40_000}),
    ("metropolis", {"num_chains": 3000, "warmup": 40}),
    ("metropolis", {"num_chains": 3000, "warmup": 60, "proposal": 0}),
    ("metropolis", {"num_chains": 3000, "warmup": 60, "proposal": 1}),
    ("gibbs", {"num_chains": 3000, "warmup": 15}),
    ("gibbs", {"num_chains": 3000, "warmup": 10, "block": 3}),
]


@pytest.mark.parametrize(("method", "options"), WAYS)
def test_bits_have_the_products_law_and_no_other(method, options):
    """As many chains as draws: all draws are independent."""
    product = bit_product()
    x = product.sample(3000, method=method, **options)
    assert x.shape == (3000, 4)
    assert fits(x, law_of(product)) > 1e-3
    for wrong in (product[0], product[1], Product(*product, powers=[1.0, 2.0])):
        other = wrong if isinstance(wrong, Product) else Product(wrong)
        assert fits(x, law_of(other)) < 1e-6


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("resample", {"num_draws": 20_000}),
        ("metropolis", {"num_chains": 1000, "warmup": 40}),
        ("nuts", {"num_chains": 8, "warmup": 100, "thin": 4}),
        ("hmc", {"num_chains": 8, "warmup": 100, "thin": 4}),
    ],
)
def test_reals_have_the_products_law_and_no_other(method, options):
    torch.manual_seed(3)
    product = Product(GMM(2, 1), GMM(2, 1), powers=[1.0, 0.6]).double()
    with torch.no_grad():
        for part in product:
            part.components.locs.mul_(0.7)
    count = 400 if method in ("nuts", "hmc") else 1000
    x = product.sample(count, method=method, **options)[:, 0].numpy()
    assert kstest(x, cdf_of(product)).pvalue > 1e-3
    assert kstest(x, cdf_of(Product(*product, powers=[3.0, 3.0]))).pvalue < 1e-3


def test_chains_of_hamiltonian_kernels_leave_parameters_as_they_are():
    product = gmm_product()
    product[1].components.logits.requires_grad_(False)
    flags = [p.requires_grad for p in product.parameters()]
    chains = product.chains(method="nuts", num_chains=3, num_draws=20, warmup=20)
    assert chains.values.shape == (3, 20, 1)
    assert chains.exact
    assert [p.requires_grad for p in product.parameters()] == flags
    expected = true_log_density(product, chains.draws).reshape(3, 20)
    torch.testing.assert_close(chains.log_density, expected)


@pytest.mark.parametrize("method", ["metropolis", "gibbs"])
def test_chains_know_the_log_density_of_what_they_hold(method):
    product = bit_product(powers=[0.5, 0.7])
    chains = product.chains(method=method, num_chains=5, num_draws=30, thin=2, warmup=3)
    assert chains.values.shape == (5, 30, 4)
    expected = true_log_density(product, chains.draws).reshape(5, 30)
    torch.testing.assert_close(chains.log_density, expected, atol=1e-5, rtol=1e-5)
    assert chains.name == "x"
    assert chains.ess.shape == (4,)
    assert 0 < chains.acceptance < 1


def test_chains_are_chains():
    """A chain's neighbours in time are often one state, its neighbours in space are not."""
    product = Product(BernoulliMixture(1, 12), BernoulliMixture(1, 12), powers=[1.0, 3.0])
    values = product.chains(num_chains=6, num_draws=40, warmup=0).values
    same = (values[:, 1:] == values[:, :-1]).all(-1).double().mean()
    across = (values[1:] == values[:-1]).all(-1).double().mean()
    assert float(same) > 0.5
    assert float(across) < 0.2


def test_estimated_densities_of_power_one_leave_the_true_product_invariant():
    """Pseudo-marginal: one importance sample per x, very noisy, and the exact law all the same."""
    torch.manual_seed(5)
    product = Product(BitPair(3, 2, 1.2), BitPair(3, 2, 1.2))
    product.visible_shape = (3,)
    chains = product.chains(num_chains=6000, num_draws=1, warmup=80, num_samples=1, proposal=0)
    assert chains.exact
    assert "pseudo-marginal" in chains.words
    assert fits(chains.draws, law_of(product)) > 1e-3
    assert fits(chains.draws, law_of(Product(product[0]))) < 1e-6
    gibbs = product.chains(method="gibbs", num_chains=4000, num_draws=1, warmup=40, num_samples=1)
    assert gibbs.exact
    assert fits(gibbs.draws, law_of(product)) > 1e-3


def test_other_powers_of_estimated_densities_are_only_approximate():
    product = Product(BitPair(3, 2, 1.5), BitPair(3, 2, 1.5), powers=[1.0, 3.0])
    product.visible_shape = (3,)
    chains = product.chains(num_chains=6000, num_draws=1, warmup=60, num_samples=1)
    assert not chains.exact
    assert "parts [1]" in chains.words
    assert fits(chains.draws, law_of(product)) < 1e-6
    ones = Product(*product)
    ones.visible_shape = (3,)
    assert ones.chains(num_chains=4, num_draws=4).exact
    mixed = ones.chains(num_chains=4, num_draws=4, proposal="mixture")
    assert not mixed.exact
    assert "proposal" in mixed.words
    exact_proposes = Product(BernoulliMixture(1, 3), product[0])
    assert exact_proposes.chains(num_chains=4, num_draws=4, proposal=0, num_samples=2).exact


def test_the_default_way_is_the_surest():
    closed = Product(BernoulliMixture(2, 4), BernoulliMixture(2, 4))
    assert fits(closed.sample(4000), law_of(closed)) > 1e-3
    assert fits(bit_product().sample(4000), law_of(bit_product())) < 1e-3  # another product
    product = bit_product()
    assert fits(product.sample(4000), law_of(product)) > 1e-3
    tilted = Product(BernoulliMixture(2, 4), Ratio(nn.Linear(4, 1)))
    assert fits(tilted.sample(4000), law_of(tilted)) > 1e-3
    assert gmm_product().sample(torch.zeros(7, 1)).shape == (7, 1)


def test_shapes_and_dtypes_are_those_of_the_parts():
    pair = VAE((1, 2, 3), 2, units=8)
    product = Product(pair, pair, num_samples=2)
    x = product.sample(5, num_chains=2, warmup=2)
    assert x.shape == (5, 1, 2, 3)
    assert product.log_density(x).value.shape == (5,)
    assert gmm_product().sample(3).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gmm_product().chains(method="gibbs"), "Gibbs sampling draws bits"),
        (lambda: bit_product().chains(method="nuts"), "move through the reals"),
        (lambda: bit_product().chains(method="langevin"), "method is 'langevin'"),
        (lambda: bit_product().chains(num_draws=0), "at least one of each"),
        (lambda: bit_product().chains(warmup=-1), "at least one of each"),
        (lambda: bit_product().chains(proposal=7), "the proposal is 7"),
        (lambda: bit_product().sample(0), "at least one"),
        (lambda: bit_product().sample(3, method="closed form"), "no closed form"),
        (lambda: bit_product().sample(3, method="magic"), "method is 'magic'"),
        (lambda: gmm_product().sample(3, method="exact"), "exact sums need bits"),
    ],
)
def test_ways_that_do_not_fit_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_hamiltonian_chains_need_densities_with_gradients():
    gaussian = VAE(1, 2, units=8, likelihood="gaussian")
    with pytest.raises(ValueError, match=r"part 1 \(VAE\) gives no exact density"):
        Product(GMM(2, 1), gaussian).chains(method="nuts", num_chains=2, num_draws=2)


def test_seeds_repeat_draws():
    product = Product(rbm(), BernoulliMixture(2, 4), powers=[1.0, 0.5])
    first, second = (
        (torch.manual_seed(1), product.sample(50, method="metropolis"))[1] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_few_samples_come_from_as_many_chains():
    torch.manual_seed(0)
    product = Product(VAE(64, 4, units=8), VAE(64, 4, units=8), num_samples=5)
    assert len(product.sample(25).unique(dim=0)) > 20


def test_likelihoods_of_a_product_take_the_samples_asked_for():
    torch.manual_seed(0)
    product = Product(VAE(6, 2, units=8), VAE(6, 2, units=8), num_samples=5)
    product.log_partition(num_draws=50)
    x = torch.zeros(3, 6)
    assert log_likelihood(product, x, num_samples=70).num_samples == 70
    assert log_likelihood(product, x).num_samples == 5
