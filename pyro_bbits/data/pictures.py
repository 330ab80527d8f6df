"""Picture files: where they are, and how one becomes pixels."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_bbits.data.require import require

__all__ = [
    "SUFFIXES",
    "PathBlock",
    "PictureFiles",
    "centre_box",
    "centre_crop",
    "decode",
    "find_pictures",
    "levels",
    "opened",
    "pixels",
    "random_box",
    "random_crop",
    "read_random_crop",
]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")

SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
AREA, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


@dataclass(frozen=True)
class PictureFiles:
    """Files with their classes.

    Arguments:
        paths: The files.
        labels: Class number of each.
        class_names: Names of all classes, in the order of their numbers.

    Raises:
        ValueError: If the lengths differ, there is no file, or a label is no class.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.paths) != len(self.labels) or not self.paths:
            raise ValueError(f"each file needs a label; got {len(self.paths)} files and {len(self.labels)} labels.")
        if not 0 <= min(self.labels) <= max(self.labels) < len(self.class_names):
            raise ValueError(f"labels must lie in [0, {len(self.class_names)}); got {set(self.labels)}.")

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: Iterable[int]) -> PictureFiles:
        """The chosen files, in this order."""
        rows = list(rows)
        return PictureFiles(tuple(self.paths[i] for i in rows), tuple(self.labels[i] for i in rows), self.class_names)

    @classmethod
    def of(cls, folder: str | Path) -> PictureFiles:
        """All pictures of a folder with a folder for each class; classes and files in alphabetical order.

        Files that are no pictures by their suffix, and names that start with a dot, are passed over.

        Raises:
            ValueError: If there are no class folders or one of them holds no picture.
        """
        root = Path(folder)
        classes = _folders(root)
        if not classes:
            loose = f"; {root} holds pictures themselves" if _pictures(root) else ""
            raise ValueError(f"pictures must lie in one folder for each class, such as {root / 'cat'}{loose}.")
        paths, labels = [], []
        for label, name in enumerate(classes):
            found = _pictures(root / name)
            if not found:
                raise ValueError(f"the class folder {root / name} holds no picture ({', '.join(SUFFIXES)}).")
            paths += found
            labels += [label] * len(found)
        return cls(tuple(paths), tuple(labels), tuple(classes))


class PathBlock:
    """Paths in one block of memory: of a million objects, each worker would come to hold its own copy."""

    def __init__(self, paths: Sequence[Path]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self.block = b"".join(encoded)
        self.ends = torch.tensor([0, *map(len, encoded)]).cumsum(0)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Path:
        low, high = self.ends[index : index + 2].tolist()
        return Path(os.fsdecode(self.block[low:high]))

    def __iter__(self) -> Iterator[Path]:
        return (self[index] for index in range(len(self)))


def find_pictures(root: str | Path) -> dict[str, PictureFiles]:
    """Find pictures: `ROOT/train/CLASS/*`, with `ROOT/validation` (or `val`) and `ROOT/test` beside it.

    A folder without `train` holds the classes themselves and is one part, `all`. With a validation folder and no test
    folder, as ImageNet comes, the validation folder is the test part.

    Returns:
        `train`, `test` and perhaps `validation`; or `all`.

    Raises:
        ValueError: If there is no such folder, the parts differ in their classes, or there are fewer than two.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}.")
    names = _folders(root)
    found = {part: [name for name in SPLITS[part] if name in names] for part in SPLITS}
    if not found["train"]:
        if beside := [name for given in found.values() for name in given]:
            raise ValueError(f"{root} holds the folder {beside[0]} and none called train.")
        parts = {"all": PictureFiles.of(root)}
    else:
        if len(found["validation"]) > 1:
            raise ValueError(f"{root} must hold one validation folder; got {' and '.join(found['validation'])}.")
        parts = {part: PictureFiles.of(root / given[0]) for part, given in found.items() if given}
        if "test" not in parts:
            if "validation" not in parts:
                raise ValueError(
                    f"{root} holds the folder train and no test; without such folders it is split for you."
                )
            parts["test"] = parts.pop("validation")
    _check_classes(root, parts)
    return parts


def _check_classes(root: Path, parts: dict[str, PictureFiles]) -> None:
    main = parts.get("all") or parts["train"]
    for files in parts.values():
        if differing := sorted(set(files.class_names) ^ set(main.class_names)):
            folders = f"{main.paths[0].parents[1]} and {files.paths[0].parents[1]}"
            raise ValueError(f"{folders} must hold the same classes; only one of them has {', '.join(differing)}.")
    if len(main.class_names) < 2:
        raise ValueError(f"a classification needs two class folders at least; {root} has {main.class_names[0]} only.")


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:  # knows files from folders without asking for each of a million
        names = sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
        )
    return [folder / name for name in names]


def decode(path: Path, mode: str | None = "RGB") -> Any:
    """Read a picture whole, as it is stored: turned or mirrored only by a tag, it stays as it is.

    Arguments:
        path: The file.
        mode: `RGB`, `L` for grey, or `None` for `L` if the file is grey and `RGB` otherwise.

    Returns:
        A Pillow image.

    Raises:
        ValueError: If the file is missing, broken or cut off, or holds more than 8 bits per channel.
    """
    with opened(path) as image:
        if mode is None:
            mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        return _converted(image, mode)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A picture of which only the head is read; what goes wrong inside is said of the file."""
    try:
        with require("PIL.Image").open(path) as image:
            kept = image.mode
            yield image
    except ImportError:
        raise
    except Exception as error:  # Pillow's readers raise whatever their format makes of broken bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a picture that can be decoded: {reason}.") from error
    if kept.startswith(("I", "F")):
        raise ValueError(f"{path} has more than 8 bits per channel (Pillow mode {kept}); convert it to 8 bits.")


def _converted(image: Any, mode: str) -> Any:
    image.load()
    return image if image.mode == mode else image.convert(mode)  # which would copy it all the same


def pixels(image: Any) -> Tensor:
    """Pixels of a Pillow image as they lie in memory: uint8 of shape `(H, W, C)`."""
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, -1)


