"""Results as Markdown, so that no number in a README is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pyroboost.experiments import record

__all__ = ["RESULTS", "SUMMARY", "committed", "markdown", "summary", "update"]

RESULTS = ("<!-- results: begin -->", "<!-- results: end -->")
SUMMARY = ("<!-- summary: begin -->", "<!-- summary: end -->")


def committed(folder: Path | None = None) -> list[dict[str, Any]]:
    """Return the records that come with the package, or those of a folder, by name.

    Args:
        folder: where to look instead of the package.
    """
    if folder is not None:
        found = sorted(folder.glob("*.json"))
        return [record.read(path) for path in found]
    with resources.as_file(resources.files("pyroboost.experiments") / "results") as place:
        return [record.read(path) for path in sorted(Path(place).glob("*.json"))]


def _digits(row: Mapping[str, Any]) -> int:
    """Return how many decimals a number is worth: two digits of its error."""
    if row["unit"] in ("s", "seconds", "draws"):
        return 0 if row["value"] >= 10 else 2
    errors = [e for e in (row["std_error"], row["seed_error"]) if e]
    return 3 if row["unit"] == "share" or (errors and max(errors) < 0.05) else 2


def cell(row: Mapping[str, Any] | None) -> str:
    """Return a number with its errors and the paper's beside it.

    Example:
        >>> cell(record.measured("k = 1", "bound", -3.0, std_error=0.1, kind="bound", paper=-2.5))
        '-3.00 ± 0.10 (paper: -2.5)'
    """
    if row is None:
        return ""
    places = _digits(row)
    text = f"{row['value']:.{places}f}"
    if row["kind"] == "estimate":
        text = f"≈ {text}"
    if row["std_error"] is not None:
        text += f" ± {row['std_error']:.{places}f}"
    if row["seed_error"] is not None:
        text += f", seeds ± {row['seed_error']:.{places}f}"
    if row["unit"] in ("s", "seconds"):
        text += " s"
    return text if row["paper"] is None else f"{text} (paper: {row['paper']:g})"


def _row(cells: Iterable[str]) -> str:
    # A bar in a name, as of parallel parts, would end the cell.
    return "| " + " | ".join(text.replace("|", r"\|") for text in cells) + " |"


def _table(one: Mapping[str, Any]) -> list[str]:
    shown = one["shown"]
    found = {(row["name"], row["metric"]): row for row in one["rows"]}
    names = list(dict.fromkeys(row["name"] for row in one["rows"] if row["metric"] in shown))
    lines = [f"| {' | '.join(['', *shown])} |", f"|{'---|' * (len(shown) + 1)}"]
    for name in names:
        lines.append(_row([name, *(cell(found.get((name, m))) for m in shown)]))
    return lines


def _machine(one: Mapping[str, Any]) -> str:
    machine = one["machine"]
    where = machine["gpu"] or f"{machine['threads']} threads of {machine['cpu']}"
    return f"{one['seconds'] / 60:.1f} min on {where}"


def _reading(one: Mapping[str, Any]) -> str:
    """Say in what unit likelihoods stand, where there are any."""
    if not any(row["unit"] == "nats" for row in one["rows"]):
        return "± are standard errors"
    per = " per image" if "images" in one["data"] else ""
    return f"nats{per}; ≈ marks estimates"


def markdown(records: Iterable[Mapping[str, Any]]) -> str:
    """Return records as Markdown: a table each, the claims, what was assumed.

    Args:
        records: what :func:`pyroboost.experiments.record.read` returned.
    """
    blocks = []
    for one in records:
        seeds = f"{len(one['seeds'])} seed{'s' if len(one['seeds']) > 1 else ''}"
        lines = [
            f"#### {one['reference']}: {one['title']}",
            "",
            f"`pyroboost reproduce {one['name']} --scale {one['scale']}`; {one['data']}; {seeds}; "
            f"{_machine(one)}; {_reading(one)}.",
            "",
            *_table(one),
            "",
            *(
                f"- {'Holds' if c['holds'] else '**Fails**'}: {c['claim']}: {c['evidence']}."
                for c in one["claims"]
            ),
            f"- Assumed: {'; '.join(one['assumed'])}.",
            *(f"- Note: {note}." for note in one["notes"]),
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n" if blocks else "No results yet.\n"


def summary(records: Iterable[Mapping[str, Any]]) -> str:
    """Return one row a record: what was run, how many claims hold, and which fail.

    Args:
        records: what :func:`pyroboost.experiments.record.read` returned.
    """
    lines = [
        "| | `pyroboost reproduce` | time | claims that hold | and that fail |",
        "|---|---|---|---|---|",
    ]
    for one in records:
        failed = [c["claim"] for c in one["claims"] if not c["holds"]]
        held = len(one["claims"]) - len(failed)
        cells = [
            f"{one['reference']}: {one['title']}",
            f"`{one['name']}`",
            f"{one['seconds'] / 60:.0f} min",
            f"{held} of {len(one['claims'])}",
            "; ".join(failed),
        ]
        lines.append(_row(cells))
    return "\n".join(lines) + "\n" if len(lines) > 2 else "No results yet.\n"


def update(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace what stands between the marks of a page: full results, their summary, or both.

    Args:
        path: the page.
        records: what :func:`pyroboost.experiments.record.read` returned.

    Raises:
        ValueError: the file has neither pair of marks.
    """
    text, records = path.read_text(encoding="utf-8"), list(records)
    found = False
    for (begin, end), write in ((RESULTS, markdown), (SUMMARY, summary)):
        before, begins, rest = text.partition(begin)
        _, ends, after = rest.partition(end)
        if begins and ends:
            found = True
            text = f"{before}{begin}\n{write(records)}{end}{after}"
    if not found:
        raise ValueError(
            f"{path} lacks the marks {' and '.join(RESULTS)}, or {' and '.join(SUMMARY)}; add a "
            "pair of them around the results."
        )
    path.write_text(text, encoding="utf-8")
