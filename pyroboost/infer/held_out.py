"""The bound on held-out data that chooses the weights of a fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pyroboost.contexts import evaluating, local_params
from pyroboost.infer.batches import Batches
from pyroboost.infer.rng import isolated_rng
from pyroboost.infer.weighting import weighed
from pyroboost.metamodel import MetaModel

__all__ = ["held_out_bound"]

# Every evaluation uses the same draws, so that two epochs differ by their weights alone.
SEED = 20_200_101


def held_out_bound(
    pair: MetaModel, batches: Batches, elbo: Any, explain: Callable[..., None]
) -> float:
    """Return the mean ELBO per held-out datum in nats, with the same draws every time.

    The pair is brought up to date first, and evaluated in eval mode without gradients; global
    generators and those of a ``DataLoader`` have their states back afterwards.

    Args:
        pair: the meta-model.
        batches: the held-out data.
        elbo: a Pyro ELBO with ``loss(model, guide, *batch)``.
        explain: told what failed, the batch, the random state before it, the error or ``None``
            and the batch's number, from 1; it raises where it finds what is not finite.
    """
    total, count = 0.0, 0
    kept = batches.generator_states()
    with isolated_rng(batches.device, SEED), evaluating(pair), torch.no_grad():
        pair.refresh()
        for number, rows in enumerate(batches.epoch(), 1):
            batch, weights = batches.split(rows)
            noise = torch.get_rng_state()
            try:
                with local_params():
                    loss = elbo.loss if weights is None else weighed(elbo.loss, weights)
                    value = -float(loss(pair.model, pair.guide, *batch))
            except Exception as error:
                explain("the held-out bound failed", batch, noise, error, number)
                raise
            if not math.isfinite(value):
                explain(f"the held-out bound is {value}", batch, noise, None, number)
            total, count = total + value, count + len(batch[0])
    batches.set_generator_states(kept)
    if not count:
        raise ValueError("fit: the validation data gave no batch; pass at least one.")
    return total / count
