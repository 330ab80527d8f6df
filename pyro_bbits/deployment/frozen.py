"""Layers of a frozen network: ordinary layers with integer codes, scales and a quantizer on the input."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from pyro_bbits.deployment.quant_node import quant_node
from pyro_bbits.insertion.layers import gate_outputs
from pyro_bbits.kernels.grid import half_width
from pyro_bbits.ladder import FLOAT32_BITS

__all__ = [
    "FROZEN_LAYERS",
    "FrozenLayer",
    "FrozenQuantizer",
    "code_dtype",
    "code_range",
    "frozen_layers",
    "scale_outputs",
]


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer code of a width: symmetric if signed (2 bits are ternary), else from 0.

    Example:
        >>> code_range(4, True), code_range(4, False)
        ((-7, 7), (0, 15))
    """
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def code_dtype(bits: int, signed: bool) -> torch.dtype:
    """The smallest of int8, uint8, int16 and int32 that holds all codes of a width."""
    low, high = code_range(bits, signed)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        limits = torch.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return dtype
    raise ValueError(f"integer codes exist up to {FLOAT32_BITS} bits; got {bits}.")


class FrozenQuantizer(nn.Module):
    r"""Uniform quantization of an activation: :math:`x_q = s \, \mathrm{clamp}(\mathrm{round}(x / s), l, h)`.

    Ties round to even, the quotient is a float32 division, and codes are clamped as integers.

    Arguments:
        bits: Width in bits; above 24 the input is only clipped to the range.
        beta: The range, above 0.
        signed: Whether the range is symmetric around zero.
        tensor: Name of the tensor in the configuration; where several layers read one tensor they have equal
            quantizers of the same name.

    Attributes:
        scale: The step `s`, a float32 scalar: `2 beta / (2^bits - 1)` if signed, else `beta / (2^bits - 1)`.
        beta: The range, a float32 scalar.
        low: Smallest code `l`.
        high: Largest code `h`.
    """

    scale: Tensor
    beta: Tensor

    def __init__(self, bits: int, beta: float, signed: bool, tensor: str = "") -> None:
        super().__init__()
        self.bits, self.signed, self.tensor = bits, signed, tensor
        self.low, self.high = code_range(bits, signed)
        self.register_buffer("beta", torch.tensor(beta))
        self.register_buffer("scale", self.beta / half_width(bits, signed))

    @property
    def is_integer(self) -> bool:
        """Whether there are codes at all; else the input is only clipped."""
        return self.bits <= FLOAT32_BITS

    def forward(self, x: Tensor) -> Tensor:
        """Quantize any tensor; float32 arithmetic, the type of `x` returned."""
        if not self.is_integer:
            return torch.clamp(x.float(), -self.beta if self.signed else torch.zeros_like(self.beta), self.beta).to(
                x.dtype
            )
        if torch.onnx.is_in_onnx_export():
            return quant_node(x, self.scale, self.bits, self.signed)
        codes = (x.float() / self.scale).round().clamp(self.low, self.high)
        return (codes * self.scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, scale={self.scale.item():.6g}, signed={self.signed}"


class FrozenLayer:
    r"""What a frozen layer adds to its float class, of which it is an ordinary subclass.

    It computes `layer(input_quantizer(x))` with the float `weight` and `bias`, which repeat what the codes say:
    :math:`w = k \, s_c` with code `k` and the scale of output channel `c`, batch norm folded in.

    Attributes:
        codes: Integer codes, shaped like the weight, in the smallest of int8, uint8, int16 and int32; None above 24
            bits, where the weight is plain float.
        scale: float32, a scalar or one for each output channel, `(channels,)`, never zero; None where codes are. It is
            positive, but for channels of an unsigned weight whose batch norm has a negative factor; a signed weight
            takes such a sign into its codes.
        bits: Width of the weight in bits.
        signed: Whether codes are symmetric around zero, else they start there.
        weight_tensor: Name of the weight in the configuration; tied weights share it.
        input_quantizer: The quantizer of the input, or None where the layer reads the network's own input or indices.
        bias_codes: int32 codes of a bias that was snapped to the grid of `bias_scale`, or None.
        norm: Module path of the batch norm that was folded in, or None.
        kept_norm: Module path of a batch norm behind the layer that could not be folded, or None.
        kept_norm_reason: Why not.
        dead: `(channels,)` booleans, output channels that the configuration removes and that are exactly zero: weight,
            bias and everything that reads them.
    """

    weight: Any
    bias: Any
    codes: Tensor | None
    scale: Tensor | None
    bias_codes: Tensor | None
    dead: Tensor
    input_quantizer: FrozenQuantizer | None
    bits: int
    signed: bool
    weight_tensor: str
    norm: str | None
    kept_norm: str | None
    kept_norm_reason: str | None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The float layer on its quantized input."""
        if self.input_quantizer is not None:
            input = self.input_quantizer(input)
        if self.scale is None or not torch.onnx.is_in_onnx_export():
            y: Tensor = super().forward(input, *args, **kwargs)  # type: ignore[misc]
            return y
        # an attribute of the instance goes before the parameter, for this one call of the layer's own code
        self.__dict__["weight"] = quant_node(self.weight, self.weight_scale, self.bits, self.signed)
        try:
            y = super().forward(input, *args, **kwargs)  # type: ignore[misc]
        finally:
            del self.__dict__["weight"]
        return y

    @property
    def weight_scale(self: Any) -> Tensor:
        """The scale shaped so that it multiplies the codes: a scalar, or of size 1 along the axes of other channels."""
        scale: Tensor = self.scale
        if scale.dim() == 0 or isinstance(self, nn.Embedding):
            return scale
        shape = [len(self.dead), *[1] * (self.weight.dim() - 1)]
        if isinstance(self, _ConvTransposeNd):
            shape[:2] = [1 if self.groups == 1 else self.in_channels, self.out_channels // self.groups]
        return gate_outputs(self, scale.new_ones(shape), scale)

    @property
    def bias_scale(self) -> Tensor | None:
        """Step `s_x s_c` of the accumulator and of a snapped bias, `(channels,)`; None without codes on both sides."""
        quantizer = self.input_quantizer
        if self.scale is None or quantizer is None or not quantizer.is_integer:
            return None
        return (quantizer.scale * self.scale).expand(len(self.dead))

    def set_codes(self: Any, codes: Tensor, scale: Tensor) -> None:
        """Take codes and scales, and make the float weight repeat them."""
        self.codes, self.scale = codes, scale
        weight = scale_outputs(self, codes.to(torch.promote_types(self.weight.dtype, torch.float32)), scale)
        self.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)

    def set_bias_codes(self: Any, codes: Tensor) -> None:
        """Take int32 codes of the bias, and make the float bias repeat them."""
        self.bias_codes = codes
        self.bias = nn.Parameter((codes.double() * self.bias_scale.double()).to(self.weight.dtype), requires_grad=False)

    def extra_repr(self: Any) -> str:
        codes = "float weight" if self.codes is None else f"weight_bits={self.bits}, signed={self.signed}"
        return f"{super().extra_repr()}, {codes}"  # type: ignore[misc]


def scale_outputs(layer: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """A weight, its output channels multiplied by scales of shape `(channels,)` or by one scalar."""
    return weight * scale if scale.dim() == 0 else gate_outputs(layer, weight, scale)


class FrozenLinear(FrozenLayer, nn.Linear):
    """A frozen :class:`torch.nn.Linear`."""


class FrozenConv1d(FrozenLayer, nn.Conv1d):
    """A frozen :class:`torch.nn.Conv1d`."""


class FrozenConv2d(FrozenLayer, nn.Conv2d):
    """A frozen :class:`torch.nn.Conv2d`."""


class FrozenConv3d(FrozenLayer, nn.Conv3d):
    """A frozen :class:`torch.nn.Conv3d`."""


class FrozenConvTranspose1d(FrozenLayer, nn.ConvTranspose1d):
    """A frozen :class:`torch.nn.ConvTranspose1d`."""


class FrozenConvTranspose2d(FrozenLayer, nn.ConvTranspose2d):
    """A frozen :class:`torch.nn.ConvTranspose2d`."""


class FrozenConvTranspose3d(FrozenLayer, nn.ConvTranspose3d):
    """A frozen :class:`torch.nn.ConvTranspose3d`."""


class FrozenEmbedding(FrozenLayer, nn.Embedding):
    """A frozen :class:`torch.nn.Embedding`; it has no bias."""

    bias = None


FROZEN_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FrozenLinear,
    nn.Conv1d: FrozenConv1d,
    nn.Conv2d: FrozenConv2d,
    nn.Conv3d: FrozenConv3d,
    nn.ConvTranspose1d: FrozenConvTranspose1d,
    nn.ConvTranspose2d: FrozenConvTranspose2d,
    nn.ConvTranspose3d: FrozenConvTranspose3d,
    nn.Embedding: FrozenEmbedding,
}
"""Frozen class of each supported layer."""


def frozen_layers(net: nn.Module) -> dict[str, Any]:
    """The frozen layers of a network by module path, in the order of its modules."""
    return {name: module for name, module in net.named_modules() if isinstance(module, FrozenLayer)}
