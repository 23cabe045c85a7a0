"""What boosting works on: the pair, its data, its components, and tables of draws from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyroboost.infer._boosting_pair import Closed, find_components, layout
from pyroboost.infer._boosting_report import BoostedRound
from pyroboost.infer._boosting_settings import BoostSettings
from pyroboost.infer._boosting_state import read_seed
from pyroboost.infer._mixture_draws import tabulate
from pyroboost.infer._mixture_table import Table
from pyroboost.infer._round_law import Stage
from pyroboost.infer.batches import Batches
from pyroboost.infer.fit import fit_device
from pyroboost.infer.rng import isolated_rng
from pyroboost.metamodel import MetaModel

__all__ = ["Bench"]


class Bench:
    """A pair that is boosted, what it is trained on and what it is judged by."""

    def __init__(
        self,
        pair: Any,
        data: Any,
        validation: Any,
        kwargs: Mapping[str, Any],
        options: BoostSettings,
    ) -> None:
        self.options = options
        self.digest: list[Any] | None = None  # of the data, taken where it is needed
        self.seed = read_seed(options)
        if isinstance(pair, tuple) and len(pair) == 2 and all(map(callable, pair)):
            pair = MetaModel(*pair, visible="x", hidden="z")
        if not isinstance(pair, MetaModel):
            raise TypeError(
                f"boost: got {type(pair).__name__} for a pair; pass a meta-model, or a tuple of a "
                "model and a guide, such as (model, AutoBoostedFlow(model))."
            )
        self.inner: MetaModel = pair
        self.device = fit_device(pair, options.fit.get("device"))
        pair.to(self.device)
        self._place(data, validation, kwargs)
        self._open()
        if not 0 <= options.start <= len(self.components):
            raise ValueError(
                f"boost: start={options.start}, and there are {len(self.components)} components; "
                "count from 0."
            )

    def _place(self, data: Any, validation: Any, kwargs: Mapping[str, Any]) -> None:
        """Take data as the model's arguments or as rows."""
        options, pair = self.options, self.inner
        self.validation = validation
        self.held_out = validation is not None
        if not options.whole:
            if kwargs:
                raise ValueError("boost: kwargs are for steps=; put them into the model.")
            self.pair, self.data, self.batch_size = pair, data, options.batch_size
            return
        if self.held_out or options.fit.get("patience") is not None:
            raise ValueError(
                "boost: with steps= all data are used in every step and judged by fresh draws; "
                "leave validation and patience out, or give epochs=."
            )
        given = data if isinstance(data, tuple) else (data,)  # a list may be one argument
        args = [a.to(self.device) if isinstance(a, Tensor) else a for a in given]
        self.pair = MetaModel(
            Closed(pair.model, args, kwargs),
            Closed(pair.guide, args, kwargs),
            visible=pair.visible,
            hidden=pair.hidden,
        )
        self.own_args, self.own_kwargs = tuple(args), dict(kwargs)
        self.data, self.batch_size = torch.zeros(1, 1), 1

    def _rows(self) -> list[tuple[Tensor, ...]]:
        """Return the batches that serve the judgements, always the same."""
        options = self.options
        if options.whole:
            return [(self.data.to(self.device),)]
        source = self._chosen(self.validation if self.held_out else self.data)
        transform = options.fit.get("transform")
        batches = Batches(source, self.batch_size, self.device, shuffle=False, transform=transform)
        kept, count = [], 0
        with isolated_rng(self.device, self.stream("rows")):
            for batch in batches.epoch():
                kept.append(tuple(part[: options.evaluate_on - count] for part in batch))
                count += len(kept[-1][0])
                if count >= options.evaluate_on:
                    break
        return kept

    def _chosen(self, source: Any) -> Any:
        """Return some rows of tensors, from all over: data may be sorted."""
        parts = (source,) if isinstance(source, Tensor) else source
        tensors = isinstance(parts, tuple | list) and all(isinstance(p, Tensor) for p in parts)
        if not tensors or len(parts[0]) <= self.options.evaluate_on:
            return source
        noise = torch.Generator().manual_seed(self.stream("rows"))
        kept = torch.randperm(len(parts[0]), generator=noise)[: self.options.evaluate_on].sort()[0]
        chosen = tuple(part[kept.to(part.device)] for part in parts)
        return chosen[0] if isinstance(source, Tensor) else chosen

    def _open(self) -> None:
        """Run the pair once, so that lazy guides are set up, and look for the components."""
        self.rows = self._rows()
        # A model that breaks is for the fit to name.
        with isolated_rng(self.device, self.stream("start")), pyro.validation_enabled(False):
            found = self.pair.named_trainable(*self.rows[0])
        self.components = find_components(self.pair.guide)
        self.programs = layout(self.pair, self.rows[0], self.device, self.stream("layout"))
        flows = {id(p) for p in self.components.parameters()}
        self.networks = any(p.requires_grad and id(p) not in flows for p in found.values())
        guide = {id(p) for p in self.pair.guide.parameters()}
        model = any(id(p) not in guide for p in found.values())
        blend = self.options.blend
        self.blend = (0.5 if model else 0.0) if blend is None else blend
        self.rounds: list[BoostedRound] = []

    def stream(self, *address: Any) -> int:
        """Return the seed of one purpose."""
        text = repr((self.seed, *address)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")

    def measure(self, stage: Stage, name: str) -> dict[str, float]:
        """Measure the mixture's bound with what is trained, and without it."""
        weights, few = self.components.mixing().detach(), max(2, self.draws // 10)
        active = [j for j in range(len(weights)) if weights[j] > 0]
        table = self._table(sorted({*active, stage.component}), "track", draws=few)
        fixed = weights[list(table.components)]
        found = {"fixed_bound": table.bound(fixed).value}
        if name == "round" and stage.component not in active:
            place, share = table.components.index(stage.component), 1 / (1 + len(active))
            fixed = (1 - share) * fixed
            fixed[place] = share
        return {"mixture_bound": table.bound(fixed).value, **found}

    def _table(self, components: Sequence[int], *purpose: Any, draws: int | None = None) -> Table:
        return tabulate(
            self.programs,
            self.rows,
            components,
            draws or self.draws,
            self.stream(*purpose),
            over_data=not self.options.whole,
            device=self.device,
        )

    def _floor(self, weights: Tensor) -> float:
        """Return the least value of log G: so many nats below its own mean."""
        floor = self.options.floor
        if floor is None:
            return -math.inf
        active = [j for j in range(len(weights)) if weights[j] > 0]
        table = self._table(active, "floor", draws=max(2, self.draws // 10))
        own = weights[active].to(table.scores)
        mean = float((own[:, None] * table.mixed(own).flatten(1)).mean(1).sum())
        return mean - floor

    @property
    def draws(self) -> int:
        """Draws of each component in a table; fewer where each takes a run of its own."""
        if self.options.num_samples is not None:
            return self.options.num_samples
        if not self.options.whole:
            return 30
        return 1000 if self.programs.together else 200
