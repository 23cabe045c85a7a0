"""Toy densities, energies and grids: samplers against densities, integrals against closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from pyroboost.data import ENERGIES, TOYS, energy_log_density, plane_grid, toy
from pyroboost.data._toy_laws import Blades, Bumps, Curves, Rings
from pyroboost.data.toys import Toy

DOUBLE = torch.float64


def cell_probabilities(log_prob, bound=5.0, coarse=20, fine=8):
    """Probabilities of the cells of a coarse grid, each integrated on a fine one."""
    grid = plane_grid(bound, coarse * fine, dtype=DOUBLE)
    masses = grid.evaluate(log_prob).exp() * math.exp(grid.log_cell)
    return masses.reshape(coarse, fine, coarse, fine).sum((1, 3)).flatten()


def p_value(x, probabilities, bound=5.0, coarse=20):
    """Pearson's test of points against probabilities of cells; rare cells are pooled."""
    cell = ((x.double() + bound) / (2 * bound) * coarse).floor().long()
    inside = ((cell >= 0) & (cell < coarse)).all(-1)
    counts = torch.bincount(cell[inside] @ torch.tensor([coarse, 1]), minlength=coarse**2).double()
    expected = probabilities * len(x)
    often = expected >= 5
    counts = torch.cat([counts[often], (len(x) - counts[often].sum())[None]])
    expected = torch.cat([expected[often], (len(x) - expected[often].sum())[None]])
    if expected[-1] < 1e-6 * len(x):  # no mass is left: pooled counts must be nothing
        assert counts[-1] == 0
        counts, expected = counts[:-1], expected[:-1]
    statistic = float(((counts - expected).square() / expected).sum())
    return float(chi2.sf(statistic, len(counts) - 1))


@pytest.mark.parametrize("name", TOYS)
def test_the_sampler_has_its_density(name):
    found = cell_probabilities(TOYS[name].log_prob)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-4)
    assert p_value(TOYS[name].sample(20_000, seed=3), found) > 1e-4


WRONG = {
    "eight_gaussians": Bumps(tuple(TOYS["eight_gaussians"].law.centres), 0.38),
    "rings": Rings((0.75, 1.5, 2.25, 3.15), 0.16),
    "pinwheel": Blades(5, 2.0, 0.6, 0.2, 0.86),
    "two_spirals": Curves(TOYS["two_spirals"].law.points, 0.0, 3 * math.pi, 0.15),
    "moons": Curves(TOYS["moons"].law.points, 0.0, math.pi, 0.23),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_test_rejects_a_wrong_density(name):
    law = Toy(name, "almost the same", WRONG[name])
    assert p_value(TOYS[name].sample(20_000, seed=3), cell_probabilities(law.log_prob)) < 1e-6


def test_rings_are_an_integral_over_the_angle():
    law, x = Rings((1.0, 2.0), 0.3), torch.randn(20, 2, dtype=DOUBLE)
    angle = 2 * math.pi * (torch.arange(4000, dtype=DOUBLE) + 0.5) / 4000
    ring = torch.stack([angle.cos(), angle.sin()], -1)
    squares = (x[:, None, None] - torch.stack([ring, 2 * ring])).square().sum(-1)
    expected = (-squares / (2 * 0.3**2)).exp().mean((1, 2)) / (2 * math.pi * 0.3**2)
    torch.testing.assert_close(law.log_prob(x).exp(), expected, rtol=1e-9, atol=0)


def test_a_board_has_no_density_beside_its_cells():
    x = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [5.0, 5.0], [-3.9, -3.9]])
    found = TOYS["checkerboard"].log_prob(x)
    inside = pytest.approx(-math.log(32))
    assert found.tolist() == [inside, -math.inf, -math.inf, inside]


