"""Batches of pictures that worker processes read from disk while the network trains."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pyro_bbits.data.picture_cache import PictureCache, cut_bytes
from pyro_bbits.data.pictures import (
    PathBlock,
    PictureFiles,
    centre_box,
    centre_crop,
    decode,
    pixels,
    random_box,
    read_random_crop,
)
from pyro_bbits.data.plan import BatchLoader, EpochPlan, random_state
from pyro_bbits.data.prefetch import Prefetcher
from pyro_bbits.data.require import require
from pyro_bbits.data.scaling import Scaling
from pyro_bbits.data.workers import ask_of_each, default_workers, worker_options

__all__ = ["IMAGENET_SCALING", "ImageFolderLoader", "OnError", "resized", "without_broken"]

IMAGENET_SCALING = Scaling(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""Mean and deviation of ImageNet's training pictures, which published pretrained weights expect."""

OnError = Literal["raise", "skip"]
Key = tuple[int, int]  # epoch, file


def resized(image_size: int) -> int:
    """Short side that pictures are scaled to before their middle is cut out."""
    return round(image_size * 248 / 224)


class ImageFolderLoader(BatchLoader):
    """Decodes, crops and batches pictures in worker processes.

    Augmented pictures are a random part, scaled to `image_size`, and with `mirror` mirrored with probability 1/2;
    others are scaled to a short side of `resize` and cut in the middle. Of a large JPEG that is augmented only a half,
    a quarter or an eighth of the pixels in each direction is decoded, where the part needs no more; others are always
    decoded whole. What is drawn for a picture depends on `seed`, epoch and the picture's number only, not on the number
    of workers or processes; order, epochs and parts of ranks are those of :class:`~pyro_bbits.data.TensorLoader`.

    With a cache each picture is decoded once only, and scaled down to the short side of `resize`; parts are cut from
    that, several times as fast. They are a little softer then, being scaled twice.

    Workers hand over bytes, which a GPU gets while it works on the batch before; division by 255 and normalization are
    done on the device. Images lie in memory channels last.

    Workers start with the first pass and live as long as the loader; one pass runs at a time.

    Arguments:
        files: The pictures, e.g. `PictureFiles.of("imagenet/train")`.
        batch_size: Pictures in a batch, over all processes.
        shuffle: Whether each epoch has an order of its own; for training.
        seed: Seed of order and augmentation.
        augment: Whether pictures are cropped and mirrored at random.
        mirror: Whether pictures that are cropped are mirrored.
        image_size: Height and width of a batch's images, in pixels.
        resize: Short side before the middle is cut out; `None` for 248 / 224 of `image_size`.
        scaling: Normalization after division by 255.
        workers: Worker processes; 0 decodes in this one, `None` takes one for each core but one and no more than there
            are batches.
        cache: A :class:`~pyro_bbits.data.picture_cache.PictureCache` that has these files, or the folder of one of
            these alone, made if it is missing; `None` decodes them in every epoch. It takes some 250 KB for each
            picture at 224 pixels.
        on_error: What to do about files that cannot be decoded. `raise` ends the pass with the first one. `skip`
            reads all files once when the loader is made, which takes about as long as an epoch, leaves the broken ones
            out (`skipped`) and names them in a warning; the loader then is one of the remaining files: `num_data`, the
            batches and their sizes count no other.
        device: Where batches are moved to; `None` leaves them on the CPU.
        rank: Number of this process, from 0.
        world_size: Number of processes.

    Raises:
        ValueError: If a size is below 1, `workers` is negative, `on_error` is something else, all files are broken, or
            as for :class:`~pyro_bbits.data.EpochPlan`; in a pass, if a file is broken.
        ImportError: If Pillow is not installed.
    """

    def __init__(
        self,
        files: PictureFiles,
        batch_size: int = 128,
        shuffle: bool = False,
        seed: int = 0,
        augment: bool = False,
        *,
        mirror: bool = True,
        image_size: int = 224,
        resize: int | None = None,
        scaling: Scaling = IMAGENET_SCALING,
        workers: int | None = None,
        cache: PictureCache | str | Path | None = None,
        on_error: OnError = "raise",
        device: torch.device | str | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        resize = resized(image_size) if resize is None else resize
        if not 1 <= image_size <= resize:
            raise ValueError(f"1 <= image_size <= resize must hold; got {image_size=}, {resize=}.")
        if workers is not None and workers < 0:
            raise ValueError(f"workers must be at least 0; got {workers}.")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip'; got {on_error!r}.")
        require("PIL.Image")
        self.files, self.skipped = without_broken(files, workers) if on_error == "skip" else (files, ())
        super().__init__(EpochPlan(len(self.files), batch_size, shuffle, seed, rank, world_size))
        self.scaling = scaling
        self.device = torch.device("cpu" if device is None else device)
        self._factor, self._shift = _of_bytes(scaling, self.device)
        if isinstance(cache, str | Path):
            cache = PictureCache(cache, self.files.paths, resize, workers=workers)
        pictures = _Pictures(self.files, image_size, resize, seed if augment else None, mirror, cache)
        workers = min(default_workers(), len(self.plan)) if workers is None else workers
        self._keys = _Keys(self.plan)
        self._loader = DataLoader(
            pictures,
            batch_sampler=self._keys,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            **worker_options(workers),
        )

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._keys.epoch, broken = epoch, []
        batches = iter(Prefetcher(self._loader, self.device))
        for found, labels, broken in batches:
            if broken:
                break
            yield (found * self._factor).add_(self._shift).movedim(-1, 1), labels
        if broken:
            # Ends the workers now; the traceback would keep them, and their queues be collected before them.
            del batches
            self._loader._iterator = None
            raise ValueError(f"{broken[0]} Repair or remove the file, or skip such files (--bad-images skip).")


def _of_bytes(scaling: Scaling, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and shift of each channel that divide by 255 and normalize."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (scaling.mean, scaling.std))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


class _Keys:
    """The batches of an epoch as the data loader hands them to workers: lists of (epoch, file)."""

    def __init__(self, plan: EpochPlan) -> None:
        self.plan, self.epoch = plan, 0

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[Key]]:
        order = self.plan.order(self.epoch).tolist()
        for low, high in self.plan.parts:
            yield [(self.epoch, file) for file in order[low:high]]


class _Pictures(Dataset[Any]):
    """Pixels and label of a picture, or what is wrong with it: an exception from a worker would be a long traceback."""

    def __init__(
        self,
        files: PictureFiles,
        size: int,
        resize: int,
        seed: int | None,
        mirror: bool,
        cache: PictureCache | None,
    ) -> None:
        self.paths, self.labels = PathBlock(files.paths), torch.tensor(files.labels)
        self.cache, self.rows = cache, None if cache is None else cache.rows(files.paths)
        self.size, self.resize = size, resize
        self.seed, self.mirror = seed, mirror  # no seed: not augmented

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor] | str:
        try:
            if self.cache is None or self.rows is None:
                return pixels(self._image(*key)), self.labels[key[1]]
            return self._part(self.cache[int(self.rows[key[1]])], *key), self.labels[key[1]]
        except ValueError as error:
            return str(error)

    def _part(self, picture: Tensor, epoch: int, file: int) -> Tensor:
        height, width, _ = picture.shape
        if self.seed is None:
            return cut_bytes(picture, centre_box(width, height, self.size / self.resize), self.size)
        numbers = random.Random(random_state(self.seed, epoch, "picture", file))
        part = cut_bytes(picture, random_box(width, height, numbers), self.size)
        return part.flip(1) if self.mirror and numbers.random() < 0.5 else part

    def _image(self, epoch: int, file: int) -> Any:
        if self.seed is None:
            return centre_crop(decode(self.paths[file]), self.size, self.resize)
        numbers = random.Random(random_state(self.seed, epoch, "picture", file))
        return read_random_crop(self.paths[file], self.size, numbers, self.mirror)


