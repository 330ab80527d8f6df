r"""Batch norm, channel gates, max pooling, ReLU and activation quantizer of a training step in one function.

The unsigned quantizer clips at zero, so it is the ReLU too:

.. math::
    \mathrm{out} = Q_{\ge 0}\Big(z_c \Big(w_c \frac{y - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} + b_c\Big)\Big)

with mean and variance of each channel `c` over the batch. With pooling, the quantizer is given the largest value of
each window of 2 x 2; whether the ReLU comes before or after makes no difference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bbits.kernels.dispatch import choose_body, quantize_row
from pyro_bbits.ladder import BitLadder

__all__ = ["can_fuse", "has_windows", "is_channels_innermost", "normalize_and_quantize", "normalize_and_quantize_plain"]


def is_channels_innermost(y: Tensor) -> bool:
    """Whether memory has the channels of dimension 1 side by side, without gaps: `[N, C]`, or images channels last."""
    if y.dim() == 2:
        return y.is_contiguous()
    return y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last)


def has_windows(y: Tensor) -> bool:
    """Whether windows of 2 x 2 cover images `(N, C, H, W)`."""
    return y.dim() == 4 and y.shape[2] % 2 == 0 and y.shape[3] % 2 == 0


def can_fuse(y: Tensor, ladder: BitLadder, pooled: bool = False) -> bool:
    """Whether :func:`normalize_and_quantize` has kernels for this input; no value of it is looked at.

    They run where :func:`pyro_bbits.kernels.quantize_row` takes its own Triton kernels, need channels innermost in
    memory and more than one value per channel, images of even height and width if these are `pooled`, and cannot be
    seen through by `torch.compile`.
    """
    return (
        choose_body(y, ladder) == "triton"
        and is_channels_innermost(y)
        and (not pooled or has_windows(y))
        and y.numel() > y.shape[1]
        and not torch.compiler.is_compiling()
    )


def normalize_and_quantize(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    row: Tensor,
    *,
    eps: float,
    ladder: BitLadder,
    pooled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with statistics of the batch, channel gates, max pooling if wanted, ReLU and unsigned quantizer.

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
        pooled: Whether the largest value of each window of 2 x 2 is taken, `(N, C, H, W)` to `(N, C, H / 2, W / 2)`.

    Returns:
        The quantized tensor, like `y` but for the pooling, then mean and unbiased variance of each channel, `(C,)`
        float32, which running statistics take; no gradient flows through these.

    Raises:
        ValueError: If the row does not fit the ladder, or a channel has one value only.

    Example:
        >>> y = torch.randn(64, 3)
        >>> row, ladder = torch.tensor([2.0, 1.0, 0.0]), BitLadder((2, 4, 8))  # 4 bits
        >>> weight, bias = torch.ones(3), torch.zeros(3)
        >>> out, mean, variance = normalize_and_quantize(y, weight, bias, None, row, eps=1e-5, ladder=ladder)
        >>> torch.allclose(mean, y.mean(0), atol=1e-6), len(out.unique())
        (True, 16)
    """
    if row.shape != (len(ladder.bits),):
        raise ValueError(
            f"row must have shape ({len(ladder.bits)},), the range and one gate for each rung above the first of "
            f"{ladder.bits}; got {tuple(row.shape)}."
        )
    if can_fuse(y, ladder, pooled):
        from pyro_bbits.kernels import triton_norm  # imports Triton, which need not be installed

        return triton_norm.normalize_and_quantize(y, weight, bias, gate, row, eps=eps, ladder=ladder, pooled=pooled)
    return normalize_and_quantize_plain(y, weight, bias, gate, row, eps=eps, ladder=ladder, pooled=pooled)


def normalize_and_quantize_plain(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None,
    row: Tensor,
    *,
    eps: float,
    ladder: BitLadder,
    pooled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, one step after another. Arguments and result are those of :func:`normalize_and_quantize`."""
    if gate is not None:
        weight, bias = weight * gate.to(weight.dtype), bias * gate.to(bias.dtype)
    mean, variance = (
        torch.zeros_like(weight),
        torch.zeros_like(weight),
    )  # with momentum 1 they become those of the batch
    normal = F.batch_norm(y, mean, variance, weight, bias, True, 1.0, eps)
    normal = F.max_pool2d(normal, 2) if pooled else normal
    return quantize_row(normal, row, signed=False, ladder=ladder), mean, variance
