"""The record of all measurements: a JSON line each, and the tables of the page made of them.

python -m benchmarks.speed.results            # write the tables of benchmarks/speed/README.md anew
python -m benchmarks.speed.results --check    # only say whether they are up to date
"""

import argparse
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pyro_bbits.files import write_text_atomically

__all__ = ["PAGE", "RESULTS", "Row", "append_rows", "fill_tables", "latest", "markdown_table", "read_rows"]

FOLDER = Path(__file__).parent
RESULTS, PAGE = FOLDER / "results.jsonl", FOLDER / "README.md"
PENDING = "*Not measured yet.*"


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
    text = "".join(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(handle).st_size
        if os.write(handle, text) != len(text):
            os.ftruncate(handle, size)
            raise OSError(f"{path} cannot be written: the disk is full; nothing was appended.")
        os.fsync(handle)
    finally:
        os.close(handle)


def read_rows(path: Path) -> list[Row]:
    """Read a file of JSON lines; none if there is no such file.

    Raises:
        ValueError: If a line is not a row; it says which.
    """
    rows, known = [], {entry.name for entry in fields(Row)}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            rows.append(Row(**{name: value for name, value in values.items() if name in known}))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} of {path} is not a measurement: {error}.") from error
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each key, in the order in which keys first came."""
    return list({row.key: row for row in rows}.values())


def markdown_table(rows: Sequence[Row]) -> str:
    """A Markdown table; columns that no row fills are left out."""
    extra = list(dict.fromkeys(name for row in rows for name in row.details))
    columns = {
        "case": [row.case for row in rows],
        "batch": ["" if row.batch is None else str(row.batch) for row in rows],
        "type": [row.dtype for row in rows],
        "variant": [row.variant for row in rows],
        "ms": [_number(row.ms) for row in rows],
        "lowest to highest": [
            "" if row.ms_low is None else f"{_number(row.ms_low)} to {_number(row.ms_high)}" for row in rows
        ],
        "x plain": [_number(row.ratio_to_plain) for row in rows],
        "x floor": [_number(row.ratio_to_floor) for row in rows],
        "times faster than published": [_number(row.speedup) for row in rows],
        "peak MB": [_number(row.peak_mb) for row in rows],
        **{name: [_number(row.details.get(name)) for row in rows] for name in extra},
    }
    filled = {name: [name, "-" * len(name), *cells] for name, cells in columns.items() if any(cells)}
    widths = [max(map(len, cells)) for cells in filled.values()]
    lines = zip(*filled.values(), strict=True)
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _number(value: float | None) -> str:
    """Three significant digits, or all digits before the point."""
    if value is None:
        return ""
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:.{max(0, 3 - before)}f}"


def fill_tables(page: str, rows: Sequence[Row]) -> str:
    """Replace what stands between `<!-- table: NAME, DEVICE -->` and `<!-- end -->`, for each such pair.

    NAME is a script, and DEVICE `GPU` or `CPU`. Each processor gets a table of its own.
    """

    def fill(match: re.Match[str]) -> str:
        name, wants_gpu = match["name"], match["device"] == "GPU"
        chosen = [row for row in latest(rows) if row.table == name and (" threads" not in row.hardware) == wants_gpu]
        parts = [_described(group) for group in _by_run(chosen)] or [PENDING]
        return match["start"] + "\n" + "\n\n".join(parts) + "\n" + match["end"]

    pattern = r"(?P<start><!-- table: (?P<name>\w+), (?P<device>GPU|CPU) -->).*?(?P<end><!-- end -->)"
    return re.sub(pattern, fill, page, flags=re.DOTALL)


def _by_run(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.hardware, json.dumps(row.versions), row.date), []).append(row)
    return list(groups.values())


def _described(rows: Sequence[Row]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in rows[0].versions.items())
    commands = "; ".join(f"`{command}`" for command in dict.fromkeys(row.command for row in rows))
    return f"{rows[0].hardware}; {versions}; {rows[0].date}. {commands}\n\n{markdown_table(rows)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables of the page, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if tables are old")
    arguments = parser.parse_args(argv)
    page = arguments.page.read_text(encoding="utf-8")
    filled = fill_tables(page, read_rows(arguments.results))
    if arguments.check:
        return int(filled != page)
    write_text_atomically(arguments.page, filled)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
