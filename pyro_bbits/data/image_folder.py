"""Pictures read from disk by worker processes while the network trains, as for ImageNet."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pyro_bbits.data.crops import AUGMENTATIONS, augmentation
from pyro_bbits.data.picture_cache import PictureCache, cut_bytes
from pyro_bbits.data.pictures import (
    PathBlock,
    PictureFiles,
    centre_box,
    centre_crop,
    decode,
    find_pictures,
    pixels,
    random_box,
    read_random_crop,
)
from pyro_bbits.data.plan import BatchLoader, EpochPlan, random_state
from pyro_bbits.data.prefetch import Prefetcher
from pyro_bbits.data.require import require
from pyro_bbits.data.rows import TEST_FRACTION, Rows, hold_out
from pyro_bbits.data.scaling import Scaling
from pyro_bbits.data.splits import Loaders, check_fraction
from pyro_bbits.data.workers import ask_of_each, default_workers, worker_options
from pyro_bbits.settings import Augmentation

__all__ = ["IMAGENET_SCALING", "ImageFolderData", "ImageFolderLoader", "without_broken"]

IMAGENET_SCALING = Scaling(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""Mean and deviation of ImageNet's training pictures, which published pretrained weights expect."""

EVALUATION_BATCH = 128

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


@dataclass(frozen=True, eq=False)
class ImageFolderData:
    """A data set of pictures that stay on disk; :class:`~pyro_bbits.data.DataSplits` is its like in memory.

    Arguments:
        name: Where it lies.
        train: Pictures that are trained on.
        validation: Pictures for choosing settings.
        test: Pictures for the final figures only.
        image_size: Height and width of what the network sees, in pixels.
        augment: Whether training pictures are cropped and mirrored at random.
        mirror: Whether those that are cropped are mirrored.
        workers: Worker processes of each loader; `None` takes one for each core but one.
        cache: Folder that keeps the decoded pictures of all parts; `None` decodes them in every epoch.
        scaling: Normalization after division by 255.
        skipped: Files left out because they cannot be decoded.
    """

    name: str
    train: PictureFiles
    validation: PictureFiles
    test: PictureFiles
    image_size: int = 224
    augment: bool = True
    mirror: bool = field(default=True, kw_only=True)
    workers: int | None = None
    cache: Path | None = field(default=None, kw_only=True)
    scaling: Scaling = IMAGENET_SCALING
    skipped: tuple[Path, ...] = ()

    likelihood: Literal["categorical"] = "categorical"
    target_scaling: None = None

    @classmethod
    def open(
        cls,
        root: str | Path,
        *,
        image_size: int = 224,
        validation_fraction: float = 0.1,
        seed: int = 0,
        workers: int | None = None,
        cache: str | Path | None = None,
        on_error: OnError = "raise",
    ) -> ImageFolderData:
        """Find the pictures of a folder and split them where it does not.

        Missing parts are cut off as :func:`~pyro_bbits.data.load_data` does it.

        Arguments:
            root: `ROOT/train/CLASS/*` with `ROOT/validation` and `ROOT/test`, or `ROOT/CLASS/*`.
            image_size: Height and width of what the network sees, in pixels.
            validation_fraction: Share of the training pictures that becomes validation, where there is none.
            seed: Chooses them.
            workers: Worker processes of each loader; `None` takes one for each core but one.
            cache: Folder that keeps decoded pictures, made if it is missing; see :class:`ImageFolderLoader`.
            on_error: As for :class:`ImageFolderLoader`; `skip` reads every picture once, now.

        Raises:
            ValueError: If the folder is no such folder, or the parts differ in their classes.
            ImportError: If Pillow is not installed.
        """
        check_fraction(validation_fraction)
        require("PIL.Image")
        parts, skipped = find_pictures(root), list[Path]()
        if on_error == "skip":
            for part, files in parts.items():
                parts[part], broken = without_broken(files, workers)
                skipped += broken
        if "all" in parts:
            parts["train"], parts["test"] = _hold_out(parts["all"], TEST_FRACTION, 0)
        if "validation" not in parts:
            parts["train"], parts["validation"] = _hold_out(parts["train"], validation_fraction, seed)
        # so that the first pictures, which set initial ranges, are of all classes
        order = torch.randperm(len(parts["train"]), generator=torch.Generator().manual_seed(seed), device="cpu")
        train = parts["train"].take(order.tolist())
        return cls(
            str(root),
            train,
            parts["validation"],
            parts["test"],
            image_size=image_size,
            workers=workers,
            cache=None if cache is None else Path(cache),
            skipped=tuple(skipped),
        )

    def augmented(self, how: Augmentation) -> ImageFolderData:
        """The same data, with training pictures augmented in a way that has a name.

        Raises:
            ValueError: If it is one for images in memory.
        """
        if "cutout" in (fields := AUGMENTATIONS[how]):
            raise ValueError(f"{how} is for images in memory; with an image size take crop-flip.")
        return replace(self, **fields)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called, in the order of their numbers."""
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def num_outputs(self) -> int:
        """Number of logits."""
        return self.num_classes

    @property
    def num_data(self) -> int:
        """Number of training pictures, the `N` of the objective."""
        return len(self.train)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the network sees."""
        return 3, self.image_size, self.image_size

    def example_inputs(self, count: int) -> Tensor:
        """Training pictures without augmentation, to set initial ranges by."""
        files = self.train.take(range(min(count, len(self.train))))
        return next(iter(self._loader(files, len(files), workers=0)))[0]

    def loaders(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        rank: int = 0,
        world_size: int = 1,
        share_evaluation: bool = False,
    ) -> Loaders:
        """Batches of the three splits; arguments as for :meth:`DataSplits.loaders`."""
        place: dict[str, Any] = {"device": device, "rank": rank, "world_size": world_size}
        cache = self._cache()
        options: dict[str, Any] = {"shuffle": True, "seed": seed, "augment": self.augment, "cache": cache}
        train = self._loader(self.train, batch_size, **options | place)
        size = -(-EVALUATION_BATCH // world_size) * world_size
        place = place if share_evaluation else {"device": device}
        held_out = (self._loader(files, size, cache=cache, **place) for files in (self.validation, self.test))
        return Loaders(train, *held_out)

    def _cache(self) -> PictureCache | None:
        if self.cache is None:
            return None
        paths = [path for files in (self.train, self.validation, self.test) for path in files.paths]
        return PictureCache(self.cache, paths, resized(self.image_size), workers=self.workers)

    def _loader(self, files: PictureFiles, batch_size: int, **options: Any) -> ImageFolderLoader:
        fixed: dict[str, Any] = {name: getattr(self, name) for name in ("image_size", "mirror", "scaling", "workers")}
        return ImageFolderLoader(files, batch_size, **fixed | options)

    def description(self) -> dict[str, Any]:
        """As :meth:`DataSplits.description`."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "data": self.name,
            "task": "classification",
            "input_shape": list(self.input_shape),
            "num_outputs": self.num_outputs,
            "class_names": list(self.class_names),
            "rows": {part: len(files) for part, files in parts.items()},
            "augment": augmentation(self),
            "input_scaling": self.scaling.to_dict(),
            "target_scaling": None,
            "skipped": [str(path) for path in self.skipped],
        }


def _hold_out(files: PictureFiles, fraction: float, seed: int) -> tuple[PictureFiles, PictureFiles]:
    rows = Rows(torch.arange(len(files)), torch.tensor(files.labels), lambda row: str(files.paths[row]))
    rest, held = hold_out(rows, fraction, seed)
    return files.take(rest.inputs.tolist()), files.take(held.inputs.tolist())
