"""Candidates take turns, and what cannot be measured is not guessed."""

from collections.abc import Callable

import torch

from benchmarks.speed.timing import Timing, peak_mb, time_interleaved

CPU = torch.device("cpu")


def test_summary_is_median_and_extremes() -> None:
    assert Timing.of([3.0, 1.0, 7.0]) == Timing(3.0, 1.0, 7.0)


def test_candidates_take_turns_in_every_burst() -> None:
    called: list[str] = []

    def note(name: str) -> Callable[[], None]:
        return lambda: called.append(name)

    timings = time_interleaved({name: note(name) for name in "ab"}, CPU, bursts=3, seconds=0.0, warm=1)
    assert "".join(called) == "ab" + "ab" + "ababab"  # warming up, finding the size of a burst, three bursts of one
    assert list(timings) == ["a", "b"]
    assert all(0 <= t.low <= t.ms <= t.high for t in timings.values())


def test_cpu_memory_is_not_guessed() -> None:
    assert peak_mb(lambda: torch.ones(1000), CPU) is None
