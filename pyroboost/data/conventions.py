"""The one place that fixes where files come from, their polarity, orientation and splits.

Every loader gives ink (the thing drawn) as 1 and paper as 0, and images upright, read line by
line from the top left. What the public files do instead:

| data | file | as stored | here |
|---|---|---|---|
| MNIST | IDX, bytes 0-255 | ink 255, lines | divided by 255 |
| Larochelle's MNIST | text, 0/1 | ink 1, lines | as stored |
| Frey faces | 560 x 1965, bytes | bright 255, lines, a face a column | transposed, over 255 |
| Caltech silhouettes | 0/1, a shape a row | **shape 0**, **columns** | 1 - x, transposed |
| Omniglot | 784 x N, 0-1 | ink 1, **columns**, an image a column | transposed |
| digits | scikit-learn, 0-16 | ink 16, lines | divided by 16 |

Splits (training / validation / test):

| data | split |
|---|---|
| MNIST | the public test part; validation is the last 10,000 of the 60,000 |
| Larochelle's MNIST | 50,000 / 10,000 / 10,000, as its three files |
| Frey faces | 1,565 / 200 / 200 of a seeded order |
| Caltech, ``"official"`` | 4,100 / 2,264 / 2,307, as ``caltech101_silhouettes_28_split1.mat`` |
| Caltech, ``"seeded"`` | the same sizes, of a seeded order of all 8,671: not the papers' split |
| Omniglot | the public test part (8,070); validation is 1,345 of a seeded order of the rest |
| CelebA | ``list_eval_partition.txt``, or else 80 / 10 / 10 % of a seeded order |
| Cmnist | 4,000 / 4,000 / 4,000, the first 12,000 training digits of MNIST in order |
| Tea | 81 / 81 / 81 of a seeded order of all 243 |
| digits | 1,197 / 300 / 300 of a seeded order |

Bits from grey levels: threshold (level above one half), stochastic (drawn anew each epoch for
training; validation and test drawn once from a seed). Published numbers on stochastic bits use
test bits drawn by NumPy (seeds 777 and 1 are both in circulation), so they compare with ours in
distribution, not bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SIZES", "SOURCES", "Source"]


@dataclass(frozen=True)
class Source:
    """A public file: its place below the data folder, its address, its checksum.

    Args:
        path: the place below the data folder.
        url: the public address.
        checksum: what the downloaded bytes must have, as ``"sha256:..."``, or ``"md5:..."`` where
            the publishers of a checksum give no other; ``None`` where none is established: then
            nothing is downloaded and the user is told where to put the file.
        content: instead of the bytes, the name of a ``.mat`` variable and the SHA-256 of its
            values (bytes, row by row): for a file whose values alone are known for certain.
    """

    path: str
    url: str
    checksum: str | None = None
    content: tuple[str, str] | None = None


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_LAROCHELLE = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
_MARLIN = "https://people.cs.umass.edu/~marlin/data/"


def _mnist(name: str, sha256: str) -> Source:
    return Source(f"mnist/{name}", _MNIST + name, f"sha256:{sha256}")


def _larochelle(name: str, sha256: str) -> Source:
    return Source(f"mnist/{name}", _LAROCHELLE + name, f"sha256:{sha256}")


SOURCES: dict[str, Source] = {
    "mnist.train": _mnist(
        "train-images-idx3-ubyte.gz",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    "mnist.train_labels": _mnist(
        "train-labels-idx1-ubyte.gz",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    "mnist.test": _mnist(
        "t10k-images-idx3-ubyte.gz",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    "mnist.test_labels": _mnist(
        "t10k-labels-idx1-ubyte.gz",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    "larochelle.train": _larochelle(
        "binarized_mnist_train.amat",
        "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    ),
    "larochelle.validation": _larochelle(
        "binarized_mnist_valid.amat",
        "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    ),
    "larochelle.test": _larochelle(
        "binarized_mnist_test.amat",
        "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
    ),
    "frey_faces": Source(
        "freyfaces/frey_rawface.mat",
        "https://cs.nyu.edu/~roweis/data/frey_rawface.mat",
        content=("ff", "fbd70c2c992104024a20f4d253da1a1132eb6bf8ed142dccbe7d2b1743b705c4"),
    ),
    "caltech.seeded": Source(
        "caltech101_silhouettes/caltech101_silhouettes_28.mat",
        _MARLIN + "caltech101_silhouettes_28.mat",
        "sha256:862d0a4b828256d54ad5de7c5066c18c72f355cac5b7cde4c1c3be7c000d180b",
    ),
    "caltech.official": Source(
        "caltech101_silhouettes/caltech101_silhouettes_28_split1.mat",
        _MARLIN + "caltech101_silhouettes_28_split1.mat",
        "md5:4483e9c14b188fd09937f9ea6f9ea777",
    ),
    "omniglot": Source(
        "omniglot/chardata.mat",
        "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat",
    ),
}

SIZES: dict[str, tuple[int, int, int]] = {
    "frey_faces": (1565, 200, 200),
    "caltech_silhouettes": (4100, 2264, 2307),
    "cmnist": (4000, 4000, 4000),
    "tea": (81, 81, 81),
}
