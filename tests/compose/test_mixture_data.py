"""Data of a mixture: subsamples and scales in the objective, dtypes, devices, refusals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from torch import nn

from pyroboost import MetaModel
from pyroboost.compose import Mixture
from pyroboost.infer import fit
from pyroboost.models import GMM, VAE, BernoulliMixture


class Rows(nn.Module):
    """A Gaussian of variance 2 with its exact posterior, in a plate that takes some rows."""

    def __init__(self, loc, size, law):
        super().__init__()
        self.loc, self.size, self.law = nn.Parameter(torch.tensor(loc)), size, law

    def plate(self, x):
        return pyro.plate("rows", len(x), subsample_size=self.size)

    def model(self, x):
        with self.plate(x) as self.rows:
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[self.rows])

    def guide(self, x):
        with self.plate(x) as rows:
            pyro.sample("z", self.law((x[rows] + self.loc) / 2, 0.5**0.5))


def part(loc, size=10, law=dist.Normal):
    rows = Rows(loc, size, law)
    return MetaModel(rows.model, rows.guide, visible="x", hidden="z")


def two_modes(n=20):
    return torch.cat([torch.randn(n) * 2**0.5 - 5, torch.randn(n) * 2**0.5 + 5])


def log_density(x, locs, weights):
    law = dist.Normal(torch.tensor(locs), 2.0**0.5)
    return (law.log_prob(x[:, None]) + torch.tensor(weights).log()).logsumexp(-1)


def objective(mixture, x, **options):
    return mixture.objective()(mixture.model, mixture.guide, x, **options)


# Subsamples and scales


@pytest.mark.parametrize("nested", [False, True])
def test_objective_is_the_scaled_sum_over_rows_that_all_parts_share(nested):
    """Guides are exact, so that each run is the exact sum over its rows, whatever they are."""
    torch.manual_seed(0)
    x, mixture = two_modes(), Mixture(part(-5.0), part(5.0), weights=[0.3, 0.7])
    exact = log_density(x, [-5.0, 5.0], [0.3, 0.7])
    if nested:
        mixture = Mixture(mixture, part(1.0), weights=[0.6, 0.4])
        exact = log_density(x, [-5.0, 5.0, 1.0], [0.18, 0.42, 0.4])
    for _ in range(5):
        loss = objective(mixture, x)
        rows, *others = (m.rows for m in mixture.modules() if isinstance(m, Rows))
        assert len(rows) == 10
        assert all(torch.equal(rows, other) for other in others)
        assert loss.item() == pytest.approx(-4.0 * exact[rows].sum().item(), rel=1e-4)


def test_objective_of_a_subsample_has_the_mean_of_all_data():
    torch.manual_seed(0)
    x, mixture = two_modes(), Mixture(part(-5.0), part(5.0))
    found = torch.stack([objective(mixture, x).detach() for _ in range(36)])
    exact = -log_density(x, [-5.0, 5.0], [0.5, 0.5]).sum()
    assert abs(found.mean() - exact) < 5 * found.std() / 6


@pytest.mark.parametrize("law", [dist.Normal, NonreparameterizedNormal])
def test_a_scale_multiplies_the_objective_and_its_gradient(law):
    """The scores of draws without a pathwise gradient are scaled as well."""
    torch.manual_seed(0)
    x, mixture = two_modes(), Mixture(part(-4.0, None, law), part(5.0, None, law))
    x, mixture = x.double() + 1.0, mixture.double()
    found = []
    for scale in (1.0, 3.0):
        torch.manual_seed(1)
        with poutine.scale(scale=scale):
            loss = objective(mixture, x)
        found.append([loss, *torch.autograd.grad(loss, list(mixture.parameters()))])
    for one, three in zip(*found, strict=True):
        assert torch.allclose(3.0 * one, three)


def test_weights_of_data_that_a_plate_takes_rows_of_are_refused():
    mixture, x = Mixture(part(-5.0), part(5.0)), two_modes()
    with pytest.raises(ValueError, match=r"shape \(40,\) came for data of which .* take 10"):
        objective(mixture, x, weights=torch.ones(40))


# Dtypes and devices


def test_weights_are_of_the_dtype_and_on_the_device_of_the_parts():
    parts = [GMM(2, 2).double(), GMM(1, 2).double(), GMM(1, 2).double()]
    mixture = Mixture(*parts, weights=[0.25, 0.0, 0.75])
    x = torch.randn(5, 2).double()
    weights = [
        Mixture(*parts).weights,
        mixture.weights,
        (mixture + GMM(1, 2).double()).weights,
        mixture.kept().weights,
        mixture.log_marginal(x).value,
    ]
    assert {w.dtype for w in weights} == {torch.float64}
    assert torch.allclose(mixture.kept().weights, torch.tensor([0.25, 0.75]).double(), atol=1e-15)
    away = Mixture(*(VAE(4, 2, units=3).to("meta") for _ in range(2)), weights=[0.3, 0.7])
    assert {t.device.type for t in (*away.parameters(), *away.buffers())} == {"meta"}
    assert away.log_weights.device.type == "meta"


BITS = (torch.arange(32).reshape(8, 4) % 3 == 0).float()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float64])
@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.guide(x),
        lambda m, x: m.model(x),
        lambda m, x: objective(m, x),
        lambda m, x: m.log_marginal(x),
        lambda m, x: fit(m, x, epochs=1),
    ],
)
def test_data_of_a_dtype_that_the_parts_cannot_take_are_refused_in_words(dtype, call):
    mixture = Mixture(GMM(2, 4), GMM(1, 4))
    with pytest.raises(TypeError, match=rf"data are of {dtype} .* {torch.float32}; pass x\.float"):
        call(mixture, BITS.to(dtype))
    with pytest.raises(TypeError, match=r"pass x\.double\(\)"):
        call(mixture.double(), BITS)


def test_the_dtype_is_told_after_runs_that_went_well_and_in_a_mixture_within():
    mixture = Mixture(VAE(4, 2, units=3), Mixture(VAE(4, 2, units=3), VAE(4, 2, units=3)))
    mixture.guide(BITS)
    with pytest.raises(TypeError, match="pass x"):
        mixture.guide(BITS.double())
    mixed = Mixture(VAE(4, 2, units=3), VAE(4, 2, units=3).double())
    for x in (BITS, BITS.double()):
        with pytest.raises(TypeError, match=r"part 0 \(VAE\) .*float32 and part 1 .*float64"):
            mixed.guide(x)


def test_parts_that_take_any_dtype_still_do():
    mixture = Mixture(BernoulliMixture(2, 4), BernoulliMixture(1, 4))
    for dtype in (torch.uint8, torch.bool, torch.float64):
        found = mixture.log_marginal(BITS.to(dtype)).value
        assert torch.allclose(found.float(), mixture.log_marginal(BITS).value, atol=1e-6)


# Refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_are_not_finite_are_refused_in_words(bad):
    mixture, x = Mixture(GMM(2, 2), GMM(1, 2)), torch.randn(5, 2)
    x[1:3, 0] = bad
    for run in (mixture.guide, mixture.model, lambda x: objective(mixture, x)):
        with pytest.raises(ValueError, match="2 of 5 data hold NaN or infinity"):
            run(x)


@pytest.mark.parametrize("weights", ["ab", ["a", "b"], [[0.5], 0.5]])
def test_weights_that_are_no_numbers_are_refused_in_words(weights):
    with pytest.raises(TypeError, match=r"weights=.* came for 2 parts; give a sequence"):
        Mixture(GMM(1, 1), GMM(1, 1), weights=weights)


@pytest.mark.parametrize("bad", [0.7, -1.0, 2.0, float("nan")])
def test_what_is_no_components_number_is_refused(bad):
    mixture = Mixture(GMM(1, 1), GMM(1, 1), weights=[0.3, 0.7], hidden="component")
    expected = torch.tensor([0.7, 0.3, 0.7]).log()
    for dtype in (torch.int64, torch.float32, torch.uint8):
        found = mixture.log_prior(torch.tensor([1, 0, 1], dtype=dtype)).value
        assert torch.allclose(found, expected)
    with pytest.raises(ValueError, match="came for one of 2 parts; pass whole numbers from 0 to 1"):
        mixture.log_prior(torch.tensor([0.0, bad]))
