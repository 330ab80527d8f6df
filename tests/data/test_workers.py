"""Workers by default: the cores this process may use but one, shared by the processes of a machine."""

import os
from pathlib import Path

import pytest

from pyro_bbits.data.workers import ask_of_each, default_workers, worker_options


@pytest.mark.parametrize(
    ("cores", "processes", "expected"),
    [(1, "1", 1), (2, "1", 1), (16, "1", 15), (16, "2", 7), (16, "16", 1), (8, "64", 1), (256, "1", 32), (8, "x", 7)],
)
def test_each_core_but_one_has_a_worker(
    cores: int, processes: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert default_workers() == expected


def test_where_cores_cannot_be_reserved_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for count, expected in ((6, 5), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert default_workers() == expected


def test_many_workers_prepare_no_more_than_two_batches_each() -> None:
    assert [worker_options(count)["prefetch_factor"] for count in (1, 2, 4, 15)] == [8, 4, 2, 2]
    assert "prefetch_factor" not in worker_options(0)


def length_of_short_name(path: Path) -> int:
    if len(path.name) > 5:
        raise ValueError(f"{path.name} is too long")
    return len(path.name)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_each_file_is_asked_in_order_and_faults_are_told(workers: int) -> None:
    paths = [Path("folder", "x" * (1 + i % 6)) for i in range(150)]
    expected = ["xxxxxx is too long" if i % 6 == 5 else 1 + i % 6 for i in range(150)]
    assert ask_of_each(paths, length_of_short_name, workers) == expected
    assert ask_of_each([], length_of_short_name, workers) == []
