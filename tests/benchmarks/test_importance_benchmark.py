"""Importance sampling of 5,000 samples by 100 images in bounded memory."""

import os
import subprocess
import sys

import pytest
from peak_memory import PEAK, STEADY

CODE = (
    PEAK
    + """
import torch
from pyroboost.evaluation import log_weights
from pyroboost.models import VAE
torch.manual_seed(0)
vae, x = VAE(784, 20).eval(), torch.bernoulli(torch.rand(100, 784))
log_weights(vae, x[:5], num_samples=2)
before = peak()
table = log_weights(vae, x, num_samples={samples}, memory={memory})
after = peak()
assert table.shape == ({samples}, 100)
print(after - before)
"""
)


@pytest.mark.parametrize("memory", [64.0, 256.0])
def test_memory_is_bounded(benchmark, memory):
    """The peak grows by no more than the bound asked for and the table itself, doubled."""

    def run():
        code = CODE.format(samples=5000, memory=memory)
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, **STEADY},
        )
        return float(done.stdout)

    grown = benchmark.pedantic(run, rounds=1)
    seconds = benchmark.stats.stats.total
    benchmark.extra_info.update({"memory": memory, "grown": grown})
    print(f"\n{memory:g} MiB asked for: the peak grew by {grown:.0f} MiB, {seconds:.1f} s in all.")
    table = 5000 * 100 * 4 / 2**20
    assert grown < 2 * memory + 4 * table
