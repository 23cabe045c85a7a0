"""Frey faces, silhouettes, Omniglot, digits and CelebA from files in the public formats."""

import itertools

import numpy as np
import pytest
import torch
from data_files import write_mat
from PIL import Image
from sklearn.datasets import load_digits

from pyroboost.data import (
    DataError,
    StochasticBits,
    caltech_silhouettes,
    celeba,
    digits,
    frey_faces,
    omniglot,
)

RNG = np.random.default_rng(0)
CALTECH = "caltech101_silhouettes/caltech101_silhouettes_28"


def corner_image():
    """An upright image with ink on the top line's right half: it tells every wrong turn."""
    image = np.zeros((28, 28), np.uint8)
    image[0, 14:] = 1
    return image


def as_rows(data):
    """All rows of the parts, in a canonical order."""
    return torch.cat([data.train, data.validation, data.test]).unique(dim=0)


def test_frey_faces_are_columns_of_upright_faces(tmp_path):
    pixels = RNG.integers(0, 256, (560, 1965)).astype(np.uint8)
    write_mat(tmp_path / "freyfaces/frey_rawface.mat", ff=pixels)
    data = frey_faces(folder=tmp_path)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [1565, 200, 200]
    assert data.image_shape == (28, 20)
    faces = torch.from_numpy(pixels.T.copy()).float() / 255
    assert torch.allclose(as_rows(data), faces.unique(dim=0))
    assert torch.equal(frey_faces(folder=tmp_path).test, data.test)
    assert not torch.equal(frey_faces(seed=1, folder=tmp_path).test, data.test)


def test_frey_faces_refuses_other_shapes(tmp_path):
    write_mat(tmp_path / "freyfaces/frey_rawface.mat", ff=np.zeros((560, 10), np.uint8))
    with pytest.raises(DataError, match=r"ff of shape \(560, 10\)"):
        frey_faces(folder=tmp_path)


def silhouettes(num):
    """Stored as the public file stores them: columns first, the shape 0, classes from 1."""
    upright = RNG.integers(0, 2, (num, 28, 28)).astype(np.uint8)
    upright[0] = corner_image()
    stored = 1 - upright.transpose(0, 2, 1).reshape(num, 784)
    return upright.reshape(num, 784), stored, RNG.integers(1, 102, num)


def test_official_silhouettes_keep_their_split(tmp_path):
    held, expected = {}, {}
    for name, size in (("train", 4100), ("val", 2264), ("test", 2307)):
        expected[name], held[f"{name}_data"], tags = silhouettes(size)
        held[f"{name}_labels"] = tags[:, None]
    write_mat(tmp_path / f"{CALTECH}_split1.mat", **held)
    data = caltech_silhouettes(folder=tmp_path)
    for part, tags, name in (
        (data.train, data.train_labels, "train"),
        (data.validation, data.validation_labels, "val"),
        (data.test, data.test_labels, "test"),
    ):
        assert np.array_equal(part.numpy(), expected[name])
        assert part.dtype == torch.float32
        assert torch.equal(part[0].view(28, 28), torch.from_numpy(corner_image()).float())
        assert tags.tolist() == (held[f"{name}_labels"][:, 0] - 1).tolist()


def test_seeded_silhouettes_say_so(tmp_path):
    upright, stored, tags = silhouettes(8671)
    write_mat(tmp_path / f"{CALTECH}.mat", X=stored, Y=tags[None])
    data = caltech_silhouettes("seeded", seed=5, folder=tmp_path)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [4100, 2264, 2307]
    assert "seeded split (seed 5), not split 1" in repr(data)
    label_of = {row.tobytes(): tag - 1 for row, tag in zip(upright, tags, strict=True)}
    assert len(label_of) == 8671
    seen = [row.astype(np.uint8).tobytes() for row in data.test.numpy()]
    assert [label_of.pop(row) for row in seen] == data.test_labels.tolist()
    rest = torch.cat([data.train, data.validation]).numpy().astype(np.uint8)
    assert {row.tobytes() for row in rest} == set(label_of)


