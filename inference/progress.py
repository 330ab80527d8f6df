"""Live progress of a training run on the console."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pyro_bbits.inference.history import EpochRecord

__all__ = ["Reporter", "describe_epoch", "report_progress"]

LINES = 20
"""Epochs that leave a line on the console, about."""

Reporter = Callable[[EpochRecord | None, float], None]
"""Called after a step with None and the running loss, after an epoch with its record."""


def describe_bits(bits: tuple[int, ...]) -> str:
    """Histogram of widths, e.g. `2b x5 4b x2`."""
    return " ".join(f"{b}b x{n}" for b, n in sorted(Counter(bits).items()))


def describe_epoch(record: EpochRecord) -> str:
    """One line about an epoch."""
    parts = [f"loss {record.loss:7.4f}"]
    if record.validation_accuracy is not None:
        parts.append(f"held-out accuracy {record.validation_accuracy:6.2f} %")
    elif record.validation_nll is not None:
        parts.append(f"held-out nll {record.validation_nll:7.4f}")
    if record.expected_bops is not None:
        parts.append(f"E[BOPs] {record.expected_bops:6.3f} %")
    if record.bits:
        parts.append(f"bits {describe_bits(record.bits)}")
    return "  ".join(parts)


@contextmanager
def report_progress(epochs: int, steps: int, enabled: bool, title: str, completed: int = 0) -> Iterator[Reporter]:
    """A progress bar over all steps, and a line for about every twentieth of the epochs.

    Arguments:
        epochs: Epochs of the run.
        steps: Steps per epoch.
        enabled: Whether to show anything.
        title: What is being trained.
        completed: Epochs that an earlier part of the run has completed.
    """
    console = Console(quiet=not enabled, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    every = max(1, epochs // LINES)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal or not enabled) as bar:
        task: TaskID = bar.add_task(title, total=epochs * steps, completed=completed * steps, status="")

        def report(record: EpochRecord | None, loss: float) -> None:
            if record is None:
                bar.advance(task)
                return
            bar.update(task, status=describe_epoch(record))
            if record.epoch % every == 0 or record.epoch in (1, epochs):
                console.print(f"{title} {record.epoch:4d}/{epochs}  {describe_epoch(record)}", highlight=False)

        yield report
