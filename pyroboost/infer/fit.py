"""The one training loop: every model, stage and round in this library is fitted by :func:`fit`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyroboost.infer.batches import Batches
from pyroboost.infer.loop import Loop
from pyroboost.infer.rng import isolated_rng
from pyroboost.infer.settings import Settings
from pyroboost.metamodel import MetaModel

__all__ = ["Fit", "fit", "fit_device"]


@dataclass(frozen=True)
class Fit:
    """What a fit did; the weights are in the pair.

    Args:
        history: one plain dict an epoch: ``epoch`` (from 1), ``loss`` (mean training loss per
            datum, in nats, at the running weights and beta), ``validation_bound`` (mean ELBO per
            held-out datum, in nats, or ``None``), ``beta``, ``lr``, ``batches``, ``num_data``,
            ``skipped`` (batches left out until then), ``seconds``.
        best_epoch: the epoch whose weights the pair has, where held-out data chose it.
        best_bound: its held-out bound per datum, in nats.
        epochs_run: epochs done, those before a resume included.
        stopped: why it ended.
        seconds: time of all epochs, evaluation included.
    """

    history: list[dict[str, Any]] = field(repr=False)
    best_epoch: int | None
    best_bound: float | None
    epochs_run: int
    stopped: str
    seconds: float

    def __repr__(self) -> str:
        loss = f", loss {self.history[-1]['loss']:.4g}" if self.history else ""
        best = ""
        if self.best_bound is not None:
            best = f", best held-out bound {self.best_bound:.4g} at epoch {self.best_epoch}"
        return f"Fit({self.epochs_run} epochs{loss}{best}, {self.seconds:.1f} s; {self.stopped})"


def fit_device(pair: MetaModel, device: str | torch.device | None) -> torch.device:
    """Return where a fit takes place: where it is told to, else where the pair is."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device is not None:
        return torch.device(device)
    first = next(pair.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _adam(parameters: list[torch.Tensor], *, lr: float) -> torch.optim.Adam:
    """Return Adam in one kernel where there is one: a tenth of the step of a 784-500-500-20 VAE."""
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.Adam(parameters, lr=lr, fused=fused)


def _check(settings: Settings, train: Batches, validation: Any) -> None:
    for name in ("epochs", "max_skipped", "patience", "checkpoint_every"):
        least = int(name in ("patience", "checkpoint_every"))
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"fit: {name} is {value}; take {least} or more.")
    if settings.clip_norm is not None and not settings.clip_norm > 0:
        raise ValueError(f"fit: clip_norm is {settings.clip_norm}; take a positive norm.")
    if settings.patience is not None and validation is None:
        raise ValueError("fit: patience counts epochs of the held-out bound; pass validation data.")
    if settings.checkpoint_every is None:
        return
    if settings.checkpoint is None:
        raise ValueError("fit: checkpoint_every needs a file; pass checkpoint too.")
    if not train.resumes_within_epoch:
        raise ValueError(
            "fit: data of a custom iterable are resumed at the start of an epoch, where a "
            "checkpoint is always written; leave checkpoint_every out."
        )


