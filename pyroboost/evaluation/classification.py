"""Classes predicted by a model that has a class variable."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyroboost.compose import Cascade
from pyroboost.contexts import forked_rng, service
from pyroboost.evaluation.weights import draw, log_weights, row_blocks, take_rows
from pyroboost.handlers import capture
from pyroboost.likelihood import Kind
from pyroboost.metamodel import MetaModel
from pyroboost.sampling import effective_sample_size, log_mean_exp

__all__ = ["Predicted", "class_probabilities"]

Method = Literal["model", "posterior", "guide"]


class Predicted(NamedTuple):
    """Probabilities of classes and how they came about.

    Args:
        probabilities: one row per datum, each summing to one.  # (N, C)
        kind: ``"estimate"`` where densities were sampled or draws of h averaged, ``"exact"``
            where neither: q(y | x) of a single pair.
        ess: effective number of the draws of h by their importance weights, where they were
            weighted.  # (N,)
        num_samples: draws of z per class.
        num_draws: draws of h per datum.
    """

    probabilities: Tensor
    kind: Kind
    ess: Tensor | None
    num_samples: int
    num_draws: int


def class_probabilities(
    pair: MetaModel,
    x: Tensor,
    *,
    method: Method = "model",
    num_samples: int = 20,
    num_draws: int = 5,
    num_classes: int | None = None,
    label: str | None = None,
    memory: float = 256.0,
) -> Predicted:
    r"""Predict the class of each datum by a pair, or by the last stage of a cascade.

    The pair takes class numbers (N,) as its one further argument, as
    :class:`pyroboost.models.M2` does; the last stage of a cascade models $h = h_{n-1}$, the
    hidden value of the stage below, and h = x in a single pair.

    1. ``"model"``: the paper's $p(y \mid h) \propto m_n(h, y)$, averaged over h from the guides,

    $$\frac1R \sum_{r=1}^R \frac{\hat m_n(h_r, y)}{\sum_c \hat m_n(h_r, c)}, \quad
    h_r \sim q(h \mid x), \qquad
    \hat m_n(h, y) = \frac1S \sum_{s=1}^S \frac{m_n(h, y, z_s)}{q(z_s \mid h, y)}, \quad
    z_s \sim q(z \mid h, y)$$

    2. ``"posterior"``: p(y | x) of the whole cascade, each draw of the h weighted by what the
       stages below it and the last say of it,

    $$p(y \mid x) \approx \frac{\sum_r W_r\, \hat m_n(h_r, y)}{\sum_r W_r \sum_c
    \hat m_n(h_r, c)}, \qquad W_r = \prod_{i<n} \frac{m_i(h_{i-1} \mid h_i)}{q(h_i \mid
    h_{i-1})}$$

    3. ``"guide"``: $q(y \mid h)$ averaged over h from the guides.

    The first is what the second would be if q(h | x) were the posterior of the cascade. It needs
    few draws where the second needs many: see :attr:`Predicted.ess`. Both converge as S (for the
    second, R too) grows; at S = 1 the logarithm of each $\hat m_n$ is a lower bound in
    expectation.

    Args:
        pair: a pair with a class variable, or a cascade that ends in one.
        x: data.  # (N, ...)
        method: see above.
        num_samples: draws of z for each class and each h, S.
        num_draws: draws of the chain of h per datum, R; a single pair needs none.
        num_classes: number of classes C, where the pair has no ``num_classes`` of its own.
        label: name of the class variable, where the pair has no ``label``; for ``"guide"``.
        memory: bound on the working memory, in MiB.

    Returns:
        Probabilities per datum.

    Raises:
        ValueError: no data, too few draws, an unknown method, or a pair without classes.

    Example:
        >>> from pyroboost.models import M2
        >>> found = class_probabilities(M2(6, 3, 2, units=8), torch.zeros(5, 6))
        >>> found.probabilities.shape, bool(found.probabilities.sum(-1).allclose(torch.ones(5)))
        (torch.Size([5, 3]), True)

    Reference:
        Cascaded meta-models, section 2.6 and supplement C.
    """
    chain = list(pair) if isinstance(pair, Cascade) else [pair]
    count, name = _classes(pair, chain[-1], num_classes, label)
    if method not in ("model", "posterior", "guide"):
        raise ValueError(
            f"class_probabilities: method is {method!r}; take 'model', 'posterior' or 'guide'."
        )
    if num_samples < 1 or num_draws < 1 or len(x) < 1:
        raise ValueError(
            f"class_probabilities: {num_samples} samples, {num_draws} draws, {len(x)} data; each "
            "must be at least one."
        )
    draws = num_draws if len(chain) > 1 else 1
    blank = torch.zeros(len(x), dtype=torch.long, device=x.device)
    tables: dict[int, list[Tensor]] = {}
    weights: dict[int, list[Tensor]] = {}
    for rows, copies in row_blocks(pair, x, [blank], draws, memory):
        (block,) = take_rows([x], rows, len(x), copies)
        last, h, weight = _climb(pair, block, weighted=method == "posterior")
        if method == "guide":
            table = _guide(last, h, name)
        else:
            table = _log_joint(last, h, count, num_samples, memory)
        tables.setdefault(rows.start, []).append(table.reshape(copies, -1, count))
        weights.setdefault(rows.start, []).append(weight.reshape(copies, -1))
    kind: Kind = "exact" if method == "guide" and draws == 1 else "estimate"
    samples = 0 if method == "guide" else num_samples
    log_joint = _joined(tables)  # (R, N, C)
    if method != "posterior":
        return Predicted(log_joint.softmax(-1).mean(0), kind, None, samples, draws)
    total = log_joint + _joined(weights)[..., None]
    ess = effective_sample_size(total.logsumexp(-1))
    return Predicted(total.logsumexp(0).softmax(-1), kind, ess, samples, draws)


def _joined(blocks: dict[int, list[Tensor]]) -> Tensor:
    """Join blocks of draws, then blocks of data."""
    return torch.cat([torch.cat(parts) for _, parts in sorted(blocks.items())], dim=1)


def _classes(
    pair: MetaModel, last: MetaModel, count: int | None, label: str | None
) -> tuple[int, str]:
    """Return the number of classes and the name of the class variable."""
    own = getattr(last, "num_classes", None)
    if None not in (own, count) and own != count:
        raise ValueError(
            f"class_probabilities: num_classes is {count} and {type(last).__name__} has {own} "
            "classes; leave num_classes out."
        )
    found = own if count is None else count
    name = getattr(last, "label", "y") if label is None else label
    if not isinstance(found, int) or found < 2:
        raise ValueError(
            f"class_probabilities: {type(last).__name__} does not say how many classes it has; "
            "pass num_classes, or a pair such as M2 whose further argument are class numbers."
        )
    if isinstance(pair, Cascade) and len(pair.stage_args([None])[-1]) != 1:
        raise ValueError(
            "class_probabilities: the last stage of the cascade does not take the labels; build it "
            "with args=[..., (0,)]."
        )
    return found, name


def _climb(pair: MetaModel, x: Tensor, *, weighted: bool) -> tuple[MetaModel, Tensor, Tensor]:
    """Draw the chain of h once per datum: the last stage, its data, their log weights."""
    weight = torch.zeros(len(x), device=x.device)
    if not isinstance(pair, Cascade):
        return pair, x, weight
    below = list(zip(pair, pair.stage_args([None]), strict=True))[:-1]
    for stage, own in below:
        if weighted:
            drawn = draw(stage, x, *own)
            # m(x, h) / m(h) is m(x | h): the prior below gives way to the stage above.
            weight = weight + drawn.log_weight - drawn.log_prior
            x = drawn.hidden
        else:
            x = stage.encode(x, *own)
    return pair[-1], x, weight


def _guide(pair: MetaModel, x: Tensor, label: str) -> Tensor:
    with service(pair), capture(label) as site:
        pair.guide(x, None)
    if site.msg is None or not getattr(site.msg["fn"], "has_enumerate_support", False):
        raise ValueError(
            f"class_probabilities: the guide of {type(pair).__name__} has no discrete site "
            f"'{label}'; pass the name of its class variable as label."
        )
    law = site.msg["fn"]
    every = law.enumerate_support()
    found: Tensor = law.log_prob(every)
    return found.movedim(0, -1)


def _log_joint(pair: MetaModel, x: Tensor, count: int, samples: int, memory: float) -> Tensor:
    """Return log m(x, y) of every class by importance sampling, (N, C)."""
    columns = []
    # The same noise for all classes: their differences, which decide, lose most of it.
    seed = int(torch.randint(2**62, ()))
    for number in range(count):
        labels = torch.full((len(x),), number, dtype=torch.long, device=x.device)
        with forked_rng(seed):
            table = log_weights(pair, x, labels, num_samples=samples, memory=memory)
        columns.append(log_mean_exp(table).value)
    return torch.stack(columns, -1)
