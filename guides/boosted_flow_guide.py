"""A gradient boosted flow as the posterior of a latent vector for each datum."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyroboost.distributions import BoostedFlow, Components
from pyroboost.flows import Flow, realnvp
from pyroboost.guides._amortised import Amortised
from pyroboost.guides._guarded import Guarded

__all__ = ["BoostedFlowGuide"]

MakeFlow = Callable[[int], Flow]


class BoostedFlowGuide(Amortised):
    r"""An amortised guide that is a mixture of flows, to be boosted one flow at a time.

    .. math:: q(z \mid x) = \sum_c w_c\, g_c(z \mid x), \qquad
        z = f_c(z_0; h(x)), \quad z_0 \sim \mathcal N\big(\mu(x), \mathrm{diag}\, \sigma(x)^2\big)

    The encoder gives every datum the normal law of z_0, which all components share, and the
    context h(x) of amortised flows. At first component 0 has all the weight and the guide is one
    flow, which any ELBO of Pyro trains; `infer.boost` trains the others and all weights, and
    `greedy` calls it for a stage with this guide. Once several components have weight,
    `StratifiedELBO` (the default of `fit`) has their pathwise gradients. It is
    the guide of a VAE, of any other meta-model over vectors, or of a stage of a cascade.

    Args:
        encoder: a network from data to 2 `latent` numbers side by side, location and raw scale
            (before a softplus), or to a tuple of the two. Amortised flows take further outputs,
            or a third member of the tuple, as their context. Batches come to it with a single
            leading dimension.
        latent: D, dimension of z.
        components: C, the number of flows.
        flow: a function from D to a new flow, or a list of C of these for components that differ;
            RealNVP in four steps by default. New components start as it builds them, so let it
            draw their spread: a start that is always the same may straddle two modes each time.
        hidden: name of the hidden site.
        event_dim: dimensions of one datum; what the encoder says (`VAE.encoder` does), else 1,
            where left out.
        allow_slow: accept autoregressive flows, whose density costs D network passes.

    Raises:
        TypeError: if a function builds no flow.
        ValueError: if a flow has no inverse, contexts differ, or the encoder's outputs do not fit.

    Example:
        >>> import torch
        >>> from pyroboost import flows
        >>> from pyroboost.models import VAE
        >>> vae = VAE(
        ...     784,
        ...     20,
        ...     guide=lambda encoder: BoostedFlowGuide(encoder, 20, 4, lambda d: flows.realnvp(d)),
        ... )
        >>> vae.encode(torch.zeros(3, 784)).shape
        torch.Size([3, 20])

    Reference:
        Giaquinto and Banerjee, Gradient boosted flows (2020), Eq. 7 and section 4.
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent: int,
        components: int | None = None,
        flow: MakeFlow | Sequence[MakeFlow] = realnvp,
        *,
        hidden: str = "z",
        event_dim: int | None = None,
        allow_slow: bool = False,
    ) -> None:
        makers = [flow] if callable(flow) else list(flow)
        built = [partial(make, latent) for make in makers]
        if callable(flow):
            count = 4 if components is None else components
            mixture = Components(built[0], count, allow_slow=allow_slow)
        else:
            mixture = Components(built, components, allow_slow=allow_slow)
        super().__init__(encoder, latent, _context(mixture), hidden, event_dim)
        self.components = mixture

    def law(self, base: TorchDistribution, context: Tensor | None) -> BoostedFlow:
        """Return the mixture q(z | x), given its base and context."""
        return Guarded.of(self.components(base, context), _warn)

    def posterior(self, x: Tensor) -> BoostedFlow:
        """Return q(z | x) as a distribution.

        Args:
            x: data.  # (N, ...)
        """
        return self.law(*self.base(x))


def _warn(count: int) -> None:
    warnings.warn(
        f"BoostedFlowGuide: {count} components have weight, and an ordinary objective trains them "
        "by a score-function gradient, which is unbiased and very noisy; pyroboost.infer.boost and "
        "loss=StratifiedELBO() take the pathwise one.",
        stacklevel=2,
    )


def _context(mixture: Components) -> int:
    """Return the one width of context that amortised flows take."""
    flows: list[Flow] = list(mixture.flows)  # type: ignore[arg-type]
    widths = sorted({flow.context for flow in flows if flow.context})
    if len(widths) > 1:
        raise ValueError(
            f"BoostedFlowGuide: flows take contexts of widths {widths}; give them one width, that "
            "of the encoder's further outputs."
        )
    return widths[0] if widths else 0
