"""The variational auto-encoder with convolutional networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from pyroboost.models.vae import VAE, LikelihoodName, _Split

__all__ = ["ConvVAE"]

_Size = tuple[int, int]


def _margins(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the zeros before and after a side of n pixels for ceil(n / stride) positions."""
    total = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
    return total // 2, total - total // 2


class _Shrink(nn.Module):
    """A strided convolution from n to ceil(n / stride) pixels a side, with zeros all around."""

    def __init__(
        self, channels: tuple[int, int], size: _Size, kernel: int, stride: int, bias: bool
    ) -> None:
        super().__init__()
        (top, bottom), (left, right) = (_margins(n, kernel, stride) for n in size)
        # The convolution puts as many zeros after as before; what is missing is put there first.
        self.more = (0, right - left, 0, bottom - top)
        self.conv = nn.Conv2d(*channels, kernel, stride, padding=(top, left), bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(image, self.more) if any(self.more) else image)


class _Grow(nn.Module):
    """The transpose of :class:`_Shrink`: from ceil(n / stride) back to n pixels a side."""

    def __init__(
        self, channels: tuple[int, int], size: _Size, kernel: int, stride: int, bias: bool
    ) -> None:
        super().__init__()
        self.size = size
        first = _margins(size[0], kernel, stride)[0], _margins(size[1], kernel, stride)[0]
        self.conv = nn.ConvTranspose2d(*channels, kernel, stride, padding=first, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image)[..., : self.size[0], : self.size[1]]


