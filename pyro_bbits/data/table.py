"""Feature data from comma-separated files."""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pyro_bbits.data.rows import Rows, Task

__all__ = ["Table", "read_table"]


@dataclass
class Table:
    """A file as it is read: a column of targets, all others numbers.

    Attributes:
        path: The file.
        features: Names of the feature columns, in order.
        values: Features, row after row.
        targets: Cells of the target column.
        lines: The line in the file where each row ends.
    """

    path: Path
    features: tuple[str, ...]
    values: array[float] = field(default_factory=lambda: array("d"))
    targets: list[str] = field(default_factory=list)
    lines: array[int] = field(default_factory=lambda: array("q"))

    def rows(self, task: Task) -> Rows:
        """The rows with targets as the task needs them: real numbers, whole numbers, or names if some are none.

        Raises:
            ValueError: If a target does not suit the task.
        """
        inputs = torch.frombuffer(self.values, dtype=torch.float64).view(-1, len(self.features))
        if task == "regression":
            numbers = [_number(cell, self.locate(row), "the target") for row, cell in enumerate(self.targets)]
            return Rows(inputs, torch.tensor(numbers, dtype=torch.float64)[:, None], self.locate)
        return Rows(inputs, self._classes(), self.locate)

    def _classes(self) -> torch.Tensor | list[str]:
        try:
            numbers = [float(cell) for cell in self.targets]
        except ValueError:
            return self.targets
        for row, number in enumerate(numbers):
            if not number.is_integer():
                raise ValueError(
                    f"{self.locate(row)}: class labels must be whole numbers or names; got {self.targets[row]}. "
                    "For real-valued targets choose the task regression (--task regression)."
                )
        return torch.tensor(numbers, dtype=torch.float64).long()

    def locate(self, row: int) -> str:
        """Where a row is."""
        return f"{self.path}, line {self.lines[row]}"


def read_table(path: Path, target: str | None) -> Table:
    """Read a comma-separated file in UTF-8 whose first line names the columns.

    Empty lines are passed over. Cells of the target column may be text; all others must be finite numbers.

    Arguments:
        path: The file.
        target: Name of the column of targets.

    Raises:
        ValueError: If the file cannot be read, names are missing or come twice, there is no target column, no feature
            or no row, a row has another number of cells, or a cell is no finite number. It names line and column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names = [name.strip() for name in next(reader, [])]
            column = _target_column(path, names, target)
            table = Table(path, tuple(name for name in names if name != target))
            for cells in reader:
                if cells:
                    _add(table, cells, names, column, reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as comma-separated text in UTF-8: {error}.") from error
    if not table.targets:
        raise ValueError(f"{path} holds no rows below the line of column names.")
    return table


def _add(table: Table, cells: list[str], names: list[str], column: int, line: int) -> None:
    where = f"{table.path}, line {line}"
    if len(cells) != len(names):
        raise ValueError(f"{where} has {len(cells)} cells; the first line names {len(names)} columns.")
    target = cells[column].strip()
    if not target:
        raise ValueError(f"{where}: the target in column {names[column]!r} is empty; fill it in or remove the row.")
    table.values.extend(_numbers(cells, names, column, where))
    table.targets.append(target)
    table.lines.append(line)


def _numbers(cells: list[str], names: list[str], column: int, where: str) -> Iterator[float]:
    for index, cell in enumerate(cells):
        if index != column:
            yield _number(cell, where, f"column {names[index]!r}")


def _number(cell: str, where: str, what: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        got = repr(cell.strip()) if cell.strip() else "an empty cell"
        raise ValueError(
            f"{where}: {what} must hold finite numbers; got {got}. Encode text as numbers and fill in or remove "
            "what is missing."
        )
    return number


def _target_column(path: Path, names: list[str], target: str | None) -> int:
    known = f"the columns are {', '.join(names)}"
    if not any(names):
        raise ValueError(f"{path} must name its columns in the first line, which is empty.")
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        raise ValueError(f"{path} must separate its columns by commas; its first line is {names[0]!r}.")
    for index, name in enumerate(names):
        if not name:
            raise ValueError(f"{path}: column {index + 1} has no name; if it only counts the rows, remove it.")
        if name in names[:index]:
            raise ValueError(f"{path} has two columns called {name!r}.")
    if target is None:
        raise ValueError(f"{path}: say which column holds the targets (--target COLUMN); {known}.")
    if target not in names:
        raise ValueError(f"{path} has no column {target!r} for the targets; {known}.")
    if len(names) == 1:
        raise ValueError(f"{path} has no column beside the targets {target!r}; at least one feature is needed.")
    return names.index(target)
