"""The page's tables are made of the recorded measurements alone."""

from pathlib import Path
from typing import Any

from benchmarks.speed.results import RESULTS, Row, append_rows, read_rows
from benchmarks.speed.tables import PAGE, fill_tables, main, markdown_table


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
