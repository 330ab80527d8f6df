r"""A linear layer whose quantized weight is not kept for the backward pass.

.. math::
    y = x \, Q(w)^\top + b

Autograd keeps `Q(w)` until the gradient of `x` is known: as much memory again as all weights have. Here it is made once
more there, by one pass over `w`, and gone before the gradient of `w` takes its place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bbits.kernels.dispatch import check, choose_body, quantize_row
from pyro_bbits.kernels.grid import grid_constants
from pyro_bbits.ladder import BitLadder

__all__ = ["can_spare", "quantized_linear"]

LARGE = 2**20
"""Elements of a weight whose memory is worth another pass."""


def can_spare(weight: Tensor, ladder: BitLadder) -> bool:
    """Whether :func:`quantized_linear` keeps no quantized weight: it is large, and the Triton kernels quantize it."""
    return weight.numel() >= LARGE and choose_body(weight, ladder) == "triton" and not torch.compiler.is_compiling()


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    row: Tensor,
    channel_gates: Tensor | None,
    bias: Tensor | None,
    *,
    ladder: BitLadder,
    signed: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A linear layer on a weight that is quantized as :func:`pyro_bbits.kernels.quantize_row` does.

    Where :func:`can_spare` says so, `x` and `weight` are all that is kept for the backward pass.

    Arguments:
        x: `(*, in)`.
        weight: `(out, in)`.
        row: `(1 + R,)`, range and residual gates of the weight.
        channel_gates: `(out,)` gates of the output channels; None means 1.
        bias: `(out,)` or None.
        ladder: The bit widths.
        signed: Whether the range of the weight is symmetric around zero.
        dtype: Type of the quantized weight, that of the weight by default; input and bias must have it.

    Returns:
        `(*, out)`.

    Raises:
        ValueError: If row or gates do not fit.

    Example:
        >>> x, weight, ladder = torch.ones(2, 3), torch.tensor([[0.3, -0.6, 1.0]]), BitLadder((2, 4))
        >>> quantized_linear(x, weight, torch.tensor([1.0, 0.0]), None, None, ladder=ladder)  # 0, -2/3, 2/3
        tensor([[0.],
                [0.]])
    """
    check(weight, row, channel_gates, ladder)
    dtype = dtype or weight.dtype
    if not can_spare(weight, ladder):
        options: dict[str, Any] = {"signed": signed, "ladder": ladder, "dtype": dtype, "spend_grad": True}
        return F.linear(x, quantize_row(weight, row, channel_gates, **options), bias)
    from pyro_bbits.kernels import triton_linear  # imports Triton, which need not be installed

    # rows alone: a linear layer of more dimensions ends in a view, which nobody could change in place
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    grid = grid_constants(ladder, signed)
    y: Tensor = triton_linear.SparedLinear.apply(rows, weight, row, channel_gates, bias, grid, dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], len(weight))
