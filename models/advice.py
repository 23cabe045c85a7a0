"""What to do next with a trained cascade: retrain, put a mixture on top, go on, or stop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from pyroboost.compose import Cascade
from pyroboost.contexts import forked_rng
from pyroboost.infer import Convergence, Gain, check_convergence, stage_gain
from pyroboost.metamodel import MetaModel
from pyroboost.models.gmm import GMM

__all__ = ["Advice", "Trial", "advise"]

Case = Literal["base", "grows", "not well trained", "close to the law below", "converged"]
_START_WEIGHT = 0.01
_WORDS: dict[Case, str] = {
    "base": "there is one stage, whose term is the bound itself",
    "grows": "it raises the bound",
    "not well trained": "it lowers the bound by more than its error: it is not well trained (the "
    "first of the three cases), so change its settings and train it again",
    "close to the law below": "it adds nothing within its error: what the stage below says of its "
    "hidden variable is already close to what the data make of it (the second case), so take a "
    "more powerful stage or stop",
    "converged": "it adds nothing within its error and nothing above it can: the bound has "
    "converged (the third case), so stop",
}


@dataclass(frozen=True)
class Trial:
    """A Gaussian mixture tried on top of the cascade.

    Args:
        components: number of components.
        gain: what it adds to the bound of data not used for its fit, in nats.
        train_gain: what it adds on the data it was fitted to; never below the logarithm of one
            minus the start's weight.
        bic: Bayesian information criterion of the fit, smaller is better.
        seconds: time of the fit.
        mixture: the fitted mixture.
    """

    components: int
    gain: Gain
    train_gain: Gain
    bic: float
    seconds: float
    mixture: GMM = field(repr=False)


@dataclass(frozen=True)
class Advice:
    """What was found of a cascade and what to do with it; ``print`` says it in words.

    Args:
        cascade: the cascade.
        terms: the term of each stage on held-out data, in nats.
        case: what the top stage's term means; three of the cases are the paper's.
        convergence: the evidence whether anything above can help; ``None`` for a top stage
            whose term already says that it must be trained again.
        trials: mixtures tried on top, for a real-valued hidden variable.
        chosen: the trial that ``criterion`` prefers.
        criterion: ``"held-out"`` or ``"bic"``.
        next_step: ``"retrain"``, ``"add the mixture"``, ``"add a stage"`` or ``"stop"``.
    """

    cascade: Cascade
    terms: tuple[Gain, ...]
    case: Case
    convergence: Convergence | None
    trials: tuple[Trial, ...]
    chosen: Trial | None
    criterion: str
    next_step: Literal["retrain", "add the mixture", "add a stage", "stop"]

    @property
    def boosted(self) -> Cascade:
        """The cascade with the chosen mixture on top.

        Raises:
            ValueError: no mixture was tried or none is advised.
        """
        if self.chosen is None or self.next_step != "add the mixture":
            raise ValueError(
                f"advise: no mixture is advised, the next step is to {self.next_step}; add a "
                "stage yourself by cascade + stage."
            )
        return self.cascade + self.chosen.mixture

    def describe(self) -> str:
        """Return the advice in words and numbers."""
        top = len(self.cascade) - 1
        name = type(self.cascade[top]).__name__
        lines = [f"Stage {i}: {term} nats" for i, term in enumerate(self.terms)]
        lines.append(f"The top stage ({top}, {name}): {_WORDS[self.case]}.")
        if self.convergence is not None:
            lines.append(f"Above it: {self.convergence.describe()}.")
        for t in self.trials:
            mark = "*" if t is self.chosen else " "
            lines.append(
                f"{mark} mixture of {t.components}: {t.gain} nats held out, {t.train_gain} in "
                f"training, BIC {t.bic:.0f}, {t.seconds:.1f} s"
            )
        if self.trials:
            lines.append(
                "A mixture that starts as the prior below cannot lower the bound of the data it "
                f"is fitted to by more than {-math.log1p(-_START_WEIGHT):.2f} nats; on other data "
                "it can."
            )
        return "\n".join([*lines, f"Next: {self._next()}."])

    def _next(self) -> str:
        if self.next_step == "add the mixture" and self.chosen is not None:
            return (
                f"add the mixture of {self.chosen.components} (cascade + advice.chosen.mixture), "
                f"chosen by {self.criterion}"
            )
        return {
            "retrain": "train the top stage again, for longer or with other settings",
            "add a stage": f"a further stage can raise the bound: {self._kind_of_stage()}",
            "stop": "stop, no further stage is worth its cost",
        }[self.next_step]

    def _kind_of_stage(self) -> str:
        top = self.cascade[-1]
        shape = top.hidden_shape
        if shape == ():
            return (
                f"one over the index '{top.hidden}', or a more powerful stage in place of the top "
                "one, which is the usual choice"
            )
        if self.trials:
            return "a VAE with a normal likelihood over the top hidden variable"
        return (
            "over bits an RBM that starts as the exchange of the one below, or a VAE with a "
            "Bernoulli likelihood"
        )

    __str__ = describe


def advise(
    cascade: Cascade | MetaModel,
    data: Tensor,
    *args: Any,
    held_out: Tensor | None = None,
    components: Sequence[int] = (1, 2, 5, 10, 20),
    criterion: Literal["held-out", "bic"] = "held-out",
    evaluate_on: int = 5000,
    seed: int = 0,
) -> Advice:
    r"""Say where a trained cascade stands, what a mixture on top would bring, and when to stop.

    Measured are the terms $L_i$ of the bound, the signs that nothing above can help, and, where
    the top hidden variable is real-valued, what Gaussian mixtures on top would add,

    $$L_{k+1} = \mathbb{E}_q [\log m_{k+1}(h_k) - \log m_k(h_k)].$$

    The number of components is chosen by held-out gain or by the Bayesian information criterion,
    $-2 \sum_n \log m(h_n) + p \log N$ for p parameters. A mixture is advised if its held-out
    gain exceeds two standard errors.

    Args:
        cascade: the cascade, or a single meta-model.
        data: data that it was trained on.  # (N, ...)
        *args: further arguments of the cascade; none may count the data.
        held_out: data that it was not trained on; half of ``data`` when left out, whose terms are
            then optimistic.  # (M, ...)
        components: numbers of components to try.
        criterion: what chooses among them.
        evaluate_on: how many data of either set serve at most.
        seed: seed of this function's own random stream.

    Returns:
        The numbers, the verdict and the next step.

    Raises:
        ValueError: too few data, or no number of components.

    Example:
        >>> import torch
        >>> from pyroboost.models import VAE
        >>> bits = (torch.rand(200, 6) < 0.5).float()
        >>> advice = advise(VAE(6, 2, units=8), bits, components=(1, 2))
        >>> advice.next_step in ("add the mixture", "add a stage", "stop")
        True

    Reference:
        Cascaded meta-models, section 2.4 (the three cases) and section 3 (strategies).
    """
    chain = cascade if isinstance(cascade, Cascade) else Cascade(cascade)
    _check(chain, data, held_out, components, criterion)
    if held_out is None:
        half = len(data) // 2
        data, held_out = data[:half], data[half:]
    data, held_out = data[:evaluate_on], held_out[:evaluate_on]
    terms = tuple(stage_gain(chain, i, held_out, *args, seed=seed + i) for i in range(len(chain)))
    if len(chain) > 1 and terms[-1].verdict() == "not well trained: retrain":
        return Advice(chain, terms, "not well trained", None, (), None, criterion, "retrain")
    with forked_rng(seed):
        below = [
            chain.climb(x, *args, stages=len(chain) - 1)[-1] if len(chain) > 1 else x
            for x in (data, held_out)
        ]
    found = check_convergence(chain[-1], below[0], held_out=below[1], seed=seed)
    trials = _trials(chain, data, held_out, args, components, seed)
    chosen = min(trials, key=lambda t: t.bic if criterion == "bic" else -t.gain.value, default=None)
    case = _case(terms, found)
    helps = chosen is not None and chosen.gain.verdict() == "grows"
    if helps:
        step: Literal["add the mixture", "add a stage", "stop"] = "add the mixture"
    else:
        step = "stop" if found.converged or case == "close to the law below" else "add a stage"
    return Advice(chain, terms, case, found, trials, chosen, criterion, step)


def _check(
    chain: Cascade,
    data: Tensor,
    held_out: Tensor | None,
    components: Sequence[int],
    criterion: str,
) -> None:
    if not chain.is_program:
        raise ValueError(
            "advise: the top stage is an energy, which has no hidden variable to build on; pass "
            "the stages below it."
        )
    if criterion not in ("held-out", "bic"):
        raise ValueError(f"advise: criterion is {criterion!r}; use 'held-out' or 'bic'.")
    if not components or min(components) < 1:
        raise ValueError(
            f"advise: components is {tuple(components)}; pass at least one number of 1 or more."
        )
    fewest = min(
        len(data) // 2 if held_out is None else len(data),
        len(data if held_out is None else held_out),
    )
    if fewest < 20:
        raise ValueError(f"advise: {fewest} data came for one of its measures; pass at least 20.")


def _case(terms: tuple[Gain, ...], found: Convergence) -> Case:
    if len(terms) == 1:
        return "base"
    if terms[-1].verdict() == "grows":
        return "grows"
    return "converged" if found.converged else "close to the law below"


def _trials(
    chain: Cascade,
    data: Tensor,
    held_out: Tensor,
    args: tuple[Any, ...],
    components: Sequence[int],
    seed: int,
) -> tuple[Trial, ...]:
    """Fit mixtures to the top hidden variable, where it is a vector of reals."""
    with forked_rng(seed):
        h, judged = (chain.climb(x, *args)[-1] for x in (data, held_out))
        if h.dim() != 2 or not h.is_floating_point() or bool(((h == 0) | (h == 1)).all()):
            return ()
        base, base_judged = (chain.log_prior(v, *args).value for v in (h, judged))
        return tuple(_trial(k, h, judged, base, base_judged) for k in components)


def _trial(k: int, h: Tensor, judged: Tensor, base: Tensor, base_judged: Tensor) -> Trial:
    began = time.perf_counter()
    # The start at the prior keeps the promise; the one without it can find a better optimum.
    fits = []
    for start in ("prior", "kmeans"):
        mixture = GMM(k, h.shape[1]).to(h)
        options: dict[str, Any] = {"start": start, "restarts": 2}
        found = mixture.fit_em(h, start_weight=_START_WEIGHT, **options)
        fits.append((found.history[-1], mixture))
    mixture = max(fits, key=lambda pair: pair[0])[1]
    seconds = time.perf_counter() - began
    own = mixture.log_marginal(h).value.detach()
    free = k - 1 + k * h.shape[1] + k * h.shape[1] * (h.shape[1] + 1) // 2
    return Trial(
        components=k,
        gain=_gain(mixture.log_marginal(judged).value - base_judged),
        train_gain=_gain(own - base),
        bic=float(-2 * own.double().sum()) + free * math.log(len(h)),
        seconds=seconds,
        mixture=mixture,
    )


def _gain(values: Tensor) -> Gain:
    values = values.detach().double()
    return Gain(float(values.mean()), float(values.std()) / math.sqrt(len(values)) + 1e-6)
