"""The variational auto-encoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel
from pyroboost.models._levels import DiscretizedLogistic, check_levels
from pyroboost.models._nets import Folded, mlp, split_scale

__all__ = ["VAE", "LikelihoodName"]

LikelihoodName = Literal["bernoulli", "gaussian", "discretized"]


class _Decoder(nn.Module):
    """The model: z from a standard normal, x from the law that the decoder's outputs set."""

    label = "VAE"

    def __init__(
        self,
        net: Folded,
        latent: int,
        gaussian: bool,
        shape: tuple[int, ...],
        names: tuple[str, str],
        levels: int = 0,
    ) -> None:
        super().__init__()
        self.net, self.levels = net, levels
        self.latent, self.gaussian, self.shape, self.names = latent, gaussian, shape, names

    def law(self, z: Tensor) -> dist.TorchDistribution:
        """Return m(x | z)."""
        out = self.net(z)
        if self.levels:
            law = DiscretizedLogistic(*split_scale(out), self.levels)
            return law.to_event(len(self.shape))
        if self.gaussian:
            return dist.Normal(*split_scale(out)).to_event(len(self.shape))
        # The data are checked once, in words; the probabilities are logits and need no check.
        return dist.Bernoulli(logits=out, validate_args=False).to_event(len(self.shape))

    def forward(self, x: Tensor) -> None:
        """Run the model on data x."""
        self._check(x)
        visible, hidden = self.names
        zero = x.new_zeros(self.latent) if x.is_floating_point() else torch.zeros(self.latent)
        with pyro.plate("data", x.shape[-1 - len(self.shape)], device=x.device):
            z = pyro.sample(hidden, dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            pyro.sample(visible, self.law(z), obs=x)

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[x.dim() - len(self.shape) :]) != self.shape or x.dim() <= len(self.shape):
            raise ValueError(
                f"{self.label}: data of shape {tuple(x.shape)} came for '{self.names[0]}'; it "
                f"takes (N, {', '.join(map(str, self.shape))})."
            )
        if not self.gaussian and pyro.settings.get("validate_distributions_torch"):
            if self.levels:
                check_levels(self.label, self.names[0], x, self.levels)
            elif not bool(((x == 0) | (x == 1)).all()):
                raise ValueError(
                    f"{self.label}: '{self.names[0]}' holds values other than 0 and 1, which a "
                    "Bernoulli likelihood cannot score; binarise the data or use "
                    "likelihood='gaussian'."
                )


class _Encoder(nn.Module):
    """The guide: z from a normal whose location and scale the encoder computes from x."""

    def __init__(self, net: Folded, event_dim: int, name: str) -> None:
        super().__init__()
        self.net = net
        self.event_dim, self.name = event_dim, name

    @property
    def encoder(self) -> Folded:
        """The network."""
        return self.net

    def forward(self, x: Tensor) -> None:
        """Run the guide on data x."""
        with pyro.plate("data", x.shape[-1 - self.event_dim], device=x.device):
            pyro.sample(self.name, dist.Normal(*split_scale(self.net(x))).to_event(1))


