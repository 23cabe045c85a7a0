"""What the semi-supervised table of cascaded meta-models says, and how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyroboost.experiments.record import claim

__all__ = ["ACCURACY", "BRIER", "CALIBRATION", "COLUMNS", "PAPER", "SHOWN", "chart", "verdicts"]

ACCURACY, CALIBRATION, BRIER = "accuracy", "calibration error", "Brier score"
COLUMNS = {
    "1 model": (1, False),
    "2 models": (2, False),
    "1 model + classification loss": (1, True),
    "2 models + classification loss": (2, True),
}
PAPER = {
    100: (94.32, 95.20, 88.03, 96.67),
    600: (96.04, 95.74, 95.06, 97.41),
    1000: (97.38, 96.10, 96.40, 97.60),
    3000: (97.52, 96.57, 96.08, 97.82),
}
SHOWN = f"{ACCURACY} by the model, test"


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over draws of labels and its standard error."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def verdicts(found: Mapping[tuple[str, int], Sequence[float]]) -> list[dict[str, Any]]:
    """Check what the paper says and shows against accuracies of p(y | h), in per cent.

    Args:
        found: accuracy of each draw of labels, by column and number of labels.

    Returns:
        The claims.
    """
    counts = sorted({count for _, count in found})
    few, many = counts[0], counts[-1]
    mean = {key: _spread(values) for key, values in found.items()}

    def told(column: str, count: int) -> str:
        value, error = mean[column, count]
        return f"{value:.2f} ± {error:.2f} ({column}, {count} labels)"

    own = [column for column, (_, loss) in COLUMNS.items() if not loss]
    claims = [
        claim(
            f"with {few} labels, two models classify better than one",
            mean["2 models", few][0] > mean["1 model", few][0],
            f"{told('2 models', few)}, {told('1 model', few)}; the paper's are 95.20 and 94.32",
        ),
        claim(
            "classification is good without any classification loss: at least 90 per cent with "
            f"{few} labels",
            max(mean[column, few][0] for column in own) >= 90,
            ", ".join(told(column, few) for column in own),
        ),
    ]
    claims += [
        claim(
            f"{column}: more labels help",
            mean[column, many][0] > mean[column, few][0],
            f"{told(column, few)}, {told(column, many)}",
        )
        for column in COLUMNS
    ]
    off = {
        (column, count): mean[column, count][0] - PAPER[count][list(COLUMNS).index(column)]
        for column in own
        for count in counts
        if count in PAPER
    }
    if off:
        worst = min(off, key=off.__getitem__)
        claims.append(
            claim(
                "the models without classification loss come within two points of the paper's "
                "accuracy",
                off[worst] > -2,
                f"furthest below: {told(*worst)}, {-off[worst]:.2f} points less",
            )
        )
    return claims


def chart(path: Path, *, rows: Sequence[Mapping[str, Any]], labels: Sequence[int]) -> None:
    """Draw accuracy against the number of labels, a line per column, the paper's dashed."""
    from matplotlib.figure import Figure

    found = {row["name"]: row for row in rows if row["metric"] == SHOWN}
    figure = Figure(figsize=(5.0, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, column in enumerate(COLUMNS):
        own = [found[f"{column}, {count} labels"] for count in labels]
        axes.errorbar(
            labels,
            [row["value"] for row in own],
            yerr=[row["seed_error"] or 0.0 for row in own],
            color=f"C{number}",
            marker="o",
            markersize=4,
            linewidth=1,
            label=column,
        )
        if all(row["paper"] is not None for row in own):
            values = [row["paper"] for row in own]
            axes.plot(labels, values, color=f"C{number}", linestyle="--", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(list(labels), [str(count) for count in labels])
    axes.set_xlabel("labels (dashed: the paper's accuracy)", fontsize=8)
    axes.set_ylabel("test accuracy by the model, per cent", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
