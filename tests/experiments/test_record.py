"""Records: pooling over seeds, the schema, and what must not be in one."""

import copy
import json
import math
import statistics

import pytest

from pyroboost.experiments import readme, record


def a_record(**changes):
    row = record.over_seeds(
        "k = 1", "bound, test", [(-3.0, 0.25), (-1.0, 0.75)], kind="bound", paper=-2.5
    )
    full = {
        "format": 1,
        "name": "cascade.test",
        "title": "a test",
        "reference": "Paper, Table 9",
        "scale": "cpu",
        "date": "2026-01-01",
        "data": "made up",
        "seeds": [0, 1],
        "settings": {"epochs": 3},
        "assumed": ["everything"],
        **record.environment(),
        "seconds": 90.0,
        "resumed": False,
        "rows": [row],
        "shown": ["bound, test"],
        "claims": [record.claim("it works", False, "it did not")],
        "notes": [],
        "figures": ["cascade.test.cpu.png"],
    }
    return {**full, **changes}


def test_seeds_are_pooled_with_both_errors():
    values = [-3.0, -1.0, -2.5]
    row = record.over_seeds(
        "a", "b", [(v, e) for v, e in zip(values, (0.1, 0.2, 0.6), strict=True)], kind="bound"
    )
    assert row["value"] == pytest.approx(statistics.mean(values))
    assert row["seed_error"] == pytest.approx(statistics.stdev(values) / math.sqrt(3))
    assert row["std_error"] == pytest.approx(0.3)
    assert row["by_seed"] == values
    single = record.measured("a", "b", 1.0, std_error=None, kind="measure")
    assert single["seed_error"] is None
    assert single["std_error"] is None


def test_a_record_survives_a_round_trip(tmp_path):
    path = tmp_path / "folder" / "one.json"
    record.write(a_record(), path)
    assert record.read(path) == json.loads(json.dumps(a_record()))
    assert [p.name for p in path.parent.iterdir()] == ["one.json"]


@pytest.mark.parametrize("key", ["settings", "assumed", "versions", "machine", "claims", "shown"])
def test_what_is_missing_is_named(key):
    broken = a_record()
    del broken[key]
    with pytest.raises(ValueError, match=key):
        record.check(broken)


@pytest.mark.parametrize(
    "place", ["/home/someone/data", "data in /root/x", "C:\\Users\\x", "see '/tmp/y'"]
)
def test_paths_of_this_machine_are_refused(place):
    with pytest.raises(ValueError, match="path"):
        record.check(a_record(notes=[place]))
    record.check(a_record(notes=["784 x 500/200, nats/image and 1/2 are no paths"]))


def test_numbers_that_are_not_finite_or_of_no_kind_are_refused(tmp_path):
    broken = a_record()
    broken["rows"][0]["value"] = math.nan
    with pytest.raises(ValueError, match="nan"):
        record.write(broken, tmp_path / "a.json")
    assert not list(tmp_path.iterdir())
    wrong = a_record()
    wrong["rows"][0]["kind"] = "guess"
    with pytest.raises(ValueError, match="known kind"):
        record.check(wrong)
    with pytest.raises(ValueError, match="claim"):
        record.check(a_record(claims=[{"claim": "x", "holds": "yes", "evidence": ""}]))


def test_an_unreadable_file_is_one_sentence(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not a readable JSON"):
        record.read(path)


def test_the_environment_names_no_host():
    import platform

    told = json.dumps(record.environment())
    assert platform.node() not in told or len(platform.node()) < 3
    assert set(record.environment()["machine"]) == {"cores", "threads", "cpu", "gpu"}


def test_markdown_shows_numbers_errors_paper_and_failed_claims():
    text = readme.markdown([a_record()])
    assert "| k = 1 | -2.00 ± 0.50, seeds ± 1.00 (paper: -2.5) |" in text
    assert "- **Fails**: it works: it did not." in text
    assert "Assumed: everything." in text
    assert "1.5 min on" in text


def test_markdown_marks_estimates_and_leaves_gaps():
    one = copy.deepcopy(a_record())
    rows = one["rows"]
    rows.append(record.measured("k = 2", "other", -1.0, std_error=0.01, kind="estimate"))
    one["shown"] = ["bound, test", "other"]
    text = readme.markdown([one])
    assert "| k = 2 |  | ≈ -1.000 ± 0.010 |" in text


def test_the_summary_counts_claims_and_names_those_that_fail():
    one = a_record()
    rows = readme.summary([one]).splitlines()
    assert rows[2].endswith(
        f"| {sum(c['holds'] for c in one['claims'])} of {len(one['claims'])} | it works |"
    )
    assert readme.summary([]) == "No results yet.\n"


def test_no_results_are_said_in_words(tmp_path):
    assert readme.markdown(readme.committed(tmp_path)) == "No results yet.\n"
