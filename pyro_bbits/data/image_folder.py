"""A data set of pictures that stay on disk, as ImageNet is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bbits.data.crops import AUGMENTATIONS, augmentation
from pyro_bbits.data.picture_cache import PictureCache
from pyro_bbits.data.picture_loader import IMAGENET_SCALING, ImageFolderLoader, OnError, resized, without_broken
from pyro_bbits.data.pictures import PictureFiles, find_pictures
from pyro_bbits.data.require import require
from pyro_bbits.data.rows import TEST_FRACTION, Rows, hold_out
from pyro_bbits.data.scaling import Scaling
from pyro_bbits.data.splits import Loaders, check_fraction
from pyro_bbits.settings import Augmentation

__all__ = ["ImageFolderData"]

EVALUATION_BATCH = 128


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
