"""What boosting costs: a mixture on top, a cascade's density, draws from a parallel pair."""

import math
import time
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pyroboost import Cascade, Product
from pyroboost._arviz import convergence
from pyroboost.evaluation import elbo
from pyroboost.infer import fit
from pyroboost.models import GMM, VAE

NUM_DATA, EPOCHS = 10_000, 20
AT_MOST_FOR_MIXTURE, AT_MOST_FOR_CASCADE, AT_LEAST_FOR_CHAINS = 0.05, 1.1, 10.0


def seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@pytest.fixture(scope="module")
def trained():
    """A VAE, its data, and the seconds of 20 epochs."""
    torch.manual_seed(0)
    centres = torch.rand(10, 784)
    x = torch.bernoulli(0.1 + 0.8 * centres[torch.randint(10, (NUM_DATA,))])
    vae = VAE(784, 20)
    return vae, x, seconds(lambda: fit(vae, x, epochs=EPOCHS, progress=False, seed=0))


@pytest.mark.parametrize("restarts", [1, 4])
def test_a_mixture_on_top_costs_little(benchmark, trained, restarts):
    """EM of ten full components on z against 20 epochs of the VAE below it, on the same data."""
    vae, x, below = trained

    def top():
        torch.manual_seed(0)
        GMM(10, 20).fit_em(vae.encode(x), restarts=restarts)

    benchmark.pedantic(top, rounds=1)
    spent = benchmark.stats.stats.total
    share = spent / below
    benchmark.extra_info["share"] = share
    told = f"{restarts} starts: {spent:.2f} s on {below:.1f} s of training, a share of {share:.3f}"
    print(f"\n{told}")
    if share >= AT_MOST_FOR_MIXTURE:
        pytest.xfail(f"{told}; the aim is {AT_MOST_FOR_MIXTURE}")


def test_density_of_a_cascade_costs_what_its_parts_cost(benchmark):
    """One bound of two VAEs against one bound of each; the fastest of interleaved runs."""
    torch.manual_seed(0)
    bottom, top = VAE(784, 20).eval(), VAE(20, 20, likelihood="gaussian").eval()
    x, h = torch.bernoulli(torch.rand(NUM_DATA, 784)), torch.randn(NUM_DATA, 20)
    whole = partial(elbo, Cascade(bottom, top), x)
    whole()
    found = [
        (seconds(whole), seconds(partial(elbo, bottom, x)) + seconds(partial(elbo, top, h)))
        for _ in range(8)
    ]
    benchmark.pedantic(whole, rounds=3)
    ratio = min(a for a, _ in found) / min(b for _, b in found)
    benchmark.extra_info["ratio"] = ratio
    print(f"\ncascade against the sum of its parts: {ratio:.3f}")
    assert ratio < AT_MOST_FOR_CASCADE


def single_chain(product, steps):
    """Metropolis-Hastings as it is usually written: one chain, one proposal at a time."""
    first, energies = product[0], []

    def propose():
        x = first.sample(1)
        energy = float(product.log_density(x).value)
        return energy, energy - float(first.log_marginal(x).value)

    with torch.no_grad():
        energy, weight = propose()
        for _ in range(steps):
            new, other = propose()
            if float(torch.rand(())) < math.exp(min(0.0, other - weight)):
                energy, weight = new, other
            energies.append(energy)
    return np.array(energies)


def test_draws_of_a_parallel_pair_are_fast(benchmark):
    """Seconds per effective draw: chains side by side against one chain, proposals alike."""
    torch.manual_seed(0)
    x = torch.tensor(load_digits().data, dtype=torch.float32)
    x = (x - x.mean(0)) / (x.std(0) + 1.0)
    parts = [GMM(5, 64, covariance="diag"), GMM(5, 64, covariance="diag")]
    for part in parts:
        part.fit_em(x, start="kmeans", restarts=1, variance_floor=0.1)
    product = Product(*parts, powers=0.5)

    made = {}

    def many():
        made["chains"] = product.chains(num_chains=100, num_draws=100, warmup=20, proposal=0)

    benchmark.pedantic(many, rounds=1)
    ours = benchmark.stats.stats.total / made["chains"].ess_log_density
    began = time.perf_counter()
    one = single_chain(product, 3000)
    spent = time.perf_counter() - began
    theirs = spent / float(convergence(one[None, :, None])[0][0])
    print(f"\nper effective draw: {1e3 * ours:.3f} ms, one chain {1e3 * theirs:.3f} ms")
    assert theirs / ours > AT_LEAST_FOR_CHAINS