class VAE(MetaModel):
    r"""A variational auto-encoder.

    $$z \sim \mathcal N(0, I), \qquad x \sim m(x \mid z), \qquad
    q(z \mid x) = \mathcal N(\mu(x), \mathrm{diag}\, \sigma(x)^2)$$

    Args:
        visible_shape: shape of one datum, or its size.
        latent: dimension of z.
        likelihood: ``"bernoulli"`` on bits, from logits; ``"gaussian"``, with location and scale
            from the decoder; ``"discretized"`` on grey levels 0, 1/255, ..., 1, with the
            probability of each under a logistic law whose location and scale come from the
            decoder.
        levels: number of grey levels of ``"discretized"``.
        units: width of each deterministic layer.
        layers: number of deterministic layers in the encoder and in the decoder.
        batch_norm: whether each of them is followed by batch normalisation.
        activation: class of the nonlinearity.
        encoder: another network from x to 2 ``latent`` outputs, or to a pair (location, raw scale).
        decoder: another network from z to logits, or to location and raw scale as above.
        guide: a function from the encoder to a guide that takes the normal one's place, such as
            ``lambda encoder: BoostedFlowGuide(encoder, 20)``.
        context: further outputs of the encoder, for a guide whose flows are amortised.
        visible: name of the visible site.
        hidden: name of the hidden site.

    Example:
        >>> vae = VAE(784, 20)
        >>> vae.encode(torch.zeros(3, 784)).shape, vae.sample(2).shape
        (torch.Size([3, 20]), torch.Size([2, 784]))

    Reference:
        Kingma and Welling (2013); sizes of cascaded meta-models, supplement D: two layers of 500
        units with batch normalisation, 20 latent dimensions.
    """

    def __init__(
        self,
        visible_shape: int | tuple[int, ...],
        latent: int,
        *,
        likelihood: LikelihoodName = "bernoulli",
        levels: int = 256,
        units: int = 500,
        layers: int = 2,
        batch_norm: bool = True,
        activation: type[nn.Module] = nn.ReLU,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        guide: Callable[[nn.Module], nn.Module] | None = None,
        context: int = 0,
        visible: str = "x",
        hidden: str = "z",
    ) -> None:
        shape = (visible_shape,) if isinstance(visible_shape, int) else tuple(visible_shape)
        _check_options(likelihood, levels, context, guide, encoder)
        gaussian = likelihood != "bernoulli"  # two numbers for each pixel, not one
        size, middle = math.prod(shape), [units] * layers

        def default(before: int, after: int) -> nn.Module:
            return mlp([before, *middle, after], batch_norm=batch_norm, activation=activation)

        outputs = 2 * latent + context
        encode = Folded(encoder or default(size, outputs), len(shape), flat=encoder is None)
        # The networks of `default` are flat; a decoder of location and scale splits before it
        # folds back, which for one event dimension is the same.
        out = shape if decoder is None and not gaussian else None
        if decoder is None and gaussian:
            decoder = nn.Sequential(default(latent, 2 * size), _Split(shape))
        decode = Folded(decoder or default(latent, size), 1, shape=out)
        super().__init__(
            _Decoder(
                decode,
                latent,
                likelihood == "gaussian",
                shape,
                (visible, hidden),
                levels if likelihood == "discretized" else 0,
            ),
            _Encoder(encode, len(shape), hidden) if guide is None else guide(encode),
            visible=visible,
            hidden=hidden,
            visible_shape=shape,
            hidden_shape=(latent,),
        )
        self.latent, self.likelihood = latent, likelihood

    @property
    def encoder(self) -> nn.Module:
        """The network of the guide; it takes data with any number of leading dimensions."""
        fn: Any = self.guide.fn
        found: nn.Module = fn.encoder
        return found

    @property
    def decoder(self) -> nn.Module:
        """The network of the model."""
        fn: Any = self.model.fn
        found: nn.Module = fn.net
        return found

    def log_prior(self, h: Tensor, *args: object, template: Tensor | None = None) -> Likelihood:
        r"""Return the standard normal's $\log m(z)$ per datum, in nats.

        Args:
            h: values of z.  # (N, latent)
            *args: none are used.
            template: not needed.
        """
        value = -0.5 * (h.square() + math.log(2 * math.pi)).sum(-1)
        return Likelihood(value, "exact")

    def extra_repr(self) -> str:
        """Name the sites and the likelihood."""
        return f"{super().extra_repr()}, likelihood='{self.likelihood}'"


def _check_options(
    likelihood: str,
    levels: int,
    context: int,
    guide: Callable[[nn.Module], nn.Module] | None,
    encoder: nn.Module | None,
) -> None:
    if likelihood not in get_args(LikelihoodName):
        raise ValueError(
            f"VAE: likelihood is {likelihood!r}; it must be 'bernoulli' or 'gaussian', or "
            "'discretized' for grey levels."
        )
    if likelihood == "discretized" and levels < 2:
        raise ValueError(f"VAE: levels is {levels}; take two or more, 256 for bytes.")
    if context and (guide is None or encoder is not None):
        raise ValueError(
            f"VAE: context is {context}, further outputs of the default encoder for a guide with "
            "amortised flows; pass such a guide, or leave context out and let your own encoder "
            "give them."
        )


class _Split(nn.Module):
    """Split a flat output into location and raw scale of an event shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, out: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = out.chunk(2, -1)
        return loc.reshape(-1, *self.shape), raw.reshape(-1, *self.shape)
