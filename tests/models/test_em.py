"""EM of Gaussian mixtures against scikit-learn, closed forms and its own promises."""

import math

import pytest
import torch
from sklearn.mixture import GaussianMixture

from pyroboost.models._em import Mixture, floored_scale, log_joint, mean_log_density
from pyroboost.models._em_checks import check_data
from pyroboost.models._em_fit import _reseed, centre_and_unit, fit, kmeans_start, prior_start

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
KINDS = ["full", "diag"]


def clusters(n=600, d=3, k=3, *, spread=2.0, seed=0, dtype=torch.float64):
    """Correlated, overlapping clusters."""
    g = torch.Generator().manual_seed(seed)
    locs = spread * torch.randn(k, d, generator=g, dtype=torch.float64)
    mix = torch.randn(k, d, d, generator=g, dtype=torch.float64)
    label = torch.randint(k, (n,), generator=g)
    noise = torch.randn(n, d, 1, generator=g, dtype=torch.float64)
    return (locs[label] + (mix[label] @ noise).squeeze(-1)).to(dtype)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def to_sklearn(start, **options):
    """scikit-learn's mixture that begins (or, fitted for no step, stays) at the same parameters."""
    kind = "full" if start.is_full else "diag"
    precision = torch.cholesky_inverse(start.scale) if start.is_full else start.scale**-2
    return GaussianMixture(
        len(start.weights),
        covariance_type=kind,
        reg_covar=0.0,
        tol=0.0,
        weights_init=start.weights.numpy(),
        means_init=start.locs.numpy(),
        precisions_init=precision.numpy(),
        init_params="random_from_data",
        **options,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_density_agrees_with_scikit_learn(kind):
    data = clusters()
    mixture = kmeans_start(data, 4, covariance=kind, generator=seeded())
    theirs = to_sklearn(mixture, max_iter=1).fit(data)  # one step; then our parameters are put back
    theirs.weights_, theirs.means_ = mixture.weights.numpy(), mixture.locs.numpy()
    inverse = torch.linalg.inv(mixture.scale).mT if kind == "full" else 1 / mixture.scale
    theirs.precisions_cholesky_ = inverse.numpy()
    expected = torch.from_numpy(theirs.score_samples(data.numpy()))
    ours = log_joint(data, mixture.weights.log(), mixture.locs, mixture.scale).logsumexp(-1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert mean_log_density(data, mixture) == pytest.approx(float(expected.mean()), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "dim"), [(1, 4), (40, 4), (1, 17), (9, 17)])
def test_each_step_is_scikit_learns(kind, steps, dim):
    data = clusters(n=900, d=dim, k=4, spread=1.0)
    start = kmeans_start(data, 4, covariance=kind, generator=seeded())
    theirs = to_sklearn(start, max_iter=steps).fit(data.numpy())
    ours = fit(data, start, max_iterations=steps, tolerance=0.0, variance_floor=1e-12)
    assert len(ours.history) == steps + 1
    assert ours.history[-1] == pytest.approx(theirs.score(data.numpy()), abs=1e-7)
    assert mean_log_density(data, ours.mixture) == pytest.approx(ours.history[-1], abs=1e-9)
    torch.testing.assert_close(
        ours.mixture.locs, torch.from_numpy(theirs.means_), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        ours.mixture.weights, torch.from_numpy(theirs.weights_), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_converged_likelihood_is_scikit_learns(kind):
    data = clusters()
    start = kmeans_start(data, 3, covariance=kind, generator=seeded())
    theirs = to_sklearn(start, max_iter=500).set_params(tol=1e-8).fit(data.numpy())
    ours = fit(data, start, max_iterations=500, tolerance=1e-8)
    assert ours.converged
    assert ours.history[-1] == pytest.approx(theirs.score(data.numpy()), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("floor", [1e-6, 0.3])
@pytest.mark.parametrize(("n", "d"), [(400, 3), (30, 40)])
def test_likelihood_never_falls(kind, floor, n, d):
    """Also where the floor binds: fewer data than dimensions, or a floor of a third."""
    data = clusters(n=n, d=d, k=4, spread=0.7)
    start = kmeans_start(data, 5, covariance=kind, generator=seeded(), variance_floor=floor)
    found = fit(data, start, max_iterations=60, tolerance=0.0, variance_floor=floor)
    assert found.reseeded == 0
    assert len(found.history) == 61
    steps = torch.tensor(found.history, dtype=torch.float64).diff()
    assert steps.min() > -1e-9
    assert steps.sum() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_one_component_is_the_moments_of_the_data(kind):
    data = clusters()
    start = kmeans_start(data, 1, covariance=kind, generator=seeded())
    found = fit(data, start._replace(locs=start.locs + 1.0), max_iterations=1, tolerance=0.0)
    torch.testing.assert_close(found.mixture.locs[0], data.mean(0))
    covariance = torch.cov(data.mT, correction=0)
    scale = found.mixture.scale[0]
    if kind == "full":
        torch.testing.assert_close(scale @ scale.mT, covariance)
    else:
        torch.testing.assert_close(scale**2, covariance.diagonal())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 97, 10_000])
def test_chunks_do_not_matter(kind, chunk):
    data = clusters(n=300)
    start = kmeans_start(data, 3, covariance=kind, generator=seeded())
    whole = fit(data, start, max_iterations=5, tolerance=0.0)
    parts = fit(data, start, max_iterations=5, tolerance=0.0, chunk=chunk)
    assert parts.history == pytest.approx(whole.history, abs=1e-10)
    torch.testing.assert_close(parts.mixture.scale, whole.mixture.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_data_give_float32_accuracy(kind):
    """Thin clusters far apart: moments about the origin would leave nothing of the covariance."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(2, (800,), generator=g)
    far = 50.0 * label[:, None] + torch.tensor([100.0, -30.0])
    data = (far + 0.01 * torch.randn(800, 2, generator=g)).float()
    start = kmeans_start(data, 2, covariance=kind, generator=seeded(), variance_floor=1e-10)
    single = fit(data, start, max_iterations=8, variance_floor=1e-10)
    double = fit(data.double(), start, max_iterations=8, variance_floor=1e-10)
    torch.testing.assert_close(single.mixture.scale, double.mixture.scale, rtol=2e-3, atol=1e-6)
    assert single.history[-1] == pytest.approx(double.history[-1], abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_follows_shift_and_scale_of_the_data(kind):
    data = clusters()
    factor = torch.tensor([1e-3, 1.0, 1e4], dtype=torch.float64)
    moved = data * factor + 1e3
    one = fit(data, kmeans_start(data, 3, covariance=kind, generator=seeded()))
    two = fit(moved, kmeans_start(moved, 3, covariance=kind, generator=seeded()))
    expected = one.history[-1] - float(factor.log().sum())
    assert two.history[-1] == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(two.mixture.locs, one.mixture.locs * factor + 1e3)


def test_floored_scale_is_the_constrained_maximiser():
    """No allowed covariance nearby has a greater -log|Sigma| - tr(Sigma^{-1} S)."""
    g = torch.Generator().manual_seed(3)
    factor = torch.randn(4, 2, generator=g, dtype=torch.float64)
    unit = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    moment = (factor @ factor.mT) * unit[:, None] * unit  # rank 2: the floor binds
    floor = 0.05
    tril = floored_scale(moment[None], unit, floor)[0]

    def value(sigma):
        return -torch.logdet(sigma) - torch.linalg.solve(sigma, moment).trace()

    best = tril @ tril.mT
    assert torch.linalg.eigvalsh(best / (unit[:, None] * unit)).min() >= floor * (1 - 1e-9)
    tried = 0
    for _ in range(400):
        change = torch.randn(4, 4, generator=g, dtype=torch.float64) * 0.05
        nearby = best + (change + change.mT) * unit[:, None] * unit
        if torch.linalg.eigvalsh(nearby / (unit[:, None] * unit)).min() >= floor:
            tried += 1
            assert value(nearby) < value(best)
    assert tried > 5


def test_floor_leaves_large_variances_alone():
    moment = torch.tensor([[[2.0, 0.5], [0.5, 1.0]]], dtype=torch.float64)
    tril = floored_scale(moment, torch.ones(2, dtype=torch.float64), 1e-6)
    torch.testing.assert_close(tril @ tril.mT, moment)


def test_kmeans_start_finds_separate_clusters():
    locs = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0]], dtype=torch.float64)
    label = torch.arange(4).repeat_interleave(torch.tensor([40, 80, 120, 160]))
    data = locs[label] + 0.3 * torch.randn(400, 2, dtype=torch.float64)
    for seed in range(5):
        start = kmeans_start(data, 4, generator=seeded(seed))
        nearest = torch.cdist(locs, start.locs).min(1)
        assert nearest.values.max() < 0.2
        torch.testing.assert_close(
            start.weights[nearest.indices],
            torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
            atol=0.01,
            rtol=0,
        )
        within = start.scale[0] @ start.scale[0].mT
        torch.testing.assert_close(
            within.diagonal(), within.new_full((2,), 0.09), atol=0.02, rtol=0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_generator_decides_and_the_global_state_stays(kind):
    data = clusters()
    before = torch.get_rng_state()
    one = fit(data, kmeans_start(data, 3, covariance=kind, generator=seeded(5)))
    two = fit(data, kmeans_start(data, 3, covariance=kind, generator=seeded(5)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.mixture, two.mixture, strict=True))
    other = kmeans_start(data, 3, covariance=kind, generator=seeded(6))
    assert not torch.equal(
        other.locs, kmeans_start(data, 3, covariance=kind, generator=seeded(5)).locs
    )


DEGENERATE = {
    "duplicates": torch.tensor([[0.0, 1.0]]).repeat(50, 1),
    "fewer distinct points than components": torch.tensor([[0.0, 1.0], [2.0, 2.0]]).repeat(20, 1),
    "a constant column": torch.cat([torch.randn(60, 1), torch.full((60, 1), 0.1)], 1),
    "a line": torch.randn(60, 1) * torch.tensor([1.0, 2.0]),
    "as many points as components": torch.randn(5, 2),
    "tiny": 1e-18 * torch.randn(60, 2),
    "one outlier": torch.cat([torch.randn(60, 2), torch.tensor([[1e6, 0.0]])]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_data_give_a_finite_mixture(name, kind, dtype):
    data = DEGENERATE[name].to(dtype)
    start = kmeans_start(data, 5, covariance=kind, generator=seeded())
    found = fit(data, start, generator=seeded())
    assert all(part.isfinite().all() for part in found.mixture)
    assert float(found.mixture.weights.sum()) == pytest.approx(1.0)
    assert math.isfinite(found.history[-1])
    assert found.history[-1] >= found.history[0]


@pytest.mark.parametrize("kind", KINDS)
def test_empty_component_is_placed_anew_and_bounds_the_loss(kind):
    data = clusters(k=3, spread=4.0)
    good = kmeans_start(data, 2, covariance=kind, generator=seeded())
    away = kmeans_start(data, 1, covariance=kind, generator=seeded())
    start = Mixture(
        torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64),
        torch.cat([good.locs, away.locs + 1e4]),
        torch.cat([good.scale, away.scale]),
    )
    found = fit(data, start, max_iterations=300, tolerance=1e-7, generator=seeded())
    two = fit(data, good, max_iterations=300, tolerance=1e-7)
    assert found.reseeded >= 1
    assert found.mixture.weights.min() > 0.01
    assert found.history[-1] > two.history[-1] + 0.05
    steps = torch.tensor(found.history, dtype=torch.float64).diff()
    assert steps.min() >= math.log1p(-0.01) - 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_placing_components_anew_costs_at_most_their_weight(kind):
    """For every datum, since the others only give up a hundredth of their weight."""
    data = clusters()
    good = kmeans_start(data, 3, covariance=kind, generator=seeded())
    locs = torch.cat([good.locs[:1], good.locs[1:] + 1e6])
    start = good._replace(weights=torch.tensor([1.0, 0.0, 0.0]).double(), locs=locs)
    empty = torch.tensor([False, True, True])
    after = _reseed(data, torch.zeros_like(locs[0]), start, empty, seeded())
    before, now = (
        log_joint(data, m.weights.log(), m.locs, m.scale).logsumexp(-1) for m in (start, after)
    )
    assert (now - before).min() >= math.log1p(-0.01) - 1e-9
    assert (now - before).max() > 0
    assert float(after.weights.sum()) == pytest.approx(1.0)
    assert (torch.cdist(after.locs[1:], data).min(1).values < 1e-9).all()


def test_result_is_never_worse_than_the_start():
    """A start below the variance floor is better on its data than anything that EM may reach."""
    data = torch.tensor([[0.0], [1.0]], dtype=torch.float64).repeat(20, 1)
    sharp = Mixture(
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        torch.tensor([[0.0], [1.0]], dtype=torch.float64),
        torch.full((2, 1), 1e-6, dtype=torch.float64),
    )
    found = fit(data, sharp, variance_floor=0.1)
    torch.testing.assert_close(found.mixture.scale, sharp.scale)
    assert found.history[-1] == found.history[0]
    assert mean_log_density(data, found.mixture) == pytest.approx(found.history[-1], abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_prior_start_cannot_fall_below_the_prior(kind, scale):
    """On any data log m(x) >= log(1 - e) + log N(x; 0, I), for each datum, before training."""
    data = scale * clusters()
    rest = kmeans_start(data, 4, covariance=kind, generator=seeded())
    start = prior_start(rest, 0.03)
    assert float(start.weights.sum()) == pytest.approx(1.0)
    other = scale * clusters(seed=9)
    normal = -0.5 * (other.square() + math.log(2 * math.pi)).sum(-1)
    value = log_joint(other, start.weights.log(), start.locs, start.scale).logsumexp(-1)
    assert (value - normal).min() >= math.log1p(-0.03) - 1e-9
    before = mean_log_density(data, start)
    assert fit(data, start, generator=seeded()).history[-1] >= before


def test_centre_and_unit_treat_rounding_as_constant():
    data = torch.stack([torch.full((70_000,), 0.1), torch.linspace(-1, 1, 70_000)], 1)
    centre, unit = centre_and_unit(data)
    torch.testing.assert_close(centre, torch.tensor([0.1, 0.0]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(unit, torch.full((2,), 3**-0.5).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([[0.0, 1.0]], TypeError, "list"),
        (torch.zeros(5), ValueError, r"\(5,\)"),
        (torch.zeros(0, 2), ValueError, r"\(0, 2\)"),
        (torch.zeros(9, 2, dtype=torch.long), TypeError, "int64"),
        (torch.zeros(2, 2), ValueError, "2 data for 3 components"),
        (torch.tensor([[0.0], [math.nan], [math.inf], [1.0]]), ValueError, "2 of 4 data"),
    ],
)
def test_unfit_data_are_refused_in_a_sentence(data, error, words):
    with pytest.raises(error, match=words):
        check_data(data, 3, "here")


def test_data_out_of_range_are_refused_in_a_sentence():
    data = torch.tensor([[-3e38, 0.0], [3e38, 1.0], [0.0, 2.0]])
    start = Mixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1, 2, 2).tril()).to(data.double())
    with pytest.raises(ValueError, match="rescale the data"):
        fit(data, start)
