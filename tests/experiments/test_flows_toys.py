"""What the toys' verdicts make of few seeds, against Student's intervals by an integral."""

import math

import pytest
import torch
from scipy import integrate

from pyroboost.data.grids import plane_grid
from pyroboost.experiments.flows_toys import Sizes, _better, integral, margin, one_each, realnvps
from pyroboost.experiments.flows_toys_matching import DEEP, SHALLOW, _matches
from pyroboost.experiments.flows_vae_figure import _pooled
from pyroboost.experiments.record import over_seeds


def rows_of(name, **values):
    return [
        over_seeds(name, metric, [(v, 0.1) for v in runs], kind="exact")
        for metric, runs in values.items()
    ]


def student(half, freedom):
    """Return how much of Student's law lies within so much of 0, by quadrature of its density."""
    norm = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)

    def density(t):
        return norm * (1 + t * t / freedom) ** (-(freedom + 1) / 2)

    return integrate.quad(density, -half, half)[0]


@pytest.mark.parametrize("gaps", [(1.0, 2.0, 3.0), (0.1, 0.5, 0.2, 0.9, 0.3)])
def test_a_margin_is_paired_by_seed_and_as_wide_as_students_interval(gaps):
    shared = [10.0 * k for k in range(len(gaps))]  # what seeds have in common cancels
    rows = rows_of("a", one=shared, two=[s + g for s, g in zip(shared, gaps, strict=True)])
    gain, half = margin(rows, "a", "one", "two")
    values = torch.tensor(gaps, dtype=torch.float64)
    assert gain == pytest.approx(float(values.mean()))
    error = float(values.std()) / math.sqrt(len(gaps))
    assert student(half / error, len(gaps) - 1) == pytest.approx(0.95, abs=1e-6)


def test_noise_does_not_prove_that_two_match():
    """A wide interval says nothing; a narrow one about 0 does."""

    def verdict(deep, shallow):
        return _matches(
            [
                over_seeds(f"u1, {label}", "KL(q, p)", [(v, None) for v in runs], kind="measure")
                for label, runs in ((DEEP, deep), (SHALLOW, shallow))
            ],
            ("u1",),
        )[0]["holds"]

    assert not verdict([0.1, 0.9, 0.2], [0.3, 0.2, 0.5])
    assert verdict([0.10, 0.11, 0.12], [0.10, 0.12, 0.12])
    assert not verdict([0.10, 0.11, 0.12], [0.20, 0.22, 0.22])


def test_better_on_every_density_is_clear_on_every_one():
    def verdict(gain):
        rows = []
        for name, by in (("a", 1.0), ("b", gain)):
            found = {
                f"GBF, C = {c}, K = {k}": [1.0 - by, 1.1 - by] for c, k in ((8, 1), (4, 2), (2, 4))
            }
            rows += rows_of(name, **{"RealNVP, K = 8": [1.0, 1.1001]}, **found)
        return [one["holds"] for one in _better(rows, ("a", "b"))]

    assert verdict(0.5) == [True] * 3
    assert verdict(0.0) == [False] * 3


def test_integrals_of_models_and_their_verdict():
    model = realnvps(2, 1, Sizes(("moons",), 1, units=4), 0)
    with torch.no_grad():
        mass = integral(model, plane_grid(8.0, 400))
        part = integral(model, plane_grid(1.0, 400))
    draws = model.sample(40_000)
    assert mass == pytest.approx(1.0, abs=1e-3)
    assert part == pytest.approx(float((draws.abs() < 1).all(-1).float().mean()), abs=0.012)
    good = rows_of("moons, integral", one=[1.0, 0.995])
    assert one_each(good)["holds"]
    bad = one_each([*good, *rows_of("rings, integral", one=[0.98, 1.0])])
    assert not bad["holds"]
    assert "0.9800 (rings, integral, one)" in bad["evidence"]


def test_pooled_errors_do_not_fall_with_rounds_that_share_images():
    each = torch.randn(400, generator=torch.Generator().manual_seed(0))
    value, error = _pooled([each, each + 1.0])
    assert value == pytest.approx(float(each.mean()) + 0.5, abs=1e-6)
    assert error == pytest.approx(float(each.std()) / 20, rel=1e-5)
