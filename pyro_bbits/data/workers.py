"""Processes that read pictures: how many, and how they run."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

__all__ = ["default_workers", "worker_options"]

MOST = 32
AHEAD = 8  # batches that all workers together prepare, at least two each


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


def _outlive_ctrl_c(worker: int) -> None:
    """A terminal interrupts all its processes; the first of them decides what is still to be read."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
