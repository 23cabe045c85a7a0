"""What EM refuses, each in one sentence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def check_data(data: Tensor, num_components: int, where: str) -> None:
    """Refuse what no mixture can be fitted to (or, with 0 components, scored by) in a sentence."""
    if not isinstance(data, Tensor):
        raise TypeError(
            f"{where}: got {type(data).__name__}; EM needs all data at once, as one tensor (N, D)."
        )
    if data.dim() != 2 or 0 in data.shape:
        raise ValueError(f"{where}: got data of shape {tuple(data.shape)}; pass (N, D).")
    if data.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{where}: got data of {data.dtype}; convert them to float32 or float64.")
    if 0 < num_components and len(data) < max(2, num_components):
        raise ValueError(
            f"{where}: got {len(data)} data for {num_components} components; "
            "pass at least two, and at least one for each component."
        )
    bad = sum([int((~rows.isfinite()).any(1).sum()) for rows in torch.split(data, 65536)])
    if bad:
        raise ValueError(
            f"{where}: {bad} of {len(data)} data hold NaN or infinity; drop or fill them first."
        )


def check_rows(
    data: Tensor, validation: Tensor | None, check: Callable[[Tensor], None], num_components: int
) -> None:
    """Refuse data that cannot be used, each in one sentence."""
    check_data(data, num_components, "GMM.fit_em")
    check(data)
    if validation is not None:
        check_data(validation, 0, "GMM.fit_em (validation)")
        check(validation)


def check_options(
    where: str,
    *,
    start: str,
    start_weight: float,
    restarts: int | None,
    max_iterations: int,
    tolerance: float,
    variance_floor: float,
) -> None:
    """Refuse options out of their range, each in one sentence."""
    if start not in ("prior", "kmeans", "current"):
        raise ValueError(f'{where}: start is {start!r}; pass "prior", "kmeans" or "current".')
    if not 0.0 < start_weight < 1.0:
        raise ValueError(f"{where}: start_weight is {start_weight}; it must be within (0, 1).")
    if not 0.0 < variance_floor < 1.0:
        raise ValueError(f"{where}: variance_floor is {variance_floor}; it must be within (0, 1).")
    if max_iterations < 0 or not tolerance >= 0.0:
        raise ValueError(
            f"{where}: got max_iterations={max_iterations} and tolerance={tolerance}; "
            "neither may be negative."
        )
    if restarts is not None and restarts < 1:
        raise ValueError(f"{where}: got {restarts} restarts; pass at least 1.")
    if start == "current" and restarts not in (None, 1):
        raise ValueError(
            f"{where}: {restarts} restarts from the one present state are all the same; "
            'leave restarts out or use start="kmeans".'
        )
