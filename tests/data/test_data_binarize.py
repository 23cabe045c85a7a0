"""Bits from grey levels: thresholds, fixed draws and draws anew in each epoch."""

import pytest
import torch

from pyroboost.data import (
    Dataset,
    ImageBatches,
    StochasticBits,
    binarize,
    fixed_bits,
    threshold_bits,
)
from pyroboost.data.splits import seeded_split
from pyroboost.infer.batches import Batches


def grey_set(validation=True):
    grey = torch.rand(30, 4)
    return Dataset("x", grey[:20], grey[20:25] if validation else None, grey[25:], (2, 2), "grey")


def test_threshold_is_strict():
    assert threshold_bits(torch.tensor([0.0, 0.5, 0.51, 1.0])).tolist() == [0, 0, 1, 1]


def test_stochastic_bits_have_the_right_means():
    # Every pixel of 500 epochs: 4.5 standard errors each way over 28 pixels.
    grey = torch.linspace(0, 1, 28).view(7, 4)
    batches = StochasticBits(grey, 3, shuffle=False)
    total = sum(torch.cat(list(batches)) for _ in range(500))
    error = (grey * (1 - grey) / 500).sqrt()
    assert ((total / 500 - grey).abs() <= 4.5 * error).all()
    assert set(torch.cat(list(batches)).unique().tolist()) == {0.0, 1.0}


def test_stochastic_bits_are_new_in_each_epoch():
    batches = StochasticBits(torch.full((50, 20), 0.5), 10, shuffle=False)
    first, second = torch.cat(list(batches)), torch.cat(list(batches))
    assert 0.4 < (first != second).float().mean() < 0.6
    assert not torch.equal(batches.draw(), batches.draw())


def test_stochastic_bits_shuffle_rows_without_losing_any():
    rows = torch.eye(23)  # a grey level of 0 or 1 leaves nothing to chance but the order
    batches = StochasticBits(rows, 5)
    first, second = torch.cat(list(batches)), torch.cat(list(batches))
    assert torch.equal(first.sum(0), torch.ones(23))
    assert not torch.equal(first, second)
    assert not torch.equal(first, rows)


def test_stochastic_bits_follow_the_global_generator():
    batches = StochasticBits(torch.rand(12, 5), 4)
    state = torch.get_rng_state()
    first = torch.cat(list(batches))
    torch.set_rng_state(state)
    assert torch.equal(torch.cat(list(batches)), first)


def test_own_generator_leaves_the_global_one_alone():
    state = torch.get_rng_state()
    draws = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        draws.append(torch.cat(list(StochasticBits(torch.full((9, 9), 0.5), generator=generator))))
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("rows", "size", "expected"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (3, 4, [3]), (3, 1, [1, 1, 1]), (1, 4, [1]), (5, 4, [5])],
)
def test_batches_cover_the_rows_and_count_themselves(rows, size, expected):
    batches = StochasticBits(torch.zeros(rows, 2), size)
    assert [len(batch) for batch in batches] == expected
    assert len(batches) == len(expected)


def test_training_loop_takes_stochastic_bits():
    bits = StochasticBits(torch.full((10, 3), 0.5), 4)
    batches = Batches(bits, 100, torch.device("cpu"), shuffle=True)
    assert batches.num_batches == 3
    assert sum(len(x) for (x,) in batches.epoch()) == 10


def test_bad_grey_levels_are_refused():
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="grey levels run from"):
            StochasticBits(torch.tensor([[0.5, bad]]))
    with pytest.raises(ValueError, match="no rows"):
        StochasticBits(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="batch_size is 0"):
        StochasticBits(torch.zeros(2, 3), 0)


def test_binarize_fixes_held_out_bits_and_touches_no_generator():
    grey = grey_set()
    state = torch.get_rng_state()
    first, again, other = (binarize(grey, "stochastic", seed=s) for s in (1, 1, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.test, again.test)
    assert torch.equal(first.validation, again.validation)
    assert not torch.equal(first.test, other.test)
    assert torch.equal(first.train.probabilities, grey.train)
    assert "seeds 1 and 2" in first.notes
    assert "grey" in first.notes


def test_binarize_draws_validation_and_test_apart():
    grey = torch.full((40, 10), 0.5)
    bits = binarize(Dataset("x", grey, grey, grey, (2, 5), ""), "stochastic")
    assert not torch.equal(bits.validation, bits.test)


@pytest.mark.parametrize("how", ["threshold", "stochastic", "raw"])
def test_binarize_without_validation(how):
    bits = binarize(grey_set(validation=False), how)
    assert bits.validation is None
    assert "validation" not in repr(bits)
    assert bits.train_tensor().shape == (20, 4)
    if how != "raw":
        assert set(bits.test.unique().tolist()) <= {0.0, 1.0}


def test_binarize_refuses_other_words_and_files():
    with pytest.raises(ValueError, match="binarization is 'bits'; take one of threshold"):
        binarize(grey_set(), "bits")
    files = ImageBatches(["a", "b"], lambda path: torch.zeros(1))
    with pytest.raises(TypeError, match="not tensors"):
        binarize(Dataset("x", files, None, files, (1,), ""), "threshold")


def test_fixed_bits_have_the_right_mean():
    grey = torch.full((20_000,), 0.3)
    assert abs(fixed_bits(grey, 0).mean() - 0.3) < 4.5 * (0.21 / 20_000) ** 0.5


def test_seeded_split_is_a_partition_and_does_not_change():
    state = torch.get_rng_state()
    parts = seeded_split(10, (5, 3, 2), 0, name="x")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.cat(parts).tolist() == [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]
    assert not torch.equal(parts[0], seeded_split(10, (5, 3, 2), 1, name="x")[0])
    for sizes in ((5, 3, 3), (8, 3, -1)):
        with pytest.raises(ValueError, match="x: parts of"):
            seeded_split(10, sizes, 0, name="x")
