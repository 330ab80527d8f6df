"""The user's own rows: checked, split where they are not, and normalized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bbits.data.scaling import Scaling
from pyro_bbits.data.splits import DataSplits, Split

__all__ = ["TEST_FRACTION", "Rows", "Task", "hold_out", "make_splits"]

Task = Literal["classification", "regression"]

TEST_FRACTION = 0.2
PARTS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs and targets as a file holds them.

    Arguments:
        inputs: Images `(N, C, H, W)`, uint8 or floating point, or features `(N, D)`, float64.
        targets: Class numbers, int64 `(N,)`; real numbers, float64 `(N, T)`; or class names.
        locate: Says where row `i` is, e.g. `"flowers.csv, line 7"`.
    """

    inputs: Tensor
    targets: Tensor | Sequence[str]
    locate: Callable[[int], str]

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, index: Tensor) -> Rows:
        """The chosen rows, in the order of the index, which know where they came from."""
        kept = index.tolist()
        targets = self.targets[index] if isinstance(self.targets, Tensor) else [self.targets[i] for i in kept]
        return Rows(self.inputs[index], targets, lambda row: self.locate(kept[row]))


def make_splits(
    name: str,
    parts: Mapping[str, Rows],
    task: Task,
    *,
    validation_fraction: float,
    seed: int,
    details: Mapping[str, Any] | None = None,
) -> DataSplits:
    """Turn rows into a data set.

    Rows without a test part (`parts` has the one key `all`) give a fifth of themselves to it, the same ones whatever
    the seed, so that runs with other seeds are tested on the same rows and never on what they were trained on. Without
    a validation part, `validation_fraction` of the training rows become one, chosen by the seed. Both take from each
    class in proportion, and leave each class a row to train on.

    Mean and deviation come from the training rows alone and are applied to all. Images of uint8 are divided by 255
    before. Targets of a regression are normalized too, all columns by one deviation.

    Arguments:
        name: What to call the data set.
        parts: `train`, `test` and perhaps `validation`; or `all`.
        task: Whether targets are classes or real numbers.
        validation_fraction: Share of the training rows that becomes validation.
        seed: Chooses the validation rows and the order of the training rows.
        details: Goes into the data set's description.

    Raises:
        ValueError: If rows or targets are unfit; it names file and row.
    """
    parts, names = _numbered(parts) if task == "classification" else (dict(parts), ())
    if "all" in parts:
        rows = parts.pop("all")
        parts["train"], parts["test"] = hold_out(rows, TEST_FRACTION, seed=0)
    if "validation" not in parts:
        parts["train"], parts["validation"] = hold_out(parts["train"], validation_fraction, seed)
    num_classes = _check_classes(parts, len(names)) if task == "classification" else None
    parts["train"] = parts["train"].take(_order(len(parts["train"]), seed))  # files are often sorted by class
    _check_shapes(parts)
    inputs = {part: _real(parts[part].inputs) for part in PARTS}
    scaling = Scaling.of(inputs["train"])
    targets, target_scaling = _scaled_targets(parts) if num_classes is None else (_targets(parts), None)
    train, validation, test = (Split(scaling(inputs[part]).float(), targets[part]) for part in PARTS)
    return DataSplits(
        name,
        train,
        validation,
        test,
        num_classes,
        input_scaling=scaling,
        target_scaling=target_scaling,
        class_names=names or tuple(map(str, range(num_classes or 0))),
        details=details or {},
    )


def hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Cut about `fraction` of the rows off, from every class in proportion; each class keeps a row at least.

    The choice depends on the seed and the classes alone. Both parts keep the order of the rows.

    Returns:
        The rest and the part cut off.

    Raises:
        ValueError: If there are too few rows.
    """
    classes = rows.targets if isinstance(rows.targets, Tensor) and rows.targets.ndim == 1 else torch.zeros(len(rows))
    order = _order(len(rows), seed)
    order = order[classes[order].argsort(stable=True)]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = classes[order][1:] != classes[order][:-1]
    free = order[~first]
    if not len(free):
        raise ValueError(
            f"{len(rows)} rows are too few to hold some out for validation and test, from {rows.locate(0)} on; each "
            "class needs two at least."
        )
    count = min(max(round(fraction * len(rows)), 1), len(free))
    held = torch.zeros(len(rows), dtype=torch.bool)
    held[free[torch.arange(count) * len(free) // count]] = True
    return rows.take((~held).nonzero().flatten()), rows.take(held.nonzero().flatten())


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")


def _numbered(parts: Mapping[str, Rows]) -> tuple[dict[str, Rows], tuple[str, ...]]:
    """Replace class names by numbers in alphabetical order; numbers stay."""
    main = parts.get("all") or parts["train"]
    if isinstance(main.targets, Tensor):
        for rows in parts.values():
            if not isinstance(rows.targets, Tensor):
                raise ValueError(
                    f"{rows.locate(0)} has the class name {rows.targets[0]!r}, the training rows have numbers; use one "
                    "of both in all parts."
                )
        return dict(parts), ()
    numbers = {name: number for number, name in enumerate(sorted(set(main.targets)))}
    numbered = {}
    for part, rows in parts.items():
        names = rows.targets if not isinstance(rows.targets, Tensor) else list(map(str, rows.targets.tolist()))
        for row, name in enumerate(names):
            if name not in numbers:
                raise ValueError(
                    f"{rows.locate(row)} is of class {name!r}, which the training rows do not have; "
                    f"their classes are {_listed(list(numbers))}."
                )
        numbered[part] = replace(rows, targets=torch.tensor([numbers[name] for name in names], dtype=torch.int64))
    return numbered, tuple(numbers)


def _check_classes(parts: Mapping[str, Rows], known: int) -> int:
    """Number of classes, after seeing that labels are 0 to K-1 and those of the other parts among them."""
    train = _targets(parts)["train"]
    present = train.unique().tolist()
    expected = list(range(max(known, len(present))))
    if len(present) == 1:
        raise ValueError(
            f"a classification needs two classes at least; all {len(train)} training rows are of class {present[0]} "
            f"({parts['train'].locate(0)})."
        )
    for part in PARTS:
        labels = _targets(parts)[part]
        wrong = (labels < 0) | (labels >= len(expected))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"labels must be the numbers 0 to K-1 of the K classes in the training rows, which have "
                f"{_listed(present)}; {parts[part].locate(row)} has {int(labels[row])}. Renumber them, or for real "
                "numbers choose the task regression."
            )
    return len(expected)


def _check_shapes(parts: Mapping[str, Rows]) -> None:
    shape = tuple(parts["train"].inputs.shape[1:])
    for part in PARTS:
        other = tuple(parts[part].inputs.shape[1:])
        if other != shape:
            raise ValueError(
                f"all rows must have one shape; {parts['train'].locate(0)} has {shape}, "
                f"{parts[part].locate(0)} {other}."
            )
        kinds = parts["train"].inputs.dtype, parts[part].inputs.dtype
        if torch.uint8 in kinds and kinds[0] != kinds[1]:  # bytes are divided by 255, other numbers are not
            raise ValueError(
                f"all parts must hold the same kind of numbers; {parts['train'].locate(0)} holds {kinds[0]}, "
                f"{parts[part].locate(0)} {kinds[1]}."
            )


def _targets(parts: Mapping[str, Rows]) -> dict[str, Tensor]:
    tensors = {}
    for part in PARTS:
        targets = parts[part].targets
        assert isinstance(targets, Tensor)
        tensors[part] = targets
    return tensors


def _scaled_targets(parts: Mapping[str, Rows]) -> tuple[dict[str, Tensor], Scaling]:
    targets = _targets(parts)
    mean = Scaling.of(targets["train"]).mean
    deviation = (targets["train"] - torch.tensor(mean, dtype=torch.float64)).square().mean().sqrt().item()
    if not deviation > 1e-12 * max(map(abs, mean)):
        raise ValueError(f"all training rows have the same target, so there is nothing to learn; {mean} in each.")
    scaling = Scaling(mean, (deviation,) * len(mean))
    return {part: scaling(values).float() for part, values in targets.items()}, scaling


def _real(inputs: Tensor) -> Tensor:
    return inputs.float().div_(255) if inputs.dtype == torch.uint8 else inputs


def _listed(values: Sequence[object], limit: int = 10) -> str:
    shown = ", ".join(map(str, values[:limit]))
    return f"{shown}, ... ({len(values)} in all)" if len(values) > limit else shown