def _collate(items: list[tuple[Tensor, Tensor] | str]) -> tuple[Tensor, Tensor, list[str]]:
    broken = [item for item in items if isinstance(item, str)]
    if broken:
        return torch.empty(0), torch.empty(0), broken
    images, labels = zip(*items, strict=True)
    return default_collate(list(images)), default_collate(list(labels)), []  # in a worker, into memory that is shared


def _check(path: Path) -> None:
    decode(path)


def without_broken(files: PictureFiles, workers: int | None = None) -> tuple[PictureFiles, tuple[Path, ...]]:
    """Decode every file once and leave out those that cannot be; one warning names each of them.

    Arguments:
        files: The files.
        workers: Worker processes; `None` takes one for each core but one.

    Returns:
        The remaining files, and the broken ones.

    Raises:
        ValueError: If no file, or of some class none, remains.
    """
    faults = ask_of_each(files.paths, _check, workers)
    broken = [row for row, fault in enumerate(faults) if fault is not None]
    if not broken:
        return files, ()
    kept = [row for row, fault in enumerate(faults) if fault is None]
    lost = {files.labels[row] for row in broken} - {files.labels[row] for row in kept}
    if lost:
        names = ", ".join(files.class_names[label] for label in sorted(lost))
        raise ValueError(f"no picture of {names} can be decoded; the first fault: {faults[broken[0]]}")
    warnings.warn(
        f"{len(broken)} of {len(files)} pictures cannot be decoded and are left out: "
        + " ".join(str(faults[row]) for row in broken),
        stacklevel=2,
    )
    return files.take(kept), tuple(files.paths[row] for row in broken)
