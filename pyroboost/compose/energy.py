"""Meta-models that are energies: a log density up to log Z, and no Pyro program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroboost.compose._no_program import NotAProgram
from pyroboost.contexts import service
from pyroboost.likelihood import Kind, Likelihood
from pyroboost.metamodel import MetaModel
from pyroboost.program import Program
from pyroboost.weights import Draw

__all__ = ["Energy", "Ratio", "fingerprint"]


class Energy(MetaModel):
    """A log density of x up to its log Z, without a hidden site and without programs.

    Args:
        visible: name of the visible site.
    """

    is_program = False
    hidden = ""

    def __init__(self, visible: str) -> None:
        nn.Module.__init__(self)
        self.visible = visible
        self.hidden_shape = None
        for label in ("model", "guide"):
            reason = (
                f"{type(self).__name__}.{label}: an energy over x is no Pyro program (a joint to "
                "the power a has not the marginal to the power a), so nothing can run or trace it; "
                "use log_density, log_marginal, sample and chains."
            )
            setattr(self, label, NotAProgram(reason))

    @property
    def recognition(self) -> Program:
        """There is no guide."""
        return self.guide

    def _no_hidden(self, what: str) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}.{what}: an energy over '{self.visible}' has no hidden site; "
            f"{what} one of its parts."
        )

    def encode(self, x: Tensor, *args: Any) -> Tensor:
        """Refuse: there is no hidden site."""
        self._no_hidden("encode")

    def decode(self, h: Tensor, *args: Any, template: Tensor | None = None) -> Tensor:
        """Refuse: there is no hidden site."""
        self._no_hidden("decode")

    def sample_hidden(self, template: Tensor | int, *args: Any) -> Tensor:
        """Refuse: there is no hidden site."""
        self._no_hidden("sample_hidden")

    def log_prior(self, h: Tensor, *args: Any, template: Tensor | None = None) -> Likelihood:
        """Refuse: there is no hidden site."""
        self._no_hidden("log_prior")

    def own_draw(self, x: Tensor, *args: Any) -> Draw:
        """Return the log density of data; there is nothing to draw."""
        found = self.log_marginal(x, *args)
        if found is None:
            raise TypeError(
                f"{type(self).__name__}: an energy without a log Z has no likelihood; make it part "
                "of a Product."
            )
        return Draw(x, found.value, torch.zeros_like(found.value))

    def extra_repr(self) -> str:
        """Name the visible site."""
        return f"visible='{self.visible}'"


def _logits(classifier: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = classifier(x)
    if found.shape not in ((len(x),), (len(x), 1)):
        raise ValueError(
            f"Ratio: the classifier gave shape {tuple(found.shape)} for {len(x)} data; it must "
            "give one logit each, (N,) or (N, 1)."
        )
    return found.reshape(len(x))


class _Labels(nn.Module):
    """The program of labels given x, whose likelihood is the classifier's."""

    def __init__(self, classifier: nn.Module, visible: str) -> None:
        super().__init__()
        self.classifier, self.visible = classifier, visible

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Score labels."""
        logits = _logits(self.classifier, x)
        with pyro.plate("data", len(x), device=x.device):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y.to(logits.dtype))


def _no_guide(x: Tensor, y: Tensor) -> None:
    """Labels are observed: there is nothing to draw."""


class Ratio(Energy):
    r"""What a classifier between data and samples says of the ratio of their densities.

    $$\log \frac{c(x)}{1 - c(x)} \approx \log \frac{p_{data}(x)}{q(x)}$$

    A factor of a product: it has neither samples nor a constant of its own. For data and samples
    in equal numbers it corrects q itself; any other proportion is a constant in log Z.

    Args:
        classifier: a network from x to one logit, (N, ...) to (N,) or (N, 1).
        visible: name of the visible site.

    Example:
        >>> ratio = Ratio(nn.Linear(6, 1))
        >>> ratio.log_density(torch.zeros(3, 6)).kind
        'unnormalised'

    Reference:
        Grover and Ermon, Boosted generative models (2018), section 3.2.
    """

    def __init__(self, classifier: nn.Module, *, visible: str = "x") -> None:
        if not isinstance(classifier, nn.Module):
            raise TypeError(
                f"Ratio: the classifier is {type(classifier).__name__}; pass an nn.Module from x "
                "to one logit."
            )
        super().__init__(visible)
        self.classifier = classifier
        self.visible_shape = None

    def logits(self, x: Tensor) -> Tensor:
        """Return the classifier's logit of each datum, with gradients where they are enabled.

        Args:
            x: data.  # (N, ...)

        Returns:
            Log odds of being data.  # (N,)

        Raises:
            ValueError: the classifier does not give one number per datum.
        """
        return _logits(self.classifier, x)

    def log_density(self, x: Tensor, *args: Any) -> Likelihood:
        """Return the log ratio in nats, in eval mode.

        Args:
            x: data.  # (N, ...)
            *args: none are used.
        """
        with service(self):
            return Likelihood(self.logits(x), "unnormalised")

    def problem(self) -> MetaModel:
        """Return the pair that trains the classifier: labels y given x, 1 for data.

        Fit it to a pair of tensors (x, y); its parameters are the classifier's own.
        """
        labels = _Labels(self.classifier, self.visible)
        return MetaModel(labels, _no_guide, visible=self.visible, hidden="y")

    def sample(self, template: Tensor | int, *args: Any) -> Tensor:
        """Refuse: a ratio of densities is no density."""
        raise TypeError(
            "Ratio.sample: a classifier's ratio is a factor, not a density; sample the Product "
            "that it is part of."
        )

    def normalisation(self) -> tuple[Kind, float]:
        """Say that there is no constant."""
        return "unnormalised", 0.0


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all that a module's densities depend on, by names that its copies share."""
    yield from module.named_parameters()
    yield from module.named_buffers()
    store = pyro.get_param_store()._params
    for name, part in module.named_modules():
        if isinstance(part, Program):
            kept = {**part.start, **part.pending}
            kept.update({own: store[final] for own, final in part.free.items() if final in store})
            yield from ((f"{name}:{own}", value) for own, value in kept.items())


@torch.no_grad()
def fingerprint(*modules: nn.Module) -> Tensor:
    """Return one number that changes when any parameter or buffer does.

    Sums of integers do not depend on their order, so neither threads nor devices matter, and
    values are read in single precision, so that ``double()`` changes nothing.

    Args:
        *modules: the modules, in this order.

    Returns:
        A 64-bit number.  # ()
    """
    total = 0
    for index, module in enumerate(modules):
        for name, tensor in sorted(_tensors(module), key=lambda item: item[0]):
            bits = tensor.detach().to("cpu", torch.float32).reshape(-1).contiguous()
            words = bits.view(torch.int32).to(torch.int64)
            odd = (2 * torch.arange(len(words)) + 1) * 0x1E3779B97F4A7C15
            own = int((words * odd).sum())
            label = sum((place + 1) * ord(letter) for place, letter in enumerate(name))
            total = (total * 6364136223846793005 + own + label + index) % 2**64
    return torch.tensor(total - 2**63)
