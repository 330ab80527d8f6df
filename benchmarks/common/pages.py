"""Markdown tables, and pages whose tables are made of records."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pyro_bbits.files import write_text_atomically

__all__ = ["markdown_table", "write_page"]


def markdown_table(columns: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table of columns by their name; those without a filled cell are left out."""
    filled = {name: [name, "-" * len(name), *cells] for name, cells in columns.items() if any(cells)}
    widths = [max(map(len, cells)) for cells in filled.values()]
    lines = zip(*filled.values(), strict=True)
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def write_page(path: Path, before: str, after: str, *, check: bool) -> int:
    """Write a page that has changed; with `check` only say so, by the exit status 1."""
    if check:
        return int(before != after)
    if before != after:
        write_text_atomically(path, after)
    return 0
