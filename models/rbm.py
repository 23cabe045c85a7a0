"""The restricted Boltzmann machine as a meta-model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pyroboost import distributions
from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel
from pyroboost.models._machine import Machine, NegativePhase
from pyroboost.program import Program
from pyroboost.sampling.enumeration import MAX_UNITS
from pyroboost.sampling.gibbs import draw_bits, field

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
        sizes = {
            "num_visible": num_visible,
            "num_hidden": num_hidden,
            "num_chains": num_chains,
            "sweeps": sweeps,
            "sampling_sweeps": sampling_sweeps,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"RBM: {name} is {value}; it must be at least 1.")
        if negative_phase not in ("pcd", "cd", "exact"):
            raise ValueError(
                f"RBM: negative_phase is {negative_phase!r}; it must be 'pcd', 'cd' or 'exact'."
            )
        if negative_phase == "exact" and min(num_visible, num_hidden) > MAX_UNITS:
            raise ValueError(
                f"RBM: the exact negative phase sums over the smaller layer, which has "
                f"{min(num_visible, num_hidden)} units; use 'pcd' above {MAX_UNITS}."
            )
        machine = Machine(
            *_parameters(num_visible, num_hidden, weight_scale, start),
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
        if start is not None:
            self._carry_over(start)

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

    def _carry_over(self, below: RBM) -> None:
        """Take log Z and chains over from the RBM whose layers this one exchanges."""
        below.refresh()
        mine, theirs = self._machine, below._machine
        mine.keep(
            theirs.log_partition,
            chains=theirs.log_partition_chains,
            error=theirs.log_partition_error,
            ess=theirs.log_partition_ess,
        )
        if mine.chains is not None and theirs.chains is not None:
            # A hidden chain here is a visible state there.
            states = draw_bits(field(theirs.chains, theirs.weight.mT) + theirs.visible_bias)
            mine.chains.copy_(states[torch.arange(len(mine.chains)) % len(states)])

    # Parameters and programs

    @property
    def _machine(self) -> Machine:
        machine: Machine = self.model.parts[0]  # type: ignore[assignment, index]
        return machine

    @property
    def visible_bias(self) -> Tensor:
        """Visible biases b.  # (V,)."""
        return self._machine.visible_bias

    @property
    def hidden_bias(self) -> Tensor:
        """Hidden biases c.  # (H,)."""
        return self._machine.hidden_bias

    @property
    def weight(self) -> Tensor:
        """Couplings W.  # (V, H)."""
        return self._machine.weight

    @property
    def num_visible(self) -> int:
        """Number of visible units."""
        return self.weight.shape[0]

    @property
    def num_hidden(self) -> int:
        """Number of hidden units."""
        return self.weight.shape[1]

    @property
    def chains(self) -> Tensor | None:
        """Hidden states of the persistent chains, if there are any.  # (num_chains, H)."""
        return self._machine.chains

    @property
    def recognition(self) -> Program:
        """The guide with the gradient of its score, for use below another stage.

        There the guide is no longer the posterior of the joint that is scored, and a detached
        one would miss part of the gradient.
        """
        return self._recognition

    @property
    def marginal(self) -> Callable[..., Any]:
        """A program that scores x with h summed out."""
        return self._marginal

    def objective(self) -> Callable[..., Tensor]:
        """Return minus log m(x), summed over the batch, with the gradient of the negative phase.

        It is the bound of the pair with h summed out, which leaves less noise and less work.
        """
        return self._machine.loss

    @torch.no_grad()
    def init_visible_bias(self, data: Tensor) -> RBM:
        """Set the visible biases to the log odds of data, one count added to either side.

        Args:
            data: bits.  # (N, V)

        Returns:
            This RBM.
        """
        self._machine.check(data)
        ones = data.to(self.weight).sum(0) + 1.0
        self.visible_bias.copy_(torch.logit(ones / (len(data) + 2.0)))
        self._machine.forget()
        return self

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
        chains = int(self._machine.log_partition_chains)
        return {-1: "unknown", 0: "exact"}.get(chains, f"AIS, {chains} chains")

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
            self._machine.refresh(
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

    def distribution(self) -> distributions.RBM:
        """Return the RBM as a distribution over its visible layer."""
        with torch.no_grad():
            return self._machine.law()

    def extra_repr(self) -> str:
        """Name the sites, the sizes, the negative phase and the state of log Z."""
        machine = self._machine
        known = self.log_partition_method if self.is_fresh else "stale"
        return (
            f"{super().extra_repr()}, num_visible={self.num_visible}, "
            f"num_hidden={self.num_hidden}, negative_phase='{machine.negative_phase}', "
            f"log_partition={known}"
        )


def _parameters(
    num_visible: int, num_hidden: int, weight_scale: float, start: RBM | None
) -> tuple[Tensor, Tensor, Tensor]:
    if start is None:
        weight = weight_scale * torch.randn(num_visible, num_hidden)
        return torch.zeros(num_visible), torch.zeros(num_hidden), weight
    if (start.num_hidden, start.num_visible) != (num_visible, num_hidden):
        raise ValueError(
            f"RBM: start has {start.num_visible} visible and {start.num_hidden} hidden units, so "
            f"its exchange has {start.num_hidden} and {start.num_visible}, not {num_visible} and "
            f"{num_hidden}; use RBM.transposed(below)."
        )
    # The copy keeps the memory order of the couplings, so that products round alike.
    parameters = (start.hidden_bias, start.visible_bias, start.weight.mT)
    return tuple(p.detach().clone() for p in parameters)  # type: ignore[return-value]
