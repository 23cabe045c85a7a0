"""Checkpoints: kill, resume, refuse."""

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import fit_killed
import pyro
import pytest
import torch
from fit_pairs import normal_pair, vae_pair
from torch.optim.lr_scheduler import LambdaLR

from pyroboost.infer import Callback, CheckpointError, fit
from pyroboost.infer.checkpoint import write

HERE = Path(__file__).parent
X = torch.bernoulli(torch.full((30, 8), 0.5, dtype=torch.float64)).float()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kills need fork")
def test_killed_and_resumed_is_bit_equal_to_whole(tmp_path):
    """Weights, buffers, params, history and random state, over data, settings and kills."""
    paths = [str(HERE), *sys.path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(HERE / "fit_killed.py"), str(tmp_path), *fit_killed.CASES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {case: [] for case in fit_killed.CASES}, done.stderr[-2000:]


def run(path, **changes):
    words = {"epochs": 2, "batch_size": 10, "seed": 0, "checkpoint": path}
    return fit(changes.pop("pair", None) or vae_pair(), changes.pop("data", X), **words | changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "run.pt"


def test_file_is_plain_and_alone(path):
    """No pickled object, no left-over part; weights can be read without this library."""
    run(path, validation=X, scheduler=partial(LambdaLR, lr_lambda=lambda e: 0.9**e))
    content = torch.load(path, weights_only=True)
    assert type(content) is dict
    assert content["pair"]["model.fn.net.0.weight"].shape == (6, 2)
    assert content["counters"]["epoch"] == 2
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]


def test_finished_run_returns_at_once_with_its_best_weights(path):
    first, second = vae_pair(), vae_pair()
    one = run(path, pair=first, validation=X, lr=0.3, epochs=6)

    class Never(Callback):
        def on_batch(self, state):
            raise AssertionError

    two = run(path, pair=second, validation=X, lr=0.3, epochs=6, callbacks=[Never()])
    assert one == two
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_more_epochs_go_on_as_one_run(path):
    torch.manual_seed(4)
    short = vae_pair()
    torch.manual_seed(4)
    long = vae_pair()
    fit(long, X, epochs=5, batch_size=10, seed=0)
    run(path, pair=short, epochs=2)
    assert run(path, pair=short, epochs=5).epochs_run == 5
    for a, b in zip(short.parameters(), long.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_stopped_run_stays_stopped(path):
    stop = run(path, epochs=9, callbacks=[lambda state: state.stop("enough")])
    assert (stop.epochs_run, stop.stopped) == (1, "enough")
    assert run(path, epochs=9).epochs_run == 1


def test_constrained_params_come_back_bit_for_bit(path):
    """The state holds exp(u), whose logarithm is u only up to rounding."""
    x = torch.linspace(-1, 2, 30)
    run(path, pair=normal_pair(), data=x, lr=0.1)
    kept = pyro.get_param_store()._params["s"].detach().clone()
    pyro.clear_param_store()
    run(path, pair=normal_pair(), data=x, lr=0.1)
    assert torch.equal(pyro.get_param_store()._params["s"].detach(), kept)


def test_a_copy_may_resume_what_another_copy_began(path):
    """Copies keep free params under numbers of their own, which differ between processes."""
    pair, x = normal_pair(), torch.linspace(-1, 2, 30)
    fit(pair, x, epochs=1)  # the params exist when the pair is copied
    copies = [copy.deepcopy(pair) for _ in range(4)]
    run(path, pair=copies[1], data=x, lr=0.1)
    run(path, pair=copies[3], data=x, lr=0.1)
    one, untouched, other = (list(copies[k].named_trainable(x).values()) for k in (1, 2, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, untouched, strict=True))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"batch_size": 5}, "batch_size"),
        ({"lr": 0.5}, "optimizer_defaults"),
        ({"optimizer": partial(torch.optim.SGD, lr=1e-3)}, "optimizer"),
        ({"seed": 1}, "seed"),
        ({"data": X[:20]}, "data"),
        ({"data": 1.0 - X}, "data"),
        ({"data": list(X.split(10))}, "data"),
        ({"validation": X}, "validation"),
        ({"annealing": 2}, "annealing"),
        ({"clip_norm": 1.0}, "clip_norm"),
        ({"loss": pyro.infer.TraceMeanField_ELBO()}, "loss"),
        ({"scheduler": partial(LambdaLR, lr_lambda=lambda e: 1.0)}, "scheduler"),
        ({"pair": "wider"}, "trainable"),
    ],
)
def test_other_settings_and_data_are_refused(changes, name, path):
    run(path)
    before = path.read_bytes()
    if "pair" in changes:
        changes = {"pair": vae_pair(width=7)}
    pair = changes.setdefault("pair", vae_pair())
    weights = [p.clone() for p in pair.parameters()]
    with pytest.raises(CheckpointError, match=f"written with {name} = "):
        run(path, **changes)
    assert path.read_bytes() == before
    assert all(torch.equal(a, b) for a, b in zip(pair.parameters(), weights, strict=True))


def test_resume_false_starts_anew(path):
    run(path)
    assert run(path, lr=0.5, resume=False).epochs_run == 2


def test_other_files_are_refused(path):
    path.parent.mkdir()
    path.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        run(path)
    write(path, {"settings": {}})
    torch.save({**torch.load(path), "format": 99}, path)
    with pytest.raises(CheckpointError, match="format 99"):
        run(path)


def test_a_state_that_is_not_plain_is_refused_by_name(path):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "odd": {1, 2}}

    with pytest.raises(CheckpointError, match=r"checkpoint\.optimizer\.odd is a set"):
        run(path, optimizer=partial(Odd, lr=0.1))


def test_custom_iterables_have_no_checkpoints_within_an_epoch(path):
    with pytest.raises(ValueError, match="custom iterable"):
        run(path, data=list(X.split(10)), checkpoint_every=1)
