"""The entries of a bit configuration: quantized tensors, layers with their BOPs, and what multiplies in float."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pyro_bbits.cost import FLOAT_BITS, INPUT_BITS
from pyro_bbits.insertion.products import MATMUL

__all__ = ["FloatBits", "LayerBits", "StrictModel", "TensorBits", "bops_in_percent", "layer_bops"]


class StrictModel(BaseModel):
    """Takes nothing for something else, and no unknown fields; what it holds stays."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorBits(StrictModel):
    """A quantized tensor.

    Attributes:
        name: Its name, e.g. `conv1.weight` or `conv2.input`.
        kind: Weight or activation.
        bits: Width in bits; 0 if every channel of the weight is removed.
        beta: Range: values lie in [-beta, beta] if signed, else [0, beta]; the step is 2 beta / (2^bits - 1) or
            beta / (2^bits - 1).
        signed: Whether the range is symmetric around zero.
    """

    name: str
    kind: Literal["weight", "activation"]
    bits: Annotated[int, Field(ge=0, le=32)]
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    signed: bool


class LayerBits(StrictModel):
    """A layer with quantized weight and input, or a product of two activations.

    Attributes:
        name: Module path; of a product, that of the module that makes it, and its number: `attention.matmul0`.
        kind: Class of the float layer, e.g. `Conv2d`, or `MatMul`.
        weight: Name of its weight tensor; of a product, of its right operand, null if that is the network's own input.
        input: Name of its input tensor, or of the left operand; null where it reads the network's own input, which
            stays as it is, or indices.
        norm: Module path of the batch norm whose scale and shift are zeroed with removed channels, if any.
        channels: Number of output channels.
        removed: Output channels that are exactly zero, in ascending order.
        macs: Multiply-accumulates per sample before removal.
        kept_macs: Fraction of these between kept channels.
        bops: BOPs per sample at this configuration, the product of the above with both widths.
    """

    name: str
    kind: str
    weight: str | None
    input: str | None
    norm: str | None
    channels: Annotated[int, Field(ge=1)]
    removed: tuple[Annotated[int, Field(ge=0)], ...]
    macs: Annotated[int, Field(ge=0)]
    kept_macs: Annotated[float, Field(ge=0, le=1)]
    bops: Annotated[float, Field(ge=0)]

    @property
    def is_product(self) -> bool:
        """Whether it is a product of two activations."""
        return self.kind == MATMUL

    @model_validator(mode="after")
    def _check_removed(self) -> Self:
        if list(self.removed) != sorted(set(self.removed)) or any(c >= self.channels for c in self.removed):
            raise ValueError(f"removed channels of {self.name!r} must ascend and lie below {self.channels}")
        return self


class FloatBits(StrictModel):
    """What multiplies in float; it counts as 32 x 32 bit.

    Attributes:
        name: Module path.
        kind: Class name.
        macs: Multiply-accumulates per sample.
        reason: Why it is not quantized.
    """

    name: str
    kind: str
    macs: Annotated[int, Field(ge=0)]
    reason: str


def layer_bops(layer: LayerBits, bits: Mapping[str, int]) -> float:
    """BOPs of a layer per sample, given the widths of all tensors by name."""
    weight, read = (INPUT_BITS if name is None else bits[name] for name in (layer.weight, layer.input))
    return weight * read * layer.kept_macs * layer.macs


def bops_in_percent(layers: tuple[LayerBits, ...], float_layers: tuple[FloatBits, ...]) -> float:
    """BOPs of all layers in percent of those of the unpruned network at 32 x 32 bits."""
    left = FLOAT_BITS**2 * sum(layer.macs for layer in float_layers)
    total = FLOAT_BITS**2 * sum(layer.macs for layer in layers) + left
    return 100 * (sum(layer.bops for layer in layers) + left) / max(1, total)
