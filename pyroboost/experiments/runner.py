"""Run an experiment at a scale and write its record and figure."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from pyroboost.experiments import record

__all__ = ["SCALES", "Experiment", "Findings", "Run", "Scale", "run_experiment"]

Scale = Literal["smoke", "cpu", "paper"]
_SMOKE = "smoke scale: other data and tiny models; the numbers mean nothing"
SCALES: tuple[Scale, ...] = get_args(Scale)


@dataclass(frozen=True)
class Run:
    """What an experiment is told about the run that it is part of.

    Args:
        scale: ``"smoke"`` (seconds, small data that need no download), ``"cpu"`` (under an hour
            on two cores) or ``"paper"`` (the paper's settings).
        seeds: one run per seed.
        out: folder for the record, the figure and the checkpoints.
        name: stem of the files, such as ``"cascade.table1.cpu"``.
        data_folder: where data lie; ``None``: the folder that the loaders choose.
        device: ``"cpu"`` or ``"cuda"``.
        say: told, in a line, how far the run is.
        progress: whether to show progress bars; ``None``: in terminals.
    """

    scale: Scale
    seeds: tuple[int, ...]
    out: Path
    name: str
    data_folder: Path | None = None
    device: str = "cpu"
    say: Callable[[str], None] = lambda line: None
    progress: bool | None = False

    def checkpoints(self, *parts: str) -> Path:
        """Return a folder for checkpoints; the same run finds them there again."""
        return self.out / "checkpoints" / self.name / Path(*parts)

    def forget(self) -> None:
        """Remove this run's checkpoints."""
        shutil.rmtree(self.checkpoints(), ignore_errors=True)
        folder = self.out / "checkpoints"
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@dataclass(frozen=True)
class Findings:
    """What an experiment found; the runner adds the rest of the record.

    Args:
        data: what the data were, binarisation and splits included.
        settings: everything that was set.
        assumed: what the paper does not say, and what was taken instead.
        rows: numbers, from :func:`pyroboost.experiments.record.measured`.
        shown: the metrics that a short table shows, in its order.
        claims: the paper's claims, checked.
        notes: what a reader of the numbers must know.
        draw: draws the figure into a file.
    """

    data: str
    settings: Mapping[str, Any]
    assumed: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    shown: Sequence[str]
    claims: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()
    draw: Callable[[Path], None] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Experiment:
    """A table or figure that can be run again.

    Args:
        name: paper and table, such as ``"cascade.table1"``.
        title: what it shows, in a line.
        reference: where it stands in the paper.
        function: what runs it.
        times: how long it takes at each scale, in words.
        seeds: how many seeds each scale runs.
    """

    name: str
    title: str
    reference: str
    function: Callable[[Run], Findings]
    times: Mapping[Scale, str]
    seeds: Mapping[Scale, int]


def _device(wanted: str) -> str:
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("the device is cuda, but torch sees none here; pass --device cpu.")
    return wanted


def run_experiment(
    experiment: Experiment,
    *,
    scale: Scale,
    out: Path,
    seed: int = 0,
    seeds: int | None = None,
    data_folder: Path | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
    progress: bool | None = False,
) -> Path:
    """Run an experiment and write ``<name>.<scale>.json`` and ``.png``.

    A run that was interrupted goes on from its checkpoints when it is started again in the same
    way; they are removed once the record is written.

    Args:
        experiment: what to run.
        scale: how large.
        out: folder of the files.
        seed: first seed.
        seeds: number of seeds; the experiment's own number for the scale when left out.
        data_folder: where data lie.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        say: told how far the run is.
        progress: whether to show progress bars.

    Returns:
        The file of the record.

    Raises:
        ValueError: a setting is of no use.
    """
    count = experiment.seeds[scale] if seeds is None else seeds
    if count < 1:
        raise ValueError(f"the number of seeds is {count}; take 1 or more.")
    where = _device(device)
    run = Run(
        scale=scale,
        seeds=tuple(range(seed, seed + count)),
        out=out,
        name=f"{experiment.name}.{scale}",
        data_folder=data_folder,
        device=where,
        say=say,
        progress=progress,
    )
    out.mkdir(parents=True, exist_ok=True)
    resumed = run.checkpoints().exists()
    began = time.perf_counter()
    found = experiment.function(run)
    seconds = time.perf_counter() - began
    figures = []
    if found.draw is not None:
        figures.append(f"{run.name}.png")
        found.draw(out / figures[0])
    path = out / f"{run.name}.json"
    record.write(
        {
            "format": record.FORMAT,
            "name": experiment.name,
            "title": experiment.title,
            "reference": experiment.reference,
            "scale": scale,
            "date": record.today(),
            "data": found.data,
            "seeds": list(run.seeds),
            "settings": dict(found.settings),
            "assumed": list(found.assumed),
            **record.environment(where),
            "seconds": round(seconds, 1),
            "resumed": resumed,
            "rows": [dict(row) for row in found.rows],
            "shown": list(found.shown),
            "claims": [dict(one) for one in found.claims],
            "notes": [*([_SMOKE] if scale == "smoke" else []), *found.notes],
            "figures": figures,
        },
        path,
    )
    run.forget()
    return path
