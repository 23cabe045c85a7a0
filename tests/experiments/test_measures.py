"""Measures of samples, and the verdicts on what the paper says."""

import pytest
import torch

from pyroboost import Cascade
from pyroboost.experiments import parts
from pyroboost.experiments.cascade_figure2 import verdicts
from pyroboost.experiments.figures import _grid
from pyroboost.models import RBM, VAE


def test_grey_share_counts_the_pixels_between():
    means = torch.tensor([[0.0, 0.05, 0.5, 0.95], [0.2, 0.3, 0.89, 1.0]])
    assert parts.grey_share(means).tolist() == [0.25, 0.75]


def test_distinguishable_wants_nine_of_ten_neighbours_of_one_label():
    generator = torch.Generator().manual_seed(0)
    near = torch.zeros(30, 6) + 0.01 * torch.rand(30, 6, generator=generator)
    far = torch.ones(30, 6) + 0.01 * torch.rand(30, 6, generator=generator)
    labels = torch.cat([torch.zeros(30), torch.ones(15), torch.full((15,), 2.0)]).long()
    drawn = torch.stack([torch.zeros(6), torch.ones(6)])
    mixed = labels.clone()
    mixed[30:] = torch.tensor([1, 2] * 15)
    clear = parts.distinguishable(drawn, torch.cat([near, far]), mixed)
    assert clear.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_lays_images_out_row_by_row(channels):
    images = torch.rand(6, channels, 3, 4)
    grid = _grid(images, 3)
    assert grid.shape == (7, 14, channels)
    for n, image in enumerate(images):
        top, left = 4 * (n // 3), 5 * (n % 3)
        assert torch.equal(grid[top : top + 3, left : left + 4], image.permute(1, 2, 0))
    between = grid[3]
    assert torch.equal(between, torch.full_like(between, 0.0 if channels == 1 else 1.0))


def test_share_has_the_standard_error_of_a_mean():
    values = torch.tensor([1.0, 0.0, 1.0, 1.0]).double()
    mean, error = parts.share(values)
    assert mean == 0.75
    assert error == pytest.approx(float(values.std()) / 2)


@pytest.mark.parametrize("stages", [1, 2])
def test_mean_images_average_to_the_draws_of_the_model(stages):
    # E[x] is the mean over h of E[x | h], for one stage and for a chain.
    torch.manual_seed(0)
    below = RBM(5, 3, weight_scale=1.0)
    above = RBM(3, 4, weight_scale=1.0)
    pair = Cascade(below, above)[:stages]
    means = parts.mean_images(pair, 20_000, seed=1).mean(0)
    torch.manual_seed(2)
    draws = pair.sample(20_000)
    error = (draws.var(0) / 20_000 + 0.25 / 20_000).sqrt()
    assert ((means - draws.mean(0)).abs() < 4 * error).all()
    # Of the two models, the other one's means differ: the test can fail.
    other = parts.mean_images(Cascade(below, above)[: 3 - stages], 20_000, seed=1).mean(0)
    assert ((other - draws.mean(0)).abs() > 4 * error).any()


def test_mean_images_of_a_bernoulli_vae_are_probabilities():
    drawn = parts.mean_images(Cascade(VAE(6, 2, units=8)), 7, seed=0)
    assert drawn.shape == (7, 6)
    assert bool(((drawn > 0) & (drawn < 1)).all())


def terms(**charts):
    """Terms as the paper's text describes them, changed where a test says so."""
    told = {
        "(1)": [-102.0, 2.0, 0.05, 0.0, 0.0, 0.0],
        "(2)": [-140.0, 30.0, 2.0, 0.1, 0.0, 0.0],
        "(3)": [-140.0, 30.0, 0.1, -0.1, 3.0, 1.0],
        "(4)": [-140.0, 30.0, 0.1, 0.1, 0.0, 0.0],
    } | charts
    return {chart: [(value, 0.1) for value in values] for chart, values in told.items()}


def test_all_claims_hold_on_what_the_paper_describes():
    assert all(one["holds"] for one in verdicts(terms()))


@pytest.mark.parametrize(
    ("chart", "values", "failing"),
    [
        ("(1)", [-102.0, -2.0, 0.0, 0.0, 0.0, 0.0], {0}),
        ("(1)", [-102.0, 2.0, 2.0, 0.0, 0.0, 0.0], {0}),
        ("(1)", [-102.0, 2.0, -2.0, 0.0, 0.0, 0.0], {0}),
        ("(4)", [-140.0, 0.1, 0.0, 0.0, 0.0, 0.0], {1}),
        ("(2)", [-140.0, 30.0, -8.0, 0.0, 0.0, 0.0], {2}),
        ("(2)", [-140.0, 1.0, 8.0, 0.0, 0.0, 0.0], {2}),
        ("(3)", [-140.0, 30.0, 20.0, 0.0, 3.0, 1.0], {3}),
        ("(3)", [-140.0, 30.0, 0.0, 0.0, -3.0, 1.0], {4}),
    ],
)
def test_each_claim_fails_on_terms_that_contradict_it(chart, values, failing):
    found = verdicts(terms(**{chart: values}))
    assert {i for i, one in enumerate(found) if not one["holds"]} == failing
