"""The parameters of a Gaussian mixture and the Pyro programs that read them."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroboost.models._em import Covariance, Mixture, log_joint
from pyroboost.models._finite_mixture import Parts


class _Mixture(dist.MixtureSameFamily):
    """A mixture of normals, whose support HMC and NUTS can see to be all of space."""

    support = constraints.real_vector


class Components(Parts):
    """The parameters of a mixture, unconstrained, and the programs that read them."""

    lower: nn.Parameter | None

    def __init__(self, k: int, dim: int, covariance: Covariance, visible: str, hidden: str) -> None:
        super().__init__(visible, hidden)
        self.logits = nn.Parameter(torch.zeros(k))
        self.locs = nn.Parameter(torch.randn(k, dim))  # equal components would never part
        self.log_scale = nn.Parameter(torch.zeros(k, dim))
        full = covariance == "full"
        self.lower = nn.Parameter(torch.zeros(k, dim * (dim - 1) // 2)) if full else None

    def scale(self) -> Tensor:
        """Standard deviations (K, D), or lower Cholesky factors (K, D, D)."""
        scale = self.log_scale.exp()
        if self.lower is None:
            return scale
        row, column = self.below_diagonal()
        every = torch.arange(len(scale), device=scale.device)[:, None]
        return torch.diag_embed(scale).index_put((every, row, column), self.lower)

    def below_diagonal(self) -> Tensor:
        """Row and column of each entry of `lower`, (2, D (D - 1) / 2)."""
        dim = self.locs.shape[1]
        return torch.tril_indices(dim, dim, -1, device=self.locs.device)

    def assign(self, value: Mixture) -> None:
        """Set the parameters to a mixture's of the same shape; its kind of scale may be simpler."""
        full = value.is_full
        if value.locs.shape != self.locs.shape or (full and self.lower is None):
            kind = "full" if full else "diagonal"
            raise ValueError(
                f"GMM: cannot take {kind} components of shape {tuple(value.locs.shape)}; "
                f"this mixture has {tuple(self.locs.shape)}"
                f"{' and diagonal covariances' if self.lower is None else ''}."
            )
        deviations = value.scale.diagonal(dim1=-2, dim2=-1) if full else value.scale
        with torch.no_grad():
            # A weight of exactly 0 would be a logit that no gradient ever leaves.
            self.logits.copy_(value.weights.clamp_min(1e-12).log())
            self.locs.copy_(value.locs)
            self.log_scale.copy_(deviations.log())
            if self.lower is not None:
                row, column = self.below_diagonal()
                self.lower.copy_(value.scale[:, row, column] if full else torch.tensor(0.0))

    def log_weights(self) -> Tensor:
        """Return log w_c of every component, (K,)."""
        return self.logits.log_softmax(-1)

    def joint(self, x: Tensor) -> Tensor:
        """Return log m(x, c) of every component, (..., K)."""
        self.check(x)
        return log_joint(x, self.log_weights(), self.locs, self.scale())

    def check(self, x: Tensor) -> None:
        """Refuse data of another dimension."""
        dim = self.locs.shape[1]
        if x.dim() < 2 or x.shape[-1] != dim:
            raise ValueError(
                f"GMM: site '{self.visible}' got shape {tuple(x.shape)}; "
                f"this mixture takes data of shape (N, {dim})."
            )
        if pyro.settings.get("validate_distributions_torch"):
            bad = ~x.isfinite().all(-1)
            if bool(bad.any()):
                raise ValueError(
                    f"GMM: {int(bad.sum())} of {bad.numel()} data hold NaN or infinity at site "
                    f"'{self.visible}'; drop or fill them first."
                )

    def gaussian(self, locs: Tensor, scale: Tensor) -> Any:
        """The normal distribution of one component or of all of them."""
        if self.lower is None:
            return dist.Normal(locs, scale).to_event(1)
        return dist.MultivariateNormal(locs, scale_tril=scale)

    def model(self, x: Tensor) -> Tensor:
        """Draw c ~ Categorical(w); x ~ N(mu_c, Sigma_c)."""
        self.check(x)
        with pyro.plate("data", x.shape[-2], dim=-1):
            c = pyro.sample(self.hidden, dist.Categorical(logits=self.logits))
            normal = self.gaussian(self.locs[c], self.scale()[c])
            return pyro.sample(self.visible, normal, obs=x)

    def marginal(self, x: Tensor) -> Tensor:
        """Draw x ~ sum_k w_k N(mu_k, Sigma_k), without the component."""
        self.check(x)
        weights = dist.Categorical(logits=self.logits)
        mixture = _Mixture(weights, self.gaussian(self.locs, self.scale()))
        with pyro.plate("data", x.shape[-2], dim=-1):
            return pyro.sample(self.visible, mixture, obs=x)
