"""How the sites of a model and a guide make one weight per particle and datum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyroboost.handlers import is_plate

__all__ = ["PARTICLES", "Layout", "random_sites"]

PARTICLES = "num_particles_vectorized"
"""The name that Pyro gives to the plate over particles."""

Site = dict[str, Any]
_CLOSE = 1e-5  # how far scales may differ by rounding


def random_sites(trace: poutine.Trace) -> dict[str, Site]:
    """Return the sample sites that have a density: neither plates nor deterministic ones."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not is_plate(site)
        and not site["infer"].get("_deterministic")
    }


class Layout:
    """Which dimensions are data, what scale stands outside the logarithm and what power inside.

    Args:
        scored: the model's sites.
        inferred: the guide's sites.
        particles: how many dimensions from the right the particles lie; ``None``: they have none.
    """

    def __init__(
        self, scored: dict[str, Site], inferred: dict[str, Site], particles: float | None
    ) -> None:
        self._match(scored, inferred)
        sites = [*scored.values(), *inferred.values()]
        plates = [_plates(site) for site in sites]
        common = frozenset.intersection(*plates) if plates else frozenset()
        for site, own in zip(sites, plates, strict=True):
            for name, _, size, full in own - common:
                if size != full:
                    raise _refusal(
                        f"the plate '{name}' is subsampled and holds '{site['name']}' but not "
                        "every other site, so that no bound per datum can be scaled; put all "
                        "sites into it"
                    )
        self.data = {dim for _, dim, _, _ in common}
        self.kept = self.data if particles is None else self.data | {-int(particles)}
        self.scale = self._outer(scored, common)
        self.powers = {id(site): self._power(site) for site in sites}
        self.beta = self._same_power(scored, inferred)

    @staticmethod
    def _match(scored: dict[str, Site], inferred: dict[str, Site]) -> None:
        for name, site in inferred.items():
            if site["is_observed"] or site["infer"].get("is_auxiliary"):
                continue
            if name not in scored:
                raise _refusal(f"the guide draws '{name}', which the model lacks; add it there")
            if {p[:3] for p in _plates(site)} != {p[:3] for p in _plates(scored[name])}:
                raise _refusal(
                    f"'{name}' lies in other plates in the guide than in the model; use the same"
                )
        for name, site in scored.items():
            if not site["is_observed"] and name not in inferred:
                raise _refusal(
                    f"the guide does not draw the model's latent site '{name}'; add it to the "
                    "guide, or sum it out of the model"
                )

    def _outer(self, scored: dict[str, Site], common: frozenset[Any]) -> Tensor | float:
        observed = [site for site in scored.values() if site["is_observed"]]
        if not observed:
            scale = 1.0
            for _, _, size, full in common:
                scale *= full / size
            return scale
        scale = observed[0]["scale"]
        for site in observed[1:]:
            if not _alike(site["scale"], scale):
                raise _refusal(
                    f"the observed sites '{observed[0]['name']}' and '{site['name']}' have "
                    "different scales; scale all of them alike"
                )
        if isinstance(scale, Tensor):
            for dim in range(-scale.dim(), 0):
                if scale.shape[dim] > 1 and dim not in self.data:
                    raise _refusal(
                        f"the scale of '{observed[0]['name']}' varies along dimension {dim}, which "
                        "is no plate over data; give each datum one weight"
                    )
        return scale

    def _power(self, site: Site) -> float:
        """Return what a latent site is scaled by beyond its datum: the annealing exponent."""
        if not isinstance(self.scale, Tensor) and not isinstance(site["scale"], Tensor):
            ratio = site["scale"] / self.scale
            return 1.0 if math.isclose(ratio, 1.0, rel_tol=_CLOSE) else ratio
        scale = torch.as_tensor(self.scale, dtype=torch.float64)
        own = torch.as_tensor(site["scale"], dtype=torch.float64, device=scale.device)
        ratio = (own / scale)[(scale != 0).expand_as(own * scale)]  # 0 says nothing of its power
        power = float(ratio[0]) if ratio.numel() else 1.0
        if not _alike(ratio, power):
            raise _refusal(
                f"the scale of '{site['name']}' varies over data in another way than that of the "
                "observed sites; weigh all sites of a datum alike"
            )
        return 1.0 if _alike(power, 1.0) else power

    def _same_power(self, scored: dict[str, Site], inferred: dict[str, Site]) -> float:
        latent = [site for site in scored.values() if not site["is_observed"]]
        sites = [*latent, *inferred.values()]
        powers = [self.powers[id(site)] for site in sites] or [1.0]
        for site, power in zip(sites, powers, strict=False):
            if not _alike(power, powers[0]):
                raise _refusal(
                    f"'{site['name']}' is scaled by {power:g} and '{sites[0]['name']}' by "
                    f"{powers[0]:g} beyond their data; scale all latent sites of model and guide "
                    "alike"
                )
        return powers[0]

    def total(
        self, sites: Iterable[Site], density: Callable[[Site], Tensor], *, raised: bool = True
    ) -> Tensor:
        """Sum log densities over sites and over all dimensions but particles and data.

        Args:
            sites: some of the sites.
            density: the unscaled log density of a site.
            raised: whether latent sites are raised to their annealing exponent.
        """
        result = torch.zeros(())
        for site in sites:
            value = density(site)
            if site["mask"] is not None:
                on = torch.as_tensor(site["mask"], device=value.device)
                value = torch.where(on, value, value.new_zeros(()))
            dims = [dim for dim in range(-value.dim(), 0) if dim not in self.kept]
            value = value.sum(dims, keepdim=True) if dims else value
            power = self.powers[id(site)] if raised else 1.0
            result = result.to(value) + (value if power == 1.0 else power * value)
        return result


def _plates(site: Site) -> frozenset[tuple[str, int, int, int]]:
    found = set()
    for frame in site["cond_indep_stack"]:
        if frame.name == PARTICLES:
            continue
        if frame.dim is None:
            raise _refusal(
                f"the plate '{frame.name}' around '{site['name']}' runs in a loop; open it with "
                "'with pyro.plate(...)'"
            )
        full = frame.size if frame.full_size is None else frame.full_size
        found.add((frame.name, int(frame.dim), int(frame.size), int(full)))
    return frozenset(found)


def _alike(left: Any, right: Any) -> bool:
    if not isinstance(left, Tensor) and not isinstance(right, Tensor):
        return math.isclose(left, right, rel_tol=_CLOSE)
    a, b = (torch.as_tensor(v, dtype=torch.float64) for v in (left, right))
    return bool(((a - b).abs() <= _CLOSE * (a.abs() + b.abs())).all())


def _refusal(reason: str) -> ValueError:
    return ValueError(f"ImportanceWeightedELBO: {reason}.")
