"""The restricted Boltzmann machine as a meta-model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyroboost import distributions
from pyroboost.likelihood import Kind, Likelihood
from pyroboost.metamodel import MetaModel
from pyroboost.models._machine import Machine, NegativePhase
from pyroboost.models._rbm_start import check_settings, initial_parameters
from pyroboost.program import Program

__all__ = ["RBM"]


class RBM(MetaModel):
    r"""A restricted Boltzmann machine over bits.

    $$m(x, h) = \tfrac{1}{Z} e^{b^\top x + c^\top h + x^\top W h}, \qquad
    q(h \mid x) = m(h \mid x)$$

    As a pair: the model draws h from its marginal and x given h; the guide is the exact
    posterior, so that every importance weight is m(x). Any ELBO's gradient is, in expectation over
    h, that of the chosen negative phase:

    1. ``"pcd"``: persistent chains, kept in buffers, that advance ``sweeps`` Gibbs sweeps in each
       execution of the model that records gradients in training mode, and in no other.
    2. ``"cd"``: chains of ``sweeps`` sweeps that start at the data.
    3. ``"exact"``: the sum over a layer of at most 20 units.

    **log Z** is stored with the parameters it belongs to. Training needs only its gradient, so
    the stored value stands while gradients are recorded; a likelihood (no gradients) of changed
    parameters is refused until :meth:`refresh` has been called.

    Args:
        num_visible: number of visible units V.
        num_hidden: number of hidden units H.
        negative_phase: how the gradient of log Z is had, as listed above.
        num_chains: number of persistent chains.
        sweeps: Gibbs sweeps of the chains in one step of training.
        sampling_sweeps: Gibbs sweeps of ``sample`` where both layers have more than 20 units;
            with fewer, samples are exact.
        weight_scale: standard deviation of the initial couplings.
        start: an RBM whose layers are exchanged to begin with, see :meth:`transposed`.
        visible: name of the visible site.
        hidden: name of the hidden site.

    Raises:
        ValueError: sizes or settings that do not fit.

    Example:
        >>> rbm = RBM(784, 16)
        >>> rbm.refresh()
        >>> rbm.log_marginal(torch.zeros(3, 784)).kind
        'exact'
        >>> rbm.encode(torch.zeros(3, 784)).shape, rbm.sample(2).shape
        (torch.Size([3, 16]), torch.Size([2, 784]))

    Reference:
        Tieleman (2008), persistent contrastive divergence; Hinton (2002), contrastive divergence.
    """

    def __init__(
        self,
        num_visible: int,
        num_hidden: int,
        *,
        negative_phase: NegativePhase = "pcd",
        num_chains: int = 100,
        sweeps: int = 1,
        sampling_sweeps: int = 200,
        weight_scale: float = 0.01,
        start: RBM | None = None,
        visible: str = "x",
        hidden: str = "h",
    ) -> None:
        check_settings(
            negative_phase,
            num_visible=num_visible,
            num_hidden=num_hidden,
            num_chains=num_chains,
            sweeps=sweeps,
            sampling_sweeps=sampling_sweeps,
        )
        below = None if start is None else start._machine.tensors()
        machine = Machine(
            *initial_parameters(num_visible, num_hidden, weight_scale, below),
            negative_phase=negative_phase,
            num_chains=num_chains,
            sweeps=sweeps,
            sampling_sweeps=sampling_sweeps,
            names=(visible, hidden),
        )
        super().__init__(
            machine.model,
            machine.guide,
            visible=visible,
            hidden=hidden,
            visible_shape=(num_visible,),
            hidden_shape=(num_hidden,),
        )
        self._recognition = Program(machine.recognition, "recognition")
        self._marginal = Program(machine.marginal, "marginal")
        self.num_visible, self.num_hidden = num_visible, num_hidden
        if start is not None:
            start.refresh()
            machine.carry_over(start._machine)

    @classmethod
    def transposed(cls, below: RBM, **options: Any) -> RBM:
        r"""Return an RBM over the hidden layer of the one below that starts as its exchange.

        Its biases are $c$ and $b$, its couplings $W^\top$ and its log Z the one below's, carried
        over and not estimated anew, so that $m_2(h) = m_1(h)$ and its term in the bound is
        exactly 0 before training. If the log Z below is stale it is refreshed first.

        Args:
            below: the RBM of the stage below.
            **options: keywords of :class:`RBM`.

        Example:
            >>> below = RBM(6, 4)
            >>> above = RBM.transposed(below)
            >>> h = torch.ones(3, 4)
            >>> bool((above.log_marginal(h).value == below.log_prior(h).value).all())
            True

        Reference:
            Hinton, Osindero and Teh, A fast learning algorithm for deep belief nets (2006).
        """
        return cls(below.num_hidden, below.num_visible, start=below, **options)

    def multiplied(
        self, parts: Sequence[MetaModel], powers: Sequence[float]
    ) -> tuple[RBM, float] | None:
        r"""Return the product of RBMs over one visible layer as one RBM, with its log Z.

        $$\prod_i e^{-a_i F_i(x)}: \qquad b = \sum_i a_i b_i, \qquad
        W = (\underbrace{W_1, \dots, W_1}_{a_1}, W_2, \dots)$$

        Biases add, hidden layers stand side by side, each so often as its power says. The new
        log Z is computed here; that of the product lacks the parts' own.

        Args:
            parts: the factors, this one first.
            powers: their powers.

        Returns:
            ``None`` where a power is not a positive integer, or a part is of another class.
        """
        machines = [part for part in parts if isinstance(part, RBM)]
        whole = all(power == round(power) and power >= 1 for power in powers)
        if len(machines) < len(parts) or not whole:
            return None
        times = [int(power) for power in powers]
        for machine in machines:
            machine.refresh()
        pairs = list(zip(machines, times, strict=True))
        with torch.no_grad():
            copies = [machine for machine, count in pairs for _ in range(count)]
            weight = torch.cat([machine.weight for machine in copies], 1)
            found = RBM(*weight.shape, visible=self.visible, hidden=self.hidden).to(weight)
            found.weight.copy_(weight)
            found.hidden_bias.copy_(torch.cat([machine.hidden_bias for machine in copies]))
            biases = torch.stack([machine.visible_bias for machine in copies])
            found.visible_bias.copy_(biases.sum(0))
        found.refresh()
        own = sum(count * float(machine.log_partition) for machine, count in pairs)
        return found, float(found.log_partition) - own

    # Parameters and programs

    @property
    def _machine(self) -> Machine:
        return self.model.parts[0]  # type: ignore[return-value]

    @property
    def visible_bias(self) -> Tensor:
        """Visible biases b, (V,)."""
        return self._machine.visible_bias

    @property
    def hidden_bias(self) -> Tensor:
        """Hidden biases c, (H,)."""
        return self._machine.hidden_bias

    @property
    def weight(self) -> Tensor:
        """Couplings W, (V, H)."""
        return self._machine.weight

    @property
    def chains(self) -> Tensor | None:
        """Hidden states of the persistent chains, (num_chains, H), if there are any."""
        return self._machine.chains

    @property
    def recognition(self) -> Program:
        """The guide with the gradient of its score: below another stage it is not exact."""
        return self._recognition

    @property
    def marginal(self) -> Callable[..., Any]:
        """A program that scores x with h summed out."""
        return self._marginal

    def objective(self) -> Callable[..., Tensor]:
        """Return minus log m(x) summed over the batch: the bound with h summed out, less noisy."""
        return self._machine.loss

    @torch.no_grad()
    def init_visible_bias(self, data: Tensor) -> None:
        """Set the visible biases to the log odds of data, one count added to either side.

        Args:
            data: bits.  # (N, V)
        """
        self._machine.check(data)
        ones = data.to(self.weight).sum(0) + 1.0
        self.visible_bias.copy_(torch.logit(ones / (len(data) + 2.0)))
        self._machine.forget()

    def distribution(self) -> distributions.RBM:
        """Return the RBM as a distribution over its visible layer."""
        with torch.no_grad():
            return self._machine.law()

    # Likelihood

    @property
    def is_fresh(self) -> bool:
        """Whether the stored log Z is that of the present parameters."""
        return self._machine.is_fresh

    @property
    def log_partition(self) -> Tensor:
        """The stored log Z in nats, fresh or not."""
        return self._machine.log_partition

    @property
    def log_partition_error(self) -> float:
        """Standard error of the stored log Z in nats; 0 where it is exact, NaN while unknown."""
        return float(self._machine.log_partition_error)

    @property
    def log_partition_method(self) -> str:
        """How the stored log Z was had: "unknown", "exact" or "AIS, <n> chains"."""
        return self._machine.method

    def refresh(
        self,
        *,
        num_chains: int | None = None,
        num_temperatures: int | None = None,
        start: Literal["uniform", "biases"] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Bring log Z up to date: exactly where a layer has at most 20 units, else by AIS.

        Without arguments a fresh log Z is kept as it is. Torch's random state is left unmoved.

        Args:
            num_chains: number of AIS chains; 100 by default.
            num_temperatures: number of AIS temperatures; 1,000 by default.
            start: where AIS begins, see :func:`pyroboost.sampling.annealed_log_partition`.
            generator: source of randomness.
        """
        asked = any(a is not None for a in (num_chains, num_temperatures, start, generator))
        if asked or not self.is_fresh:
            self._machine.estimate(
                num_chains or 100, num_temperatures or 1000, start or "uniform", generator
            )

    @torch.no_grad()
    def log_marginal(self, x: Tensor, *args: Any) -> Likelihood:
        r"""Return $\log m(x) = -F(x) - \log Z$ in nats, exact or an estimate as log Z is.

        Args:
            x: bits.  # (N, V)
            *args: none are used.

        Raises:
            ValueError: log Z is unknown or out of date.
        """
        self._machine.check(x)
        return self._likelihood(self._machine.law().log_prob(x))

    @torch.no_grad()
    def log_prior(self, h: Tensor, *args: Any, template: Tensor | None = None) -> Likelihood:
        r"""Return $\log m(h)$ in nats, exact or an estimate as log Z is.

        Args:
            h: bits.  # (N, H)
            *args: none are used.
            template: not needed.

        Raises:
            ValueError: log Z is unknown or out of date.
        """
        return self._likelihood(self._machine.law(mirrored=True).log_prob(h))

    def normalisation(self) -> tuple[Kind, float]:
        """Return how log Z is known: exactly, or as an estimate with a standard error in nats."""
        if int(self._machine.log_partition_chains) == 0:
            return "exact", 0.0
        return "estimate", self.log_partition_error

    def _likelihood(self, value: Tensor) -> Likelihood:
        machine = self._machine
        chains = int(machine.log_partition_chains)
        if chains == 0:
            return Likelihood(value, "exact")
        return Likelihood(
            value,
            "estimate",
            std_error=machine.log_partition_error.expand_as(value).clone(),
            ess=machine.log_partition_ess.expand_as(value).clone(),
            num_samples=chains,
            shared_error=float(machine.log_partition_error),
        )

    def extra_repr(self) -> str:
        """Name the sites, the sizes, the negative phase and the state of log Z."""
        known = self.log_partition_method if self.is_fresh else "stale"
        return (
            f"{super().extra_repr()}, num_visible={self.num_visible}, "
            f"num_hidden={self.num_hidden}, negative_phase='{self._machine.negative_phase}', "
            f"log_partition={known}"
        )
