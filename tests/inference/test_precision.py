"""The arithmetic of products is set for a run, whatever PyTorch was told before, and put back."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pyro_bbits.inference.precision import matrix_arithmetic

ALL: Any = torch.backends
CUDNN: Any = torch.backends.cudnn
BACKENDS: tuple[Any, ...] = (torch.backends.cuda.matmul, CUDNN.conv, CUDNN.rnn)


def each() -> list[str]:
    return [backend.fp32_precision for backend in BACKENDS]


@pytest.fixture(autouse=True)
def _afterwards_as_before() -> Iterator[None]:
    before = ALL.fp32_precision, each()
    yield
    ALL.fp32_precision = before[0]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for backend, value in zip(BACKENDS, before[1], strict=True):
        backend.fp32_precision = value


def older_names() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = False


def one_backend() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def convolutions_alone() -> None:
    CUDNN.conv.fp32_precision = "ieee"


def everything() -> None:
    ALL.fp32_precision = "tf32"


@pytest.mark.parametrize("told", [lambda: None, older_names, one_backend, convolutions_alone, everything])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_settings_hold_inside_and_come_back(told: Callable[[], None], precision: Any) -> None:
    told()
    before = each()
    with matrix_arithmetic(precision):
        assert set(each()) == {"ieee" if precision == "float32" else "tf32"}
        assert torch.get_float32_matmul_precision() == ("highest" if precision == "float32" else "high")
        assert torch.backends.cudnn.allow_tf32 == (precision != "float32")
    assert each() == before


def test_none_changes_nothing() -> None:
    older_names()
    before = each()
    with matrix_arithmetic(None):
        assert each() == before
