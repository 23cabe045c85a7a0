"""Labels of a few rows, and batches that all hold some."""

import pytest
import torch

from pyroboost.data import keep_labels, labelled_batches

X = torch.arange(40.0)[:, None].expand(40, 3)


def partly(count=6):
    y = torch.full((40,), -1)
    y[:count] = torch.arange(count) % 3
    return y


def test_equally_many_labels_of_each_class_are_kept():
    labels = torch.tensor([0] * 30 + [1] * 5 + [2] * 5 + [-1] * 3)
    kept = keep_labels(labels, 9, generator=torch.Generator().manual_seed(0))
    assert torch.bincount(kept[kept >= 0]).tolist() == [3, 3, 3]
    assert torch.equal(kept[kept >= 0], labels[kept >= 0])
    again = keep_labels(labels, 9, generator=torch.Generator().manual_seed(0))
    other = keep_labels(labels, 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(kept, again)
    assert not torch.equal(kept, other)
    with pytest.raises(ValueError, match="multiple"):
        keep_labels(labels, 10)
    with pytest.raises(ValueError, match="multiple"):
        keep_labels(torch.full((4,), -1), 2)
    with pytest.raises(ValueError, match="class 1 has 5 rows"):
        keep_labels(labels, 18)


def test_every_row_has_the_same_chance_of_keeping_its_label():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    counts = sum((keep_labels(labels, 4) >= 0).double() for _ in range(2000))
    assert ((counts / 2000 - 0.5).abs() < 4.5 * 0.5 / 2000**0.5).all()


def test_an_epoch_holds_each_row_without_a_label_once_and_labels_in_each_batch():
    y = partly()
    batches = labelled_batches(X, y, batch_size=9, labelled_per_batch=4)
    assert len(batches) == 7
    for _ in range(2):
        found = list(batches)
        assert len(found) == 7
        assert all(int((labels >= 0).sum()) == 4 for _, labels in found)
        assert {len(x) for x, _ in found} <= {8, 9}
        rows = torch.cat([x[:, 0] for x, _ in found]).long()
        labels = torch.cat([labels for _, labels in found])
        assert torch.equal(labels, y[rows])
        free = rows[labels < 0]
        assert torch.equal(free.sort().values, torch.arange(6, 40))
        used = torch.bincount(rows[labels >= 0], minlength=6)
        assert int(used.max() - used.min()) <= 1
    for kind in (False, True):
        first, second = (
            torch.cat([x[(labels >= 0) == kind, 0] for x, labels in batches]) for _ in range(2)
        )
        assert not torch.equal(first, second)


def test_the_order_comes_from_torchs_generator():
    batches = labelled_batches(X, partly(), batch_size=9, labelled_per_batch=4)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(torch.cat([x for x, _ in batches]))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("y", "sizes", "words"),
    [
        (partly()[:-1], (9, 4), "one class number per row"),
        (partly().float(), (9, 4), "one class number per row"),
        (partly(0), (9, 4), "0 of 40 rows"),
        (torch.zeros(40).long(), (9, 4), "40 of 40 rows"),
        (partly(), (9, 9), "both kinds"),
        (partly(), (9, 0), "both kinds"),
    ],
)
def test_what_cannot_be_mixed_is_refused(y, sizes, words):
    with pytest.raises(ValueError, match=words):
        labelled_batches(X, y, batch_size=sizes[0], labelled_per_batch=sizes[1])
