"""The record of all measurements, a JSON line each."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.records import append_lines, read_lines

__all__ = ["RESULTS", "Row", "append_rows", "latest", "read_rows"]

RESULTS = Path(__file__).with_name("results.jsonl")


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        table: The script that made it: `op`, `step`, `scaling` or `end_to_end`.
        case: What was measured: a tensor and its pass, a network, a data set.
        variant: By which code, and in which mode.
        batch: Samples in a batch; None where there is none.
        dtype: `float32`, `tf32` or `bf16`.
        ms: Median milliseconds: of a pass of an op, a training step, or (end to end) a whole run.
        hardware: Processor, and threads on a CPU.
        versions: Of Python and the packages that matter.
        command: What reproduces it.
        date: Day of the measurement, ISO 8601.
        ms_low: Smallest of the bursts or rounds.
        ms_high: Largest of them.
        ratio_to_plain: Time over that of the plain network (of an op: of a ReLU) in the same mode and run.
        ratio_to_floor: Time over the time that the bytes take which cannot be avoided, at a copy's speed.
        speedup: Time of the published arithmetic in plain PyTorch over this time.
        peak_mb: Most memory above parameters, optimizer state and data in MB; None on a CPU.
        details: Further figures by name.
    """

    table: str
    case: str
    variant: str
    batch: int | None
    dtype: str
    ms: float
    hardware: str
    versions: dict[str, str]
    command: str
    date: str
    ms_low: float | None = None
    ms_high: float | None = None
    ratio_to_plain: float | None = None
    ratio_to_floor: float | None = None
    speedup: float | None = None
    peak_mb: float | None = None
    details: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells measurements apart; of those with one key the last counts."""
        return self.table, self.hardware, self.case, self.batch, self.dtype, self.variant


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a file of JSON lines: all of them or, if the disk is full, none."""
    append_lines(path, rows)


def read_rows(path: Path) -> list[Row]:
    """Read a file of JSON lines; none if there is no such file.

    Raises:
        ValueError: If a line is not a row; it says which.
    """
    return read_lines(path, Row, "a measurement")


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each key, in the order in which keys first came."""
    return list({row.key: row for row in rows}.values())
