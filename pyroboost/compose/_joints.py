"""What joins the stages of a chain: the handlers at each joint and the marks that they leave."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, register_kl

from pyroboost.handlers import is_plate

__all__ = ["Chained", "chained", "no_copies", "shared_plates"]


class Chained(dist.MaskedDistribution):
    """The law of a value that the guide has drawn below: its parameters depend on that value.

    An analytic KL would treat the two as independent, so it is refused by name.
    """


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
    """Refuse a value that is drawn once for each value of an enumerated site above it.

    When only the model is enumerated (NUTS), the site below takes a copy for each value of the
    discrete site above it, and the density is not that of the model.

    Args:
        visible: the site that must not be copied.
        stage: how errors name the stage.
        dims: dimensions of the enumerated sites met so far, by name; all stages write into it.
    """

    def __init__(self, visible: str, stage: str, dims: dict[str, int]) -> None:
        super().__init__()
        self.visible, self.stage, self.dims = visible, stage, dims

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_plate(msg):
            return
        if msg["name"] == self.visible and not msg["is_observed"]:
            batch = msg["value"].shape[: msg["value"].dim() - msg["fn"].event_dim]
            for site, dim in self.dims.items():
                if -dim <= len(batch) and batch[dim] > 1:
                    raise RuntimeError(
                        f"Cascade: '{self.visible}' of {self.stage} would take one copy for each "
                        f"value of the enumerated site '{site}'; sum that site out by running "
                        "`cascade.marginal` instead of `cascade.model`."
                    )
        if (dim := msg["infer"].get("_enumerate_dim")) is not None:
            self.dims[f"{self.stage}: {msg['name']}"] = dim
