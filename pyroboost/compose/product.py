"""Multiplicative boosting: a product of meta-models, which is an energy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from pyroboost.compose._samplers import ChainMethod, by_gibbs, by_hmc, by_metropolis
from pyroboost.compose._stored import Stored
from pyroboost.compose.densities import (
    check_data,
    combined,
    is_estimated,
    label,
    log_density_of,
    normalised,
    support_of,
    units,
)
from pyroboost.compose.energy import Ratio
from pyroboost.compose.partition import (
    Method,
    Partition,
    Proposal,
    estimate,
    propose,
    state_table,
)
from pyroboost.compose.rounds import check_tensors, contrast, reweighted
from pyroboost.contexts import forked_rng
from pyroboost.likelihood import Kind, Likelihood
from pyroboost.metamodel import MetaModel, Round
from pyroboost.sampling import resample
from pyroboost.sampling.chains import Chains
from pyroboost.sampling.enumeration import MAX_UNITS

__all__ = ["Product"]


class Product(Stored):
    r"""A product of meta-models to powers: an energy over x.

    $$q(x) = \frac1Z \prod_i m_i(x)^{a_i}, \qquad Z = \int \prod_i m_i(x)^{a_i}\, dx$$

    It is not a program: a joint to a power has not the marginal to that power, so that there is
    no model or guide to run, trace or enumerate. Products among the parts are replaced by their
    parts, since constants cancel. Parts must have one support.

    **log Z** is stored with the parameters and powers it belongs to; a likelihood of changed ones
    is refused until :meth:`log_partition` or :meth:`refresh` has been called.

    Draws of a part are taken to be of its law; an RBM with more than 20 units in both layers
    draws after a number of Gibbs sweeps, and is then better weighed than left to propose.

    **Kinds.** The likelihood is exact where every part tells its density, whatever is known of
    its constant (which cancels), and log Z is exact. Otherwise it is an estimate: a part without
    a density of its own is importance-sampled, which is unbiased for $m_i(x)$ but not for a power
    of it: $\mathbb{E}\, \hat m(x)^a \le m(x)^a$ for $a \le 1$, by about the factor
    $1 - \frac{a (1 - a)}2 \mathrm{se}^2$, so that Z to such powers is estimated too low.

    Args:
        *parts: meta-models over one visible site, or a :class:`Ratio`.
        powers: the powers $a_i > 0$; one number counts for all.
        num_samples: importance samples per datum, for parts that do not know their density.

    Raises:
        TypeError: a part is not a meta-model.
        ValueError: powers or supports do not fit.

    Example:
        >>> from pyroboost.models import GMM
        >>> product = Product(GMM(2, 1), GMM(3, 1))
        >>> product.refresh()
        >>> product.log_marginal(torch.zeros(4, 1)).kind
        'exact'
        >>> product.sample(5).shape
        torch.Size([5, 1])

    Reference:
        Grover and Ermon, Boosted generative models (2018), section 3; cascaded meta-models, Eq. 1.
    """

    powers: Tensor

    def __init__(
        self,
        *parts: MetaModel,
        powers: float | Sequence[float] | Tensor = 1.0,
        num_samples: int = 50,
    ) -> None:
        flat, exponents = _flatten(parts, _powers(powers, len(parts)))
        super().__init__(flat[0].visible)
        if num_samples < 1:
            raise ValueError(f"Product: num_samples is {num_samples}; take at least one.")
        self.num_samples = num_samples
        self.parts = nn.ModuleList(flat)
        self.register_buffer("powers", torch.tensor(exponents, dtype=torch.float64))
        self._support: str | None = None
        self._estimated: list[int] | None = None
        if not self.samplers:
            raise ValueError(
                "Product: all parts are ratios of densities; one at least must be a density."
            )
        self._check_parts()

    # Parts

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[MetaModel]:
        return (cast(MetaModel, part) for part in self.parts)

    @overload
    def __getitem__(self, index: int) -> MetaModel: ...
    @overload
    def __getitem__(self, index: slice) -> Product: ...
    def __getitem__(self, index: int | slice) -> MetaModel:
        if isinstance(index, slice):
            powers = self.powers[index].tolist()
            return Product(*list(self)[index], powers=powers, num_samples=self.num_samples)
        return list(self)[index]

    @property
    def visible_shape(self) -> tuple[int, ...] | None:
        """Shape of one datum, as the parts know it."""
        return next((p.visible_shape for p in self if p.visible_shape is not None), None)

    @visible_shape.setter
    def visible_shape(self, shape: tuple[int, ...] | None) -> None:
        for part in self:
            if part.visible_shape is None:
                part.visible_shape = shape

    @property
    def samplers(self) -> list[int]:
        """Places of the parts that can be sampled: all but ratios."""
        return [i for i, part in enumerate(self) if not isinstance(part, Ratio)]

    @property
    def estimated(self) -> list[int]:
        """Places of the parts whose density is estimated anew at each x."""
        if self._estimated is None:
            self._check_parts()
            self._estimated = [i for i, part in enumerate(self) if is_estimated(part)]
        return self._estimated

    @property
    def support(self) -> str | None:
        """What x is made of, in words: "bits", "reals", ...; ``None`` while it is not known."""
        if self._support is None:
            self._check_parts()
        return self._support

    def _check_parts(self) -> None:
        """Refuse parts that are densities over different things."""
        self.visible_shape = self.visible_shape
        shapes = {p.visible_shape for p in self if p.visible_shape is not None}
        if len(shapes) > 1:
            told = ", ".join(f"{label(i, p)} {p.visible_shape}" for i, p in enumerate(self))
            raise ValueError(f"Product: the parts take data of different shapes: {told}.")
        first = 0
        for index, part in enumerate(self):
            name = support_of(part)
            if name is None:
                continue
            if self._support is None:
                self._support, first = name, index
            if name != self._support:
                raise ValueError(
                    f"Product: {label(first, self[first])} is a density over {self._support} and "
                    f"{label(index, part)} one over {name}, and their product is neither; use "
                    "parts over one support (a diagonal GMM's on_bits() is a mixture over bits)."
                )

    # Densities

    @torch.no_grad()
    def table(
        self,
        x: Tensor,
        *,
        num_samples: int | None = None,
        memory: float = 256.0,
        skip: Sequence[int] = (),
    ) -> Tensor:
        r"""Return $\log m_i(x)$ of each part in double precision, without gradients.

        Args:
            x: data.  # (N, ...)
            num_samples: importance samples per datum, for parts that do not know their density.
            memory: bound on their working memory, in MiB.
            skip: parts that are not asked; their rows are NaN.

        Returns:
            Log densities in nats, each up to its own constant.  # (P, N)
        """
        count = self.num_samples if num_samples is None else num_samples
        rows = []
        for index, part in enumerate(self):
            if index in skip:
                rows.append(torch.full((len(x),), math.nan, dtype=torch.float64, device=x.device))
                continue
            found = log_density_of(part, x, num_samples=count, memory=memory)
            rows.append(found.value.double())
        return torch.stack(rows)

    @torch.no_grad()
    def log_density(
        self, x: Tensor, *args: Any, num_samples: int | None = None, memory: float = 256.0
    ) -> Likelihood:
        r"""Return $\sum_i a_i \log m_i(x)$, which lacks log Z, in nats.

        Args:
            x: data.  # (N, ...)
            *args: none are used.
            num_samples: importance samples per datum, for parts that do not know their density.
            memory: bound on their working memory, in MiB.

        Returns:
            Log densities of kind ``"unnormalised"``, with the errors of estimated parts by the
            delta method, the least of their effective sample sizes and the largest Pareto k.

        Raises:
            ValueError: the data do not fit the parts.
        """
        self._learn(x)
        count = self.num_samples if num_samples is None else num_samples
        found = [log_density_of(part, x, num_samples=count, memory=memory) for part in self]
        return combined(found, self.powers.tolist())

    def log_marginal(
        self, x: Tensor, *args: Any, num_samples: int | None = None, memory: float = 256.0
    ) -> Likelihood:
        r"""Return $\log q(x) = \sum_i a_i \log m_i(x) - \log Z$ in nats, with the stored log Z.

        Args:
            x: data.  # (N, ...)
            *args: none are used.
            num_samples: importance samples per datum, for parts that do not know their density.
            memory: bound on their working memory, in MiB.

        Returns:
            Exact values or estimates. The error of log Z is the ``shared_error`` and part of each
            ``std_error``; a log Z whose Pareto k is too large is told as a ``doubt``.

        Raises:
            ValueError: log Z is unknown or out of date, or the data do not fit the parts.
        """
        partition = self.partition
        return normalised(self.log_density(x, num_samples=num_samples, memory=memory), partition)

    def _learn(self, x: Tensor) -> None:
        """Check data, whose shape the parts may not have known before."""
        if self.visible_shape is None:
            self.visible_shape = tuple(x.shape[1:])
        check_data(x, self.visible_shape, self.support, "Product")

    # The normaliser

    def log_partition(self, method: Method | None = None, **options: Any) -> Partition:
        r"""Estimate log Z, keep it for the likelihood, and say how sure it is.

        1. ``"closed form"``: that of :meth:`closed_form`, where there is one.
        2. ``"exact"``: the sum over at most 20 bits, where all densities are exact.
        3. ``"importance"``: the mean weight of draws from ``proposal``, one part or the equal
           mixture of all (the default), $\log \frac1n \sum_s \tilde q(x_s) / g(x_s)$.
        4. ``"bridge"``: the optimal bridge between draws of one part and chains of the product.
        5. ``"ais"``: annealed chains along $(1 - \beta) \log m_i + \beta \log \tilde q$, by
           Gibbs steps of single bits, or by random walks through the reals.

        Without a method the first of 1, 2 and 3 that there is. Weights whose Pareto k exceeds
        what their number can bear, and chains that have not mixed, are told as a ``doubt``.

        Where densities are estimated, importance weights are unbiased for Z only if every
        estimated part has power 1 and none is in the denominator (``proposal=i`` of power 1, whose
        density cancels); else the result says ``biased``.

        Args:
            method: one of the above.
            **options: ``proposal``, a part's place or ``"mixture"``; ``shares`` of the mixture;
                ``num_draws`` of x (10,000; 2,000 where densities are estimated; 500 chains of
                AIS); ``num_samples`` per x of estimated densities and their ``memory`` in MiB;
                ``num_temperatures`` (100) or ``inverse_temperatures`` and ``steps`` (1) of AIS.

        Returns:
            log Z in nats with its standard error, ESS, Pareto k and doubts.

        Raises:
            ValueError: the method does not fit the parts.

        Example:
            >>> from pyroboost.models import GMM
            >>> product = Product(GMM(2, 1), GMM(3, 1), powers=[1.0, 0.5])
            >>> found = product.log_partition("importance", num_draws=1000)
            >>> found.method, found.reliable
            ('importance', True)
        """
        for part in self:
            part.refresh()
        if method == "closed form" or method is None:
            closed = self._closed()
            if closed is not None:
                kind, error = closed[0].normalisation()
                error = 0.0 if kind == "exact" else max(error, 1e-12)
                found = Partition(closed[1], error, "closed form")
                self.keep(found)
                return found
            if method is not None:
                raise ValueError(
                    "Product.log_partition: these parts and powers have no closed form; leave the "
                    "method out or take 'importance'."
                )
        found = estimate(self, method or self._default(), **options)
        self.keep(found)
        return found

    def _default(self) -> Method:
        small = self.support == "bits" and units(self.visible_shape) <= MAX_UNITS
        return "exact" if small and not self.estimated else "importance"

    def refresh(self) -> None:
        """Bring log Z up to date where it is not; torch's random state is left unmoved."""
        if not self.is_fresh:
            with forked_rng():
                self.log_partition()

    def normalisation(self) -> tuple[Kind, float]:
        """Return how log Z is known: exactly, or as an estimate with a standard error in nats."""
        partition = self.partition
        if partition.exact and not self.estimated:
            return "exact", 0.0
        return "estimate", partition.std_error if partition.reliable else math.inf

    def _depends_on(self) -> list[nn.Module]:
        powers = nn.Module()
        powers.register_buffer("powers", self.powers)
        return [powers, *self]

    def closed_form(self) -> MetaModel | None:
        """Return one meta-model with this very density, where the parts' classes have it.

        Mixtures of Gaussians and of Bernoullis, and RBMs over one visible layer, for positive
        integer powers; single Gaussians for any positive powers. Its log Z is up to date.

        Returns:
            A meta-model of the parts' class, or ``None``.
        """
        closed = self._closed()
        return None if closed is None else closed[0]

    def _closed(self) -> tuple[MetaModel, float] | None:
        """Ask the first part, which knows its class."""
        if len(self) == 1 and float(self.powers) == 1.0:
            return self[0], 0.0
        return self[0].multiplied(list(self), self.powers.tolist())

    # Samples

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
            method = "exact" if self._default() == "exact" else "metropolis"
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

    # Training

    def named_trainable(self, *batch: Any) -> dict[str, Tensor]:
        """Return the parameters of all parts; :func:`multiplicative` trains them in rounds."""
        found: dict[str, Tensor] = {}
        for index, part in enumerate(self):
            own = (
                dict(part.named_parameters())
                if not part.is_program
                else part.named_trainable(*batch)
            )
            found.update({f"parts.{index}.{name}": p for name, p in own.items() if p.requires_grad})
        return found

    def rounds(
        self, data: Any, validation: Any = None, *, beta: float = 1.0, least: float = 0.1
    ) -> Iterator[Round]:
        r"""Yield one round per part: it is fitted to what the parts before it leave unexplained.

        The first part is fitted to the data as they are. Each later one sees datum n with the
        weight $\propto \tilde q_{t-1}(x_n)^{-\beta}$ under the product of those before it; a
        :class:`Ratio` sees data against draws of that product.

        Args:
            data: training data.  # (N, ...)
            validation: held-out data.  # (M, ...)
            beta: share of the ratio of data to model that weights make up for, within [0, 1].
            least: effective sample size of the weights at least, as a share of N; beta is lowered
                until it is reached.

        Raises:
            TypeError: the data are not one tensor.

        Reference:
            Grover and Ermon, Boosted generative models (2018), Algorithm 1 and 2.
        """
        total: list[Tensor | float] = [0.0, 0.0]
        for index, part in enumerate(self):
            name = f"{index}.{type(part).__name__}"
            if index == 0:
                yield Round(part, data, validation, name)
            else:
                check_tensors(data, validation)
                before = self[:index]
                if isinstance(part, Ratio):
                    yield contrast(before, part, name, data, validation)
                else:
                    log_density, held_out = (cast(Tensor, t) for t in total)
                    yield reweighted(
                        part,
                        name,
                        data,
                        validation,
                        log_density=log_density,
                        validation_log_density=held_out,
                        beta=beta,
                        least=least,
                    )[0]
            if index + 1 < len(self) and isinstance(data, Tensor):
                part.refresh()
                for place, rows in enumerate((data, validation)):
                    if rows is not None:
                        found = log_density_of(part, rows, num_samples=self.num_samples)
                        total[place] = total[place] + self.powers[index] * found.value.double()

    def __repr__(self) -> str:
        powers = self.powers.tolist()
        parts = (f"{type(p).__name__}^{a:.4g}" for p, a in zip(self, powers, strict=True))
        return f"Product('{self.visible}': {' * '.join(parts)}; log Z {self._state_of_log_z()})"


