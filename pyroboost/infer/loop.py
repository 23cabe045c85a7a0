"""The steps of a fit: one batch, one epoch, one held-out evaluation, one resumed start."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import pyro
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyroboost.contexts import local_params
from pyroboost.infer import checkpoint as files
from pyroboost.infer._coupled_rows import check_rows
from pyroboost.infer.batches import Batch, Batches
from pyroboost.infer.callbacks import Bar, Callback, FitState, HeldInterrupt, as_callback
from pyroboost.infer.errors import NonFiniteLoss, find_non_finite, is_finite, is_numerical
from pyroboost.infer.held_out import held_out_bound
from pyroboost.infer.objectives import Annealing, bound_estimator, resolve_loss
from pyroboost.infer.resume import load, save
from pyroboost.infer.rng import get_rng_state, isolated_rng, set_rng_state
from pyroboost.infer.settings import Counters, Settings, training
from pyroboost.infer.stratified import StratifiedELBO
from pyroboost.infer.weighting import weighed
from pyroboost.metamodel import MetaModel

__all__ = ["Loop"]


class Loop:
    """A fit under way; see :func:`pyroboost.infer.fit`."""

    def __init__(
        self,
        pair: MetaModel,
        train: Batches,
        held_out: Batches | None,
        settings: Settings,
        device: torch.device,
    ) -> None:
        self.pair, self.train, self.held_out = pair, train, held_out
        self.settings, self.device = settings, device
        with isolated_rng(device):
            first = train.peek()
        with pyro.validation_enabled(False):  # a draw that fails is for a step to name
            found = pair.named_trainable(*first)
        self.trainable = {name: tensor for name, tensor in found.items() if tensor.requires_grad}
        if not self.trainable:
            raise ValueError(
                f"fit: {type(pair).__name__} has nothing to train; check that its parameters "
                "require gradients."
            )
        self.parameters: list[Tensor] = list(self.trainable.values())
        self.optimizer = settings.optimizer(self.parameters)
        self.scheduler = settings.scheduler(self.optimizer) if settings.scheduler else None
        self.loss = resolve_loss(pair, settings.loss)
        if settings.loss is None and isinstance(
            getattr(self.loss, "__self__", None), StratifiedELBO
        ):
            check_rows(pair, first, device, seed=0)
        self.elbo = bound_estimator(pair, settings.loss, settings.num_validation_particles)
        self.annealing = Annealing(pair, settings.annealing)
        self.counters = Counters()
        self.state = FitState(pair, self.optimizer, settings.epochs)
        self.hooks = {
            name: [
                getattr(c, name)
                for c in map(as_callback, settings.callbacks)
                if getattr(type(c), name) is not getattr(Callback, name) or name in vars(c)
            ]
            for name in ("on_start", "on_batch", "on_epoch", "on_end")
        }
        self.best: dict[str, Any] | None = None
        self.epoch_rng: dict[str, Any] = {}
        self.epoch_generators: list[Tensor] = []
        self.resumed_rng: dict[str, Any] | None = None  # random state within a resumed epoch
        self._settled = True  # whether weights, counters and random state belong together
        self.good = files.snapshot(pair)  # at the end of the last epoch
        if not load(self):
            save(self)

    # One step

    def _step(self, batch: Batch, weights: Tensor | None) -> float | None:
        """Take a step; return its loss per datum, or ``None`` where the batch is left out."""
        counters, settings = self.counters, self.settings
        count = self.train.num_batches
        part = min(1.0, (counters.batch + 1) / count) if count else 1.0
        beta = self.annealing.beta(counters.epoch + part)
        noise = torch.get_rng_state()
        skipping = counters.skipped < settings.max_skipped
        self.optimizer.zero_grad(set_to_none=True)
        norm = 0.0
        try:
            with local_params():
                own = self.loss if weights is None else weighed(self.loss, weights)
                loss = own(*self.annealing.programs(beta), *batch) / len(batch[0])
                loss.backward()  # type: ignore[no-untyped-call]
            if settings.clip_norm is not None or skipping:
                most = math.inf if settings.clip_norm is None else settings.clip_norm
                norm = float(nn.utils.clip_grad_norm_(self.parameters, most))
        except Exception as error:
            if skipping and is_numerical(error):
                return None
            self._explain(f"the loss raised {type(error).__name__}", batch, noise, error)
            raise
        if beta != 1.0:
            self.annealing.check()
        value = loss.item()
        if skipping and not (math.isfinite(value) and math.isfinite(norm)):
            return None
        if not math.isfinite(value):
            self._explain(f"the loss is {value}", batch, noise)
        if not math.isfinite(norm):
            bad = [name for name, t in self.trainable.items() if not is_finite(t.grad)]
            found = (bad[0], f"the gradient of parameter '{bad[0]}'") if bad else None
            self._fail(f"the norm of the gradient is {norm}", found)
        self.optimizer.step()
        counters.annealed |= beta >= 1.0
        self.state.beta, self.state.loss = beta, value
        return value

    def _explain(
        self,
        what: str,
        batch: Batch,
        noise: Tensor,
        error: Exception | None = None,
        held_out: int = 0,
    ) -> None:
        """Find the culprit, put the last good weights back and raise; return for other errors."""
        with isolated_rng(self.device):
            torch.set_rng_state(noise)
            try:
                found = find_non_finite(self.pair, self.trainable, batch)
            except Exception:
                found = None
        if found is None and error is not None:
            return
        self._fail(what, found, error, held_out)

    def _fail(
        self,
        what: str,
        found: tuple[str, str] | None,
        error: Exception | None = None,
        held_out: int = 0,
    ) -> NoReturn:
        c = self.counters
        kept, epoch = (self.good, c.epoch) if self.best is None else (self.best, c.best_epoch)
        files.restore(self.pair, kept)
        self._settled = False
        site, culprit = found or (None, "no site, but the loss or its gradient itself")
        place = f"batch {held_out} of the held-out data" if held_out else f"batch {c.batch + 1}"
        after = f"after epoch {epoch}" if epoch else "before the first epoch"
        raise NonFiniteLoss(
            f"fit: {what} in epoch {c.epoch + 1}, {place}, and the first that is not finite is "
            f"{culprit}; the weights as they stood {after} are back: lower the learning rate, "
            "clip the gradient, or mend that site.",
            epoch=c.epoch + 1,
            batch=held_out or c.batch + 1,
            site=site,
            held_out=bool(held_out),
        ) from error

    # One epoch

    def run(self) -> None:
        """Train until the epochs are done, patience ends or a callback asks to stop."""
        c, settings = self.counters, self.settings
        bar = Bar(settings.progress, settings.epochs, self.train.num_batches, c.epoch, c.batch)
        try:
            with training(self.pair), HeldInterrupt() as interrupt:
                self._tell("on_start")
                while c.stopped is None and c.epoch < settings.epochs:
                    self._epoch(bar, interrupt)
                self._settled = False  # the file holds the last epoch, the pair now the best one
                if self.best is not None:
                    files.restore(self.pair, self.best)
                self._tell("on_end")
        except KeyboardInterrupt:
            if self._settled:
                save(self)
            raise
        finally:
            bar.close()
            self.optimizer.zero_grad(set_to_none=True)

    def _epoch(self, bar: Bar, interrupt: HeldInterrupt) -> None:
        c, every = self.counters, self.settings.checkpoint_every
        start = time.perf_counter() - c.epoch_seconds
        for rows in self._open_epoch():
            batch, weights = self.train.split(rows)
            self._settled = False
            value = self._step(batch, weights)
            c.batch += 1
            c.skipped += value is None
            if value is not None:
                c.num_data += len(batch[0])
                c.loss_sum += value * len(batch[0])
            c.epoch_seconds = time.perf_counter() - start
            self._settled = True
            bar.batch()
            self._tell("on_batch")
            interrupt.check()
            if self.state.stop_reason is not None:
                break
            if every is not None and c.batch % every == 0:
                save(self)
        if not c.batch:
            raise ValueError(
                f"fit: the data gave no batch in epoch {c.epoch + 1}; pass an object whose "
                "__iter__ starts a new epoch each time."
            )
        self._end_epoch(bar, start)
        interrupt.check()

    def _open_epoch(self) -> Iterator[Batch]:
        """Start the epoch, or reach the batch at which it was left, with its random state."""
        resumed, self.resumed_rng = self.resumed_rng, None
        if resumed is None:
            self.epoch_rng = get_rng_state(self.device)
            self.epoch_generators = self.train.generator_states()
            return self.train.epoch()
        batches = self.train.epoch()
        for _ in range(self.counters.batch):
            next(batches, None)
        set_rng_state(resumed, self.device)
        return batches

    def _end_epoch(self, bar: Bar, start: float) -> None:
        c = self.counters
        self._settled = False
        for name, tensor in self.trainable.items():
            if not is_finite(tensor):
                c.batch -= 1
                self._fail("the gradient is not finite", (name, f"parameter '{name}'"))
        bound = self._bound()
        row = {
            "epoch": c.epoch + 1,
            "loss": c.loss_sum / c.num_data if c.num_data else math.nan,
            "validation_bound": bound,
            "beta": self.state.beta,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "batches": c.batch,
            "num_data": c.num_data,
            "skipped": c.skipped,
            "seconds": time.perf_counter() - start,
        }
        c.history.append(row)
        c.epoch, c.batch, c.num_data, c.loss_sum, c.epoch_seconds = c.epoch + 1, 0, 0, 0.0, 0.0
        self.good = files.snapshot(self.pair)
        self._judge(bound)
        self._schedule(row)
        self._settled = True
        bar.epoch(row)
        self._tell("on_epoch")
        c.stopped = self.state.stop_reason or c.stopped
        save(self)

    def _judge(self, bound: float | None) -> None:
        c, patience = self.counters, self.settings.patience
        if bound is None or not c.annealed:
            return
        if c.best_bound is None or bound > c.best_bound:
            c.best_bound, c.best_epoch, c.waited = bound, c.epoch, 0
            self.best = self.good
            return
        c.waited += 1
        if patience is not None and c.waited >= patience:
            c.stopped = f"no better held-out bound in {c.waited} epochs"

    def _schedule(self, row: dict[str, Any]) -> None:
        if not row["num_data"]:  # the optimiser took no step
            return
        if isinstance(self.scheduler, ReduceLROnPlateau):
            bound = row["validation_bound"]
            score = -row["loss"] if bound is None else bound
            if self.counters.annealed:  # a loss that annealing raises is no plateau
                self.scheduler.step(score if self.scheduler.mode == "max" else -score)
        elif self.scheduler is not None:
            self.scheduler.step()

    def _bound(self) -> float | None:
        if self.held_out is None:
            return None
        if not self.settings.max_skipped:
            return held_out_bound(self.pair, self.held_out, self.elbo, self._explain)
        try:
            return held_out_bound(self.pair, self.held_out, self.elbo, _refuse)
        except Exception as error:
            if not is_numerical(error):
                raise
            return -math.inf

    def _tell(self, hook: str) -> None:
        if not self.hooks[hook]:
            return
        c, state = self.counters, self.state
        state.epoch, state.batch = c.epoch + (hook in ("on_start", "on_batch")), c.batch
        state.history, state.best_epoch, state.best_bound = c.history, c.best_epoch, c.best_bound
        with isolated_rng(self.device):
            for call in self.hooks[hook]:
                call(state)


def _refuse(what: str, batch: Batch, noise: Tensor, error: Exception | None, number: int) -> None:
    """Raise for a held-out bound that is not finite, and leave what was raised as it is."""
    if error is None:
        raise ArithmeticError(what)
