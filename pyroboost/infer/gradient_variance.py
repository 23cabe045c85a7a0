"""How noisy the gradient of a loss is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyroboost.contexts import forked_rng, local_params
from pyroboost.infer.objectives import resolve_loss
from pyroboost.metamodel import MetaModel

__all__ = ["GradientNoise", "gradient_variance"]


class GradientNoise(NamedTuple):
    """Mean and variance over draws of the gradient of one parameter.

    Attributes:
        mean: average gradient of the loss per datum.  # shape of the parameter
        variance: sum over its elements of the variance of one draw.
        std_error: standard error of each element of ``mean``.  # shape of the parameter
    """

    mean: Tensor
    variance: float
    std_error: Tensor


def gradient_variance(
    pair: MetaModel,
    x: Tensor,
    *args: Any,
    loss: Any = None,
    num_draws: int = 100,
    seed: int | None = None,
) -> dict[str, GradientNoise]:
    r"""Draw the gradient of a loss many times and report its mean and its noise.

    $$\hat g = \frac1S \sum_s g_s, \qquad
    \mathrm{var} = \frac{1}{S - 1} \sum_s \lVert g_s - \hat g \rVert^2$$

    The modes of the pair's modules are left as they are; in training mode batch norms see every
    draw. Gradients that the parameters hold are left alone.

    Args:
        pair: a meta-model.
        x: a batch of data.  # (N, ...)
        *args: further arguments of the pair.
        loss: as in :func:`fit`; ``None`` takes the pair's own objective, else ``Trace_ELBO``.
        num_draws: number of draws S, at least two.
        seed: seed of the draws' own random stream.

    Returns:
        Mean, total variance and standard errors by the parameter's name, per datum.

    Raises:
        ValueError: fewer than two draws.

    Example:
        >>> from pyroboost.infer import ImportanceWeightedELBO
        >>> from pyroboost.models import VAE
        >>> vae, x = VAE(6, 2, units=8), torch.zeros(5, 6)
        >>> noise = gradient_variance(vae, x, loss=ImportanceWeightedELBO(5), num_draws=3)
        >>> len(noise) == len(list(vae.parameters()))
        True
    """
    if num_draws < 2:
        raise ValueError(f"gradient_variance: num_draws is {num_draws}; take at least two.")
    value = resolve_loss(pair, loss)
    moved = pair.named_trainable(x, *args)
    mean = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in moved.items()}
    spread = {name: torch.zeros_like(m) for name, m in mean.items()}
    with forked_rng(seed), local_params(), torch.enable_grad():
        for count in range(1, num_draws + 1):
            drawn = value(pair.model, pair.guide, x, *args) / len(x)
            slopes = torch.autograd.grad(drawn, list(moved.values()), allow_unused=True)
            for name, slope in zip(moved, slopes, strict=True):
                step = (0.0 if slope is None else slope.double()) - mean[name]
                mean[name] += step / count
                spread[name] += step.square() * ((count - 1) / count)
    return {
        name: GradientNoise(
            mean[name],
            float(spread[name].sum()) / (num_draws - 1),
            (spread[name] / (num_draws - 1) / num_draws).sqrt(),
        )
        for name in moved
    }
