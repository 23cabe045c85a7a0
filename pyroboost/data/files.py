"""Finding, fetching and checking the files of public data sets."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from pyroboost.data.conventions import SOURCES, Source

__all__ = ["DataError", "data_folder", "local_file"]


class DataError(RuntimeError):
    """A file is missing, could not be fetched, or is not what it should be."""


def data_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder that holds the data sets.

    The first that is given: ``folder``, the environment variable ``PYROBOOST_DATA``, the user's
    cache folder for this package.

    Args:
        folder: where the data are; it need not exist yet.

    Returns:
        The folder; nothing is created.

    Example:
        >>> data_folder("/tmp/data").name
        'data'
    """
    given = folder if folder is not None else os.environ.get("PYROBOOST_DATA") or None
    if given is not None:
        return Path(given).expanduser()
    import pooch

    return Path(pooch.os_cache("pyroboost"))


def local_file(key: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the place of a public file on this machine, fetching it first where it is missing.

    A file that is already there is returned as it is; a gzip file may also lie there unpacked,
    without its ``.gz``. A download is checked before it is moved into place, so a wrong one never
    stays behind.

    Args:
        key: a key of ``pyroboost.data.conventions.SOURCES``.
        folder: see :func:`data_folder`.

    Returns:
        The path of the file.

    Raises:
        DataError: the file is missing and could not be fetched, or its checksum is wrong.
    """
    source = SOURCES[key]
    target = data_folder(folder) / source.path
    for place in (target, target.with_suffix("")) if target.suffix == ".gz" else (target,):
        if place.is_file():
            return place
    if source.checksum is None and source.content is None:
        raise DataError(
            f"{target.name} is not in {target.parent} and no checksum of the public file is "
            f"established, so it is not fetched for you; get it from {source.url} and place it at "
            f"{target}."
        )
    _fetch(source, target)
    return target


def _fetch(source: Source, target: Path) -> None:
    by_hand = f"place it by hand at {target}, or set PYROBOOST_DATA to a folder that has it"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as scratch:
            fetched = Path(scratch) / target.name
            _download(source.url, fetched)
            if not _is_right(source, fetched):
                raise DataError(
                    f"what {source.url} sent as {target.name} has the wrong checksum and was "
                    f"deleted; try again, or get the file elsewhere and {by_hand}."
                )
            os.replace(fetched, target)
    except OSError as error:  # every exception of requests is one, beside those of the disk
        raise DataError(
            f"{target.name} is missing and {source.url} could not be fetched into "
            f"{target.parent} ({type(error).__name__}); {by_hand}."
        ) from error


def _download(url: str, target: Path) -> None:
    import pooch
    from tqdm.auto import tqdm

    answers: list[Any] = []  # pooch leaves an answer that failed open; it is closed here

    def keep(answer: Any, *_args: Any, **_options: Any) -> None:
        answers.append(answer)

    # pooch sets the total once it knows it, but takes a bar without any total for none.
    with tqdm(desc=target.name, total=1, unit="B", unit_scale=True) as bar:
        fetch = pooch.HTTPDownloader(progressbar=bar, timeout=60, hooks={"response": keep})
        try:
            fetch(url, str(target), None)
        finally:
            for answer in answers:
                answer.close()


def _is_right(source: Source, path: Path) -> bool:
    import pooch

    if source.checksum is not None:
        algorithm, expected = source.checksum.split(":")
        return bool(pooch.file_hash(str(path), alg=algorithm) == expected)
    from pyroboost.data.formats import read_mat  # which imports this module

    variable, expected = source.content or ("", "")
    try:
        values = read_mat(path, variable)[variable]
    except DataError:
        return False
    return hashlib.sha256(values.tobytes(order="C")).hexdigest() == expected
