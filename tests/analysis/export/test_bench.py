"""The table of a benchmark puts files side by side, and says where BOPs promise more."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from pyro_bbits.analysis.export import BenchRow, bench, save_rows


def row(form: str, batch: int, speedup: float, bops: float) -> BenchRow:
    return BenchRow(
        network="net",
        format=form,
        threads=1,
        batch=batch,
        latency_ms=10 / speedup,
        speedup_vs_fp32_onnx=speedup,
        size_bytes=2048,
        size_ratio=2.0,
        accuracy_float=99.0,
        accuracy_file=98.5,
        agreement_exact=None if form == "fp32" else 1.0,
        relative_bops=bops,
        session_mode="fused",
        hardware="a processor",
        runtime="onnxruntime",
        command="bbits bench",
        date="2026-01-01",
    )


ROWS = [row("fp32", 1, 1.0, 100.0), row("int8", 1, 3.0, 2.0), row("fp32", 8, 1.0, 100.0), row("int8", 8, 80.0, 2.0)]


def test_a_file_is_one_line_with_a_column_for_each_batch() -> None:
    console = Console(width=200)
    with console.capture() as printed:
        console.print(bench.bench_table(ROWS))
    (line,) = [line for line in printed.get().splitlines() if "int8" in line]
    assert line.split() == ["int8", "2.0", "2.0x", "3.333", "0.125", "3.00x", "80.00x", "98.50", "100.00", "2.000"]


def test_a_regression_has_its_error_in_place_of_an_accuracy() -> None:
    console = Console(width=200)
    with console.capture() as printed:
        console.print(bench.bench_table([replace(each, accuracy_file=None, rmse_file=0.25) for each in ROWS]))
    assert "RMSE" in printed.get() and "accuracy" not in printed.get() and printed.get().count("0.2500") == 2


def test_a_file_that_was_not_timed_has_no_latency() -> None:
    untimed = [replace(ROWS[1], format="packed", batch=None, latency_ms=None, speedup_vs_fp32_onnx=None)]
    console = Console(width=200)
    with console.capture() as printed:
        console.print(bench.bench_table([*ROWS, *untimed]))
    (line,) = [line for line in printed.get().splitlines() if "packed" in line]
    assert line.split() == ["packed", "2.0", "2.0x", "98.50", "100.00", "2.000"]
    assert bench.honest_lines([*ROWS, *untimed]) == bench.honest_lines(ROWS)


def test_only_what_bops_promise_and_the_machine_does_not_give_is_said() -> None:
    lines = bench.honest_lines(ROWS)
    assert lines[0] == "int8, batch 1: 50.0 times fewer BOPs, 3.00 times as fast here"
    assert len(lines) == 2 and "smaller, not faster" in lines[1]
    assert not bench.honest_lines(ROWS[2:])


def test_rows_are_appended_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    save_rows(ROWS[:1], path)
    save_rows(ROWS[1:], path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [asdict(each) for each in ROWS]
