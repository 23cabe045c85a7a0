"""Gradient boosted flows, Table 1: the models, how they are trained, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyroboost import flows
from pyroboost.contexts import forked_rng, service
from pyroboost.evaluation import elbo, log_likelihood
from pyroboost.experiments import parts
from pyroboost.experiments.flows_vae_settings import Pictures, Sizes
from pyroboost.experiments.runner import Run
from pyroboost.flows import Flow
from pyroboost.guides import BoostedFlowGuide, FlowGuide
from pyroboost.infer import fit
from pyroboost.infer.boosting import Boosting, boost
from pyroboost.metamodel import datum_log_prob
from pyroboost.models import VAE, GatedConvVAE

__all__ = ["Judged", "boosted", "bounds", "build", "finetuned", "judge", "seconds_of", "trained"]


def _flow(name: str, sizes: Sizes) -> tuple[Callable[[int], Flow], bool]:
    """Return what builds a model's flow, and whether the flow is amortised."""
    context = sizes.context
    if name == "Planar":
        return partial(flows.planar, steps=sizes.steps, context=context), True
    if name == "Radial":
        return partial(flows.radial, steps=sizes.steps, context=context), True
    if name == "Sylvester":
        vectors = min(sizes.vectors, sizes.latent)
        return partial(flows.sylvester, steps=sizes.steps, vectors=vectors, context=context), True
    if name == "IAF":
        return partial(flows.iaf, steps=sizes.couplings, units=sizes.units, context=context), True
    return partial(flows.realnvp, steps=sizes.couplings, units=sizes.units), False


def build(name: str, found: Pictures, sizes: Sizes) -> VAE:
    """Return a model of the table, untrained.

    Args:
        name: its row.
        found: the images.
        sizes: sizes.
    """
    guide: Callable[[nn.Module], nn.Module] | None = None
    amortised = False
    if name != "VAE":
        flow, amortised = _flow(name, sizes)
        if name.startswith("GBF"):
            count = sizes.components

            def guide(encoder: nn.Module) -> nn.Module:
                return BoostedFlowGuide(encoder, sizes.latent, count, flow)
        else:

            def guide(encoder: nn.Module) -> nn.Module:
                return FlowGuide(encoder, sizes.latent, flow)

    settings: dict[str, Any] = {"guide": guide}
    if found.levels:
        settings |= {"likelihood": "discretized", "levels": found.levels}
    if sizes.network == "gated":
        return GatedConvVAE(
            found.dim,
            sizes.latent,
            image_shape=(1, *found.shape),
            channels=sizes.channels,
            decoder_channels=sizes.decoder_channels,
            **settings,
        )
    return VAE(
        found.dim,
        sizes.latent,
        units=sizes.width,
        layers=sizes.layers,
        batch_norm=False,
        context=sizes.context if amortised else 0,
        **settings,
    )


def _lengths(epochs: int, sizes: Sizes, run: Run) -> dict[str, Any]:
    return {
        "epochs": epochs,
        "batch_size": sizes.batch_size,
        "lr": 1e-3,
        "scheduler": partial(CosineAnnealingLR, T_max=epochs),
        "patience": sizes.patience,
        "progress": run.progress,
    }


def trained(run: Run, name: str, found: Pictures, sizes: Sizes, seed: int) -> tuple[VAE, float]:
    """Train a model that is not boosted for as many epochs as a boosted one gets in all.

    Returns:
        The model and the seconds that training took.
    """
    pair = parts.seeded(seed, partial(build, name, found, sizes)).to(run.device)
    folder = run.checkpoints(f"seed{seed}", name)
    result = fit(
        pair,
        found.train,
        validation=found.validation,
        annealing=sizes.total / 4,
        seed=100 * seed,
        checkpoint=_made(folder) / "fit.pt",
        **_lengths(sizes.total, sizes, run),
    )
    return pair, result.seconds


def boosted(
    run: Run,
    found: Pictures,
    sizes: Sizes,
    seed: int,
    *,
    folder: str = "GBF",
    blend: float = 0.5,
    watch: Callable[[VAE], Any] | None = None,
    first: tuple[VAE, float] | None = None,
) -> tuple[VAE, Boosting, float]:
    """Boost RealNVP without fine-tuning.

    The first round is an ordinary fit of the first component, with a length of its own.

    Args:
        run: the run.
        found: the images.
        sizes: sizes.
        seed: the run's seed.
        folder: where its checkpoints are.
        blend: the last rate at which draws from the fixed components are blended in.
        watch: a function from the model to a callback of every fit.
        first: a trained RealNVP and its seconds, to boost instead of training one again.

    Returns:
        The model, the report of the further rounds, and the seconds of all.
    """
    pair = parts.seeded(seed, partial(build, "GBF", found, sizes)).to(run.device)
    more: dict[str, Any] = {} if watch is None else {"callbacks": [watch(pair)]}
    place = _made(run.checkpoints(f"seed{seed}", folder))
    if first is not None:
        _take(pair, first[0])
        seconds = first[1]
    else:
        seconds = fit(
            pair,
            found.train,
            validation=found.validation,
            annealing=sizes.first / 4,
            seed=100 * seed,
            checkpoint=place / "first.pt",
            **more,
            **_lengths(sizes.first, sizes, run),
        ).seconds
    lengths = _lengths(sizes.epochs, sizes, run)
    if sizes.frozen:
        how: dict[str, Any] = {**lengths, **_FROZEN}
    else:
        how = {
            **lengths,
            "annealing": sizes.epochs / 4,
            "blend": blend,
            "objective": sizes.objective,
        }
    with _networks(pair, still=sizes.frozen):
        report = boost(
            pair,
            found.train,
            validation=found.validation,
            start=1,
            finetune=0,
            seed=100 * seed,
            checkpoints=place,
            **more,
            **how,
        )
    return pair, report, seconds + seconds_of(report)


