"""Figures of the experiments, drawn without any state of matplotlib's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["bound_charts", "sample_grids"]

Curve = Sequence[tuple[float, float]]


def sample_grids(
    path: Path, grids: Mapping[str, Tensor], shape: tuple[int, ...], *, columns: int = 8
) -> None:
    """Draw grids of images side by side.

    Args:
        path: the file.
        grids: images by title, each (N, D) or (N, C, H, W) with values in [0, 1].
        shape: height and width, with channels first where there are any.
        columns: images in a row of a grid.
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(grids), 3.0), layout="constrained")
    for axes, (title, pictures) in zip(
        np.atleast_1d(figure.subplots(1, len(grids))), grids.items(), strict=True
    ):
        kept = pictures[: len(pictures) // columns * columns].detach().cpu().clamp(0, 1)
        grid = _grid(kept.reshape(-1, *(1,) * (len(shape) == 2), *shape), columns)
        axes.imshow(
            grid.squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest"
        )
        axes.set_title(title, fontsize=8)
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


def _grid(images: Tensor, columns: int) -> Tensor:
    """Lay images (N, C, H, W) out in rows, one light pixel apart, as (height, width, C)."""
    light = 0.0 if images.shape[1] == 1 else 1.0  # grey levels are drawn as ink
    framed = torch.nn.functional.pad(images, (0, 1, 0, 1), value=light)
    rows = framed.reshape(-1, columns, *framed.shape[1:]).permute(0, 3, 1, 4, 2)
    return rows.flatten(2, 3).flatten(0, 1)[:-1, :-1]


def bound_charts(path: Path, charts: Mapping[str, tuple[str, Mapping[str, Curve]]]) -> None:
    """Draw the bound against the number of stages, a chart per combination.

    Args:
        path: the file.
        charts: by title, one letter per stage (R an RBM, V a VAE) and curves by name, each a list
            of (bound, standard error).
    """
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 * len(charts), 3.0), layout="constrained")
    for axes, (title, (kinds, curves)) in zip(
        np.atleast_1d(figure.subplots(1, len(charts))), charts.items(), strict=True
    ):
        for colour, (name, curve) in zip(("C0", "C1"), curves.items(), strict=False):
            k = range(1, len(curve) + 1)
            values, errors = zip(*curve, strict=True)
            axes.errorbar(k, values, yerr=errors, color=colour, label=name, linewidth=1)
            for place, value, kind in zip(k, values, kinds, strict=True):
                axes.plot(place, value, "^" if kind == "R" else "o", color=colour, markersize=5)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("k (triangle: RBM, circle: VAE)", fontsize=7)
        axes.set_ylabel("lower bound (nats)", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