def _powers(powers: float | Sequence[float] | Tensor, count: int) -> list[float]:
    """Return one positive number per part."""
    found = torch.as_tensor(powers, dtype=torch.float64)
    found = found.expand(count) if found.dim() == 0 else found
    if found.shape != (count,) or not bool((found.isfinite() & (found > 0)).all()):
        raise ValueError(
            f"Product: powers are {powers} for {count} parts; give one positive number, or one "
            "for each part (a part of power 0 is left out)."
        )
    return found.tolist()


def _flatten(
    parts: Sequence[MetaModel], powers: Sequence[float]
) -> tuple[list[MetaModel], list[float]]:
    """Replace products among the parts by their own parts, and multiply their powers."""
    if not parts:
        raise ValueError("Product: there is no part; pass at least one meta-model.")
    flat: list[MetaModel] = []
    exponents: list[float] = []
    for index, (part, power) in enumerate(zip(parts, powers, strict=True)):
        if not isinstance(part, MetaModel):
            raise TypeError(
                f"Product: part {index} is {type(part).__name__}, not a meta-model; wrap the pair "
                "in MetaModel(model, guide, visible=..., hidden=...)."
            )
        if isinstance(part, Product):
            flat += list(part)
            exponents += [power * inner for inner in part.powers.tolist()]
        else:
            flat.append(part)
            exponents.append(power)
    return flat, exponents
