"""Parameters, chains and partition function of an RBM, and the Pyro programs over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroboost import distributions
from pyroboost.contexts import forked_rng
from pyroboost.models._contrast import contrast
from pyroboost.sampling import annealed_log_partition, block_gibbs, draw_bits, exact_log_partition
from pyroboost.sampling.enumeration import MAX_UNITS
from pyroboost.sampling.gibbs import field, is_binary

NegativePhase = Literal["pcd", "cd", "exact"]

_UNKNOWN, _EXACT = -1, 0


class Machine(nn.Module):
    """One RBM with its persistent chains and its stored log Z.

    The chains are hidden states: a sweep draws the visible layer given them, which are the
    negative samples, and then the hidden layer anew. The stored log Z belongs to the parameters
    kept beside it; where those differ from the present ones it is stale.
    """

    chains: Tensor | None
    log_partition: Tensor
    log_partition_error: Tensor
    log_partition_ess: Tensor
    log_partition_chains: Tensor
    evaluated: Tensor
    baseline: Tensor

    def __init__(
        self,
        visible_bias: Tensor,
        hidden_bias: Tensor,
        weight: Tensor,
        *,
        negative_phase: NegativePhase,
        num_chains: int,
        sweeps: int,
        sampling_sweeps: int,
        names: tuple[str, str],
    ) -> None:
        super().__init__()
        self.visible_bias = nn.Parameter(visible_bias)
        self.hidden_bias = nn.Parameter(hidden_bias)
        self.weight = nn.Parameter(weight)
        self.negative_phase, self.sweeps = negative_phase, sweeps
        self.sampling_sweeps, self.names = sampling_sweeps, names
        chains = draw_bits(hidden_bias.expand(num_chains, -1)) if negative_phase == "pcd" else None
        self.register_buffer("chains", chains)
        for name in ("log_partition", "log_partition_error", "log_partition_ess", "baseline"):
            self.register_buffer(name, weight.new_tensor(math.nan))
        self.register_buffer("log_partition_chains", torch.tensor(_UNKNOWN, device=weight.device))
        self.register_buffer("evaluated", self.flat_parameters())
        self.forget()

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return visible biases, hidden biases and couplings."""
        return self.visible_bias, self.hidden_bias, self.weight

    def flat_parameters(self) -> Tensor:
        """Return a copy of all parameters in one vector."""
        return torch.cat([p.detach().reshape(-1) for p in self.tensors()])

    # The partition function

    @property
    def is_fresh(self) -> bool:
        """Whether the stored log Z is that of the present parameters."""
        return torch.equal(self.evaluated, self.flat_parameters())

    @property
    def method(self) -> str:
        """How the stored log Z was had."""
        chains = int(self.log_partition_chains)
        return {_UNKNOWN: "unknown", _EXACT: "exact"}.get(chains, f"AIS, {chains} chains")

    @torch.no_grad()
    def forget(self) -> None:
        """Mark log Z as unknown; its value is then that of the biases without couplings."""
        biases = torch.cat([self.visible_bias, self.hidden_bias])
        self.keep(nn.functional.softplus(biases).sum(), chains=_UNKNOWN)
        self.evaluated.fill_(math.nan)

    @torch.no_grad()
    def keep(
        self,
        value: Tensor,
        *,
        chains: int | Tensor,
        error: float | Tensor = math.nan,
        ess: float | Tensor = math.nan,
    ) -> None:
        """Store log Z of the present parameters."""
        self.log_partition.copy_(value)
        self.log_partition_error.fill_(error)
        self.log_partition_ess.fill_(ess)
        self.log_partition_chains.fill_(chains)
        self.evaluated.copy_(self.flat_parameters())

    @torch.no_grad()
    def estimate(
        self,
        num_chains: int,
        num_temperatures: int,
        start: Literal["uniform", "biases"],
        generator: torch.Generator | None,
    ) -> None:
        """Compute log Z exactly where a layer is small, else by annealed importance sampling."""
        parameters = [p.detach() for p in self.tensors()]
        if min(self.weight.shape) <= MAX_UNITS:
            self.keep(exact_log_partition(*parameters), chains=_EXACT, error=0.0)
            return
        with forked_rng():  # evaluation must not change what training draws next
            found = annealed_log_partition(
                *parameters,
                num_chains=num_chains,
                num_temperatures=num_temperatures,
                start=start,
                generator=generator,
            )
        self.keep(found.log_partition, chains=num_chains, error=found.std_error, ess=found.ess)

    @torch.no_grad()
    def carry_over(self, below: Machine) -> None:
        """Take log Z and chains from a machine whose layers this one exchanges."""
        self.keep(
            below.log_partition,
            chains=below.log_partition_chains,
            error=below.log_partition_error,
            ess=below.log_partition_ess,
        )
        if self.chains is not None and below.chains is not None:
            # A hidden chain here is a visible state there.
            states = draw_bits(field(below.chains, below.weight.mT) + below.visible_bias)
            self.chains.copy_(states[torch.arange(len(self.chains)) % len(states)])

    def known_log_partition(self) -> Tensor:
        """Return the stored log Z; a stale one only while gradients are recorded."""
        if not (torch.is_grad_enabled() or self.is_fresh):
            state = "unknown" if self.method == "unknown" else "out of date"
            raise ValueError(
                f"RBM: log Z is {state} for the present parameters, so there is no likelihood; "
                "call .refresh() on the RBM, or on the composition that holds it, first."
            )
        return self.log_partition

    # The negative phase

    def law(self, *, mirrored: bool = False) -> distributions.RBM:
        """Return the RBM as a distribution, with this execution's negative samples."""
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.tensors())
        negatives: Tensor | Callable[[Tensor], Tensor] | None = None
        if learning and self.negative_phase == "pcd":
            negatives = self.advance()
        elif learning and self.negative_phase == "cd":
            negatives = self.reconstruct_hidden if mirrored else self.reconstruct
        rbm = distributions.RBM(
            *self.tensors(),
            log_partition=self.known_log_partition,
            negatives=negatives,
            sweeps=self.sampling_sweeps,
        )
        return rbm.T if mirrored else rbm

    @torch.no_grad()
    def advance(self) -> Tensor:
        """Run the chains on and return their visible states; in eval mode they stay in place."""
        assert self.chains is not None
        visible_bias, hidden_bias, weight = self.tensors()
        hidden, visible = block_gibbs(
            self.chains, hidden_bias, visible_bias, weight.mT, sweeps=self.sweeps
        )
        if self.training:
            self.chains.copy_(hidden)
        return visible

    def reconstruct(self, visible: Tensor) -> Tensor:
        """Run chains from data."""
        flat = visible.reshape(-1, visible.shape[-1])
        return block_gibbs(flat, *self.tensors(), sweeps=self.sweeps)[0]

    def reconstruct_hidden(self, hidden: Tensor) -> Tensor:
        """Run chains from hidden states drawn given data: the first half sweep is done."""
        visible_bias, hidden_bias, weight = self.tensors()
        flat = hidden.reshape(-1, hidden.shape[-1])
        return block_gibbs(flat, hidden_bias, visible_bias, weight.mT, sweeps=self.sweeps)[1]

    # Pyro programs

    def model(self, x: Tensor) -> None:
        """Draw h from its marginal and score x given h."""
        self.check(x)
        hidden_law = self.law(mirrored=True)
        visible, hidden = self.names
        with pyro.plate("data", x.shape[-2], device=x.device):
            h = pyro.sample(hidden, hidden_law)
            pyro.sample(visible, hidden_law.hidden_given(h), obs=x.to(self.weight.dtype))

    def guide(self, x: Tensor) -> None:
        """Draw h from the exact posterior, whose own score has mean zero and is left out."""
        self.check(x)
        logits = (field(x.to(self.weight), self.weight) + self.hidden_bias).detach()
        with pyro.plate("data", x.shape[-2], device=x.device):
            pyro.sample(self.names[1], dist.Bernoulli(logits=logits).to_event(1))

    def recognition(self, x: Tensor) -> None:
        """Draw h as the guide does, with the gradient of its score."""
        self.check(x)
        logits = field(x.to(self.weight), self.weight) + self.hidden_bias
        infer = {"baseline": {"nn_baseline": self.average_cost, "nn_baseline_input": x}}
        with pyro.plate("data", x.shape[-2], device=x.device):
            pyro.sample(self.names[1], dist.Bernoulli(logits=logits).to_event(1), infer=infer)

    def average_cost(self, x: Tensor) -> Tensor:
        """Return a decaying average of the cost per datum as a baseline for the score.

        Pyro's own average is kept by position in the batch, and so breaks on a last batch that
        is smaller. Here the gradient of Pyro's squared error of the baseline moves the average.
        """
        shape = x.shape[:-1]
        while shape and shape[0] == 1:  # so Pyro shapes the cost
            shape = shape[1:]
        known = not bool(self.baseline.isnan())
        level = self.baseline.nan_to_num().requires_grad_()

        def follow(gradient: Tensor) -> None:
            mean = level.detach() - gradient / (2 * shape.numel())
            self.baseline.copy_(torch.lerp(self.baseline, mean, 0.1) if known else mean)

        level.register_hook(follow)  # type: ignore[no-untyped-call]
        return level.expand(shape)

    def marginal(self, x: Tensor) -> None:
        """Score x with h summed out."""
        self.check(x)
        with pyro.plate("data", x.shape[-2], device=x.device):
            pyro.sample(self.names[0], self.law(), obs=x.to(self.weight.dtype))

    def loss(
        self, model: object, guide: object, x: Tensor, *args: object, weights: Tensor | None = None
    ) -> Tensor:
        """Return minus log m(x) summed over data: the bound of the exact guide, without noise.

        Weights multiply the terms of the data, as in the training loop.
        """
        self.check(x)
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.tensors())
        if self.negative_phase != "pcd" or not learning:
            values = self.law().log_prob(x)
            return -(values if weights is None else weights * values).sum()
        return self._persistent_loss(x.to(self.weight), weights)

    def _persistent_loss(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Compute the loss with one product each way for data and chains together."""
        assert self.chains is not None
        visible_bias, _, weight = (p.detach() for p in self.tensors())
        logits = torch.addmm(visible_bias, self._earlier_sweeps(), weight.mT)
        rows = torch.cat([x.reshape(-1, x.shape[-1]), draw_bits(logits, out=logits)])
        num_data = len(rows) - len(logits)
        if weights is not None:
            weights = weights.to(rows)
        loss, fields = contrast(*self.tensors(), rows, num_data, weights)
        if self.training:
            # The product that the chains' free energy needs is also their next half sweep.
            draw_bits(fields[num_data:], out=self.chains)
        return loss + (num_data if weights is None else weights.sum()) * self.log_partition

    def _earlier_sweeps(self) -> Tensor:
        """Return the chains after all sweeps of a step but the last."""
        assert self.chains is not None
        if self.sweeps == 1:
            return self.chains
        visible_bias, hidden_bias, weight = self.tensors()
        biases = hidden_bias, visible_bias
        return block_gibbs(self.chains, *biases, weight.mT, sweeps=self.sweeps - 1)[0]

    def check(self, x: Tensor) -> None:
        """Refuse data that are not rows of bits."""
        units = self.weight.shape[-2]
        if x.dim() < 2 or x.shape[-1] != units:
            raise ValueError(
                f"RBM: data of shape {tuple(x.shape)} came for '{self.names[0]}'; it takes "
                f"(N, {units})."
            )
        if pyro.settings.get("validate_distributions_torch"):
            if not is_binary(x):
                raise ValueError(
                    f"RBM: '{self.names[0]}' holds values other than 0 and 1 (or NaN); binarise "
                    "the data first."
                )
