"""What joins the stages of a chain: the handlers at each joint and the marks that they leave."""

from __future__ import annotations

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


@register_kl(Distribution, Chained)
@register_kl(dist.MaskedDistribution, Chained)
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
    """Let the plates of a stage follow those of the bottom stage, which alone subsamples.

    1. A plate that the bottom stage has too takes all the rows that the bottom stage chose, keeps
       its scale, and does not speak to handlers outside.
    2. Any other plate may not subsample.
    """

    def __init__(self, shared: frozenset[str], stage: str) -> None:
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
    """Refuse a value that is drawn once for each value of an enumerated site of its own stage.

    When only the model is enumerated (NUTS), the site below takes a copy for each value of the
    discrete site above it, and the density is not that of the model.
    """

    def __init__(self, visible: str, stage: str) -> None:
        super().__init__()
        self.visible, self.stage = visible, stage
        self._dims: dict[str, int] = {}

    def __enter__(self) -> Any:
        self._dims = {}
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        dim = msg["infer"].get("_enumerate_dim")
        if msg["name"] != self.visible:
            if dim is not None:
                self._dims[msg["name"]] = dim
            return
        batch = msg["value"].shape[: msg["value"].dim() - msg["fn"].event_dim]
        for site, enumerated in self._dims.items():
            if not msg["is_observed"] and -enumerated <= len(batch) and batch[enumerated] > 1:
                raise RuntimeError(
                    f"Cascade: '{self.visible}' would take one copy for each value of the "
                    f"enumerated site '{site}' of {self.stage}; sum that site out by running "
                    "`cascade.marginal` instead of `cascade.model`."
                )
