"""Data sets by name, or the user's own by where they lie."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from pyro_bbits.data.arrays import read_arrays
from pyro_bbits.data.folder import read_folder
from pyro_bbits.data.image_folder import ImageFolderData
from pyro_bbits.data.picture_loader import OnError
from pyro_bbits.data.require import require
from pyro_bbits.data.rows import Rows as OwnRows
from pyro_bbits.data.rows import Task, make_splits
from pyro_bbits.data.scaling import Scaling
from pyro_bbits.data.splits import DataSplits, Split, check_fraction, validation_split
from pyro_bbits.data.table import read_table
from pyro_bbits.settings import RunSettings

__all__ = ["load_data", "open_data", "published_rows"]

Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Source:
    """How a named data set is read: `read(path)` gives the training rows and the test rows."""

    read: Callable[[Path | None], tuple[Rows, Rows]]
    scaling: Scaling
    num_classes: int = 10
    augment: bool = False


@dataclass(frozen=True)
class _Images:
    """What the images of a published data set look like, and how they are normalized."""

    name: str
    hub_id: str
    mode: str  # as Pillow names it
    size: int  # pixels, both ways
    scaling: Scaling


def open_data(settings: RunSettings) -> DataSplits | ImageFolderData:
    """The data that a run's settings ask for: in memory, or left on disk if they name an image size.

    Raises:
        ImportError: If a library that the data are read with is not installed.
        ValueError: As :func:`load_data` and :meth:`ImageFolderData.open`, or if the augmentation is not for these data.
    """
    data: DataSplits | ImageFolderData
    if settings.image_size is not None:
        if settings.data in _SOURCES or settings.task == "regression" or settings.target is not None:
            raise ValueError("an image size is for a folder of pictures with a folder for each class.")
        data = ImageFolderData.open(
            Path(settings.data).expanduser(),
            image_size=settings.image_size,
            seed=settings.seed,
            workers=settings.workers,
            cache=settings.picture_cache,
            on_error=settings.bad_images,
        )
    elif settings.picture_cache is not None:
        raise ValueError("a picture cache is for pictures that are read while training; give an image size as well.")
    else:
        data = load_data(
            settings.data,
            path=settings.data_path,
            seed=settings.seed,
            target=settings.target,
            task=settings.task,
            bad_images=settings.bad_images,
        )
    return data if settings.augment is None else data.augmented(settings.augment)


def load_data(
    name: str | Path,
    *,
    path: str | Path | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    target: str | None = None,
    task: Task = "classification",
    bad_images: OnError = "raise",
) -> DataSplits:
    """Load a data set into memory, normalized for the networks of this library.

    By name:

    | name | images | values | read from |
    | --- | --- | --- | --- |
    | `digits` | `(1, 8, 8)` | `[0, 1]` | scikit-learn, nothing is downloaded |
    | `mnist` | `(1, 28, 28)` | `[0, 1]` | `path`, or `ylecun/mnist` on the Hugging Face hub |
    | `cifar10` | `(3, 32, 32)` | mean 0, deviation near 1.2 | `path`, or `uoft-cs/cifar10` there |

    The test split is the published one; of `digits`, which has none, it is every fifth scan of each class.
    `seed` therefore only chooses which training rows become validation.

    One's own data by where they lie:

    | `name` | holds |
    | --- | --- |
    | a folder | pictures of one size: `ROOT/train/CLASS/*.png` with `ROOT/val` and `ROOT/test` beside |
    | a folder | pictures of one size: `ROOT/CLASS/*.png`; they are split |
    | a folder | `train.csv`, `test.csv` and perhaps `val.csv` |
    | a `.csv` | a first line with names, a column `target`, numbers in all others; it is split |
    | a `.npz` | arrays `x_train`, `y_train`, `x_test`, `y_test` and perhaps `x_val`, `y_val` |
    | a `.npz` | arrays `x`, `y`; they are split |

    Rows that are split give a fifth to the test split, the same whatever the seed, so that runs with other seeds are
    tested on the same rows and on none that they were trained on. Missing validation rows are taken from the training
    rows by the seed. Both cuts take from each class in proportion. Of a folder with `train` and `val` alone, as
    ImageNet comes, `val` is the test split.

    Inputs are brought to mean 0 and deviation 1 per channel or column, real-valued targets too; the figures come from
    the training rows alone and are in `input_scaling` and `target_scaling`. Class names in place of numbers are
    numbered in alphabetical order, `class_names`.

    Arguments:
        name: One of the names above, or a path.
        path: Folder with `train-*.parquet` and `test-*.parquet` of a named data set as the `datasets` library writes
            them, or a folder with such a folder called `name` in it. Not for `digits`.
        validation_fraction: Share of the training rows used for validation where there are none, in `(0, 1)`.
        seed: Seed of the validation split.
        target: Name of the column of targets in a `.csv`.
        task: `classification` (targets are the numbers 0 to K-1, or names), or `regression`.
        bad_images: What to do about pictures of a folder that cannot be decoded: `raise`, or `skip` with a warning that
            names each of them.

    Returns:
        The three splits.

    Raises:
        ImportError: If a library that the data set is read with is not installed.
        ValueError: If there is no such name or path, the fraction is not inside `(0, 1)`, an argument is not for these
            data, or files do not hold what is expected; the message names file and row.

    Example:
        >>> data = load_data("digits")
        >>> data.input_shape, len(data.train), len(data.validation), len(data.test)
        ((1, 8, 8), 1298, 144, 355)

    References:
        LeCun, Cortes, Burges: The MNIST database of handwritten digits, 1998.
        Krizhevsky: Learning multiple layers of features from tiny images, 2009.
        Alpaydin, Kaynak: Optical recognition of handwritten digits, UCI repository, 1998.
    """
    check_fraction(validation_fraction)
    if task not in ("classification", "regression"):
        raise ValueError(f"task must be 'classification' or 'regression'; got {task!r}.")
    if str(name) not in _SOURCES:
        if path is not None:
            raise ValueError(f"path is for {' and '.join(list(_SOURCES)[1:])}; one's own data are named by it: {path}.")
        parts, details = _read_own(Path(name).expanduser(), target, task, bad_images)
        return make_splits(str(name), parts, task, validation_fraction=validation_fraction, seed=seed, details=details)
    name = str(name)
    if target is not None or task != "classification":
        raise ValueError(f"{name} is a classification and has no target column; got {target=}, {task=}.")
    source = _SOURCES[name]
    train, test = published_rows(name, path)
    kept, validation = validation_split(train.inputs, train.targets, validation_fraction, seed)
    names = tuple(map(str, range(source.num_classes)))
    return DataSplits(
        name,
        kept,
        validation,
        test,
        source.num_classes,
        source.augment,
        input_scaling=source.scaling,
        class_names=names,
    )


def published_rows(name: str, path: str | Path | None = None) -> tuple[Split, Split]:
    """Training and test rows of a named data set, normalized, in the order they were published in.

    Arguments:
        name: Its name.
        path: As for :func:`load_data`.

    Raises:
        ImportError: As for :func:`load_data`.
        ValueError: If no data set has this name, or as for :func:`load_data`.
    """
    if name not in _SOURCES:
        raise ValueError(f"no data set is called {name!r}; choose one of {', '.join(_SOURCES)}.")
    train, test = _SOURCES[name].read(None if path is None else Path(path).expanduser())
    return Split(*train), Split(*test)


def _read_own(
    path: Path, target: str | None, task: Task, bad_images: OnError
) -> tuple[dict[str, OwnRows], dict[str, Any]]:
    """Rows of the user's own data, and what is known of their columns."""
    if not path.exists():
        raise ValueError(
            f"no data set is called {str(path)!r}, and there is no such file or folder; choose one of "
            f"{', '.join(_SOURCES)}, or give a folder of pictures, a .npz or a .csv file."
        )
    if path.suffix.lower() == ".csv" or (path / "train.csv").is_file():
        return _read_tables(path, target, task)
    if target is not None:
        raise ValueError(f"a target column is for .csv files; {path} is none.")
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return read_arrays(path, task), {}
    if path.is_dir():
        if task != "classification":
            raise ValueError(f"a folder of pictures is a classification, its folders being the classes; got {task=}.")
        return read_folder(path, bad_images), {}
    raise ValueError(f"data must be a folder of pictures, a .npz or a .csv file; got {path}.")


