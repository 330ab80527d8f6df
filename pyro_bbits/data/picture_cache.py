"""Pictures decoded once: scaled down, as bytes in one file from which every epoch reads what it needs."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pyro_bbits.data.pictures import PathBlock, decode, opened, pixels
from pyro_bbits.data.require import require
from pyro_bbits.data.workers import ask_of_each
from pyro_bbits.files import write_text_atomically

__all__ = ["PictureCache", "cut_bytes"]

VERSION = 1
INDEX, PIXELS, DONE = "index.json", "pixels.bin", "done.bin"

Facts = dict[str, list[int]]
"""Of each picture, by its path below the folder of all: bytes and time of the file, height and width when scaled."""


class PictureCache:
    """Scaled pictures in a folder of their own, each written the first time it is asked for.

    A picture whose short side is longer than `short_side` is scaled down to it; others stay as they are. They lie in
    the order of their paths, so that it does not matter how they are split into parts. Where each lies is known from
    its head, so that worker processes, and the processes of a distributed run on one machine, write and read it without
    a word to each other; what two write at once is the same. What is read does not depend on whether it was there
    already. Room for all is taken at once.

    The folder must lie on a disk of the machine: several machines that write to one network folder would overwrite each
    other's pages. After a power cut while it was written, remove it.

    Arguments:
        folder: Where it lies; made if it is missing.
        paths: The pictures, in any order; some of those that it was made for will do later.
        short_side: In pixels.
        workers: Processes that read the heads; `None` takes one for each core but one.

    Raises:
        ValueError: If the folder holds other pictures or other files, the disk is too small, or a head cannot be read.
        OSError: If the folder cannot be made.
    """

    def __init__(
        self, folder: str | Path, paths: Sequence[Path], short_side: int, *, workers: int | None = None
    ) -> None:
        self.folder, self.short_side, self.root = Path(folder).expanduser(), short_side, _root(paths)
        wanted = {self._name(path): _file_facts(path) for path in sorted(set(paths))}
        if not self.folder.exists():
            self._make(wanted, workers)
        known = self._read_index()
        self._compare(wanted, known)
        self._row_of = {name: row for row, name in enumerate(known)}
        self.paths = PathBlock([Path(self.root, name) for name in known])
        self.sizes = torch.tensor([facts[2:] for facts in known.values()], dtype=torch.long)
        self.ends = torch.cat([torch.zeros(1, dtype=torch.long), 3 * self.sizes.prod(1).cumsum(0)])
        self._check_files()
        self.writable = all(os.access(self.folder / name, os.W_OK) for name in (PIXELS, DONE))
        self._open: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None, "_row_of": {}}  # a process that is not forked maps the files itself

    def rows(self, paths: Sequence[Path]) -> Tensor:
        """Number of each picture here, int64.

        Raises:
            ValueError: If one of them is not here.
        """
        if missing := [path for path in paths if self._name(path) not in self._row_of]:
            raise ValueError(f"the picture cache {self.folder} was not made for {missing[0]}.")
        return torch.tensor([self._row_of[self._name(path)] for path in paths])

    def __getitem__(self, index: int) -> Tensor:
        """The pixels of a picture as they lie in the file: uint8 of shape `(H, W, 3)`.

        Raises:
            ValueError: If it is not there yet, and cannot be decoded or written.
        """
        held, done = self._maps()
        low, high = self.ends[index : index + 2].tolist()
        height, width = self.sizes[index].tolist()
        place = held[low:high].view(height, width, 3)
        if not done[index]:
            if not self.writable:
                raise ValueError(f"the picture cache {self.folder} lacks {self.paths[index]}, and cannot be written.")
            place.copy_(self._scaled(index, width, height))
            done[index] = 1
        return place

    def _name(self, path: Path) -> str:
        return str(path).removeprefix(f"{self.root}{os.sep}")

    def _scaled(self, index: int, width: int, height: int) -> Tensor:
        image = decode(self.paths[index])
        if image.size != (width, height):
            image = image.resize((width, height), require("PIL.Image").Resampling.BILINEAR)
        return pixels(image)

    def _maps(self) -> tuple[Tensor, Tensor]:
        if self._open is None:
            held, done = (
                torch.from_file(str(self.folder / name), shared=self.writable, size=size, dtype=torch.uint8)
                for name, size in self._file_sizes().items()
            )
            self._open = held, done
        return self._open

    def _file_sizes(self) -> dict[str, int]:
        return {PIXELS: int(self.ends[-1]), DONE: len(self.paths)}

    def _check_files(self) -> None:
        """Mapped, a file that is too short would be filled up with zeros, and taken for pictures."""
        for name, size in self._file_sizes().items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{path} is missing or has another size than it was made with; remove {self.folder}.")

    def _compare(self, wanted: Facts, known: Facts) -> None:
        for name, facts in wanted.items():
            if name not in known or known[name][:2] != facts:
                raise ValueError(
                    f"the picture cache {self.folder} was made for other pictures: {name} has been added or changed "
                    "since. Remove it, or name another folder."
                )

    def _make(self, wanted: Facts, workers: int | None) -> None:
        """Write the folder under another name, and rename it: a second process finds all of it or nothing."""
        paths = [Path(self.root, name) for name in wanted]
        sizes = ask_of_each(paths, partial(_scaled_size, short_side=self.short_side), workers)
        if broken := [size for size in sizes if isinstance(size, str)]:
            raise ValueError(f"{broken[0]} Repair or remove it, or leave broken pictures out (--bad-images skip).")
        known = {name: [*facts, *size] for (name, facts), size in zip(wanted.items(), sizes, strict=True)}
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        made = self.folder.parent / f".{self.folder.name}.{uuid4().hex}"
        try:
            made.mkdir()
            _reserve(made / PIXELS, sum(3 * height * width for height, width in sizes))
            _reserve(made / DONE, len(sizes))
            index = {"version": VERSION, "short_side": self.short_side, "pictures": known}
            write_text_atomically(made / INDEX, json.dumps(index))
            made.rename(self.folder)
        except OSError:
            if not self.folder.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _read_index(self) -> Facts:
        try:
            index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            version, short_side, known = index["version"], index["short_side"], dict(index["pictures"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.folder} is no picture cache that can be read; name a folder that does not exist yet."
            ) from error
        if (version, short_side) != (VERSION, self.short_side):
            raise ValueError(
                f"the picture cache {self.folder} holds pictures with a short side of {short_side} pixels; "
                f"{self.short_side} are wanted. Remove it, or name another folder."
            )
        return known


def _root(paths: Sequence[Path]) -> str:
    """The folder that all pictures are in."""
    return os.path.commonpath({str(path.parent) for path in paths})


def _file_facts(path: Path) -> list[int]:
    facts = os.stat(path)
    return [facts.st_size, facts.st_mtime_ns]


def _reserve(path: Path, size: int) -> None:
    """Make a file of zeros, for which there is room: a page that finds none later ends the process."""
    try:
        with open(path, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(
            f"decoded, the pictures take {size / 1e9:.2f} GB, and the disk of {path.parent.parent} has no room for "
            "them; name a folder on another one, or do without the cache."
        ) from error


def _scaled_size(path: Path, short_side: int) -> tuple[int, int]:
    """Height and width of a scaled picture, of which only the head is read."""
    with opened(path) as image:
        width, height = image.size
    scale = min(1.0, short_side / min(width, height))
    return max(1, round(scale * height)), max(1, round(scale * width))


def cut_bytes(picture: Tensor, box: Sequence[float], size: int) -> Tensor:
    """Part of a picture, scaled to `size` x `size`.

    Arguments:
        picture: uint8 of shape `(H, W, 3)`.
        box: Left, top, right and bottom in pixels; rounded.
        size: Height and width of the result.

    Returns:
        uint8 of shape `(size, size, 3)`.
    """
    left, top, right, bottom = map(round, box)
    part = picture[top : max(bottom, top + 1), left : max(right, left + 1)].contiguous()  # as is then the result
    scaled = interpolate(part.movedim(-1, 0)[None], (size, size), mode="bilinear", antialias=True)
    return scaled[0].movedim(0, -1).contiguous()
