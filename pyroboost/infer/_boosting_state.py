"""The state of a boosting to and from its folder, after every decision."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from pyroboost.infer import checkpoint as files
from pyroboost.infer._boosting_report import BoostedRound
from pyroboost.infer._mixture_table import Measured
from pyroboost.infer._mixture_weights import WeightStep
from pyroboost.infer.errors import CheckpointError

if TYPE_CHECKING:
    from pyroboost.infer._boosting_loop import Booster
    from pyroboost.infer._boosting_settings import BoostSettings

__all__ = ["read_seed", "read_state", "write_state"]

_FILE = "boosting.pt"
_FREE = {"checkpoints", "seed", "fit", "callbacks", "progress", "device"}  # may differ in a resume


def _described(booster: Booster) -> dict[str, Any]:
    options = vars(booster.options)
    own = {name: value for name, value in options.items() if name not in _FREE}
    own["weights"] = str(own["weights"])
    given = {name: value for name, value in options["fit"].items() if name not in _FREE}
    return {name: files.describe(value) for name, value in {**given, **own}.items()}


def read_seed(options: BoostSettings) -> int:
    """Return the seed asked for, the one that a killed boosting had, or a new one."""
    folder, seed = options.checkpoints, options.seed
    if folder is not None and (folder / _FILE).exists():
        kept = int(files.read(folder / _FILE)["seed"])
        if seed not in (None, kept):
            raise CheckpointError(
                f"boost: {folder / _FILE} was written with seed {kept} and this call has {seed}; "
                "call boost as before or name another folder."
            )
        return kept
    return int(torch.randint(2**62, ())) if seed is None else seed


def write_state(booster: Booster) -> None:
    """Write what stands after a decision, where a folder was given."""
    folder = booster.options.checkpoints
    if folder is None:
        return
    content = {
        "settings": _described(booster),
        "seed": booster.seed,
        "rounds": [asdict(r) for r in booster.rounds],
        "pair": booster.pair.state_dict(),
    }
    files.write(folder / _FILE, content)


def read_state(booster: Booster) -> None:
    """Take up what a killed boosting has left."""
    folder = booster.options.checkpoints
    if folder is None:
        return
    path = folder / _FILE
    if not path.exists():
        write_state(booster)
        return
    kept = files.read(path)
    files.check_settings(path, kept["settings"], _described(booster))
    files.restore(booster.pair, kept["pair"])
    booster.rounds = [_round(item) for item in kept["rounds"]]


def _round(item: dict[str, Any]) -> BoostedRound:
    item = {**item, "bound": Measured(*item["bound"])}
    for name in ("gain", "own"):
        item[name] = None if item[name] is None else Measured(*item[name])
    item["steps"] = tuple(WeightStep(*step) for step in item["steps"])
    return BoostedRound(**item)
