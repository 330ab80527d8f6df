"""Which body is chosen for what, and what none of them takes."""

import subprocess
import sys

import pytest
import torch

from pyro_bbits.kernels import quantize_row, use_body
from pyro_bbits.kernels.availability import HAS_TRITON
from pyro_bbits.kernels.dispatch import choose_body
from pyro_bbits.ladder import BitLadder

LADDER = BitLadder((2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_body_goes_by_type_and_place(dtype: torch.dtype) -> None:
    double = dtype == torch.float64
    assert choose_body(torch.zeros(2, dtype=dtype), LADDER) == ("reference" if double else "eager")
    if torch.cuda.is_available() and HAS_TRITON:
        on_gpu = torch.zeros(2, dtype=dtype, device="cuda")
        assert choose_body(on_gpu, LADDER) == ("reference" if double else "triton")
        assert choose_body(on_gpu, BitLadder((24,))) == ("reference" if double else "eager")


def test_forced_body_ends_with_its_block() -> None:
    x = torch.zeros(2)
    with use_body("reference"):
        with use_body("compiled"):
            assert choose_body(x, LADDER) == "compiled"
        assert choose_body(x, LADDER) == "reference"
    with pytest.raises(ZeroDivisionError), use_body("compiled"):
        raise ZeroDivisionError
    assert choose_body(x, LADDER) == "eager"


def test_forced_body_is_the_one_that_runs() -> None:
    """Only the reference has second derivatives."""
    x, row = torch.randn(5, requires_grad=True), torch.rand(2, requires_grad=True)
    with use_body("reference"):
        (first,) = torch.autograd.grad(quantize_row(x, row, signed=True, ladder=LADDER).sum(), row, create_graph=True)
    assert first.requires_grad


def test_triton_need_not_be_installed() -> None:
    program = """
import sys
sys.modules["triton"] = None  # as if it were not there
import torch, pyro_bbits
pyro_bbits.residual_quantize(torch.rand(4), torch.tensor(1.0), torch.rand(4), signed=True)
from pyro_bbits.kernels.availability import HAS_TRITON
assert not HAS_TRITON
assert not [name for name in sys.modules if name.startswith("pyro_bbits.kernels.triton")]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"x must be of floating point type; got torch.int64"):
        quantize_row(torch.arange(3), torch.rand(2), signed=True, ladder=LADDER)


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 2), ()])
def test_row_must_match_the_ladder(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"row must have shape \(2,\), the range and one gate .* of \(2, 4\); got"):
        quantize_row(torch.zeros(3), torch.rand(shape), signed=True, ladder=LADDER)


@pytest.mark.parametrize(("shape", "gates"), [((3, 2), (2,)), ((3, 2), (3, 1)), ((), (1,)), ((3,), ())])
def test_channel_gates_must_match_the_channels(shape: tuple[int, ...], gates: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"channel_gates must have shape \(C,\), one for each slice .*; got"):
        quantize_row(torch.zeros(shape), torch.rand(2), torch.rand(gates), signed=True, ladder=LADDER)
