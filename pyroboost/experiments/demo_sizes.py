"""How large the demo's models are and how long they are trained."""

from __future__ import annotations

from dataclasses import dataclass

from pyroboost.experiments.parts import Training

__all__ = ["SIZES", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Sizes and lengths; every model has the epochs that take about the same time in all.

    Args:
        rbm: how each RBM of a chain is trained.
        vae: how the VAE above RBMs is trained.
        bottom_vae: how the VAE at the bottom of a chain is trained.
        single_rbm: how the single RBM is trained.
        single_vae: how the single VAE is trained.
        hidden: hidden units of the bottom RBM; with at most 20 its log Z is exact.
        units: width of the VAEs' layers.
        latent: their latent dimensions.
        components: components of the mixtures.
        draws: draws of z per training image that a mixture is fitted to.
        test_images: test images on which models are compared.
        samples: importance samples per test image.
    """

    rbm: Training
    vae: Training
    bottom_vae: Training
    single_rbm: Training
    single_vae: Training
    hidden: int = 16
    units: int = 50
    latent: int = 8
    components: int = 10
    draws: int = 5
    test_images: int = 300
    samples: int = 500


_SHORT = Training(epochs=1)
SIZES = {
    "smoke": Sizes(
        rbm=_SHORT,
        vae=_SHORT,
        bottom_vae=_SHORT,
        single_rbm=_SHORT,
        single_vae=_SHORT,
        hidden=6,
        units=16,
        latent=2,
        components=3,
        samples=30,
    ),
    "digits": Sizes(
        rbm=Training(epochs=30, lr=2e-2),
        vae=Training(epochs=45, lr=3e-3),
        bottom_vae=Training(epochs=115, lr=3e-3),
        single_rbm=Training(epochs=120, lr=2e-2),
        single_vae=Training(epochs=120, lr=3e-3),
    ),
    "mnist": Sizes(
        rbm=Training(epochs=5),
        vae=Training(epochs=8),
        bottom_vae=Training(epochs=13),
        single_rbm=Training(epochs=20),
        single_vae=Training(epochs=14),
        hidden=200,
        units=500,
        latent=20,
        draws=1,
        test_images=1_000,
        samples=300,
    ),
}
