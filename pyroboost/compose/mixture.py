"""Additive composition: a weighted sum of densities that is a meta-model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyroboost.compose._additive import Growth
from pyroboost.compose._evidence import Evidence, evidence, log_sum
from pyroboost.compose._members import can_share, check_parts, label
from pyroboost.compose._mixing import COMPONENT, Hidden, Mixing, MixtureProgram, Proportions
from pyroboost.compose._refusals import checked_components, checked_weights, explained
from pyroboost.compose._sites import Plates
from pyroboost.compose.cascade import Cascade
from pyroboost.likelihood import Kind, Likelihood, weakest
from pyroboost.metamodel import MetaModel
from pyroboost.program import Program, first_tensor

__all__ = ["Mixture"]


class Mixture(MetaModel):
    r"""A weighted sum of the densities of meta-models over one visible space.

    $$m(x) = \sum_i w_i\, m_i(x)$$

    A mixture is itself a pair: ``mixture.model`` and ``mixture.guide`` go wherever Pyro takes a
    pair. One component is drawn per datum, as the site ``"component"``, and the visible site has
    the law of that component. The hidden site is one of two:

    1. ``hidden="shared"``: the parts' hidden values are of one space, and the mixture has one
       hidden site h under the first part's name, with $m(h) = \sum_i w_i m_i(h)$. The model draws
       h, then the component from $m(c \mid h) \propto w_c m_c(h)$, then x from $m_c(x \mid h)$: h
       has no parents, so that another stage can model it.
    2. ``hidden="component"``: the component is the hidden site, drawn first from w, and the
       parts' hidden sites are private.

    **The guide** draws $z_i \sim q_i(z \mid x)$ from every part aside and unrecorded, weighs them
    by $r_i = m_i(x, z_i) / q_i(z_i \mid x)$, draws the component from $q(c) \propto w_c r_c$ and
    keeps $z_c$. Whatever the component, the weight of the pair is then

    $$\log \frac{m(x, z_c, c)}{q(z_c, c \mid x)} = \log \sum_i w_i r_i, \qquad
    \mathbb{E}\, \sum_i w_i r_i = m(x),$$

    exact where the parts' guides are, a bound in expectation where they are not. Gradients of
    ``Trace_ELBO`` and ``TraceGraph_ELBO`` are those of its expectation; :meth:`objective`, which
    ``fit`` takes, has them without the noise of drawing the component, in half the time, and with
    batch statistics that no part shares with the others' hidden values. Parts with a stored log Z
    are weighed by it: :meth:`refresh` it while they are trained together.

    Names: the visible site keeps the first part's name; every other site of part i is ``"i.name"``
    and is masked where part i is not the component; plates of one dimension and size are one
    plate, with one subsample and one scale. Masked sites cannot be enumerated, and the component
    only in the guide, except where the parts have no private sites.

    Args:
        *parts: meta-models.
        weights: their weights, at least 0 and summing to 1; equal ones when left out. A part of
            weight exactly 0 takes no part, and gradients do not bring it back.
        hidden: ``"shared"`` or ``"component"``; when left out, shared where all hidden values
            have one shape with at least one dimension and one support, as far as that is known.

    Raises:
        ValueError: parts do not fit together, or share a parameter.
        TypeError: a part is no meta-model, or an energy.

    Example:
        >>> from pyroboost.models import VAE
        >>> mixture = Mixture(VAE(6, 2, units=8), VAE(6, 2, units=4), weights=[0.75, 0.25])
        >>> mixture
        Mixture(0: VAE('x' | 'z'), 1: VAE('x' | 'z'); hidden 'z')
        >>> mixture.sample(4).shape, mixture.encode(torch.zeros(4, 6)).shape
        (torch.Size([4, 6]), torch.Size([4, 2]))
        >>> [round(weight, 3) for weight in mixture.weights.tolist()]
        [0.75, 0.25]

    Reference:
        Cascaded meta-models, section 1: the additive approach; Rosset and Segal, Boosting density
        estimation (2002).
    """

    _mixing: Mixing

    def __init__(
        self,
        *parts: MetaModel,
        weights: Sequence[float] | Tensor | None = None,
        hidden: Hidden | None = None,
    ) -> None:
        nn.Module.__init__(self)
        check_parts(parts)
        if hidden not in (None, "shared", "component"):
            raise ValueError(f"Mixture: hidden is {hidden!r}; pass 'shared' or 'component'.")
        kind: Hidden = hidden or ("shared" if can_share(parts) else "component")
        self.parts = nn.ModuleList(parts)
        proportions = Proportions(len(parts), like=first_tensor(self.parts))
        self.proportions = Program(proportions, "weights")
        mixing = Mixing(parts, kind, self.proportions)
        # The programs hold the parts too; only these are registered, so that names stay short.
        for name, program in {
            "_mixing": mixing,
            "model": MixtureProgram(mixing, "model"),
            "guide": MixtureProgram(mixing, "guide"),
        }.items():
            object.__setattr__(self, name, program)
        self.visible, self.hidden = mixing.visible, mixing.hidden
        taken = [self.visible] + ([self.hidden] if kind == "shared" else [])
        if COMPONENT in taken:
            raise ValueError(
                f"Mixture: a site of {label(0, parts[0])} has the name '{COMPONENT}', which is the "
                "mixture's own; give it another name or pass hidden='component'."
            )
        self.hidden_shape = parts[0].hidden_shape if kind == "shared" else ()
        if weights is not None:
            proportions.assign(checked_weights(weights, len(parts)))

    # Parts and weights

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[MetaModel]:
        return (cast(MetaModel, part) for part in self.parts)

    def __getitem__(self, index: int) -> MetaModel:
        return cast(MetaModel, self.parts[index])

    def __add__(self, part: MetaModel) -> Mixture:
        """Return the mixture with one more part, of weight 0; the parts are the same objects."""
        return Mixture(*self, part, weights=[*self.weights.tolist(), 0.0])

    def kept(self) -> Mixture:
        """Return the mixture of the parts whose weight is not 0; the parts are the same objects."""
        weights = self.weights
        on = weights > 0
        if bool(on.all()):
            return self
        return Mixture(*self._active(), weights=weights[on], hidden=self._mixing.kind)

    def __repr__(self) -> str:
        sites = (f"{type(part).__name__}('{part.visible}' | '{part.hidden}')" for part in self)
        listed = ", ".join(f"{i}: {site}" for i, site in enumerate(sites))
        return f"Mixture({listed}; hidden '{self.hidden}')"

    @property
    def log_weights(self) -> Tensor:
        """Log weights with gradients, minus infinity where a weight is 0, (K,)."""
        found: Tensor = self.proportions.fn()
        return found

    @property
    def weights(self) -> Tensor:
        """The weights, detached, summing to 1; assigning them sets the parameters, (K,)."""
        return self.log_weights.detach().exp()

    @weights.setter
    def weights(self, value: Tensor | Sequence[float]) -> None:
        cast(Proportions, self.proportions.fn).assign(checked_weights(value, len(self)))

    @property
    def visible_shape(self) -> tuple[int, ...] | None:
        """Shape of one datum, as any of the parts knows it."""
        return next((p.visible_shape for p in self if p.visible_shape is not None), None)

    @visible_shape.setter
    def visible_shape(self, shape: tuple[int, ...] | None) -> None:
        for part in self:
            part.visible_shape = shape

    # Programs

    @property
    def recognition(self) -> Program:
        """The guide made of the parts' recognition programs, for below another stage."""
        return cast(Program, MixtureProgram(self._mixing, "recognition"))

    @property
    def marginal(self) -> Callable[..., Any] | None:
        """The program of x alone; ``None`` where a part has none or keeps latent sites in it."""
        if any(p.marginal is None or (isinstance(p, Cascade) and len(p) > 1) for p in self):
            return None
        return MixtureProgram(self._mixing, "marginal")

    # Densities

    def log_marginal(self, x: Tensor, *args: Any) -> Likelihood | None:
        r"""Return $\log \sum_i w_i m_i(x)$ where all parts know their densities, else ``None``.

        It is exact if all parts are, and else of the weakest kind among them: bounds give a
        bound, estimates an estimate with a delta-method error.

        Args:
            x: data.  # (N, ...)
            *args: further arguments of the parts.
        """
        active = self._active()
        with explained(active, x):
            known = [part.log_marginal(x, *args) for part in active]
        found = [one for one in known if one is not None]
        if len(found) < len(known):
            return None
        return log_sum(self._active_log_weights(), found)

    def log_prior(self, h: Tensor, *args: Any, template: Tensor | None = None) -> Likelihood:
        r"""Return $\log m(h)$ per datum in nats: of $\sum_i w_i m_i(h)$, or $\log w_c$.

        Args:
            h: hidden values.  # (N, ...)
            *args: further arguments of the parts.
            template: a tensor shaped like x.

        Returns:
            Log densities of the weakest kind among the parts'.  # (N,)

        Raises:
            ValueError: the hidden site is the component, and a value is the number of none.
        """
        if self._mixing.kind == "component":
            return Likelihood(self.log_weights.detach()[checked_components(h, len(self))], "exact")
        known = [part.log_prior(h, *args, template=template) for part in self._active()]
        return log_sum(self._active_log_weights(), known)

    def _active(self) -> list[MetaModel]:
        return [p for p, w in zip(self, self.weights.tolist(), strict=True) if w > 0]

    def _active_log_weights(self) -> Tensor:
        found = self.log_weights
        return found[found > -math.inf]

    def normalisation(self) -> tuple[Kind, float]:
        r"""Return the weakest kind among the parts and the largest of their errors.

        Errors of the parts' constants move $\log m(x)$ by a weighted mean of themselves.
        """
        found = [part.normalisation() for part in self._active()]
        return weakest(*(kind for kind, _ in found)), max(error for _, error in found)

    def refresh(self) -> None:
        """Refresh the cached normalisers of all parts."""
        for part in self:
            part.refresh()

    # Training

    def named_trainable(self, *batch: Any) -> dict[str, Tensor]:
        """Return every unconstrained tensor that training moves, part by part.

        Args:
            *batch: a batch of data, on which each part runs once.
        """
        found: dict[str, Tensor] = {n: p for n, p in self.named_parameters() if p.requires_grad}
        known = {id(p) for p in found.values()}
        with explained(list(self), batch[0]):
            reached = [part.named_trainable(*batch) for part in self]
        for name, tensor in (item for one in reached for item in one.items()):
            if id(tensor) not in known:  # the others are modules' own and have their names
                known.add(id(tensor))
                found[name] = tensor
        return found

    def objective(self) -> Callable[..., Tensor]:
        r"""Return the loss $-\sum_n \log \sum_i w_i r_i(x_n)$, the component summed out.

        Parts with a marginal program enter with their density; parts that see their data through
        several importance samples, with the mean of that many weights. Where plates take a
        subsample, the sum is over its rows, times the plates' scale.
        """
        return self._loss

    def _loss(
        self, model: object, guide: object, x: Tensor, *args: Any, weights: Tensor | None = None
    ) -> Tensor:
        found = self.draw_evidence(x, *args)
        surrogate = found.log_weight + found.score * found.log_weight.detach()
        if weights is not None and weights.shape != surrogate.shape:
            raise ValueError(
                f"Mixture: weights of shape {tuple(weights.shape)} came for data of which the "
                f"parts' plates take {len(surrogate)}; weigh data without a subsample in the plate."
            )
        return -((surrogate if weights is None else weights * surrogate) * found.scale).sum()

    def draw_evidence(self, x: Tensor, *args: Any) -> Evidence:
        r"""Draw from all parts and return $\log \sum_i w_i r_i$ per datum, with its score.

        Args:
            x: data.  # (N, ...)
            *args: further arguments of the parts.

        Returns:
            Log weights with gradients, the scores of what was drawn without them, and the scale.
        """
        parts, rows = [], dict[str, Any]()
        with explained(list(self), x):
            for part, names in zip(self, self._mixing.names(x, args), strict=True):
                with Plates(names, rows):  # all parts see the rows that the first has drawn
                    parts.append(evidence(part, x, args))
        terms = torch.stack([part.log_weight for part in parts], -1) + self.proportions()
        score = torch.stack([part.score for part in parts], -1).sum(-1)
        return Evidence(terms.logsumexp(-1), score, parts[0].scale)

    def rounds(self, data: Any, validation: Any = None, **options: Any) -> Growth:
        r"""Yield one round per part, trained on data weighted by $1 / q$ of the mixture so far.

        After a round the part's weight is searched on held-out data, where there are any. The
        first part has the data as they are.

        Args:
            data: a tensor, or a tuple of a tensor and further arguments, of N rows.
            validation: held-out data likewise.
            **options: keywords of :class:`Growth`: ``start``, ``ess``, ``num_samples``, ``stop``,
                ``seed``; :func:`pyroboost.infer.additive` explains them.
        """
        return Growth(self, data, validation, **options)
