"""The audit names each operation that a CUDA graph cannot hold, and where it was asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_bbits.inference.capture_audit import HostReadError, HostReads

X = torch.arange(1.0, 5.0)


def branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


class Sum(torch.autograd.Function):
    """Reads its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = x.shape
        return x.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return torch.full(ctx.size, float(grads[0]))


def backward_pass(x: Tensor) -> None:
    loss: Tensor = Sum.apply(x.clone().requires_grad_())
    loss.backward()


@pytest.mark.parametrize(
    ("program", "operation"),
    [
        (lambda x: x.sum().item(), "aten::_local_scalar_dense"),
        (branch, "aten::_local_scalar_dense"),
        (lambda x: torch.equal(x, x + 1), "aten::equal"),
        (lambda x: x.nonzero(), "aten::nonzero"),
        (lambda x: x[x > 2], "aten::index"),
        (lambda x: torch.bincount(x.long()), "aten::bincount"),
        (lambda x: x.unique(), "aten::_unique2"),
        (lambda x: x + torch.tensor(2.0), "aten::lift_fresh"),
        (lambda x: torch.cat([x, x.new_tensor([1.0])]), "aten::lift_fresh"),
        (backward_pass, "aten::_local_scalar_dense"),
    ],
)
def test_reads_are_found_by_name(program: Callable[[Tensor], Any], operation: str) -> None:
    with HostReads() as audit:
        program(X)
    assert operation in [read.operation for read in audit.found]


@pytest.mark.parametrize(
    "program",
    [
        lambda x: torch.where(x > 2, x, 0.0).cumprod(0),
        lambda x: x[torch.zeros(2, dtype=torch.long)].sum(),
        lambda x: x.new_full((2,), 3.0).to(torch.float64).copy_(x[:2]),
        lambda x: torch.nn.functional.cross_entropy(x[None], x.new_zeros(1, dtype=torch.long)),
    ],
)
def test_what_stays_on_the_device_is_not_found(program: Callable[[Tensor], Any]) -> None:
    with HostReads() as audit:
        program(X)
    assert audit.found == []


def test_moves_between_devices_are_found() -> None:
    """The meta device stands for a GPU."""
    with HostReads() as audit:
        X.to("meta")
    assert [read.operation for read in audit.found] == ["aten::_to_copy"]
    assert "move between host and device" in audit.found[0].reason


def test_a_refusal_names_the_line_of_the_program() -> None:
    message = r"cannot hold this step: aten::_local_scalar_dense at .*test_capture_audit"
    with pytest.raises(HostReadError, match=message), HostReads(refuse=True):
        branch(X)
    with HostReads() as audit:
        branch(X)
    assert audit.found[0].place.endswith("in branch")
