"""Labelled pictures that need no hub: scikit-learn's digits, or a folder of IDX files such as Fashion-MNIST's."""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError

FASHION = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist lies
HELD_OUT = 360  # digits, the last ones: other writers than most of the first
PARTS = {"train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
         "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Pictures:
    """``train`` and ``test`` (picture, side, side), of mean 0 and variance 1 over the training pictures, and the label
    of each, 0 to 9."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def side(self) -> int:
        """Pixels a side."""
        return int(self.train.shape[-1])


def load(images: str) -> Pictures:
    """Pictures by name.

    Args:
        images: ``"digits"`` (1,437 and 360 of 8 x 8 pixels, shipped with scikit-learn), or a folder that holds the
            four files of MNIST's format.

    Raises:
        HeadscopeError: a folder without them, or files of another format.
    """
    if images == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        pixels, labels = torch.from_numpy(found.images).float(), torch.from_numpy(found.target).long()
        parts = [(pixels[:-HELD_OUT], labels[:-HELD_OUT]), (pixels[-HELD_OUT:], labels[-HELD_OUT:])]
    else:
        parts = [_part(Path(images), *names) for names in PARTS.values()]
    mean, deviation = parts[0][0].mean(), parts[0][0].std()
    (train, train_labels), (test, test_labels) = parts
    return Pictures((train - mean) / deviation, train_labels, (test - mean) / deviation, test_labels)


def _part(folder: Path, pictures: str, labels: str) -> tuple[Tensor, Tensor]:
    for name in (pictures, labels):
        if not (folder / name).is_file():
            raise HeadscopeError(
                f"{folder} has no {name}: install Debian's dataset-fashion-mnist, or name a folder with MNIST's four "
                "files (--set images=PATH), or scikit-learn's digits (--set images=digits --set grid=4)"
            )
    pixels, named = read_idx(folder / pictures), read_idx(folder / labels)
    if pixels.dim() != 3 or named.dim() != 1 or len(pixels) != len(named) or pixels.shape[1] != pixels.shape[2]:
        raise HeadscopeError(f"{folder}: {pictures} and {labels} are not square pictures with a label each")
    return pixels.float(), named.long()


def read_idx(path: Path) -> Tensor:
    """An IDX file of bytes (two zeros, the type 8, the number of dimensions, each size, the values), gzipped.

    Raises:
        HeadscopeError: another format.
    """
    try:
        with gzip.open(path) as file:
            held = file.read()
        zeros, kind, dims = struct.unpack(">HBB", held[:4])
        sizes = struct.unpack(f">{dims}I", held[4 : 4 + 4 * dims])
        if (zeros, kind) != (0, 8):
            raise ValueError
        return torch.frombuffer(bytearray(held[4 + 4 * dims :]), dtype=torch.uint8).reshape(sizes)
    except (OSError, EOFError, ValueError, RuntimeError, struct.error) as error:
        raise HeadscopeError(f"{path} is no gzipped IDX file of bytes") from error
