"""Pictures of densities in the plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

__all__ = ["Panel", "density_table"]

Panel = tuple[str, Tensor]
"""A title and values on a square grid: densities (S, S), or points (N, 2)."""


def density_table(
    path: Path, rows: Mapping[str, Sequence[Panel]], bound: float, *, size: float = 1.5
) -> None:
    """Draw densities and points in a table, each panel over the same square.

    Args:
        path: the file.
        rows: panels by the name of their row; grids have the first coordinate first.
        bound: half the side of the square.
        size: side of a panel, in inches.
    """
    import numpy as np
    from matplotlib.figure import Figure

    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(size * columns + 0.3, (size + 0.15) * len(rows)), layout="constrained")
    table = np.asarray(figure.subplots(len(rows), columns)).reshape(len(rows), columns)
    for line, (name, panels) in zip(table, rows.items(), strict=True):
        for place, (axes, (title, values)) in enumerate(zip(line, panels, strict=False)):
            shown = values.detach().cpu().numpy()
            if shown.shape[0] == shown.shape[1]:
                extent = (-bound, bound, -bound, bound)
                axes.imshow(shown.T, origin="lower", extent=extent, cmap="viridis")
            else:
                axes.scatter(*shown.T, s=0.3, color="black", linewidths=0)
                axes.set_aspect("equal")
            axes.set(xlim=(-bound, bound), ylim=(-bound, bound), xticks=[], yticks=[])
            axes.set_title(title, fontsize=7)
            if place == 0:
                axes.set_ylabel(name, fontsize=7)
    figure.savefig(path, dpi=150)
