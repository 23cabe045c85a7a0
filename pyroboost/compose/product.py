"""Multiplicative boosting: a product of meta-models, which is an energy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyroboost.compose._proposals import summable
from pyroboost.compose._sampled import Sampled
from pyroboost.compose.densities import combined, log_density_of, normalised
from pyroboost.compose.partition import Method, Partition, estimate
from pyroboost.compose.rounds import in_turn
from pyroboost.contexts import forked_rng
from pyroboost.likelihood import Kind, Likelihood
from pyroboost.metamodel import Round

__all__ = ["Product"]


class Product(Sampled):
    r"""A product of meta-models to powers: an energy over x.

    $$q(x) = \frac1Z \prod_i m_i(x)^{a_i}, \qquad Z = \int \prod_i m_i(x)^{a_i}\, dx$$

    It is not a program: a joint to a power has not the marginal to that power, so that there is
    no model or guide to run, trace or enumerate. Products among the parts are replaced by their
    parts, since constants cancel. Parts must have one support. What the parts do not know of their
    own log Z cancels too, except where a part proposes: its error is then part of that of log Z.

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

    # Densities

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
        found = estimate(self, method or ("exact" if summable(self) else "importance"), **options)
        self.keep(found)
        return found

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

    # Training

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
        return in_turn(self, data, validation, beta=beta, least=least)

    def __repr__(self) -> str:
        powers = self.powers.tolist()
        parts = (f"{type(p).__name__}^{a:.4g}" for p, a in zip(self, powers, strict=True))
        return f"Product('{self.visible}': {' * '.join(parts)}; log Z {self._state_of_log_z()})"
