"""A GPU on which Triton's kernels fail is found out by a trial, and trained on without them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pyro_bbits.kernels as kernels
from pyro_bbits.kernels import availability, eager


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "_found", {})
    monkeypatch.setattr(availability, "HAS_TRITON", True)


def stand_in(monkeypatch: pytest.MonkeyPatch, quantize_row: Any) -> list[int]:
    """Something else in place of the kernels, and how often it is called."""
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return quantize_row(*args, **options)

    monkeypatch.setattr(kernels, "triton_body", SimpleNamespace(quantize_row=counted), raising=False)
    return calls


def test_kernels_that_agree_are_tried_once_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, eager.quantize_row)
    assert [availability.triton_runs(torch.device("cpu")) for _ in range(3)] == [True] * 3
    assert len(calls) == 2


def test_kernels_that_fail_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("Failed to find\nC compiler.")

    stand_in(monkeypatch, fail)
    with pytest.warns(UserWarning, match=r"do not run on cpu \(RuntimeError: Failed to find C compiler.\)") as caught:
        answers = [availability.triton_runs(torch.device("cpu")) for _ in range(3)]
    assert (answers, len(caught)) == ([False] * 3, 1)


def test_kernels_that_are_wrong_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda x, *args, **options: eager.quantize_row(x * 1.1, *args, **options))
    with pytest.warns(UserWarning, match="their results are wrong"):
        assert not availability.triton_runs(torch.device("cpu"))


def test_without_triton_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "HAS_TRITON", False)
    assert not availability.triton_runs(torch.device("cpu"))


@pytest.mark.usefixtures("triton_runs")
def test_the_kernels_themselves_agree(device: str) -> None:
    assert availability.triton_runs(torch.device(device))
