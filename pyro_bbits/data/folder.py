"""Small pictures of one size, read from class folders into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_bbits.data.picture_loader import OnError, without_broken
from pyro_bbits.data.pictures import PictureFiles, decode, find_pictures, levels
from pyro_bbits.data.require import require
from pyro_bbits.data.rows import Rows

__all__ = ["read_folder"]

LIMIT = 8 * 2**30  # bytes of float32 images
REMEDY = "give an image size (--image-size) to have pictures scaled and read while training"


def read_folder(root: Path, on_error: OnError = "raise") -> dict[str, Rows]:
    """Read `ROOT/train/CLASS/*` with the other parts beside it, or `ROOT/CLASS/*`.

    Images get one channel if all files are grey, else three. Targets are class names. With `on_error` `skip` files that
    cannot be decoded are left out, and a warning names each of them.

    Returns:
        `train`, `test` and perhaps `validation`; or `all`.

    Raises:
        ValueError: If folders or classes are missing, a file is broken, sizes differ, or all images together would
            take more than 8 GiB. It names the file.
        ImportError: If Pillow is not installed.
    """
    require("PIL.Image")
    parts = find_pictures(root)
    if on_error == "skip":
        parts = {part: without_broken(files, workers=0)[0] for part, files in parts.items()}
    first = next(iter(parts.values())).paths[0]
    size = decode(first).size
    total = sum(map(len, parts.values()))
    if (needed := total * 3 * 4 * size[0] * size[1]) > LIMIT:
        raise ValueError(f"{total} pictures like {first} would take {needed / 2**30:.0f} GiB of memory; {REMEDY}.")
    images = {part: [_read(path, size, first) for path in files.paths] for part, files in parts.items()}
    grey = all(image.mode == "L" for part in images.values() for image in part)
    return {part: _rows(files, images[part], "L" if grey else "RGB") for part, files in parts.items()}


def _read(path: Path, size: tuple[int, int], first: Path) -> Any:
    image = decode(path, mode=None)
    if image.size != size:
        raise ValueError(
            f"pictures held in memory must have one size; {first} is {size[0]}x{size[1]}, {path} is "
            f"{image.size[0]}x{image.size[1]}. Scale them, or {REMEDY}."
        )
    return image


def _rows(files: PictureFiles, images: list[Any], mode: str) -> Rows:
    pixels: Tensor = torch.stack([levels(image.convert(mode)) for image in images])
    names = [files.class_names[label] for label in files.labels]
    return Rows(pixels, names, lambda row: str(files.paths[row]))
