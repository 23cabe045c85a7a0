"""What joins the stages of a chain: the handlers at each joint and the marks that they leave."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from pyroboost.handlers import is_plate

__all__ = ["Chained", "chained", "no_copies", "shared_plates"]


class Chained(dist.MaskedDistribution):
    """The law of a value that the guide has drawn below: its parameters depend on that value.

    An analytic KL would treat the two as independent, so it is refused by name.
    """

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """The support in the form in which NUTS can transform it."""
        support = super().support
        if isinstance(support, constraints.MixtureSameFamilyConstraint):
            return support.base_constraint
        return support


@register_kl(dist.Delta, Chained)  # type: ignore[no-untyped-call]
@register_kl(Distribution, Chained)  # type: ignore[no-untyped-call]
@register_kl(dist.MaskedDistribution, Chained)  # type: ignore[no-untyped-call]
def _refuse_kl(p: Distribution, q: Distribution) -> Tensor:
    raise RuntimeError(
        "TraceMeanField_ELBO on a Cascade: the prior of an inner hidden site depends on that "
        "site's own sample, so an analytic KL is wrong; use Trace_ELBO."
    )


class chained(Messenger):
    """Mark the visible site of a stage whose data come from the guide of the stage below."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name and not is_plate(msg):
            msg["fn"] = Chained(msg["fn"], True)


class shared_plates(Messenger):
    """Let the plates of a stage follow those of the stages below, whose bottom alone subsamples.

    1. A shared plate takes all the rows that the bottom stage chose, keeps its scale, and does
       not speak to handlers outside.
    2. Any other plate may not subsample.
    """

    def __init__(self, shared: Collection[str], stage: str) -> None:
        super().__init__()
        self.shared, self.stage = shared, stage

    def _pyro_sample(self, msg: Any) -> None:
        if not is_plate(msg):
            return
        size, subsample = msg["fn"].size, msg["fn"].subsample_size
        if msg["name"] in self.shared:
            if msg["value"] is None:
                msg["value"] = torch.arange(size if subsample is None else subsample)
            msg["done"] = msg["stop"] = True
        elif msg["value"] is None and subsample is not None and subsample < size:
            raise ValueError(
                f"Cascade: {self.stage} subsamples its own plate '{msg['name']}', which the bottom "
                "stage does not have; subsample in the bottom stage only."
            )


class no_copies(Messenger):
    """Refuse what enumeration makes of a chain that is not its density.

    1. When only the model is enumerated (NUTS), a site below takes a copy for each value of the
       discrete site above it.
    2. When the guide enumerates a site and samples one above it, the latter has copies, on which
       the law of the enumerated site depends; Pyro cannot score that.

    Args:
        visible: the site that must not be copied.
        stage: how errors name the stage.
        dims: dimensions of the enumerated sites met so far, by name; all stages write into it.
    """

    def __init__(self, visible: str, stage: str, dims: dict[str, int]) -> None:
        super().__init__()
        self.visible, self.stage, self.dims = visible, stage, dims
        self._msg: Any = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.visible and not is_plate(msg):
            self._msg = msg  # on its way back it has the cascade's name

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_plate(msg):
            return
        own = msg["infer"].get("_enumerate_dim")
        if msg is self._msg and not msg["is_observed"]:
            self._check(msg, own)
        if own is not None:
            self.dims[msg["name"]] = own

    def _check(self, msg: Any, own: int | None) -> None:
        batch = msg["value"].shape[: msg["value"].dim() - msg["fn"].event_dim]
        for site, dim in self.dims.items():
            if -dim <= len(batch) and batch[dim] > 1:
                raise RuntimeError(
                    f"Cascade: '{msg['name']}' would take one copy for each value of the "
                    f"enumerated site '{site}' above it; sum that site out by running "
                    "`cascade.marginal` instead of `cascade.model`."
                )
        law = msg["fn"].batch_shape
        if own is not None and -own <= len(law) and law[own] > 1:
            raise RuntimeError(
                f"Cascade: '{msg['name']}' is enumerated and the hidden site of {self.stage} above "
                "it is sampled once for each of its values; enumerate both or neither."
            )
