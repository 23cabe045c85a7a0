"""The importance-weighted auto-encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyroboost.evaluation.weights import bound_draw
from pyroboost.infer.importance_weighted import Gradient, ImportanceWeightedELBO
from pyroboost.models.vae import VAE

__all__ = ["IWAE"]


class IWAE(VAE):
    r"""A variational auto-encoder trained on, and judged by, its importance-weighted bound.

    $$\mathcal{L}_K(x) = \mathbb{E} \log \frac1K \sum_{k=1}^K w_k, \qquad
    w_k = \frac{m(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q(z \mid x)$$

    The law of z given x that belongs to this bound is not q but $Q(z \mid x)$: draw K values from
    q and keep one of them in proportion to $w_k$. :meth:`encode` draws it, so that a stage above
    learns the values under which the terms of a cascade's bound are taken; see ``bound_draw``.
    Model and guide are a VAE's.

    Args:
        visible_shape: shape of one datum, or its size.
        latent: dimension of z.
        num_samples: importance samples K.
        gradient: estimator of the guide's gradient, as :class:`ImportanceWeightedELBO` names it.
        **settings: the remaining settings of :class:`VAE`.

    Example:
        >>> import torch
        >>> iwae = IWAE(784, 50, num_samples=5)
        >>> iwae.num_particles, iwae.encode(torch.zeros(3, 784)).shape
        (5, torch.Size([3, 50]))

    Reference:
        Burda et al., Importance weighted autoencoders (2016), Eq. 8; Cremer et al., Reinterpreting
        importance-weighted autoencoders (2017), section 3: the law Q. Sizes of cascaded
        meta-models, supplement D: two layers of 500 units, 50 latent dimensions, K = 5 and 10.
    """

    def __init__(
        self,
        visible_shape: int | tuple[int, ...],
        latent: int,
        num_samples: int = 5,
        *,
        gradient: Gradient = "standard",
        **settings: Any,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"IWAE: num_samples is {num_samples}; take 1 or more.")
        super().__init__(visible_shape, latent, **settings)
        self.num_particles = num_samples
        self._loss = ImportanceWeightedELBO(num_samples, gradient=gradient)

    def objective(self) -> Callable[..., Tensor]:
        """Return the importance-weighted bound with K samples, as a loss."""
        return self._loss.differentiable_loss

    def encode(self, x: Tensor, *args: Any) -> Tensor:
        r"""Draw $z \sim Q(z \mid x)$ without gradients, in eval mode.

        Args:
            x: data.  # (N, ...)
            *args: none are used.

        Returns:
            One of K draws from the guide, kept in proportion to its weight.  # (N, latent)
        """
        self.visible_shape = tuple(x.shape[1:])
        return bound_draw(self, x, *args).hidden

    def extra_repr(self) -> str:
        """Name the sites, the likelihood and K."""
        return f"{super().extra_repr()}, num_samples={self.num_particles}"
