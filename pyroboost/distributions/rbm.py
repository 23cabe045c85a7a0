"""The restricted Boltzmann machine as a Pyro distribution over its visible layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyroboost.sampling.enumeration import (
    MAX_UNITS,
    binary_states,
    exact_log_partition,
    exact_samples,
    free_energy,
)
from pyroboost.sampling.gibbs import block_gibbs, check_parameters, draw_bits, field, is_binary

__all__ = ["RBM"]


class RBM(TorchDistribution):
    r"""The visible marginal of a restricted Boltzmann machine, hidden bits summed out.

    .. math:: p(v, h) = \frac{1}{Z} e^{b^\top v + c^\top h + v^\top W h}, \qquad
        \log p(v) = -F(v) - \log Z, \qquad
        F(v) = -b^\top v - \sum_j \log(1 + e^{c_j + (v^\top W)_j})

    Parameters may carry batch dimensions, one machine per entry.

    1. **Value.** `log_prob` uses the stored `log_partition`; without one, the exact log Z where
       a layer has at most 20 units, else it refuses. No value is ever given without its log Z.
    2. **Gradient** of log Z: the mean of :math:`-\partial F` over the `negatives`; without
       them that of the exact log Z (at most 20 units), else log_prob refuses.
    3. **Samples** are exact where a layer has at most 20 units and otherwise the states
       of independent chains after `sweeps` Gibbs sweeps from the independent bits of the visible
       biases: the attribute `sampling` says which.

    Args:
        visible_bias: b.  # (*B, V)
        hidden_bias: c.  # (*B, H)
        weight: W.  # (*B, V, H)
        log_partition: log Z in nats, or a function that returns it when it is first needed.
            One that carries a gradient of its own is used as it is.  # broadcasts to (*B)
        negatives: visible samples of the model, such as persistent chains, for the gradient
            of log Z; machines with batch dimensions take one set for each. Or a function that
            makes them from the values to be scored.  # (S, *B, V)
        sweeps: Gibbs sweeps of `sample` where both layers have more than 20 units.
        validate_args: check parameters and values; Pyro's setting by default.

    Raises:
        ValueError: if shapes do not fit, with what would.

    Example:
        >>> rbm = RBM(torch.zeros(784), torch.zeros(10), 0.1 * torch.ones(784, 10))
        >>> rbm.sample((5,)).shape, rbm.log_prob(torch.ones(5, 784)).shape
        (torch.Size([5, 784]), torch.Size([5]))
        >>> rbm.T.event_shape, rbm.hidden_given(torch.ones(5, 784)).batch_shape
        (torch.Size([10]), torch.Size([5]))
        >>> rbm
        RBM(num_visible=784, num_hidden=10, log_partition=exact, sampling=exact)

    Reference:
        Tieleman, Training restricted Boltzmann machines using approximations to the likelihood
        gradient (2008), section 2.
    """

    arg_constraints = {  # noqa: RUF012 - the name and form that torch prescribes
        "visible_bias": constraints.real_vector,
        "hidden_bias": constraints.real_vector,
        "weight": constraints.independent(constraints.real, 2),  # type: ignore[no-untyped-call]
    }
    support = constraints.independent(constraints.boolean, 1)  # type: ignore[no-untyped-call]
    has_rsample = False

    def __init__(
        self,
        visible_bias: Tensor,
        hidden_bias: Tensor,
        weight: Tensor,
        *,
        log_partition: Tensor | float | Callable[[], Tensor] | None = None,
        negatives: Tensor | Callable[[Tensor], Tensor] | None = None,
        sweeps: int = 200,
        validate_args: bool | None = None,
    ) -> None:
        self._own_batch = check_parameters("RBM", visible_bias, hidden_bias, weight)
        self.visible_bias, self.hidden_bias, self.weight = visible_bias, hidden_bias, weight
        if sweeps < 1:
            raise ValueError(f"RBM: sweeps is {sweeps}; samples need at least one Gibbs sweep.")
        self.sweeps = sweeps
        self._log_partition = log_partition
        self._negatives, self._mirrored = negatives, False
        event_shape = visible_bias.shape[-1:]
        super().__init__(self._own_batch, event_shape, validate_args=validate_args)
        if isinstance(negatives, Tensor):
            self._check_negatives(negatives)

    def expand(self, batch_shape: Any, _instance: RBM | None = None) -> RBM:
        """Repeat the distribution over more batch dimensions without copying its parameters."""
        new: RBM = self._get_checked_instance(RBM, _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.Size(batch_shape)
        if np.broadcast_shapes(new.batch_shape, self.batch_shape) != new.batch_shape:
            raise ValueError(
                f"RBM: batch shape {tuple(self.batch_shape)} does not expand to "
                f"{tuple(batch_shape)}; keep its sizes on the right."
            )
        return new

    @property
    def T(self) -> RBM:
        """The hidden marginal: the same machine with its layers exchanged and the same log Z."""
        new: RBM = RBM.__new__(RBM)
        new.__dict__.update(self.__dict__)
        new.visible_bias, new.hidden_bias = self.hidden_bias, self.visible_bias
        new.weight = self.weight.mT
        new._mirrored = not self._mirrored
        new._event_shape = new.visible_bias.shape[-1:]
        return new

    @property
    def _parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.visible_bias, self.hidden_bias, self.weight

    # Conditionals and unnormalised densities

    def hidden_given(self, visible: Tensor) -> dist.Distribution:
        r"""Return :math:`p(h \mid v)`, independent bits, for visible states (*S, *B, V)."""
        visible = self._bits(visible, "hidden_given", "visible", self.visible_bias)
        logits = field(visible, self.weight) + self.hidden_bias
        return dist.Bernoulli(logits=logits, validate_args=self._validate_args).to_event(1)

    def visible_given(self, hidden: Tensor) -> dist.Distribution:
        r"""Return :math:`p(v \mid h)`, independent bits, for hidden states (*S, *B, H)."""
        hidden = self._bits(hidden, "visible_given", "hidden", self.hidden_bias)
        logits = field(hidden, self.weight.mT) + self.visible_bias
        return dist.Bernoulli(logits=logits, validate_args=self._validate_args).to_event(1)

    def free_energy(self, visible: Tensor) -> Tensor:
        """Return F(v) in nats, of shape (*S, *B), for visible states (*S, *B, V)."""
        visible = self._bits(visible, "free_energy", "visible", self.visible_bias)
        return free_energy(visible, *self._parameters)

    def joint_log_density(self, visible: Tensor, hidden: Tensor) -> Tensor:
        """Return log p(v, h) without its log Z, in nats, of shape (*S, *B)."""
        visible = self._bits(visible, "joint_log_density", "visible", self.visible_bias)
        hidden = self._bits(hidden, "joint_log_density", "hidden", self.hidden_bias)
        fields = field(visible, self.weight) + self.hidden_bias
        return (visible * self.visible_bias).sum(-1) + (hidden * fields).sum(-1)

    # The partition function and the density

    def exact_log_partition(self) -> Tensor:
        """Compute log Z and its gradient by summing over a layer of at most 20 units."""
        return exact_log_partition(*self._parameters)

    @property
    def log_partition(self) -> Tensor | None:
        """The stored log Z in nats, if there is one."""
        stored = self._log_partition
        stored = stored() if callable(stored) else stored
        return stored if stored is None else torch.as_tensor(stored).to(self.weight)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(v) in nats, with the gradient described above, for bits (*S, *B, V).

        Raises:
            ValueError: if the value is not of bits, or log Z or its gradient is unknown.
        """
        visible = self._bits(value, "log_prob", "value", self.visible_bias)
        energy = free_energy(visible, *self._parameters)
        log_prob = -energy - self._log_partition_and_gradient(visible)
        return log_prob.expand(np.broadcast_shapes(log_prob.shape, self.batch_shape))

    def _log_partition_and_gradient(self, scored: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters)
        if learning and self._negatives is None and self._is_small:
            return self.exact_log_partition()
        value = self.log_partition
        if value is None and self._is_small:
            with torch.no_grad():
                value = self.exact_log_partition()
        if value is None:
            raise ValueError(
                f"RBM.log_prob: log Z is unknown and no layer has {MAX_UNITS} units or fewer; pass "
                "log_partition=, for example from pyroboost.sampling.annealed_log_partition."
            )
        if not learning or value.requires_grad:
            return value
        negatives = self._negatives
        if negatives is None:
            raise ValueError(
                "RBM.log_prob: the gradient of log Z is unknown; pass samples of the model as "
                "negatives=, or evaluate under torch.no_grad()."
            )
        if not isinstance(negatives, Tensor):
            negatives = self._check_negatives(negatives(scored.detach()))
        machine = self.T if self._mirrored else self
        surrogate = -free_energy(negatives.to(self.weight), *machine._parameters).mean(0)
        return value + (surrogate - surrogate.detach())

    def _check_negatives(self, negatives: Tensor) -> Tensor:
        units = self.weight.shape[-1 if self._mirrored else -2]
        expected = (*self._own_batch, units)
        if negatives.shape[1:] != expected or not len(negatives):
            raise ValueError(
                f"RBM: negatives have shape {tuple(negatives.shape)}; give visible samples of "
                f"every machine, (S, {', '.join(map(str, expected))})."
            )
        return negatives

    # Samples

    @property
    def _is_small(self) -> bool:
        return min(self.weight.shape[-2:]) <= MAX_UNITS

    @property
    def sampling(self) -> str:
        """How `sample` draws: "exact", or the number of Gibbs sweeps."""
        return "exact" if self._is_small else f"{self.sweeps} Gibbs sweeps"

    @torch.no_grad()
    def sample(self, sample_shape: Any = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draw visible states, exact or after `sweeps` Gibbs sweeps as `sampling` says.

        Args:
            sample_shape: shape (*S) of the draws.
            generator: source of randomness on the device of the weights; torch's own by default.

        Returns:
            Zeros and ones in the type of the weights.  # (*S, *B, V)
        """
        parameters: Any = self._parameters
        own = self._own_batch
        if self.batch_shape[len(self.batch_shape) - len(own) :] != own:
            own = self.batch_shape  # a dimension of size one was expanded: each copy draws
            layers = zip(parameters, (1, 1, 2), strict=True)
            parameters = [p.expand(*own, *p.shape[-k:]) for p, k in layers]
        leading = (*sample_shape, *self.batch_shape[: len(self.batch_shape) - len(own)])
        count = max(1, torch.Size(leading).numel())
        if self._is_small:
            visible, _ = exact_samples(*parameters, num_samples=count, generator=generator)
        else:
            start = draw_bits(parameters[0].expand(count, *own, -1), generator=generator)
            visible, _ = block_gibbs(start, *parameters, sweeps=self.sweeps, generator=generator)
        return visible[: torch.Size(leading).numel()].reshape(*leading, *own, *self.event_shape)

    def gibbs(
        self, visible: Tensor, sweeps: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Run Gibbs sweeps from given visible states (*S, *B, V) and return the last."""
        visible = self._bits(visible, "gibbs", "visible", self.visible_bias)
        return block_gibbs(visible, *self._parameters, sweeps=sweeps, generator=generator)[0]

    @property
    def has_enumerate_support(self) -> bool:
        """Whether the visible layer has at most 20 units."""
        return self.event_shape[0] <= MAX_UNITS

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """List all visible states, (2**V, *B, V)."""
        if not self.has_enumerate_support:
            units = self.event_shape[0]
            raise NotImplementedError(
                f"RBM.enumerate_support: {units} visible units have too many states to list."
            )
        states = binary_states(self.event_shape[0]).to(self.weight)
        states = states.view(-1, *(1 for _ in self.batch_shape), *self.event_shape)
        return states.expand(-1, *self.batch_shape, -1) if expand else states

    def _bits(self, value: Tensor, method: str, name: str, bias: Tensor) -> Tensor:
        """Check states of a layer and give them the type of the weights."""
        expected = (*self.batch_shape, bias.shape[-1])
        try:
            fits = value.shape[-1:] == bias.shape[-1:]
            np.broadcast_shapes(value.shape, expected)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"RBM.{method}: {name} has shape {tuple(value.shape)}; give one that broadcasts "
                f"with {expected}, samples on the left and the {bias.shape[-1]} units last."
            )
        if self._validate_args and not is_binary(value):
            raise ValueError(
                f"RBM.{method}: {name} has entries other than 0 and 1 (or NaN); binarise it first."
            )
        return value.to(self.weight)

    def __repr__(self) -> str:
        missing = "exact" if self._is_small else "unknown"
        log_partition = missing if self._log_partition is None else "stored"
        units = f"num_visible={self.event_shape[0]}, num_hidden={self.hidden_bias.shape[-1]}"
        batch = f", batch_shape={tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"RBM({units}{batch}, log_partition={log_partition}, sampling={self.sampling})"
