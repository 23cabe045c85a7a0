"""Guides of a posterior: a boosted one, and Pyro's own trained for the same time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from torch import Tensor

from pyroboost.experiments.posterior_models import POSTERIORS, Posterior
from pyroboost.guides import AutoBoostedFlow
from pyroboost.infer import boost

__all__ = ["BOOSTED", "GUIDES", "SIZES", "Sizes", "boosted", "draw", "rival", "train"]

BOOSTED = "AutoBoostedFlow"
GUIDES = ("AutoNormal", "AutoMultivariateNormal", "IAF", "spline coupling", BOOSTED)


@dataclass(frozen=True)
class Sizes:
    """Sizes and lengths.

    Args:
        posteriors: which of them.
        components: components of the boosted guide.
        steps: steps of a round.
        finetune: passes of fine-tuning, each a quarter as long for every component.
        particles: draws of a step, for every guide.
        draws: draws that judge a guide.
        repeats: how often it is judged.
        warmup: steps of NUTS before it draws.
        samples: draws of each of its chains.
        chains: its chains.
        depth: depth of its trees, at most.
    """

    posteriors: tuple[str, ...] = tuple(POSTERIORS)
    components: int = 3
    steps: int = 1000
    finetune: int = 2
    particles: int = 16
    draws: int = 4000
    repeats: int = 5
    warmup: int = 300
    samples: int = 1000
    chains: int = 2
    depth: int = 7


SIZES: dict[str, Sizes] = {
    "smoke": Sizes(
        ("banana", "eight schools, centred"),
        components=2,
        steps=3,
        particles=2,
        draws=100,
        repeats=2,
        warmup=10,
        samples=20,
    ),
    "cpu": Sizes(),
    "paper": Sizes(
        components=6,
        steps=3000,
        particles=32,
        draws=20_000,
        warmup=1000,
        samples=5000,
        chains=4,
        depth=10,
    ),
}


def rival(name: str, model: Callable[..., Any]) -> Any:
    """Return one of Pyro's guides by its name in the table."""
    if name == "AutoNormal":
        return AutoNormal(model)
    if name == "AutoMultivariateNormal":
        return AutoMultivariateNormal(model)
    return AutoNormalizingFlow(model, _iaf if name == "IAF" else _splines)


def _iaf(dim: int) -> Any:
    return transforms.iterated(2, transforms.affine_autoregressive, dim, hidden_dims=[32, 32])


def _splines(dim: int) -> Any:
    order = torch.arange(dim).flip(0)
    parts = [transforms.spline_coupling(dim, hidden_dims=[32]) for _ in range(4)]
    mixed = [part for one in parts for part in (one, transforms.Permute(order))]
    return transforms.ComposeTransformModule(mixed)


def train(guide: Any, model: Callable[..., Any], data: Any, seconds: float, sizes: Sizes) -> int:
    """Train by Adam, its rate falling along a cosine, until the time is gone; count the steps."""
    count, sized = sizes.particles, {"max_plate_nesting": 1}
    loss = Trace_ELBO(num_particles=count, vectorize_particles=count > 1, **sized)(model, guide)
    began, steps = time.process_time(), 0
    # A draw far out makes validation refuse what is then only a step that is left out.
    with pyro.validation_enabled(False):
        loss(*data)
        optimizer = torch.optim.Adam(guide.parameters(), lr=0.01)
        while (gone := (time.process_time() - began) / seconds) < 1 or steps < 1:
            for group in optimizer.param_groups:
                group["lr"] = 0.005 * (1 + math.cos(math.pi * min(1.0, gone))) + 1e-5
            optimizer.zero_grad()
            loss(*data).backward()
            size = torch.nn.utils.clip_grad_norm_(guide.parameters(), 100.0)
            if bool(size.isfinite()):
                optimizer.step()
            steps += 1
    return steps


def boosted(posterior: Posterior, data: Any, sizes: Sizes, seed: int) -> tuple[Any, float]:
    """Return a boosted guide and the processor time that it took."""
    began = time.process_time()
    guide = AutoBoostedFlow(posterior.model, sizes.components)
    guide(*data)
    boost(
        (posterior.model, guide),
        data,
        steps=sizes.steps,
        finetune=sizes.finetune,
        num_particles=sizes.particles,
        num_samples=min(1000, sizes.draws),
        seed=seed,
        progress=False,
    )
    return guide, time.process_time() - began


@torch.no_grad()
def draw(guide: Any, count: int) -> tuple[Tensor, Tensor]:
    """Draw unconstrained vectors from a trained guide and score them."""
    if isinstance(guide, AutoBoostedFlow):
        return guide.get_posterior().sample_and_log_prob((count,))
    if isinstance(guide, AutoNormalizingFlow):
        base, transform = guide.get_base_dist(), guide.get_transform()
        z = base.sample((count,))
        u = transform(z)
        return u, base.log_prob(z) - transform.log_abs_det_jacobian(z, u)
    if isinstance(guide, AutoContinuous):
        law = guide.get_posterior()
    else:
        names = list(guide.prototype_trace.stochastic_nodes)
        found = [guide._get_loc_and_scale(name) for name in names]
        loc, scale = (torch.cat([part[i].reshape(-1) for part in found]) for i in (0, 1))
        law = dist.Normal(loc, scale).to_event(1)
    u = law.sample((count,))
    return u, law.log_prob(u)
