"""Candidates take turns, and what is switched for them is switched back."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.speed.timing import Timing, matmul_precision, peak_mb, time_interleaved

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


@pytest.mark.parametrize(("precision", "allowed"), [("float32", False), ("tf32", True), ("bf16", True)])
def test_precision_is_put_back(precision: str, allowed: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with pytest.raises(RuntimeError), matmul_precision(precision):
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
        raise RuntimeError
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
