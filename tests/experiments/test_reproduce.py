"""Every experiment at smoke scale, its record, and a run that is interrupted and goes on."""

import json

import pytest
import torch

from pyroboost import cli
from pyroboost.experiments import parts, record
from pyroboost.experiments.cascade_celeba import make_folder
from pyroboost.experiments.registry import EXPERIMENTS, find
from pyroboost.experiments.runner import run_experiment

PLANE = ("flows.figure1", "flows.figure4", "flows.figure5")


@pytest.mark.parametrize("name", [experiment.name for experiment in EXPERIMENTS])
def test_it_runs_at_smoke_scale(name, tmp_path, capsys):
    assert cli.main(["reproduce", name, "--scale", "smoke", "--out", str(tmp_path), "--quiet"]) == 0
    found = record.read(tmp_path / f"{name}.smoke.json")
    assert found["name"] == name
    assert found["claims"], "the paper's claims are checked, whether they hold or not"
    assert found["assumed"]
    assert all(row["metric"] for row in found["rows"])
    metrics = {row["metric"] for row in found["rows"]}
    assert set(found["shown"]) <= metrics
    assert any("smoke" in note for note in found["notes"])
    assert (tmp_path / f"{name}.smoke.png").stat().st_size > 1000
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.smoke.json", f"{name}.smoke.png"}
    assert str(tmp_path) not in json.dumps(found)
    nats, said = any(row["unit"] == "nats" for row in found["rows"]), capsys.readouterr().out
    assert ("; nats" in said) == nats
    assert ("nats per image" in said) == (nats and "images" in found["data"])
    assert ("images" in found["data"]) == (name not in PLANE and name != "flows.posteriors")


class Stop(Exception):
    """Stands for a killed process."""


def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    experiment = find("cascade.table1")
    whole = record.read(run_experiment(experiment, scale="smoke", out=tmp_path / "whole", seeds=1))

    real = parts.bounds
    monkeypatch.setattr(parts, "bounds", lambda *a, **k: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        run_experiment(experiment, scale="smoke", out=tmp_path / "cut", seeds=1)
    monkeypatch.setattr(parts, "bounds", real)
    kept = list((tmp_path / "cut").rglob("*.pt"))
    assert len(kept) == 2

    again = record.read(run_experiment(experiment, scale="smoke", out=tmp_path / "cut", seeds=1))
    assert again["resumed"]
    assert not whole["resumed"]
    assert again["rows"] == whole["rows"]
    assert not list((tmp_path / "cut").rglob("*.pt"))


def test_seeds_change_the_numbers_and_are_pooled(tmp_path):
    path = run_experiment(find("cascade.table1"), scale="smoke", out=tmp_path, seed=3, seeds=2)
    found = record.read(path)
    assert found["seeds"] == [3, 4]
    row = found["rows"][0]
    assert len(set(row["by_seed"])) == 2
    assert row["seed_error"] > 0


def test_celeba_reads_the_users_folder(tmp_path):
    folder = make_folder(tmp_path / "data", count=40, seed=1)
    path = run_experiment(
        find("cascade.table1_celeba"), scale="smoke", out=tmp_path, data_folder=folder
    )
    found = record.read(path)
    assert "20 training and 10 test images" in found["data"]
    assert any("cross-entropy on grey levels" in note for note in found["notes"])
    assert found["rows"][0]["paper"] == -6274.86


def test_cuda_is_refused_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda"):
        run_experiment(find("cascade.table1"), scale="smoke", out=tmp_path, device="cuda")


def test_the_global_random_state_is_left_alone(tmp_path):
    before = torch.get_rng_state()
    run_experiment(find("cascade.table1"), scale="smoke", out=tmp_path)
    assert torch.equal(before, torch.get_rng_state())
