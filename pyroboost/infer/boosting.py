"""Gradient boosting of flows: grow a guide's mixture component by component."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyroboost.infer._boosting_loop import Booster
from pyroboost.infer._boosting_report import BoostedRound, Boosting
from pyroboost.infer._boosting_settings import BoostSettings
from pyroboost.infer._mixture_weights import WeightDescent
from pyroboost.metamodel import MetaModel

__all__ = ["BoostedRound", "Boosting", "WeightDescent", "boost"]


def boost(
    pair: MetaModel | tuple[Callable[..., Any], Callable[..., Any]],
    data: Any = (),
    *,
    validation: Any = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 100,
    kwargs: Mapping[str, Any] | None = None,
    objective: str = "residual",
    entropy: float = 1.0,
    floor: float | None = 10.0,
    blend: float | None = None,
    weights: str | WeightDescent = "simplex",
    finetune: int = 1,
    finetune_length: int | None = None,
    finetune_objective: str = "mixture",
    joint: int = 0,
    start: int = 0,
    failures: int = 2,
    threshold: float = 2.0,
    num_particles: int | None = None,
    num_samples: int | None = None,
    evaluate_on: int = 500,
    track: bool = False,
    checkpoints: str | Path | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Boosting:
    r"""Boost the mixture of a guide: add components where the others fall short, and weigh them.

    A round trains one new component g against the exact density of the fixed mixture G,

    $$\min_g\; E_g\big[-\log p(x, z) + \log G(z \mid x) + \lambda \log g(z \mid x)\big],$$

    by an ordinary :func:`fit` of model and guide, in which the guide's one boosted site has the
    round's objective for its density. Parameters of the model and of the guide's base train with
    it; of the flows only its own does, and the others stand still, buffers too. Then the weights
    are chosen on fresh draws of all components, and the bound of the true mixture,

    $$\mathcal{L}(w) = \sum_c w_c\, E_{g_c}\Big[\log p(x, z) - \log \sum_j w_j g_j(z)\Big],$$

    is compared with that of before on other draws. A round that has not gained is put back, and so
    is a pass that has lost more than its error: component, encoder, decoder, weights.

    1. **Whole data**, ``steps=``: ``data`` are the model's arguments, each step uses all of them,
       and bounds are of the data set with errors over draws. Of a round's epochs the weights with
       the best bound on fixed draws are taken, by its objective. What is not given is chosen: 16
       draws in the training loss (4 for a model that takes one draw at a time), Adam with
       ``lr=5e-3``, a cosine over the round as ``scheduler``, ``clip_norm=10``.
    2. **Minibatches**, ``epochs=``: ``data`` are rows as in :func:`fit`. Bounds are per datum of
       ``validation``, or of the training data where there is none, with errors over data.
    3. **The guide** holds one :class:`pyroboost.distributions.Components` and samples one site
       from what it returns. A method ``propose(c, *args, **kwargs)`` places a new component at an
       informed start (and is told the number of fresh starts before if it names ``attempt``); else
       it starts as its builder makes it. A start that is always the same and straddles two modes
       will do so again: let the builder draw it.
    4. **Verdicts.** ``base``: the first component. If it is worse than its start by more than the
       error, the start is put back and the verdict says so. ``grows``: the bound gained more than
       its error times ``threshold``, and so did the component by itself. ``dropped``: only the
       other networks gained; they are kept, the component has weight 0. ``nothing gained``: all is
       put back. The last two are followed by a fresh start.

    Args:
        pair: a meta-model, or a tuple of a model and a guide.
        data: the model's arguments (a tuple, or one alone), or rows as in :func:`fit`.
        validation: held-out rows; only with ``epochs``.
        steps: steps of each round, for whole data, rounded up by a few for whole epochs: 20 or
            more, of up to 100 steps each.
        epochs: epochs of each round, for minibatches.
        batch_size: rows of a batch.
        kwargs: arguments of model and guide by name, for whole data.
        objective: ``"residual"``, the objective above (Eq. 11); ``"kl"``, where lambda scales the
            model's latent sites too, that is the whole KL (Eq. 12); ``"sampled"``, where one fixed
            component drawn for each example stands for G and is not held fixed in the base (the
            paper's own); ``"mixture"``: the bound of the whole mixture with the new component in it
            at weight 1/(k + 1). Its gradient by the new flow takes draws of that alone; where a
            base, encoder or decoder trains too, every component is drawn from, C runs a step. The
            first round is the plain bound.
        entropy: lambda.
        floor: log G counts for no less than so many nats below its own mean under G, taken when
            the round starts; beyond, there is no reward for going further away. They are counted
            over all dimensions: per dimension they would reward far too much where there are many.
            ``None``: no floor. Where G is nearly p, the residual objective with lambda = 1 has no
            optimum and the component flees; the share of its draws at the floor is in the table,
            and the round is put back.
        blend: rate, reached linearly over a round, at which an example is drawn from G and scored
            by the ordinary bound, so that decoder and encoder remember the others; constant in
            fine-tuning. Nothing is blended for ``"mixture"``, which has the others' draws where
            they matter. ``None``: 0.5 if the model has parameters, else 0. With ``"kl"`` and a
            lambda other than 1, all examples of a batch are blended or none.
        weights: ``"simplex"``, the largest bound over all weights on stored log densities;
            ``"line"``, over the new component's weight alone (Eq. 7); ``"gradient"`` or a
            :class:`WeightDescent`, Algorithm 1; ``"equal"``.
        finetune: passes in which each component trains again.
        finetune_length: its steps or epochs; a quarter of a round's by default. KL annealing is
            for rounds only.
        finetune_objective: as ``objective``; G are then all others.
        joint: steps or epochs of a last fit of all components and weights by
            :class:`StratifiedELBO`.
        start: first component to be trained; those before keep flows and weights.
        failures: how many fresh starts in a row may gain nothing before boosting stops.
        threshold: how many standard errors a gain must have.
        num_particles: draws of the training loss; 1 for minibatches where left out.
        num_samples: draws of each component in a table, per datum; 30 for minibatches and
            1000 for whole data (200 for a model that takes one draw at a time).
        evaluate_on: rows that serve the tables, at most.
        track: add to each epoch's row ``fixed_bound``, that of the fixed mixture under the
            networks of now, and ``mixture_bound``, with the new component at weight 1/(k + 1).
        checkpoints: folder of one checkpoint per fit and one of the decisions; the same call
            resumes from it and ends at the same result.
        seed: seed of all random streams; ``None`` draws one from the global generator.
        **settings: settings of :func:`fit`: ``lr``, ``optimizer``, ``scheduler``, ``annealing``
            (in steps for whole data, anew in each round), ``clip_norm``, ``callbacks``,
            ``progress``, ... ``None`` for ``scheduler`` or ``clip_norm`` leaves them out. With
            ``epochs`` also ``transform``, such as an encoding by the stages below: rows are
            transformed afresh in every epoch, those of the tables once. Annealing scales all
            latent terms by beta, log G and the floor included: each beta has a bound of its own,
            and the round follows that bound's functional gradient.

    Returns:
        The components and a report per round.

    Raises:
        ValueError: an option is of no use, or the guide has no single boosted site.
        NonFiniteLoss: the first component cannot be trained; later ones are put back.
        CheckpointError: the folder belongs to another call.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyroboost import flows
        >>> from pyroboost.distributions import Components
        >>> class Guide(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.components = Components(lambda: flows.affine(1), 2)
        ...     def forward(self):
        ...         base = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        ...         return pyro.sample("z", self.components(base))
        >>> def model():
        ...     pyro.sample("z", dist.StudentT(3.0, torch.zeros(1), 1.0).to_event(1))
        >>> result = boost((model, Guide()), steps=200, finetune=0, seed=0, lr=0.02)
        >>> result.rounds[0].verdict, result.components is not None
        ('base', True)

    Reference:
        Giaquinto and Banerjee, Gradient boosted flows (2020), Eq. 7 to 12 and Algorithm 1.
    """
    options = BoostSettings(
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        objective=objective,
        entropy=entropy,
        floor=floor,
        blend=blend,
        weights=weights,
        finetune=finetune,
        finetune_length=finetune_length,
        finetune_objective=finetune_objective,
        joint=joint,
        start=start,
        failures=failures,
        threshold=threshold,
        num_particles=num_particles,
        num_samples=num_samples,
        evaluate_on=evaluate_on,
        track=track,
        checkpoints=None if checkpoints is None else Path(checkpoints),
        seed=seed,
        fit=settings,
    )
    return Booster(pair, data, validation, kwargs or {}, options).run()