def test_silhouettes_refuse_other_files(tmp_path):
    _, stored, tags = silhouettes(8671)
    write_mat(tmp_path / f"{CALTECH}.mat", X=stored[:10], Y=tags[:10])
    with pytest.raises(DataError, match="X of shape"):
        caltech_silhouettes("seeded", folder=tmp_path)
    write_mat(tmp_path / f"{CALTECH}.mat", X=stored + 1, Y=tags)
    with pytest.raises(DataError, match="other than 0 and 1"):
        caltech_silhouettes("seeded", folder=tmp_path)
    write_mat(tmp_path / f"{CALTECH}_split1.mat", X=stored, Y=tags)
    with pytest.raises(DataError, match="has no variable train_data"):
        caltech_silhouettes(folder=tmp_path)
    with pytest.raises(ValueError, match="split is 'random'"):
        caltech_silhouettes("random", folder=tmp_path)


@pytest.fixture
def characters(tmp_path):
    """Omniglot of 20 training and 6 test characters in 4 alphabets, and the upright images."""
    upright = RNG.random((26, 28, 28))
    upright[0] = corner_image()
    stored = upright.transpose(0, 2, 1).reshape(26, 784).T
    target = np.eye(4)[RNG.integers(0, 4, 26)].T
    write_mat(
        tmp_path / "omniglot/chardata.mat",
        data=stored[:, :20],
        target=target[:, :20],
        testdata=stored[:, 20:],
        testtarget=target[:, 20:],
    )
    return tmp_path, torch.from_numpy(upright.reshape(26, 784)).float(), target.argmax(0)


def test_omniglot_is_upright_and_split_by_seed(characters):
    folder, upright, alphabets = characters
    data = omniglot("raw", validation=5, folder=folder)
    assert torch.equal(data.test, upright[20:])
    assert data.test_labels.tolist() == alphabets[20:].tolist()
    rows = torch.cat([data.train, data.validation])
    tags = torch.cat([data.train_labels, data.validation_labels])
    assert len(data.train) == 15
    assert torch.equal(rows.unique(dim=0), upright[:20].unique(dim=0))
    for row, tag in zip(rows, tags, strict=True):
        source = (upright[:20] == row).all(1).nonzero().item()
        assert tag == alphabets[source]


def test_omniglot_binarizations(characters):
    folder = characters[0]
    stochastic = omniglot(validation=5, folder=folder)
    assert isinstance(stochastic.train, StochasticBits)
    assert set(stochastic.test.unique().tolist()) == {0.0, 1.0}
    assert omniglot("threshold", validation=0, folder=folder).validation is None
    with pytest.raises(ValueError, match="omniglot: parts of"):
        omniglot(validation=30, folder=folder)
    with pytest.raises(ValueError, match="binarization is 'larochelle'"):
        omniglot("larochelle", folder=folder)


def test_omniglot_refuses_other_files(tmp_path):
    path, ones = tmp_path / "omniglot/chardata.mat", np.ones((784, 3))
    target = np.ones((2, 3))
    write_mat(path, data=ones * 255, target=target, testdata=ones, testtarget=target)
    with pytest.raises(DataError, match=r"outside \[0, 1\]"):
        omniglot(validation=1, folder=tmp_path)
    write_mat(path, data=ones.T, target=target, testdata=ones, testtarget=target)
    with pytest.raises(DataError, match="data of shape"):
        omniglot(validation=1, folder=tmp_path)
    write_mat(path, data=ones, target=target[:, :2], testdata=ones, testtarget=target)
    with pytest.raises(DataError, match="target of shape"):
        omniglot(validation=1, folder=tmp_path)


def test_digits_are_scikit_learns():
    pixels, tags = load_digits(return_X_y=True)
    data = digits("raw", seed=2)
    rows = torch.cat([data.train, data.validation, data.test]) * 16
    labels = torch.cat([data.train_labels, data.validation_labels, data.test_labels])
    ours = {(*row.int().tolist(), tag) for row, tag in zip(rows, labels.tolist(), strict=True)}
    theirs = {(*row.astype(int).tolist(), int(tag)) for row, tag in zip(pixels, tags, strict=True)}
    assert ours == theirs
    assert len(rows) == 1797
    bits = digits(seed=2)
    assert torch.equal(bits.test, (data.test * 16 >= 9).float())
    assert torch.equal(digits(seed=2).train, bits.train)
    assert not torch.equal(digits(seed=3).train, bits.train)


