"""The demo: boost two chains on images of digits and compare them with single models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from pyroboost.compose import Cascade
from pyroboost.contexts import forked_rng
from pyroboost.data import digits, mnist
from pyroboost.evaluation import Decomposition, decompose, log_likelihood
from pyroboost.experiments import parts, record
from pyroboost.experiments.demo_pages import GREETING, closing, comparison, draw, write_arviz
from pyroboost.experiments.demo_sizes import SIZES, Sizes
from pyroboost.experiments.parts import Images, Training
from pyroboost.experiments.runner import Run, Scale
from pyroboost.infer.greedy import Boosted, StageReport
from pyroboost.likelihood import Likelihood
from pyroboost.metamodel import MetaModel
from pyroboost.models import GMM, RBM, VAE

__all__ = ["Judged", "demo"]

CHAINS = {"RBM-RBM-VAE-GMM": "RRVG", "VAE-GMM": "VG"}
SINGLE = {"single RBM": "R", "single VAE": "V"}


@dataclass(frozen=True)
class Judged:
    """A trained model and what test data say of it.

    Args:
        name: what it is called.
        model: the model.
        likelihood: of the test images.
        seconds: how long it was trained.
        terms: the terms of the bound on test data.
        validation: its bound on the held-out data, by which the best chain is chosen.
    """

    name: str
    model: Cascade
    likelihood: Likelihood
    seconds: float
    terms: Decomposition
    validation: float

    def unreliable(self) -> float | None:
        """Return the share of images with Pareto k above 0.7; ``None`` where nothing is weighed."""
        k = self.likelihood.pareto_k
        return None if k is None else float((k > 0.7).double().mean())


def _stage(kind: str, below: MetaModel | None, found: Images, sizes: Sizes) -> MetaModel:
    dim = found.train.shape[1]
    if kind == "G":
        return GMM(sizes.components, sizes.latent, covariance="full")
    if kind == "V":
        bits = dim if below is None else math.prod(below.hidden_shape or ())
        return VAE(bits, sizes.latent, units=sizes.units)
    if isinstance(below, RBM):
        return RBM.transposed(below)
    bottom = RBM(dim, sizes.hidden)
    bottom.init_visible_bias(found.train)
    return bottom


def _boost(
    run: Run, name: str, kinds: str, found: Images, sizes: Sizes, settings: dict[str, Training]
) -> Boosted:
    """Train a chain from the bottom up; an RBM above an RBM starts from the one below."""
    stages: list[MetaModel] = []
    reports: list[StageReport] = []
    seed = run.seeds[0]
    for index, kind in enumerate(kinds):
        below = stages[-1] if stages else None
        new = parts.seeded(seed + index, partial(_stage, kind, below, found, sizes))
        # Above 20 units log Z is estimated, and its noise would choose the weights.
        held_out = not isinstance(new, RBM) or min(new.num_visible, new.num_hidden) <= 20
        boosted = parts.train(
            run,
            Cascade(*stages, new),
            replace(found, train=found.train.repeat(sizes.draws, 1)) if kind == "G" else found,
            settings[kind],
            seed=seed,
            folder=name,
            start=index,
            held_out=held_out,
        )
        stages.append(new)
        reports.extend(boosted.stages)
    return Boosted(boosted.cascade, tuple(reports))


def _judge(name: str, boosted: Boosted, found: Images, sizes: Sizes, seed: int) -> Judged:
    test = found.test[: sizes.test_images]
    with forked_rng(seed):
        likelihood = log_likelihood(boosted.cascade, test, num_samples=sizes.samples)
        terms = decompose(boosted.cascade, test, num_samples=10, num_importance=10)
        held_out = decompose(boosted.cascade, found.validation, num_samples=5, num_importance=1)
    seconds = sum(stage.seconds for stage in boosted.stages)
    return Judged(name, boosted.cascade, likelihood, seconds, terms, held_out.elbo)


def demo(
    *,
    data: Literal["digits", "mnist"] = "digits",
    out: Path = Path("pyroboost-demo"),
    seed: int = 0,
    data_folder: Path | None = None,
    smoke: bool = False,
    quiet: bool = False,
) -> Path:
    """Boost two chains, compare them with single models, and write pictures and draws.

    Args:
        data: ``"digits"``, scikit-learn's 8 x 8 images, or ``"mnist"``.
        out: folder for ``samples.png``, ``bound.png``, ``khat.png``, ``inference.nc`` and
            ``result.json``.
        seed: of everything random.
        data_folder: where MNIST lies.
        smoke: take seconds; the numbers are then of no use.
        quiet: print the tables only.

    Returns:
        The file of the result.
    """
    began = time.perf_counter()
    tell: Callable[[str], None] = (lambda line: None) if quiet else partial(print, flush=True)
    scale: Scale = "smoke" if smoke else "cpu"
    run = Run(scale, (seed,), out, f"demo.{data}.{scale}", progress=False if quiet else None)
    out.mkdir(parents=True, exist_ok=True)
    resumed = run.checkpoints().exists()
    sizes = SIZES["smoke" if smoke else data]
    loaded = digits() if data == "digits" else mnist(validation=5_000, folder=data_folder)
    found = parts.as_images(loaded, "bits: grey level above one half")
    tell(GREETING.format(data=found.words))
    judged = []
    for name, kinds in (CHAINS | SINGLE).items():
        vae = sizes.bottom_vae if kinds[0] == "V" else sizes.vae
        own = {"R": sizes.rbm, "V": vae, "G": vae}
        if name in SINGLE:
            own = {"R": sizes.single_rbm, "V": sizes.single_vae}
        tell(f"training {name} ...")
        boosted = _boost(run, name, kinds, found, sizes, own)
        judged.append(_judge(name, boosted, found, sizes, seed))
        if name in CHAINS:
            print(f"\n{name}: what each stage added, in nats per image\n{boosted.table()}\n")
    print(f"{comparison(judged)}\n")
    best = max((j for j in judged if j.name in CHAINS), key=lambda j: j.validation)
    tell("drawing pictures and writing ArviZ data ...")
    _files(out, judged, best, found, sizes, seed)
    seconds = time.perf_counter() - began
    path = _write(out, judged, best, found, sizes, seed, data, seconds, resumed)
    run.forget()
    tell(closing(best.name, out, seconds))
    return path


def _files(
    out: Path, judged: list[Judged], best: Judged, found: Images, sizes: Sizes, seed: int
) -> None:
    pictures: dict[str, Tensor] = {"test images": found.test[:64]}
    for one in judged:
        pictures[one.name] = parts.mean_images(one.model, 64, seed=seed)
    draw(out, judged, best, pictures, found.shape, chains=tuple(CHAINS))
    with forked_rng(seed):
        write_arviz(best.model, found.test[:50], out / "inference.nc", num_samples=sizes.samples)


def _write(
    out: Path,
    judged: list[Judged],
    best: Judged,
    found: Images,
    sizes: Sizes,
    seed: int,
    data: str,
    seconds: float,
    resumed: bool,
) -> Path:
    rows = []
    for one in judged:
        ll = one.likelihood
        rows.append(
            record.measured(
                one.name,
                "log-likelihood, test",
                ll.mean,
                std_error=ll.standard_error,
                kind=ll.kind,
            )
        )
        rows += [
            record.measured(
                one.name,
                f"L_{k}, test",
                term.value,
                std_error=term.std_error,
                kind=term.kind,
            )
            for k, term in enumerate(one.terms.terms, 1)
        ]
        rows.append(
            record.measured(
                one.name,
                "training time",
                one.seconds,
                std_error=None,
                kind="measure",
                unit="seconds",
            )
        )
    path = out / "result.json"
    record.write(
        {
            "format": record.FORMAT,
            "name": f"demo.{data}",
            "title": "two boosted chains against single models",
            "reference": "demo",
            "scale": "smoke" if sizes is SIZES["smoke"] else "cpu",
            "date": record.today(),
            "data": found.words,
            "seeds": [seed],
            "settings": asdict(sizes),
            "assumed": [],
            **record.environment(),
            "seconds": round(seconds, 1),
            "resumed": resumed,
            "rows": rows,
            "shown": ["log-likelihood, test", "training time"],
            "claims": [],
            "notes": [f"best chain on held-out images: {best.name}"],
            "figures": ["samples.png", "bound.png", "khat.png"],
        },
        path,
    )
    return path
