"""A step of ``fit`` against the barest Pyro loop and a loop written by hand in PyTorch.

The VAE of 784-500-500-20 units with batch normalisation, 100 bits images a batch. The data that
``fit`` iterates run one step of every other loop before they yield the next batch, so that all
loops see the same state of the machine; ratios are medians over the steps.
"""

import statistics
import time
from functools import partial

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.nn import functional as F

from pyroboost.contexts import local_params
from pyroboost.infer import fit
from pyroboost.models import VAE

BATCH, STEPS, WARM_UP = 100, 120, 20
AT_MOST = {"bare": 1.03, "hand": 1.3}
PLAIN = partial(torch.optim.Adam, lr=1e-3)


def vae():
    torch.manual_seed(0)
    return VAE(784, 20)


def bare(pair, *, wrapped):
    """The barest Pyro loop, on the plain modules or through the programs that wrap them."""
    elbo, optimizer = Trace_ELBO(max_plate_nesting=1), PLAIN(pair.parameters())
    model, guide = (pair.model, pair.guide) if wrapped else (pair.model.fn, pair.guide.fn)

    def step(x):
        optimizer.zero_grad()
        with local_params():
            elbo.differentiable_loss(model, guide, x).backward()
        optimizer.step()

    return step


def by_hand(pair):
    """The same networks without Pyro, with the Kullback-Leibler term in closed form."""
    encoder, decoder, optimizer = (
        pair.guide.fn.net.net,
        pair.model.fn.net.net,
        PLAIN(pair.parameters()),
    )

    def step(x):
        optimizer.zero_grad()
        loc, raw = encoder(x).chunk(2, -1)
        scale = F.softplus(raw) + 1e-4
        logits = decoder(loc + scale * torch.randn_like(loc))
        error = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        kl = 0.5 * (loc.square() + scale.square() - 1.0).sum() - scale.log().sum()
        (error + kl).backward()
        optimizer.step()

    return step


class Interleaved:
    """Batches for ``fit`` that time its steps and, in between, those of other loops."""

    def __init__(self, data, others):
        self.data, self.others = data, others
        self.seconds = {name: [] for name in ("fit", *others)}

    def __len__(self):
        return STEPS

    def __iter__(self):
        order = torch.randperm(len(self.data))
        for number in range(STEPS):
            start = time.perf_counter()
            first = number * BATCH % len(order)
            batch = self.data.index_select(0, order[first : first + BATCH])
            yield batch
            self.seconds["fit"].append(time.perf_counter() - start)
            for name, step in self.others.items():
                start = time.perf_counter()
                step(batch)
                self.seconds[name].append(time.perf_counter() - start)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("optimizer", [None, PLAIN], ids=["default", "same_adam"])
def test_step_against_bare_pyro_and_plain_torch(benchmark, optimizer, threads):
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.bernoulli(torch.rand(2000, 784))
        others = {
            "programs": bare(vae(), wrapped=True),
            "bare": bare(vae(), wrapped=False),
            "hand": by_hand(vae()),
        }
        batches = Interleaved(data, others)
        result = benchmark.pedantic(
            fit, args=(vae(), batches), kwargs={"epochs": 1, "optimizer": optimizer}, rounds=1
        )
    finally:
        torch.set_num_threads(kept)
    assert result.epochs_run == 1
    times = {name: values[WARM_UP:] for name, values in batches.seconds.items()}
    median = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    ratio = {
        name: statistics.median(a / b for a, b in zip(times["fit"], times[name], strict=True))
        for name in AT_MOST
    }
    benchmark.extra_info.update({"threads": threads, "milliseconds": median, "ratio": ratio})
    print(
        f"\n{threads} threads, {'same Adam' if optimizer else 'default Adam (fused)'}: "
        f"a step of fit {median['fit']:.2f} ms; of bare Pyro {median['bare']:.2f} ms (ratio "
        f"{ratio['bare']:.3f}); by hand {median['hand']:.2f} ms (ratio {ratio['hand']:.3f}).\n"
        f"  Pyro's tracing and checks {median['bare'] - median['hand']:+.2f} ms, the programs that "
        f"own parameters {median['programs'] - median['bare']:+.2f} ms, the loop and its optimiser "
        f"{median['fit'] - median['programs']:+.2f} ms."
    )
    for name, limit in AT_MOST.items():
        assert ratio[name] <= limit, f"a step of fit takes {ratio[name]:.3f} times that of {name}"
