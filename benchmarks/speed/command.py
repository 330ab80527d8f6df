"""What the scripts share: arguments, the processor they run on, and how their rows come about."""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import command_line, hardware, pick_device, versions
from benchmarks.speed.results import RESULTS, Row, append_rows
from benchmarks.speed.tables import markdown_table

__all__ = ["Session", "hardware", "make_parser", "start"]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument(
        "--cudnn-benchmark", action="store_true", help="let cuDNN choose algorithms by trying them (default: by rules)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the script runs, measures nothing")
    parser.add_argument("--output", type=Path, help=f"JSON lines to append to (default: {RESULTS.name}; none if quick)")
    return parser


class Session:
    """One run of a script: device, hardware and command, and the rows measured so far.

    Arguments:
        module: Name of the script's module.
        arguments: Parsed arguments of :func:`make_parser`.
        argv: The arguments as they were given.
    """

    def __init__(self, module: str, arguments: argparse.Namespace, argv: Sequence[str]) -> None:
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        torch.backends.cudnn.benchmark = self.searching = arguments.cudnn_benchmark
        self.device = pick_device(arguments.device)
        self.command = command_line(module, argv)
        self.output: Path | None = arguments.output or (None if arguments.quick else RESULTS)
        self.rows: list[Row] = []

    def add(self, table: str, case: str, variant: str, **figures: Any) -> Row:
        """Add a row; it is on the disk when this returns, so that an interrupted run keeps what it has."""
        row = Row(
            table,
            case,
            f"{variant}, cuDNN tries" if self.searching else variant,
            hardware=hardware(self.device),
            versions=versions(),
            command=self.command,
            date=datetime.now(UTC).date().isoformat(),
            **figures,
        )
        self.rows.append(row)
        if self.output is not None:
            append_rows(self.output, [row])
        return row

    def print_table(self) -> None:
        """Print all rows."""
        print(f"\n{hardware(self.device)}; {', '.join(f'{k} {v}' for k, v in versions().items())}")
        print(f"{self.command}\n\n{markdown_table(self.rows)}")


def start(module: str, parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[Session, Any]:
    """Parse arguments and open the session they ask for; arguments are the shell's if `argv` is None."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(given)
    return Session(module, arguments, given), arguments
