"""A fit's whole state to and from its checkpoint file."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pyroboost.infer import checkpoint as files
from pyroboost.infer.rng import get_rng_state, set_rng_state
from pyroboost.infer.settings import Counters

if TYPE_CHECKING:
    from pyroboost.infer.loop import Loop

__all__ = ["load", "save"]


def described(loop: Loop) -> dict[str, Any]:
    """Return what must be the same for a fit to be the same, as plain data."""
    settings, loss = loop.settings, loop.settings.loss
    named = dict(loop.pair.named_parameters())
    return {
        "data": loop.train.describe(),
        "validation": loop.held_out.describe() if loop.held_out else None,
        "batch_size": loop.train.batch_size,
        "optimizer": type(loop.optimizer).__qualname__,
        "optimizer_defaults": {
            name: files.describe(value) for name, value in loop.optimizer.defaults.items()
        },
        "scheduler": type(loop.scheduler).__qualname__ if loop.scheduler else None,
        "loss": [
            files.describe(loss),
            getattr(loss, "num_particles", None),
            getattr(loss or loop.pair.objective(), "gradient", None),
            loop.pair.num_particles,
        ],
        "annealing": files.describe(settings.annealing),
        "clip_norm": settings.clip_norm,
        # Files of fits without it, older ones among them, stay readable.
        **({"max_skipped": settings.max_skipped} if settings.max_skipped else {}),
        "patience": settings.patience,
        "seed": settings.seed,
        "num_validation_particles": settings.num_validation_particles,
        "trainable": [
            [name if name in named else "param", list(tensor.shape)]
            for name, tensor in loop.trainable.items()
        ],
    }


def load(loop: Loop) -> bool:
    """Take a fit up where its checkpoint left it; ``False`` if there is none to resume."""
    path = loop.settings.checkpoint
    if path is None or not loop.settings.resume or not path.exists():
        return False
    kept = files.read(path)
    files.check_settings(path, kept["settings"], described(loop))
    files.restore(loop.pair, kept["pair"])
    loop.optimizer.load_state_dict(kept["optimizer"])
    if loop.scheduler is not None:
        loop.scheduler.load_state_dict(kept["scheduler"])
    loop.counters, loop.best = Counters(**kept["counters"]), kept["best"]
    loop.good = kept["good"] or files.snapshot(loop.pair)
    # The order of an epoch follows from the state at its start, all else from the state now.
    loop.epoch_rng, loop.epoch_generators = kept["epoch_rng"], kept["epoch_generators"]
    loop.train.set_generator_states(loop.epoch_generators)
    set_rng_state(loop.epoch_rng, loop.device)
    loop.resumed_rng = kept["rng"] if loop.counters.batch else None
    return True


def save(loop: Loop) -> None:
    """Write the checkpoint, where one is wanted and could be resumed."""
    path, counters = loop.settings.checkpoint, loop.counters
    if path is None or (counters.batch and not loop.train.resumes_within_epoch):
        return  # a custom iterable is resumed from the epoch's start, which is on disk already
    rng = get_rng_state(loop.device)
    if not counters.batch:
        loop.epoch_rng, loop.epoch_generators = rng, loop.train.generator_states()
    content = {
        "settings": described(loop),
        "counters": asdict(counters),
        "pair": loop.pair.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "scheduler": loop.scheduler.state_dict() if loop.scheduler else None,
        "rng": rng,
        "epoch_rng": loop.epoch_rng,
        "epoch_generators": loop.epoch_generators,
        "best": loop.best,
        "good": loop.good if counters.batch else None,  # at an epoch's end it is the pair itself
    }
    files.write(path, content)
