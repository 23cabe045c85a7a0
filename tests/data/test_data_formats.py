"""The readers of IDX, MATLAB and text files, on good and on damaged files."""

import gzip

import numpy as np
import pytest
import scipy.io
from data_files import idx_bytes, write_mat

from pyroboost.data import DataError
from pyroboost.data.formats import read_bits, read_idx, read_mat

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("array", [ARRAY, ARRAY.reshape(-1)])
def test_idx_round_trip(tmp_path, pack, array):
    path = tmp_path / "x"
    path.write_bytes(pack(idx_bytes(array)))
    assert np.array_equal(read_idx(path), array)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (gzip.compress(idx_bytes(ARRAY))[:-12], "truncated"),
        (gzip.compress(idx_bytes(ARRAY))[:30], "truncated"),
        (gzip.compress(idx_bytes(ARRAY))[:-8] + b"\0" * 8, "damaged"),
        (b"\x1f\x8b" + b"x" * 30, "damaged"),
        (idx_bytes(ARRAY)[:-1], "23 values where its header promises 24"),
        (idx_bytes(ARRAY) + b"\0", "25 values"),
        (idx_bytes(ARRAY)[:9], "not an IDX"),
        (b"\0\0\x0d\x01\0\0\0\0", "not an IDX"),
        (b"<html>moved</html>", "not an IDX"),
        (b"", "not an IDX"),
    ],
    ids="tail stream sum noise short long header floats page empty".split(),
)
def test_damaged_idx_is_one_sentence(tmp_path, data, problem):
    path = tmp_path / "x"
    path.write_bytes(data)
    with pytest.raises(DataError, match=problem) as error:
        read_idx(path)
    assert str(path) in str(error.value)
    assert "put a whole copy in its place" in str(error.value)


def test_mat_variables(tmp_path):
    path = tmp_path / "x.mat"
    write_mat(path, a=np.eye(2), b=np.ones(3))
    assert np.array_equal(read_mat(path, "a")["a"], np.eye(2))
    with pytest.raises(DataError, match="has no variable c"):
        read_mat(path, "a", "c")


def test_damaged_mat_is_one_sentence(tmp_path):
    path = tmp_path / "x.mat"
    scipy.io.savemat(path, {"a": np.random.default_rng(0).random((50, 50))}, do_compression=True)
    whole = path.read_bytes()
    for data in (b"", b"<html>moved</html>", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"not a readable \.mat file"):
            read_mat(path, "a")


def test_bits_round_trip(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (5, 7))
    path = tmp_path / "x.amat"
    for end in ("\n", " \n", "\r\n", "\n\n"):
        path.write_text("".join(" ".join(map(str, row)) + end for row in bits), newline="")
        assert np.array_equal(read_bits(path, 7), bits)
    path.write_text("\n".join(" ".join(map(str, row)) for row in bits))  # no newline at the end
    assert np.array_equal(read_bits(path, 7), bits)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0 1 1\n0 1", "lines that do not hold 3 bits"),
        ("0 1\n1 0 1 1\n", "lines that do not hold 3 bits"),
        ("", "or none"),
        ("0 1 10\n", "numbers other than"),
        ("0 1 2\n", "something else"),
        ("0 1 0.5\n", "something else"),
    ],
)
def test_damaged_bits_are_one_sentence(tmp_path, text, problem):
    path = tmp_path / "x.amat"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        read_bits(path, 3)
