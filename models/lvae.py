"""The ladder variational auto-encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel
from pyroboost.models._nets import Folded, mlp, split_scale
from pyroboost.models.vae import _Decoder, _Split

__all__ = ["LVAE"]


class _Descent(_Decoder):
    """The model: z_L from a standard normal, each z_l given the one above, x given z_1."""

    label = "LVAE"

    def __init__(
        self,
        net: Folded,
        steps: Sequence[Folded],
        latents: Sequence[int],
        gaussian: bool,
        shape: tuple[int, ...],
        names: tuple[str, ...],
    ) -> None:
        super().__init__(net, latents[0], gaussian, shape, (names[0], names[-1]))
        self.steps = nn.ModuleList(steps)  # from z_{l+1} to z_l, lowest first
        self.top, self.layers = latents[-1], names[1:]

    def prior(self, layer: int, above: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and scale of m(z_l | z_{l+1}), layers counted from 0."""
        return split_scale(self.steps[layer](above))

    def forward(self, x: Tensor) -> None:
        """Run the model on data x."""
        self._check(x)
        zero = x.new_zeros(self.top) if x.is_floating_point() else torch.zeros(self.top)
        with pyro.plate("data", x.shape[-1 - len(self.shape)], device=x.device):
            law = dist.Normal(zero, torch.ones_like(zero)).to_event(1)
            z = pyro.sample(self.layers[-1], law)
            for layer in reversed(range(len(self.layers) - 1)):
                law = dist.Normal(*self.prior(layer, z)).to_event(1)
                z = pyro.sample(self.layers[layer], law)
            pyro.sample(self.names[0], self.law(z), obs=x)