def fit(
    pair: MetaModel | tuple[Callable[..., Any], Callable[..., Any]],
    data: Any,
    *,
    epochs: int,
    validation: Any = None,
    transform: Callable[..., tuple[Any, ...]] | None = None,
    weights: torch.Tensor | None = None,
    validation_weights: torch.Tensor | None = None,
    batch_size: int = 100,
    lr: float | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    loss: Any = None,
    annealing: float | Callable[[float], float] | None = None,
    clip_norm: float | None = None,
    max_skipped: int = 0,
    patience: int | None = None,
    num_validation_particles: int = 1,
    callbacks: Iterable[Any] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    device: str | torch.device | None = None,
    seed: int | None = None,
    progress: bool | None = None,
) -> Fit:
    r"""Train a model/guide pair by stochastic gradients and keep its best weights.

    Each step moves the pair's trainable tensors against the gradient of the loss per datum,

    $$ -\tfrac1B \sum_b E_q[\log m(x_b \mid h) + \beta (\log m(h) - \log q(h \mid x_b))], $$

    unless the pair or the caller has a loss of its own. Only those tensors and the buffers of
    modules in training mode move; validation switches, dtype, the modes of all modules and
    parameters of other pairs are left as they are.

    **Held-out data.** After each epoch the pair is brought up to date (``pair.refresh()``) and
    its mean ELBO per held-out datum (or its own importance-weighted bound, where it is trained by
    one) is taken in eval mode, at $\beta = 1$ and with the same draws every time. The best weights
    are back in place at the end. Best weights and patience count from the epoch in which annealing
    has reached 1; if it never does, the last weights stay.

    **Checkpoints.** A run that is killed at any moment and started again by the same call ends
    bit-equal to one that was not killed. A tensor or a ``DataLoader`` (of a map-style dataset
    whose random transforms use the global generators) is taken up at the last batch written, any
    other iterable at the last epoch. More ``epochs`` than before are allowed; any other setting
    or other data are refused. Callbacks are not part of the checkpoint.

    **Trouble.** A loss that is not finite ends the fit with :class:`NonFiniteLoss`, which names
    epoch, batch and site; the best weights, or else those of the last complete epoch, are put
    back. Ctrl-C is held until the step is done, then the checkpoint is written and
    ``KeyboardInterrupt`` raised, with the weights as they stand.

    Args:
        pair: a meta-model, or a tuple of a model and a guide.
        data: a tensor  # (N, ...); a tuple of tensors of one N, passed as ``model(x, y, ...)``; a
            ``DataLoader``; or any iterable of batches that starts a new epoch each time it is
            iterated (stochastic binarisation draws new bits there). Tensors are shuffled each
            epoch. An iterable is opened once beforehand to see one batch.
        epochs: passes over the data, those before a resume included.
        validation: held-out data in one of the same forms; never shuffled.
        transform: a function from a batch to the batch that the pair is trained on, drawn afresh
            each epoch, for training and held-out data alike: a stage of a cascade is trained on
            what the stages below infer from the data.
        weights: a weight of 0 or more for each datum, for data given as tensors; only their
            ratios count. Rows of weight 0 are left out, and the loss is the weighted mean. A
            loss with a keyword ``weights`` is given those of its batch; else every site in the
            plate of the data is scaled by them.  # (N,)
        validation_weights: the same for ``validation``.  # (M,)
        batch_size: rows of a batch, for tensors.
        lr: learning rate of Adam, 1e-3 where left out; not together with ``optimizer``.
        optimizer: a function from the list of tensors to a torch optimiser, such as
            ``functools.partial(torch.optim.SGD, lr=0.1)``.
        scheduler: a function from the optimiser to a schedule of its learning rate, stepped once
            an epoch; ``ReduceLROnPlateau`` is given the held-out bound (else the training loss)
            in the direction of its mode.
        loss: anything with ``differentiable_loss(model, guide, *batch)``, or such a function
            itself, summed over the batch in nats; ``None`` takes ``pair.objective()``, else
            ``Trace_ELBO``, or ``StratifiedELBO`` for a guide with one boosted mixture of which
            several components have weight.
        annealing: epochs of a linear warm-up of $\beta$ from 0 to 1, or a function from the
            epochs done (a fraction; whole epochs for iterables without a length) to $\beta > 0$.
        clip_norm: largest norm of the gradient per datum.
        max_skipped: how many batches may be left out because their loss or its gradient is not
            finite, a distribution refused a value that was drawn, or a matrix had no
            decomposition. Where there may be some, a held-out bound that fails so is minus
            infinity.
        patience: epochs without a better held-out bound after which to stop.
        num_validation_particles: draws per held-out datum.
        callbacks: :class:`Callback` objects, or functions of the state run after each epoch.
        checkpoint: file to write and to resume from, plain data for
            ``torch.load(weights_only=True)``, replaced in one step at each epoch's end.
        checkpoint_every: write it after every so many batches as well.
        resume: go on from ``checkpoint`` if the file exists; ``False`` overwrites it.
        device: where to move the pair and its batches; ``"auto"`` takes CUDA where there is one;
            ``None`` leaves the pair where it is.
        seed: seed of this fit's own random stream; the global generators have their states back
            afterwards. ``None`` draws from the global generators.
        progress: show a bar; ``None`` shows it in terminals and notebooks.

    Returns:
        History, best epoch and the reason for stopping.

    Raises:
        ValueError: data or settings are of no use; the sentence says which.
        NonFiniteLoss: the loss, the gradient or the held-out bound is not finite, more often than
            `max_skipped` allows.
        CheckpointError: the file belongs to another fit or is unreadable.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> pair = MetaModel(model, guide, visible="x", hidden="z")
        >>> result = fit(pair, torch.ones(200), epochs=3, batch_size=50, seed=0)
        >>> result.epochs_run, [row["batches"] for row in result.history]
        (3, [4, 4, 4])

    Reference:
        Bowman et al., Generating sentences from a continuous space (2016), section 3.1: annealing.
    """
    if lr is not None and optimizer is not None:
        raise ValueError("fit: lr and optimizer are both given; put lr into the optimizer.")
    if isinstance(pair, tuple):
        # A fit reads neither name; encode and decode would.
        pair = MetaModel(*pair, visible="x", hidden="z")
    where = fit_device(pair, device)
    if device is not None:
        pair.to(where)
    train = Batches(data, batch_size, where, shuffle=True, transform=transform, weights=weights)
    held_out = None
    if validation is not None:
        held_out = Batches(
            validation,
            batch_size,
            where,
            shuffle=False,
            name="validation",
            transform=transform,
            weights=validation_weights,
        )
    elif validation_weights is not None:
        raise ValueError("fit: validation_weights came without validation data; pass both.")
    settings = Settings(
        epochs=epochs,
        optimizer=optimizer or partial(_adam, lr=1e-3 if lr is None else lr),
        scheduler=scheduler,
        loss=loss,
        annealing=annealing,
        clip_norm=clip_norm,
        max_skipped=max_skipped,
        patience=patience,
        callbacks=tuple(callbacks),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        checkpoint_every=checkpoint_every,
        resume=resume,
        seed=seed,
        progress=progress,
        num_validation_particles=num_validation_particles,
    )
    _check(settings, train, validation)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if seed is not None:
            stack.enter_context(isolated_rng(where, seed))
        loop = Loop(pair, train, held_out, settings, where)
        loop.run()
    c = loop.counters
    reason = c.stopped or "all epochs done"
    if annealing and not c.annealed:
        reason += f", annealing ended at {loop.state.beta:.3g}"
    return Fit(
        c.history,
        c.best_epoch,
        c.best_bound,
        c.epoch,
        reason,
        sum(row["seconds"] for row in c.history),
    )
