"""What the demo prints and draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyroboost.compose import Cascade
from pyroboost.evaluation.inference_data import to_arviz
from pyroboost.experiments.figures import sample_grids
from pyroboost.plotting import plot_bounds, plot_khat

if TYPE_CHECKING:
    from pyroboost.experiments.demo import Judged

__all__ = ["GREETING", "closing", "comparison", "draw", "write_arviz"]

GREETING = """\
Data: {data}.

Two chains are boosted, each stage on what the stages below infer from the data. An RBM is a
restricted Boltzmann machine, a VAE a variational auto-encoder, a GMM a Gaussian mixture. Numbers
are nats per image, larger is better, ± one standard error. L_1 is the first stage's own bound on
the log-likelihood; L_k is what stage k adds to it, and is negative where a stage does harm.
"""


def comparison(judged: Sequence[Judged]) -> str:
    """Return the likelihoods of all models on the same test images, best first.

    Args:
        judged: the models; the one called "single VAE" is what the others are compared with.
    """
    reference = next(one for one in judged if one.name == "single VAE").likelihood.value.double()
    lines = [
        f"log-likelihood of {len(reference)} test images that no training has seen",
        f"{'model':<17} {'nats per image':>16}  {'kind':<9} {'above single VAE':>17} "
        f"{'k-hat > 0.7':>11} {'trained':>8}",
    ]
    for one in sorted(judged, key=lambda j: -j.likelihood.mean):
        found = one.likelihood
        gap = found.value.double() - reference
        error = math.hypot(float(gap.std()) / math.sqrt(len(gap)), found.shared_error)
        against = "" if one.name == "single VAE" else f"{float(gap.mean()):+.2f} ± {error:.2f}"
        bad = one.unreliable()
        lines.append(
            f"{one.name:<17} {f'{found.mean:.2f} ± {found.standard_error:.2f}':>16}  "
            f"{found.kind:<9} {against:>17} {'' if bad is None else f'{100 * bad:.0f} %':>11} "
            f"{one.seconds:>6.0f} s"
        )
    return "\n".join(lines)


def closing(best: str, out: Path, seconds: float) -> str:
    """Return what the files are and how to read the tables."""
    return f"""\
How to read this. 'grows': the stage raised the bound by more than two standard errors on held-out
images; 'nothing gained': it did not; 'not well trained': it lowered it, and the chain is better
without it. An exact likelihood has no sampling error; an estimate comes from importance sampling
and should not be trusted where k-hat exceeds 0.7. Bounds compare how models were inferred as well
as how good they are; likelihoods compare the models.

Written to {out} in {seconds:.0f} s:
  samples.png    test images and draws of every model
  bound.png      the bound after each stage of both chains, ± two standard errors of the bound
                 (the error of what a stage adds is smaller, since the images are the same)
  khat.png       how far importance sampling of {best} can be trusted, image by image
  inference.nc   draws of {best} for ArviZ: arviz.from_netcdf(...)
  result.json    every setting and number"""


def draw(
    out: Path,
    judged: Sequence[Judged],
    best: Judged,
    pictures: Mapping[str, Tensor],
    shape: tuple[int, ...],
    *,
    chains: Sequence[str],
) -> None:
    """Draw samples.png, bound.png and khat.png into a folder.

    Args:
        out: the folder.
        judged: all models.
        best: the chain whose k-hat is drawn.
        pictures: images by title.
        shape: height and width.
        chains: names of the boosted chains.
    """
    from matplotlib.figure import Figure

    sample_grids(out / "samples.png", pictures, shape)
    boosted = [one for one in judged if one.name in chains]
    figure = Figure(figsize=(5.0 * len(boosted), 3.6), layout="constrained")
    for axes, one in zip(figure.subplots(1, len(boosted), squeeze=False)[0], boosted, strict=True):
        plot_bounds(one.terms, ax=axes)
        axes.set_title(one.name)
    figure.savefig(out / "bound.png", dpi=150)
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    k = best.likelihood.pareto_k
    assert k is not None
    plot_khat(k, num_samples=best.likelihood.num_samples, ax=figure.subplots())
    figure.savefig(out / "khat.png", dpi=150)


def write_arviz(model: Cascade, x: Tensor, path: Path, *, num_samples: int) -> None:
    """Write draws of a model given data, and its predictions, for ArviZ.

    Args:
        model: the model.
        x: data.  # (N, D)
        path: the netCDF file.
        num_samples: draws.
    """
    with torch.no_grad():
        to_arviz(model, x, num_samples=num_samples).to_netcdf(str(path))
