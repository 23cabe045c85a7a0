"""The log density of a model over the unconstrained vector of its latent sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyroboost.contexts import forked_rng

__all__ = ["Target"]

Unpack = Callable[[Tensor], Iterator[tuple[dict[str, Any], Tensor]]]
_EXACT, _PROBES = 512, 64
_BLOCK = 512  # points that are scored in one pass


class Target:
    r"""What a guide in unconstrained coordinates has to match.

    .. math:: \log p(x, \theta(u)) + \log\left|\det \frac{\partial \theta}{\partial u}\right|

    Many points are scored in one pass, by `torch.vmap` or in a plate outside those of the model,
    where a few points so scored agree with each of them by itself; else one by one. Subsamples
    are drawn once. A point at which the model cannot be evaluated has log density minus infinity.

    Args:
        model: the program.
        unpack: makes pairs of a site and its unconstrained value of a vector.
        start: a vector at which the model can be evaluated.  # (D)
        args: positional arguments of the model.
        kwargs: its arguments by name.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        unpack: Unpack,
        start: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._model, self._unpack, self.args, self.kwargs = model, unpack, args, kwargs
        self.start = start.detach()
        self.fixed: dict[str, Tensor] = {}
        self._nesting = 0
        self._many: Callable[[Tensor], Tensor] | None = None
        with forked_rng(), torch.enable_grad():
            trace, _ = self._trace(self.start)
            for name, site in trace.iter_stochastic_nodes():
                if site_is_subsample(site):
                    self.fixed[name] = site["value"]
            self._nesting = max(
                [-f.dim for _, s in trace.nodes.items() for f in _frames(s)], default=0
            )
            self.random = self._is_random()
            if not self.random:
                ways = (self._mapped, self._plated)
                self._many = next((way for way in ways if self._agrees(way)), None)

    @property
    def dim(self) -> int:
        """D, the length of the vector."""
        return len(self.start)

    def __call__(self, points: Tensor) -> Tensor:
        """Return log densities in nats, (S), of points (S, D)."""
        return torch.cat([self._score(part) for part in torch.split(points, _BLOCK)])

    def gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return log densities (S) and their gradients (S, D) in double precision."""
        with torch.enable_grad():
            points = points.detach().to(self.start).requires_grad_()
            value = self(points)
            slope = _slopes(value, points)
        return value.detach().double(), slope.double()

    def hessian(self, points: Tensor) -> Tensor:
        """Return the mean of the second derivatives at points (S, D), (D, D), in doubles."""
        with torch.enable_grad():
            points = points.detach().to(self.start)
            if self._many is not None:
                # No more points at once than are scored in one pass: each has D copies.
                parts = torch.split(points, max(1, _BLOCK // self.dim))
                rows = torch.stack([self._hessians(part) for part in parts]).sum(0)
            else:
                rows = torch.stack([self._hessian(point) for point in points]).double().sum(0)
        return (rows + rows.mT) / (2 * len(points))

    def curvature(self, point: Tensor) -> Tensor:
        """Return the diagonal of the second derivatives at a point (D), in doubles.

        Above 512 dimensions it is estimated by products with random signs.
        """
        if self.dim <= _EXACT:
            probes = torch.eye(self.dim).to(self.start)
        else:
            signs = torch.randint(0, 2, (_PROBES, self.dim)).to(self.start)
            probes = (2 * signs - 1) / _PROBES**0.5
        with torch.enable_grad():
            copies = point.detach().to(self.start).repeat(len(probes), 1).requires_grad_()
            slope = _slopes(self(copies), copies, again=True)
            rows = _slopes(slope * probes, copies)
        return (rows * probes).sum(0).double()

    def _hessians(self, points: Tensor) -> Tensor:
        """Return the sum of the second derivatives: row i of a point is its slope's along i."""
        copies = points.repeat_interleave(self.dim, 0).requires_grad_()
        slope = _slopes(self(copies), copies, again=True)
        along = slope.reshape(len(points), self.dim, self.dim).diagonal(dim1=1, dim2=2)
        rows = _slopes(along, copies).reshape(len(points), self.dim, self.dim)
        return rows.double().sum(0)

    def _hessian(self, point: Tensor) -> Tensor:
        point = point.clone().requires_grad_()
        slope = _slopes(self._score(point[None]), point, again=True)
        return torch.stack([_slopes(s, point, keep=True) for s in slope])

    # One pass of the model

    def _score(self, points: Tensor) -> Tensor:
        if self._many is not None:
            try:
                return _finite(self._many(points))
            except (ValueError, RuntimeError):  # of some point; the others still count
                pass
        return torch.stack([self._score_one(point) for point in points])

    def _score_one(self, point: Tensor) -> Tensor:
        try:
            return _finite(self._single(point))
        except (ValueError, RuntimeError):
            return point.sum() * 0 - math.inf

    def _single(self, point: Tensor) -> Tensor:
        trace, log_det = self._trace(point)
        total = torch.stack([term.sum() for term in log_det]).sum()
        return total + torch.stack([term.sum() for term in _terms(trace)]).sum()

    def _mapped(self, points: Tensor) -> Tensor:
        # Validation asks for the values of tensors, which a mapped program does not have.
        with dist.validation_enabled(False):
            found: Tensor = torch.vmap(self._single)(points)
        return found

    def _plated(self, points: Tensor) -> Tensor:
        count = len(points)
        lead = points.reshape(count, *(1,) * self._nesting, self.dim)
        with pyro.plate("_points", count, dim=-1 - self._nesting):
            trace, log_det = self._trace(lead)
        total = sum(term.reshape(count, -1).sum(-1) for term in log_det)
        for term in _terms(trace):
            wide = term.dim() > self._nesting
            total = total + (term.reshape(count, -1).sum(-1) if wide else term.sum())
        return torch.as_tensor(total)

    def _trace(self, latent: Tensor) -> tuple[Any, list[Tensor]]:
        """Run the model at a latent vector; return its trace and the terms of log |det|."""
        values, log_det = dict(self.fixed), []
        for site, free in self._unpack(latent):
            transform = biject_to(site["fn"].support)
            value = transform(free)
            term = transform.log_abs_det_jacobian(free, value)
            event = term.dim() - value.dim() + site["fn"].event_dim
            log_det.append(sum_rightmost(term, event))
            values[site["name"]] = value
        with poutine.block():
            trace = poutine.trace(poutine.condition(self._model, data=values)).get_trace(
                *self.args, **self.kwargs
            )
        return trace, log_det

    # What kind of model it is

    def _is_random(self) -> bool:
        """Tell whether the density depends on draws: of sites that are hidden from the guide."""
        with torch.no_grad():
            one, two = (float(self._seeded(seed)) for seed in (1, 2))
        return abs(one - two) > 1e-6 * (1 + abs(one))

    def _seeded(self, seed: int) -> Tensor:
        with forked_rng(seed):
            return self._score_one(self.start)

    def _agrees(self, way: Callable[[Tensor], Tensor]) -> bool:
        near = [self.start, self.start + 0.1, self.start - 0.1]
        # Far ones too, since a model may branch; not where it cannot be evaluated.
        far = [p for p in (self.start + 2.0, self.start - 2.0) if self._score_one(p).isfinite()]
        points = torch.stack(near + far)
        with torch.no_grad():
            try:
                together = way(points)
                apart = torch.stack([self._single(point) for point in points])
            except (ValueError, RuntimeError, IndexError, NotImplementedError, AssertionError):
                return False
        # Up to rounding: a share of a large total could hide a term that is counted twice.
        size = torch.where(apart.isfinite(), apart, 0.0).abs()
        size = size.maximum(size[:3].max())
        gap = (together - apart).abs()
        same = (gap <= 1e-3 + 64 * torch.finfo(apart.dtype).eps * size) | (together == apart)
        same = same | (together.isnan() & apart.isnan())
        return together.shape == (len(points),) and bool(same.all())

    def complaint(self) -> str:
        """Say what is wrong with the density at the start, in words."""
        try:
            trace, _ = self._trace(self.start)
        except (ValueError, RuntimeError) as error:
            return f"at the start: {_first_line(error)}"
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            try:
                with dist.validation_enabled(True):
                    value = site["fn"].log_prob(site["value"])
            except (ValueError, RuntimeError) as error:
                return f"at the start, site '{name}': {_first_line(error)}"
            if not bool(torch.isfinite(value).all()):
                return f"at the start the log density of site '{name}' is not finite"
        return "at the start itself it is finite"


def _frames(site: dict[str, Any]) -> list[Any]:
    return [f for f in site.get("cond_indep_stack", ()) if f.vectorized]


def _terms(trace: Any) -> list[Tensor]:
    """Return the scaled log densities of a trace's sites, those of subsamples left out."""
    # Not by the trace itself, which asks whether the numbers are NaN.
    return [
        scale_and_mask(
            site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]),
            site["scale"],
            site["mask"],
        )
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site_is_subsample(site)
    ]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__


def _finite(value: Tensor) -> Tensor:
    return torch.where(value.isnan() | (value == math.inf), -math.inf, value)


def _slopes(value: Tensor, at: Tensor, *, again: bool = False, keep: bool = False) -> Tensor:
    """Differentiate a sum; what does not depend on the point has a slope of zero."""
    if not value.requires_grad:
        return torch.zeros_like(at)
    (slope,) = torch.autograd.grad(
        value.sum(), at, create_graph=again, retain_graph=keep or again, allow_unused=True
    )
    return torch.zeros_like(at) if slope is None else slope
