"""The command line: what it prints, what it writes, and how it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pyroboost import cli
from pyroboost.experiments import readme, record
from pyroboost.experiments.registry import EXPERIMENTS


def test_list_names_every_experiment_with_its_times(capsys):
    assert cli.main(["reproduce", "--list"]) == 0
    told = capsys.readouterr().out
    for one in EXPERIMENTS:
        assert one.name in told
        assert one.times["cpu"] in told
        assert one.reference in told


def test_demo_writes_its_files_and_prints_both_chains(tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "--scale", "smoke", "--out", str(out), "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "RBM-RBM-VAE-GMM" in told
    assert "log-likelihood of 300 test images" in told
    names = {path.name for path in out.iterdir()}
    assert names == {"samples.png", "bound.png", "khat.png", "inference.nc", "result.json"}
    result = record.read(out / "result.json")
    kinds = {row["name"]: row["kind"] for row in result["rows"] if "likelihood" in row["metric"]}
    assert kinds == {
        "RBM-RBM-VAE-GMM": "estimate",
        "VAE-GMM": "estimate",
        "single RBM": "exact",
        "single VAE": "estimate",
    }
    import xarray

    with xarray.open_dataset(out / "inference.nc", group="posterior") as posterior:
        assert posterior.sizes["draw"] == result["settings"]["samples"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["reproduce"], "needs the name of an experiment"),
        (["reproduce", "cascade.tabel1"], "did you mean cascade.table1?"),
        (["reproduce", "cascade.table1", "--seeds", "0"], "number of seeds is 0"),
        (["reproduce", "cascade.table1", "--scale", "cpu"], "mnist"),
        (["reproduce", "cascade.table1_celeba", "--scale", "cpu"], "celeba"),
        (["demo", "--threads", "0"], "--threads is 0"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_2(
    arguments, sentence, tmp_path, capsys, monkeypatch
):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("pooch.retrieve", no_network)
    where = ["--out", str(tmp_path / "out"), "--data-folder", str(tmp_path / "data")]
    assert cli.main([*arguments, *where]) == 2
    *before, told = capsys.readouterr().err.splitlines()
    assert told.startswith("pyroboost: ")
    assert sentence in told
    # A download that was tried leaves its progress bar, and nothing else.
    assert all("B/s" in line for line in before if line.strip())


def test_ctrl_c_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyroboost.experiments.runner.run_experiment", interrupt)
    assert cli.main(["reproduce", "cascade.table1", "--out", str(tmp_path)]) == 130
    assert "goes on where it stopped" in capsys.readouterr().err


def test_unknown_words_are_refused_by_argparse(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["reproduce", "cascade.table1", "--scale", "huge"])
    assert error.value.code == 2
    assert "huge" in capsys.readouterr().err


def test_readme_is_written_between_its_marks(tmp_path, capsys):
    path = tmp_path / "README.md"
    (begin, end), (start, stop) = readme.RESULTS, readme.SUMMARY
    path.write_text(f"before\n{begin}\nold\n{end}\n{start}\n{stop}\nafter\n")
    assert cli.main(["reproduce", "--readme", str(path)]) == 0
    expected, rows = readme.markdown(readme.committed()), readme.summary(readme.committed())
    assert path.read_text() == f"before\n{begin}\n{expected}{end}\n{start}\n{rows}{stop}\nafter\n"
    assert cli.main(["reproduce", "--readme"]) == 0
    assert capsys.readouterr().out == expected
    path.write_text("no marks\n")
    assert cli.main(["reproduce", "--readme", str(path)]) == 2


@pytest.mark.parametrize("page", ["README.md", "pyroboost/experiments/results/README.md"])
def test_committed_pages_show_the_committed_records(page, tmp_path):
    written = (Path(__file__).parents[1] / page).read_text()
    copy = tmp_path / "README.md"
    copy.write_text(written)
    readme.update(copy, readme.committed())
    assert copy.read_text() == written


def test_committed_results_are_complete_records():
    for one in readme.committed():
        assert one["scale"] in ("cpu", "paper")
        assert json.dumps(one, allow_nan=False)
        assert one["rows"]
        assert one["assumed"]


def test_it_runs_as_a_module():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['pyroboost', '--help']\n"
        "try:\n    runpy.run_module('pyroboost', run_name='__main__')\n"
        "except SystemExit as end:\n    print('code', end.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "reproduce" in done.stdout
    assert "code 0" in done.stdout
