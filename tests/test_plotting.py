"""Pictures hold what they are said to hold, and leave the user's figures alone."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyroboost import Cascade
from pyroboost.evaluation import decompose
from pyroboost.models import GMM, VAE
from pyroboost.plotting import plot_bounds, plot_history, plot_images, plot_khat


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Nothing is shown, and figures that were open stay open."""

    def show(*_, **__):
        raise AssertionError("a plot called plt.show")

    monkeypatch.setattr(plt, "show", show)
    mine = plt.figure()
    yield
    assert plt.fignum_exists(mine.number)
    plt.close("all")


class TestKHat:
    def test_points_limits_and_edges(self):
        k = torch.tensor([0.2, 0.65, 0.9, -math.inf, math.inf])
        ax = plot_khat(k, num_samples=100)
        heights = [np.asarray(c.get_offsets())[:, 1] for c in ax.collections]
        np.testing.assert_allclose(heights[0], [0.2, 0.65, 0.9], rtol=1e-6)
        low, high = ax.get_ylim()
        assert low < heights[1][0] < 0 < 1 < heights[2][0] < high
        np.testing.assert_allclose(np.asarray(ax.collections[2].get_offsets())[0, 0], 4)
        assert ax.lines[0].get_ydata()[0] == 0.5
        assert ax.get_title() == "3 of 5 above the limit"

    def test_all_without_tail(self):
        assert plot_khat(torch.full((3,), -math.inf)).get_title().startswith("0 of 3")

    @pytest.mark.parametrize("bad", [torch.zeros(0), torch.tensor([math.nan, 0.1])])
    def test_refused(self, bad):
        with pytest.raises(ValueError, match="plot_khat: got"):
            plot_khat(bad)


class TestBounds:
    def test_partial_sums_with_two_errors(self):
        cascade = Cascade(VAE(6, 2, units=8), GMM(3, 2))
        found = decompose(cascade, torch.bernoulli(torch.full((20, 6), 0.5)))
        ax = plot_bounds({"training": found, "held-out": found})
        line, _, (bars,) = ax.containers[0]
        sums = found.partial_sums()
        np.testing.assert_allclose(line.get_ydata().astype(float), [v for v, _ in sums])
        lengths = [s[1, 1] - s[0, 1] for s in bars.get_segments()]
        np.testing.assert_allclose(lengths, [4 * e for _, e in sums], rtol=1e-5)
        assert [t.get_text() for t in ax.get_legend().get_texts()] == ["training", "held-out"]

    def test_nothing(self):
        with pytest.raises(ValueError, match="no decomposition"):
            plot_bounds({})


class TestImages:
    def test_pixels_are_in_their_places(self):
        images = torch.arange(5 * 6.0).reshape(5, 6)
        grid = plot_images(images, shape=(2, 3), columns=2).images[0].get_array()
        assert grid.shape == (8, 7)
        np.testing.assert_array_equal(grid[3:5, 4:7], images[3].reshape(2, 3))
        np.testing.assert_array_equal(grid[6:8, 0:3], images[4].reshape(2, 3))

    @pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 8, 8, 3)])
    def test_colours_first_or_last(self, shape):
        assert plot_images(torch.rand(shape)).images[0].get_array().shape == (17, 17, 3)

    @pytest.mark.parametrize("shape", [(4, 64), (4, 8, 8), (4, 1, 8, 8)])
    def test_grey(self, shape):
        assert plot_images(torch.rand(shape)).images[0].get_array().shape == (17, 17)

    def test_axes_of_the_user(self):
        _, ax = plt.subplots()
        assert plot_images(torch.zeros(2, 4), ax=ax) is ax

    @pytest.mark.parametrize("images", [torch.zeros(3, 5), torch.zeros(0, 4), torch.zeros(())])
    def test_refused(self, images):
        with pytest.raises(ValueError, match="do not fill the shape"):
            plot_images(images)


class TestHistory:
    def test_curves(self):
        history = [
            {"epoch": 1, "loss": 3.0, "validation_bound": None},
            {"epoch": 2, "loss": 2.0, "validation_bound": -2.5},
            {"epoch": 3, "loss": 1.0, "validation_bound": -2.2},
        ]
        ax = plot_history(history)
        loss, bound = ax.lines
        assert loss.get_ydata().tolist() == [-3.0, -2.0, -1.0]
        assert bound.get_xdata().tolist() == [2, 3]
        assert bound.get_ydata().tolist() == [-2.5, -2.2]

    def test_nothing(self):
        with pytest.raises(ValueError, match="none of 1 epochs has 'loss'"):
            plot_history([{"epoch": 1}])


def test_importing_loads_no_matplotlib():
    import subprocess
    import sys

    code = "import pyroboost.plotting, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
