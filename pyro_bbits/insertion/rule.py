"""The extension point for other quantizers than the gated residual one."""

from typing import ClassVar

import torch
from torch import Tensor, nn

__all__ = ["QuantizationRule", "apply_rule"]


class QuantizationRule(nn.Module):
    r"""Takes the place of the gated residual quantizer for all tensors of a network: `network.rule = rule`.

    `rule(row, x)` is the quantized form of tensor number `row` of `network.layout.tensors`, shaped like `x`. It is
    called with float32 (or float64) and its result takes the type that the pass needs, so that autocast does not reach
    its arithmetic. Channel gates still multiply the result; residual gates and the network's ranges have no effect, no
    fused kernel is used, and evaluations take the same way as training. The rule is a part of the network: its
    parameters are saved, moved and trained with it.

    Attributes:
        own_rate: Whether its parameters are trained as ranges are, by an Adam at `Recipe.range_lr`; if not, they are
            trained with the weights.
    """

    own_rate: ClassVar[bool] = False

    def forward(self, row: int, x: Tensor) -> Tensor:
        """Quantize a tensor."""
        raise NotImplementedError

    def widths(self) -> Tensor:
        """Width of each tensor in bits as the cost counts it, `(T,)`; 32 for one that stays in float."""
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """What training adds to the loss, in nats per sample; None for nothing."""
        return None


def apply_rule(rule: QuantizationRule, row: int, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Call a rule in float32 or float64 and give its result the type `dtype`, or that of `x`."""
    wide = x if x.dtype == torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        quantized: Tensor = rule(row, wide)
    return quantized.to(dtype or x.dtype)
