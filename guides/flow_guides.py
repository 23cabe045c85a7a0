"""One normalising flow as the posterior of a latent vector for each datum."""

from __future__ import annotations

from collections.abc import Callable

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyroboost.distributions import FlowLaw
from pyroboost.flows import Flow, realnvp
from pyroboost.guides._amortised import Amortised

__all__ = ["FlowGuide"]


class FlowGuide(Amortised):
    r"""An amortised guide that is a single flow, of any kind.

    .. math:: z = f(z_0; h(x)), \quad
        z_0 \sim \mathcal N\big(\mu(x), \mathrm{diag}\, \sigma(x)^2\big), \qquad
        \log q(z \mid x) = \log q_0(z_0 \mid x) - \log\Big|\det \frac{\partial f}{\partial z_0}
        \Big|

    Draws carry pathwise gradients and their density comes from the draw itself, so flows that
    have no inverse serve too: `flows.planar`, `flows.radial`, `flows.sylvester`, `flows.iaf`. With
    these the density of other points than the guide's own draws is refused (`FlowLaw`), and they
    cannot be components of a `BoostedFlowGuide`.

    Args:
        encoder: a network as for `BoostedFlowGuide`.
        latent: D, dimension of z.
        flow: a function from D to the flow, such as
            `lambda dim: flows.planar(dim, 16, context=64)` with 64 further outputs of the encoder;
            RealNVP in four steps by default.
        hidden: name of the hidden site.
        event_dim: dimensions of one datum; what the encoder says, else 1, where left out.

    Raises:
        TypeError: if the function builds no flow.
        ValueError: if the encoder's outputs do not fit.

    Example:
        >>> import torch
        >>> from pyroboost import flows
        >>> from pyroboost.models import VAE
        >>> def guide(encoder):
        ...     return FlowGuide(encoder, 20, lambda dim: flows.planar(dim, 3, context=8))
        >>> vae = VAE(784, 20, context=8, guide=guide)
        >>> vae.encode(torch.zeros(3, 784)).shape
        torch.Size([3, 20])

    Reference:
        Rezende and Mohamed, Variational inference with normalizing flows (2015), section 4.
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent: int,
        flow: Callable[[int], Flow] = realnvp,
        *,
        hidden: str = "z",
        event_dim: int | None = None,
    ) -> None:
        built = flow(latent)
        if not isinstance(built, Flow):
            raise TypeError(
                f"FlowGuide: the function of the flow built {type(built).__name__}; let it return "
                "a pyroboost.flows.Flow."
            )
        super().__init__(encoder, latent, built.context, hidden, event_dim)
        self.flow = built

    def law(self, base: TorchDistribution, context: Tensor | None) -> FlowLaw:
        """Return q(z | x), given its base and context."""
        return FlowLaw(base, self.flow, context=context)

    def posterior(self, x: Tensor) -> FlowLaw:
        """Return q(z | x) as a distribution.

        Args:
            x: data.  # (N, ...)
        """
        return self.law(*self.base(x))
