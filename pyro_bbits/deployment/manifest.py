"""What a packed file says of a frozen network beside its tensors."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from pyro_bbits.deployment.bit_packing import container_bits
from pyro_bbits.deployment.frozen import FROZEN_LAYERS, FrozenQuantizer, frozen_layers
from pyro_bbits.insertion.fixed import FixedProducts
from pyro_bbits.insertion.products import ProductForward

__all__ = ["Manifest", "PackedLayer", "PackedProducts", "PackedQuantizer"]

Count = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(ge=2, le=32)]

RESIZED = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
"""Modules that know how many channels they have and may have lost some."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class PackedQuantizer(_Strict):
    """A quantizer of an activation; see :class:`~pyro_bbits.deployment.FrozenQuantizer`.

    Attributes:
        bits: Width in bits.
        beta: The range.
        signed: Whether it is symmetric around zero.
        tensor: Name of the tensor in the configuration.
    """

    bits: Width
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    signed: bool
    tensor: str

    @classmethod
    def of(cls, quantizer: FrozenQuantizer) -> "PackedQuantizer":
        """Describe a quantizer."""
        beta = quantizer.beta.item()
        return cls(bits=quantizer.bits, beta=beta, signed=quantizer.signed, tensor=quantizer.tensor)

    def build(self) -> FrozenQuantizer:
        """Make the quantizer."""
        return FrozenQuantizer(self.bits, self.beta, self.signed, self.tensor)


class PackedLayer(_Strict):
    """A frozen layer; see :class:`~pyro_bbits.deployment.FrozenLayer`.

    Attributes:
        kind: Class of the float layer.
        shape: Shape of the weight.
        dtype: Type of weight and bias in memory.
        groups: Groups of a convolution, else 1.
        bits: Width of the weight.
        signed: Whether its codes are symmetric around zero.
        packed_bits: Bits that each code takes in the file; None where the weight is float.
        weight_tensor: Name of the weight in the configuration.
        input: Its input quantizer.
        norm: Batch norm that was folded in.
        kept_norm: Batch norm that could not be.
        kept_norm_reason: Why not.
        bias: Whether the bias is there as float or as codes.
        dead: Removed output channels that are still there, as zeros.
    """

    kind: str
    shape: tuple[Count, ...]
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    groups: Annotated[int, Field(ge=1)]
    bits: Width
    signed: bool
    packed_bits: Literal[2, 4, 8, 16, 32] | None
    weight_tensor: str
    input: PackedQuantizer | None
    norm: str | None
    kept_norm: str | None
    kept_norm_reason: str | None
    bias: Literal["none", "float", "codes"]
    dead: tuple[Count, ...]

    @classmethod
    def of(cls, layer: Any) -> "PackedLayer":
        """Describe a frozen layer."""
        dtype: Any = str(layer.weight.dtype).removeprefix("torch.")
        packed_bits: Any = None if layer.codes is None else container_bits(layer.bits)
        return cls(
            kind=next(plain.__name__ for plain, frozen in FROZEN_LAYERS.items() if type(layer) is frozen),
            shape=tuple(layer.weight.shape),
            dtype=dtype,
            groups=getattr(layer, "groups", 1),
            bits=layer.bits,
            signed=layer.signed,
            packed_bits=packed_bits,
            weight_tensor=layer.weight_tensor,
            input=None if layer.input_quantizer is None else PackedQuantizer.of(layer.input_quantizer),
            norm=layer.norm,
            kept_norm=layer.kept_norm,
            kept_norm_reason=layer.kept_norm_reason,
            bias="codes" if layer.bias_codes is not None else "none" if layer.bias is None else "float",
            dead=tuple(layer.dead.nonzero().flatten().tolist()),
        )


class PackedProducts(_Strict):
    """A module that makes products of activations.

    Attributes:
        count: Products in a call.
        quantizers: Those of the operands, by the name that they have in the module.
    """

    count: Count
    quantizers: dict[str, PackedQuantizer]

    @classmethod
    def of(cls, visitor: FixedProducts) -> "PackedProducts":
        """Describe the products of a module."""
        named = ((name, module) for name, module in visitor.module.named_children() if name.startswith("matmul"))
        quantizers = {name: PackedQuantizer.of(m) for name, m in named if isinstance(m, FrozenQuantizer)}
        return cls(count=visitor.count, quantizers=quantizers)


class Manifest(_Strict):
    """The JSON in the header of a packed file.

    Attributes:
        schema_name: Always `pyro-bbits/packed-network` (the key `schema` in the file).
        version: Version of the schema, 1.
        layers: The frozen layers by module path.
        products: What makes products of activations, by module path.
        sizes: Channels of norms by module path.
    """

    schema_name: Literal["pyro-bbits/packed-network"] = Field(default="pyro-bbits/packed-network", alias="schema")
    version: Literal[1] = 1
    layers: dict[str, PackedLayer]
    products: dict[str, PackedProducts]
    sizes: dict[str, Count]

    @classmethod
    def of(cls, frozen: nn.Module) -> "Manifest":
        """Describe a frozen network.

        Raises:
            ValueError: If it holds no frozen layer.
        """
        layers = frozen_layers(frozen)
        if not layers:
            raise ValueError("there is no frozen layer in this network; give what pyro_bbits.freeze returned.")
        return cls(
            layers={name: PackedLayer.of(layer) for name, layer in layers.items()},
            products={name: PackedProducts.of(visitor) for name, visitor in _product_makers(frozen)},
            sizes={name: int(m.num_features) for name, m in frozen.named_modules() if isinstance(m, RESIZED)},
        )


def _product_makers(net: nn.Module) -> Iterator[tuple[str, FixedProducts]]:
    for name, module in net.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, ProductForward) and isinstance(forward.visitor, FixedProducts):
            yield name, forward.visitor
