"""Run fits that kill themselves with SIGKILL, run them again, and compare with whole runs.

A program of its own, ``python fit_killed.py FOLDER CASE ...``: each fit runs in a forked process,
so that the kills are real and cheap. Prints one JSON line of the disagreements that it found.
"""

import io
import json
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import torch
import torch._dynamo  # what the first optimiser imports: once here, not in every child
from fit_pairs import Bits, chained_pair, normal_pair, vae_pair
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyroboost.infer import Callback, fit

BITS = torch.bernoulli(torch.full((47, 8), 0.5, dtype=torch.float64)).float()
KILLS = [(1, 1), (2, 3), (3, 5), "writing"]


class Kill(Callback):
    def __init__(self, where):
        self.where = where

    def on_batch(self, state):
        torch.randn(2), random.random(), np.random.rand()  # noqa: NPY002
        if (state.epoch, state.batch) == self.where:
            os.kill(os.getpid(), signal.SIGKILL)


class Jittered(Dataset):
    """A data set whose transform draws from all three global generators."""

    def __len__(self):
        return 47

    def __getitem__(self, row):
        flip = random.random() < 0.1
        noise = torch.rand(8) + np.random.rand()  # noqa: NPY002
        return (BITS[row] if flip else 1.0 - BITS[row]) * (noise > 0.3)


class Noisy:
    """A re-iterable without a length that draws from all three global generators lazily."""

    def __iter__(self):
        for batch in BITS.split(10):
            keep = torch.rand_like(batch) > 0.1 + 0.1 * random.random() * np.random.rand()  # noqa: NPY002
            yield batch * keep


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05, amsgrad=True)


def loader(**words):
    return DataLoader(TensorDataset(BITS), batch_size=10, shuffle=True, **words)


def reals():
    return torch.linspace(-1.0, 3.0, 47)


decay = partial(LambdaLR, lr_lambda=lambda epoch: 1.0 / (1.0 + epoch))
plateau = partial(ReduceLROnPlateau, mode="max", patience=0)
CASES = {
    "tensor": (vae_pair, lambda: BITS, {"checkpoint_every": 1, "seed": 3, "scheduler": decay}),
    "unseeded": (vae_pair, lambda: BITS, {"checkpoint_every": 2, "annealing": 2, "clip_norm": 1.0}),
    "epochs": (vae_pair, lambda: (BITS,), {"seed": 1, "optimizer": adam}),
    "held_out": (
        vae_pair,
        lambda: BITS,
        {
            "checkpoint_every": 3,
            "validation": BITS[:9],
            "scheduler": plateau,
            "patience": 2,
            "lr": 0.5,
        },
    ),
    "params": (normal_pair, reals, {"checkpoint_every": 1, "lr": 0.1}),
    "chain": (chained_pair, reals, {"checkpoint_every": 2, "lr": 0.1, "seed": 2}),
    "loader": (vae_pair, loader, {"checkpoint_every": 1}),
    "own_generator": (
        vae_pair,
        lambda: loader(generator=torch.Generator().manual_seed(int(torch.randint(99, ())))),
        {"checkpoint_every": 2},
    ),
    "transforms": (
        vae_pair,
        lambda: DataLoader(Jittered(), batch_size=10, shuffle=True),
        {"checkpoint_every": 1},
    ),
    "bits": (vae_pair, lambda: Bits(BITS * 0.8 + 0.1, 10), {"validation": BITS[:9]}),
    "lazy": (vae_pair, Noisy, {"annealing": 2, "seed": 5}),
}


def half_written(save, number):
    """Let the checkpoint of this number be cut off in its middle by the kill."""
    left = [number]

    def saving(content, file):
        left[0] -= 1
        if left[0]:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    return saving


def run(case, path, start, kill, out=None):
    """Fit one case from its own random start in a child process; return its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        make, data, words = CASES[case]
        words = {"batch_size": 10, "lr": 0.02, **words}
        if "optimizer" in words:
            words.pop("lr")
        pyro.set_rng_seed(start)
        if kill == "writing":
            torch.save = half_written(torch.save, 4)
        pair = make()
        result = fit(pair, data(), epochs=3, checkpoint=path, callbacks=[Kill(kill)], **words)
        if out is not None:
            rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
            store = pyro.get_param_store()
            free = {name: store[name].unconstrained().detach() for name in store}
            # Free params are compared unconstrained, as the store has them.
            state = {n: v for n, v in pair.state_dict().items() if "_extra_state" not in n}
            kept = {
                "state": state,
                "free": free,
                "history": repr((rows, result.best_epoch, result.best_bound, result.stopped)),
                "rng": torch.get_rng_state() if "seed" not in words else torch.zeros(1),
                "more": [] if "seed" in words else [random.random(), float(np.random.rand())],  # noqa: NPY002
            }
            torch.save(kept, out)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stderr.flush()
        os._exit(status)


def flat(value, name=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}")
    else:
        yield name, value


def differences(one, other):
    a, b = dict(flat(torch.load(one, weights_only=True))), dict(flat(torch.load(other)))
    names = [n for n in a if n not in b] + [n for n in b if n not in a]
    for name in a.keys() & b.keys():
        x, y = a[name], b[name]
        same = torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        names += [] if same else [name]
    return names


def compare(folder, case):
    """Return where killed and resumed runs of one case differ from a whole run."""
    found = []
    whole = folder / f"{case}.out"
    if run(case, folder / f"{case}.pt", 1, None, whole):
        return ["the whole run failed"]
    for number, kill in enumerate(KILLS):
        path, out = folder / f"{case}{number}.pt", folder / f"{case}{number}.out"
        if run(case, path, 1, kill) != -signal.SIGKILL:
            found.append(f"not killed at {kill}")
        # Other weights and another random state than the first time: all must come from the file.
        if run(case, path, 77, None, out):
            found.append(f"the run resumed after {kill} failed")
        else:
            found += [f"{kill}: {name}" for name in differences(whole, out)]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # a kill is no power cut: what was written stays, and it is quicker
    print(json.dumps({case: compare(Path(sys.argv[1]), case) for case in sys.argv[2:]}))
