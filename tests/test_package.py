"""The wheel holds the whole package and imports in an environment that has only it."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of the tracked tree, so that no build leftovers are used."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "pyroboost", "models", "guides"):
        subprocess.run(["cp", "-r", "--no-dereference", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(n for n in names if n.endswith("METADATA"))
        text = archive.read(metadata).decode()
    wanted = {"pyroboost/py.typed", "pyroboost/models/vae.py", "pyroboost/guides/__init__.py"}
    assert wanted <= names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not [n for n in names if n.startswith(("models/", "guides/", "tests/"))]
    assert "License-Expression: Apache-2.0" in text
    source = {
        f"pyroboost/{p.relative_to(ROOT / 'pyroboost')}"
        for p in (ROOT / "pyroboost").rglob("*.py")
        if "__pycache__" not in p.parts
    }
    assert source <= names


def test_wheel_imports_in_an_empty_environment(wheel, tmp_path):
    """Only the wheel and its dependencies are on the path: no checkout, no editable install."""
    builder = venv.EnvBuilder(with_pip=False)
    builder.create(tmp_path)
    site = next(tmp_path.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A line in a .pth adds a folder without running the .pth files in it, the editable one's too.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    code = (
        "import pyroboost, pyroboost.models as m, pyroboost.guides, pyroboost.cli;"
        "print(pyroboost.__file__); print(m.__file__); print(pyroboost.__version__)"
    )
    run = subprocess.run(
        [str(tmp_path / "bin" / "python"), "-c", code],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    package, models, version = run.stdout.split()
    assert Path(package).is_relative_to(site)
    assert Path(models).is_relative_to(site)
    assert version == "0.1.0"
