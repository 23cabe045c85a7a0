"""The distributions of a mixture's sites: unions, choices per datum and the component's law."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.score_parts import ScoreParts
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Aside", "Chosen", "Component", "Union", "pick", "stacked"]


def stacked(values: Sequence[Tensor]) -> Tensor:
    """Stack values along a new last dimension, broadcast against each other."""
    shape = np.broadcast_shapes(*(value.shape for value in values))
    return torch.stack([value.expand(shape) for value in values], -1)


def pick(index: Tensor, values: Sequence[Tensor], event_dim: int = 0) -> Tensor:
    """Take for each entry of an index the entry of the value that it names.

    Args:
        index: which value.  # (*B)
        values: tensors that broadcast against each other.  # (*B, *E) each
        event_dim: number of dimensions of E.

    Returns:
        The picked entries.  # (*B, *E)
    """
    index = index.reshape(index.shape + (1,) * event_dim)
    picked = values[0]
    for place, value in enumerate(values[1:], start=1):
        picked = torch.where(index == place, value, picked)
    return picked


def _drawn(law: Any) -> Tensor:
    value: Tensor = law.rsample() if law.has_rsample else law.sample()
    return value


class _OfMany(TorchDistribution):
    """What the laws made of several others have in common: shapes, support, expansion."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_enumerate_support = False

    def __init__(self, laws: Sequence[Any], *shapes: torch.Size) -> None:
        self.laws = list(laws)
        batch = np.broadcast_shapes(*(law.batch_shape for law in self.laws), *shapes)
        super().__init__(torch.Size(batch), self.laws[0].event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """The support of the first law, which is that of all."""
        return self.laws[0].support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Repeat the law over more batch dimensions."""
        batch = torch.Size(batch_shape)
        new: Any = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.laws = [law.expand(batch) for law in self.laws]
        new._batch_shape = batch
        return new


class Union(_OfMany):
    r"""The mixture $\sum_i w_i\, m_i$ of laws of any families over one space.

    Args:
        log_weights: normalised.  # (K,)
        laws: K laws of one event shape.
    """

    has_rsample = False

    def __init__(self, log_weights: Tensor, laws: Sequence[Any]) -> None:
        self.log_weights = log_weights
        super().__init__(laws)

    def terms(self, value: Tensor) -> Tensor:
        r"""Return $\log w_i + \log m_i$ of a value, (*B, K)."""
        return stacked([law.log_prob(value) for law in self.laws]) + self.log_weights

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of the mixture in nats."""
        return self.terms(value).logsumexp(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw a component per entry, and from it."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            index = dist.Categorical(logits=self.log_weights).expand(shape).sample()
            values = [law.expand(shape).sample() for law in self.laws]
            return pick(index, values, self.event_dim)


class Chosen(_OfMany):
    """The law that an index picks per entry; where its draw is there already, that draw.

    A draw that is there is a function of draws made aside, whose scores the component carries:
    its own density enters with its whole gradient, and without a score.

    Args:
        index: which law.  # (*B)
        laws: the laws, of one event shape.
        value: the draw.  # (*B, *E)
    """

    def __init__(self, index: Tensor, laws: Sequence[Any], value: Tensor | None = None) -> None:
        self.index, self.value = index, value
        super().__init__(laws, index.shape)

    @property
    def has_rsample(self) -> bool:
        """Whether a draw carries gradients."""
        return self.value is not None or all(law.has_rsample for law in self.laws)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density under the picked law, in nats."""
        return pick(self.index, [law.log_prob(value) for law in self.laws])

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return the draw, or draw from all laws and pick."""
        shape = torch.Size(sample_shape) + self.batch_shape
        if self.value is not None:
            return self.value.expand(shape + self.event_shape)
        return pick(self.index, [_drawn(law.expand(shape)) for law in self.laws], self.event_dim)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draw without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)


class Aside(Chosen):
    """One law, drawn from aside: never enumerated, never scored where it is drawn."""

    has_rsample = True

    def __init__(self, law: Any) -> None:
        super().__init__(torch.zeros((), dtype=torch.long), [law])


class Component(dist.Categorical):
    r"""The law of the component given one draw aside from every part, $q(c) \propto w_c\, r_c$.

    Its score stands for those of all draws aside, and $\log \sum_i w_i r_i$ is the baseline of
    its own: where that is the whole weight, whatever the component, nothing is left of it. So it
    is for the components of mixtures among the parts.

    Args:
        terms: $\log w_i + \log r_i$.  # (*B, K)
        score: sum of the scores of the draws aside, of value 0.  # (*B)
        choices: of these, those of the components of mixtures among the parts.  # (*B)
        enumerable: whether it may be summed out: not where a site above it in the model takes
            its value from it.
    """

    has_enumerate_support = True

    def __init__(
        self,
        terms: Tensor,
        score: Tensor | float = 0.0,
        choices: Tensor | float = 0.0,
        *,
        enumerable: bool = True,
    ) -> None:
        super().__init__(logits=terms, validate_args=False)
        self.score, self.choices, self.has_enumerate_support = score, choices, enumerable
        self.baseline = terms.detach().logsumexp(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Repeat the law over more batch dimensions."""
        new: Any = Component.__new__(Component)
        super().expand(torch.Size(batch_shape), _instance=new)
        new.score, new.choices, new.baseline = self.score, self.choices, self.baseline
        new.has_enumerate_support = self.has_enumerate_support
        return new

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """Return the log probability, the score of all draws and the baseline's term."""
        log_prob = self.log_prob(x)
        level = self.baseline.nan_to_num(0.0, 0.0, 0.0)
        return ScoreParts(log_prob, log_prob + self.score, self.choice(log_prob) * level)

    def choice(self, log_prob: Tensor) -> Tensor:
        """Return the scores of this component and of those within the parts, of value 0."""
        return log_prob - log_prob.detach() + self.choices
