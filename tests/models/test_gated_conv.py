"""The gated convolutional VAE: its shapes, its gates, and guides on its features."""

import pytest
import torch
from torch import nn

from pyroboost import flows
from pyroboost.evaluation import elbo, log_weights
from pyroboost.guides import BoostedFlowGuide, FlowGuide
from pyroboost.infer import fit
from pyroboost.models import GatedConvVAE
from pyroboost.models.gated_conv import _Gated

SMALL = {"channels": (3, 4, 12), "decoder_channels": (6, 4, 3)}


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((28, 28), [(16, 14, 14), (32, 7, 7), (256, 1, 1)]),
        ((28, 20), [(16, 14, 10), (32, 7, 5), (256, 1, 1)]),
        ((8, 8), [(16, 4, 4), (32, 2, 2), (256, 1, 1)]),
    ],
)
def test_sizes_of_every_layer(shape, sizes):
    """The paper's layers, both ways, for MNIST, Frey faces and small digits."""
    vae = GatedConvVAE(shape)
    seen, back = [], []
    for module in vae.encoder.modules():
        if isinstance(module, _Gated):
            module.register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape[1:])))
    for module in vae.decoder.modules():
        if isinstance(module, _Gated):
            module.register_forward_hook(lambda m, a, out: back.append(tuple(out.shape[1:])))
    x = torch.bernoulli(torch.full((2, *shape), 0.5))
    assert vae.encode(x).shape == (2, 64)
    assert seen == sizes
    assert vae.decode(torch.zeros(2, 64)).shape == x.shape
    h, w = shape[0] // 4, shape[1] // 4
    assert back[:3] == [(32, h, w), (16, 2 * h - 1, 2 * w - 1), (16, *shape)]
    kernels = [
        m.kernel_size for m in vae.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]
    assert sorted(kernels) == sorted([(5, 5), (5, 5), (h, w), (h, w), (5, 5), (5, 5), (1, 1)])


def test_a_layer_is_its_values_times_its_gates():
    gated = _Gated(nn.Conv2d(2, 6, 3))
    x = torch.randn(4, 2, 5, 5)
    weight, bias = gated.both.weight, gated.both.bias
    values = nn.functional.conv2d(x, weight[:3], bias[:3])
    gates = nn.functional.conv2d(x, weight[3:], bias[3:]).sigmoid()
    assert torch.allclose(gated(x), values * gates, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "discretized"])
@pytest.mark.parametrize(
    ("shape", "image"), [(48, (1, 8, 6)), ((3, 8, 4), None), ((8, 4), None), (96, (3, 8, 4))]
)
def test_shapes_of_data(shape, image, likelihood):
    if image == (1, 8, 6):
        with pytest.raises(ValueError, match="multiples of four"):
            GatedConvVAE(shape, 5, image_shape=image, likelihood=likelihood, **SMALL)
        return
    vae = GatedConvVAE(shape, 5, image_shape=image, likelihood=likelihood, **SMALL)
    full = (shape,) if isinstance(shape, int) else shape
    x = torch.bernoulli(torch.full((6, *full), 0.5))
    assert vae.sample(2).shape == (2, *full)
    assert log_weights(vae, x, num_samples=3).shape == (3, 6)
    before = {n: p.clone() for n, p in vae.named_parameters()}
    fit(vae, x, epochs=1)
    assert all(not torch.equal(p, before[n]) for n, p in vae.named_parameters())


def test_location_and_scale_are_whole_images():
    """The first half of the channels of the last layer are locations, the others scales."""
    vae = GatedConvVAE((2, 4, 4), 3, likelihood="gaussian", **SMALL)
    last = vae.decoder.net[0][-2]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    loc, raw = vae.decoder(torch.zeros(1, 3))
    assert loc[0].flatten(1).unique(dim=1).flatten().tolist() == [1.0, 2.0]
    assert raw[0].flatten(1).unique(dim=1).flatten().tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "guide",
    [
        lambda e: FlowGuide(e, 5, lambda d: flows.planar(d, 2, context=12)),
        lambda e: FlowGuide(e, 5, lambda d: flows.iaf(d, 2, units=8)),
        lambda e: BoostedFlowGuide(e, 5, 2, lambda d: flows.realnvp(d, 1, context=12)),
        lambda e: BoostedFlowGuide(e, 5, 2, lambda d: flows.realnvp(d, 1)),
    ],
)
def test_guides_take_the_features_as_context(guide):
    vae = GatedConvVAE((8, 8), 5, guide=guide, **SMALL)
    x = torch.bernoulli(torch.full((6, 8, 8), 0.5))
    fit(vae, x, epochs=1)
    assert elbo(vae, x, num_samples=3).value.shape == (6,)
    features = vae.encoder(x)[2]
    assert features.shape == (6, 12)
    assert torch.allclose(features, vae.encoder.net.features(x))
    if vae.guide.fn.context:
        assert torch.equal(vae.guide.fn.base(x)[1], features)


def test_leading_dimensions_are_folded():
    vae = GatedConvVAE((8, 8), 5, **SMALL)
    stack = torch.rand(3, 4, 8, 8)
    whole = vae.encoder(stack)[0]
    assert torch.allclose(whole[1], vae.encoder(stack[1])[0], atol=1e-6)
    z = torch.randn(3, 4, 5)
    assert torch.allclose(vae.decoder(z)[1], vae.decoder(z[1]), atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match=r"GatedConvVAE: images of 10 x 8"):
        GatedConvVAE((10, 8))
    with pytest.raises(ValueError, match=r"GatedConvVAE: data of shape \(784,\) are no images"):
        GatedConvVAE(784)
    with pytest.raises(ValueError, match="give three positive numbers each"):
        GatedConvVAE((8, 8), channels=(4, 0, 4))
    with pytest.raises(ValueError, match="must be 'bernoulli' or 'gaussian', or 'discretized'"):
        GatedConvVAE((8, 8), 5, likelihood="poisson", **SMALL)
