r"""Annealed importance sampling of the partition function of bipartite binary energies.

The path from a model without couplings, whose partition function is known, to the model in
question interpolates all parameters in proportion to the inverse temperature. One layer is summed
out analytically, so the weights and the chain are those of the other layer alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyroboost.sampling.gibbs import check_parameters, draw_bits, field
from pyroboost.sampling.importance import log_mean_exp

__all__ = ["AnnealedEstimate", "annealed_log_partition", "reverse_annealed_log_partition"]

Start = Literal["uniform", "biases"] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AnnealedEstimate:
    """An estimate of log Z from weighted annealed chains.

    Attributes:
        log_partition: the estimate of log Z, in nats.  # (*B,)
        std_error: its standard error by the delta method on natural-scale weights.  # (*B,)
        ess: effective sample size of the chains.  # (*B,)
        log_weights: log weights whose natural-scale mean estimates Z after a forward run and 1/Z
            after a reverse run.  # (S, *B)
        visible: visible states at the end of the chains.  # (S, *B, V)
        hidden: hidden states at the end of the chains.  # (S, *B, H)
        direction: "forward", or "reverse".
    """

    log_partition: Tensor
    std_error: Tensor
    ess: Tensor
    log_weights: Tensor
    visible: Tensor
    hidden: Tensor
    direction: Literal["forward", "reverse"]


@torch.no_grad()
def annealed_log_partition(
    visible_bias: Tensor,
    hidden_bias: Tensor,
    weight: Tensor,
    *,
    num_chains: int = 1000,
    num_temperatures: int = 1000,
    inverse_temperatures: Tensor | None = None,
    start: Start = "uniform",
    generator: torch.Generator | None = None,
) -> AnnealedEstimate:
    r"""Estimate log Z by chains annealed from a model without couplings to the model itself.

    .. math:: \hat Z = Z_0 \frac{1}{S} \sum_s \prod_{k=1}^{K}
        \frac{p^*_{\beta_k}(v^s_{k-1})}{p^*_{\beta_{k-1}}(v^s_{k-1})},
        \qquad v^s_k \sim T_{\beta_k}(v \mid v^s_{k-1}),

    where :math:`p^*_\beta(v)` is the unnormalised marginal with the other layer summed out and T
    is one Gibbs sweep. The mean is unbiased for Z; log Z is therefore underestimated on average
    (a stochastic lower bound), which makes likelihoods that use it optimistic: an estimate, not
    a bound.

    Args:
        visible_bias: biases b.  # (*B, V)
        hidden_bias: biases c.  # (*B, H)
        weight: couplings W.  # (*B, V, H)
        num_chains: number of independent chains S.
        num_temperatures: number of equally spaced inverse temperatures, 0 and 1 included.
        inverse_temperatures: a schedule of one's own, rising from 0 to 1.  # (K + 1,)
        start: "uniform" begins at independent fair bits, "biases" at the model's own biases
            without couplings, a pair of biases at those, for example at the log odds of data.
        generator: source of randomness on the device of the weights; torch's own by default.

    Returns:
        log Z with standard error, effective sample size, log weights and the chains' last
        states, which are approximate samples of the model.

    Raises:
        ValueError: if shapes, schedule or start do not fit.

    Example:
        >>> parameters = torch.zeros(3), torch.zeros(2), torch.zeros(3, 2)
        >>> estimate = annealed_log_partition(*parameters, num_chains=10)
        >>> estimate.log_weights.shape
        torch.Size([10])
        >>> bool(torch.isclose(estimate.log_partition, 5 * torch.tensor(2.0).log()))
        True

    Reference:
        Salakhutdinov and Murray, On the quantitative analysis of deep belief networks (2008),
        section 4.1.
    """
    path = _Path("annealed_log_partition", visible_bias, hidden_bias, weight, start)
    schedule = _schedule("annealed_log_partition", num_temperatures, inverse_temperatures)
    if num_chains < 1:
        raise ValueError(
            f"annealed_log_partition: num_chains is {num_chains}; ask for at least one chain."
        )
    log_weights, state = path.anneal(path.independent(num_chains, generator), schedule, generator)
    return path.estimate(path.log_partition_start() + log_weights, state, "forward", generator)


@torch.no_grad()
def reverse_annealed_log_partition(
    visible_bias: Tensor,
    hidden_bias: Tensor,
    weight: Tensor,
    *,
    samples: Tensor,
    num_temperatures: int = 1000,
    inverse_temperatures: Tensor | None = None,
    start: Start = "uniform",
    generator: torch.Generator | None = None,
) -> AnnealedEstimate:
    r"""Estimate log Z by chains annealed from samples of the model down to one without couplings.

    .. math:: \hat Z^{-1} = Z_0^{-1} \frac{1}{S} \sum_s \prod_{k=1}^{K}
        \frac{p^*_{\beta_{k-1}}(v^s_k)}{p^*_{\beta_k}(v^s_k)}

    With exact samples of the model the mean is unbiased for 1/Z, so log Z is overestimated on
    average: a stochastic upper bound that brackets log Z together with a forward run. Samples of
    a Markov chain that has not mixed give no bound in either direction; the distance to the
    forward run is then a diagnostic only.

    Args:
        visible_bias: biases b.  # (*B, V)
        hidden_bias: biases c.  # (*B, H)
        weight: couplings W.  # (*B, V, H)
        samples: exact visible samples of the model, one per chain.  # (S, *B, V)
        num_temperatures: number of equally spaced inverse temperatures, 0 and 1 included.
        inverse_temperatures: a schedule of one's own, rising from 0 to 1, as in a forward run;
            it is followed backwards.  # (K + 1,)
        start: the model without couplings at which the run ends; see `annealed_log_partition`.
        generator: source of randomness on the device of the weights; torch's own by default.

    Returns:
        log Z with standard error, effective sample size, the log weights (whose mean estimates
        1/Z) and the chains' last states.

    Raises:
        ValueError: if shapes, schedule or start do not fit.

    Example:
        >>> samples = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
        >>> model = torch.zeros(3), torch.zeros(2), torch.zeros(3, 2)
        >>> upper = reverse_annealed_log_partition(*model, samples=samples, num_temperatures=5)
        >>> bool(torch.isclose(upper.log_partition, 5 * torch.tensor(2.0).log()))
        True

    Reference:
        Burda, Grosse and Salakhutdinov, Accurate and conservative estimates of MRF
        log-likelihood using reverse annealing (2015), section 3.
    """
    path = _Path("reverse_annealed_log_partition", visible_bias, hidden_bias, weight, start)
    schedule = _schedule("reverse_annealed_log_partition", num_temperatures, inverse_temperatures)
    expected = (*path.batch_shape, visible_bias.shape[-1])
    if samples.dim() != 1 + len(expected) or samples.shape[1:] != expected or not len(samples):
        raise ValueError(
            f"reverse_annealed_log_partition: samples have shape {tuple(samples.shape)}; "
            f"give one visible state per chain, (S, {', '.join(map(str, expected))})."
        )
    state = samples.to(weight.dtype, copy=True)
    if path.flipped:
        state = draw_bits(field(state, weight) + hidden_bias, generator=generator)
    log_weights, state = path.anneal(state, schedule[::-1], generator)
    return path.estimate(log_weights - path.log_partition_start(), state, "reverse", generator)


class _Path:
    """The models between one without couplings (0) and the one in question (1).

    The layer with more units carries the chain and the one with fewer is summed out, which costs
    least, since each step sums over that layer at two temperatures.
    """

    def __init__(
        self, where: str, visible_bias: Tensor, hidden_bias: Tensor, weight: Tensor, start: Start
    ) -> None:
        self.batch_shape = check_parameters(where, visible_bias, hidden_bias, weight)
        ends = (visible_bias, hidden_bias)
        begins = _start_biases(where, start, visible_bias, hidden_bias)
        self.flipped = weight.shape[-1] > weight.shape[-2]
        if self.flipped:
            begins, ends, weight = begins[::-1], ends[::-1], weight.mT
        self.weight = weight
        self.kept, self.summed = zip(begins, ends, strict=True)

    def log_partition_start(self) -> Tensor:
        """Return the known log Z of the model without couplings, in double precision."""
        kept, summed = self.kept[0].double(), self.summed[0].double()
        return _softplus(kept).sum(-1) + _softplus(summed).sum(-1)

    def independent(self, num_chains: int, generator: torch.Generator | None) -> Tensor:
        """Draw the layer that carries the chain from the model without couplings."""
        logits = self.kept[0].expand(num_chains, *self.batch_shape, -1)
        return draw_bits(logits, generator=generator)

    def draw_summed(self, state: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw the layer that is summed out from the model in question."""
        return draw_bits(field(state, self.weight) + self.summed[1], generator=generator)

    def anneal(
        self, state: Tensor, schedule: list[float], generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Move states, which are overwritten, along a schedule: log weights and last states."""
        log_weights = state.new_zeros(state.shape[:-1], dtype=torch.float64)
        drift = (self.kept[1] - self.kept[0]).unsqueeze(-1)
        free = state.new_empty(*state.shape[:-1], self.weight.shape[-1])
        here, ahead = torch.empty_like(free), torch.empty_like(free)
        for beta, following in pairwise(schedule):
            field(state, self.weight, out=free)
            torch.add(torch.lerp(*self.summed, beta), free, alpha=beta, out=here)
            torch.add(torch.lerp(*self.summed, following), free, alpha=following, out=ahead)
            # Units are subtracted before they are summed: the sums alone would lose digits.
            log_weights += (_softplus(ahead) - _softplus(here)).sum(-1)
            log_weights += (following - beta) * field(state, drift).squeeze(-1)
            other = draw_bits(ahead, generator=generator, out=ahead)
            field(other, self.weight.mT, out=state)
            torch.add(torch.lerp(*self.kept, following), state, alpha=following, out=state)
            draw_bits(state, generator=generator, out=state)
        return log_weights, state

    def estimate(
        self,
        log_weights: Tensor,
        state: Tensor,
        direction: Literal["forward", "reverse"],
        generator: torch.Generator | None,
    ) -> AnnealedEstimate:
        """Average the weights and name the two layers."""
        mean = log_mean_exp(log_weights)
        sign = 1.0 if direction == "forward" else -1.0
        layers = (state, self.draw_summed(state, generator))
        visible, hidden = layers[::-1] if self.flipped else layers
        dtype = self.weight.dtype
        value, error, ess = (number.to(dtype) for number in (sign * mean.value, *mean[1:]))
        return AnnealedEstimate(
            value, error, ess, log_weights.to(dtype), visible, hidden, direction
        )


def _softplus(logits: Tensor) -> Tensor:
    # Beyond torch's own threshold of 20 the linear branch would be wrong in double precision.
    return softplus(logits, threshold=50.0)


def _start_biases(
    where: str, start: Start, visible_bias: Tensor, hidden_bias: Tensor
) -> tuple[Tensor, Tensor]:
    ends = (visible_bias, hidden_bias)
    if start == "biases":
        return ends
    if start == "uniform":
        return torch.zeros_like(visible_bias), torch.zeros_like(hidden_bias)
    if isinstance(start, tuple) and len(start) == 2:
        try:
            visible, hidden = (
                bias.to(end).expand_as(end) for bias, end in zip(start, ends, strict=True)
            )
            return visible, hidden
        except RuntimeError:
            pass  # told below, with the shapes that would do
    raise ValueError(
        f"{where}: start is not understood; give 'uniform', 'biases' or a pair of tensors that "
        f"broadcast to the biases, {tuple(visible_bias.shape)} and {tuple(hidden_bias.shape)}."
    )


def _schedule(
    where: str, num_temperatures: int, inverse_temperatures: Tensor | None
) -> list[float]:
    if inverse_temperatures is None:
        if num_temperatures < 2:
            raise ValueError(
                f"{where}: num_temperatures is {num_temperatures}; 0 and 1 are the least, so "
                "give at least 2."
            )
        inverse_temperatures = torch.linspace(0.0, 1.0, num_temperatures, dtype=torch.float64)
    schedule = inverse_temperatures.double().tolist()
    rising = all(a <= b for a, b in pairwise(schedule))
    if inverse_temperatures.dim() != 1 or len(schedule) < 2 or not rising:
        raise ValueError(f"{where}: inverse_temperatures must be one rising list of numbers.")
    if schedule[0] != 0.0 or schedule[-1] != 1.0:
        raise ValueError(
            f"{where}: inverse_temperatures run from {schedule[0]} to {schedule[-1]}; they must "
            "begin at 0 and end at 1."
        )
    return schedule
