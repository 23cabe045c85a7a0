"""Boosting that is killed and started again by the same call ends at the same result."""

import os

import boosting_killed
import pyro
import pyro.distributions as dist
import pytest
import torch
from boosting_pairs import Posterior, rows, vae
from test_boosting import modes, program

from pyroboost.infer import CheckpointError, boost


def forked(*arguments):
    """Run a case in a process of its own and return what it says, or None if it was killed."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            folder, kind, *count = arguments
            if count:
                boosting_killed.killed_after(*count)
            os.write(write, boosting_killed.start(kind, folder).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said or None


@pytest.mark.parametrize(("kind", "kills"), [("rows", (2, 4, 5)), ("whole", (3, 20, 15))])
def test_killed_boosting_ends_at_the_same_result(tmp_path, kind, kills):
    torch.set_num_threads(1)  # a forked process has no pool
    whole = forked(tmp_path / "whole", kind)
    assert whole is not None
    for count in kills:
        assert forked(tmp_path / "killed", kind, count) is None
    assert forked(tmp_path / "killed", kind) == whole
    assert forked(tmp_path / "killed", kind) == whole  # done: nothing is trained again


def test_a_folder_of_another_call_is_refused(tmp_path):
    def call(**given):
        torch.manual_seed(0)
        settings = {"steps": 5, "seed": 1, "failures": 1, "checkpoints": tmp_path, **given}
        return boost((program(modes()), Posterior(count=2)), progress=False, **settings)

    call()
    with pytest.raises(CheckpointError, match="with entropy = "):
        call(entropy=0.5)
    with pytest.raises(CheckpointError, match="written with seed 1 and this call has 2"):
        call(seed=2)
    assert call(seed=None).seed == 1


def shifted(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("way", ["whole", "list", "by name", "another guide"])
def test_a_folder_of_other_data_is_refused(tmp_path, way):
    """Finished rounds would be taken for these data's."""

    def call(y, dim=2):
        settings = {"steps": 5, "seed": 1, "failures": 1, "checkpoints": tmp_path}
        torch.manual_seed(0)
        data, model, named = (y,), shifted, {}
        if way == "list":
            data, model = ([y],), lambda parts: shifted(parts[0])
        if way == "by name":
            data, named = (), {"kwargs": {"y": y}}
        guide = Posterior(count=dim)
        if named:
            guide.forward = lambda y: Posterior.forward(guide)
        return boost((model, guide), data, **named, **settings)

    y = torch.tensor([1.0, 2.0])
    first = call(y)
    assert call(y.clone()).bound == first.bound
    if way == "another guide":
        with pytest.raises(CheckpointError, match="parameters = "):
            call(y, dim=3)
    else:
        with pytest.raises(CheckpointError, match="data = "):
            call(y + 1.0)


def test_a_folder_of_other_rows_is_refused(tmp_path):
    def call(x, held_out):
        torch.manual_seed(0)
        settings = {"epochs": 1, "seed": 1, "failures": 1, "checkpoints": tmp_path}
        return boost(vae(), x, validation=held_out, finetune=0, **settings)

    x = rows(60)
    call(x[:40], x[40:])
    with pytest.raises(CheckpointError, match="data = "):
        call(1.0 - x[:40], x[40:])
    with pytest.raises(CheckpointError, match="data = "):
        call(x[:40], 1.0 - x[40:])
