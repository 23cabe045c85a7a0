"""One fit of boosting: its data, its loss, and the settings that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pyroboost.infer._boosting_callbacks import Pace, Track, epochs_of
from pyroboost.infer._boosting_losses import DrawnELBO, MappedELBO, MixtureELBO
from pyroboost.infer._boosting_pair import staged
from pyroboost.infer._round_law import Stage
from pyroboost.infer.batches import Batches
from pyroboost.infer.fit import Fit, fit
from pyroboost.infer.stratified import StratifiedELBO

if TYPE_CHECKING:
    from pyroboost.infer._boosting_bench import Bench

__all__ = ["train"]


def train(bench: Bench, address: Sequence[Any], stage: Stage, length: int) -> Fit:
    """Fit the pair of a round, or all components together.

    Args:
        bench: the pair and its data.
        address: the fit's kind, pass, component and attempt.
        stage: what is trained, and how.
        length: its steps or epochs.
    """
    options, name = bench.options, address[0]
    data, held_out, epochs, size = bench.data, bench.validation, length, 1
    if options.whole:
        epochs, size = epochs_of(length)
        data, held_out = torch.zeros(size, 1), torch.zeros(1, 1)
    mapped = bench.programs.mapped and not stage.whole and name != "joint"
    together = bench.programs.vectorized or mapped
    settings = _settings(bench, address, epochs, size, together)
    callbacks = list(settings.pop("callbacks", ()))
    blend = 0.0 if stage.objective == "mixture" and bench.networks else bench.blend
    if name == "fine-tune":
        stage.rate = blend
    elif name == "round" and stage.objective != "plain" and blend:
        batches = Batches(data, bench.batch_size, bench.device, shuffle=False).num_batches
        callbacks.append(Pace(stage, blend, epochs, batches))
    if options.track:
        callbacks.append(Track(lambda: bench.measure(stage, name)))
    return fit(
        bench.pair if name == "joint" else staged(bench.pair, bench.components, stage),
        data,
        epochs=epochs,
        batch_size=bench.batch_size,
        validation=held_out,
        loss=_loss(bench, stage, name, options.particles(together), mapped),
        callbacks=callbacks,
        seed=bench.stream("fit", *address),
        **settings,
    )


def _settings(
    bench: Bench, address: Sequence[Any], epochs: int, size: int, together: bool
) -> dict[str, Any]:
    """Return what else the fit is told: annealing in epochs, and where it writes."""
    options = bench.options
    settings = options.fit_settings(epochs, size, together)
    annealing = settings.pop("annealing", None)
    if address[0] == "round" and annealing is not None:
        settings["annealing"] = annealing
        if options.whole and callable(annealing):
            settings["annealing"] = lambda done: annealing(size * done)
        elif options.whole:
            settings["annealing"] = annealing / size
    if options.checkpoints is not None:
        settings["checkpoint"] = options.checkpoints / ("-".join(map(str, address)) + ".pt")
    return settings


def _loss(bench: Bench, stage: Stage, name: str, count: int, mapped: bool) -> Any:
    programs = bench.programs
    if name == "joint":
        return StratifiedELBO(
            count, max_plate_nesting=programs.nesting, vectorize_particles=programs.vectorized
        )
    elbo: Any = DrawnELBO(count, programs.nesting, stacks=programs.vectorized)
    if mapped and count > 1:
        elbo = MappedELBO(count, programs.nesting)
    if stage.objective != "mixture":
        return elbo
    return MixtureELBO(elbo, stage, bench.components, everything=bench.networks)
