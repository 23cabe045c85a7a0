"""A semi-supervised meta-model: a class variable beside the continuous latent one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from pyro import poutine
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel
from pyroboost.models._labelled import EVERY, Labelled, check_labels
from pyroboost.models._m2 import Generate, Joined, Recognise
from pyroboost.models._nets import mlp

__all__ = ["M2"]


class M2(MetaModel):
    r"""A generative model of x with a class y that is known for some data.

    $$y \sim p(y), \quad z \sim \mathcal N(0, I), \quad x \sim m(x \mid y, z), \qquad
    q(y, z \mid x) = q(y \mid x)\, q(z \mid x, y)$$

    The programs are ``model(x, y)`` and ``guide(x, y)`` with class numbers y of shape (N,), -1
    where a label is missing; without y all are missing. On a row with a label the site y has that
    value, the model scores $\log p(y)$ and the guide nothing, so that the bound is one on
    $\log m(x, y)$; elsewhere the guide draws y and it is one on $\log m(x)$. In a cascade give the
    labels to this stage: ``Cascade(VAE(784, 50), M2(50, 10, 50, likelihood="gaussian"),
    args=[(), (0,)])`` takes ``(x, y)``, with ``None`` for y where no label is known.

    **Training** maximises, in nats per datum,

    $$J = a\, \mathrm{mean}_{\text{unlabelled}} \sum_y q(y \mid x) \Big[\mathcal L(x, y) -
    \log q(y \mid x)\Big] + b\, \mathrm{mean}_{\text{labelled}} \big[\mathcal L(x, y) +
    \alpha' \log q(y \mid x)\big], \qquad
    \mathcal L(x, y) = \mathbb E_{q(z \mid x, y)} \log \frac{m(x, y, z)}{q(z \mid x, y)}$$

    with classes summed exactly and one draw of z for each of them. Both means are over the rows
    of the batch, unless ``labelled_share`` is given: then each row weighs $a / (1 - s)$ or
    $b / s$ whatever its batch holds, and the expectation over shuffled batches is J.
    Without it every batch should have the same numbers of both, as
    :func:`pyroboost.data.labelled_batches` gives them. A batch without one kind lacks that term.

    Args:
        visible_shape: shape of one datum, or its size.
        num_classes: number of classes C.
        latent: dimension of z.
        likelihood: ``"bernoulli"`` on bits, from logits; ``"gaussian"``, with location and scale
            from the decoder.
        units: width of each deterministic layer.
        layers: number of deterministic layers in each of the three networks.
        batch_norm: whether each of them is followed by batch normalisation.
        activation: class of the nonlinearity.
        prior: p(y); uniform when left out.  # (C,)
        labelled_weight: the weight b; that of unlabelled data is $a = 1 - b$.
        labelled_share: the share s of labelled rows in the data; ``None``: that of each batch.
        classification_weight: the weight $\alpha = b \alpha'$ of $\log q(y \mid x)$ on labelled
            data; 0 for none, and then q(y | x) learns from unlabelled data only.
        visible: name of the visible site.
        hidden: name of z, the hidden site.
        label: name of y.

    Raises:
        ValueError: a size, a weight or a prior that is of no use.

    Example:
        >>> pair = M2(6, 3, 2, units=8)
        >>> pair.sample(4, torch.tensor([0, 1, 2, -1])).shape
        torch.Size([4, 6])
        >>> pair.encode(torch.zeros(4, 6), torch.tensor([0, 1, 2, -1])).shape
        torch.Size([4, 2])

    Reference:
        Kingma et al., Semi-supervised learning with deep generative models (2014), Eq. 5-9;
        cascaded meta-models, section 2.6 and supplement C: $J_n$, with a and b for its weights.
    """

    def __init__(
        self,
        visible_shape: int | tuple[int, ...],
        num_classes: int,
        latent: int,
        *,
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        units: int = 500,
        layers: int = 1,
        batch_norm: bool = False,
        activation: type[nn.Module] = nn.ReLU,
        prior: Tensor | Sequence[float] | None = None,
        labelled_weight: float = 0.5,
        labelled_share: float | None = None,
        classification_weight: float = 0.0,
        visible: str = "x",
        hidden: str = "z",
        label: str = "y",
    ) -> None:
        shape = (visible_shape,) if isinstance(visible_shape, int) else tuple(visible_shape)
        _check(num_classes, layers, likelihood, (visible, hidden, label))
        _check_weights(labelled_weight, labelled_share, classification_weight)
        gaussian = likelihood == "gaussian"
        size, middle = math.prod(shape), [units] * layers
        names = (visible, hidden, label)
        options: dict[str, Any] = {"batch_norm": batch_norm, "activation": activation}
        out = 2 * size if gaussian else size
        decoder = Joined(latent, num_classes, [*middle, out], **options)
        encoder = Joined(size, num_classes, [*middle, 2 * latent], **options)
        classifier = mlp([size, *middle, num_classes], **options)
        super().__init__(
            Generate(decoder, _prior(prior, num_classes), latent, gaussian, shape, names),
            Recognise(classifier, encoder, shape, names),
            visible=visible,
            hidden=hidden,
            visible_shape=shape,
            hidden_shape=(latent,),
        )
        self.num_classes, self.latent, self.likelihood = num_classes, latent, likelihood
        self.label = label
        self.labelled_weight, self.labelled_share = labelled_weight, labelled_share
        self.classification_weight = classification_weight

    def log_prior(self, h: Tensor, *args: object, template: Tensor | None = None) -> Likelihood:
        r"""Return the standard normal's $\log m(z)$ per datum, in nats.

        Args:
            h: values of z.  # (N, latent)
            *args: none are used.
            template: not needed.
        """
        value = -0.5 * (h.square() + math.log(2 * math.pi)).sum(-1)
        return Likelihood(value, "exact")

    def objective(self) -> Callable[..., Tensor]:
        """Return minus J times the number of rows, with the classes summed exactly."""
        return self._loss

    def _loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        x: Tensor,
        y: Tensor | None = None,
        *,
        weights: Tensor | None = None,
    ) -> Tensor:
        check_labels(y, len(x), self.num_classes, self.visible)
        known = torch.zeros(len(x), dtype=torch.bool, device=x.device) if y is None else y >= 0
        without, within = self._row_weights(known)
        recognise = cast(Recognise, self.guide.fn)
        total = torch.zeros((), device=x.device)
        if not bool(known.all()):
            bounds, beta = self._every_class(model, guide, x[~known])
            log_q = recognise.logits(x[~known])
            free = (log_q.exp() * (bounds - beta * log_q)).sum(-1)
            total = total + without * (free if weights is None else free * weights[~known]).sum()
        if y is not None and bool(known.any()):
            own, _ = _bounds(model, guide, x[known], y[known])
            if self.classification_weight:
                chosen = recognise.logits(x[known]).gather(-1, y[known].long()[:, None])[:, 0]
                own = own + self.classification_weight / self.labelled_weight * chosen
            total = total + within * (own if weights is None else own * weights[known]).sum()
        return -total

    def _row_weights(self, known: Tensor) -> tuple[float, float]:
        """Return what a row without and one with a label weighs in J times the number of rows."""
        b, share = self.labelled_weight, self.labelled_share
        if share is None:
            share = float(known.double().mean())
        # A batch of one kind has no row of the other.
        return (1 - b) / (1 - share) if share < 1 else 0.0, b / share if share > 0 else 0.0

    def _every_class(
        self, model: Callable[..., Any], guide: Callable[..., Any], x: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """Return the bound of each datum with each class, (N, C), and the scale of log q(y | x)."""
        count, size = self.num_classes, len(x)
        if unwrap(model) is self.model and unwrap(guide) is self.guide:
            bounds, beta = _bounds(model, guide, x, EVERY)
            return bounds.T, beta
        # Within a composition rows are data: one copy for each class.
        labels = torch.arange(count, device=x.device).repeat(size)
        bounds, beta = _bounds(model, guide, x.repeat_interleave(count, 0), labels)
        return bounds.reshape(size, count), beta

    def extra_repr(self) -> str:
        """Name the sites, the likelihood and the classes."""
        return (
            f"{super().extra_repr()}, label='{self.label}', likelihood='{self.likelihood}', "
            f"num_classes={self.num_classes}"
        )


def _bounds(
    model: Callable[..., Any], guide: Callable[..., Any], x: Tensor, y: Any
) -> tuple[Tensor, Tensor | float]:
    """Return one draw of the bound on log m(x, y) and the guide's scale of the class."""
    inferred = poutine.trace(guide).get_trace(x, y)
    scored = poutine.trace(poutine.replay(model, trace=inferred)).get_trace(x, y)
    total: Tensor | float = 0.0
    beta: Tensor | float = 1.0
    for trace, sign in ((scored, 1.0), (inferred, -1.0)):
        trace.compute_log_prob()
        for site in trace.nodes.values():
            if site["type"] == "sample" and "log_prob" in site:
                total = total + sign * site["log_prob"]
                if sign < 0 and isinstance(site["fn"], Labelled):
                    beta = site["scale"]
    assert isinstance(total, Tensor)
    return total, beta


def _prior(prior: Tensor | Sequence[float] | None, count: int) -> Tensor:
    if prior is None:
        return torch.full((count,), 1 / count)
    given = torch.as_tensor(prior, dtype=torch.get_default_dtype())
    if given.shape != (count,) or not bool((given > 0).all()) or abs(float(given.sum()) - 1) > 1e-4:
        raise ValueError(
            f"M2: prior is {given.tolist()}; pass {count} positive probabilities that sum to one."
        )
    return given / given.sum()


def _check(count: int, layers: int, likelihood: str, names: tuple[str, str, str]) -> None:
    if count < 2 or layers < 1:
        raise ValueError(
            f"M2: {count} classes and {layers} layers; take at least two classes and one layer."
        )
    if likelihood not in ("bernoulli", "gaussian"):
        raise ValueError(f"M2: likelihood is {likelihood!r}; it must be 'bernoulli' or 'gaussian'.")
    if len(set(names)) < 3:
        raise ValueError(
            f"M2: visible, hidden and label are {', '.join(map(repr, names))}; name three "
            "different sites."
        )


def _check_weights(labelled: float, share: float | None, classification: float) -> None:
    if not 0 < labelled < 1 or (share is not None and not 0 < share < 1):
        raise ValueError(
            f"M2: labelled_weight is {labelled} and labelled_share is {share}; both lie strictly "
            "between 0 and 1, the share may be None."
        )
    if not 0 <= classification < math.inf:
        raise ValueError(f"M2: classification_weight is {classification}; take 0 or more.")
