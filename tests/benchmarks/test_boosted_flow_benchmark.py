"""What a mixture of flows costs: side by side against one by one, and 100,000 points at once."""

import os
import subprocess
import sys
import time

import pyro.distributions as dist
import pytest
import torch
from peak_memory import PEAK, STEADY

from pyroboost import flows
from pyroboost.distributions import BoostedFlow

COMPONENTS, BATCH, ROUNDS, AT_LEAST = 8, 100, 40, 1.3


def seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def ways(q, z):
    """Return the mixture's density side by side and component by component."""

    def loop():
        scores = []
        for flow, log_weight in zip(q.components, q.log_weights, strict=True):
            z0, log_det = flow.inverse(z)
            scores.append(log_weight + q.base.log_prob(z0) + log_det)
        return torch.stack(scores, -1).logsumexp(-1)

    return (lambda: q.log_prob(z)), loop


def without_gradients(call):
    with torch.no_grad():
        call()


@pytest.mark.parametrize("kind", ["values", "points", "parameters"])
@pytest.mark.parametrize("name", ["realnvp", "spline", "nlsq", "lu"])
def test_side_by_side_is_faster(benchmark, name, kind):
    """Density alone, its gradient for points under frozen flows, and that for all parameters."""
    torch.manual_seed(0)
    listed = [getattr(flows, name)(2, spread=0.3) for _ in range(COMPONENTS)]
    for flow in listed:
        flow.requires_grad_(kind == "parameters")
    z = torch.randn(BATCH, 2, requires_grad=kind == "points")
    q = BoostedFlow(dist.Normal(torch.zeros(2), 1.0).to_event(1), listed)
    together, loop = ways(q, z)
    assert torch.allclose(together(), loop(), atol=1e-4)
    run = without_gradients if kind == "values" else lambda call: call().sum().backward()
    found = [(seconds(lambda: run(together)), seconds(lambda: run(loop))) for _ in range(ROUNDS)]
    benchmark.pedantic(run, args=(together,), rounds=5)
    ours, theirs = (sorted(times)[ROUNDS // 4] for times in zip(*found, strict=True))
    ratio = theirs / ours
    benchmark.extra_info["ratio"] = ratio
    told = f"{name}, {kind}: {1e3 * ours:.2f} ms side by side, {1e3 * theirs:.2f} ms one by one"
    print(f"\n{told}, {ratio:.2f} times faster")
    assert ratio >= AT_LEAST, f"{told}; the aim is {AT_LEAST}"


CODE = (
    PEAK
    + """
import time, torch
import pyro.distributions as dist
from pyroboost import flows
from pyroboost.distributions import BoostedFlow
torch.manual_seed(0)
listed = [flows.{name}(2, spread=0.3, units={units}) for _ in range(8)]
q = BoostedFlow(dist.Normal(torch.zeros(2), 1.0).to_event(1), listed, memory={memory})
q.sample_and_log_prob((600,))
before = peak()
began = time.perf_counter()
z, log_q = q.sample_and_log_prob(({count},))
with torch.no_grad():
    again = q.log_prob(z)
    table = q.log_prob_components(z)
spent = time.perf_counter() - began
after = peak()
assert torch.allclose(again, log_q, atol=1e-2) and table.shape == ({count}, 8)
print(after - before, spent)
"""
)


@pytest.mark.parametrize("memory", [4.0, 16.0])
@pytest.mark.parametrize(("name", "units"), [("realnvp", 256), ("spline", 64)])
def test_memory_is_bounded(benchmark, name, units, memory):
    """100,000 points drawn and scored: the peak grows by the bound asked for and the tables.

    Without the bound the flows alone would hold more than that, 10,000 rows at a time.
    """
    count = 100_000

    def run():
        code = CODE.format(name=name, units=units, memory=memory, count=count)
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, **STEADY},
        )
        return [float(part) for part in done.stdout.split()]

    grown, spent = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update({"memory": memory, "grown": grown, "seconds": spent})
    print(f"\n{name}, {memory:g} MiB asked for: grew by {grown:.0f} MiB in {spent:.1f} s")
    table = count * COMPONENTS * 4 / 2**20
    assert 0 < grown < memory + 5 * table
