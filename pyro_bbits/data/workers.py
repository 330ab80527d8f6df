"""Processes that read pictures: how many, how they run, and what they find out of each file."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pyro_bbits.data.pictures import PathBlock

__all__ = ["ask_of_each", "default_workers", "worker_options"]

MOST = 32
AHEAD = 8  # batches that all workers together prepare, at least two each
ASKED_AT_ONCE = 64


def default_workers() -> int:
    """Worker processes of a loader: the cores that this process may use, without one for the process itself.

    The processes of one machine, as torchrun counts them (`LOCAL_WORLD_SIZE`), share its cores. At least 1, at most 32.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sharing = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return min(max(1, cores // max(1, int(sharing) if sharing.isdecimal() else 1) - 1), MOST)


def worker_options(workers: int) -> dict[str, Any]:
    """Arguments of a :class:`~torch.utils.data.DataLoader` whose workers live as long as it does."""
    options: dict[str, Any] = {"num_workers": workers, "generator": torch.Generator()}  # not the global one
    if workers:
        ahead = max(2, AHEAD // workers)
        options |= {"persistent_workers": True, "prefetch_factor": ahead, "worker_init_fn": _outlive_ctrl_c}
    return options


def ask_of_each(paths: Sequence[Path], question: Callable[[Path], Any], workers: int | None = None) -> list[Any]:
    """The answer to a question of each file, in their order; where it raises a `ValueError`, what that says.

    Arguments:
        paths: The files.
        question: A function that another process can import, or a `partial` of one.
        workers: Worker processes; `None` takes one for each core but one.
    """
    options = worker_options(default_workers() if workers is None else workers)
    answers = DataLoader(_Answers(PathBlock(paths), question), ASKED_AT_ONCE, collate_fn=list, **options)
    return [answer for batch in answers for answer in batch]


class _Answers(Dataset[Any]):
    def __init__(self, paths: PathBlock, question: Callable[[Path], Any]) -> None:
        self.paths, self.question = paths, question

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.question(self.paths[index])
        except ValueError as error:
            return str(error)


def _outlive_ctrl_c(worker: int) -> None:
    """A terminal interrupts all its processes; the first of them decides what is still to be read."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