def test_draws_have_a_stream_of_their_own():
    before = torch.get_rng_state()
    first, again = (TOYS["moons"].sample(50, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, TOYS["moons"].sample(50, seed=2))
    assert torch.equal(before, torch.get_rng_state())
    assert TOYS["moons"].sample(5, dtype=DOUBLE).dtype == DOUBLE


def test_a_data_set_is_one_draw_cut_in_parts():
    data = toy("cosine", train=70, validation=20, test=10, seed=4)
    whole = torch.cat([data.train_tensor(), data.validation, data.test])
    assert torch.equal(whole, TOYS["cosine"].sample(100, seed=4))
    assert data.image_shape == (2,)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: toy("moon"), "there is no density 'moon'"),
        (lambda: toy("moons", test=0), "one or more"),
        (lambda: TOYS["moons"].sample(0), "one point or more"),
        (lambda: TOYS["moons"].log_prob(torch.zeros(3)), "last dimension must be 2"),
        (lambda: TOYS["moons"].log_prob(torch.full((1, 2), math.nan)), "NaN"),
        (lambda: energy_log_density("u9"), "no energy 'u9'"),
        (lambda: energy_log_density("u1")(torch.zeros(3)), "last dimension must be"),
        (lambda: plane_grid(0.0), "positive bound"),
        (lambda: plane_grid(1.0, 0), "at least one step"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Energies


def by_numpy(name, z):
    """The energies as printed, without the wall."""
    a, b = z
    w1 = np.sin(2 * np.pi * a / 4)
    w2 = 3 * np.exp(-0.5 * ((a - 1) / 0.6) ** 2)
    w3 = 3 / (1 + np.exp(-(a - 1) / 0.3))
    if name == "u1":
        ring = 0.5 * ((np.hypot(a, b) - 2) / 0.4) ** 2
        lobes = np.exp(-0.5 * ((a - 2) / 0.6) ** 2) + np.exp(-0.5 * ((a + 2) / 0.6) ** 2)
        return np.log(lobes) - ring
    if name == "u2":
        return -0.5 * ((b - w1) / 0.4) ** 2
    first, shift, second = (0.35, w2, 0.35) if name == "u3" else (0.4, w3, 0.35)
    one = np.exp(-0.5 * ((b - w1) / first) ** 2)
    return np.log(one + np.exp(-0.5 * ((b - w1 + shift) / second) ** 2))


@pytest.mark.parametrize("name", ENERGIES)
def test_energies_are_those_printed_and_the_wall_stands_outside(name):
    z = 1.5 * torch.randn(50, 2, dtype=DOUBLE)
    z = z.clamp(-3.9, 3.9)
    found = energy_log_density(name)(z)
    expected = torch.from_numpy(by_numpy(name, z.T.numpy()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    out = torch.tensor([[4.4, 0.3], [0.3, -4.2]], dtype=DOUBLE)
    wall = energy_log_density(name)(out) - torch.from_numpy(by_numpy(name, out.T.numpy()))
    torch.testing.assert_close(wall, torch.tensor([-2.0, -0.5], dtype=DOUBLE), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ENERGIES)
def test_energies_have_a_finite_integral_that_the_grid_finds(name):
    log_density = energy_log_density(name)
    found = []
    for bound, steps in ((6.0, 200), (8.0, 500)):
        grid = plane_grid(bound, steps, dtype=DOUBLE)
        found.append(grid.log_integral(grid.evaluate(log_density)))
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_the_band_has_a_closed_integral():
    """Its width across times its length, and the two halves of a normal behind the walls."""
    grid = plane_grid(7.0, 400, dtype=DOUBLE)
    found = grid.log_integral(grid.evaluate(energy_log_density("u2")))
    root = math.sqrt(2 * math.pi)
    assert found == pytest.approx(math.log(0.4 * root) + math.log(8 + 0.2 * root), abs=1e-5)


@pytest.mark.parametrize("name", ENERGIES)
def test_gradients_lead_back_from_anywhere(name):
    z = torch.tensor([[0.0, 0.0], [30.0, -20.0], [-9.0, 50.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(energy_log_density(name)(z).sum(), z)
    assert gradient.isfinite().all()
    assert ((gradient[1:] * z[1:]).sum(-1) < 0).all()


# Grids


def test_divergences_of_normals_are_closed():
    def normal(loc, scale):
        law = torch.distributions.Normal(torch.tensor(loc, dtype=DOUBLE), scale)
        return lambda z: law.log_prob(z).sum(-1)

    grid = plane_grid(9.0, 300, dtype=DOUBLE)
    p, q = grid.evaluate(normal([0.0, 1.0], 1.0)), grid.evaluate(normal([0.5, 0.0], 1.5))
    kl = 2 * (math.log(1.5) + 1 / (2 * 1.5**2) - 0.5) + (0.5**2 + 1.0) / (2 * 1.5**2)
    assert grid.divergence(p, q) == pytest.approx(kl, abs=1e-8)
    assert grid.divergence(p, p) == 0.0
    hole = torch.where(grid.points[:, 0] > 0, p, -math.inf)
    assert math.isfinite(grid.divergence(hole, q))
    assert grid.divergence(q, hole) == math.inf
