"""Which flows can be components of a mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroboost.flows.flow import Flow

__all__ = ["check_invertible"]

BETTER = (
    "flows.affine, flows.lower, flows.lu, flows.householder, flows.nice, flows.realnvp, "
    "flows.spline or flows.nlsq"
)


@torch.no_grad()
def check_invertible(flow: Flow, *, allow_slow: bool = False, where: str = "") -> None:
    """Refuse a flow that cannot be scored at points which it did not draw itself.

    A mixture scores every component at points that the others drew, so each needs an inverse in
    closed form: :math:`z_0 = f^{-1}(z)`. Steps known to have none are refused by name, and
    transforms of unknown kind by trying. Autoregressive steps have an inverse that costs one pass
    of their network for every coordinate; they pass with `allow_slow`.

    Args:
        flow: the flow, or a single step.
        allow_slow: accept autoregressive steps.
        where: start of the message, such as "BoostedFlow: component 2".

    Raises:
        ValueError: with the step, the reason and the flows that would do.

    Example:
        >>> from pyroboost.flows import realnvp
        >>> check_invertible(realnvp(2))
        >>> from pyro.distributions.transforms import planar
        >>> try:
        ...     check_invertible(Flow([planar(2)], name="planar"))
        ... except ValueError as error:
        ...     print(str(error).split(",")[0])
        flow 'planar': step Planar has no inverse in closed form
    """
    if not isinstance(flow, Flow):
        flow = Flow([flow])
    head = f"{where}: " if where else ""
    for step in flow.steps:
        reason = step.refusal
        if reason is None and not getattr(step, "tried", True):
            reason = _trial(step, flow)
            step.tried = reason is None
        if reason is not None:
            raise ValueError(
                f"{head}flow '{flow.name}': step {step.label} {reason}, and a mixture scores every "
                f"component at points that the others drew; use {BETTER}."
            )
        if step.slow and not allow_slow:
            raise ValueError(
                f"{head}flow '{flow.name}': step {step.label} is inverted one coordinate at a "
                f"time, {flow.dim} passes of its network for every point that is scored; pass "
                f"allow_slow=True to accept that cost, or use {BETTER}."
            )


def _trial(step: torch.nn.Module, flow: Flow) -> str | None:
    """Run a step there and back on a few points, and say what went wrong."""
    like = next((p for p in step.parameters() if p.is_floating_point()), torch.zeros(()))
    x = torch.linspace(-1.5, 1.5, 3 * flow.dim).to(like).reshape(3, flow.dim)
    context: Tensor | None = x.new_zeros(3, flow.context) if flow.context else None
    try:
        y, log_det = step.push(x, context)  # type: ignore[operator]
        back, log_det_back = step.pull(y.clone(), context)  # type: ignore[operator]
    except (KeyError, NotImplementedError) as error:
        return f"has no inverse (it raised {type(error).__name__})"
    off = max(float((back - x).abs().max()), float((log_det + log_det_back).abs().max()))
    return None if off < 1e-2 else f"is not undone by its inverse (they differ by {off:.2g})"
