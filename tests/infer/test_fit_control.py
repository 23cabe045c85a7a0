"""What steers a fit: early stopping, schedules, clipping, callbacks."""

import json
from functools import partial

import pyro
import pytest
import torch
from fit_pairs import climbing, factor_pair, normal_pair

from pyroboost.infer import Callback, fit


def free(name):
    return pyro.param(name).detach()


class TestStopping:
    """w climbs by 1 an epoch, the held-out bound is -(w - 3)^2: best after epoch 3."""

    def climb(self, **words):
        pair, x = factor_pair(), torch.zeros(10)
        result = fit(
            pair, x, validation=x, epochs=words.pop("epochs", 9), **climbing(pair), **words
        )
        return pair.model.fn.w.item(), result

    def test_best_weights_are_back(self):
        w, result = self.climb()
        assert (w, result.best_epoch, result.epochs_run) == (3.0, 3, 9)
        assert result.best_bound == pytest.approx(0.0, abs=1e-6)
        bounds = [row["validation_bound"] for row in result.history]
        assert bounds == pytest.approx([-((w - 3.0) ** 2) for w in range(1, 10)], abs=1e-5)

    def test_patience(self):
        w, result = self.climb(patience=2)
        assert (w, result.best_epoch, result.epochs_run) == (3.0, 3, 5)
        assert "no better held-out bound in 2 epochs" in result.stopped

    def test_best_and_patience_count_only_once_annealed(self):
        """Annealing reaches 1 with epoch 5: the better epochs 3 and 4 do not count."""
        w, result = self.climb(patience=2, annealing=5)
        assert (w, result.best_epoch, result.epochs_run) == (5.0, 5, 7)

    def test_annealing_that_never_reaches_one_keeps_the_last_weights(self):
        w, result = self.climb(patience=1, annealing=20, epochs=4)
        assert (w, result.best_epoch, result.epochs_run) == (4.0, None, 4)
        assert "annealing ended at 0.2" in result.stopped

    def test_plateau_schedule_reads_the_held_out_bound(self):
        """The bound is best at epoch 3, so a plateau of patience 0 halves the rate from then on."""
        for mode in ("min", "max"):
            plateau = partial(
                torch.optim.lr_scheduler.ReduceLROnPlateau, mode=mode, patience=0, factor=0.5
            )
            _, result = self.climb(scheduler=plateau, epochs=6)
            assert [row["lr"] for row in result.history] == [1.0, 1.0, 1.0, 1.0, 0.5, 0.25]

    def test_schedule_steps_once_an_epoch(self):
        decay = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1)
        _, result = self.climb(scheduler=decay, epochs=5)
        assert [row["lr"] for row in result.history] == pytest.approx([1, 1, 0.1, 0.1, 0.01])

    def test_clipping(self):
        """The gradient is -1, clipped to 0.25: w climbs by 0.25 a step."""
        pair = factor_pair()
        fit(pair, torch.zeros(10), epochs=2, clip_norm=0.25, **climbing(pair))
        assert pair.model.fn.w.item() == pytest.approx(0.5, abs=1e-5)


class TestCallbacks:
    def test_all_hooks_in_order_and_stop(self):
        calls = []

        class Spy(Callback):
            def on_start(self, state):
                calls.append(("start", state.epoch, state.batch))

            def on_batch(self, state):
                calls.append(("batch", state.epoch, state.batch))
                if (state.epoch, state.batch) == (2, 1):
                    state.stop("enough")

            def on_epoch(self, state):
                calls.append(("epoch", state.epoch, len(state.history)))

            def on_end(self, state):
                calls.append(("end", state.epoch, state.pair.model.fn.w.item()))

        pair = factor_pair()
        result = fit(pair, torch.zeros(20), epochs=5, callbacks=[Spy()], **climbing(pair))
        assert result.stopped == "enough"
        assert result.epochs_run == 2
        assert result.history[1]["batches"] == 1
        assert calls == [
            ("start", 1, 0),
            ("batch", 1, 1),
            ("batch", 1, 2),
            ("epoch", 1, 1),
            ("batch", 2, 1),
            ("epoch", 2, 2),
            ("end", 2, 3.0),
        ]

    def test_a_function_is_called_each_epoch_and_may_stop(self):
        def stop(state):
            if state.epoch == 2:
                state.stop()

        pair = factor_pair()
        result = fit(pair, torch.zeros(10), epochs=5, callbacks=[stop], **climbing(pair))
        assert result.epochs_run == 2

    def test_drawing_in_a_callback_does_not_change_the_fit(self):
        def run(callbacks):
            pyro.clear_param_store()
            torch.manual_seed(1)
            fit(normal_pair(), torch.arange(30.0), epochs=3, batch_size=7, callbacks=callbacks)
            return free("a"), torch.get_rng_state()

        class Draw(Callback):
            def on_batch(self, state):
                torch.randn(3)

            on_epoch = on_batch

        for one, other in zip(run([]), run([Draw()]), strict=True):
            assert torch.equal(one, other)

    def test_history_is_json_and_repr_reads(self):
        result = fit(normal_pair(), torch.ones(9), validation=torch.ones(3), epochs=2)
        assert json.loads(json.dumps(result.history, allow_nan=False)) == result.history
        assert set(result.history[0]) >= {"epoch", "loss", "validation_bound", "beta", "lr"}
        assert [row["epoch"] for row in result.history] == [1, 2]
        assert repr(result).startswith("Fit(2 epochs, loss ")
        assert "all epochs done" in repr(result)
