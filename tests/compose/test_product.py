"""The product as a density: kinds, staleness, flattening, what is refused, what survives."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumerated import BitPair, all_bits
from product_parts import (
    GRID,
    STEP,
    bit_product,
    gmm_product,
    pair_product,
    rbm,
    true_log_density,
    true_log_z,
)
from torch import nn

from pyroboost import MetaModel
from pyroboost.compose import Cascade, Product, Ratio
from pyroboost.evaluation import log_likelihood
from pyroboost.models import GMM, RBM, VAE, BernoulliMixture


def test_log_density_is_the_sum_of_powers_of_log_densities():
    for product, x in ((bit_product(), all_bits(4)), (gmm_product(), GRID[::400])):
        found = product.log_density(x)
        assert found.kind == "unnormalised"
        assert found.std_error is None
        expected = true_log_density(product, x).to(found.value)
        torch.testing.assert_close(found.value, expected)


def test_densities_sum_and_integrate_to_one():
    bits, line = bit_product(), gmm_product()
    for product in (bits, line):
        product.refresh()
    assert bits.partition.method == "exact"
    found = bits.log_marginal(all_bits(4))
    assert found.kind == "exact"
    assert found.std_error is None
    assert float(found.value.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    line.log_partition("importance", num_draws=40_000)
    found = line.log_marginal(GRID)
    assert found.kind == "estimate"
    total = float(found.value.exp().sum() * STEP)
    assert total == pytest.approx(1.0, abs=5 * line.partition.std_error)
    assert found.shared_error == line.partition.std_error > 0
    torch.testing.assert_close(found.std_error, torch.full_like(found.value, found.shared_error))


@pytest.mark.parametrize("part", [lambda: GMM(3, 1), lambda: BernoulliMixture(2, 3), rbm])
def test_a_product_of_one_has_its_parts_density(part):
    part = part()
    product = Product(part)
    product.refresh()
    x = part.sample(7)
    found = product.log_marginal(x)
    assert found.kind == "exact"
    torch.testing.assert_close(found.value, part.log_marginal(x).value.detach())
    assert product.closed_form() is part
    assert product.sample(5).shape == (5, *part.visible_shape)


def test_a_product_of_one_estimated_part_estimates_its_density():
    pair = BitPair(3, 2, 0.5)
    product = Product(pair)
    assert product.log_partition().value == 0.0
    x = all_bits(3)
    found = product.log_marginal(x, num_samples=4000)
    assert found.kind == "estimate"
    assert ((found.value - pair.exact(x)).abs() < 5 * found.std_error + 1e-3).all()


def test_errors_of_estimated_parts_are_scaled_by_their_powers_and_joined():
    pair = BitPair(3, 2, 1.5)
    x = torch.ones(400, 3)
    single = Product(pair, pair, powers=[2.0, 0.5]).log_density(x, num_samples=200)
    spread = float(single.value.std())
    assert float(single.std_error.mean()) == pytest.approx(spread, rel=0.25)
    assert single.num_samples == 200
    assert single.pareto_k.shape == single.ess.shape == (400,)
    own = Product(pair).log_density(x, num_samples=200)
    ratio = float(single.std_error.mean() / own.std_error.mean())
    assert ratio == pytest.approx(math.hypot(2.0, 0.5), rel=0.1)


def test_the_constants_of_parts_cancel():
    """Two RBMs whose log Z is only estimated have an exact product all the same."""
    product = Product(rbm(), rbm(), powers=[1.0, 0.7])
    for part in product:
        machine = part._machine
        machine.keep(machine.log_partition + 0.3, chains=100, error=0.2)
    assert product[0].log_marginal(all_bits(4)).kind == "estimate"
    assert product.estimated == []
    product.log_partition("exact")
    found = product.log_marginal(all_bits(4))
    assert found.kind == "exact"
    assert float(found.value.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_a_stale_log_z_is_refused():
    product, x = bit_product(), all_bits(4)
    with pytest.raises(ValueError, match="log Z is unknown"):
        product.log_marginal(x)
    product.refresh()
    before = product.log_marginal(x).value
    with torch.no_grad():
        product[1].components.logits[0, 0] += 0.1
    with pytest.raises(ValueError, match="out of date"):
        product.log_marginal(x)
    with pytest.raises(ValueError, match="out of date"):
        product.normalisation()
    product.refresh()
    assert not torch.equal(product.log_marginal(x).value, before)
    product.powers[1] = 0.5
    assert not product.is_fresh


def test_buffers_count_as_well_as_parameters():
    """Statistics of a batch normalisation move a density without moving a parameter."""
    vae = VAE(4, 2, units=8)
    product = Product(vae, BernoulliMixture(2, 4), num_samples=5)
    product.log_partition(num_draws=100)
    assert product.is_fresh
    vae.train()
    vae.model(torch.ones(8, 4))
    assert not product.is_fresh


def test_free_params_count_too():
    pyro.param("mean", torch.tensor(0.5))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("mean"), 1.0))
            pyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] / 2, 1.0))

    pair = MetaModel(model, guide, visible="x", hidden="z", visible_shape=(1,))
    product = Product(pair, GMM(2, 1), num_samples=5)
    product.log_partition(num_draws=100)
    assert product.is_fresh
    pyro.get_param_store()["mean"] = torch.tensor(0.7)
    assert not product.is_fresh


def test_refreshing_moves_nothing_and_leaves_the_random_state():
    product = pair_product(num_samples=5)
    product.visible_shape = (3,)
    state = torch.get_rng_state()
    product.refresh()
    assert torch.equal(torch.get_rng_state(), state)
    first = product.partition
    assert first.num_samples > 0
    product.refresh()
    assert product.partition == first


def test_copies_conversions_and_files_keep_densities_and_log_z(tmp_path):
    product, x = bit_product(), all_bits(4)
    product.refresh()
    before = product.log_marginal(x).value
    copied = copy.deepcopy(product)
    torch.testing.assert_close(copied.log_marginal(x).value, before)
    with torch.no_grad():
        copied[0].weight.add_(1.0)
    assert product.is_fresh
    assert not copied.is_fresh
    product.save(tmp_path / "product.pt")
    other = bit_product()
    other.load(tmp_path / "product.pt")
    assert torch.equal(other.log_marginal(x).value, before)
    assert other.partition.describe() == product.partition.describe()
    wide = product.double()
    assert wide.is_fresh
    torch.testing.assert_close(
        wide.log_marginal(x.double()).value, before.double(), atol=1e-5, rtol=0
    )


def test_products_of_products_are_products_of_their_parts():
    a, b, c = (BernoulliMixture(2, 3) for _ in range(3))
    nested = Product(Product(a, b, powers=[1.0, 2.0]), c, powers=[0.5, 1.0])
    assert list(nested) == [a, b, c]
    assert nested.powers.tolist() == [0.5, 1.0, 1.0]
    flat = Product(a, b, c, powers=[0.5, 1.0, 1.0])
    assert torch.equal(nested.log_density(all_bits(3)).value, flat.log_density(all_bits(3)).value)
    assert list(nested[1:]) == [b, c]
    assert nested[1:].powers.tolist() == [1.0, 1.0]
    assert repr(nested) == (
        "Product('x': BernoulliMixture^0.5 * BernoulliMixture^1 * BernoulliMixture^1; "
        "log Z unknown)"
    )


def test_a_ratio_tilts_a_density():
    net = nn.Linear(4, 1)
    product = Product(BernoulliMixture(2, 4), Ratio(net), powers=[1.0, 0.5])
    assert product.samplers == [0]
    product.refresh()
    x = all_bits(4)
    with torch.no_grad():
        tilted = product[0].log_marginal(x).value + 0.5 * net(x)[:, 0]
    torch.testing.assert_close(product.log_marginal(x).value, tilted.log_softmax(0))
    assert product.normalisation() == ("exact", 0.0)
    with pytest.raises(ValueError, match="one logit each"):
        Product(BernoulliMixture(2, 4), Ratio(nn.Linear(4, 2))).log_density(x)


def test_evaluation_asks_the_product_itself():
    product, x = bit_product(), all_bits(4)
    product.refresh()
    found = log_likelihood(product, x)
    assert found.kind == "exact"
    assert torch.equal(found.value, product.log_marginal(x).value)


def test_a_product_is_no_program():
    product = bit_product()
    assert not product.is_program
    assert MetaModel.is_program
    for label in ("model", "guide"):
        with pytest.raises(
            TypeError, match=f"Product.{label}: an energy over x is no Pyro program"
        ):
            getattr(product, label)(all_bits(4))
    for name in ("encode", "decode", "sample_hidden", "log_prior"):
        with pytest.raises(TypeError, match="no hidden site"):
            getattr(product, name)(all_bits(4))
    with pytest.raises(TypeError, match="a factor, not a density"):
        Ratio(nn.Linear(4, 1)).sample(2)
    assert Ratio(nn.Linear(4, 1)).normalisation()[0] == "unnormalised"


def test_a_density_on_reals_times_one_on_bits_is_refused():
    words = "over reals and part 1 .RBM. one over bits, and their product is neither"
    with pytest.raises(ValueError, match=words):
        Product(GMM(2, 4, covariance="diag"), rbm())
    assert Product(GMM(2, 4, covariance="diag").on_bits(), rbm()).support == "bits"
    with pytest.raises(ValueError, match="different shapes"):
        Product(GMM(2, 4), GMM(2, 3))
    counts = MetaModel(_poisson, lambda x: None, visible="x", hidden="z", visible_shape=(3,))
    with pytest.raises(ValueError, match="lower_bound=0"):
        Product(BernoulliMixture(2, 3), counts)


def _poisson(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(torch.ones(3)).to_event(1), obs=x)


def test_supports_are_read_off_the_visible_site():
    assert Product(VAE(4, 2, units=8), rbm()).support == "bits"
    gaussian = VAE(4, 2, units=8, likelihood="gaussian")
    assert Product(gaussian, GMM(2, 4)).support == "reals"
    cascade = Cascade(VAE(4, 2, units=8), GMM(2, 2))
    assert Product(cascade, rbm()).support == "bits"


def test_parts_that_learn_their_shape_later_are_checked_then():
    pair = BitPair(3, 2)
    product = Product(pair, BitPair(3, 2))
    assert product.visible_shape is None
    assert product.log_density(all_bits(3)).value.shape == (8,)
    assert product.visible_shape == (3,)
    mixed = Product(BitPair(3, 2), MetaModel(_poisson, lambda x: None, visible="x", hidden="z"))
    with pytest.raises(ValueError, match="their product is neither"):
        mixed.log_density(all_bits(3))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.full((2, 4), 0.5), "other than 0 and 1"),
        (torch.zeros(2, 3), r"takes \(N, 4\)"),
        (torch.zeros(4), r"takes \(N, 4\)"),
        (torch.full((2, 4), math.nan), "NaN"),
    ],
)
def test_data_that_do_not_fit_are_refused(data, words):
    with pytest.raises(ValueError, match=words):
        bit_product().log_density(data)
    with pytest.raises(ValueError, match="NaN"):
        gmm_product().log_density(torch.full((2, 1), math.nan))


def test_what_makes_no_product_is_refused():
    mixture = BernoulliMixture(2, 3)
    with pytest.raises(ValueError, match="no part"):
        Product()
    with pytest.raises(TypeError, match="not a meta-model"):
        Product(mixture, nn.Linear(3, 1))
    with pytest.raises(ValueError, match="all parts are ratios"):
        Product(Ratio(nn.Linear(3, 1)))
    with pytest.raises(TypeError, match="pass an nn"):
        Ratio(lambda x: x)
    for powers in (0.0, [1.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="one positive number"):
            Product(mixture, mixture, powers=powers)
    with pytest.raises(ValueError, match="num_samples is 0"):
        Product(mixture, num_samples=0)


def test_training_reaches_the_parameters_of_all_parts():
    product = Product(BitPair(3, 2), BernoulliMixture(2, 3), Ratio(nn.Linear(3, 1)))
    named = product.named_trainable(all_bits(3))
    assert {id(p) for p in named.values()} == {id(p) for p in product.parameters()}


def test_a_part_that_is_an_rbm_is_refreshed_with_the_product():
    product = Product(RBM(4, 3), BernoulliMixture(2, 4))
    product.refresh()
    assert float(product.log_marginal(all_bits(4)).value.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert true_log_z(product) == pytest.approx(product.partition.value, abs=1e-5)