def _take(pair: VAE, trained: VAE) -> None:
    """Give a boosted model the networks of a trained one, and its flow as the first component."""
    pair.model.load_state_dict(trained.model.state_dict())
    own: Any = pair.guide.fn
    other: Any = trained.guide.fn
    own.encoder.load_state_dict(other.encoder.state_dict())
    own.components.flows[0].load_state_dict(other.flow.state_dict())


def finetuned(
    run: Run,
    pair: VAE,
    found: Pictures,
    sizes: Sizes,
    seed: int,
    *,
    folder: str = "GBF+",
    watch: Callable[[VAE], Any] | None = None,
) -> Boosting:
    """Fine-tune a boosted model in place, each component in turn."""
    more: dict[str, Any] = {} if watch is None else {"callbacks": [watch(pair)]}
    lengths = _lengths(sizes.finetune, sizes, run)
    with _networks(pair, still=sizes.frozen):
        return boost(
            pair,
            found.train,
            validation=found.validation,
            start=sizes.components,
            finetune=1,
            finetune_length=sizes.finetune,
            seed=100 * seed + 1,
            checkpoints=_made(run.checkpoints(f"seed{seed}", folder)),
            **more,
            **({**lengths, **_FROZEN} if sizes.frozen else lengths),
        )


_FROZEN: dict[str, Any] = {"objective": "mixture", "lr": 5e-3, "blend": 0.0}


@contextmanager
def _networks(pair: VAE, *, still: bool) -> Iterator[None]:
    """Hold still all of a model but its flows."""
    guide: Any = pair.guide.fn
    flows = {id(p) for p in guide.components.parameters()}
    rest = [p for p in pair.parameters() if id(p) not in flows and p.requires_grad] if still else []
    for p in rest:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in rest:
            p.requires_grad_(True)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True)
class Judged:
    """What was found on test data, a number for each image, in nats.

    Args:
        paper: -ELBO with each draw scored by the component that drew it.  # (N,)
        bound: -ELBO of the whole mixture, on the same draws.  # (N,)
        likelihood: -log m(x), importance-sampled.  # (N,)
        used: components of positive weight; 1 for a model that is not boosted.
    """

    paper: Tensor
    bound: Tensor
    likelihood: Tensor
    used: int = 1


def judge(pair: VAE, x: Tensor, sizes: Sizes, *, seed: int) -> Judged:
    """Measure a model on test images, from a random stream of its own."""
    with forked_rng(seed):
        paper, bound = bounds(pair, x, draws=3, others=3 * sizes.components)
        estimate = log_likelihood(pair, x, num_samples=sizes.importance)
    guide: Any = pair.guide.fn
    used = len(guide.components.active) if isinstance(guide, BoostedFlowGuide) else 1
    return Judged(-paper.cpu(), -bound.cpu(), -estimate.value.cpu(), used)


@torch.no_grad()
def bounds(pair: VAE, x: Tensor, *, draws: int, others: int) -> tuple[Tensor, Tensor]:
    r"""Return the paper's bound and the bound of the mixture, on the same draws.

    .. math:: \sum_c w_c E_{g_c}[\log m(x, z) - \log g_c(z)] \le
        \sum_c w_c E_{g_c}[\log m(x, z) - \log \textstyle\sum_j w_j g_j(z)]

    A guide of a single law has one bound, the ELBO.

    Args:
        pair: the model.
        x: images.  # (N, D)
        draws: draws per image from each component of a mixture.
        others: draws per image from a single law.

    Returns:
        Both bounds of each image in nats.  # (N,), (N,)
    """
    guide: Any = pair.guide.fn
    if not isinstance(guide, BoostedFlowGuide):
        single = elbo(pair, x, num_samples=others).value
        return single, single
    found = [_strata(pair, guide, rows, draws) for rows in torch.split(x, 500)]
    return torch.cat([own for own, _ in found]), torch.cat([mixed for _, mixed in found])


def _strata(pair: VAE, guide: BoostedFlowGuide, x: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    own, mixed = x.new_zeros(len(x)), x.new_zeros(len(x))
    with service(pair):
        law = guide.posterior(x)
        for c in guide.components.active:
            share = float(guide.components.weights[c]) / draws
            for _ in range(draws):
                z, log_g = law.rsample_component_and_log_prob(c)
                joint = _joint(pair, x, z)
                own += share * (joint - log_g)
                mixed += share * (joint - law.log_prob(z))
    return own, mixed


def _joint(pair: VAE, x: Tensor, z: Tensor) -> Tensor:
    """Return log m(x, z) of each image."""
    program = poutine.condition(pair.model, data={pair.hidden: z})
    trace = poutine.trace(program).get_trace(x)
    trace.compute_log_prob()
    names = (pair.visible, pair.hidden)
    total: Tensor = sum(
        (datum_log_prob(trace.nodes[name], len(x)) for name in names), x.new_zeros(len(x))
    )
    return total


def seconds_of(report: Boosting) -> float:
    """Return how long a boosting took, its judgements included."""
    return sum(r.seconds for r in report.rounds)
