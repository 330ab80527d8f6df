"""The data of the experiments: published ones from a folder or an archive, or made ones.

python -m benchmarks.paper.data mnist --data-path FOLDER --output mnist.npz    # for machines that read no parquet
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.recipes import DATA
from pyro_bbits.data import DataSplits, ImageFolderData, Scaling, Split, load_data, validation_split
from pyro_bbits.data.arrays import read_arrays
from pyro_bbits.data.sources import published_rows
from pyro_bbits.settings import Augmentation

__all__ = ["augmented", "first_rows", "joined", "load", "made"]

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "digits": (1, 8, 8), "imagenet": (3, 64, 64)}
SCALINGS = {
    "mnist": Scaling.none(1),
    "cifar10": Scaling(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
}
VALIDATION = 0.1


def load(name: str, path: Path | None, seed: int, image_size: int = 224) -> DataSplits | ImageFolderData:
    """A published data set, normalized as in the paper; its training rows lose a tenth to validation.

    Arguments:
        name: A key of `DATA`.
        path: Folder with parquet files, or an `.npz` with bytes; None reads from the hub (`digits`: from scikit-learn).
        seed: Chooses the validation rows.
        image_size: Of `imagenet`, a folder of class folders that is read while training.

    Raises:
        ValueError: If there are no such data there.
    """
    if name == "imagenet":
        if path is None:
            raise ValueError("imagenet is a folder with train/CLASS/* and val/CLASS/*; give it by --data-path.")
        return ImageFolderData.open(path, image_size=image_size, seed=seed)
    augment = name == "cifar10"
    if path is None or path.suffix != ".npz":
        return replace(load_data(name, path=path, seed=seed), augment=augment)
    if name not in SCALINGS:
        raise ValueError(f"{name} is not read from an archive; leave --data-path out.")
    rows = read_arrays(path, "classification")
    parts = {part: _scaled(rows[part].inputs, SCALINGS[name], path) for part in ("train", "test")}
    targets = {part: torch.as_tensor(rows[part].targets) for part in ("train", "test")}
    train, validation = validation_split(parts["train"], targets["train"], VALIDATION, seed)
    test = Split(parts["test"], targets["test"])
    return DataSplits(name, train, validation, test, 10, augment, input_scaling=SCALINGS[name])


def _scaled(pixels: Tensor, scaling: Scaling, path: Path) -> Tensor:
    if pixels.dtype != torch.uint8:
        raise ValueError(f"images in {path} must be bytes (uint8); got {pixels.dtype}.")
    return scaling(pixels.float().div_(255))


def made(name: str, rows: int = 64, seed: int = 0) -> DataSplits:
    """Random images and labels of a data set's shape: they show that a recipe runs, and nothing else."""
    generator = torch.Generator().manual_seed(seed)

    def split(size: int) -> Split:
        images = torch.rand(size, *SHAPES[name], generator=generator)
        return Split(images, torch.randint(10, (size,), generator=generator))

    return DataSplits(name, split(rows), split(16), split(16), 10, input_scaling=Scaling.none(SHAPES[name][0]))


def joined(data: DataSplits | ImageFolderData) -> DataSplits:
    """The data with the validation rows among the training rows, for a final run in which nothing is chosen.

    Raises:
        ValueError: If they are not in memory.
    """
    if not isinstance(data, DataSplits):
        raise ValueError("pictures on disk are joined on disk: put those of val into train.")
    parts = data.train, data.validation
    rows = Split(*(torch.cat([getattr(part, which) for part in parts]) for which in ("inputs", "targets")))
    return replace(data, train=rows)


def augmented(data: DataSplits | ImageFolderData, how: Augmentation | None) -> DataSplits | ImageFolderData:
    """The data with training images augmented as asked for; None leaves that to the data."""
    return data if how is None else data.augmented(how)


def first_rows(data: DataSplits | ImageFolderData, count: int | None) -> DataSplits | ImageFolderData:
    """The data with so many training rows at most, which are not augmented then."""
    if count is None or count >= len(data.train):
        return data
    if isinstance(data, ImageFolderData):
        return replace(data, train=data.train.take(range(count)), augment=False)
    return replace(data, train=Split(data.train.inputs[:count], data.train.targets[:count]), augment=False)


def write_archive(name: str, path: Path, output: Path) -> None:
    """Write the published rows as bytes into an `.npz`, in their order: a seed chooses the same validation rows."""
    train, test = published_rows(name, path)
    arrays: dict[str, Any] = {}
    for part, split in (("train", train), ("test", test)):
        scale, mean = (torch.tensor(values).view(-1, 1, 1) for values in (SCALINGS[name].std, SCALINGS[name].mean))
        pixels = (split.inputs * scale + mean).mul(255).round().byte()
        arrays |= {f"x_{part}": pixels.numpy(), f"y_{part}": split.targets.numpy()}
    np.savez_compressed(output, **arrays)


def main(argv: Sequence[str] | None = None) -> None:
    """Write an archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=[name for name in DATA if name in SCALINGS])
    parser.add_argument("--data-path", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    write_archive(arguments.data, arguments.data_path, arguments.output)


if __name__ == "__main__":
    main()
