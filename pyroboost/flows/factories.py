"""One function for each kind of flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyroboost.flows.couplings import (
    AdditiveCoupling,
    AffineCoupling,
    Coupling,
    SplineCoupling,
    halves,
    odds,
)
from pyroboost.flows.elementwise import Affine, NonlinearSquared, Spline
from pyroboost.flows.flow import Flow
from pyroboost.flows.linear import LU, Householder, LowerTriangular
from pyroboost.flows.step import Step

__all__ = ["affine", "householder", "lower", "lu", "nice", "nlsq", "realnvp", "spline"]


def affine(dim: int, *, context: int = 0, spread: float = 0.01) -> Flow:
    """Build a scale and a shift of every coordinate: one `Affine` step.

    Args:
        dim: D, the number of coordinates.
        context: width C of a context on which the flow depends; 0 for none.
        spread: standard deviation of the first coefficients; 0 starts at the identity.

    Example:
        >>> affine(2)
        Flow('affine', dim=2: Affine)
    """
    return Flow([Affine(dim, context=context, spread=spread)], name="affine")


def lower(dim: int, *, context: int = 0, spread: float = 0.01) -> Flow:
    """Build a lower triangular matrix and a shift: one `LowerTriangular` step.

    Arguments are those of `affine`.

    Example:
        >>> lower(2)
        Flow('lower', dim=2: LowerTriangular)
    """
    return Flow([LowerTriangular(dim, context=context, spread=spread)], name="lower")


def lu(dim: int, *, context: int = 0, spread: float = 0.01) -> Flow:
    """Build a matrix of LU factors and a shift: one `LU` step.

    Arguments are those of `affine`.

    Example:
        >>> lu(2)
        Flow('lu', dim=2: LU)
    """
    return Flow([LU(dim, context=context, spread=spread)], name="lu")


def householder(dim: int, pairs: int = 1, *, context: int = 0, spread: float = 0.01) -> Flow:
    """Build a rotation of `pairs` pairs of reflections: one `Householder` step.

    It preserves volume: on a base that is the same in every direction it changes nothing. Other
    arguments are those of `affine`.

    Example:
        >>> householder(3, pairs=2)
        Flow('householder', dim=3: Householder)
    """
    step = Householder(dim, pairs=pairs, context=context, spread=spread)
    return Flow([step], name="householder")


def nice(
    dim: int,
    steps: int = 4,
    *,
    units: int | Sequence[int] = 64,
    context: int = 0,
    spread: float = 0.01,
) -> Flow:
    """Build NICE: pairs of additive couplings, then a scale and a shift of every coordinate.

    Args:
        dim: D, two or more.
        steps: the number of pairs. The couplings of a pair move complementary coordinates: the
            two halves in one pair, the odd and the even ones in the next.
        units: width of the networks' one hidden layer, or widths of several.
        context: width C of a context on which the flow depends; 0 for none.
        spread: size of the networks' first outputs; 0 starts at the identity.

    Raises:
        ValueError: if there is no step, or nothing that a coupling could move.

    Example:
        >>> nice(3, steps=1)
        Flow('nice', dim=3: AdditiveCoupling, AdditiveCoupling, Affine)
    """
    shared = {"units": units, "context": context, "spread": spread}
    last = Affine(dim, context=context, spread=spread)
    return Flow([*_pairs("nice", AdditiveCoupling, dim, steps, shared), last], name="nice")


def realnvp(
    dim: int,
    steps: int = 4,
    *,
    units: int | Sequence[int] = 64,
    context: int = 0,
    spread: float = 0.01,
    limit: float = 3.0,
) -> Flow:
    """Build RealNVP without batch normalisation: pairs of affine couplings.

    Arguments are those of `nice`, and `limit`, the largest log scale of one coupling.

    Example:
        >>> realnvp(5, steps=1, context=7)
        Flow('realnvp', dim=5, context=7: AffineCoupling, AffineCoupling)
    """
    shared = {"units": units, "context": context, "spread": spread, "limit": limit}
    return Flow(_pairs("realnvp", AffineCoupling, dim, steps, shared), name="realnvp")


def spline(
    dim: int,
    steps: int = 2,
    *,
    units: int | Sequence[int] = 64,
    bins: int = 8,
    bound: float = 4.0,
    context: int = 0,
    spread: float = 0.01,
) -> Flow:
    """Build a neural spline flow: pairs of spline couplings, then a scale and a shift.

    The splines act within [-bound, bound] of the base's units, the last step moves the box. In
    one dimension the steps are splines of that coordinate, without networks. Other arguments are
    those of `nice`.

    Example:
        >>> spline(2, steps=1)
        Flow('spline', dim=2: SplineCoupling, SplineCoupling, Affine)
        >>> spline(1, steps=1)
        Flow('spline', dim=1: Spline, Affine)
    """
    shared: dict[str, Any] = {"bins": bins, "bound": bound, "context": context, "spread": spread}
    inner: list[Any]
    if dim == 1:
        inner = [Spline(1, **shared) for _ in range(_count("spline", steps))]
    else:
        inner = _pairs("spline", SplineCoupling, dim, steps, {"units": units, **shared})
    return Flow([*inner, Affine(dim, context=context, spread=spread)], name="spline")


def nlsq(
    dim: int, steps: int = 4, *, mix: bool = True, context: int = 0, spread: float = 0.01
) -> Flow:
    """Build a non-linear squared flow: one bump for every coordinate and step.

    Args:
        dim: D, the number of coordinates.
        steps: the number of `NonlinearSquared` steps.
        mix: rotate by a pair of reflections before every step; without it each coordinate is
            mapped by itself.
        context: width C of a context on which the flow depends; 0 for none.
        spread: standard deviation of the first coefficients; 0 starts at the identity.

    Raises:
        ValueError: if there is no step.

    Example:
        >>> nlsq(2, steps=1)
        Flow('nlsq', dim=2: Householder, NonlinearSquared)
    """
    shared: dict[str, Any] = {"context": context, "spread": spread}
    listed: list[Step] = []
    for _ in range(_count("nlsq", steps)):
        listed += [Householder(dim, **shared)] if mix and dim > 1 else []
        listed += [NonlinearSquared(dim, **shared)]
    return Flow(listed, name="nlsq")


def _count(name: str, steps: int) -> int:
    if steps < 1:
        raise ValueError(f"flows.{name}: steps is {steps}; give one or more.")
    return steps


def _pairs(
    name: str, kind: Callable[..., Coupling], dim: int, steps: int, shared: dict[str, Any]
) -> list[Coupling]:
    """Return pairs of couplings, halves and alternate coordinates in turn, so that all mix."""
    listed = []
    for i in range(_count(name, steps)):
        kept = (odds if i % 2 else halves)(dim)
        rest = tuple(j for j in range(dim) if j not in kept)
        listed += [kind(dim, kept=kept or None, **shared), kind(dim, kept=rest, **shared)]
    return listed
