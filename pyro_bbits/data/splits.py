"""Labelled image sets that are checked once, when they are made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DataSplits", "Split", "check_fraction", "validation_split"]


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Normalized images with their labels.

    Arguments:
        images: Network inputs, float32 of shape `(N, C, H, W)`, already normalized.
        labels: Class numbers, int64 of shape `(N,)`.

    Raises:
        ValueError: If a shape or dtype differs from the above, the lengths differ, there are no rows, or an
            image holds NaN or infinity (the message names the first such row).
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        _check_tensor("images", self.images, 4, torch.float32)
        _check_tensor("labels", self.labels, 1, torch.int64)
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"images and labels must have one row each per example; got {len(self.images)} images and "
                f"{len(self.labels)} labels."
            )
        if self.images.numel() == 0:
            raise ValueError(f"a split needs at least one image; got shape {tuple(self.images.shape)}.")
        _check_finite(self.images)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split(images={tuple(self.images.shape)}, labels={tuple(self.labels.shape)})"


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set as training needs it: three disjoint splits and what is known about them.

    Arguments:
        name: The name of the data set, e.g. `"mnist"`.
        train: Rows that are trained on.
        validation: Rows taken out of the training rows, for choosing settings.
        test: Rows for the final figures only.
        num_classes: Number of classes; every label lies in `[0, num_classes)`.
        augment: Whether the recipe of this data set crops and mirrors the training images.

    Raises:
        ValueError: If a label is out of range, or the three splits hold images of different shapes.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    augment: bool

    def __post_init__(self) -> None:
        for part, split in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            _check_labels(part, split.labels, self.num_classes)
            shape = tuple(split.images.shape[1:])
            if shape != self.image_shape:
                raise ValueError(
                    f"all splits must hold images of one shape; train has {self.image_shape}, {part} {shape}."
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width


def validation_split(images: Tensor, labels: Tensor, fraction: float, seed: int) -> tuple[Split, Split]:
    """Cut a random part out of the training rows for validation.

    The choice depends on `seed` and the number of rows only, not on torch's global generator. Both parts
    keep the order of the rows they were taken from. The validation part has `round(fraction * N)` rows, but
    at least one and at most `N - 1`.

    Arguments:
        images: Shape `(N, C, H, W)`, float32.
        labels: Shape `(N,)`, int64.
        fraction: Share of the rows that becomes validation, in the open interval `(0, 1)`.
        seed: Seed of the choice.

    Returns:
        The training part and the validation part.

    Raises:
        ValueError: If `fraction` is not inside `(0, 1)`, there are fewer than two rows, or the rows do not
            make a valid `Split`.
    """
    check_fraction(fraction)
    rows = Split(images, labels)
    if len(rows) < 2:
        raise ValueError("a validation split needs at least two rows, one for each part; got 1.")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed), device="cpu")
    size = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
    return _take(rows, order[size:]), _take(rows, order[:size])


def check_fraction(fraction: float) -> None:
    """Refuse a validation share that would leave one of the two parts empty.

    Arguments:
        fraction: The share of the training rows.

    Raises:
        ValueError: If it is not inside `(0, 1)`.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the validation fraction must lie strictly between 0 and 1; got {fraction}.")


def _take(rows: Split, index: Tensor) -> Split:
    index = index.sort().values.to(rows.labels.device)
    return Split(rows.images[index], rows.labels[index])


def _check_tensor(what: str, tensor: Tensor, ndim: int, dtype: torch.dtype) -> None:
    if tensor.ndim != ndim or tensor.dtype != dtype:
        raise ValueError(
            f"{what} must be a {ndim}-dimensional {dtype} tensor; got shape {tuple(tensor.shape)} of {tensor.dtype}."
        )


def _check_finite(images: Tensor) -> None:
    # Extremes pass NaN and infinity on, and need no temporary of the size of the data set.
    low, high = images.flatten(1).aminmax(dim=1)
    wrong = ~(low.isfinite() & high.isfinite())
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"images must be finite; image {row} is the first that holds NaN or infinity.")


def _check_labels(part: str, labels: Tensor, num_classes: int) -> None:
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {num_classes}); label {row} of the {part} split is {int(labels[row])}."
        )
