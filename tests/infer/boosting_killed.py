"""Run a boosting that kills itself with SIGKILL: ``python boosting_killed.py FOLDER KIND COUNT``.

The COUNT-th write of a checkpoint ends the process; with no COUNT it ends by itself and prints
what it has found.
"""

import os
import signal
import sys

import torch
from boosting_pairs import Posterior, rows, vae
from test_boosting import modes, program

from pyroboost.infer import _boosting_state, boost, checkpoint


def start(kind, folder):
    torch.manual_seed(0)
    if kind == "rows":
        pair, data = vae(count=2), rows(60)
        settings = {"epochs": 3, "lr": 0.02, "track": True, "batch_size": 20}
    else:
        pair, data = (program(modes()), Posterior(count=3)), ()
        settings = {"steps": 40, "lr": 0.05, "failures": 1, "checkpoint_every": 7, "joint": 4}
    result = boost(pair, data, checkpoints=folder, seed=5, progress=False, **settings)
    model = pair if kind == "rows" else pair[1]
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    rows_ = [(r.name, r.verdict, list(r.bound), list(r.weights), r.floored) for r in result.rounds]
    history = [{n: v for n, v in row.items() if n != "seconds"} for row in result.history]
    return repr((rows_, total, history))


def killed_after(count):
    write, done = checkpoint.write, 0

    def counting(path, content):
        nonlocal done
        write(path, content)
        done += 1
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write = counting
    assert _boosting_state.files is checkpoint


if __name__ == "__main__":
    if len(sys.argv) > 3:
        killed_after(int(sys.argv[3]))
    print(start(sys.argv[2], sys.argv[1]))
