"""Data from NumPy archives."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_bbits.data.rows import Rows, Task

__all__ = ["read_arrays"]

NAMES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
RULE = "an archive needs the arrays x_train, y_train, x_test and y_test (and perhaps x_val, y_val), or x and y"


def read_arrays(path: Path, task: Task) -> dict[str, Rows]:
    """Read an `.npz` archive.

    Inputs are features `(N, D)`, or images `(N, H, W)`, `(N, C, H, W)` or `(N, H, W, C)`; the last is what images are
    taken for if `C`, 1 or 3, fits the last dimension only. Targets are `(N,)`, of a regression also `(N, T)`.

    Arguments:
        path: The archive.
        task: Whether targets are classes or real numbers.

    Returns:
        `train`, `test` and perhaps `validation`; or `all`.

    Raises:
        ValueError: If the file is no archive, an array is missing, or shapes, dtypes or values do not fit. It names
            array and row.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an .npz archive of plain arrays: {error}.") from error
    return {part: _rows(path, arrays, x, y, task) for part, (x, y) in _pairs(path, arrays).items()}


def _pairs(path: Path, arrays: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Names of inputs and targets of each part."""
    found = {}
    for part, endings in NAMES.items():
        for ending in endings:
            x, y = f"x_{ending}", f"y_{ending}"
            if (x in arrays) != (y in arrays):
                raise ValueError(f"{path} holds {x if x in arrays else y} without {y if x in arrays else x}; {RULE}.")
            if x in arrays:
                found[part] = (x, y)
    if {"train", "test"} <= found.keys():
        return found
    if not found and {"x", "y"} <= arrays.keys():
        return {"all": ("x", "y")}
    raise ValueError(f"{RULE}; {path} holds {', '.join(arrays) or 'none'}.")


def _rows(path: Path, arrays: Mapping[str, Any], x: str, y: str, task: Task) -> Rows:
    inputs, targets = _inputs(path, x, arrays[x]), _targets(path, y, arrays[y], task)
    if len(inputs) != len(targets):
        raise ValueError(f"{path}: {x} has {len(inputs)} rows and {y} {len(targets)}; they must have the same.")
    return Rows(inputs, targets, lambda row: f"{path}, row {row} of {y}")


def _inputs(path: Path, name: str, array: Any) -> Tensor:
    where = f"{path}: {name}"
    if array.ndim not in (2, 3, 4) or array.size == 0:
        raise ValueError(
            f"{where} must hold features (N, D) or images (N, H, W), (N, C, H, W) or (N, H, W, C), and at least one "
            f"row; got shape {array.shape}."
        )
    numbers = _numbers(where, array, keep_bytes=array.ndim > 2)
    if array.ndim == 3:
        return numbers.unsqueeze(1)
    if array.ndim == 4 and array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
        return numbers.movedim(-1, 1).contiguous()
    return numbers


def _targets(path: Path, name: str, array: Any, task: Task) -> Tensor | list[str]:
    where = f"{path}: {name}"
    if array.ndim == 2 and (array.shape[1] == 1 or task == "regression"):
        columns = array
    elif array.ndim == 1:
        columns = array[:, None]
    else:
        allowed = "(N,), for a regression also (N, T)"
        raise ValueError(f"{where} must have shape {allowed}; got {array.shape}. One-hot labels: take their argmax.")
    if array.size == 0:
        raise ValueError(f"{where} holds no rows.")
    if array.dtype.kind == "U" and task == "classification":
        return [str(value) for value in columns[:, 0]]
    numbers = _numbers(where, columns)
    if task == "regression":
        return numbers
    uneven = (numbers[:, 0] != numbers[:, 0].round()).nonzero()
    if len(uneven):
        row = int(uneven[0])
        raise ValueError(
            f"{where} must hold whole numbers or names of classes; row {row} has {numbers[row, 0].item()}. For "
            "real-valued targets choose the task regression (--task regression)."
        )
    return numbers[:, 0].long()


def _numbers(where: str, array: Any, keep_bytes: bool = False) -> Tensor:
    if array.dtype.kind not in "buif":
        raise ValueError(f"{where} must hold numbers; got dtype {array.dtype}.")
    if keep_bytes and array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    numbers = torch.from_numpy(array.astype(np.float32 if keep_bytes else np.float64))
    low, high = numbers.flatten(1).aminmax(dim=1)
    wrong = ~(low.isfinite() & high.isfinite())
    if wrong.any():
        raise ValueError(f"{where} must hold finite numbers; row {int(wrong.nonzero()[0])} has NaN or infinity.")
    return numbers
