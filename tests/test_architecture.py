"""Imports point one way, heavy ones wait until they are needed, and importing changes nothing."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each room may import of the package, besides its own modules. Rooms to the left may use
# rooms to the right of them, never the other way round.
TRUNK = {"metamodel", "program", "_callables", "traces", "handlers", "contexts", "likelihood"}
LEAVES = {"distributions", "flows", "sampling"}
ALLOWED = {
    "": {"compose", "evaluation", "infer", *TRUNK},  # the package itself: a table of contents
    "weights": {*TRUNK},
    "_arviz": set(),
    "metamodel": TRUNK - {"metamodel"},
    "program": {"_callables", "contexts"},
    "traces": set(),
    "handlers": set(),
    "contexts": set(),
    "likelihood": set(),
    "_callables": set(),
    "distributions": {"sampling", "flows"},
    "flows": set(),
    "sampling": {"_arviz"},
    "data": {"contexts", "likelihood"},
    "compose": {"weights", *TRUNK, *LEAVES},
    "plotting": {"evaluation", "sampling"},
    "plotting_posterior": {"diagnostics"},
    "evaluation": {"compose", "weights", "_arviz", *TRUNK, *LEAVES},
    "infer": {"compose", "evaluation", *TRUNK, *LEAVES},
    "diagnostics": {"compose", "evaluation", "infer", "sampling", "_arviz", *TRUNK},
    "models": {"compose", "evaluation", "infer", *TRUNK, *LEAVES},
    "guides": {"compose", "evaluation", "infer", *TRUNK, *LEAVES},
}
# A result may draw itself: the one step against the direction, within that method.
DRAWS = {
    "pyroboost.evaluation.posterior",
    "pyroboost.diagnostics.calibration",
    "pyroboost.diagnostics.reports",
}
PICTURES = {"plotting", "plotting_posterior"}
FREE = {"experiments", "cli", "__main__"}  # may import everything
LATER = ("arviz", "matplotlib", "sklearn", "scipy", "pooch", "pandas", "xarray", "h5netcdf", "zuko")


def sources():
    for top in ("pyroboost", "models", "guides"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] not in (("pyroboost", "models"), ("pyroboost", "guides")):
                yield path, parts if parts[0] == "pyroboost" else ("pyroboost", *parts)


FILES = {".".join(parts): path for path, parts in sources()}


def imports(tree, *, everywhere=True):
    """Yield the full names of what a module imports, at its top level or everywhere in it."""
    for node in statements(tree, everywhere):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def statements(node, everywhere):
    """Yield what is in a module, without what only type checkers run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not everywhere:
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from statements(child, everywhere)


def room(name):
    parts = name.split(".")
    return "" if len(parts) == 1 or parts[1] == "__init__" else parts[1]


ROOMS = {room(name) for name in FILES}


def rooms_of(name):
    """Return the rooms that an imported name belongs to, where it is one of ours."""
    parts = name.split(".")
    if parts[0] != "pyroboost" or len(parts) == 1:
        return set()
    return {parts[1]} & ROOMS or ({""} if parts[1] != "__version__" else set())


@pytest.mark.parametrize("name", [n for n in FILES if room(n) not in FREE])
def test_imports_point_one_way(name):
    own = room(name)
    assert own in ALLOWED, f"say in ALLOWED what {own} may import"
    tree = ast.parse(FILES[name].read_text())
    used = set().union(*map(rooms_of, imports(tree)))
    assert used - {own} <= ALLOWED[own] | (PICTURES if name in DRAWS else set())
    assert not PICTURES & set().union(*map(rooms_of, imports(tree, everywhere=False)))


@pytest.mark.parametrize("name", [n for n in FILES if room(n) not in FREE | {"models", "guides"}])
def test_the_core_never_names_models_or_guides(name):
    text = FILES[name].read_text()
    used = set().union(*map(rooms_of, imports(ast.parse(text))))
    assert not used & {"models", "guides"}
    assert "import_module" not in text


@pytest.mark.parametrize("name", FILES)
def test_heavy_libraries_are_imported_where_they_are_used(name):
    found = set(imports(ast.parse(FILES[name].read_text()), everywhere=False))
    assert not {f for f in found if f.split(".")[0] in LATER}


def test_every_room_has_its_rule():
    assert ROOMS <= ALLOWED.keys() | FREE


def test_rules_have_no_circle():
    """Rooms can be put in an order in which each uses only later ones."""
    left = {name: set(used) for name, used in ALLOWED.items() if name}
    while left:
        done = {name for name, used in left.items() if not used & left.keys()}
        assert done, f"a circle among {sorted(left)}"
        left = {name: used for name, used in left.items() if name not in done}


PROBE = """
import json, sys, warnings
import torch, pyro, pyro.infer, pyro.distributions
torch.manual_seed(0)
def state():
    return [
        str(torch.get_default_dtype()),
        torch.distributions.Distribution._validate_args,
        pyro.settings.get("module_local_params"),
        pyro.settings.get("validate_poutine"),
        pyro.settings.get("validate_distributions_pyro"),
        torch.get_rng_state().sum().item(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        list(pyro.get_param_store()),
        len(warnings.filters),
        len(pyro.poutine.runtime._PYRO_STACK),
    ]
before, loaded = state(), set(sys.modules)
import pyroboost
print(json.dumps({"before": before, "after": state(), "new": sorted(set(sys.modules) - loaded)}))
"""


@pytest.fixture(scope="module")
def fresh():
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return json.loads(run.stdout)


def test_importing_changes_no_global_state(fresh):
    assert fresh["before"] == fresh["after"]


def test_importing_loads_nothing_heavy(fresh):
    """Beyond Pyro, only this package and small parts of the standard library."""
    strangers = {name.split(".")[0] for name in fresh["new"]} - set(sys.stdlib_module_names)
    heavy = strangers - {"pyroboost", "torch", "pyro", "tqdm"}
    assert {name for name in heavy if not name.startswith("_")} == set()
    assert not {n for n in fresh["new"] if n.startswith(("torch._dynamo", "torch._inductor"))}
    assert not {n for n in fresh["new"] if n.startswith(("pyroboost.models", "pyroboost.guides"))}
