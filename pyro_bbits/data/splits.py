"""Data sets held in memory, checked once, when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_bbits.data.crops import AUGMENTATIONS, augmentation
from pyro_bbits.data.loader import TensorLoader
from pyro_bbits.data.plan import BatchLoader
from pyro_bbits.data.scaling import Scaling
from pyro_bbits.settings import Augmentation

__all__ = ["DataSplits", "Loaders", "Split", "check_fraction", "validation_split"]

EVALUATION_BATCH = 512
MOST_EVALUATED, EVALUATION_NUMBERS = 4 * EVALUATION_BATCH, EVALUATION_BATCH * 3 * 32 * 32
"""Rows and numbers in a batch of held-out rows, if these are small: such batches leave a GPU waiting for Python."""
PADDED_SHARE, CUTOUT_SHARE = 8, 2  # 4 pixels and 16 of 32, as is usual for CIFAR-10


class Loaders(NamedTuple):
    """Batches of the three splits."""

    train: BatchLoader
    validation: BatchLoader
    test: BatchLoader


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Normalized inputs with their targets.

    Arguments:
        inputs: Network inputs, float32, already normalized: images `(N, C, H, W)` or features `(N, D)`.
        targets: Class numbers, int64 of shape `(N,)`, or real numbers, float32 of shape `(N, T)`.

    Raises:
        ValueError: If a shape or dtype differs from the above, the lengths differ, there are no rows, or an
            input or target is NaN or infinite (the message names the first such row).
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        _check_tensor("inputs", self.inputs, {(4, torch.float32), (2, torch.float32)})
        _check_tensor("targets", self.targets, {(1, torch.int64), (2, torch.float32)})
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"inputs and targets must have one row each per example; got {len(self.inputs)} inputs and "
                f"{len(self.targets)} targets."
            )
        for what, tensor in (("input", self.inputs), ("target", self.targets)):
            if tensor.numel() == 0:
                raise ValueError(f"a split needs at least one {what}; got shape {tuple(tensor.shape)}.")
            if tensor.is_floating_point():
                _check_finite(what, tensor)

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        return f"Split(inputs={tuple(self.inputs.shape)}, targets={tuple(self.targets.shape)})"


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set as training needs it: three disjoint splits and what is known about them.

    Arguments:
        name: The name of the data set, e.g. `"mnist"`, or where it lies.
        train: Rows that are trained on.
        validation: Rows for choosing settings.
        test: Rows for the final figures only.
        num_classes: Number of classes; every label lies in `[0, num_classes)`. `None` for regression.
        augment: Whether training images are padded with black by an eighth of their width, cropped at random back to
            their size, and mirrored.
        mirror: Whether images that are augmented are mirrored, left to right with probability 1/2.
        cutout: Whether a random square of half their width is painted black in images that are augmented.
        input_scaling: How the inputs were normalized, images after division by 255.
        target_scaling: How the targets of a regression were normalized; all columns share one deviation.
        class_names: What the classes are called, in the order of their numbers.
        details: What else a reader of the results should know.

    Raises:
        ValueError: If a label is out of range, targets are not of the task's kind, the three splits hold inputs or
            targets of different shapes, or features are to be augmented.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int | None
    augment: bool = False
    mirror: bool = field(default=True, kw_only=True)
    cutout: bool = field(default=False, kw_only=True)
    input_scaling: Scaling | None = None
    target_scaling: Scaling | None = None
    class_names: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part, split in self._parts():
            self._check_targets(part, split.targets)
            shape = tuple(split.inputs.shape[1:])
            if shape != self.input_shape:
                raise ValueError(
                    f"all splits must hold inputs of one shape; train has {self.input_shape}, {part} {shape}."
                )
        if self.augment and len(self.input_shape) != 3:
            name, features = augmentation(self), self.input_shape[0]
            raise ValueError(f"{name} augmentation is for images; {self.name} holds {features} features a row.")

    def augmented(self, how: Augmentation) -> DataSplits:
        """The same data, with training images augmented in a way that has a name.

        Raises:
            ValueError: If the rows hold features.
        """
        return replace(self, **AUGMENTATIONS[how])

    def _parts(self) -> tuple[tuple[str, Split], ...]:
        return (("train", self.train), ("validation", self.validation), ("test", self.test))

    def _check_targets(self, part: str, targets: Tensor) -> None:
        if self.num_classes is None:
            if not targets.is_floating_point() or targets.shape[1] != self.num_outputs:
                raise ValueError(
                    f"a data set without num_classes is a regression: targets must be float32 (N, {self.num_outputs}) "
                    f"in all splits; {part} has {targets.dtype} {tuple(targets.shape)}."
                )
        elif targets.is_floating_point():
            raise ValueError(f"a data set with num_classes needs int64 labels; {part} has {targets.dtype}.")
        else:
            _check_labels(part, targets, self.num_classes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample: channels, height and width of an image, or the number of features."""
        return tuple(self.train.inputs.shape[1:])

    @property
    def num_outputs(self) -> int:
        """Numbers that a network returns for a sample: one per class, or per column of a regression's targets."""
        if self.num_classes is not None:
            return self.num_classes
        return self.train.targets[0].numel()

    @property
    def num_data(self) -> int:
        """Number of training rows, the `N` of the objective."""
        return len(self.train)

    @property
    def likelihood(self) -> Literal["categorical", "normal"]:
        """The likelihood that fits the targets."""
        return "normal" if self.num_classes is None else "categorical"

    def example_inputs(self, count: int) -> Tensor:
        """The first training inputs, to set initial ranges by."""
        return self.train.inputs[:count]

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
        """Batches of the three splits, on a device.

        Arguments:
            batch_size: Training rows in a batch, over all processes.
            seed: Seed of order and augmentation.
            device: Where the data are kept.
            rank: Number of this process, from 0.
            world_size: Number of processes that share each training batch; see
                :class:`~pyro_bbits.data.EpochPlan`.
            share_evaluation: Whether they share validation and test rows as well. Otherwise each sees all.

        Raises:
            ValueError: If the batch cannot be shared as asked for.
        """
        black = None if self.input_scaling is None else self.input_scaling.black
        train = TensorLoader(
            self.train.inputs,
            self.train.targets,
            batch_size,
            shuffle=True,
            seed=seed,
            augment=self.augment,
            device=device,
            pad_value=black if self.augment else None,
            padding=self.input_shape[-1] // PADDED_SHARE,
            mirror=self.mirror,
            cutout=self.input_shape[-1] // CUTOUT_SHARE if self.augment and self.cutout else 0,
            rank=rank,
            world_size=world_size,
        )
        shared: dict[str, Any] = {"rank": rank, "world_size": world_size} if share_evaluation else {}
        small = min(MOST_EVALUATED, EVALUATION_NUMBERS // math.prod(self.input_shape))
        rows = max(EVALUATION_BATCH, small)
        size = -(-rows // world_size) * world_size
        held_out = (
            TensorLoader(split.inputs, split.targets, size, device=device, **shared)
            for split in (self.validation, self.test)
        )
        return Loaders(train, *held_out)

    def description(self) -> dict[str, Any]:
        """What is needed to use a trained network on new data, and where the rows came from; for a JSON file."""
        scalings = {"input_scaling": self.input_scaling, "target_scaling": self.target_scaling}
        return {
            "data": self.name,
            "task": "regression" if self.num_classes is None else "classification",
            "input_shape": list(self.input_shape),
            "num_outputs": self.num_outputs,
            "class_names": list(self.class_names),
            "rows": {part: len(split) for part, split in self._parts()},
            "augment": augmentation(self),
            **{name: None if scaling is None else scaling.to_dict() for name, scaling in scalings.items()},
            **self.details,
        }


def validation_split(inputs: Tensor, targets: Tensor, fraction: float, seed: int) -> tuple[Split, Split]:
    """Cut a random part out of the training rows for validation.

    The choice depends on `seed` and the number of rows only, not on torch's global generator. Both parts
    keep the order of the rows they were taken from. The validation part has `round(fraction * N)` rows, but
    at least one and at most `N - 1`.

    Arguments:
        inputs: Shape `(N, C, H, W)` or `(N, D)`, float32.
        targets: Shape `(N,)`, int64, or `(N, T)`, float32.
        fraction: Share of the rows that becomes validation, in the open interval `(0, 1)`.
        seed: Seed of the choice.

    Returns:
        The training part and the validation part.

    Raises:
        ValueError: If `fraction` is not inside `(0, 1)`, there are fewer than two rows, or the rows do not
            make a valid `Split`.
    """
    check_fraction(fraction)
    rows = Split(inputs, targets)
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
    index = index.sort().values.to(rows.targets.device)
    return Split(rows.inputs[index], rows.targets[index])


def _check_tensor(what: str, tensor: Tensor, kinds: set[tuple[int, torch.dtype]]) -> None:
    if (tensor.ndim, tensor.dtype) not in kinds:
        rule = " or ".join(f"a {ndim}-dimensional {dtype} tensor" for ndim, dtype in sorted(kinds, key=str))
        raise ValueError(f"{what} must be {rule}; got shape {tuple(tensor.shape)} of {tensor.dtype}.")


def _check_finite(what: str, tensor: Tensor) -> None:
    # Extremes pass NaN and infinity on, and need no temporary of the size of the data set.
    low, high = tensor.flatten(1).aminmax(dim=1)
    wrong = ~(low.isfinite() & high.isfinite())
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"{what}s must be finite; {what} {row} is the first that holds NaN or infinity.")


def _check_labels(part: str, labels: Tensor, num_classes: int) -> None:
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must lie in [0, {num_classes}); label {row} of the {part} split is {int(labels[row])}."
        )