def test_digits_sizes():
    assert digits(validation=0, test=97).validation is None
    assert digits(validation=0, test=97).train.shape == (1700, 64)
    assert isinstance(digits("stochastic").train, StochasticBits)
    with pytest.raises(ValueError, match="digits: parts of"):
        digits(validation=1000, test=1000)
    with pytest.raises(ValueError, match="binarization is 'grey'"):
        digits("grey")


@pytest.fixture
def faces(tmp_path):
    """Eleven pictures of CelebA's size, each of one red level, with green at top and bottom."""
    (tmp_path / "img_align_celeba").mkdir()
    for number in range(11):
        pixels = np.zeros((218, 178, 3), np.uint8)
        pixels[..., 0] = 20 * number
        pixels[:20, :, 1] = pixels[198:, :, 1] = 255
        path = tmp_path / "img_align_celeba" / f"{number + 1:06d}.jpg"
        Image.fromarray(pixels).save(path, quality=95)
    return tmp_path


def write_list(folder, parts):
    lines = [f"{number + 1:06d}.jpg {part}\n" for number, part in enumerate(parts)]
    (folder / "list_eval_partition.txt").write_text("".join(lines))


def levels(batches):
    return [round(float(x[0].mean() * 255 / 20)) for batch in batches for x in batch]


def test_celeba_reads_squares_in_the_official_split(faces):
    write_list(faces, [0] * 6 + [1] * 2 + [2] * 3)
    data = celeba(faces, size=16, batch_size=4)
    assert data.image_shape == (3, 16, 16)
    assert [part.num_rows for part in (data.train, data.validation, data.test)] == [6, 2, 3]
    assert sorted(levels(data.train)) == [0, 1, 2, 3, 4, 5]
    assert levels(data.validation) == [6, 7]
    assert levels(data.test) == levels(data.test) == [8, 9, 10]
    batch = next(iter(data.train))
    assert batch.shape == (4, 3, 16, 16)
    assert batch.dtype == torch.float32
    assert batch[:, 1, 1:-1].max() < 0.1  # the green edges lie outside the central square
    assert "official split" in repr(data)


def test_celeba_shuffles_training_anew(faces):
    data = celeba(faces, size=4, batch_size=3)
    orders = [levels(data.train) for _ in range(3)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1] or orders[1] != orders[2]


def test_celeba_without_list_is_split_by_seed(faces):
    data = celeba(faces, size=4)
    parts = [levels(part) for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [9, 1, 1]
    assert sorted(itertools.chain(*parts)) == list(range(11))
    assert "seeded split (seed 0), not the official one" in data.notes
    with pytest.raises(TypeError, match="batch by batch"):
        data.train_tensor()


def test_celeba_default_folder(faces, monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("data")
    (home / "celeba").symlink_to(faces)
    monkeypatch.setenv("PYROBOOST_DATA", str(home))
    assert celeba(size=4).train.num_rows == 9


def test_celeba_errors_are_one_sentence(faces, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DataError, match="holds 0 jpg files") as error:
        celeba(empty)
    assert str(empty / "img_align_celeba") in str(error.value)
    with pytest.raises(ValueError, match="size is 0"):
        celeba(faces, size=0)
    write_list(faces, [0] * 11)
    with pytest.raises(DataError, match="parts of 11, 0, 0"):
        celeba(faces)
    write_list(faces, ["one"] * 11)
    with pytest.raises(DataError, match="not a file name and 0, 1 or 2"):
        celeba(faces)


def test_celeba_names_a_damaged_picture(faces):
    write_list(faces, [0] * 6 + [1] * 2 + [2] * 3)
    victim = faces / "img_align_celeba" / "000009.jpg"
    victim.write_bytes(victim.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"000009\.jpg is not a readable picture"):
        list(celeba(faces, size=4).test)
    victim.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"000009\.jpg is not a readable picture"):
        list(celeba(faces, size=4).test)
