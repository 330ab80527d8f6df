"""A compiled quantizer gives the values and gradients of the eager one: PyTorch 2.11 can make the latter zero."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_bbits.kernels import quantize_row
from pyro_bbits.kernels.dispatch import choose_body
from pyro_bbits.ladder import BitLadder

pytestmark = [
    # the compiler's own
    pytest.mark.filterwarnings(r"ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.script.*deprecated:DeprecationWarning"),
]

LADDER = BitLadder()

signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@pytest.fixture(autouse=True)
def forget_compiled() -> None:
    torch.compiler.reset()


def draw(dtype: torch.dtype, pruned: bool) -> list[Tensor]:
    x = torch.randn(6, 8, 5, 5).contiguous(memory_format=torch.channels_last).to(dtype)
    leaves = [x, torch.rand(5) + 0.1, *([torch.rand(6)] if pruned else [])]
    return [leaf.requires_grad_() for leaf in leaves]


def run(function: Any, leaves: list[Tensor], g: Tensor) -> list[Tensor]:
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, g.to(out.dtype))]


def compare_compiled(given: str, written: str, pruned: bool, signed: bool, backend: str) -> None:
    """Values may not differ; sums may be in another order."""
    bodies: list[str] = []

    def quantize(x: Tensor, row: Tensor, z2: Tensor | None = None) -> Tensor:
        bodies.append(choose_body(x, LADDER))
        return quantize_row(x, row, z2, signed=signed, ladder=LADDER, dtype=getattr(torch, written))

    leaves = draw(getattr(torch, given), pruned)
    g = torch.randn_like(leaves[0])
    eager = run(quantize, leaves, g)
    compiled = run(torch.compile(quantize, backend=backend, fullgraph=True), leaves, g)
    assert bodies == ["eager", "compiled"]
    assert torch.equal(compiled[0], eager[0]) and torch.equal(compiled[1], eager[1])
    torch.testing.assert_close(compiled[2:], eager[2:], rtol=1e-5, atol=1e-5)
    assert all(gradient.count_nonzero() > 0 for gradient in compiled)


@pytest.mark.parametrize(
    ("given", "written", "pruned", "signed"),
    [("float32", "float32", False, False), ("float32", "bfloat16", True, True)],
)
def test_traced_equals_eager(given: str, written: str, pruned: bool, signed: bool) -> None:
    """Without code generation, which takes its time; a gradient gets lost in tracing or not at all."""
    compare_compiled(given, written, pruned, signed, "aot_eager")


@pytest.mark.slow
@signs
@pytest.mark.parametrize("pruned", [True, False], ids=["z2", "no-z2"])
@pytest.mark.parametrize(
    ("given", "written"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_compiled_equals_eager(given: str, written: str, pruned: bool, signed: bool) -> None:
    compare_compiled(given, written, pruned, signed, "inductor")
