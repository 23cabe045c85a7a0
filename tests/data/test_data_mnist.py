"""MNIST and Cmnist from small files in the public formats."""

import numpy as np
import pytest
import torch
from data_files import write_mnist

from pyroboost.data import DataError, StochasticBits, cmnist, mnist


def digit_arrays(num, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num, 28, 28)).astype(np.uint8), rng.integers(0, 10, num)


@pytest.fixture
def small(tmp_path):
    """A folder with 12 training and 5 test digits, and the arrays."""
    train, test = digit_arrays(12), digit_arrays(5, seed=1)
    write_mnist(tmp_path, *train)
    write_mnist(tmp_path, *test, part="test", pack=False)
    return tmp_path, train, test


def test_raw_keeps_grey_levels_order_and_labels(small):
    folder, (images, labels), (test, test_labels) = small
    data = mnist("raw", validation=4, folder=folder)
    grey = torch.from_numpy(images.reshape(12, 784)).float() / 255
    assert torch.allclose(torch.cat([data.train, data.validation]), grey)
    assert len(data.train) == 8
    assert torch.allclose(data.test, torch.from_numpy(test.reshape(5, 784)).float() / 255)
    assert data.train.dtype == data.test.dtype == torch.float32
    assert torch.cat([data.train_labels, data.validation_labels]).tolist() == labels.tolist()
    assert data.test_labels.tolist() == test_labels.tolist()
    assert data.train_labels.dtype == torch.int64
    assert data.image_shape == (28, 28)


def test_threshold_is_at_one_half(small):
    folder, (images, _), (test, _) = small
    data = mnist(validation=0, folder=folder)
    assert data.validation is None
    assert data.validation_labels is None
    assert np.array_equal(data.train.numpy(), images.reshape(12, 784) >= 128)
    assert np.array_equal(data.test.numpy(), test.reshape(5, 784) >= 128)


def test_stochastic_draws_anew_for_training_only(small):
    folder, (images, _), _ = small
    data = mnist("stochastic", validation=4, seed=2, batch_size=3, folder=folder)
    assert isinstance(data.train, StochasticBits)
    assert data.train.batch_size == 3
    assert torch.allclose(
        data.train.probabilities, torch.from_numpy(images[:8].reshape(8, 784)).float() / 255
    )
    again = mnist("stochastic", validation=4, seed=2, folder=folder)
    assert torch.equal(data.test, again.test)
    assert torch.equal(data.validation, again.validation)
    assert not torch.equal(data.test, mnist("stochastic", validation=4, folder=folder).test)
    assert set(data.test.unique().tolist()) == {0.0, 1.0}


def test_environment_names_the_folder(small, monkeypatch):
    monkeypatch.setenv("PYROBOOST_DATA", str(small[0]))
    assert len(mnist(validation=2).test) == 5


def test_larochelle_reads_three_files(tmp_path):
    (tmp_path / "mnist").mkdir()
    rng = np.random.default_rng(0)
    bits = {name: rng.integers(0, 2, (3, 784)) for name in ("train", "valid", "test")}
    for name, rows in bits.items():
        text = "".join(" ".join(map(str, row)) + " \n" for row in rows)
        (tmp_path / "mnist" / f"binarized_mnist_{name}.amat").write_text(text)
    data = mnist("larochelle", folder=tmp_path)
    for part, name in ((data.train, "train"), (data.validation, "valid"), (data.test, "test")):
        assert np.array_equal(part.numpy(), bits[name])
        assert part.dtype == torch.float32
    assert data.train_labels is None
    assert "Larochelle" in repr(data)


def test_truncated_file_is_one_sentence(small):
    path = small[0] / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="truncated") as error:
        mnist(folder=small[0])
    assert str(path) in str(error.value)


def test_files_that_do_not_belong_are_one_sentence(tmp_path):
    images, labels = digit_arrays(4)
    write_mnist(tmp_path, images, labels[:3])
    with pytest.raises(DataError, match="labels of shape"):
        mnist("raw", validation=1, folder=tmp_path)
    write_mnist(tmp_path, images[:, :20], labels)
    with pytest.raises(DataError, match="not of images of 28 x 28"):
        mnist("raw", validation=1, folder=tmp_path)


def test_wrong_options_are_refused(small):
    with pytest.raises(ValueError, match="binarization is 'fixed'"):
        mnist("fixed", folder=small[0])
    for validation in (12, -1):
        with pytest.raises(ValueError, match="leave some"):
            mnist(validation=validation, folder=small[0])


def test_cmnist_is_the_centre_of_the_first_12000(tmp_path):
    images, labels = digit_arrays(12_010)
    write_mnist(tmp_path, images, labels, pack=False)
    data = cmnist(folder=tmp_path)
    centre = torch.from_numpy(images[:12_000, 9:19, 9:19].reshape(12_000, 100)).float() / 255
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [4000, 4000, 4000]
    assert torch.allclose(torch.cat(parts), centre)
    tags = torch.cat([data.train_labels, data.validation_labels, data.test_labels])
    assert tags.tolist() == labels[:12_000].tolist()
    assert isinstance(cmnist("stochastic", folder=tmp_path).train, StochasticBits)


def test_cmnist_needs_enough_digits(small):
    with pytest.raises(DataError, match="12,000 training digits"):
        cmnist(folder=small[0])
    with pytest.raises(ValueError, match="binarization is 'larochelle'"):
        cmnist("larochelle", folder=small[0])
