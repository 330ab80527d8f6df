"""The data sets that can be asked for by name."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyro_bbits.data.splits import DataSplits, Split, check_fraction, validation_split

__all__ = ["load_data"]

Rows = tuple[Tensor, Tensor]

HUB = "pyro-bbits[hub]"  # the extra with datasets and Pillow


@dataclass(frozen=True)
class _Source:
    """How a named data set is read: `read(path)` gives the training rows and the test rows."""

    read: Callable[[Path | None], tuple[Rows, Rows]]
    num_classes: int = 10
    augment: bool = False


@dataclass(frozen=True)
class _Images:
    """What the images of a published data set look like, and how they are normalized."""

    name: str
    hub_id: str
    mode: str  # as Pillow names it
    size: int  # pixels, both ways
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_data(
    name: str, *, path: str | Path | None = None, validation_fraction: float = 0.1, seed: int = 0
) -> DataSplits:
    """Load a data set by name into memory, normalized for the networks of this library.

    | name | images | values | read from |
    | --- | --- | --- | --- |
    | `digits` | `(1, 8, 8)` | `[0, 1]` | scikit-learn, nothing is downloaded |
    | `mnist` | `(1, 28, 28)` | `[0, 1]` | `path`, or `ylecun/mnist` on the Hugging Face hub |
    | `cifar10` | `(3, 32, 32)` | mean 0, deviation near 1.2 | `path`, or `uoft-cs/cifar10` there |

    The test split is the published one; of `digits`, which has none, it is every fifth scan of each class.
    `seed` therefore only chooses which training rows become validation.

    Arguments:
        name: One of the names above.
        path: Folder with `train-*.parquet` and `test-*.parquet` as the `datasets` library writes them, or a
            folder with such a folder called `name` in it. Not for `digits`.
        validation_fraction: Share of the training rows used for validation, in `(0, 1)`.
        seed: Seed of the validation split.

    Returns:
        The three splits.

    Raises:
        ImportError: If a library that the data set is read with is not installed.
        ValueError: If the name is unknown, the fraction is not inside `(0, 1)`, the folder or its files are
            missing, or a file does not hold the columns, images and labels that are expected.

    Example:
        >>> data = load_data("digits")
        >>> data.image_shape, len(data.train), len(data.validation), len(data.test)
        ((1, 8, 8), 1298, 144, 355)

    References:
        LeCun, Cortes, Burges: The MNIST database of handwritten digits, 1998.
        Krizhevsky: Learning multiple layers of features from tiny images, 2009.
        Alpaydin, Kaynak: Optical recognition of handwritten digits, UCI repository, 1998.
    """
    if name not in _SOURCES:
        raise ValueError(f"no data set is called {name!r}; choose one of {', '.join(_SOURCES)}.")
    check_fraction(validation_fraction)
    source = _SOURCES[name]
    train, test = source.read(None if path is None else Path(path).expanduser())
    kept, validation = validation_split(*train, validation_fraction, seed)
    return DataSplits(name, kept, validation, Split(*test), source.num_classes, source.augment)


def _read_digits(path: Path | None) -> tuple[Rows, Rows]:
    if path is not None:
        raise ValueError(f"digits comes with scikit-learn and is not read from a folder; got path={path}.")
    pixels, targets = _module("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.as_tensor(targets, dtype=torch.int64)
    test = _every_fifth(labels)
    return (images[~test], labels[~test]), (images[test], labels[test])


def _every_fifth(labels: Tensor) -> Tensor:
    """Mark every fifth row of each class; the classes take turns in the file, so plain rows would not do."""
    marked = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        marked[(labels == label).nonzero().flatten()[4::5]] = True
    return marked


def _read_published(images: _Images, path: Path | None) -> tuple[Rows, Rows]:
    if path is None:
        return _both(_module("datasets", HUB).load_dataset(images.hub_id), images)
    files = _parquet_files(images.name, path)
    # The library converts the files into a cache of its own; the rows are in memory when it is removed.
    with TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        return _both(_open_parquet(files, cache), images)


def _both(parts: Mapping[str, Any], images: _Images) -> tuple[Rows, Rows]:
    # The arrow format hands out the encoded bytes; the default would decode each image by way of objects.
    train, test = (parts[part].with_format("arrow")[:].to_pydict() for part in ("train", "test"))
    return _rows(train, "train", images), _rows(test, "test", images)


def _open_parquet(files: dict[str, list[str]], cache: str) -> Mapping[str, Any]:
    datasets = _module("datasets", HUB)
    try:
        parts: Mapping[str, Any] = datasets.load_dataset("parquet", data_files=files, cache_dir=cache)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(
            "the parquet files must be complete, hold rows and have the same columns; reading "
            f"{Path(files['train'][0]).parent} failed with: {error.__cause__ or error}"
        ) from error
    return parts


def _parquet_files(name: str, path: Path) -> dict[str, list[str]]:
    if not path.is_dir():
        raise ValueError(f"path must be a folder with the files of {name}; there is no folder {path}.")
    folders = [path, path / name]
    for folder in folders:
        files = {part: sorted(map(str, folder.glob(f"{part}-*.parquet"))) for part in ("train", "test")}
        if all(files.values()):
            return files
    raise ValueError(
        f"{name} needs train-*.parquet and test-*.parquet in one folder; neither {path} nor its "
        f"subfolder {name} holds both."
    )


def _rows(columns: dict[str, list[Any]], part: str, images: _Images) -> Rows:
    where = f"the {part} split of {images.name}"
    column = next((name for name in ("image", "img") if name in columns), None)
    if column is None or "label" not in columns:
        raise ValueError(f"{where} needs the columns image (or img) and label; got {', '.join(columns)}.")
    if not columns[column]:
        raise ValueError(f"{where} holds no rows; check that its files are complete.")
    pixels = [_pixels(cell, row, where, images) for row, cell in enumerate(columns[column])]
    return _normalized(b"".join(pixels), images), _labels(columns["label"], where)


def _pixels(cell: Mapping[str, bytes], row: int, where: str, images: _Images) -> bytes:
    """Decode one `{"bytes": ..., "path": ...}` cell to bytes in the order height, width, channel."""
    pillow = _module("PIL.Image", HUB)
    try:
        with pillow.open(io.BytesIO(cell["bytes"])) as image:
            decoded = image.convert(images.mode)
    except Exception as error:  # Pillow's readers raise whatever their format makes of broken bytes
        raise ValueError(f"row {row} of {where} is not an image that can be decoded: {error}") from error
    if decoded.size != (images.size, images.size):
        width, height = decoded.size
        raise ValueError(
            f"{where} must hold {images.size}x{images.size} images; row {row} is {width}x{height}. "
            "Did you accidentally give the folder of another data set?"
        )
    pixels: bytes = decoded.tobytes()
    return pixels


def _normalized(pixels: bytes, images: _Images) -> Tensor:
    shape = (-1, images.size, images.size, len(images.mean))
    levels = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape)
    scaled = levels.movedim(-1, 1).contiguous().float().div_(255)
    return scaled.sub_(_per_channel(images.mean)).div_(_per_channel(images.std))


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def _labels(labels: list[Any], where: str) -> Tensor:
    for row, label in enumerate(labels):
        if not isinstance(label, int):
            raise ValueError(f"labels must be whole numbers; row {row} of {where} has {label!r}.")
    return torch.tensor(labels, dtype=torch.int64)


def _module(name: str, requirement: str) -> ModuleType:
    """Import a library only when the data set that needs it is asked for."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        hint = f'run pip install "{requirement}".'
        raise ImportError(f"reading this data set needs {error.name}; {hint}") from error


_SOURCES: dict[str, _Source] = {
    "digits": _Source(_read_digits),
    "mnist": _Source(partial(_read_published, _Images("mnist", "ylecun/mnist", "L", 28, (0.0,), (1.0,)))),
    "cifar10": _Source(
        partial(
            _read_published,
            _Images(
                "cifar10",
                "uoft-cs/cifar10",
                "RGB",
                32,
                mean=(0.4914, 0.4822, 0.4465),
                std=(0.2023, 0.1994, 0.2010),
            ),
        ),
        augment=True,
    ),
}
