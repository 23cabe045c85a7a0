"""Pictures of posteriors hold the densities that they are said to hold."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyroboost.plotting_posterior import plot_calibration, plot_marginals, plot_pairs


@pytest.fixture(autouse=True)
def figures():
    yield
    plt.close("all")


def areas(ax):
    """Areas under the histograms of an axes, in the order in which they were drawn."""
    found = []
    for patch in ax.patches:
        corners = patch.get_xy()
        x, y = corners[:, 0], corners[:, 1]
        found.append(abs(float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))) / 2)
    return found


def test_marginals_are_densities_of_every_set():
    draws = {"guide": {"z": torch.rand(400)}, "reference": {"z": torch.rand(900) * 2}}
    ax = plot_marginals(draws, bins=20).axes[0]
    np.testing.assert_allclose(areas(ax), 1.0, rtol=0.02)
    heights = [patch.get_xy()[:, 1].max() for patch in ax.patches]
    assert heights[0] > 1.5 * heights[1]  # twice as dense


def test_one_far_draw_does_not_hide_the_rest():
    z = torch.randn(2000)
    z[0] = 1e6
    low, high = plot_marginals({"guide": {"z": z}}).axes[0].get_xlim()
    assert high - low < 30


def test_only_common_coordinates_and_at_most_twelve():
    draws = {"a": {"z": torch.randn(30, 20), "u": torch.randn(30)}, "b": {"z": torch.randn(9, 20)}}
    assert len(plot_marginals(draws).axes) == 12
    assert [ax.get_xlabel() for ax in plot_marginals(draws, names=["z[17]"]).axes] == ["z[17]"]
    with pytest.raises(ValueError, match="no coordinate in common"):
        plot_marginals({"a": {"z": torch.randn(5)}, "b": {"u": torch.randn(5)}})
    with pytest.raises(ValueError, match="there are no draws"):
        plot_marginals({})


def test_pairs_have_points_of_every_set_in_their_places():
    a, b = torch.randn(50, 2), torch.randn(80, 2)
    figure = plot_pairs({"guide": {"z": a}, "reference": {"z": b}})
    below = next(ax for ax in figure.axes if ax.collections)
    points = [np.asarray(c.get_offsets()) for c in below.collections]
    assert sorted(map(len, points)) == [50, 80]
    mine = next(p for p in points if len(p) == 50)
    np.testing.assert_allclose(mine, a.numpy(), rtol=1e-6)
    assert below.get_xlabel() == "z[0]"
    assert below.get_ylabel() == "z[1]"


def test_calibration_counts_every_replicate():
    p = torch.rand(120, 2)
    figure = plot_calibration({"z": p})
    bars = [ax for ax in figure.axes if ax.get_xlabel()]
    assert len(bars) == 2
    counted = sum(r.get_height() for r in bars[0].patches if r.get_width() < 0.5)
    assert counted == 120