def _read_tables(path: Path, target: str | None, task: Task) -> tuple[dict[str, OwnRows], dict[str, Any]]:
    files = {"all": path}
    if path.is_dir():
        names = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "val", "valid"), "validation")
        files = {part: path / f"{name}.csv" for name, part in names.items() if (path / f"{name}.csv").is_file()}
        if "test" not in files:
            raise ValueError(f"{path} holds train.csv and no test.csv; a single file is split for you.")
    tables = {part: read_table(file, target) for part, file in files.items()}
    main = next(iter(tables.values()))
    for table in tables.values():
        if table.features != main.features:
            raise ValueError(
                f"{table.path} must have the columns of {main.path} in the same order; it has "
                f"{', '.join(table.features)}, not {', '.join(main.features)}."
            )
    details = {"target": target, "feature_names": list(main.features)}
    return {part: table.rows(task) for part, table in tables.items()}, details


def _read_digits(path: Path | None) -> tuple[Rows, Rows]:
    if path is not None:
        raise ValueError(f"digits comes with scikit-learn and is not read from a folder; got path={path}.")
    pixels, targets = require("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
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
        return _both(require("datasets").load_dataset(images.hub_id), images)
    files = _parquet_files(images.name, path)
    # The library converts the files into a cache of its own; the rows are in memory when it is removed.
    with TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        return _both(_open_parquet(files, cache), images)


def _both(parts: Mapping[str, Any], images: _Images) -> tuple[Rows, Rows]:
    # The arrow format hands out the encoded bytes; the default would decode each image by way of objects.
    train, test = (parts[part].with_format("arrow")[:].to_pydict() for part in ("train", "test"))
    return _rows(train, "train", images), _rows(test, "test", images)


def _open_parquet(files: dict[str, list[str]], cache: str) -> Mapping[str, Any]:
    datasets = require("datasets")
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
    pillow = require("PIL.Image")
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
    shape = (-1, images.size, images.size, len(images.scaling.mean))
    levels = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape)
    return images.scaling(levels.movedim(-1, 1).contiguous().float().div_(255))


def _labels(labels: list[Any], where: str) -> Tensor:
    for row, label in enumerate(labels):
        if not isinstance(label, int):
            raise ValueError(f"labels must be whole numbers; row {row} of {where} has {label!r}.")
    return torch.tensor(labels, dtype=torch.int64)


_MNIST = _Images("mnist", "ylecun/mnist", "L", 28, Scaling.none(1))
_CIFAR10 = _Images(
    "cifar10",
    "uoft-cs/cifar10",
    "RGB",
    32,
    Scaling(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
)

_SOURCES: dict[str, _Source] = {
    "digits": _Source(_read_digits, Scaling.none(1)),
    "mnist": _Source(partial(_read_published, _MNIST), _MNIST.scaling),
    "cifar10": _Source(partial(_read_published, _CIFAR10), _CIFAR10.scaling, augment=True),
}
