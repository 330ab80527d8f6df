"""Measurements are kept line by line, and come back as they were."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.results import Row, append_rows, latest, read_rows

REQUIRED = {"case", "variant", "batch", "dtype", "ms", "ratio_to_plain", "peak_mb", "hardware", "versions", "command"}


def row(**values: Any) -> Row:
    given: dict[str, Any] = {
        "table": "op",
        "case": "8x8",
        "variant": "eager",
        "batch": 8,
        "dtype": "float32",
        "ms": 1.5,
        "hardware": "Some CPU, 2 threads",
        "versions": {"torch": "2.13"},
        "command": "python -m benchmarks.speed.op",
        "date": "2026-01-31",
    }
    return Row(**given | values)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    rows = [row(), row(batch=None, ratio_to_plain=1.25, peak_mb=3.5, details={"seconds": 2.0}), row(ms=1 / 3)]
    append_rows(path, rows[:1])
    append_rows(path, rows[1:])
    assert read_rows(path) == rows
    assert all(json.loads(line).keys() >= REQUIRED | {"date"} for line in path.read_text().splitlines())


def test_figures_that_are_no_numbers_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_rows(path, [row()])
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_rows(path, [row(), row(ms=float("nan"))])
    assert read_rows(path) == [row()]


@pytest.mark.parametrize("line", ["{", "[]", '{"table": "op"}', '"text"'])
def test_broken_lines_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    append_rows(path, [row()])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"line 2 of .*results.jsonl is not a measurement"):
        read_rows(path)


def test_the_last_measurement_of_a_kind_counts() -> None:
    old, other, new = row(ms=1.0), row(variant="triton"), row(ms=2.0, date="2026-02-01")
    assert latest([old, other, new]) == [new, other]
    assert len(latest([old, replace(old, hardware="Another, 2 threads"), replace(old, batch=4)])) == 3
