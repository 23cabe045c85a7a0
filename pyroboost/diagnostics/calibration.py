"""Variational simulation-based calibration: is a guide right on average over the prior?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyroboost import _arviz
from pyroboost.diagnostics import _uniformity
from pyroboost.diagnostics._draws import columns, draw_guide
from pyroboost.diagnostics._simulation import places, replaced, simulate
from pyroboost.evaluation._groups import Variable, dataset
from pyroboost.metamodel import MetaModel
from pyroboost.program import Program

__all__ = ["Calibration", "vsbc"]

Rebuild = Callable[[dict[str, Tensor]], tuple[Any, ...]]


@dataclass(frozen=True)
class Calibration:
    r"""Where true parameters fell among a guide's draws, over data simulated from the prior.

    Args:
        probabilities: $\Pr_q(\theta < \theta_0)$ by site, one per replicate.  # (R, ...)
        truth: the parameters $\theta_0$ that made the data.  # (R, ...)
        num_samples: draws of each guide.
    """

    probabilities: dict[str, Tensor] = field(repr=False)
    truth: dict[str, Tensor] = field(repr=False)
    num_samples: int

    @property
    def num_replicates(self) -> int:
        """Data sets that were simulated, R."""
        return len(next(iter(self.probabilities.values())))

    def _each(self, test: Callable[[Any], float]) -> dict[str, Tensor]:
        found = {}
        for name, p in self.probabilities.items():
            table = columns({name: p})[0].numpy()
            values = [test(table[:, j]) for j in range(table.shape[1])]
            found[name] = torch.tensor(values, dtype=torch.float64).reshape(p.shape[1:])
        return found

    @property
    def symmetry(self) -> dict[str, Tensor]:
        """p-values of symmetry about 1/2: small where a marginal is biased.  # (...)."""
        return self._each(_uniformity.symmetry)

    @property
    def uniformity(self) -> dict[str, Tensor]:
        """p-values of uniformity: small where a marginal is wrong in any way.  # (...)."""
        return self._each(_uniformity.uniformity)

    @property
    def shift(self) -> dict[str, Tensor]:
        """Mean probability minus 1/2: positive where the guide sits too low.  # (...)."""
        return {name: p.mean(0) - 0.5 for name, p in self.probabilities.items()}

    @property
    def spread(self) -> dict[str, Tensor]:
        """Variance over 1/12: above 1 (a U) where the guide is too narrow.  # (...)."""
        return {name: 12 * p.var(0) for name, p in self.probabilities.items()}

    def table(self) -> str:
        """Return one line per site with the most extreme of its coordinates."""
        width = max(4, *(len(name) for name in self.probabilities))
        head = ("shift", "spread", "p symmetric", "p uniform")
        lines = [" ".join(["site".ljust(width), *(h.rjust(12) for h in head)])]
        symmetric, uniform = self.symmetry, self.uniformity
        shift, spread = self.shift, self.spread
        for name in self.probabilities:
            row = (
                f"{_furthest(shift[name], 0.0):+.3f}",
                f"{_furthest(spread[name], 1.0):.2f}",
                f"{float(symmetric[name].min()):.2g}",
                f"{float(uniform[name].min()):.2g}",
            )
            lines.append(" ".join([name.ljust(width), *(cell.rjust(12) for cell in row)]))
        return "\n".join(lines)

    def describe(self) -> str:
        """Say in words what was tested, and what calibration cannot tell."""
        count = sum(p[0].numel() for p in self.probabilities.values())
        error = (12 * self.num_replicates) ** -0.5
        return (
            f"Calibration over {self.num_replicates} data sets simulated from the prior, "
            f"{self.num_samples} draws of the guide each; {count} coordinates, each line the most "
            f"extreme of its site (expect the least of n p-values near 1/n).\n{self.table()}\n"
            f"Shift: positive where the guide sits below the truth; error {error:.3f}. Spread: "
            "above 1, a U, where the guide is too narrow; below 1 where it is too wide. A "
            "histogram can be symmetric and still not flat.\n"
            "Each test sees one marginal at a time, averaged over the prior: errors of opposite "
            "sign on different data cancel, dependence between parameters is not seen, and the "
            "guide at hand on the data at hand may be better or worse than the average."
        )

    def __str__(self) -> str:
        return self.describe()

    def plot(self, names: Sequence[str] | None = None) -> Any:
        """Draw a histogram of the probabilities of each coordinate; return the ``Figure``."""
        from pyroboost.plotting_posterior import plot_calibration

        return plot_calibration(self.probabilities, names=names)

    def to_arviz(self) -> Any:
        """Return true parameters as ``prior`` and probabilities as ``sample_stats_prior``."""

        def group(values: dict[str, Tensor]) -> dict[str, Variable]:
            return {
                name: Variable(v, [f"{name}_dim_{i}" for i in range(v.dim() - 1)])
                for name, v in values.items()
            }

        attrs = {"num_samples": str(self.num_samples)}
        return _arviz.container(
            {
                "prior": dataset("prior", group(self.truth), {}),
                "sample_stats_prior": dataset(
                    "sample_stats_prior", group(self.probabilities), attrs
                ),
            }
        )


