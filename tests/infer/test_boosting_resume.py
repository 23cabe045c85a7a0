"""Boosting that is killed and started again by the same call ends at the same result."""

import os

import boosting_killed
import pytest
import torch
from boosting_pairs import Posterior
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
