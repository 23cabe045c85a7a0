"""Pictures of posteriors: a guide's draws over those of a reference, and its calibration.

Every function makes a new figure and returns it; none shows, saves or closes anything. Matplotlib
is imported when one is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyroboost.diagnostics import _uniformity
from pyroboost.diagnostics._draws import columns

__all__ = ["plot_calibration", "plot_marginals", "plot_pairs"]

Draws = Mapping[str, Mapping[str, Tensor]]


def _tables(
    where: str, draws: Draws, names: Sequence[str] | None, most: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Lay out the coordinates that all sets have, those that are named or the first ones."""
    if not draws:
        raise ValueError(f"{where}: there are no draws; pass a dict of sets of draws by label.")
    found = {label: columns(values) for label, values in draws.items() if values}
    every = [n for n in next(iter(found.values()))[1] if all(n in f[1] for f in found.values())]
    wanted = every[:most]
    if names is not None:
        wanted = [n for n in every if n in names or n.split("[")[0] in names]
        unknown = [n for n in names if not any(n in (w, w.split("[")[0]) for w in wanted)]
        if unknown:
            raise ValueError(f"{where}: {unknown} are not among {every[:most]} and others.")
    if not wanted:
        raise ValueError(f"{where}: the sets of draws have no coordinate in common.")
    tables = {
        label: table[:, [labels.index(n) for n in wanted]]
        for label, (table, labels) in found.items()
    }
    return tables, wanted


def _edges(values: Sequence[Tensor], bins: int) -> Any:
    """Bins over the bulk of all sets, so that one far draw does not hide the rest."""
    low = min(float(v.sort().values[int(0.002 * (len(v) - 1))]) for v in values)
    high = max(float(v.sort().values[math.ceil(0.998 * (len(v) - 1))]) for v in values)
    pad = 0.05 * (high - low) or 0.5
    return torch.linspace(low - pad, high + pad, bins + 1).numpy()


def plot_marginals(draws: Draws, *, names: Sequence[str] | None = None, bins: int = 40) -> Any:
    """Draw the marginals of several sets of draws over each other, coordinate by coordinate.

    Args:
        draws: by label, such as ``{"guide": ..., "reference": ...}``, values by site; the last set
            is filled.  # (S, ...)
        names: sites or coordinates such as ``theta[2]``; the first twelve when left out.
        bins: bins of each histogram.

    Returns:
        The ``Figure``, with one ``Axes`` per coordinate.

    Raises:
        ValueError: there is nothing to draw, or a name that the draws do not have.

    Example:
        >>> a, b = torch.randn(100, 2), torch.randn(50, 2)
        >>> figure = plot_marginals({"guide": {"z": a}, "reference": {"z": b}})
        >>> [ax.get_xlabel() for ax in figure.axes]
        ['z[0]', 'z[1]']
    """
    import matplotlib.pyplot as plt

    tables, wanted = _tables("plot_marginals", draws, names, 12)
    across = min(4, len(wanted))
    down = math.ceil(len(wanted) / across)
    figure, grid = plt.subplots(
        down, across, figsize=(3.0 * across, 2.4 * down), squeeze=False, layout="constrained"
    )
    for j, name in enumerate(wanted):
        _histograms(grid.flat[j], {label: t[:, j] for label, t in tables.items()}, bins)
        grid.flat[j].set_xlabel(name)
    for ax in grid.flat[len(wanted) :]:
        ax.remove()
    grid.flat[0].legend(fontsize="small")
    return figure


def _histograms(ax: Any, values: Mapping[str, Tensor], bins: int) -> None:
    edges = _edges(list(values.values()), bins)
    for i, (label, draws) in enumerate(values.items()):
        last = i == len(values) - 1 and i > 0
        style = {"histtype": "stepfilled", "alpha": 0.3} if last else {"histtype": "step"}
        # A density over all draws, those beyond the picture included.
        weight = torch.full_like(draws, 1 / (len(draws) * (edges[1] - edges[0]))).numpy()
        ax.hist(draws.numpy(), bins=edges, weights=weight, color=f"C{i}", label=label, **style)
    ax.set_yticks([])


