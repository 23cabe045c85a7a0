"""Readers of the three file formats: IDX, MATLAB and text of bits."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyroboost.data.files import DataError

__all__ = ["read_bits", "read_idx", "read_mat"]


def _malformed(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path} {problem}; put a whole copy in its place, or delete it so that it is fetched "
        "where that is possible."
    )


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Return the array of an IDX file of bytes, packed by gzip or not.

    The header is two zero bytes, a type (8: bytes), the number of dimensions and, as big-endian
    32-bit numbers, their sizes.

    Args:
        path: the file.

    Returns:
        The values, in the file's shape.

    Raises:
        DataError: the file cannot be read, is truncated, or is no IDX file of bytes.
    """
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _malformed(path, f"is a truncated or damaged gzip file ({error})") from error
    except OSError as error:
        raise _malformed(path, f"cannot be read ({type(error).__name__})") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise _malformed(path, "is not an IDX file of bytes")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise _malformed(
            path,
            f"holds {len(data) - start:,} values where its header promises {math.prod(shape):,}",
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_mat(path: Path, *variables: str) -> dict[str, npt.NDArray[Any]]:
    """Return variables of a MATLAB file.

    Args:
        path: the file.
        *variables: the names that must be there; everything in the file where none is given.

    Returns:
        The arrays by name.

    Raises:
        DataError: the file cannot be read, is truncated or malformed, or lacks a variable.
    """
    import scipy.io

    try:
        found: dict[str, npt.NDArray[Any]] = scipy.io.loadmat(path)
    except Exception as error:  # the reader's exceptions on damaged files are of any type
        raise _malformed(path, f"is not a readable .mat file ({type(error).__name__})") from error
    missing = [name for name in variables if name not in found]
    if missing:
        has = ", ".join(name for name in found if not name.startswith("__")) or "nothing"
        raise _malformed(path, f"has no variable {', '.join(missing)} (it has {has})")
    return found


def read_bits(path: Path, width: int) -> npt.NDArray[np.uint8]:
    """Return the rows of a text file of zeros and ones parted by blanks, a datum a line.

    Args:
        path: the file.
        width: bits of a line.

    Returns:
        The bits.  # (N, width)

    Raises:
        DataError: another character, a line of another length, or no line at all.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _malformed(path, f"cannot be read ({type(error).__name__})") from error
    kinds = np.zeros(256, np.uint8)  # 0: does not belong, 1: blank, 2: bit
    kinds[list(b" \t\r\n")], kinds[list(b"01")] = 1, 2
    text = np.frombuffer(raw, np.uint8)
    kind = np.frombuffer(raw.translate(kinds.tobytes()), np.uint8)
    if not bool(kind.all()):
        raise _malformed(path, "holds something else than 0, 1 and blanks")
    digit = kind == 2
    if bool((digit[1:] & digit[:-1]).any()):
        raise _malformed(path, "holds numbers other than 0 and 1")
    starts = np.append(0, np.flatnonzero(text == ord("\n")) + 1)
    starts = starts[starts < len(text)]
    counts = np.add.reduceat(digit, starts, dtype=np.int64) if len(starts) else starts
    if not set(np.unique(counts)) <= {0, width} or not counts.any():
        raise _malformed(path, f"has lines that do not hold {width} bits, or none")
    bits: npt.NDArray[np.uint8] = text[digit].reshape(-1, width) - np.uint8(ord("0"))
    return bits
