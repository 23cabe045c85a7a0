"""Where files are found, how they are fetched, and what is said when that fails."""

import re
from pathlib import Path

import numpy as np
import pooch
import pytest
from data_files import serving, sha256, write_mat

from pyroboost.data import DataError, data_folder
from pyroboost.data import files as files_module
from pyroboost.data.conventions import SOURCES, Source
from pyroboost.data.files import local_file


def one_sentence(error):
    """The message, after seeing that it is one sentence."""
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert not re.search(r"\. [A-Z]", text)
    return text


@pytest.fixture
def source(monkeypatch):
    """Register a made-up file and return a function that says what is expected of it."""
    monkeypatch.setenv("NO_PROXY", "*")

    def register(url, **checks):
        monkeypatch.setitem(SOURCES, "made_up", Source("made/up.bin", url, **checks))

    return register


def test_folder_is_argument_then_environment_then_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PYROBOOST_DATA", str(tmp_path))
    assert data_folder("elsewhere") == Path("elsewhere")
    assert data_folder() == tmp_path
    monkeypatch.setenv("PYROBOOST_DATA", "")
    assert data_folder() == Path(pooch.os_cache("pyroboost"))
    monkeypatch.delenv("PYROBOOST_DATA")
    assert data_folder() == Path(pooch.os_cache("pyroboost"))
    assert data_folder("~/data") == Path.home() / "data"


def test_file_by_hand_is_returned_unchecked(tmp_path, source):
    source("http://127.0.0.1:9/none", checksum="sha256:" + "0" * 64)
    place = tmp_path / "made" / "up.bin"
    place.parent.mkdir()
    place.write_bytes(b"mine")
    assert local_file("made_up", tmp_path) == place
    assert place.read_bytes() == b"mine"


def test_unpacked_file_serves_for_gzip(tmp_path):
    place = tmp_path / "mnist" / "train-images-idx3-ubyte"
    place.parent.mkdir()
    place.write_bytes(b"mine")
    assert local_file("mnist.train", tmp_path) == place


def test_download_is_checked_shown_and_kept(tmp_path, source, capsys):
    data = bytes(range(256)) * 400
    with serving({"/up.bin": data}) as root:
        source(root + "/up.bin", checksum=sha256(data))
        place = local_file("made_up", tmp_path)
    assert place.read_bytes() == data
    assert [p.name for p in place.parent.iterdir()] == ["up.bin"]
    assert "up.bin" in capsys.readouterr().err  # the progress bar
    assert local_file("made_up", tmp_path) == place  # the server is gone: not fetched again


def test_md5_guards_where_no_sha256_is_published(tmp_path, source):
    with serving({"/up.bin": b"abc"}) as root:
        source(root + "/up.bin", checksum="md5:900150983cd24fb0d6963f7d28e17f72")
        assert local_file("made_up", tmp_path).read_bytes() == b"abc"


def test_wrong_checksum_is_refused_and_nothing_stays(tmp_path, source):
    with serving({"/up.bin": b"abd"}) as root:
        source(root + "/up.bin", checksum=sha256(b"abc"))
        with pytest.raises(DataError, match="wrong checksum") as error:
            local_file("made_up", tmp_path)
    assert str(tmp_path / "made" / "up.bin") in one_sentence(error)
    assert list((tmp_path / "made").iterdir()) == []


def test_download_cut_short_is_refused_and_nothing_stays(tmp_path, source):
    with serving({"/up.bin": b"ab"}, promise=1) as root:
        source(root + "/up.bin", checksum=sha256(b"abc"))
        with pytest.raises(DataError) as error:
            local_file("made_up", tmp_path)
    assert str(tmp_path / "made" / "up.bin") in one_sentence(error)
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize("missing", ["page", "server"])
def test_no_network_names_the_place(tmp_path, source, missing):
    with serving({}) as root:
        source(root + "/up.bin", checksum=sha256(b"abc"))
        if missing == "page":
            with pytest.raises(DataError, match="could not be fetched") as error:
                local_file("made_up", tmp_path)
    if missing == "server":
        with pytest.raises(DataError, match="could not be fetched") as error:
            local_file("made_up", tmp_path)
    text = one_sentence(error)
    assert root in text
    assert f"place it by hand at {tmp_path / 'made' / 'up.bin'}" in text
    assert list((tmp_path / "made").iterdir()) == []


def test_unwritable_folder_is_one_sentence(tmp_path, source):
    (tmp_path / "made").write_text("a file where a folder belongs")
    source("http://127.0.0.1:9/none", checksum=sha256(b""))
    with pytest.raises(DataError, match="FileExistsError") as error:
        local_file("made_up", tmp_path)
    one_sentence(error)


def test_without_checksum_nothing_is_fetched(tmp_path, monkeypatch):
    def fetch(*_args):
        raise AssertionError("fetched")

    monkeypatch.setattr(files_module, "_download", fetch)
    with pytest.raises(DataError, match="no checksum") as error:
        local_file("omniglot", tmp_path)
    text = one_sentence(error)
    assert SOURCES["omniglot"].url in text
    assert str(tmp_path / "omniglot" / "chardata.mat") in text


def test_content_checksum_looks_at_values_only(tmp_path, source):
    values = np.arange(6, dtype=np.uint8).reshape(2, 3)
    digest = sha256(bytes(range(6))).removeprefix("sha256:")
    write_mat(tmp_path / "a.mat", ff=values)
    write_mat(tmp_path / "b.mat", ff=values.T, other=values)
    pages = {"/" + name: (tmp_path / name).read_bytes() for name in ("a.mat", "b.mat")}
    with serving(pages | {"/c.mat": b"not a mat file"}) as root:
        for name in ("b.mat", "c.mat"):
            source(f"{root}/{name}", content=("ff", digest))
            with pytest.raises(DataError, match="wrong checksum"):
                local_file("made_up", tmp_path)
        source(root + "/a.mat", content=("ff", digest))
        assert local_file("made_up", tmp_path).is_file()


def test_sources_are_well_formed():
    for source in SOURCES.values():
        assert source.url.endswith(Path(source.path).name)
        if source.checksum is not None:
            assert re.fullmatch("sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", source.checksum)
        if source.content is not None:
            assert re.fullmatch("[0-9a-f]{64}", source.content[1])