def plot_pairs(
    draws: Draws, *, names: Sequence[str] | None = None, most: int = 1000, bins: int = 40
) -> Any:
    """Draw every pair of coordinates of several sets of draws, with the marginals between.

    Args:
        draws: by label, values by site.  # (S, ...)
        names: sites or coordinates; the first five coordinates when left out.
        most: points of each set to scatter at most.
        bins: bins of the marginals.

    Returns:
        The ``Figure``: scatter plots below its diagonal, histograms on it.

    Raises:
        ValueError: there is nothing to draw, or a name that the draws do not have.

    Example:
        >>> figure = plot_pairs({"guide": {"z": torch.randn(100, 3)}})
        >>> len(figure.axes)
        6
    """
    import matplotlib.pyplot as plt

    tables, wanted = _tables("plot_pairs", draws, names, 5)
    count = len(wanted)
    figure, grid = plt.subplots(
        count, count, figsize=(2.2 * count, 2.2 * count), squeeze=False, layout="constrained"
    )
    edges = [_edges([t[:, j] for t in tables.values()], bins) for j in range(count)]
    for i in range(count):
        for j in range(count):
            ax = grid[i, j]
            if j > i:
                ax.remove()
                continue
            if i == j:
                _histograms(ax, {label: t[:, j] for label, t in tables.items()}, bins)
            else:
                # The last set, the reference, lies below the others.
                for k, (label, table) in reversed(list(enumerate(tables.items()))):
                    at = torch.linspace(0, len(table) - 1, min(most, len(table))).long()
                    x, y = table[at, j].numpy(), table[at, i].numpy()
                    ax.scatter(x, y, s=4, alpha=0.4, color=f"C{k}", label=label, linewidths=0)
                ax.set_ylim(edges[i][0], edges[i][-1])
            ax.set_xlim(edges[j][0], edges[j][-1])
            if i == count - 1:
                ax.set_xlabel(wanted[j])
            if j == 0 and i:
                ax.set_ylabel(wanted[i])
    grid[0, 0].legend(fontsize="small")
    return figure


def plot_calibration(
    probabilities: Mapping[str, Tensor], *, names: Sequence[str] | None = None
) -> Any:
    r"""Draw histograms of calibration probabilities, with the ECDF's departure from uniform.

    The grey band holds each bar with probability 0.95; the curve is $F(t) - t$ on the right-hand
    scale, dotted lines the band in which all of it stays with probability 0.95.

    Args:
        probabilities: by site, one per replicate.  # (R, ...)
        names: sites or coordinates; the first twelve when left out.

    Returns:
        The ``Figure``, with two ``Axes`` per coordinate.

    Raises:
        ValueError: there is nothing to draw, or a name that is not there.

    Example:
        >>> len(plot_calibration({"z": torch.rand(50)}).axes)
        2

    Reference:
        Yao et al., Yes, but did it work? (2018), Figure 3; Sailynoja, Burkner and Vehtari (2022).
    """
    import matplotlib.pyplot as plt
    from scipy.stats import binom

    tables, wanted = _tables("plot_calibration", {"p": probabilities}, names, 12)
    table = tables["p"].numpy()
    count = len(table)
    bins = max(5, min(20, count // 10))
    low, high = binom.ppf([0.025, 0.975], count, 1 / bins)
    z, lower, upper = _uniformity.band(count)
    across = min(4, len(wanted))
    down = math.ceil(len(wanted) / across)
    figure, grid = plt.subplots(
        down, across, figsize=(3.2 * across, 2.4 * down), squeeze=False, layout="constrained"
    )
    for j, name in enumerate(wanted):
        ax = grid.flat[j]
        ax.axhspan(low, high, color="0.9")
        ax.hist(table[:, j], bins=bins, range=(0.0, 1.0), color="C0", alpha=0.6)
        ax.set_xlabel(f"probability below true {name}")
        twin = ax.twinx()
        ecdf = (table[:, j][:, None] <= z).mean(0)
        twin.plot(z, ecdf - z, color="C1")
        for edge in (lower, upper):
            twin.plot(z, edge - z, color="0.4", linestyle=":")
        twin.tick_params(labelsize="x-small")
    for ax in list(grid.flat)[len(wanted) :]:
        ax.remove()
    return figure
