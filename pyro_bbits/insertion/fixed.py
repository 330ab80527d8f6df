"""A network at a fixed bit configuration: no gates, no Pyro, ordinary layers."""

import torch
from torch import Tensor, nn

from pyro_bbits.quantizer import quantize_fixed

__all__ = ["FIXED_LAYERS", "FixedLayer", "FixedQuantizer"]


class FixedQuantizer(nn.Module):
    """Uniform quantization at a fixed width and range.

    Arguments:
        bits: Width in bits; above 24 the input is only clipped to the range.
        beta: The range, above 0.
        signed: Whether the range is symmetric around zero.
    """

    beta: Tensor

    def __init__(self, bits: int, beta: float, signed: bool) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        self.register_buffer("beta", torch.tensor(beta), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize any tensor."""
        return quantize_fixed(x, self.beta, self.bits, signed=self.signed)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, beta={self.beta.item():.6g}, signed={self.signed}"


class FixedLayer:
    """What a layer with fixed quantization adds to its float class: its input is quantized; its weight already is."""

    input_quantizer: FixedQuantizer

    def forward(self, x: Tensor) -> Tensor:
        """The float layer on its quantized input."""
        y: Tensor = super().forward(self.input_quantizer(x))  # type: ignore[misc]
        return y


class FixedLinear(FixedLayer, nn.Linear):
    """A :class:`torch.nn.Linear` with a fixed input quantizer."""


class FixedConv1d(FixedLayer, nn.Conv1d):
    """A :class:`torch.nn.Conv1d` with a fixed input quantizer."""


class FixedConv2d(FixedLayer, nn.Conv2d):
    """A :class:`torch.nn.Conv2d` with a fixed input quantizer."""


FIXED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FixedLinear,
    nn.Conv1d: FixedConv1d,
    nn.Conv2d: FixedConv2d,
}
"""Class of each supported layer at fixed widths."""