class _Ladder(nn.Module):
    """The guide: messages of x climb, and on the way down each meets the model's own law."""

    def __init__(
        self, trunks: Sequence[Folded], heads: Sequence[nn.Module], descent: _Descent
    ) -> None:
        super().__init__()
        self.trunks, self.heads = nn.ModuleList(trunks), nn.ModuleList(heads)
        self.descent = descent

    def messages(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return what x says of each layer: location and scale, lowest first."""
        found, climbing = [], x
        for trunk, head in zip(self.trunks, self.heads, strict=True):
            climbing = trunk(climbing)
            found.append(split_scale(head(climbing)))
        return found

    def forward(self, x: Tensor) -> None:
        """Run the guide on data x."""
        descent, messages = self.descent, self.messages(x)
        with pyro.plate("data", x.shape[-1 - len(descent.shape)], device=x.device):
            z = pyro.sample(descent.layers[-1], dist.Normal(*messages[-1]).to_event(1))
            for layer in reversed(range(len(messages) - 1)):
                law = _merge(messages[layer], descent.prior(layer, z))
                z = pyro.sample(descent.layers[layer], law.to_event(1))


def _merge(message: tuple[Tensor, Tensor], prior: tuple[Tensor, Tensor]) -> dist.TorchDistribution:
    """Multiply two normals: their precisions add, their means are weighted by them."""
    (m, s), (m_p, s_p) = message, prior
    # The share of the message, s^-2 / (s^-2 + s_p^-2), without dividing by small variances.
    share = s_p.square() / (s.square() + s_p.square())
    return dist.Normal(m_p + share * (m - m_p), s * share.sqrt())


class LVAE(MetaModel):
    r"""A variational auto-encoder with a hierarchy of latents, whose guide meets the model halfway.

    $$z_L \sim \mathcal N(0, I), \qquad z_l \sim \mathcal N(\mu_l(z_{l+1}), \sigma_l(z_{l+1})^2),
    \qquad x \sim m(x \mid z_1)$$
    $$q(z_L \mid x) = \mathcal N(\hat\mu_L, \hat\sigma_L^2), \qquad q(z_l \mid z_{l+1}, x) =
    \mathcal N\!\Big(\frac{\hat\mu_l \hat\sigma_l^{-2} + \mu_l \sigma_l^{-2}}{\hat\sigma_l^{-2} +
    \sigma_l^{-2}}, \frac{1}{\hat\sigma_l^{-2} + \sigma_l^{-2}}\Big)$$

    $\hat\mu_l(x), \hat\sigma_l(x)$ come from a deterministic pass upwards; $\mu_l, \sigma_l$ are
    the model's own, so that model and guide share those networks. The hidden site is the topmost
    latent, on which a stage above stands; those below are private: in a cascade's bound
    $\log m(h)$ is the standard normal's at $z_L$, $q(h \mid x)$ is $q(z_L \mid x)$, and the terms
    of the lower layers stay within this stage's own weight. Warm-up is ``fit(annealing=...)``.

    Args:
        visible_shape: shape of one datum, or its size.
        latents: dimensions of the stochastic layers, lowest first; two or more.
        likelihood: ``"bernoulli"`` on bits, from logits; ``"gaussian"``, with location and scale
            from the decoder.
        units: width of the deterministic layers; one number, or one for each stochastic layer.
        layers: number of deterministic layers below each stochastic one, on either way.
        batch_norm: whether each of them is followed by batch normalisation.
        activation: class of the nonlinearity.
        visible: name of the visible site.
        hidden: name of the hidden site; ``"z2"`` for two layers where left out, above ``"z1"``.

    Example:
        >>> lvae = LVAE(784, (30, 30))
        >>> lvae.hidden, lvae.encode(torch.zeros(3, 784)).shape, lvae.sample(2).shape
        ('z2', torch.Size([3, 30]), torch.Size([2, 784]))

    Reference:
        Sønderby et al., Ladder variational autoencoders (2016), section 2: the ladder. Sizes of
        cascaded meta-models, supplement D: four deterministic layers of 1000, two stochastic ones
        of 30.
    """

    def __init__(
        self,
        visible_shape: int | tuple[int, ...],
        latents: Sequence[int] = (30, 30),
        *,
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        units: int | Sequence[int] = 1000,
        layers: int = 2,
        batch_norm: bool = True,
        activation: type[nn.Module] = nn.ReLU,
        visible: str = "x",
        hidden: str | None = None,
    ) -> None:
        shape = (visible_shape,) if isinstance(visible_shape, int) else tuple(visible_shape)
        widths = [units] * len(latents) if isinstance(units, int) else list(units)
        names = [visible, *(f"z{i + 1}" for i in range(len(latents)))]
        names[-1] = hidden or names[-1]
        _check(latents, widths, layers, likelihood, names)
        gaussian = likelihood == "gaussian"

        def net(before: int, width: int, after: int) -> nn.Sequential:
            sizes = [before, *[width] * layers, after]
            return mlp(sizes, batch_norm=batch_norm, activation=activation)

        size = math.prod(shape)
        inputs = [size, *widths[:-1]]
        climbs = [net(b, w, 2 * z) for b, w, z in zip(inputs, widths, latents, strict=True)]
        trunks = [
            Folded(climb[:-1], 1 if level else len(shape), flat=not level)
            for level, climb in enumerate(climbs)
        ]
        steps = [
            Folded(net(above, width, 2 * below), 1)
            for (below, above), width in zip(pairwise(latents), widths[1:], strict=True)
        ]
        last: nn.Module = net(latents[0], widths[0], size * (1 + gaussian))
        last = nn.Sequential(last, _Split(shape)) if gaussian else last
        descent = _Descent(
            Folded(last, 1, shape=None if gaussian else shape),
            steps,
            latents,
            gaussian,
            shape,
            tuple(names),
        )
        super().__init__(
            descent,
            _Ladder(trunks, [climb[-1] for climb in climbs], descent),
            visible=visible,
            hidden=names[-1],
            visible_shape=shape,
            hidden_shape=(latents[-1],),
        )
        self.latents, self.likelihood = tuple(latents), likelihood

    def log_prior(self, h: Tensor, *args: object, template: Tensor | None = None) -> Likelihood:
        r"""Return the standard normal's $\log m(z_L)$ per datum, in nats.

        Args:
            h: values of the topmost latent.  # (N, latents[-1])
            *args: none are used.
            template: not needed.
        """
        value = -0.5 * (h.square() + math.log(2 * math.pi)).sum(-1)
        return Likelihood(value, "exact")

    def extra_repr(self) -> str:
        """Name the sites, the stochastic layers and the likelihood."""
        return f"{super().extra_repr()}, latents={self.latents}, likelihood='{self.likelihood}'"


def _check(
    latents: Sequence[int],
    widths: Sequence[int],
    layers: int,
    likelihood: str,
    names: Sequence[str],
) -> None:
    if len(latents) < 2 or min(*latents, *widths, layers) < 1 or len(widths) != len(latents):
        raise ValueError(
            f"LVAE: latents={tuple(latents)}, units={tuple(widths)}, layers={layers}; take two or "
            "more stochastic layers, one width or one for each of them, and positive sizes."
        )
    if likelihood not in ("bernoulli", "gaussian"):
        raise ValueError(
            f"LVAE: likelihood is {likelihood!r}; it must be 'bernoulli' or 'gaussian'."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"LVAE: the sites {', '.join(names)} are not all different; rename one.")
