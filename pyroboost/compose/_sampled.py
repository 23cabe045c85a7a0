"""Draws of a product: in closed form, from a table of states, resampled, or by chains."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from pyroboost.compose._factors import Factors
from pyroboost.compose._proposals import Proposal, propose, state_table, summable
from pyroboost.compose._samplers import ChainMethod, by_gibbs, by_hmc, by_metropolis
from pyroboost.sampling import resample
from pyroboost.sampling.chains import Chains

__all__ = ["Sampled"]


class Sampled(Factors):
    """Factors whose product can be drawn from."""

    def sample(
        self,
        template: Tensor | int,
        *args: Any,
        method: str | None = None,
        **options: Any,
    ) -> Tensor:
        r"""Draw from the product, in eval mode without gradients.

        1. ``"closed form"``: draws of :meth:`closed_form`.
        2. ``"exact"``: draws from the table of all states of at most 20 bits.
        3. ``"resample"``: draws from the parts, resampled in proportion to their weights.
        4. ``"metropolis"``, ``"gibbs"``, ``"hmc"``, ``"nuts"``: chains, see :meth:`chains`.

        Without a method the first of 1, 2 and ``"metropolis"`` that there is.

        Args:
            template: the number of draws, or a tensor with as many rows.
            *args: none are used.
            method: one of the above.
            **options: of :meth:`chains`; for ``"resample"`` ``num_draws`` (twice the draws),
                ``proposal``, ``num_samples`` and ``memory``.

        Returns:
            Draws, those of chains in random order.  # (N, ...)

        Raises:
            ValueError: the method does not fit the parts.
        """
        count = template if isinstance(template, int) else len(template)
        if count < 1:
            raise ValueError(f"Product.sample: {count} draws; ask for at least one.")
        if isinstance(template, Tensor) and self.visible_shape is None:
            self.visible_shape = tuple(template.shape[1:])
        if method in (None, "closed form"):
            closed = self._closed()
            if closed is not None:
                return closed[0].sample(count)
        if method is None:
            method = "exact" if summable(self) else "metropolis"
        if method == "exact":
            states, density = state_table(self)
            return states[resample(density, count)]
        if method == "resample":
            found = propose(self, options.pop("num_draws", 2 * count), independent=True, **options)
            return found.x[resample(found.log_weights, count, method="multinomial")]
        if method == "closed form":
            raise ValueError("Product.sample: these parts and powers have no closed form.")
        num_chains = options.pop("num_chains", min(100, count))
        draws = -(-count // num_chains)
        made = self.chains(
            method=cast(ChainMethod, method), num_chains=num_chains, num_draws=draws, **options
        )
        return made.draws[torch.randperm(num_chains * draws)[:count]]

    def chains(
        self,
        *,
        method: ChainMethod = "metropolis",
        num_chains: int = 20,
        num_draws: int = 200,
        warmup: int = 50,
        thin: int = 1,
        proposal: Proposal | None = None,
        block: int = 1,
        num_samples: int | None = None,
        memory: float = 256.0,
    ) -> Chains:
        r"""Run Markov chains that leave the product invariant, all of them side by side.

        1. ``"metropolis"``: proposals are independent draws of a part or of the mixture of parts,
           made and weighed at one go. A part of power 1 that proposes need not be weighed.
        2. ``"gibbs"``: bits, or blocks of bits, given all others.
        3. ``"hmc"``, ``"nuts"``: Pyro's kernels, where densities are exact and x is real.

        Where densities are estimated, a chain keeps the estimate with which it entered a state
        (pseudo-marginal). That is exact only if all estimated parts have power 1 and none is in
        a proposal's density that does not cancel; :attr:`Chains.exact` says so.

        Args:
            method: one of the above.
            num_chains: number of chains C.
            num_draws: draws kept of each S.
            warmup: draws before the first that is kept.
            thin: steps from one that is kept to the next.
            proposal: the place of a part, or ``"mixture"``: the default where all densities are
                exact; else the first part of power 1.
            block: bits that Gibbs steps draw together.
            num_samples: importance samples per x, for parts that do not know their density.
            memory: bound on their working memory, in MiB.

        Returns:
            The draws, and how well the chains have mixed.

        Raises:
            ValueError: the method does not fit the parts.

        Example:
            >>> from pyroboost.compose import Product
            >>> from pyroboost.models import GMM
            >>> Product(GMM(2, 1), GMM(3, 1)).chains(num_chains=4, num_draws=10).values.shape
            torch.Size([4, 10, 1])

        Reference:
            Hastings (1970); Andrieu and Roberts, The pseudo-marginal approach (2009).
        """
        sizes = {"num_chains": num_chains, "num_draws": num_draws, "thin": thin}
        if min(sizes.values()) < 1 or warmup < 0:
            raise ValueError(
                f"Product.chains: got {sizes} and warmup={warmup}; take at least one of each."
            )
        for part in self:
            part.refresh()
        size: dict[str, Any] = {"warmup": warmup, "thin": thin}
        noisy: dict[str, Any] = {"num_samples": num_samples, "memory": memory}
        if method == "metropolis":
            return by_metropolis(self, num_chains, num_draws, proposal=proposal, **size, **noisy)
        if method == "gibbs":
            return by_gibbs(self, num_chains, num_draws, block=block, **size, **noisy)
        if method in ("hmc", "nuts"):
            return by_hmc(self, num_chains, num_draws, nuts=method == "nuts", **size)
        raise ValueError(
            f"Product.chains: method is {method!r}; use 'metropolis', 'gibbs', 'hmc' or 'nuts'."
        )
