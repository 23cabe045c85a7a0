"""The record of a result: one JSON with settings, seeds, machine, numbers, errors and claims."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "FORMAT",
    "check",
    "claim",
    "environment",
    "measured",
    "over_seeds",
    "read",
    "today",
    "write",
]

FORMAT = 1
_PACKAGES = ("pyroboost", "torch", "pyro-ppl", "arviz", "numpy", "scikit-learn")
_KEYS = {
    "format", "name", "title", "reference", "scale", "date", "data", "seeds", "settings",
    "assumed", "versions", "machine", "seconds", "resumed", "rows", "shown", "claims", "notes",
    "figures",
}  # fmt: skip
_ROW_KEYS = {"name", "metric", "value", "std_error", "seed_error", "kind", "unit", "paper"}
_KINDS = ("exact", "bound", "estimate", "measure")
_ABSOLUTE = re.compile(r"(^|[\s'\"(=])(/[\w.-]+/|[A-Za-z]:[\\/]|\\\\)")


def measured(
    name: str,
    metric: str,
    value: float,
    *,
    std_error: float | None,
    kind: str,
    unit: str = "nats",
    paper: float | None = None,
) -> dict[str, Any]:
    """Return one row of a record.

    Args:
        name: what was measured, such as ``"k = 2"``.
        metric: how, such as ``"lower bound, test"``.
        value: the number.
        std_error: its standard error over data and Monte Carlo; ``None`` where there is none.
        kind: ``"exact"``, ``"bound"``, ``"estimate"``, or ``"measure"`` for what is no likelihood.
        unit: unit of the number.
        paper: the paper's number, where it has one.

    Example:
        >>> row = measured("k = 1", "lower bound", -3.0, std_error=0.1, kind="bound", paper=-2.5)
        >>> row["value"], row["paper"]
        (-3.0, -2.5)
    """
    return over_seeds(name, metric, [(value, std_error)], kind=kind, unit=unit, paper=paper)


def over_seeds(
    name: str,
    metric: str,
    runs: Sequence[tuple[float, float | None]],
    *,
    kind: str,
    unit: str = "nats",
    paper: float | None = None,
) -> dict[str, Any]:
    r"""Return one row that pools runs with several seeds on the same data.

    The value is the mean over seeds. ``std_error`` is the mean of the runs' errors, which more
    seeds do not lower because the runs share their data; ``seed_error`` is the standard deviation
    over seeds divided by $\sqrt{n}$.

    Args:
        name: what was measured.
        metric: how.
        runs: value and standard error of each seed.
        kind: as in :func:`measured`.
        unit: unit of the number.
        paper: the paper's number, where it has one.

    Example:
        >>> row = over_seeds("k = 1", "lower bound", [(-3.0, 0.1), (-1.0, 0.3)], kind="bound")
        >>> row["value"], row["seed_error"]
        (-2.0, 1.0)
    """
    values = [float(value) for value, _ in runs]
    errors = [float(error) for _, error in runs if error is not None]
    n, mean = len(values), sum(values) / len(values)
    spread = None
    if n > 1:
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    found: dict[str, Any] = {
        "name": name,
        "metric": metric,
        "value": mean,
        "std_error": sum(errors) / len(errors) if errors else None,
        "seed_error": spread,
        "kind": kind,
        "unit": unit,
        "paper": paper,
    }
    if n > 1:
        found["by_seed"] = values
    return found


def claim(text: str, holds: bool, evidence: str) -> dict[str, Any]:
    """Return a claim of a paper, whether it held here, and the numbers that say so.

    Example:
        >>> claim("a second VAE raises the bound", True, "L_2 = 1.20 ± 0.05")["holds"]
        True
    """
    return {"claim": text, "holds": bool(holds), "evidence": evidence}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Return versions and a generic description of the machine: no host names, no paths.

    Args:
        device: where the models ran.

    Example:
        >>> sorted(environment())
        ['machine', 'versions']
    """
    on_gpu = torch.device(device).type == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "machine": {
            "cores": cores,
            "threads": torch.get_num_threads(),
            "cpu": _cpu_name(),
            "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        },
    }


def today() -> str:
    """Return the date of a run, in UTC."""
    return datetime.now(UTC).date().isoformat()


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [s for k, v in value.items() for s in (str(k), *_strings(v))]
    return [s for v in value for s in _strings(v)] if isinstance(value, list | tuple) else []


def check(record: Any, where: str = "record") -> dict[str, Any]:
    """Return a record if it is complete, plain and free of this machine's paths.

    Args:
        record: what a JSON file held.
        where: how errors name it.

    Raises:
        ValueError: something is missing or does not belong; the sentence says what.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{where} is not a result of format {FORMAT}; run the experiment again.")
    missing = sorted(_KEYS - set(record))
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; run the experiment again.")
    for row in record["rows"]:
        absent = sorted(_ROW_KEYS - set(row))
        if absent or row["kind"] not in _KINDS:
            raise ValueError(
                f"{where}: the row '{row.get('name')}' lacks {', '.join(absent) or 'a known kind'};"
                " build it with measured() or over_seeds()."
            )
        if not math.isfinite(row["value"]):
            raise ValueError(f"{where}: '{row['name']}' is {row['value']}; the run has failed.")
    for one in record["claims"]:
        if set(one) != {"claim", "holds", "evidence"} or not isinstance(one["holds"], bool):
            raise ValueError(f"{where}: a claim has the keys {sorted(one)}; build it with claim().")
    paths = [text for text in _strings(record) if _ABSOLUTE.search(text)]
    if paths:
        raise ValueError(f"{where} holds what looks like a path, {paths[0]!r}; leave it out.")
    return record


def write(record: dict[str, Any], path: Path) -> None:
    """Check a record and write it in one step, never half."""
    check(record, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Read and check a record.

    Raises:
        ValueError: the file is no record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable JSON; run the experiment again.") from error
    return check(record, path.name)
