"""Tables of measurements: those that a script prints, and those of the page.

python -m benchmarks.speed.tables            # write the tables of benchmarks/speed/README.md anew
python -m benchmarks.speed.tables --check    # only say whether they are up to date
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.pages import markdown_table as table_of
from benchmarks.common.pages import page_command
from benchmarks.speed.results import RESULTS, Row, latest, read_rows

__all__ = ["PAGE", "fill_tables", "markdown_table"]

PAGE = Path(__file__).with_name("README.md")
PENDING = "*Not measured yet.*"


def markdown_table(rows: Sequence[Row]) -> str:
    """The figures of rows; columns that no row fills are left out."""
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
        **{name: [_detail(name, row.details.get(name)) for row in rows] for name in extra},
    }
    return table_of(columns)


def _detail(name: str, value: float | None) -> str:
    """Accuracies with two decimals: they differ by hundredths."""
    return f"{value:.2f}" if value is not None and name == "accuracy %" else _number(value)


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
    return page_command(argv, __doc__, RESULTS, PAGE, lambda page, file: fill_tables(page, read_rows(file)))


if __name__ == "__main__":
    raise SystemExit(main())
