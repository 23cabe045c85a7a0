"""Runs of a mixture's parts: as far as a site, aside, to be scored, within the mixture's model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroboost.compose._laws import Aside
from pyroboost.compose._sites import Names, Plates, Site
from pyroboost.handlers import is_plate

__all__ = ["Draws", "Inside", "Scored", "reach"]

DRAWN = "drawn"


class _Reached(BaseException):
    """Ends the run of a program at the site that was looked for."""


class _Reach(Messenger):
    def __init__(self, names: Names, site: str) -> None:
        super().__init__()
        self.names, self.site = names, site
        self.found: Site | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate(msg):
            return
        if msg["name"] == self.site:
            self.found = self.names.read(msg)
            raise _Reached
        msg["stop"] = True


def reach(
    program: Callable[..., Any], names: Names, rows: dict[str, Any], site: str, *args: Any
) -> Site:
    """Run a program as far as one of its sites, unheard, and return the site undrawn."""
    found = _Reach(names, site)
    try:
        with Plates(names, rows), found:
            program(*args)
    except _Reached:
        pass
    if found.found is None:
        raise ValueError(
            f"Mixture: the model of part {names.index} has no site '{site}'; check its name."
        )
    return found.found


class Draws(Messenger):
    """Draw every latent site of a part's guide aside: seen by plates, unseen by traces.

    The draws take the dimensions of all plates outside, such as vectorised particles.
    """

    def __init__(self, names: Names) -> None:
        super().__init__()
        self.names = names
        self.sites: dict[str, Site] = {}
        self._open: dict[int, Site] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate(msg):
            return
        if msg["infer"].get("_do_not_trace"):  # drawn aside by a mixture within this part
            msg["name"] = self.names.site(msg["name"])
            msg["cond_indep_stack"] = self.names.read(msg).frames
            return
        site = self.names.read(msg)
        self.sites[site.name] = site
        if site.observed:
            msg["stop"] = True
            return
        self._open[id(msg)] = site
        msg["name"] = f"{self.names.site(site.name)}.{DRAWN}"
        msg["cond_indep_stack"] = site.frames
        msg["fn"] = Aside(site.fn)
        msg["infer"] = {"is_auxiliary": True, "_do_not_trace": True}

    def _pyro_post_sample(self, msg: Any) -> None:
        if (site := self._open.pop(id(msg), None)) is not None:
            site.value = msg["value"]


class Scored(Messenger):
    """Score a part's model, unheard, at the values that its guide drew.

    Latent sites that the guide does not draw come from their prior and drop out.

    Args:
        names: the part's names.
        values: what the guide drew, by the part's names.
        visible: the part's visible site.
    """

    def __init__(self, names: Names, values: Mapping[str, Site], visible: str) -> None:
        super().__init__()
        self.names, self.values, self.visible = names, values, visible
        self.total: Tensor | float = 0.0
        self.met: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate(msg):
            return
        msg["stop"] = True
        site = self.names.read(msg)
        self.met.add(site.name)
        if site.deterministic:
            return
        drawn = self.values.get(site.name)
        if drawn is not None and not site.observed:
            msg["value"], msg["done"] = drawn.value, True
        elif not site.observed:
            return
        self.total = self.total + self.names.per_datum(site, site.log_prob(msg["value"]))


class Inside(Messenger):
    """Run a part's model within the mixture's.

    1. The hidden site that all parts share has the value given, and does not speak.
    2. The visible site is kept for the mixture and does not speak either.
    3. Every other site has the part's number before its name and the part's mask.

    Args:
        names: the part's names.
        visible: the part's visible site.
        shared: its shared hidden site and that site's value, if there is one.
        mask: where the part is the component; ``None`` allows no other latent site.
        alone: whether the component is enumerated without a guide, so that a mask would leave
            other latent sites without a density.
    """

    def __init__(
        self,
        names: Names,
        visible: str,
        shared: tuple[str, Tensor] | None = None,
        *,
        mask: Tensor | None = None,
        alone: bool = False,
    ) -> None:
        super().__init__()
        self.names, self.visible, self.shared = names, visible, shared
        self.mask, self.alone = mask, alone
        self.site: Site | None = None
        self._masked: set[int] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate(msg):
            return
        site = self.names.read(msg)
        if self.shared is not None and site.name == self.shared[0]:
            msg["value"], msg["done"], msg["stop"] = self.shared[1], True, True
            return
        if site.name == self.visible:
            if site.deterministic:
                raise ValueError(
                    f"Mixture: '{self.visible}' of part {self.names.index} is deterministic "
                    "(obs_mask makes such sites); observe the whole site with obs=x."
                )
            self.site = site
            msg["stop"] = True
            return
        msg["name"], msg["cond_indep_stack"] = self.names.site(site.name), site.frames
        if site.deterministic:
            return
        if self.mask is None:
            raise RuntimeError(
                f"Mixture: the marginal program of part {self.names.index} still has the latent "
                f"site '{site.name}'; run mixture.model."
            )
        if self.alone and not site.observed:
            raise RuntimeError(
                f"Mixture: the component is enumerated in the model alone, which has the latent "
                f"site '{msg['name']}' of one part; draw both in the guide, or run the `marginal` "
                "program where there is one."
            )
        msg["mask"] = self.mask if site.mask is None else self.mask & site.mask
        self._masked.add(id(msg))

    def _pyro_post_sample(self, msg: Any) -> None:
        if id(msg) in self._masked:
            self._masked.discard(id(msg))
            if msg["infer"].get("_enumerate_dim") is not None:
                raise RuntimeError(
                    f"Mixture: '{msg['name']}' is enumerated, and a masked site would count once "
                    "for each of its values; draw it in the part's guide."
                )