class _Networks:
    """The encoder and the decoder for images of one shape, mirror images of each other."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        *,
        kernel: int,
        stride: int,
        units: int,
        batch_norm: bool,
        activation: type[nn.Module],
    ) -> None:
        self.shape, self.units = shape, units
        self.kernel, self.stride = kernel, stride
        self.batch_norm, self.activation = batch_norm, activation
        self.channels = [shape[0], *channels]
        self.sizes: list[_Size] = [shape[1:]]
        for _ in channels:
            height, width = self.sizes[-1]
            self.sizes.append((math.ceil(height / stride), math.ceil(width / stride)))
        self.inner = (self.channels[-1], *self.sizes[-1])

    def _after(self, norm: nn.Module) -> list[nn.Module]:
        return [norm, self.activation()] if self.batch_norm else [self.activation()]

    def _dense(self, before: int, after: int) -> list[nn.Module]:
        linear = nn.Linear(before, after, bias=not self.batch_norm)
        return [linear, *self._after(nn.BatchNorm1d(after))]

    def encoder(self, outputs: int) -> nn.Sequential:
        """Return the network from data to flat outputs."""
        layers: list[nn.Module] = [nn.Flatten(), nn.Unflatten(1, self.shape)]
        for pair, size in zip(itertools.pairwise(self.channels), self.sizes, strict=False):
            conv = _Shrink(pair, size, self.kernel, self.stride, not self.batch_norm)
            layers += [conv, *self._after(nn.BatchNorm2d(pair[1]))]
        dense = self._dense(math.prod(self.inner), self.units)
        return nn.Sequential(*layers, nn.Flatten(), *dense, nn.Linear(self.units, outputs))

    def decoder(self, inputs: int, factor: int) -> nn.Sequential:
        """Return the network from flat inputs to ``factor`` images, flat and side by side."""
        size = math.prod(self.inner)
        layers = [*self._dense(inputs, self.units), *self._dense(self.units, size)]
        layers.append(nn.Unflatten(1, self.inner))
        channels = [factor * self.shape[0], *self.channels[1:]]
        steps = list(zip(itertools.pairwise(channels), self.sizes, strict=False))
        for index, ((after, before), grown) in reversed(list(enumerate(steps))):
            bias = not index or not self.batch_norm
            layers.append(_Grow((before, after), grown, self.kernel, self.stride, bias))
            layers += self._after(nn.BatchNorm2d(after)) if index else []
        return nn.Sequential(*layers, nn.Flatten())


def _image(
    shape: tuple[int, ...], image_shape: tuple[int, ...] | None, who: str = "ConvVAE"
) -> tuple[int, int, int]:
    """Return channels, height and width of data of some shape."""
    found = shape if image_shape is None else tuple(image_shape)
    found = (1, *found) if len(found) == 2 else found
    if len(found) != 3 or math.prod(found) != math.prod(shape):
        raise ValueError(
            f"{who}: data of shape {shape} are no images of shape {image_shape}; take "
            "visible_shape=(channels, height, width) or (height, width), or pass image_shape for "
            "flat data."
        )
    return found[0], found[1], found[2]


class ConvVAE(VAE):
    r"""A variational auto-encoder of images whose encoder and decoder are convolutional.

    $$z \sim \mathcal N(0, I), \qquad x \sim m(x \mid z), \qquad
    q(z \mid x) = \mathcal N(\mu(x), \mathrm{diag}\, \sigma(x)^2)$$

    The encoder shrinks n pixels a side to ceil(n / stride) with each convolution (28, 14, 7, 4, 2)
    and ends in one deterministic layer; the decoder is its mirror image with transposed
    convolutions, cut to the same sizes, so that images may have any size.

    Args:
        visible_shape: shape of one datum: (channels, height, width), (height, width), or flat.
        latent: dimension of z.
        image_shape: shape of the image that a flat datum holds, channels first.
        channels: output channels of each convolution.
        kernel: pixels a side of each kernel.
        stride: stride of each convolution.
        units: width of the deterministic layer.
        likelihood: ``"bernoulli"`` on bits, from logits; ``"gaussian"``, with location and scale
            from the decoder; ``"discretized"`` on 256 grey levels, as for :class:`VAE`.
        batch_norm: whether each layer is followed by batch normalisation.
        activation: class of the nonlinearity.
        visible: name of the visible site.
        hidden: name of the hidden site.

    Example:
        >>> import torch
        >>> vae = ConvVAE(784, 50, image_shape=(1, 28, 28), channels=(4, 8), units=16)
        >>> vae.encode(torch.zeros(3, 784)).shape, vae.sample(2).shape
        (torch.Size([3, 50]), torch.Size([2, 784]))

    Reference:
        Cascaded meta-models, supplement D: four convolutions of 4x4 with stride 2 and 32, 64, 128
        and 256 channels, a layer of 500 units, 50 latent dimensions, batch normalisation.
    """

    def __init__(
        self,
        visible_shape: int | tuple[int, ...],
        latent: int,
        *,
        image_shape: tuple[int, ...] | None = None,
        channels: Sequence[int] = (32, 64, 128, 256),
        kernel: int = 4,
        stride: int = 2,
        units: int = 500,
        likelihood: LikelihoodName = "bernoulli",
        batch_norm: bool = True,
        activation: type[nn.Module] = nn.ReLU,
        visible: str = "x",
        hidden: str = "z",
    ) -> None:
        shape = (visible_shape,) if isinstance(visible_shape, int) else tuple(visible_shape)
        if not channels or min(*channels, kernel, stride, units) < 1 or kernel < stride:
            raise ValueError(
                f"ConvVAE: channels={tuple(channels)}, kernel={kernel}, stride={stride}, "
                f"units={units}; all must be positive and the kernel at least as large as the "
                "stride, or pixels would be passed over."
            )
        networks = _Networks(
            _image(shape, image_shape),
            channels,
            kernel=kernel,
            stride=stride,
            units=units,
            batch_norm=batch_norm,
            activation=activation,
        )
        pairs = likelihood != "bernoulli"  # a location and a scale for each pixel
        out = _Split(shape) if pairs else nn.Unflatten(1, shape)
        super().__init__(
            shape,
            latent,
            likelihood=likelihood,
            encoder=networks.encoder(2 * latent),
            decoder=nn.Sequential(networks.decoder(latent, 1 + pairs), out),
            visible=visible,
            hidden=hidden,
        )
