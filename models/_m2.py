"""The programs of a semi-supervised pair: networks of a value and a class."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroboost.models._labelled import Every, Labels, check_labels, check_shape, class_law
from pyroboost.models._nets import Folded, mlp, split_scale

__all__ = ["Generate", "Joined", "Recognise"]


class Joined(nn.Module):
    """A network of a value and a class; the first layer sees the value once for all classes.

    Args:
        size: width of the value.
        classes: number of classes.
        widths: widths of the deterministic layers, then of the output.
        batch_norm: whether each deterministic layer is normalised over the batch.
        activation: class of the nonlinearity.
    """

    def __init__(
        self,
        size: int,
        classes: int,
        widths: list[int],
        *,
        batch_norm: bool,
        activation: type[nn.Module],
    ) -> None:
        super().__init__()
        self.value = nn.Linear(size, widths[0])
        # Together they are one linear layer of the value beside the class in one-hot code.
        self.label = nn.Parameter(torch.empty(classes, widths[0]))
        bound = 1 / math.sqrt(size + classes)
        nn.init.uniform_(self.label, -bound, bound)
        above = mlp(widths, batch_norm=batch_norm, activation=activation)
        norm = [nn.BatchNorm1d(widths[0])] if batch_norm else []
        self.above = Folded(nn.Sequential(*norm, activation(), above), 1)

    def forward(self, value: Tensor, label: Tensor) -> Tensor:
        """Run on values (..., N, D) and class numbers (..., N), broadcast against each other."""
        out = self.above(self.value(value) + nn.functional.embedding(label, self.label))
        assert isinstance(out, Tensor)
        return out


class Generate(nn.Module):
    """The model: y from its prior, z from a standard normal, x from the decoder's law."""

    log_prior: Tensor

    def __init__(
        self,
        net: Joined,
        prior: Tensor,
        latent: int,
        gaussian: bool,
        shape: tuple[int, ...],
        names: tuple[str, str, str],
    ) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("log_prior", prior.log())
        self.latent, self.gaussian, self.shape, self.names = latent, gaussian, shape, names

    def law(self, y: Tensor, z: Tensor) -> Any:
        """Return p(x | y, z)."""
        out = self.net(z, y)
        if self.gaussian:
            parts = [part.unflatten(-1, self.shape) for part in out.chunk(2, -1)]
            return dist.Normal(*split_scale((parts[0], parts[1]))).to_event(len(self.shape))
        logits = out.unflatten(-1, self.shape)
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(len(self.shape))

    def forward(self, x: Tensor, y: Labels = None) -> None:
        """Run the model on data x with labels y."""
        visible, hidden, label = self.names
        size = check_shape(x, self.shape, visible)
        self._check(x)
        check_labels(y, size, len(self.log_prior), visible)
        like = self.log_prior
        with pyro.plate("data", size, device=x.device):
            known = pyro.sample(label, class_law(like, y, size, guide=False))
            zero = like.new_zeros(self.latent)
            if isinstance(y, Every):  # a z of its own for each class
                zero = zero.expand(len(like), size, self.latent)
            z = pyro.sample(hidden, dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            pyro.sample(visible, self.law(known, z), obs=x)

    def _check(self, x: Tensor) -> None:
        if not self.gaussian and pyro.settings.get("validate_distributions_torch"):
            if not bool(((x == 0) | (x == 1)).all()):
                raise ValueError(
                    f"M2: '{self.names[0]}' holds values other than 0 and 1, which a Bernoulli "
                    "likelihood cannot score; binarise the data or use likelihood='gaussian'."
                )


class SharedNoise(dist.Normal):
    """Normals whose draws have one noise for all classes, the leading dimension.

    The law of each class is what it was, while differences between classes lose most of the
    noise: they are what q(y | x) learns from.
    """

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, with one noise for all classes."""
        shape = (*sample_shape, 1, *self.loc.shape[1:])
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + noise * self.scale


class Recognise(nn.Module):
    """The guide: y from its label or from q(y | x), z from q(z | x, y)."""

    def __init__(
        self,
        classify: nn.Module,
        net: Joined,
        shape: tuple[int, ...],
        names: tuple[str, str, str],
    ) -> None:
        super().__init__()
        self.classify, self.net = Folded(classify, 1), net
        self.shape, self.names = shape, names

    def logits(self, x: Tensor) -> Tensor:
        """Return log q(y | x) of every class, (..., N, C)."""
        out = self.classify(x.flatten(-len(self.shape)))
        assert isinstance(out, Tensor)
        return out.log_softmax(-1)

    def forward(self, x: Tensor, y: Labels = None) -> None:
        """Run the guide on data x with labels y."""
        visible, hidden, label = self.names
        size = check_shape(x, self.shape, visible)
        flat = x.flatten(-len(self.shape))
        count = len(self.net.label)
        check_labels(y, size, count, visible)
        with pyro.plate("data", size, device=x.device):
            known = pyro.sample(label, self._law(x, y, size))
            kind = SharedNoise if isinstance(y, Every) else dist.Normal
            pyro.sample(hidden, kind(*split_scale(self.net(flat, known))).to_event(1))

    def _law(self, x: Tensor, y: Labels, size: int) -> dist.Categorical:
        if isinstance(y, Every):  # q(y | x) plays no part
            return class_law(x.new_zeros(len(self.net.label)), y, size, guide=True)
        return class_law(self.logits(x), y, size, guide=True)
