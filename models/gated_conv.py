"""The variational auto-encoder with gated convolutional networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from pyroboost.models.conv_vae import _image
from pyroboost.models.vae import VAE, LikelihoodName, _Split

__all__ = ["GatedConvVAE"]

_Kernel = int | tuple[int, int]


class _Gated(nn.Module):
    """A layer and its gate in one: (W * h + b) sigmoid(V * h + c)."""

    def __init__(self, both: nn.Module) -> None:
        super().__init__()
        self.both = both

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.glu(self.both(image), 1)


def _conv(before: int, after: int, kernel: _Kernel, stride: int, padding: int) -> _Gated:
    return _Gated(nn.Conv2d(before, 2 * after, kernel, stride, padding))


def _grow(before: int, after: int, kernel: _Kernel, padding: int, more: int) -> _Gated:
    return _Gated(nn.ConvTranspose2d(before, 2 * after, kernel, 2, padding, more))


class _Encoder(nn.Module):
    """Three gated convolutions to one pixel of features, and linear location and raw scale."""

    def __init__(
        self, shape: tuple[int, int, int], channels: Sequence[int], latent: int, pass_on: bool
    ) -> None:
        super().__init__()
        first, second, features = channels
        kernel = shape[1] // 4, shape[2] // 4
        self.features = nn.Sequential(
            nn.Flatten(),
            nn.Unflatten(1, shape),
            _conv(shape[0], first, 5, 2, 2),
            _conv(first, second, 5, 2, 2),
            _conv(second, features, kernel, 1, 0),
            nn.Flatten(),
        )
        self.head = nn.Linear(features, 2 * latent)
        self.pass_on = pass_on

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.features(x)
        loc, raw = self.head(features).chunk(2, -1)
        return (loc, raw, features) if self.pass_on else (loc, raw)


def _decoder(
    shape: tuple[int, int, int], channels: Sequence[int], latent: int, factor: int
) -> nn.Sequential:
    """Return the network from z, seen as one pixel, to ``factor`` images side by side."""
    kernels: list[_Kernel] = [(shape[1] // 4, shape[2] // 4), 5, 5]
    layers: list[nn.Module] = [nn.Unflatten(1, (latent, 1, 1))]
    margins = [(0, 0), (2, 0), (1, 1)]  # n / 4 pixels a side, n / 2 - 1, n
    sizes = itertools.pairwise([latent, *channels])
    for (before, after), kernel, (padding, more) in zip(sizes, kernels, margins, strict=True):
        layers.append(_grow(before, after, kernel, padding, more))
    layers += [nn.Conv2d(channels[-1], factor * shape[0], 1), nn.Flatten()]
    return nn.Sequential(*layers)


class GatedConvVAE(VAE):
    r"""A variational auto-encoder of images with gated convolutions, without batch norms.

    $$h_l = (W_l * h_{l-1} + b_l) \odot \sigma(V_l * h_{l-1} + c_l)$$

    The encoder has kernels of 5, 5 and a quarter of the image (7 x 7 for 28 x 28, 7 x 5 for
    28 x 20) with strides 2, 2, 1 and ends in one pixel of features; location and raw scale are
    linear in them. The decoder mirrors it with transposed convolutions of stride 2 from z as one
    pixel, and a last convolution of 1 x 1. (The strides and paddings printed in the paper's
    appendix do not fit together; these are the nearest that do.)

    Args:
        visible_shape: shape of one datum: (channels, height, width), (height, width), or flat.
            Height and width must be multiples of four.
        latent: dimension of z.
        image_shape: shape of the image that a flat datum holds, channels first.
        channels: output channels of the encoder's three convolutions. The last is the number of
            features.
        decoder_channels: those of the decoder's three.
        likelihood: ``"bernoulli"``, ``"gaussian"`` or ``"discretized"``, as for :class:`VAE`.
        levels: number of grey levels of ``"discretized"``.
        guide: a function from the encoder to a guide that takes the normal one's place. Its
            amortised flows take the features as their context: ``flows.planar(dim, context=256)``.
        visible: name of the visible site.
        hidden: name of the hidden site.

    Example:
        >>> import torch
        >>> vae = GatedConvVAE((28, 20), 8, channels=(4, 4, 16), decoder_channels=(8, 4, 4))
        >>> vae.encode(torch.zeros(3, 28, 20)).shape, vae.sample(2).shape
        (torch.Size([3, 8]), torch.Size([2, 28, 20]))

    Reference:
        Giaquinto and Banerjee, Gradient boosted flows (2020), appendix B.
    """

    def __init__(
        self,
        visible_shape: int | tuple[int, ...],
        latent: int = 64,
        *,
        image_shape: tuple[int, ...] | None = None,
        channels: tuple[int, int, int] = (16, 32, 256),
        decoder_channels: tuple[int, int, int] = (32, 16, 16),
        likelihood: LikelihoodName = "bernoulli",
        levels: int = 256,
        guide: Callable[[nn.Module], nn.Module] | None = None,
        visible: str = "x",
        hidden: str = "z",
    ) -> None:
        shape = (visible_shape,) if isinstance(visible_shape, int) else tuple(visible_shape)
        image = _image(shape, image_shape, "GatedConvVAE")
        if image[1] % 4 or image[2] % 4 or not math.prod(image):
            raise ValueError(
                f"GatedConvVAE: images of {image[1]} x {image[2]} came; height and width must be "
                "multiples of four, so pad or crop them."
            )
        if (
            len(channels) != 3
            or len(decoder_channels) != 3
            or min(*channels, *decoder_channels) < 1
        ):
            raise ValueError(
                f"GatedConvVAE: channels={tuple(channels)} and decoder_channels="
                f"{tuple(decoder_channels)}; give three positive numbers each."
            )
        pairs = likelihood != "bernoulli"  # a location and a scale for each pixel
        out = _Split(shape) if pairs else nn.Unflatten(1, shape)
        decoder = _decoder(image, decoder_channels, latent, 1 + pairs)
        super().__init__(
            shape,
            latent,
            likelihood=likelihood,
            levels=levels,
            encoder=_Encoder(image, channels, latent, pass_on=guide is not None),
            decoder=nn.Sequential(decoder, out),
            guide=guide,
            visible=visible,
            hidden=hidden,
        )
