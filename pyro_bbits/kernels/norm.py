r"""Batch norm, channel gates, ReLU and activation quantizer of a training step in one function.

The unsigned quantizer clips at zero, so it is the ReLU too:

.. math::
    \mathrm{out} = Q_{\ge 0}\Big(z_c \Big(w_c \frac{y - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + b_c\Big)\Big)

with mean and variance of each channel `c` over the batch.
"""

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bbits.ladder import BitLadder
from pyro_bbits.quantizer import DEFAULT_LADDER, residual_quantize

__all__ = ["can_fuse", "normalize_and_quantize", "normalize_and_quantize_plain"]

WIDEST_BASE = 16
"""Codes of a coarsest rung above these bits are not exact in the kernels."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def is_channels_innermost(y: Tensor) -> bool:
    """Whether memory has the channels of dimension 1 side by side, without gaps: `[N, C]`, or images channels last."""
    if y.dim() == 2:
        return y.is_contiguous()
    return y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last)


def can_fuse(y: Tensor, ladder: BitLadder) -> bool:
    """Whether :func:`normalize_and_quantize` takes this input by its kernels; no value of it is looked at.

    They need Triton, a GPU, channels innermost (see :func:`is_channels_innermost`), two samples per channel or more,
    and a coarsest width of 16 bits or less.
    """
    return (
        y.is_cuda
        and _has_triton()
        and y.dtype in FLOATS
        and is_channels_innermost(y)
        and y.numel() > y.shape[1]
        and ladder.base <= WIDEST_BASE
    )


def normalize_and_quantize(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    row: Tensor,
    *,
    eps: float,
    ladder: BitLadder = DEFAULT_LADDER,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with statistics of the batch, channel gates, ReLU and unsigned quantizer.

    By Triton where :func:`can_fuse` says so, else in plain PyTorch. By Triton the input is read twice, and only it
    and five numbers per channel are kept for the backward pass. Nothing waits for the host, so a CUDA graph
    can hold it.

    Arguments:
        y: `(N, C)` or `(N, C, *)`, the output of a layer.
        weight: `(C,)` scale of the norm.
        bias: `(C,)` shift of the norm.
        gate: `(C,)` channel gates; None means 1.
        row: `(1 + R,)` float32: range beta, then the residual gates.
        eps: Added to the variance.
        ladder: The bit widths.

    Returns:
        The quantized tensor, like `y`, then mean and unbiased variance of each channel, `(C,)` float32, which running
        statistics take; no gradient flows through these.

    Raises:
        ValueError: If the row does not fit the ladder, or a channel has one value only.

    Example:
        >>> y = torch.randn(64, 3)
        >>> row = torch.tensor([2.0, 1.0, 1.0, 0.0, 0.0])  # 8 bits
        >>> out, mean, variance = normalize_and_quantize(y, torch.ones(3), torch.zeros(3), None, row, eps=1e-5)
        >>> torch.allclose(mean, y.mean(0), atol=1e-6), bool(((out >= 0) & (out <= 2)).all())
        (True, True)
    """
    if row.shape != (1 + len(ladder.residuals),):
        raise ValueError(
            f"row must have shape ({1 + len(ladder.residuals)},), the range and one gate for each rung above the first "
            f"of {ladder.bits}; got {tuple(row.shape)}."
        )
    if can_fuse(y, ladder):
        from pyro_bbits.kernels.fused_norm import fused_norm

        return fused_norm(y, weight, bias, gate, row, eps, ladder)
    return normalize_and_quantize_plain(y, weight, bias, gate, row, eps=eps, ladder=ladder)


def normalize_and_quantize_plain(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    row: Tensor,
    *,
    eps: float,
    ladder: BitLadder = DEFAULT_LADDER,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, one step after another. Arguments and result are those of :func:`normalize_and_quantize`."""
    if gate is not None:
        weight, bias = weight * gate.to(weight.dtype), bias * gate.to(bias.dtype)
    mean, variance = (
        torch.zeros_like(weight),
        torch.zeros_like(weight),
    )  # with momentum 1 they become those of the batch
    normal = F.batch_norm(y, mean, variance, weight, bias, True, 1.0, eps)
    return residual_quantize(normal, row[0], row[1:], signed=False, ladder=ladder), mean, variance
