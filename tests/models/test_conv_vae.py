"""The convolutional VAE: its networks mirror each other, and it is a VAE in all else."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyroboost.evaluation import elbo, log_weights
from pyroboost.infer import fit
from pyroboost.models import ConvVAE
from pyroboost.models.conv_vae import _Grow, _Shrink


def small(shape=(1, 7, 5), **settings):
    return ConvVAE(shape, 2, **{"channels": (3, 4), "units": 8, **settings})


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (3, 2), (3, 1), (5, 3), (2, 2), (4, 4)])
@pytest.mark.parametrize("size", [(1, 2), (5, 28), (7, 8), (3, 4)])
def test_growing_is_the_transpose_of_shrinking(kernel, stride, size):
    """<A x, u> = <x, A' u> with the same kernels, and ceil(n / stride) positions a side."""
    down = _Shrink((2, 3), size, kernel, stride, bias=False).double()
    up = _Grow((3, 2), size, kernel, stride, bias=False).double()
    up.conv.weight = down.conv.weight
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    y = down(x)
    assert y.shape == (2, 3, -(-size[0] // stride), -(-size[1] // stride))
    u = torch.randn_like(y)
    torch.testing.assert_close((y * u).sum(), (x * up(u)).sum())


def test_sizes_are_those_of_the_paper():
    """28, 14, 7, 4, 2 pixels with 32, 64, 128, 256 channels, then 500 units and 50 latents."""
    vae = ConvVAE(784, 50, image_shape=(28, 28))
    shapes = []
    for module in vae.guide.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    vae.encode(torch.zeros(2, 784))
    convolutions = [(32, 14, 14), (64, 7, 7), (128, 4, 4), (256, 2, 2)]
    assert shapes == [*convolutions, (500,), (100,)]
    kernels = [m for m in vae.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert all((m.kernel_size, m.stride) == ((4, 4), (2, 2)) for m in kernels)
    assert len(kernels) == 8
    norms = [m for m in vae.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == 4 + 1 + 2 + 3


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize(
    ("shape", "image"),
    [((1, 7, 5), None), ((7, 5), None), (35, (7, 5)), ((35,), (1, 7, 5)), ((3, 4, 6), None)],
)
def test_shapes(likelihood, shape, image):
    vae = small(shape, image_shape=image, likelihood=likelihood)
    full = (35,) if shape == 35 else shape
    x = torch.zeros(5, *full)
    assert vae.encode(x).shape == (5, 2)
    assert vae.decode(torch.zeros(5, 2)).shape == x.shape
    assert vae.sample(3).shape == (3, *full)
    assert log_weights(vae, x, num_samples=2).shape == (2, 5)


def test_flat_data_and_images_are_one_model():
    """The same weights give the same numbers for (N, 105) and (N, 3, 7, 5)."""
    for likelihood in ("bernoulli", "gaussian"):
        image = small((3, 7, 5), likelihood=likelihood).eval()
        flat = small(105, image_shape=(3, 7, 5), likelihood=likelihood).eval()
        flat.load_state_dict(image.state_dict())
        x = (torch.rand(6, 3, 7, 5) < 0.5).float()
        pyro.set_rng_seed(1)
        one = log_weights(image, x)
        pyro.set_rng_seed(1)
        torch.testing.assert_close(log_weights(flat, x.flatten(1)), one)


def test_weights_are_the_hand_written_ones():
    """log m(x, z) - log q(z | x) from the two networks; a gaussian's first half is its location."""
    vae = small((2, 6, 5), likelihood="gaussian").eval()
    x = torch.randn(4, 2, 6, 5)
    pyro.set_rng_seed(2)
    found = log_weights(vae, x)[0]
    with torch.no_grad():
        loc, raw = vae.guide.fn.net.net(x).chunk(2, -1)
        law = dist.Normal(loc, nn.functional.softplus(raw) + 1e-4)
        pyro.set_rng_seed(2)
        z = law.sample()
        out = vae.model.fn.net.net[0](z).reshape(4, 4, 6, 5)
        scale = nn.functional.softplus(out[:, 2:]) + 1e-4
        by_hand = dist.Normal(out[:, :2], scale).log_prob(x).flatten(1).sum(-1)
    by_hand = by_hand + dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - law.log_prob(z).sum(-1)
    torch.testing.assert_close(found, by_hand, atol=1e-4, rtol=1e-4)


def test_trains_and_reaches_every_parameter():
    """By SVI with vectorised particles, and by a fit, whose bound grows on bars."""
    x = torch.zeros(60, 7, 5)
    for row, index in enumerate(torch.randint(5, (60,))):
        x[row, :, index] = 1.0
    vae = small((7, 5))
    before = {n: p.clone() for n, p in vae.named_parameters()}
    loss = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), loss)
    for _ in range(3):
        svi.step(x)
    assert all(not torch.equal(p, before[n]) for n, p in vae.named_parameters())
    start = elbo(vae, x).mean
    fit(vae, x, epochs=40, batch_size=20, lr=0.01, seed=0)
    assert elbo(vae, x).mean > start + 5


def test_copy_dtype_and_file_keep_the_density(tmp_path):
    vae = small().eval()
    x = (torch.rand(5, 1, 7, 5) < 0.5).float()
    vae.save(tmp_path / "vae.pt")
    with torch.no_grad():
        z = vae.guide.fn.net(x)[..., :2]
        logits = vae.model.fn.net(z)
        for other in (copy.deepcopy(vae), small().eval().load(tmp_path / "vae.pt")):
            torch.testing.assert_close(other.model.fn.net(z), logits)
        other = copy.deepcopy(vae).double()
        torch.testing.assert_close(other.model.fn.net(z.double()).float(), logits)


def test_refusals():
    with pytest.raises(ValueError, match=r"data of shape \(784,\) are no images"):
        ConvVAE(784, 2)
    with pytest.raises(ValueError, match=r"no images of shape \(28, 27\)"):
        ConvVAE(784, 2, image_shape=(28, 27))
    with pytest.raises(ValueError, match="the kernel at least as large as the stride"):
        small(kernel=2, stride=3)
    with pytest.raises(ValueError, match=r"channels=\(\)"):
        small(channels=())
    with pytest.raises(ValueError, match="must be 'bernoulli' or 'gaussian'"):
        small(likelihood="poisson")
    with pytest.raises(ValueError, match=r"it takes \(N, 1, 7, 5\)"):
        small().model(torch.zeros(3, 1, 5, 7))
