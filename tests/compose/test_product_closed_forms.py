"""Products that are one model of the parts' class, with their constants."""

import pytest
import torch
from enumerated import all_bits
from product_parts import GRID, STEP, rbm
from torch import nn

from pyroboost.compose import Product, Ratio
from pyroboost.models import GMM, RBM, VAE, BernoulliMixture


def on_line(product):
    """Density of the product over a grid, up to log Z, and log Z by quadrature."""
    log_q = product.log_density(GRID).value
    return log_q, float((log_q.exp().sum() * STEP).log())


@pytest.mark.parametrize("kinds", [("full", "full"), ("diag", "diag"), ("diag", "full")])
@pytest.mark.parametrize("powers", [[1.0, 1.0], [2.0, 1.0], [1.0, 3.0]])
def test_gaussian_mixtures_give_a_gaussian_mixture(kinds, powers):
    parts = [GMM(k, 1, covariance=kind) for k, kind in zip((2, 3), kinds, strict=True)]
    product = Product(*parts, powers=powers).double()
    closed = product.closed_form()
    log_q, log_z = on_line(product)
    assert isinstance(closed, GMM)
    assert closed.covariance == ("full" if "full" in kinds else "diag")
    assert len(closed.mixture.weights) == 2 ** int(powers[0]) * 3 ** int(powers[1])
    found = product.log_partition("closed form")
    assert found.exact
    assert found.value == pytest.approx(log_z, abs=1e-8)
    torch.testing.assert_close(closed.log_marginal(GRID).value.detach(), log_q - log_z)


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_planar_mixtures_too(kind):
    parts = [GMM(2, 2, covariance=kind), GMM(2, 2)]
    with torch.no_grad():
        parts[1].components.lower.normal_()
        parts[0].components.log_scale.normal_()
    product = Product(*parts, powers=[2.0, 1.0]).double()
    axis = torch.linspace(-9, 9, 721, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_q = product.log_density(grid).value
    log_z = float(log_q.logsumexp(0)) + 2 * torch.log(axis[1] - axis[0])
    product.refresh()
    assert product.partition.value == pytest.approx(float(log_z), abs=1e-6)
    closed = product.closed_form().log_marginal(grid[::97]).value.detach()
    torch.testing.assert_close(closed, log_q[::97] - log_z)


def test_single_gaussians_take_any_powers():
    parts = [GMM(1, 1), GMM(1, 1, covariance="diag"), GMM(2, 1)]
    with torch.no_grad():
        for part in parts:
            part.components.log_scale.normal_().mul_(0.3)
    product = Product(*parts[:2], powers=[0.37, 2.6]).double()
    log_q, log_z = on_line(product)
    closed = product.closed_form()
    assert len(closed.mixture.weights) == 1
    assert product.log_partition().value == pytest.approx(log_z, abs=1e-8)
    torch.testing.assert_close(closed.log_marginal(GRID).value.detach(), log_q - log_z)
    (loc,), (scale,) = closed.mixture.locs, closed.mixture.scale
    own = [(float(p.mixture.locs), float(p.mixture.scale)) for p in parts[:2]]
    precision = sum(a / s**2 for a, (_, s) in zip((0.37, 2.6), own, strict=True))
    mean = sum(a * m / s**2 for a, (m, s) in zip((0.37, 2.6), own, strict=True)) / precision
    assert float(scale) == pytest.approx(precision**-0.5, rel=1e-9)
    assert float(loc) == pytest.approx(mean, rel=1e-9)
    mixed = Product(*parts, powers=[0.37, 2.6, 2.0]).double()
    log_q, log_z = on_line(mixed)
    assert mixed.log_partition().value == pytest.approx(log_z, abs=1e-8)


def test_tiny_weights_are_kept():
    """Far out, a component of weight 1e-30 is all there is."""
    parts = [GMM(2, 1, covariance="diag").double() for _ in range(2)]
    for part, scale in zip(parts, ([0.1, 3.0], [0.1, 0.1]), strict=True):
        with torch.no_grad():
            part.components.locs.copy_(torch.tensor([[0.0], [5.0]]))
            part.components.log_scale.copy_(torch.tensor(scale)[:, None].log())
            part.components.logits.copy_(torch.tensor([0.0, -40.0]))
    product = Product(*parts)
    product.refresh()
    x = torch.tensor([[5.0], [4.0], [-1.0]], dtype=torch.float64)
    closed = product.closed_form()
    torch.testing.assert_close(closed.log_marginal(x).value.detach(), product.log_marginal(x).value)


@pytest.mark.parametrize("powers", [[1.0, 1.0], [3.0, 1.0], [1.0, 2.0]])
def test_rbms_give_an_rbm(powers):
    product = Product(rbm(4, 3), rbm(4, 2), powers=powers)
    closed = product.closed_form()
    assert isinstance(closed, RBM)
    assert closed.num_hidden == 3 * int(powers[0]) + 2 * int(powers[1])
    x = all_bits(4)
    found = product.log_partition("closed form")
    assert found.exact
    assert found.value == pytest.approx(product.log_partition("exact").value, abs=1e-4)
    expected = product.log_marginal(x).value
    torch.testing.assert_close(closed.log_marginal(x).value, expected, atol=1e-4, rtol=1e-4)
    assert closed.is_fresh


def test_large_rbms_have_an_estimated_log_z():
    product = Product(rbm(24, 13, 0.1), rbm(24, 13, 0.1))
    found = product.log_partition()
    assert found.method == "closed form"
    assert not found.exact
    assert 0 < found.std_error < 0.5
    assert product.normalisation()[0] == "estimate"
    likelihood = product.log_marginal(torch.zeros(2, 24))
    assert likelihood.kind == "estimate"
    other = product.log_partition("importance", num_draws=4000)
    assert found.value == pytest.approx(other.value, abs=5 * (found.std_error + other.std_error))


@pytest.mark.parametrize("powers", [[1.0, 1.0], [2.0, 1.0]])
def test_mixtures_of_bits_give_a_mixture_of_bits(powers):
    product = Product(BernoulliMixture(2, 4), BernoulliMixture(3, 4), powers=powers)
    closed = product.closed_form()
    value = product.log_partition("closed form").value
    assert value == pytest.approx(product.log_partition("exact").value, abs=1e-5)
    x = all_bits(4)
    torch.testing.assert_close(closed.log_marginal(x).value.detach(), product.log_marginal(x).value)


def test_single_vectors_of_bits_take_any_powers():
    product = Product(BernoulliMixture(1, 4), BernoulliMixture(2, 4), powers=[0.3, 2.0])
    value = product.log_partition("closed form").value
    assert value == pytest.approx(product.log_partition("exact").value, abs=1e-5)


@pytest.mark.parametrize(
    "product",
    [
        lambda: Product(GMM(2, 1), GMM(2, 1), powers=[1.0, 0.5]),
        lambda: Product(GMM(9, 1), GMM(9, 1), powers=[3.0, 1.0]),
        lambda: Product(rbm(), rbm(), powers=[1.0, 1.5]),
        lambda: Product(rbm(), BernoulliMixture(2, 4)),
        lambda: Product(BernoulliMixture(2, 4), rbm()),
        lambda: Product(BernoulliMixture(2, 4), BernoulliMixture(2, 4), powers=0.5),
        lambda: Product(BernoulliMixture(2, 4), Ratio(nn.Linear(4, 1))),
        lambda: Product(VAE(4, 2, units=8), VAE(4, 2, units=8)),
    ],
)
def test_other_products_have_none(product):
    assert product().closed_form() is None


def test_names_and_dtypes_are_the_first_parts():
    product = Product(GMM(2, 1, visible="v", hidden="k"), GMM(2, 1)).double()
    closed = product.closed_form()
    assert (closed.visible, closed.hidden) == ("v", "k")
    assert closed.components.locs.dtype == torch.float64