def levels(image: Any) -> Tensor:
    """Pixels of a Pillow image: uint8 of shape `(C, H, W)`."""
    return pixels(image).movedim(-1, 0).contiguous()


def centre_crop(image: Any, size: int, resize: int) -> Any:
    """Scale the short side to `resize` pixels and cut `size` x `size` out of the middle, in one step."""
    width, height = image.size
    return _cut(image, centre_box(width, height, size / resize), size)


def centre_box(width: int, height: int, share: float) -> tuple[float, float, float, float]:
    """A square in the middle, its side a share of the short side: left, top, right and bottom in pixels."""
    side = share * min(width, height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def random_crop(image: Any, size: int, numbers: random.Random) -> Any:
    """A part of random area (8 to 100 %) and aspect ratio (3:4 to 4:3), scaled to `size` x `size`, mirrored at random.

    If ten drawn parts do not fit into the picture, its largest part of an allowed ratio around the middle is taken.

    References:
        Szegedy et al.: Going deeper with convolutions, 2014, arXiv:1409.4842.
    """
    width, height = image.size
    return _finish(image, random_box(width, height, numbers), size, numbers)


def read_random_crop(path: Path, size: int, numbers: random.Random, mirror: bool = True) -> Any:
    """Read a picture and cut as :func:`random_crop` does, decoding no more of a large JPEG than the part needs.

    A JPEG is decoded at a half, a quarter or an eighth of its size if the drawn part still has `size` pixels in each
    direction then. The part is the same, and its pixels are close to those of the whole.

    Arguments:
        path: The file.
        size: Height and width of the result, in pixels.
        numbers: Where part and side are drawn from.
        mirror: Whether it is mirrored with probability 1/2.

    Returns:
        A Pillow image, RGB.

    Raises:
        ValueError: As :func:`decode`.
    """
    with opened(path) as image:
        width, height = image.size
        box = random_box(width, height, numbers)
        needed = [math.ceil(full * size / (box[i + 2] - box[i])) for i, full in enumerate((width, height))]
        reduced = image.draft(None, tuple(needed))
        scale = 1.0 if reduced is None else reduced[1][2] / width
        return _finish(_converted(image, "RGB"), tuple(scale * side for side in box), size, numbers, mirror)


def _finish(image: Any, box: Sequence[float], size: int, numbers: random.Random, mirror: bool = True) -> Any:
    crop = _cut(image, box, size)
    flip = require("PIL.Image").Transpose.FLIP_LEFT_RIGHT
    return crop.transpose(flip) if mirror and numbers.random() < 0.5 else crop


def random_box(width: int, height: int, numbers: random.Random) -> tuple[float, float, float, float]:
    """The part that :func:`random_crop` cuts: left, top, right and bottom in pixels."""
    for _ in range(TRIES):
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * numbers.random())
        low, high = map(math.log, RATIO)
        ratio = math.exp(low + (high - low) * numbers.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(numbers.random() * (width - w + 1)), int(numbers.random() * (height - h + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    x, y = min(width, height * ratio) / 2, min(height, width / ratio) / 2
    return width / 2 - x, height / 2 - y, width / 2 + x, height / 2 + y


def _cut(image: Any, box: Sequence[float], size: int) -> Any:
    return image.resize((size, size), require("PIL.Image").Resampling.BILINEAR, box=tuple(box))
