"""Chains and other samples of a product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pyroboost.compose._proposals import Proposal, check_proposal, propose
from pyroboost.compose.densities import draw_rows
from pyroboost.compose.energy import Ratio
from pyroboost.contexts import evaluating, local_params
from pyroboost.sampling.chains import Chains
from pyroboost.sampling.metropolis import flip_gibbs, independence_metropolis

if TYPE_CHECKING:
    from pyroboost.compose._factors import Factors

__all__ = ["ChainMethod", "by_gibbs", "by_hmc", "by_metropolis", "differentiable"]

ChainMethod = Literal["metropolis", "gibbs", "hmc", "nuts"]


def pseudo_marginal(product: Factors, proposal: Proposal | None) -> tuple[bool, str]:
    """Tell whether chains leave the product itself invariant, and why."""
    estimated, powers = product.estimated, product.powers.tolist()
    if not estimated:
        return True, "all densities are exact"
    odd = [i for i in estimated if powers[i] != 1.0]
    if odd:
        return False, f"the estimated densities of parts {odd} have a power other than 1"
    if proposal == "mixture" or (
        isinstance(proposal, int) and proposal in estimated and powers[proposal] != 1.0
    ):
        return False, "the density of the proposal is estimated and does not cancel"
    return True, "pseudo-marginal: unbiased densities, of which the old estimate is kept"


def default_proposal(product: Factors) -> Proposal:
    """Return the mixture where all densities are exact, else a part that keeps the chain exact."""
    if not product.estimated:
        return "mixture"
    alone = [i for i in product.samplers if float(product.powers[i]) == 1.0]
    return alone[0] if alone else "mixture"


@torch.no_grad()
def by_metropolis(
    product: Factors,
    num_chains: int,
    num_draws: int,
    *,
    warmup: int,
    thin: int,
    proposal: Proposal | None,
    num_samples: int | None,
    memory: float,
) -> Chains:
    """Run independence chains whose proposals are all made and weighed at one go."""
    proposal = default_proposal(product) if proposal is None else proposal
    check_proposal(product, proposal)
    times = warmup + num_draws * thin
    found = propose(
        product,
        times * num_chains,
        proposal,
        num_samples=num_samples,
        memory=memory,
        independent=True,
    )
    rows, acceptance = independence_metropolis(found.log_weights.reshape(times, num_chains))
    kept = rows[warmup + thin - 1 :: thin]  # (S, C)
    places = (kept * num_chains + torch.arange(num_chains, device=kept.device)).T
    powers = product.powers.to(found.table)
    density = powers @ found.table
    density = torch.where(density.isnan(), found.log_weights, density)
    exact, words = pseudo_marginal(product, proposal)
    return Chains(
        found.x[places], density[places], "metropolis", acceptance, exact, words, product.visible
    )


@torch.no_grad()
def by_gibbs(
    product: Factors,
    num_chains: int,
    num_draws: int,
    *,
    warmup: int,
    thin: int,
    block: int,
    num_samples: int | None,
    memory: float,
) -> Chains:
    """Draw bits, or blocks of bits, given all others, in all chains at once."""
    if product.support != "bits":
        raise ValueError(
            f"Product.chains: Gibbs sampling draws bits, and the parts model {product.support}; "
            "use method='metropolis', 'hmc' or 'nuts'."
        )

    def terms(x: Tensor) -> Tensor:
        return product.table(x, num_samples=num_samples, memory=memory)

    state = _starts(product, num_chains)
    held = terms(state)
    values, densities, share = [], [], 0.0
    for time in range(warmup + num_draws * thin):
        walk = flip_gibbs(state, terms, product.powers, current=held, block=block)
        state, held = walk.state, walk.terms
        if time >= warmup and (time - warmup + 1) % thin == 0:
            values.append(state)
            densities.append(product.powers.to(held) @ held)
            share += walk.accepted / num_draws
    exact, words = pseudo_marginal(product, None)
    return Chains(
        torch.stack(values, 1),
        torch.stack(densities, 1),
        "gibbs",
        share,
        exact,
        words,
        product.visible,
    )


def _starts(product: Factors, count: int) -> Tensor:
    """Draw where chains start: from the parts in turn."""
    places = product.samplers
    sizes = [len(range(i, count, len(places))) for i in range(len(places))]
    return torch.cat([draw_rows(product[p], n) for p, n in zip(places, sizes, strict=True) if n])


def differentiable(product: Factors, x: Tensor) -> Tensor:
    """Return the product's log density with its gradient in x.

    Raises:
        ValueError: a part does not tell a differentiable density.
    """
    total = x.new_zeros(len(x))
    for index, (part, power) in enumerate(zip(product, product.powers.tolist(), strict=True)):
        if isinstance(part, Ratio):
            value: Tensor | None = part.logits(x)
        else:
            known = part.log_marginal(x)
            value = None if known is None else known.value
        if value is None or (x.requires_grad and not value.requires_grad):
            raise ValueError(
                f"Product.chains: part {index} ({type(part).__name__}) gives no exact density with "
                "a gradient in x, which Hamiltonian chains need; use method='metropolis'."
            )
        total = total + power * value
    return total


def by_hmc(
    product: Factors, num_chains: int, num_draws: int, *, warmup: int, thin: int, nuts: bool
) -> Chains:
    """Run Pyro's HMC or NUTS on all chains as one state: one trajectory moves them all.

    Chains of one law are independent under the product of their densities, which is what the
    joint state targets; the potential of all is one batched call.
    """
    from pyro.infer.mcmc import HMC, MCMC, NUTS

    if product.support != "reals":
        raise ValueError(
            f"Product.chains: Hamiltonian chains move through the reals, and the parts model "
            f"{product.support}; use method='gibbs' or 'metropolis'."
        )
    start = _starts(product, num_chains)

    def potential(state: dict[str, Tensor]) -> Tensor:
        return -differentiable(product, state["x"]).sum()

    parameters = [p for p in product.parameters() if p.requires_grad]
    with evaluating(product), local_params(), torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            differentiable(product, start.clone().requires_grad_())
            kernel = (
                NUTS(potential_fn=potential)
                if nuts
                else HMC(potential_fn=potential, trajectory_length=2.0)
            )
            run = MCMC(
                kernel,
                num_samples=num_draws * thin,
                warmup_steps=warmup,
                initial_params={"x": start},
                disable_progbar=True,
            )
            run.run()
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
    values = run.get_samples()["x"][thin - 1 :: thin].transpose(0, 1).detach()
    table = product.table(values.flatten(0, 1))
    density = (product.powers.to(table) @ table).reshape(values.shape[:2])
    rates = run.diagnostics()["acceptance rate"]
    return Chains(
        values,
        density,
        "nuts" if nuts else "hmc",
        float(sum(rates.values()) / len(rates)),
        True,
        "all densities are exact",
        product.visible,
    )
