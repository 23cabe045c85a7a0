"""Small products whose every number can be had by a sum or by quadrature."""

import torch
from enumerated import BitPair, all_bits

from pyroboost.compose import Product, Ratio
from pyroboost.models import GMM, RBM, BernoulliMixture

GRID = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
STEP = float(GRID[1] - GRID[0])


def rbm(visible=4, hidden=3, scale=1.0):
    """An RBM of strong couplings and biases."""
    found = RBM(visible, hidden, weight_scale=scale)
    with torch.no_grad():
        found.visible_bias.copy_(torch.randn(visible))
        found.hidden_bias.copy_(torch.randn(hidden))
    found.refresh()
    return found


def bit_product(**options):
    """An RBM times a mixture of bits: exact densities."""
    options = {"powers": [1.0, 0.7], **options}
    return Product(rbm(), BernoulliMixture(2, 4), **options)


def gmm_product(**options):
    """Two mixtures on the line."""
    options = {"powers": [1.0, 0.6], **options}
    return Product(GMM(2, 1), GMM(3, 1), **options).double()


def pair_product(**options):
    """Two belief networks of bits, whose densities are estimated, with good guides."""
    return Product(BitPair(3, 2, 0.5), BitPair(3, 2, 0.5), **options)


def true_log_density(product, x):
    """The product's log density up to log Z, with true densities in place of estimates."""
    total = 0.0
    for part, power in zip(product, product.powers.tolist(), strict=True):
        if isinstance(part, Ratio):
            own = part.log_density(x).value
        else:
            own = part.exact(x) if isinstance(part, BitPair) else part.log_marginal(x).value
        total = total + power * own.detach().double()
    return total


def true_log_z(product):
    """log Z by summing over all bits, or over a grid on the line."""
    if product.support == "bits":
        states = all_bits(product.visible_shape[0])
        return float(true_log_density(product, states).logsumexp(0))
    return float((true_log_density(product, GRID).exp().sum() * STEP).log())
