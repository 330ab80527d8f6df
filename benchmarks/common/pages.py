"""Markdown tables, and pages whose tables are made of records."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pyro_bbits.files import write_text_atomically

__all__ = ["markdown_table", "page_command", "write_page"]


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


def page_command(
    argv: Sequence[str] | None, description: str | None, results: Path, page: Path, fill: Callable[[str, Path], str]
) -> int:
    """A command that writes the tables of a page, or checks them.

    Arguments:
        argv: Its arguments; None for those of the shell.
        description: What `--help` says.
        results: The records, unless others are named.
        page: The page, unless another one is named.
        fill: Makes the new page of the old one and the file of records.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--page", type=Path, default=page)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if tables are old")
    arguments = parser.parse_args(argv)
    before = arguments.page.read_text(encoding="utf-8")
    return write_page(arguments.page, before, fill(before, arguments.results), check=arguments.check)
