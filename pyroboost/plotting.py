"""Pictures of fits: k-hat, bounds by stage, images, history.

Every function draws into ``ax``, or into a new figure of its own, and returns the ``Axes``; none
shows, saves or closes anything. Matplotlib is imported when one is called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyroboost.evaluation.bounds import Decomposition

__all__ = ["plot_bounds", "plot_history", "plot_images", "plot_khat"]


def _axes(ax: Any, size: tuple[float, float] = (6.0, 4.0)) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained")[1]


def plot_khat(pareto_k: Tensor, *, num_samples: int | None = None, ax: Any = None) -> Any:
    r"""Draw Pareto k of each datum, with the limits up to which draws can be reweighted.

    Infinite values stand as triangles at the edge of the picture.

    Args:
        pareto_k: shapes.  # (N,)
        num_samples: draws per datum, which set the limit $\min(1 - 1/\log_{10} S, 0.7)$; 0.7 when
            left out.
        ax: where to draw; a new figure when left out.

    Returns:
        The ``Axes``.

    Raises:
        ValueError: there is no k, or one is NaN.

    Example:
        >>> plot_khat(torch.tensor([0.1, 0.8, -torch.inf])).get_ylabel()
        'Pareto k'

    Reference:
        Vehtari et al., Pareto smoothed importance sampling (2024), section 3.2.4.
    """
    from pyroboost.sampling.psis import good_k

    k = pareto_k.detach().cpu().double().flatten()
    if not len(k) or bool(k.isnan().any()):
        raise ValueError(
            f"plot_khat: got {len(k)} values, {int(k.isnan().sum())} of them NaN; pass the k-hat "
            "of psis or posterior_quality."
        )
    ax = _axes(ax)
    limit = good_k(num_samples) if num_samples else 0.7
    finite = k[k.isfinite()]
    low = min(-0.1, float(finite.min()) if len(finite) else 0.0) - 0.1
    high = max(1.1, float(finite.max()) if len(finite) else 0.0) + 0.1
    index = torch.arange(len(k))
    for chosen, edge, marker in (
        (k.isfinite(), None, "+"),
        (k == -math.inf, low, "v"),
        (k == math.inf, high, "^"),
    ):
        if bool(chosen.any()):
            heights = k[chosen] if edge is None else torch.full((int(chosen.sum()),), edge)
            ax.scatter(index[chosen].numpy(), heights.numpy(), marker=marker, s=18, color="C0")
    ax.axhline(limit, color="C1", linestyle="--", label=f"limit {limit:.2f}")
    ax.axhline(1.0, color="C3", linestyle=":", label="1: no mean")
    ax.set_ylim(low - 0.1, high + 0.1)
    ax.set_xlabel("datum")
    ax.set_ylabel("Pareto k")
    ax.set_title(f"{int((k > limit).sum())} of {len(k)} above the limit", fontsize="medium")
    ax.legend(fontsize="small")
    return ax


def plot_bounds(
    decompositions: Decomposition | Mapping[str, Decomposition], *, ax: Any = None
) -> Any:
    r"""Draw the bound $\sum_{j \le i} L_j$ after each stage, with two standard errors.

    Args:
        decompositions: one, or several by their labels, such as training and held-out data.
        ax: where to draw; a new figure when left out.

    Returns:
        The ``Axes``, in nats per datum.

    Raises:
        ValueError: there is nothing to draw.

    Example:
        >>> from pyroboost import Cascade
        >>> from pyroboost.evaluation import decompose
        >>> from pyroboost.models import GMM, VAE
        >>> found = decompose(Cascade(VAE(6, 2, units=8), GMM(3, 2)), torch.zeros(5, 6))
        >>> [label.get_text() for label in plot_bounds(found).get_xticklabels()]
        ['0: VAE', '1: GMM']

    Reference:
        Cascaded meta-models, Figure 2.
    """
    named = decompositions if isinstance(decompositions, Mapping) else {"": decompositions}
    if not named:
        raise ValueError("plot_bounds: there is no decomposition; pass at least one.")
    ax = _axes(ax)
    names: list[str] = []
    for label, found in named.items():
        sums = found.partial_sums()
        values, errors = [value for value, _ in sums], [2 * error for _, error in sums]
        ax.errorbar(range(len(sums)), values, yerr=errors, marker="o", capsize=3, label=label)
        stages = [term.name for term in found.terms]
        names = stages if len(stages) > len(names) else names
    ax.set_xticks(range(len(names)), names)
    ax.set_xlabel("stage")
    ax.set_ylabel("bound on log p(x), nats per datum")
    if len(named) > 1:
        ax.legend()
    return ax


def plot_images(
    images: Tensor,
    *,
    shape: Sequence[int] | None = None,
    columns: int | None = None,
    ax: Any = None,
) -> Any:
    """Draw a grid of images in one picture, with one grey scale for all.

    Args:
        images: pixels, flat or not, grey or with three channels last or first.  # (N, ...)
        shape: height and width, and channels, of one image; from the pixels when left out, and
            square where they are flat.
        columns: images per row; a nearly square grid when left out.
        ax: where to draw; a new figure when left out.

    Returns:
        The ``Axes``.

    Raises:
        ValueError: there are no images, or their pixels do not fill the shape.

    Example:
        >>> plot_images(torch.zeros(6, 16), columns=3).images[0].get_array().shape
        (9, 14)
    """
    batch = _as_images(images.detach().cpu().float(), shape)
    count, height, width, channels = batch.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    low, high = (float(v) for v in (batch.min(), batch.max()))
    # One pixel between the images, in the lightest grey.
    grid = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), high)
    for i, image in enumerate(batch):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        grid[top : top + height, left : left + width] = image
    ax = _axes(ax, (0.8 * columns, 0.8 * rows * height / width))
    if channels == 1:
        span = {"vmin": low, "vmax": high if high > low else low + 1.0}
        ax.imshow(grid[..., 0].numpy(), cmap="gray", interpolation="nearest", **span)
    else:
        ax.imshow(grid.clamp(0.0, 1.0).numpy(), interpolation="nearest")
    ax.set_axis_off()
    return ax


def _as_images(images: Tensor, shape: Sequence[int] | None) -> Tensor:
    """Lay pixels out as (N, H, W, C)."""
    count, pixels = len(images) if images.dim() else 0, images[:1].numel() if images.dim() else 0
    if shape is None and images.dim() == 2:
        shape = (math.isqrt(pixels), math.isqrt(pixels))
    elif shape is None:
        shape = images.shape[1:]
    if len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3):
        images, shape = images.reshape(count, *shape).movedim(1, -1), (*shape[1:], shape[0])
    fits = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))
    if not count or not fits or math.prod(shape) != pixels:
        raise ValueError(
            f"plot_images: images of shape {tuple(images.shape)} do not fill the shape "
            f"{tuple(shape)}; pass at least one and shape=(height, width) or (height, width, 3)."
        )
    return images.reshape(count, shape[0], shape[1], -1)


def plot_history(
    history: Sequence[Mapping[str, Any]],
    *,
    keys: Sequence[str] = ("loss", "validation_bound"),
    ax: Any = None,
) -> Any:
    """Draw how a fit went, epoch by epoch; losses are drawn as minus the loss, a bound.

    Args:
        history: one mapping an epoch, as ``Fit.history`` has them.
        keys: what to draw; epochs in which a key is missing or ``None`` are left out.
        ax: where to draw; a new figure when left out.

    Returns:
        The ``Axes``, in nats per datum.

    Raises:
        ValueError: no epoch has any of the keys.

    Example:
        >>> plot_history([{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.5}]).get_xlabel()
        'epoch'
    """
    curves = []
    for key in keys:
        rows = [(i + 1, row) for i, row in enumerate(history) if row.get(key) is not None]
        if rows:
            sign = -1.0 if key == "loss" else 1.0
            epochs = [int(row.get("epoch", i)) for i, row in rows]
            name = "minus loss" if key == "loss" else key.replace("_", " ")
            curves.append((name, epochs, [sign * float(row[key]) for _, row in rows]))
    if not curves:
        raise ValueError(
            f"plot_history: none of {len(history)} epochs has {' or '.join(map(repr, keys))}; pass "
            "the history of a fit."
        )
    ax = _axes(ax)
    for name, epochs, values in curves:
        ax.plot(epochs, values, marker="." if len(values) < 2 else None, label=name)
    ax.set_xlabel("epoch")
    ax.set_ylabel("nats per datum")
    ax.legend()
    return ax
