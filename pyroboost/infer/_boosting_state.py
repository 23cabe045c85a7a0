"""The state of a boosting to and from its folder, after every decision."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyroboost.infer import checkpoint as files
from pyroboost.infer._boosting_report import BoostedRound
from pyroboost.infer._mixture_table import Measured
from pyroboost.infer._mixture_weights import WeightStep
from pyroboost.infer.batches import Batches
from pyroboost.infer.errors import CheckpointError

if TYPE_CHECKING:
    from pyroboost.infer._boosting_loop import Booster
    from pyroboost.infer._boosting_settings import BoostSettings

__all__ = ["forget", "read_seed", "read_state", "write_state"]

_FILE = "boosting.pt"
_FREE = {"checkpoints", "seed", "fit", "callbacks", "progress", "device"}  # may differ in a resume


def _described(booster: Booster) -> dict[str, Any]:
    options = vars(booster.options)
    own = {name: value for name, value in options.items() if name not in _FREE}
    own["weights"] = str(own["weights"])
    given = {name: value for name, value in options["fit"].items() if name not in _FREE}
    described = {name: files.describe(value) for name, value in {**given, **own}.items()}
    if booster.digest is None:
        booster.digest = _digest(booster)
    return {**described, "data": booster.digest, "parameters": _shapes(booster)}


def _shapes(booster: Booster) -> list[Any]:
    """Return what tells one pair from another."""
    return [[name, list(p.shape)] for name, p in booster.inner.named_parameters()]


def _digest(booster: Booster) -> list[Any]:
    """Return what tells one data set from another: some rows, or all of whole data."""
    if booster.options.whole:
        digest = hashlib.sha256()
        _feed(digest, [booster.own_args, booster.own_kwargs])
        return [digest.hexdigest()[:16]]
    found = Batches(booster.data, booster.batch_size, booster.device, shuffle=False).describe()
    if booster.held_out:
        held = Batches(booster.validation, booster.batch_size, booster.device, shuffle=False)
        found += held.describe()
    return found


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        kept = value.detach().cpu().contiguous()
        digest.update(repr((tuple(kept.shape), str(kept.dtype))).encode())
        digest.update(kept.flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for name in sorted(value, key=repr):
            digest.update(repr(name).encode())
            _feed(digest, value[name])
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(digest, item)
    else:
        digest.update(repr(files.describe(value)).encode())


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


def forget(booster: Booster) -> None:
    """Remove what this boosting has written so far."""
    folder = booster.options.checkpoints
    if folder is not None:
        for path in folder.glob("*.pt"):
            path.unlink()


def _round(item: dict[str, Any]) -> BoostedRound:
    item = {**item, "bound": Measured(*item["bound"])}
    for name in ("gain", "own"):
        item[name] = None if item[name] is None else Measured(*item[name])
    item["steps"] = tuple(WeightStep(*step) for step in item["steps"])
    return BoostedRound(**item)
