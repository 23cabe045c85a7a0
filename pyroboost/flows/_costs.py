"""How much a flow holds while it runs, for bounds on memory."""

from __future__ import annotations

from torch import nn

from pyroboost.flows.couplings import Coupling, SplineCoupling
from pyroboost.flows.elementwise import Spline
from pyroboost.flows.flow import Flow
from pyroboost.flows.linear import LU, LowerTriangular
from pyroboost.flows.step import CoefficientStep

__all__ = ["numbers_per_row"]


def numbers_per_row(flow: Flow) -> int:
    """Count, generously, the numbers held at once for one row that passes without gradients."""
    return 2 * max((_held(step) for step in flow.steps), default=0) + 12 * flow.dim


def _held(step: nn.Module) -> int:
    """Count those of one step, beside its points."""
    if isinstance(step, Coupling):
        layers = [*step.net.inner, step.net.outer]
        held = 2 * sum(layer.out_features for layer in layers)
        return int(
            held + (4 if isinstance(step, SplineCoupling) else 2) * step.net.outer.out_features
        )
    if isinstance(step, CoefficientStep):
        amortised = step.coefficients.weight is not None
        size = step.coefficients.bias.numel()
        matrices = 6 * step.dim**2 if isinstance(step, LU | LowerTriangular) and amortised else 0
        return (4 * size if amortised or isinstance(step, Spline) else 0) + matrices
    layers = [part for part in step.modules() if isinstance(part, nn.Linear)]
    return 4 * sum(layer.out_features for layer in layers)
