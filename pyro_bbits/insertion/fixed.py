"""A network at a fixed bit configuration: no gates, no Pyro, ordinary layers."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyro_bbits.insertion.products import check_count
from pyro_bbits.quantizer import quantize_fixed

__all__ = ["FIXED_LAYERS", "FixedLayer", "FixedProducts", "FixedQuantizer"]


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

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The float layer on its quantized input."""
        y: Tensor = super().forward(self.input_quantizer(input), *args, **kwargs)  # type: ignore[misc]
        return y


class FixedLinear(FixedLayer, nn.Linear):
    """A :class:`torch.nn.Linear` with a fixed input quantizer."""


class FixedConv1d(FixedLayer, nn.Conv1d):
    """A :class:`torch.nn.Conv1d` with a fixed input quantizer."""


class FixedConv2d(FixedLayer, nn.Conv2d):
    """A :class:`torch.nn.Conv2d` with a fixed input quantizer."""


class FixedConv3d(FixedLayer, nn.Conv3d):
    """A :class:`torch.nn.Conv3d` with a fixed input quantizer."""


class FixedConvTranspose1d(FixedLayer, nn.ConvTranspose1d):
    """A :class:`torch.nn.ConvTranspose1d` with a fixed input quantizer."""


class FixedConvTranspose2d(FixedLayer, nn.ConvTranspose2d):
    """A :class:`torch.nn.ConvTranspose2d` with a fixed input quantizer."""


class FixedConvTranspose3d(FixedLayer, nn.ConvTranspose3d):
    """A :class:`torch.nn.ConvTranspose3d` with a fixed input quantizer."""


FIXED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FixedLinear,
    nn.Conv1d: FixedConv1d,
    nn.Conv2d: FixedConv2d,
    nn.Conv3d: FixedConv3d,
    nn.ConvTranspose1d: FixedConvTranspose1d,
    nn.ConvTranspose2d: FixedConvTranspose2d,
    nn.ConvTranspose3d: FixedConvTranspose3d,
}
"""Class of each supported layer whose input is quantized, at fixed widths."""


class FixedProducts:
    """Quantizes the operands of the products that a module makes, at fixed widths.

    A visitor for :class:`~pyro_bbits.insertion.products.ProductForward`. The quantizers are submodules of the module,
    `matmul0_left` and so on; an operand without one stays as it is.

    Arguments:
        module: The module.
        owner: Its path.
        count: Products that it makes in a call.
    """

    def __init__(self, module: nn.Module, owner: str, count: int) -> None:
        self.module, self.owner, self.count = module, owner, count

    def add(self, index: int, side: Literal["left", "right"], quantizer: FixedQuantizer) -> None:
        """Quantize one operand of product number `index`."""
        self.module.add_module(f"matmul{index}_{side}", quantizer)

    def __call__(self, index: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize the operands of one product."""
        return self._quantize(index, "left", left), self._quantize(index, "right", right)

    def finish(self, count: int) -> None:
        """Raise a RuntimeError if the call made another number of products."""
        check_count(self.owner, self.count, count)

    def _quantize(self, index: int, side: str, x: Tensor) -> Tensor:
        quantizer = getattr(self.module, f"matmul{index}_{side}", None)
        return x if quantizer is None else quantizer(x)
