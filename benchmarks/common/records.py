"""Records as lines of JSON, which are appended and read, and never rewritten."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["append_lines", "read_lines"]

Record = TypeVar("Record")


def append_lines(path: Path, records: Iterable[Any]) -> None:
    """Append dataclasses to a file of JSON lines: all of them or, if the disk is full, none."""
    text = "".join(json.dumps(asdict(record), allow_nan=False) + "\n" for record in records).encode()
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


def read_lines(path: Path, kind: type[Record], what: str) -> list[Record]:
    """Read a file of JSON lines as dataclasses of a kind; none if there is no such file.

    Arguments:
        path: The file.
        kind: The dataclass; entries that it does not know are left out.
        what: What a line should be, for the error.

    Raises:
        ValueError: If a line is no such record; it says which.
    """
    records, known = [], {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            records.append(kind(**{name: value for name, value in values.items() if name in known}))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} of {path} is not {what}: {error}.") from error
    return records