def vsbc(
    pair: Any,
    *args: Any,
    fit: Callable[..., Callable[..., Any]] | None = None,
    replicates: int = 100,
    num_samples: int = 100,
    sites: Sequence[str] | None = None,
    rebuild: Rebuild | None = None,
) -> Calibration:
    r"""Calibrate a guide, or a way of fitting one, on data simulated from the model's own prior.

    1. Draw $\theta_0 \sim p(\theta)$ and $y \sim p(y \mid \theta_0)$.
    2. Fit a guide q to y, or take the amortised guide at y.
    3. Keep $\Pr_q(\theta < \theta_0)$ of every coordinate, by ``num_samples`` draws.

    Where q is the posterior these probabilities are uniform; where its marginals are right on
    average in location they are at least symmetric about 1/2. Every fit starts from Pyro's param
    store as it is at the call, and leaves it so.

    Args:
        pair: a model, with ``fit``; or a (model, guide) or meta-model, whose guide is amortised.
        *args: arguments of the model. The data among them are replaced by simulated ones: those
            that equal an observed site.
        fit: called with the arguments, simulated data in place; returns a fresh fitted guide.
        replicates: data sets R.
        num_samples: draws of each guide.
        sites: latent sites to judge; all that the guide draws when left out.
        rebuild: makes the arguments from the dict of simulated observed sites, where these are
            not arguments themselves (one site per time step, say).

    Returns:
        Probabilities by site with tests, words, picture and ArviZ container.

    Raises:
        ValueError: data that cannot be simulated, an unknown site, or shapes that change.
        TypeError: a model without ``fit``, or a pair with it.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> found = vsbc((model, guide), torch.tensor(0.0), replicates=50, num_samples=20)
        >>> found.probabilities["z"].shape, float(found.symmetry["z"]) > 0.001
        (torch.Size([50]), True)

    Reference:
        Yao, Vehtari, Simpson and Gelman, Yes, but did it work? (2018), Algorithm 3; Talts et al.,
        Validating Bayesian inference algorithms (2018); Sailynoja, Burkner and Vehtari, Graphical
        test for discrete uniformity (2022), for the simultaneous band.
    """
    model, guide = _parts(pair, fit)
    if replicates < 10 or num_samples < 1:
        raise ValueError(
            f"vsbc: {replicates} replicates of {num_samples} draws; ask for at least ten data sets "
            "and one draw."
        )
    at = {} if rebuild else places(model, args)
    kept: dict[str, list[Tensor]] = {}
    truths: dict[str, list[Tensor]] = {}
    for _ in range(replicates):
        truth, data = simulate(model, args)
        new = rebuild(data) if rebuild else replaced(args, at, data)
        with ExitStack() as stack:
            if fit is not None:
                stack.enter_context(_own_store())
            draws = draw_guide(fit(*new) if fit is not None else guide, new, num_samples)
        for name in _judged(truth, draws, sites):
            kept.setdefault(name, []).append(_probability(name, draws[name], truth[name]))
            truths.setdefault(name, []).append(truth[name])
    found = {n: _stacked(n, v, replicates) for n, v in kept.items()}
    return Calibration(found, {n: torch.stack(v) for n, v in truths.items()}, num_samples)


def _parts(pair: Any, fit: Any) -> tuple[Program, Callable[..., Any]]:
    both = isinstance(pair, MetaModel) or isinstance(pair, tuple)
    if both == (fit is not None) or (isinstance(pair, tuple) and len(pair) != 2):
        raise TypeError(
            f"vsbc: got {type(pair).__name__} {'with' if fit else 'without'} fit=...; pass a model "
            "and fit=..., or a (model, guide) or meta-model whose guide is amortised."
        )
    if isinstance(pair, MetaModel):
        return pair.model, pair.guide
    if both:
        return Program(pair[0], "model"), Program(pair[1], "guide")
    return Program(pair, "model"), pair


@contextmanager
def _own_store() -> Iterator[None]:
    """Let a fit have a copy of the param store, so that no fit starts where another ended."""
    store = pyro.get_param_store()
    copies = {name: p.detach().clone().requires_grad_() for name, p in store._params.items()}
    with store.scope({"params": copies, "constraints": dict(store._constraints)}):
        yield


def _judged(
    truth: dict[str, Tensor], draws: dict[str, Tensor], sites: Sequence[str] | None
) -> list[str]:
    both = [name for name in truth if name in draws]
    unknown = [name for name in sites or () if name not in both]
    if unknown or not both:
        raise ValueError(
            f"vsbc: {unknown or 'no site'} is drawn by both model ({', '.join(truth)}) and guide "
            f"({', '.join(draws)}); name sites that both draw."
        )
    return both if sites is None else list(sites)


def _stacked(name: str, values: list[Tensor], count: int) -> Tensor:
    if len({v.shape for v in values}) > 1 or len(values) < count:
        raise ValueError(f"vsbc: '{name}' changes its shape or is not always drawn.")
    return torch.stack(values)


def _probability(name: str, draws: Tensor, truth: Tensor) -> Tensor:
    """Place the truth among draws; ties and the gap between draws are filled at random."""
    if draws.shape[1:] != truth.shape:
        raise ValueError(
            f"vsbc: the guide draws '{name}' of shape {tuple(draws.shape[1:])}, the model of shape "
            f"{tuple(truth.shape)}."
        )
    below, same = (draws < truth).sum(0).double(), (draws == truth).sum(0).double()
    return (below + torch.rand_like(below) * (same + 1)) / (len(draws) + 1)


def _furthest(values: Tensor, centre: float) -> float:
    flat = values.flatten()
    return float(np.asarray(flat[(flat - centre).abs().argmax()]))
