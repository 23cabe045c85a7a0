"""Tutorials are programs: each is listed here, runs, and has its outputs committed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine

from pyroboost import Cascade, MetaModel
from pyroboost.evaluation import decompose

FOLDER = Path(__file__).parents[1] / "tutorials"
SCRIPTS = ["minipyroboost.py"]
NOTEBOOKS = {  # what only a full run prints
    "01_boosting_a_vae.ipynb": "judged each by 1000 draws",
    "02_choosing_and_combining.ipynb": "judged on 300 test images",
    "03_semi_supervised.ipynb": "300 test images, looked at once",
    "04_multimodal_posterior.ipynb": "judged as one by 1000 draws",
    "05_boosted_flows_in_a_vae.ipynb": "judged each by 1000 draws",
    "06_density_estimation.ipynb": "(10000 draws, ESS",
}
MINI = FOLDER / "minipyroboost.py"
SMOKE = 'smoke_test = "PYROBOOST_SMOKE" in os.environ or "CI" in os.environ'
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|usr|Users|private|var|opt|mnt)/|[A-Z]:\\")


def load_mini():
    spec = importlib.util.spec_from_file_location("minipyroboost", MINI)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name):
    nbformat = pytest.importorskip("nbformat", reason="the group 'notebooks' is not installed")
    return nbformat.read(FOLDER / name, as_version=4)


def code_cells(name):
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def output_text(cell):
    parts = []
    for output in cell.outputs:
        parts.append(output.get("text", ""))
        parts += [str(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join(parts)


def test_every_tutorial_is_listed():
    found = {
        str(path.relative_to(FOLDER))
        for path in FOLDER.rglob("*")
        if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)
    }
    assert found == {*SCRIPTS, *NOTEBOOKS}


# minipyroboost


def test_mini_has_at_most_150_lines():
    assert len(MINI.read_text().splitlines()) <= 150


def test_mini_imports_nothing_but_torch_and_pyro():
    names = re.findall(r"^\s*(?:from|import) (\w+)", MINI.read_text(), flags=re.MULTILINE)
    assert set(names) - set(sys.stdlib_module_names) == {"torch", "pyro"}


def test_mini_runs_as_a_script():
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(MINI), "--smoke"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "log p(x)" in done.stdout


@pytest.fixture
def both():
    """The miniature's smoke run, and the library's cascade of the same stages."""
    mini = load_mini()
    stages, pair = mini.main(smoke=True)
    library = Cascade(
        *(MetaModel(s.model, s.guide, visible=s.visible, hidden=s.hidden) for s in stages)
    )
    x = (torch.rand(40, 6) < 0.5).float()
    return mini, stages, pair, library, x


def test_mini_agrees_with_the_library_on_the_same_samples(both):
    mini, _, pair, library, x = both
    assert (pair.visible, pair.hidden) == (library.visible, library.hidden)
    guide, log_q = mini.run(pair.guide, x)
    _, log_p = mini.run(poutine.replay(pair.model, guide), x)
    hidden = {name: guide.nodes[name]["value"] for name in ("0.h", "1.h", "2.h")}
    fixed = poutine.condition(library.model, hidden), poutine.condition(library.guide, hidden)
    theirs = [poutine.trace(program).get_trace(x) for program in fixed]
    for mine, trace in ((log_p, theirs[0]), (log_q, theirs[1])):
        trace.compute_log_prob()
        sites = [n for n, s in trace.nodes.items() if s["type"] == "sample" and n != "data"]
        total = sum(trace.nodes[name]["log_prob"] for name in sites)
        torch.testing.assert_close(mine, total, rtol=0.0, atol=1e-5)
    names = {n for n, s in theirs[0].nodes.items() if s["type"] == "sample"} - {"data"}
    assert names == {"x", *hidden}


def test_mini_has_the_terms_of_the_library(both):
    mini, stages, _, library, x = both
    many = x[:4].repeat(2000, 1)
    found = mini.terms(stages, many).detach().reshape(3, 2000, 4)
    theirs = decompose(library, x[:4], num_samples=2000)
    for mine, term in zip(found, theirs.terms, strict=True):
        error = mine.std(0) * (2 / 2000) ** 0.5
        assert bool(((mine.mean(0) - term.per_datum).abs() < 4 * error + 1e-5).all())


def test_mini_terms_sum_to_the_composed_weight_on_the_same_samples(both):
    mini, stages, pair, _, x = both
    pyro.set_rng_seed(3)
    guide, log_q = mini.run(pair.guide, x)
    _, log_p = mini.run(poutine.replay(pair.model, guide), x)
    conditioned = []
    for i, s in enumerate(stages):  # a conditioned site is observed, which a replay leaves alone
        value = {s.hidden: guide.nodes[f"{i}.h"]["value"]}
        conditioned.append(
            s._replace(
                model=poutine.condition(s.model, value), guide=poutine.condition(s.guide, value)
            )
        )
    total = mini.terms(conditioned, x).sum(0)
    torch.testing.assert_close(total, log_p - log_q, rtol=0.0, atol=1e-5)


# notebooks


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_starts_with_the_smoke_switch(name):
    assert SMOKE in code_cells(name)[0].source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_has_the_outputs_of_a_full_run_in_order(name):
    cells = code_cells(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(NOTEBOOKS[name] in output_text(cell) for cell in cells)
    assert sum("image/png" in o.get("data", {}) for c in cells for o in c.outputs) >= 3


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_outputs_are_free_of_paths_warnings_and_errors(name):
    for cell in code_cells(name):
        assert not MACHINE.search(output_text(cell)), output_text(cell)
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.get("text")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_on_any_python_kernel(name):
    spec = read(name).metadata.kernelspec
    assert dict(spec) == {"display_name": "Python 3", "language": "python", "name": "python3"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_ends_with_the_question_whether_it_worked(name):
    sections = re.findall(
        r"^## (.+)$",
        "\n".join(c.source for c in read(name).cells if c.cell_type == "markdown"),
        flags=re.MULTILINE,
    )
    assert sections[-1] == "Did it work?"


@pytest.mark.parametrize("text", ["/home/me/x.pt", "saved to /root/a", r"C:\Users\me"])
def test_machine_paths_are_found(text):
    assert MACHINE.search(text)
