"""Measurements are kept line by line, and the page's tables are made of them alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.results import (
    PAGE,
    RESULTS,
    Row,
    append_rows,
    fill_tables,
    latest,
    main,
    markdown_table,
    read_rows,
)

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


def test_table_shows_what_rows_hold() -> None:
    lines = markdown_table([row(ms=0.01234, details={"seconds": 4.0}), row(ms=12345.6, ratio_to_plain=1.0)]).split("\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["case", "batch", "type", "variant", "ms", "x plain", "seconds"]
    assert set("".join(cells[1])) == {"-"}
    assert cells[2:] == [
        ["8x8", "8", "float32", "eager", "0.0123", "", "4.00"],
        ["8x8", "8", "float32", "eager", "12346", "1.00", ""],
    ]


def test_tables_stand_between_their_markers_by_kind_of_processor() -> None:
    page = "a\n<!-- table: op, GPU -->old<!-- end -->\nb\n<!-- table: op, CPU -->\n<!-- end -->\nc\n"
    rows = [row(), row(hardware="Some GPU", case="big"), row(table="step", case="net")]
    filled = fill_tables(page, rows)
    gpu, cpu = filled.split("\nb\n")
    assert "big" in gpu and "8x8" not in gpu and "old" not in filled and "Some GPU; torch 2.13; 2026-01-31." in gpu
    assert "8x8" in cpu and "big" not in cpu and "net" not in filled
    assert fill_tables(filled, rows) == filled
    assert fill_tables(filled, []).count("Not measured yet.") == 2
    assert (filled.startswith("a\n"), filled.endswith("\nc\n")) == (True, True)


def test_page_is_written_and_checked(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_text("<!-- table: op, CPU --><!-- end -->")
    append_rows(results, [row()])
    options = ["--page", str(page), "--results", str(results)]
    assert main([*options, "--check"]) == 1
    assert main(options) == 0
    assert "| 8x8" in page.read_text()
    assert main([*options, "--check"]) == 0


def test_committed_page_shows_the_committed_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert fill_tables(page, read_rows(RESULTS)) == page
