"""What the scripts share: arguments, the processor they run on, and how their rows come about."""

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.results import RESULTS, Row, append_rows
from benchmarks.speed.tables import markdown_table

__all__ = ["Session", "hardware", "make_parser", "start"]

ENVIRONMENT = ("OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "CUDA_VISIBLE_DEVICES")
"""Variables that change what is measured; those that are set become part of the command."""

PACKAGES = ("pyro-bbits", "torch", "triton", "pyro-ppl")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
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
        self.device = _device(arguments.device)
        surroundings = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]
        self.command = " ".join([*surroundings, shlex.join(["python", "-m", module, *argv])])
        self.output: Path | None = arguments.output or (None if arguments.quick else RESULTS)
        self.rows: list[Row] = []

    def add(self, table: str, case: str, variant: str, **figures: Any) -> Row:
        """Add a row; it is on the disk when this returns, so that an interrupted run keeps what it has."""
        row = Row(
            table,
            case,
            variant,
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


def hardware(device: torch.device) -> str:
    """Name of the processor, with the number of threads on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = torch.__version__ if name == "torch" else version(name)
        except PackageNotFoundError:
            continue
    return found


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("device 'cuda' was asked for, but PyTorch sees no GPU; use 'auto' or 'cpu'.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
