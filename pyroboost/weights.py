"""Importance weights per datum, in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor, nn

from pyroboost.contexts import forked_rng, service
from pyroboost.handlers import is_plate
from pyroboost.metamodel import MetaModel, datum_log_prob
from pyroboost.traces import data_plates

__all__ = ["Draw", "draw", "log_weights", "row_blocks", "take_rows"]

_PROBE_ROWS = 32


class Draw(NamedTuple):
    r"""One draw of the hidden variables per datum and what it scores.

    Args:
        hidden: $h \sim q(h \mid x)$; of an energy, which hides nothing, the data.  # (N, ...)
        log_weight: $\log m(x, h) - \log q(h \mid x)$, private sites included.  # (N,)
        log_prior: $\log m(h)$.  # (N,)
    """

    hidden: Tensor
    log_weight: Tensor
    log_prior: Tensor


def _random_sites(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not is_plate(site)
        and not site["infer"].get("_deterministic")
    }


def draw(pair: MetaModel, x: Tensor, *args: Any) -> Draw:
    r"""Draw the hidden variables once per datum and weigh them.

    $$\log w = \log m(x, h) - \log q(h \mid x)$$

    Latent sites of the model that the guide does not draw come from their prior and drop out of
    the weight.

    Args:
        pair: a meta-model.
        x: data.  # (N, ...)
        *args: further arguments of the pair.

    Returns:
        The draw with log weights and log priors in nats, without scales or annealing.

    Raises:
        ValueError: a site has no density per datum, or the guide draws what the model lacks.
    """
    own = pair.own_draw(x, *args)
    if own is not None:
        return own
    with service(pair):
        guide = poutine.trace(pair.guide).get_trace(x, *args)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x, *args)
        return _weigh(pair, model, guide)


def _weigh(pair: MetaModel, model: poutine.Trace, guide: poutine.Trace) -> Draw:
    inferred, scored = _random_sites(guide), _random_sites(model)
    missing = [
        name
        for name, site in inferred.items()
        if not (name in scored or site["is_observed"] or site["infer"].get("is_auxiliary"))
    ]
    if missing:
        raise ValueError(
            f"log weights of {type(pair).__name__}: the guide draws '{missing[0]}', which the "
            "model does not have; remove it or add it to the model."
        )
    wanted = {n for n, s in scored.items() if s["is_observed"] or n in inferred}
    model.compute_log_prob(lambda name, _: name in wanted)
    guide.compute_log_prob(lambda name, _: name in inferred)
    hidden = scored[pair.hidden]
    count = len(hidden["value"])
    plates = data_plates(hidden, count)
    log_weight = sum(datum_log_prob(scored[name], count, plates) for name in sorted(wanted))
    for site in inferred.values():
        log_weight = log_weight - datum_log_prob(site, count, plates)
    return Draw(hidden["value"], torch.as_tensor(log_weight), datum_log_prob(hidden, count))


def take_rows(values: Sequence[Any], rows: slice, num_data: int, copies: int = 1) -> list[Any]:
    """Take rows of the tensors that have one row per datum, repeated; leave the rest as it is."""
    taken = []
    for value in values:
        if isinstance(value, Tensor) and value.dim() and len(value) == num_data:
            part = value[rows]
            value = part if copies == 1 else part.repeat(copies, *[1] * (part.dim() - 1))
        taken.append(value)
    return taken


def _bytes_per_row(pair: MetaModel, run: Callable[[int], None]) -> float:
    """Measure what one row of data takes: all outputs of all layers, and as much again."""
    total = 0

    def count(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output.numel() * output.element_size()

    hooks = [m.register_forward_hook(count) for m in pair.modules() if not list(m.children())]
    try:
        with forked_rng():
            run(_PROBE_ROWS)
    finally:
        for hook in hooks:
            hook.remove()
    return 2.0 * total / _PROBE_ROWS


def row_blocks(
    pair: MetaModel, x: Tensor, args: Sequence[Any], copies: int, memory: float
) -> Iterator[tuple[slice, int]]:
    """Yield blocks of data and, for each, numbers of copies that fit in memory (in MiB)."""
    num_data = len(x)

    def run(rows: int) -> None:
        block = slice(0, min(rows, num_data))
        repeats = max(1, rows // max(1, min(rows, num_data)))
        inputs = take_rows((x, *args), block, num_data, repeats)
        draw(pair, *inputs)

    per_row = _bytes_per_row(pair, run) + 4.0 * (x[0].numel() + 8) * 4
    limit = max(1, int(memory * 2**20 / per_row))
    size = min(num_data, limit)
    for start in range(0, num_data, size):
        rows = slice(start, min(start + size, num_data))
        width = rows.stop - rows.start
        left = copies
        while left:
            some = min(left, max(1, limit // width))
            yield rows, some
            left -= some


def log_weights(
    pair: MetaModel,
    x: Tensor,
    *args: Any,
    num_samples: int = 1,
    memory: float = 256.0,
    vectorized: bool = True,
) -> Tensor:
    r"""Return importance log weights, one per sample and datum, in eval mode without gradients.

    $$\log w_{sn} = \log m(x_n, h_{sn}) - \log q(h_{sn} \mid x_n), \quad h_{sn} \sim q(h \mid x_n)$$

    Each datum keeps its own weights: averages over samples come before sums over data.

    Args:
        pair: a meta-model.
        x: data.  # (N, ...)
        *args: further arguments; tensors with N rows are split with the data.
        num_samples: samples per datum S.
        memory: bound on the working memory, in MiB.
        vectorized: whether samples are laid out as further rows of data; ``False`` runs the pair
            once per sample on all data, for pairs whose plates have a fixed size.

    Returns:
        Log weights in nats.  # (S, N)

    Raises:
        ValueError: no samples, no data, or a pair without densities per datum.

    Example:
        >>> from pyroboost.models import VAE
        >>> log_weights(VAE(6, 2, units=8), torch.zeros(5, 6), num_samples=3).shape
        torch.Size([3, 5])
    """
    if num_samples < 1 or len(x) < 1:
        raise ValueError(
            f"log_weights: {num_samples} samples of {len(x)} data; ask for at least one of each."
        )
    if not vectorized:
        return torch.stack([draw(pair, x, *args).log_weight for _ in range(num_samples)])
    columns: dict[int, list[Tensor]] = {}
    for rows, copies in row_blocks(pair, x, args, num_samples, memory):
        drawn = draw(pair, *take_rows((x, *args), rows, len(x), copies))
        width = rows.stop - rows.start
        if len(drawn.log_weight) != copies * width:
            raise ValueError(
                f"log_weights: {type(pair).__name__} gave {len(drawn.log_weight)} weights for "
                f"{copies * width} rows; its plates have a fixed size, so pass vectorized=False."
            )
        columns.setdefault(rows.start, []).append(drawn.log_weight.reshape(copies, width))
    return torch.cat([torch.cat(parts) for _, parts in sorted(columns.items())], dim=1)
