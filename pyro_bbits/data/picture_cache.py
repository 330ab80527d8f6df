"""Pictures decoded once: scaled down, as bytes in one file from which every epoch reads what it needs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from pyro_bbits.data.pictures import PathBlock, decode, pixels
from pyro_bbits.data.require import require
from pyro_bbits.data.workers import default_workers, worker_options
from pyro_bbits.files import write_text_atomically

__all__ = ["PictureCache", "cut_bytes"]

VERSION = 1
INDEX, PIXELS, DONE = "index.json", "pixels.bin", "done.bin"
READ_AT_ONCE = 64


class PictureCache:
    """Scaled pictures in a folder of their own, each written the first time it is asked for.

    A picture whose short side is longer than `short_side` is scaled down to it; others stay as they are. They lie in
    the order of their paths, so that it does not matter how they are split into parts. Where each lies is known from
    its head, so that worker processes, and the processes of a distributed run on one machine, write and read it without
    a word to each other; what two write at once is the same. What is read does not depend on whether it was there
    already.

    Arguments:
        folder: Where it lies; made if it is missing.
        paths: The pictures, in any order.
        short_side: In pixels.
        workers: Processes that read the heads; `None` takes one for each core but one.

    Raises:
        ValueError: If the folder holds other pictures or other files, the disk is too small, or a head cannot be read.
        OSError: If the folder cannot be written.
    """

    def __init__(
        self, folder: str | Path, paths: Sequence[Path], short_side: int, *, workers: int | None = None
    ) -> None:
        ordered = sorted(set(paths))
        self.folder, self.paths, self.short_side = Path(folder), PathBlock(ordered), short_side
        pictures = _digest(ordered)
        if not self.folder.exists():
            self._make(pictures, workers)
        self.sizes = torch.tensor(self._read_index(pictures), dtype=torch.long)
        self.ends = torch.cat([torch.zeros(1, dtype=torch.long), 3 * self.sizes.prod(1).cumsum(0)])
        self._open: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}  # a process that is not forked maps the files itself

    def rows(self, paths: Sequence[Path]) -> Tensor:
        """Number of each picture here, int64.

        Raises:
            ValueError: If one of them is not here.
        """
        known = {path: row for row, path in enumerate(self.paths)}
        if missing := [path for path in paths if path not in known]:
            raise ValueError(f"the picture cache {self.folder} was not made for {missing[0]}.")
        return torch.tensor([known[path] for path in paths])

    def __getitem__(self, index: int) -> Tensor:
        """The pixels of a picture as they lie in the file: uint8 of shape `(H, W, 3)`.

        Raises:
            ValueError: If it is not there yet, and cannot be decoded.
        """
        held, done = self._maps()
        low, high = self.ends[index : index + 2].tolist()
        height, width = self.sizes[index].tolist()
        place = held[low:high].view(height, width, 3)
        if not done[index]:
            place.copy_(self._scaled(index, width, height))
            done[index] = 1
        return place

    def _scaled(self, index: int, width: int, height: int) -> Tensor:
        image = decode(self.paths[index])
        if image.size != (width, height):
            image = image.resize((width, height), require("PIL.Image").Resampling.BILINEAR)
        return pixels(image)

    def _maps(self) -> tuple[Tensor, Tensor]:
        if self._open is None:
            sizes = {PIXELS: int(self.ends[-1]), DONE: len(self.paths)}
            held, done = (
                torch.from_file(str(self.folder / name), shared=True, size=size, dtype=torch.uint8)
                for name, size in sizes.items()
            )
            self._open = held, done
        return self._open

    def _make(self, pictures: str, workers: int | None) -> None:
        """Write the folder under another name, and rename it: a second process finds all of it or nothing."""
        options = worker_options(default_workers() if workers is None else workers)
        heads = DataLoader(_Heads(self.paths, self.short_side), READ_AT_ONCE, collate_fn=list, **options)
        sizes = [size for batch in heads for size in batch]
        if broken := [size for size in sizes if isinstance(size, str)]:
            raise ValueError(broken[0])
        needed = sum(3 * height * width for height, width in sizes)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self.folder.parent).free) < needed:
            raise ValueError(
                f"decoded, the pictures take {needed / 1e9:.1f} GB, and {self.folder.parent} has {free / 1e9:.1f} GB "
                "left; name a folder on another disk, or do without the cache."
            )
        made = self.folder.parent / f".{self.folder.name}.{uuid4().hex}"
        made.mkdir()
        for name, size in ((PIXELS, needed), (DONE, len(sizes))):
            with open(made / name, "wb") as file:
                file.truncate(size)
        facts = {"version": VERSION, "short_side": self.short_side, "pictures": pictures, "sizes": sizes}
        write_text_atomically(made / INDEX, json.dumps(facts))
        try:
            made.rename(self.folder)
        except OSError:  # another process was faster
            shutil.rmtree(made)
            if not self.folder.exists():
                raise

    def _read_index(self, pictures: str) -> list[list[int]]:
        try:
            facts = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            known = facts["version"], facts["short_side"], facts["pictures"]
            sizes: list[list[int]] = facts["sizes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.folder} is no picture cache that can be read; name a folder that does not exist yet."
            ) from error
        if known != (VERSION, self.short_side, pictures):
            raise ValueError(
                f"the picture cache {self.folder} holds other pictures, or the same ones in another size: files were "
                "added, removed or changed, or the image size was. Remove it, or name another folder."
            )
        return sizes


def _digest(paths: Sequence[Path]) -> str:
    """What tells pictures from others: names within their classes, sizes and times of the files."""
    found = hashlib.sha256()
    for path in paths:
        facts = os.stat(path)
        found.update(os.fsencode(f"{path.parent.name}/{path.name} {facts.st_size} {facts.st_mtime_ns}\n"))
    return found.hexdigest()


class _Heads(Dataset[Any]):
    """Height and width of each scaled picture, of which only the head is read; or what is wrong with it."""

    def __init__(self, paths: PathBlock, short_side: int) -> None:
        self.paths, self.short_side = paths, short_side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, int] | str:
        path = self.paths[index]
        try:
            with require("PIL.Image").open(path) as image:
                width, height = image.size
        except (OSError, ValueError, SyntaxError) as error:
            return f"{path} is not a picture that can be read: {error}."
        scale = min(1.0, self.short_side / min(width, height))
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
